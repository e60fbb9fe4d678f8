//! The packet path: one decision for a packet that enters or leaves the node.

use core::ptr::read_volatile;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::programs::TcContext;
use proxy_common::decide::{self, Crossing, Outcome, Source, new_flow};
use proxy_common::{Address, Counter, FLOW_REPLY, FLOW_STACK, MARK_DONE, MARK_SOURCE};

use crate::conntrack::{self, Owner};
use crate::counters::{count_connection, count_index, count_packet};
use crate::ctx::{Hook, Packet};
use crate::decap::{self, Decapsulate};
use crate::dsr::{self, Encapsulate};
use crate::events;
use crate::forward::{Route, RouteAddresses, is_known, route, transmit};
use crate::fragment::{self, Fragment};
use crate::icmp::{self, Quote};
use crate::local;
use crate::maps::{Family, Ipv4, Ipv6, Scratch};
use crate::nat::translate;
use crate::node_port::SocketLookup;
use crate::parse::{Parse, TCP, TCP_SYN, Transport, parse};
use crate::plan::{
    ERROR, FIRST_FRAGMENT, LATER_FRAGMENT, OFFSET_MASK, PACKET_ERROR, PACKET_FRAGMENT, Parsed, Plan, ROUTE_BACK,
    ROUTE_FRAGMENTS, ROUTE_LOCAL, ROUTE_NEIGHBOUR, ROUTE_NOWHERE, ROUTE_RESOLVE, WHOLE,
};
use crate::reject::{Refusal, Reject, reject};
use crate::service::Maps;

pub(crate) const ETHER_TYPE_IPV4: u16 = 0x0800_u16.to_be();
pub(crate) const ETHER_TYPE_IPV6: u16 = 0x86dd_u16.to_be();

/// Which way the packet crosses the interface, seen from the node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Into the node.
    Ingress,
    /// Out of the node.
    Egress,
}

/// All that a family must be able to do on the packet path.
pub trait PacketFamily: Quote + RouteAddresses + Reject + SocketLookup + Encapsulate + Decapsulate {}
impl<F: Quote + RouteAddresses + Reject + SocketLookup + Encapsulate + Decapsulate> PacketFamily for F {}

/// Entry of both hooks.
#[inline(always)]
pub fn run(ctx: &TcContext, direction: Direction) -> i32 {
    let packet = Packet::new(ctx);
    if packet.is_of_vlan() {
        return TC_ACT_OK;
    }
    if direction == Direction::Egress {
        return decide_family(&packet, direction);
    }
    if packet.mark() & MARK_DONE == 0 {
        decap::arrive(&packet);
    }
    // SAFETY: the context is the kernel's.
    unsafe { ingress(packet.raw()) }
}

/// The way in, once a packet is out of its tunnel. Global for the verifier: it has its stack for itself and is walked once, whatever comes
/// before it.
///
/// # Safety
/// The context is the kernel's.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn ingress(ctx: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(ctx);
    decide_family(&Packet::new(&ctx), Direction::Ingress)
}

#[inline(always)]
fn decide_family(packet: &Packet<'_>, direction: Direction) -> i32 {
    let marked = packet.mark() & MARK_DONE != 0;
    match packet.ether_type() {
        ETHER_TYPE_IPV4 if marked => process_again::<Ipv4>(packet, direction),
        ETHER_TYPE_IPV4 => conclude::<Ipv4>(packet, direction, process::<Ipv4>(packet, direction)),
        ETHER_TYPE_IPV6 if marked => process_again::<Ipv6>(packet, direction),
        ETHER_TYPE_IPV6 => conclude::<Ipv6>(packet, direction, process::<Ipv6>(packet, direction)),
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
        Direction::Egress if packet.mark() & MARK_SOURCE != 0 => fragment::give_source::<F>(packet, scratch),
        Direction::Egress => TC_ACT_OK,
    }
}

#[inline(always)]
fn process<F: PacketFamily>(packet: &Packet<'_>, direction: Direction) -> i32 {
    let Some(scratch) = F::scratch() else { return TC_ACT_OK };
    let is_ingress = direction == Direction::Ingress;
    if is_ingress && scratch.tunnel.refused != 0 {
        return because(scratch.tunnel.refused - 1, TC_ACT_SHOT);
    }
    let (transport, kind) = match parse::<F>(packet, &mut scratch.key) {
        Parse::Tuple(transport) => (transport, WHOLE),
        Parse::Error(transport) => (transport, ERROR),
        Parse::Other => return TC_ACT_OK,
        Parse::TooManyExtensions => return pass(Counter::ExtensionHeaders),
        // The kernel drops the worst of these too, but behind this hook.
        Parse::Malformed if is_ingress => return drop_packet(Counter::Malformed),
        Parse::Malformed => return TC_ACT_OK,
        Parse::Fragment(network) => match fragment::tuple::<F>(packet, &network, scratch, is_ingress) {
            Fragment::First(transport) => (transport, FIRST_FRAGMENT),
            Fragment::Later(transport) => (transport, LATER_FRAGMENT),
            Fragment::Done(verdict) => return verdict,
        },
    };
    scratch.parsed = Parsed::new(kind, &transport);
    // SAFETY: a reference is valid and aligned. Read back as the plan is, and for the same reason.
    let (transport, kind) = unsafe { read_volatile(&scratch.parsed) }.read();
    // On `lo`; no loopback address is ever translated in a packet.
    if direction == Direction::Egress && scratch.key.source.is_loopback() {
        return TC_ACT_OK;
    }
    let decision = match kind {
        LATER_FRAGMENT if fragment::find::<F>(scratch) => Ok(Counter::PacketFragment),
        LATER_FRAGMENT => Err(Stop::Verdict(pass(Counter::Fragment))),
        ERROR => icmp::find::<F>(packet, &transport, scratch).map(|()| Counter::PacketError).map_err(Stop::unless_ours),
        _ => decide::<F>(packet, &transport, scratch, direction),
    };
    if kind == FIRST_FRAGMENT
        && let Some(verdict) = fragment::remember::<F>(packet, &transport, scratch, is_ingress)
    {
        return verdict;
    }
    // Every way ends in this one translation: the verifier walks what is behind it once for each of them.
    let plan = match decision {
        Ok(_) if scratch.flow.is_direct() && direction == Direction::Egress => return TC_ACT_OK,
        Ok(_) if is_direct(scratch, direction) && scratch.tunnel.is_behind() => {
            return drop_packet(Counter::TunnelLoop);
        }
        Ok(work) => plan::<F>(packet, &transport, scratch, direction, work),
        Err(Stop::Refuse(reason)) => Plan::refuse::<F>(Refusal::PortUnreachable, reason, transport.offset),
        Err(Stop::Verdict(verdict)) => return verdict,
    };
    scratch.plan = plan;
    // SAFETY: a reference is valid and aligned.
    let plan = unsafe { read_volatile(&scratch.plan) };
    carry_out::<F>(packet, &transport, scratch, direction, plan)
}

/// Why a packet is not translated.
enum Stop {
    /// Its verdict.
    Verdict(i32),
    /// It is answered with ICMP port unreachable, for this reason.
    Refuse(Counter),
}

impl Stop {
    /// An ICMP error that is nothing of ours, or dropped for a reason.
    #[inline(always)]
    fn unless_ours(reason: Option<Counter>) -> Self {
        Self::Verdict(reason.map_or(TC_ACT_OK, drop_packet))
    }
}

/// `Ok` when `scratch.flow` says what the packet becomes, with what it is counted as.
#[inline(always)]
fn decide<F: PacketFamily>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &mut Scratch<F::A>,
    direction: Direction,
) -> Result<Counter, Stop> {
    let ports = transport.has_ports();
    match if ports { conntrack::find::<F>(scratch, transport) } else { Owner::Nobody } {
        Owner::Us => return Ok(Counter::PacketEstablished),
        Owner::Conntrack => return Err(Stop::Verdict(TC_ACT_OK)),
        Owner::Nobody => {}
    }
    // A packet in the middle of a connection that is not known here is not ours: it may be another proxy's.
    if !transport.opens() && (direction == Direction::Egress || !dsr::may_rejoin::<F>(transport)) {
        return Err(Stop::Verdict(TC_ACT_OK));
    }
    if conntrack::leaves_new_flows() {
        return Err(Stop::Verdict(TC_ACT_OK));
    }
    let source = match open::<F>(packet, transport, scratch, direction) {
        Ok(source) if transport.opens() || dsr::rejoins(scratch, &source) => source,
        Err(stop) if transport.opens() => return Err(stop),
        _ => return Err(Stop::Verdict(TC_ACT_OK)),
    };
    match conntrack::create::<F>(packet, scratch, &source) {
        Ok(()) => {
            if source.service_id != 0 {
                count_connection::<F>(source.service_id, scratch.flow.backend_id);
            }
            Ok(Counter::PacketNew)
        }
        Err(reason) => Err(Stop::Verdict(drop_packet(reason))),
    }
}

/// Decides a packet that opens a flow.
#[inline(always)]
fn open<F: PacketFamily>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &mut Scratch<F::A>,
    direction: Direction,
) -> Result<Source<F::A>, Stop> {
    let ports = transport.has_ports();
    let crossing = Crossing { interface: packet.interface(), egress: direction == Direction::Egress };
    let Scratch { key, found, chosen, .. } = scratch;
    match new_flow(&Maps::<F>::NEW, crossing, key, ports, found, chosen) {
        Outcome::Forward(source) => Ok(source),
        Outcome::Refuse(reason) => Err(Stop::Refuse(reason)),
        Outcome::Drop(reason) => Err(Stop::Verdict(drop_packet(reason))),
        Outcome::Foreign if ports && transport.opens() => pass_new::<F>(scratch, direction),
        Outcome::Foreign | Outcome::Pass => Err(Stop::Verdict(TC_ACT_OK)),
    }
}

/// A new flow that is not ours, from a port that one of our flows to the same endpoint may hold or have held: the answers
/// would be taken for that flow's. It gets another source port while the other one is open, as conntrack would do. On the way out
/// conntrack itself may have chosen the port, and wants to see the answers.
#[inline(always)]
fn pass_new<F: PacketFamily>(scratch: &mut Scratch<F::A>, direction: Direction) -> Result<Source<F::A>, Stop> {
    if !conntrack::answers_are_taken::<F>(scratch) {
        return Err(Stop::Verdict(TC_ACT_OK));
    }
    let Some(settings) = F::settings() else { return Err(Stop::Verdict(TC_ACT_OK)) };
    let ports = (settings.source_port_min, settings.source_port_max);
    let reply_flags = if direction == Direction::Egress { FLOW_STACK } else { 0 };
    // No frontend's: nothing of an earlier packet's may count.
    scratch.found.frontend.flags = 0;
    Ok(Source { address: scratch.key.source, masquerade: false, ports, service_id: 0, flags: 0, reply_flags })
}

/// Whether an address is this node's.
#[inline(always)]
fn is_own<F: Family>(address: &F::A) -> bool {
    decide::is_own(&Maps::<F>::NEW, address)
}

/// Whether the packet goes to its endpoint's node in a tunnel: on its way in, as the node's own packets never do.
#[inline(always)]
fn is_direct<A: Copy>(scratch: &Scratch<A>, direction: Direction) -> bool {
    direction == Direction::Ingress && scratch.flow.is_direct()
}

/// Where the packet goes once it has the tuple of `scratch.flow`, or why it goes nowhere.
#[inline(always)]
fn plan<F: PacketFamily>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &mut Scratch<F::A>,
    direction: Direction,
    work: Counter,
) -> Plan {
    // An answer of a local socket is already on the right interface.
    let stays = direction == Direction::Egress && scratch.key.destination == scratch.flow.destination;
    let direct = is_direct(scratch, direction);
    let route = match work {
        _ if stays || scratch.flow.is_stacks() => Route::Local,
        _ if direct => route_in_tunnel::<F>(packet, scratch),
        Counter::PacketEstablished | Counter::PacketFragment => route_again::<F>(packet, scratch),
        _ => route::<F>(packet, scratch, 0),
    };
    let hopless = || direction == Direction::Ingress && F::time_to_live(packet).is_none_or(|hops| hops <= 1);
    // What the node itself sends can be made smaller by the node itself.
    let may_be_fragmented =
        || direction == Direction::Ingress && !direct && packet.segment_size() == 0 && F::may_be_fragmented(packet);
    let refusal = match route {
        Route::Out { .. } | Route::TooBig { .. } if hopless() => (Refusal::TimeExceeded, Counter::TimeToLive),
        Route::TooBig { mtu } if !may_be_fragmented() => (Refusal::TooBig { mtu }, Counter::TooBig),
        _ => return Plan::new(&route, work, transport.offset),
    };
    match work {
        // No error is answered with an error (RFC 1122, 3.2.2; RFC 4443, 2.4).
        Counter::PacketError => Plan { route: ROUTE_NOWHERE, reason: refusal.1 as u32, ..Plan::default() },
        _ => Plan::refuse::<F>(refusal.0, refusal.1, transport.offset),
    }
}

#[inline(always)]
fn carry_out<F: PacketFamily>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &mut Scratch<F::A>,
    direction: Direction,
    plan: Plan,
) -> i32 {
    let transport = Transport { offset: (plan.offset & OFFSET_MASK) as usize, ..*transport };
    match plan.route {
        ROUTE_BACK => {
            let Some(verdict) = reject::<F>(packet, &transport, &scratch.key, &plan.answer, direction) else {
                return drop_packet(Counter::RejectFailed);
            };
            return because(plan.reason, verdict);
        }
        ROUTE_NOWHERE => return because(plan.reason, TC_ACT_SHOT),
        _ => {}
    }
    // The node's own packets have made no hop yet.
    let forwarded = plan.route <= ROUTE_RESOLVE && direction == Direction::Ingress;
    let translated = match plan.work {
        _ if is_direct(scratch, direction) => dsr::encapsulate::<F>(packet, scratch),
        PACKET_ERROR => icmp::translate::<F>(packet, scratch, forwarded),
        PACKET_FRAGMENT => fragment::translate::<F>(packet, scratch, forwarded),
        _ => translate::<F>(packet, &transport, scratch, forwarded),
    };
    if translated.is_none() {
        return drop_packet(Counter::RewriteFailed);
    }
    if transport.protocol == TCP && transport.tcp_flags & TCP_SYN != 0 && scratch.flow.came_by_tunnel() {
        F::clamp(packet, transport.offset);
    }
    match deliver_by::<F>(packet, scratch, direction, &plan) {
        Some(TC_ACT_SHOT) => TC_ACT_SHOT,
        Some(verdict) => {
            count_packet(scratch.flow.service_id, packet.length());
            because(plan.work, verdict)
        }
        None => drop_packet(Counter::RewriteFailed),
    }
}

/// Sends the translated packet where the plan says.
#[inline(always)]
fn deliver_by<F: PacketFamily>(
    packet: &Packet<'_>,
    scratch: &mut Scratch<F::A>,
    direction: Direction,
    plan: &Plan,
) -> Option<i32> {
    let stays = direction == Direction::Egress && scratch.key.destination == scratch.flow.destination;
    match plan.route {
        ROUTE_NEIGHBOUR | ROUTE_RESOLVE => transmit(packet, scratch, plan.route == ROUTE_NEIGHBOUR),
        // Unmarked: conntrack does not look at what is marked while flows are handed to it.
        ROUTE_LOCAL if scratch.flow.is_stacks() => Some(TC_ACT_OK),
        ROUTE_LOCAL if !stays => deliver::<F>(packet, scratch, direction),
        ROUTE_LOCAL => Some(leave(packet)),
        ROUTE_FRAGMENTS if scratch.key.source != scratch.flow.source => {
            count_index(plan.reason);
            fragment::leave::<F>(packet, scratch)
        }
        // The kernel has routed it to the node itself already: some socket there might take it.
        _ if direction == Direction::Egress && packet.on_loopback() => {
            count_index(plan.reason);
            Some(TC_ACT_SHOT)
        }
        _ => {
            count_index(plan.reason);
            Some(leave(packet))
        }
    }
}

/// The route of a packet whose flow is known; the kernel is asked now and then.
#[inline(always)]
fn route_again<F: PacketFamily>(packet: &Packet<'_>, scratch: &mut Scratch<F::A>) -> Route {
    if is_known(packet, &scratch.flow) {
        return Route::Out { neighbour: true };
    }
    let route = route::<F>(packet, scratch, 0);
    if matches!(route, Route::Out { neighbour: true }) {
        conntrack::remember_route::<F>(scratch);
    }
    route
}

/// The route of a packet that goes in a tunnel, which all flows of its backend share.
#[inline(always)]
fn route_in_tunnel<F: PacketFamily>(packet: &Packet<'_>, scratch: &mut Scratch<F::A>) -> Route {
    if dsr::recall::<F>(packet, scratch) {
        return Route::Out { neighbour: true };
    }
    let route = route::<F>(packet, scratch, dsr::around::<F>(&scratch.flow));
    if matches!(route, Route::Out { neighbour: true }) {
        dsr::keep::<F>(scratch);
    }
    route
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
fn leave(packet: &Packet<'_>) -> i32 {
    packet.tc.set_mark(packet.mark() | MARK_DONE);
    TC_ACT_OK
}

#[inline(always)]
fn pass(reason: Counter) -> i32 {
    because(reason as u32, TC_ACT_OK)
}

#[inline(always)]
fn drop_packet(reason: Counter) -> i32 {
    because(reason as u32, TC_ACT_SHOT)
}

/// A verdict together with the index of the counter that it is counted by, until [`conclude`].
#[inline(always)]
fn because(reason: u32, verdict: i32) -> i32 {
    (verdict & VERDICT_MASK) | ((reason + 1) << REASON_SHIFT) as i32
}

/// The bits of a verdict that `TC_ACT_*` take.
const VERDICT_MASK: i32 = 0xff;
const REASON_SHIFT: u32 = 8;

/// Counts what was done with a packet, tells whoever watches, and gives the kernel its verdict. Every way out comes through here, so
/// that this is in the program once.
#[inline(always)]
fn conclude<F: Family>(packet: &Packet<'_>, direction: Direction, result: i32) -> i32 {
    let reason = result as u32 >> REASON_SHIFT;
    if reason != 0 {
        count_index(reason - 1);
        if reason - 1 != Counter::PacketEstablished as u32
            && reason - 1 != PACKET_FRAGMENT
            && let Some(scratch) = F::scratch()
        {
            events::packet(scratch, packet.interface(), direction, reason - 1);
        }
    }
    result & VERDICT_MASK
}
