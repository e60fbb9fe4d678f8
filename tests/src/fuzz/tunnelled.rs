//! Random packets in tunnels, as other nodes send them with direct server return, and as nobody should.

use std::net::{IpAddr, SocketAddr};

use trama_proxy::dataplane::ebpf::Hook;
use trama_proxy::model::{Endpoint, FrontendAddress};

use super::bed::{Link, cluster_ip, family, is_local, local_pod, machine, neighbour, outside, remote_pod};
use super::direct::Course;
use super::model::{Crossing, Flow, Model};
use super::read::{ACK, FIN, RST, SYN, Tuple};
use super::traffic::{Sent, Traffic};
use super::tunnel::Tunnel;
use crate::packet::Packet;

impl Traffic {
    /// A packet of a client's that another node has put into a tunnel.
    pub(super) fn tunnelled(&mut self, model: &Model) -> Sent {
        let of = self.rng.usize(0..2);
        let (destination, protocol) = self.destination(of);
        let of = family(destination.ip());
        let source = match self.rng.u8(0..10) {
            0 => remote_pod(self.rng.u16(2..10)),
            1 => neighbour(100),
            2 => cluster_ip(self.rng.u16(1..40)),
            3 => machine(self.rng.u16(10..13)),
            _ => outside(self.rng.u16(1..200)),
        };
        let source = SocketAddr::new(source[of], self.rng.u16(1024..1060));
        let flags = [SYN, SYN, ACK, ACK, ACK | FIN, RST][self.rng.usize(0..6)];
        let packet = self.dressed(Tuple { source, destination, protocol }, flags);
        let endpoint = self.endpoint(model, destination);
        self.wrapped(&packet, endpoint)
    }

    /// Some endpoint of those who listen there, or whatever address.
    fn endpoint(&mut self, model: &Model, destination: SocketAddr) -> IpAddr {
        let of = family(destination.ip());
        let listens = |address: &FrontendAddress| match address {
            FrontendAddress::Ip(ip) => *ip == destination.ip(),
            FrontendAddress::NodePort => true,
        };
        let services = model.snapshot.services.values().filter(|service| {
            let mut frontends = service.frontends.iter();
            service.name.family as usize == of
                && frontends.any(|frontend| frontend.port == destination.port() && listens(&frontend.address))
        });
        let all = services.flat_map(|service| service.cluster_endpoints.iter().chain(&service.local_endpoints));
        let all = all.map(|endpoint: &Endpoint| endpoint.address().ip());
        // A tunnel to another node's only passes.
        let elsewhere = self.rng.u8(0..8) == 0;
        let all: Vec<IpAddr> = all.filter(|address| elsewhere || is_local(*address)).collect();
        match self.rng.u8(0..8) {
            0 => local_pod(self.rng.u16(2..10))[of],
            1 => machine(11)[of],
            _ if all.is_empty() => local_pod(2)[of],
            _ => all[self.rng.usize(0..all.len())],
        }
    }

    /// A packet of a flow's client: in a tunnel more often than not, where the flow came in one.
    pub(super) fn sent_as(&mut self, flow: &Flow, crossing: Crossing, packet: &Packet) -> Sent {
        if flow.course != Course::In || self.rng.u8(0..4) == 0 {
            return self.sent(crossing, packet);
        }
        let of = family(packet.source);
        let endpoint =
            if self.rng.u8(0..12) == 0 { local_pod(self.rng.u16(2..10))[of] } else { flow.out.destination.ip() };
        self.wrapped(packet, endpoint)
    }

    fn wrapped(&mut self, packet: &Packet, endpoint: IpAddr) -> Sent {
        let node = match self.rng.u8(0..24) {
            0 => machine(11),
            1 => remote_pod(self.rng.u16(2..10)),
            2 => local_pod(self.rng.u16(2..10)),
            3 => outside(self.rng.u16(1..20)),
            _ => machine(12),
        };
        let from = if self.rng.u8(0..40) == 0 { self.impossible(family(endpoint)) } else { node[family(endpoint)] };
        let entropy = self.rng.bool().then(|| self.rng.u16(0xc000..));
        let mut tunnel = Tunnel::wrap(packet, from, endpoint, entropy);
        if entropy.is_some() && self.rng.bool() {
            // As our own nodes send it: the packet inside has a checksum of its own.
            tunnel.payload[6..8].fill(0);
        }
        let crossing = match self.rng.u8(0..16) {
            0 => Crossing { hook: Hook::Ingress, link: Link::Pods },
            1 => self.entering(Link::Eth1),
            _ => self.entering(Link::Eth0),
        };
        self.sent(crossing, &tunnel)
    }
}
