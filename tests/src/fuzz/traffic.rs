//! Random packets: to Services and past them, of flows that are open, and broken ones.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use fastrand::Rng;
use trama_proxy::dataplane::ebpf::Hook;

use super::bed::{Link, Way, cluster_ip, family, is_own, local_pod, machine, neighbour, outside, remote_pod, way};
use super::direct::Course;
use super::model::{Crossing, Flow, Model};
use super::read::{ACK, FIN, RST, SCTP, SYN, Tuple, crc32c};
use super::world::NO_PORT;
use crate::packet::{Packet, TCP, UDP};

/// A packet before it meets the programs.
pub(crate) type Sent = (Crossing, Vec<u8>);

/// Makes packets.
pub(crate) struct Traffic {
    pub(super) rng: Rng,
    /// Where something listens, and with which protocol.
    pub(crate) places: Vec<(SocketAddr, u8)>,
    /// Fragments that follow.
    queue: VecDeque<Sent>,
    identification: u32,
    /// Other nodes send tunnels.
    direct: bool,
}

/// What a packet is to be.
struct Draft {
    crossing: Crossing,
    tuple: Tuple,
    flags: u8,
}

impl Traffic {
    pub(crate) fn new(seed: u64, direct: bool) -> Self {
        let mut rng = Rng::with_seed(seed);
        let identification = rng.u32(..);
        Self { rng, places: Vec::new(), queue: VecDeque::new(), identification, direct }
    }

    /// The next packet.
    pub(crate) fn next(&mut self, model: &Model) -> Sent {
        if let Some(sent) = self.queue.pop_front() {
            return sent;
        }
        if self.direct && self.rng.u8(0..8) == 0 {
            let (crossing, frame) = self.tunnelled(model);
            return (crossing, self.damaged(frame));
        }
        let flow = self.some_flow(model);
        let (crossing, frame) = match (self.rng.u8(0..20), flow) {
            (0..=4, Some(flow)) => self.forth(&flow),
            // Nobody here sees the answers of a flow that leaves in a tunnel.
            (5..=9, Some(flow)) if flow.course == Course::Out => self.forth(&flow),
            (5..=9, Some(flow)) => self.back(&flow),
            (10..=11, Some(flow)) => self.error(&flow),
            (12, Some(flow)) => self.pieces(&flow),
            (13, _) => self.portless(),
            _ => self.opening(),
        };
        (crossing, self.damaged(frame))
    }

    /// One of the last flows, more often than not.
    fn some_flow(&mut self, model: &Model) -> Option<Flow> {
        let all = &model.flows;
        let recent = all.len().saturating_sub(40);
        let first = if self.rng.u8(0..4) == 0 { 0 } else { recent };
        let flow = (!all.is_empty()).then(|| all[self.rng.usize(first..all.len())])?;
        (!model.is_unclear(&flow)).then_some(flow)
    }

    /// XDP or tc, where the link has both.
    pub(super) fn entering(&mut self, link: Link) -> Crossing {
        let frames = matches!(link, Link::Eth0 | Link::Eth1) && self.rng.bool();
        Crossing { hook: if frames { Hook::Frame } else { Hook::Ingress }, link }
    }

    fn opening(&mut self) -> Sent {
        let of = self.rng.usize(0..2);
        let (destination, protocol) = self.destination(of);
        let of = family(destination.ip());
        let (source, crossing) = self.client(of, destination.ip());
        let port = match self.rng.u8(0..4) {
            0 => self.rng.u16(1024..1060),
            1 => self.rng.u16(40_000..40_020),
            _ => self.rng.u16(1..),
        };
        let tuple = Tuple { source: SocketAddr::new(source, port), destination, protocol };
        let flags = match self.rng.u8(0..12) {
            0 => ACK,
            1 => self.rng.u8(..),
            _ => SYN,
        };
        self.frame(&Draft { crossing, tuple, flags })
    }

    pub(super) fn destination(&mut self, of: usize) -> (SocketAddr, u8) {
        let protocol = [TCP, UDP, SCTP][self.rng.usize(0..3)];
        let ip = match self.rng.u8(0..16) {
            0 => cluster_ip(self.rng.u16(1..40))[of],
            1 => local_pod(self.rng.u16(2..10))[of],
            2 => remote_pod(self.rng.u16(2..10))[of],
            3 => outside(self.rng.u16(1..20))[of],
            4 => machine(self.rng.u16(10..13))[of],
            _ if self.places.is_empty() => cluster_ip(1)[of],
            5 => {
                // The right address, another port or protocol.
                let (place, _) = self.places[self.rng.usize(0..self.places.len())];
                let port = if self.rng.bool() { NO_PORT } else { place.port() };
                return (SocketAddr::new(place.ip(), port), protocol);
            }
            _ => return self.places[self.rng.usize(0..self.places.len())],
        };
        let port = [80, 8080, 8081, 8082, NO_PORT, 30_004][self.rng.usize(0..6)];
        (SocketAddr::new(ip, port), protocol)
    }

    fn client(&mut self, of: usize, to: IpAddr) -> (IpAddr, Crossing) {
        match self.rng.u8(0..20) {
            0..=5 => (local_pod(self.rng.u16(2..10))[of], Crossing { hook: Hook::Ingress, link: Link::Pods }),
            6..=8 => (remote_pod(self.rng.u16(2..10))[of], self.entering(Link::Eth0)),
            9..=12 => (outside(self.rng.u16(1..200))[of], self.entering(Link::Eth0)),
            13..=14 => (neighbour(100)[of], self.entering(Link::Eth1)),
            15..=17 => {
                let own = if self.rng.u8(0..4) == 0 { neighbour(11) } else { machine(11) };
                (own[of], leaving(to))
            }
            18 => {
                let link = [Link::Eth0, Link::Eth1, Link::Pods][self.rng.usize(0..3)];
                (self.impossible(of), self.entering(link))
            }
            // It only passes through: no more than a mark tells it from others.
            _ => (local_pod(self.rng.u16(2..10))[of], Crossing { hook: Hook::Egress, link: Link::Eth0 }),
        }
    }

    pub(super) fn impossible(&mut self, of: usize) -> IpAddr {
        let loopback: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let nobody: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let many: [IpAddr; 2] = [Ipv4Addr::new(224, 0, 0, 5).into(), Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 5).into()];
        let all = [loopback, nobody, many, cluster_ip(2), cluster_ip(77), machine(11), neighbour(11)];
        all[self.rng.usize(0..all.len())][of]
    }

    fn forth(&mut self, flow: &Flow) -> Sent {
        let crossing = match flow.crossing.hook {
            Hook::Egress => flow.crossing,
            _ => self.entering(flow.crossing.link),
        };
        let flags = [ACK, ACK, ACK, SYN, ACK | FIN, RST][self.rng.usize(0..6)];
        let packet = self.dressed(flow.key, flags);
        self.sent_as(flow, crossing, &packet)
    }

    fn back(&mut self, flow: &Flow) -> Sent {
        let crossing = self.answering(flow);
        let flags = [ACK, ACK, ACK | SYN, ACK | FIN, RST][self.rng.usize(0..5)];
        self.frame(&Draft { crossing, tuple: flow.out.reversed(), flags })
    }

    /// Where the endpoint's answers come from.
    fn answering(&mut self, flow: &Flow) -> Crossing {
        match way(flow.out.destination.ip()) {
            Way::Own => leaving(flow.out.source.ip()),
            Way::Out(link, _) => self.entering(link),
        }
    }

    /// About a packet of a flow: from a router or the endpoint about what it got, or from the client's side about an answer.
    fn error(&mut self, flow: &Flow) -> Sent {
        let answer = self.rng.u8(0..3) == 0 || flow.course == Course::Out;
        let (quoted, crossing) = match (answer, flow.crossing.hook) {
            (false, _) => (flow.out, self.answering(flow)),
            (true, Hook::Egress) => (flow.key.reversed(), flow.crossing),
            (true, _) => (flow.key.reversed(), self.entering(flow.crossing.link)),
        };
        let from = match self.rng.u8(0..3) {
            _ if crossing.hook == Hook::Egress => quoted.destination.ip(),
            0 => outside(250)[family(quoted.source.ip())],
            _ => quoted.destination.ip(),
        };
        let inner = self.packet(quoted, ACK).bytes();
        let header = if quoted.source.is_ipv4() { 20 } else { 40 };
        let length = match self.rng.u8(0..4) {
            0 => header + 8,
            1 => self.rng.usize(header..=inner.len()),
            _ => inner.len(),
        };
        let kinds = match quoted.source {
            SocketAddr::V4(_) => [[3, 1], [3, 3], [3, 4], [11, 0], [5, 1], [12, 0]],
            SocketAddr::V6(_) => [[1, 0], [1, 4], [2, 0], [3, 0], [4, 0], [1, 1]],
        };
        let kind = kinds[self.rng.usize(0..6)];
        let error = Packet::icmp_error(from, quoted.source.ip(), kind, 1280, &inner[..length.min(inner.len())]);
        if answer { self.sent_as(flow, crossing, &error) } else { self.sent(crossing, &error) }
    }

    /// A datagram of a flow in fragments, in order or not, or some of them.
    fn pieces(&mut self, flow: &Flow) -> Sent {
        let (tuple, crossing) = match self.rng.bool() && flow.course != Course::Out {
            true => (flow.out.reversed(), self.answering(flow)),
            false => (flow.key, flow.crossing),
        };
        self.identification = self.identification.wrapping_add(1);
        let data = vec![self.rng.u8(..); self.rng.usize(100..1200)];
        let whole = match tuple.protocol {
            TCP => Packet::tcp(tuple.source, tuple.destination, ACK, 7, &data),
            _ => Packet::udp(tuple.source, tuple.destination, &data),
        };
        let mut all = whole.fragments(self.identification & 0xffff, self.rng.usize(40..600));
        match self.rng.u8(0..8) {
            0..=3 => {}
            4 => self.rng.shuffle(&mut all),
            5 => all.reverse(),
            6 => drop(all.remove(self.rng.usize(0..all.len()))),
            _ => all.extend(all.clone()),
        }
        let wrapped = tuple == flow.key;
        let send =
            |piece: &Packet| if wrapped { self.sent_as(flow, crossing, piece) } else { self.sent(crossing, piece) };
        let frames: Vec<Sent> = all.iter().map(send).collect();
        self.queue.extend(frames);
        self.queue.pop_front().unwrap_or_else(|| self.opening())
    }

    /// Echo requests, and protocols that have no ports at all.
    fn portless(&mut self) -> Sent {
        let of = self.rng.usize(0..2);
        let (destination, _) = self.destination(of);
        let of = family(destination.ip());
        let (source, crossing) = self.client(of, destination.ip());
        let echo = if self.rng.bool() { [8, 128][of] } else { self.rng.u8(..) };
        let protocol = [[1, 58][of], 47, 50, 132][[0, 0, 0, 1, 2][self.rng.usize(0..5)]];
        let mut payload = vec![0; 8 + self.rng.usize(0..40)];
        payload[0] = echo;
        self.sent(crossing, &Packet::new(source, destination.ip(), protocol, payload))
    }

    fn frame(&mut self, draft: &Draft) -> Sent {
        let packet = self.dressed(draft.tuple, draft.flags);
        self.sent(draft.crossing, &packet)
    }

    pub(super) fn dressed(&mut self, tuple: Tuple, flags: u8) -> Packet {
        let mut packet = self.packet(tuple, flags);
        packet.hops = match self.rng.u8(0..30) {
            0 => 1,
            1 => 2,
            _ => packet.hops,
        };
        packet.dont_fragment = self.rng.bool();
        match self.rng.u8(0..16) {
            0 if packet.source.is_ipv4() => packet.options = vec![1; 4 * self.rng.usize(1..=10)],
            0 => packet = self.extended(packet),
            _ => {}
        }
        packet
    }

    /// With up to six extension headers; the last ones are beyond what anybody looks at.
    fn extended(&mut self, packet: Packet) -> Packet {
        let count = self.rng.usize(1..=6);
        let kinds: Vec<u8> =
            (0..count).map(|index| if index == 0 { [0, 43, 60][self.rng.usize(0..3)] } else { 60 }).collect();
        let protocol = packet.protocol;
        let headers = (0..count).flat_map(|index| {
            let next = kinds.get(index + 1).copied().unwrap_or(protocol);
            // Options that pad; of a routing header, no segment that is left.
            let body = if kinds[index] == 43 { [4, 0, 0, 0, 0, 0] } else { [1, 4, 0, 0, 0, 0] };
            [next, 0].into_iter().chain(body)
        });
        packet.with_extensions(kinds[0], headers.collect())
    }

    fn packet(&mut self, tuple: Tuple, flags: u8) -> Packet {
        let length = if self.rng.u8(0..12) == 0 { self.rng.usize(1300..1450) } else { self.rng.usize(0..40) };
        let mut data: Vec<u8> = (0..length).map(|_| self.rng.u8(..)).collect();
        if self.direct && self.rng.u8(0..8) == 0 && length > 4 {
            // What looks like an option of TCP where there is none.
            data[..3].copy_from_slice(&[2, 4, 0xff]);
        }
        let mut packet = match tuple.protocol {
            TCP => {
                let packet = Packet::tcp(tuple.source, tuple.destination, flags, self.rng.u32(..), &data);
                self.with_options(packet, flags)
            }
            UDP => Packet::udp(tuple.source, tuple.destination, &data),
            _ => sctp(tuple, flags, &data),
        };
        let (at, length) = match tuple.protocol {
            TCP => (16, 2),
            UDP => (6, 2),
            _ => (8, 4),
        };
        match self.rng.u8(0..20) {
            0 | 1 if tuple.protocol != TCP => packet.payload[at..at + length].fill(0),
            2 => packet.payload[at] ^= 0x5a,
            _ => {}
        }
        packet
    }

    /// What a SYN asks for, if anything, behind some padding.
    fn with_options(&mut self, packet: Packet, flags: u8) -> Packet {
        if !self.direct || flags & SYN == 0 || self.rng.bool() {
            return packet;
        }
        let [high, low] = self.rng.u16(536..9000).to_be_bytes();
        let padding = vec![1; self.rng.usize(0..4)];
        packet.with_tcp_options(&[&padding[..], &[2, 4, high, low]].concat())
    }

    pub(super) fn sent(&mut self, crossing: Crossing, packet: &Packet) -> Sent {
        let mut frame = [&crossing.link.mac()[..], &[2, 9, 9, 9, 9, 9], &packet.ether_type().to_be_bytes()].concat();
        frame.extend(packet.bytes());
        // Ethernet pads what is shorter than this.
        if frame.len() < 60 && self.rng.u8(0..3) == 0 {
            frame.resize(60, 0);
        }
        (crossing, frame)
    }

    /// Now and then some bytes differ, or are missing.
    fn damaged(&mut self, mut frame: Vec<u8>) -> Vec<u8> {
        match self.rng.u8(0..40) {
            0 | 1 => {
                for _ in 0..self.rng.usize(1..4) {
                    let at = self.rng.usize(12..frame.len().min(90));
                    frame[at] ^= 1 << self.rng.u8(0..8);
                }
            }
            // Linux runs a program on nothing shorter than a network header.
            2 => frame.truncate(self.rng.usize(if frame[12] == 8 { 34 } else { 54 }..=frame.len())),
            _ => {}
        }
        frame
    }
}

/// Where the node's own packets to an address leave.
fn leaving(to: IpAddr) -> Crossing {
    let link = match way(to) {
        Way::Own => Link::Lo,
        Way::Out(link, _) => link,
    };
    debug_assert!(link != Link::Lo || is_own(to));
    Crossing { hook: Hook::Egress, link }
}

/// An SCTP packet with one chunk that means about what the flags of TCP do.
fn sctp(tuple: Tuple, flags: u8, data: &[u8]) -> Packet {
    let kind = match flags {
        _ if flags & RST != 0 => 6,
        _ if flags & FIN != 0 => 14,
        _ if flags & (SYN | ACK) == SYN => 1,
        _ if flags & SYN != 0 => 2,
        _ => flags & ACK >> 4,
    };
    let kind = if kind == 1 && flags & (SYN | ACK) != SYN { 0 } else { kind };
    let mut payload = [tuple.source.port(), tuple.destination.port()].map(u16::to_be_bytes).concat();
    let length = 16 + data.len() as u16;
    payload.extend([0, 0, 0, 9, 0, 0, 0, 0, kind, 0]);
    payload.extend(length.to_be_bytes());
    payload.extend([0; 12]);
    payload.extend(data);
    let checksum = crc32c(&payload).to_le_bytes();
    payload[8..12].copy_from_slice(&checksum);
    Packet::new(tuple.source.ip(), tuple.destination.ip(), SCTP, payload)
}
