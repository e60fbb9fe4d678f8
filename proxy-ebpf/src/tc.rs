//! The packet path: one decision for a packet that enters or leaves the node.

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::programs::TcContext;
use proxy_common::{Address, Counter, MARK_DONE, NODE_ADDRESS_LOCAL, NodeSettings, Origin, RuleBits};

use crate::conntrack::{self, Source};
use crate::counters::{count, count_connection};
use crate::ctx::Packet;
use crate::forward::{Route, RouteAddresses, route, transmit};
use crate::maps::{Family, Ipv4, Ipv6, Scratch};
use crate::nat::{Rewrite, translate};
use crate::parse::{Parse, ParseNetwork, Transport, parse};
use crate::reject::{Reject, reject};
use crate::service::{self, PacketClient};

const ETHER_TYPE_IPV4: u16 = 0x0800_u16.to_be();
const ETHER_TYPE_IPV6: u16 = 0x86dd_u16.to_be();

/// Which way the packet crosses the interface, seen from the node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Into the node.
    Ingress,
    /// Out of the node.
    Egress,
}

/// All that a family must be able to do on the packet path.
pub trait PacketFamily: ParseNetwork + Rewrite + RouteAddresses + Reject {}
impl<F: ParseNetwork + Rewrite + RouteAddresses + Reject> PacketFamily for F {}

/// Entry of both hooks.
#[inline(always)]
pub fn run(ctx: &TcContext, direction: Direction) -> i32 {
    let packet = Packet::new(ctx);
    if packet.mark() & MARK_DONE != 0 {
        return TC_ACT_OK;
    }
    match packet.ether_type() {
        ETHER_TYPE_IPV4 => process::<Ipv4>(&packet, direction),
        ETHER_TYPE_IPV6 => process::<Ipv6>(&packet, direction),
        _ => TC_ACT_OK,
    }
}

#[inline(always)]
fn process<F: PacketFamily>(packet: &Packet<'_>, direction: Direction) -> i32 {
    let Some(scratch) = F::scratch() else { return TC_ACT_OK };
    let transport = match parse::<F>(packet, &mut scratch.key) {
        Parse::Tuple(transport) => transport,
        Parse::Other => return TC_ACT_OK,
        Parse::Fragment => return pass(Counter::Fragment),
    };
    if conntrack::find::<F>(scratch, &transport) {
        return send::<F>(packet, &transport, scratch, direction, Counter::PacketEstablished);
    }
    // A packet in the middle of a connection that is not known here is not ours: it may be another proxy's.
    if !transport.opens() {
        return TC_ACT_OK;
    }
    let key = &scratch.key;
    match service::find::<F>(&key.destination, key.destination_port, key.protocol, &mut scratch.found) {
        true => open::<F>(packet, &transport, scratch, direction),
        false => pass_new::<F>(packet, &transport, scratch, direction),
    }
}

/// A new flow that is not ours, from a port that one of our flows to the same endpoint may hold or have held: the answers
/// would be taken for that flow's. It gets another source port while the other one is open, as conntrack would do.
#[inline(always)]
fn pass_new<F: PacketFamily>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &mut Scratch<F::A>,
    direction: Direction,
) -> i32 {
    if !conntrack::answers_are_taken::<F>(scratch) {
        return TC_ACT_OK;
    }
    let Some(settings) = F::settings() else { return TC_ACT_OK };
    let ports = (settings.source_port_min, settings.source_port_max);
    let source = Source { address: scratch.key.source, masquerade: false, ports };
    match conntrack::create::<F>(scratch, &source) {
        Ok(()) => send::<F>(packet, transport, scratch, direction, Counter::PacketNew),
        Err(reason) => drop_packet(reason),
    }
}

/// A new flow to one of our frontends.
#[inline(always)]
fn open<F: PacketFamily>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &mut Scratch<F::A>,
    direction: Direction,
) -> i32 {
    let Some(settings) = F::settings() else { return TC_ACT_OK };
    let Some(origin) = origin::<F>(&scratch.key.source, settings, direction) else { return TC_ACT_OK };
    let rule = scratch.found.frontend.rule(origin);
    match rule.action() {
        RuleBits::FORWARD => {}
        RuleBits::REJECT => {
            return match reject::<F>(packet, transport, &scratch.key, direction) {
                Some(verdict) => done(Counter::PacketReject, verdict),
                None => drop_packet(Counter::RejectFailed),
            };
        }
        _ => return drop_packet(Counter::PolicyDrop),
    }
    match new_flow::<F>(scratch, rule, settings) {
        Ok(()) => {
            count_connection(scratch.found.frontend.service_id);
            send::<F>(packet, transport, scratch, direction, Counter::PacketNew)
        }
        Err(reason) => drop_packet(reason),
    }
}

/// Chooses a backend and writes the flow.
#[inline(always)]
fn new_flow<F: PacketFamily>(
    scratch: &mut Scratch<F::A>,
    rule: RuleBits,
    settings: &NodeSettings<F::A>,
) -> Result<(), Counter> {
    let client = PacketClient::<F>(scratch.key.source);
    if !service::select::<F>(&mut scratch.found, rule, &client, &mut scratch.chosen) {
        return Err(Counter::StaleBackend);
    }
    let backend = &scratch.chosen.backend.address;
    // Hairpin: the pod would answer itself directly. An endpoint on the node's own address gets the client as it is:
    // the kernel drops what arrives from its own address, and kube-proxy does not masquerade what is delivered locally.
    let hairpin = scratch.key.source == *backend;
    let masquerade =
        hairpin || (rule.masquerade() && service::node_address_flags::<F>(backend) & NODE_ADDRESS_LOCAL == 0);
    if masquerade && settings.masquerade == F::A::default() {
        return Err(Counter::NoMasqueradeAddress);
    }
    let source = Source {
        address: if masquerade { settings.masquerade } else { scratch.key.source },
        masquerade,
        ports: (settings.source_port_min, settings.source_port_max),
    };
    conntrack::create::<F>(scratch, &source)
}

/// Where the packet comes from. `None` on the way out for what only passes through: it was looked at on its way in.
#[inline(always)]
fn origin<F: Family>(source: &F::A, settings: &NodeSettings<F::A>, direction: Direction) -> Option<Origin> {
    if direction == Direction::Egress {
        return if service::node_address_flags::<F>(source) & NODE_ADDRESS_LOCAL != 0 {
            Some(Origin::Node)
        } else {
            None
        };
    }
    for (index, cidr) in settings.pod_cidrs.iter().enumerate() {
        if index >= settings.pod_cidr_count as usize {
            break;
        }
        if source.in_network(&cidr.network, &cidr.mask) {
            return Some(Origin::Pod);
        }
    }
    Some(Origin::External)
}

/// Translates the packet and sends it on.
#[inline(always)]
fn send<F: PacketFamily>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &mut Scratch<F::A>,
    direction: Direction,
    work: Counter,
) -> i32 {
    // An answer of a local socket is already on the right interface.
    if direction == Direction::Egress && scratch.key.destination == scratch.flow.destination {
        return finish::<F>(packet, transport, scratch, work);
    }
    match route::<F>(packet, scratch) {
        Route::Out { neighbour } => {
            if F::time_to_live(packet).is_none_or(|hops| hops <= 1) {
                return pass(Counter::TimeToLive);
            }
            let sent = translate::<F>(packet, transport, scratch, true);
            match sent.and_then(|()| transmit(packet, scratch, neighbour)) {
                Some(verdict) => done(work, verdict),
                None => drop_packet(Counter::RewriteFailed),
            }
        }
        Route::Local => finish::<F>(packet, transport, scratch, work),
        Route::Kernel(reason) => {
            count(reason);
            finish::<F>(packet, transport, scratch, work)
        }
    }
}

/// Translates the packet and leaves the rest to the kernel.
#[inline(always)]
fn finish<F: PacketFamily>(packet: &Packet<'_>, transport: &Transport, scratch: &Scratch<F::A>, work: Counter) -> i32 {
    match translate::<F>(packet, transport, scratch, false) {
        Some(()) => {
            packet.tc.set_mark(packet.mark() | MARK_DONE);
            done(work, TC_ACT_OK)
        }
        None => drop_packet(Counter::RewriteFailed),
    }
}

#[inline(always)]
fn done(work: Counter, verdict: i32) -> i32 {
    count(work);
    verdict
}

#[inline(always)]
fn pass(reason: Counter) -> i32 {
    count(reason);
    TC_ACT_OK
}

#[inline(always)]
fn drop_packet(reason: Counter) -> i32 {
    count(reason);
    TC_ACT_SHOT
}
