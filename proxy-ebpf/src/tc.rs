//! The packet path: one decision for a packet that enters or leaves the node.

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::programs::TcContext;
use proxy_common::{
    Address, Counter, FLOW_REPLY, FLOW_STACK, FRONTEND_SOURCE_RANGES, MARK_DONE, NODE_ADDRESS_LOCAL,
    NODE_PODS_BY_INTERFACE, NodeSettings, Origin, RuleBits,
};

use crate::conntrack::{self, Owner, Source};
use crate::counters::{count, count_connection};
use crate::ctx::Packet;
use crate::forward::{Route, RouteAddresses, route, transmit};
use crate::local;
use crate::maps::{Family, INTERFACES, Ipv4, Ipv6, Scratch};
use crate::nat::{Rewrite, translate};
use crate::parse::{Parse, ParseNetwork, Transport, parse};
use crate::reject::{Reject, reject};
use crate::service::{self, PacketClient, Unserved};

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
    let marked = packet.mark() & MARK_DONE != 0;
    match packet.ether_type() {
        ETHER_TYPE_IPV4 if marked => process_again::<Ipv4>(&packet, direction),
        ETHER_TYPE_IPV4 => process::<Ipv4>(&packet, direction),
        ETHER_TYPE_IPV6 if marked => process_again::<Ipv6>(&packet, direction),
        ETHER_TYPE_IPV6 => process::<Ipv6>(&packet, direction),
        _ => TC_ACT_OK,
    }
}

/// A packet that was translated at another hook goes on, unless it is being handed over to the node itself.
#[inline(always)]
fn process_again<F: PacketFamily>(packet: &Packet<'_>, direction: Direction) -> i32 {
    let Some(scratch) = F::scratch() else { return TC_ACT_OK };
    match direction {
        Direction::Ingress => local::again::<F>(packet, scratch, is_own::<F>),
        Direction::Egress if packet.on_loopback() => local::arrive::<F>(packet, scratch),
        Direction::Egress => TC_ACT_OK,
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
    // On `lo`; no loopback address is ever translated in a packet.
    if direction == Direction::Egress && scratch.key.source.is_loopback() {
        return TC_ACT_OK;
    }
    // Every way ends in this one translation: the verifier walks what is behind it once for each of them.
    match decide::<F>(packet, &transport, scratch, direction) {
        Ok(work) => send::<F>(packet, &transport, scratch, direction, work),
        Err(verdict) => verdict,
    }
}

/// `Ok` when `scratch.flow` says what the packet becomes, with what it is counted as; else its verdict.
#[inline(always)]
fn decide<F: PacketFamily>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &mut Scratch<F::A>,
    direction: Direction,
) -> Result<Counter, i32> {
    let ports = transport.has_ports();
    match if ports { conntrack::find::<F>(scratch, transport) } else { Owner::Nobody } {
        Owner::Us => return Ok(Counter::PacketEstablished),
        Owner::Conntrack => return Err(TC_ACT_OK),
        Owner::Nobody => {}
    }
    // A packet in the middle of a connection that is not known here is not ours: it may be another proxy's.
    if !transport.opens() {
        return Err(TC_ACT_OK);
    }
    let key = &scratch.key;
    let (to, port) = (&key.destination, key.destination_port);
    let new = match ports && service::find::<F>(to, port, key.protocol, false, &mut scratch.found) {
        true => open::<F>(packet, transport, scratch, direction)?,
        false => match service::unserved::<F>(&scratch.key.destination) {
            Unserved::Foreign if ports => pass_new::<F>(scratch, direction)?,
            Unserved::Foreign => return Err(TC_ACT_OK),
            what => return Err(refuse::<F>(packet, transport, scratch, direction, what)),
        },
    };
    match conntrack::create::<F>(scratch, &new.source) {
        Ok(()) => {
            if let Some(service_id) = new.service_id {
                count_connection(service_id);
            }
            Ok(Counter::PacketNew)
        }
        Err(reason) => Err(drop_packet(reason)),
    }
}

/// A flow that is to be written; its destination is in `scratch.chosen`.
struct NewFlow<A> {
    source: Source<A>,
    /// The ServicePort that it is counted for.
    service_id: Option<u32>,
}

/// A packet that may open something, to what is no frontend: refused or dropped where the address is a Service's or might
/// become one.
#[inline(always)]
fn refuse<F: PacketFamily>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &mut Scratch<F::A>,
    direction: Direction,
    unserved: Unserved,
) -> i32 {
    if direction == Direction::Egress && !is_from_node::<F>(packet, &scratch.key.source) {
        return TC_ACT_OK;
    }
    if unserved == Unserved::Address {
        return drop_packet(Counter::Unallocated);
    }
    answer::<F>(packet, transport, scratch, direction, Counter::PacketUnserved)
}

/// Answers with ICMP port unreachable.
#[inline(always)]
fn answer<F: PacketFamily>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &Scratch<F::A>,
    direction: Direction,
    reason: Counter,
) -> i32 {
    match reject::<F>(packet, transport, &scratch.key, direction) {
        Some(verdict) => done(reason, verdict),
        None => drop_packet(Counter::RejectFailed),
    }
}

/// A new flow that is not ours, from a port that one of our flows to the same endpoint may hold or have held: the answers
/// would be taken for that flow's. It gets another source port while the other one is open, as conntrack would do. On the way out
/// conntrack itself may have chosen the port, and wants to see the answers.
#[inline(always)]
fn pass_new<F: PacketFamily>(scratch: &mut Scratch<F::A>, direction: Direction) -> Result<NewFlow<F::A>, i32> {
    if !conntrack::answers_are_taken::<F>(scratch) {
        return Err(TC_ACT_OK);
    }
    let Some(settings) = F::settings() else { return Err(TC_ACT_OK) };
    let ports = (settings.source_port_min, settings.source_port_max);
    let stack = direction == Direction::Egress;
    let source = Source { address: scratch.key.source, masquerade: false, ports, stack };
    Ok(NewFlow { source, service_id: None })
}

/// A new flow to one of our frontends.
#[inline(always)]
fn open<F: PacketFamily>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &mut Scratch<F::A>,
    direction: Direction,
) -> Result<NewFlow<F::A>, i32> {
    let Some(settings) = F::settings() else { return Err(TC_ACT_OK) };
    let Some(origin) = origin::<F>(packet, &scratch.key.source, settings, direction) else { return Err(TC_ACT_OK) };
    let frontend = &scratch.found.frontend;
    let limited = frontend.flags & FRONTEND_SOURCE_RANGES != 0;
    if limited && !service::lets_in::<F>(frontend.service_id, &scratch.key.source) {
        return Err(drop_packet(Counter::SourceRange));
    }
    let rule = scratch.found.frontend.rule(origin);
    match rule.action() {
        RuleBits::FORWARD => {}
        RuleBits::REJECT => {
            return Err(answer::<F>(packet, transport, scratch, direction, Counter::PacketReject));
        }
        _ => return Err(drop_packet(Counter::PolicyDrop)),
    }
    match choose::<F>(scratch, rule, settings) {
        Ok(source) => Ok(NewFlow { source, service_id: Some(scratch.found.frontend.service_id) }),
        Err(reason) => Err(drop_packet(reason)),
    }
}

/// Chooses a backend, and the source that it is to see.
#[inline(always)]
fn choose<F: PacketFamily>(
    scratch: &mut Scratch<F::A>,
    rule: RuleBits,
    settings: &NodeSettings<F::A>,
) -> Result<Source<F::A>, Counter> {
    let client = PacketClient::<F>(scratch.key.source);
    if !service::select::<F>(&mut scratch.found, rule, &client, &mut scratch.chosen) {
        return Err(Counter::StaleBackend);
    }
    let backend = &scratch.chosen.backend.address;
    // Hairpin: the pod would answer itself directly. An endpoint on the node's own address gets the client as it is:
    // the kernel drops what arrives from its own address, and kube-proxy does not masquerade what is delivered locally.
    let hairpin = scratch.key.source == *backend;
    let masquerade = hairpin || (rule.masquerade() && !is_own::<F>(backend));
    if masquerade && settings.masquerade == F::A::default() {
        return Err(Counter::NoMasqueradeAddress);
    }
    Ok(Source {
        address: if masquerade { settings.masquerade } else { scratch.key.source },
        masquerade,
        ports: (settings.source_port_min, settings.source_port_max),
        stack: false,
    })
}

/// Where the packet comes from. `None` on the way out for what only passes through: it was looked at on its way in.
#[inline(always)]
fn origin<F: Family>(
    packet: &Packet<'_>,
    source: &F::A,
    settings: &NodeSettings<F::A>,
    direction: Direction,
) -> Option<Origin> {
    if direction == Direction::Egress {
        return if is_from_node::<F>(packet, source) { Some(Origin::Node) } else { None };
    }
    let pod = match settings.flags & NODE_PODS_BY_INTERFACE != 0 {
        // SAFETY: nothing of the value is used.
        true => unsafe { INTERFACES.get(&packet.interface()) }.is_some(),
        false => service::in_networks(source, &settings.pod_cidrs, settings.pod_cidr_count),
    };
    Some(if pod { Origin::Pod } else { Origin::External })
}

/// Whether a packet on its way out is the node's own. On `lo` all are, also from an address that only a route makes the node's.
#[inline(always)]
fn is_from_node<F: Family>(packet: &Packet<'_>, source: &F::A) -> bool {
    packet.on_loopback() || is_own::<F>(source)
}

/// Whether an address is this node's.
#[inline(always)]
fn is_own<F: Family>(address: &F::A) -> bool {
    service::node_address_flags::<F>(address) & NODE_ADDRESS_LOCAL != 0
}

/// Translates the packet and sends it on, or leaves the rest to the kernel.
#[inline(always)]
fn send<F: PacketFamily>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &mut Scratch<F::A>,
    direction: Direction,
    work: Counter,
) -> i32 {
    // An answer of a local socket is already on the right interface.
    let stays = direction == Direction::Egress && scratch.key.destination == scratch.flow.destination;
    let rest_is_conntracks = scratch.flow.flags & FLOW_STACK != 0;
    let route = if stays || rest_is_conntracks { Route::Local } else { route::<F>(packet, scratch) };
    let forwarded = matches!(route, Route::Out { .. });
    if forwarded && F::time_to_live(packet).is_none_or(|hops| hops <= 1) {
        return pass(Counter::TimeToLive);
    }
    if translate::<F>(packet, transport, scratch, forwarded).is_none() {
        return drop_packet(Counter::RewriteFailed);
    }
    match route {
        Route::Out { neighbour } => match transmit(packet, scratch, neighbour) {
            Some(verdict) => done(work, verdict),
            None => drop_packet(Counter::RewriteFailed),
        },
        // Unmarked: conntrack does not look at what is marked while flows are handed to it.
        Route::Local if rest_is_conntracks => done(work, TC_ACT_OK),
        Route::Local if stays => leave(packet, work),
        Route::Local => match deliver::<F>(packet, scratch, direction) {
            Some(verdict) => done(work, verdict),
            None => drop_packet(Counter::RewriteFailed),
        },
        // The kernel has routed it to the node itself already: some socket there might take it.
        Route::Kernel(reason) if direction == Direction::Egress && packet.on_loopback() => drop_packet(reason),
        Route::Kernel(reason) => {
            count(reason);
            leave(packet, work)
        }
    }
}

/// Brings a translated packet to the node itself.
#[inline(always)]
fn deliver<F: PacketFamily>(packet: &Packet<'_>, scratch: &Scratch<F::A>, direction: Direction) -> Option<i32> {
    match direction {
        Direction::Egress if !packet.on_loopback() => local::turn_back(packet),
        // Its source is the Service's address.
        Direction::Ingress if scratch.flow.flags & FLOW_REPLY != 0 => local::hand_over::<F>(packet),
        _ => {
            packet.tc.set_mark(packet.mark() | MARK_DONE);
            Some(TC_ACT_OK)
        }
    }
}

/// The kernel does the rest with the translated packet.
#[inline(always)]
fn leave(packet: &Packet<'_>, work: Counter) -> i32 {
    packet.tc.set_mark(packet.mark() | MARK_DONE);
    done(work, TC_ACT_OK)
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
