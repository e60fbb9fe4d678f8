//! North-south traffic at the driver: a plain packet that comes from another machine and goes to another machine is translated and
//! sent on before the kernel makes a socket buffer of it.
//!
//! Everything else goes on to the tc hook of the same interface as it came: what is for this node and its pods, what has to be
//! refused, fragments, options, errors, SCTP. Both hooks share all flows, so a flow may change between them from packet to packet.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX};
use aya_ebpf::programs::XdpContext;
use proxy_common::decide::{Crossing, Outcome, Source, new_flow};
use proxy_common::{Address, Counter};

use crate::conntrack::{self, Owner};
use crate::counters::{count, count_connection, count_packet};
use crate::ctx::{Frame, Hook};
use crate::dsr;
use crate::events;
use crate::forward::{Route, is_known, route};
use crate::maps::{DEVICES, Ipv4, Ipv6, Scratch};
use crate::nat::translate_frame;
use crate::parse::{Transport, parse_plain};
use crate::service::{Maps, is_absent};
use crate::tc::{Direction, ETHER_TYPE_IPV4, ETHER_TYPE_IPV6, PacketFamily};

/// Entry of the hook.
#[inline(always)]
pub fn run(ctx: &XdpContext) -> u32 {
    let frame = Frame { xdp: ctx };
    let verdict = match frame.ether_type() {
        Some(ETHER_TYPE_IPV4) => process::<Ipv4>(&frame),
        Some(ETHER_TYPE_IPV6) => process::<Ipv6>(&frame),
        _ => None,
    };
    verdict.unwrap_or(XDP_PASS)
}

/// `None` leaves the frame as it came.
#[inline(always)]
fn process<F: PacketFamily>(frame: &Frame<'_>) -> Option<u32> {
    let scratch = F::scratch()?;
    let transport = parse_plain::<F>(frame, &mut scratch.key)?;
    // Answers that do not come to an address of this node are left to the tc hook too, which knows their flow.
    if is_absent::<F>(&scratch.key.destination) {
        return None;
    }
    let (verdict, work) = match conntrack::find::<F>(scratch, &transport) {
        Owner::Us => (established::<F>(frame, scratch)?, Counter::FrameEstablished),
        Owner::Nobody if transport.opens() || dsr::may_rejoin::<F>(&transport) => {
            if conntrack::leaves_new_flows() {
                return None;
            }
            (open::<F>(frame, scratch, &transport)?, Counter::FrameNew)
        }
        _ => return None,
    };
    if verdict == XDP_DROP {
        return Some(verdict);
    }
    if scratch.flow.is_direct() {
        return Some(send_in_tunnel::<F>(frame, scratch, verdict, work));
    }
    if translate_frame::<F>(frame, &transport, scratch).is_none() {
        return Some(conclude(frame, scratch, Counter::RewriteFailed, XDP_DROP));
    }
    count_packet(scratch.flow.service_id, frame.length() as u32);
    Some(conclude(frame, scratch, work, verdict))
}

/// Puts the frame of a flow with direct server return into its tunnel.
#[inline(always)]
fn send_in_tunnel<F: PacketFamily>(frame: &Frame<'_>, scratch: &Scratch<F::A>, verdict: u32, work: Counter) -> u32 {
    let work = if work == Counter::FrameEstablished { Counter::FrameTunnelled } else { work };
    count_packet(scratch.flow.service_id, frame.length() as u32);
    match dsr::encapsulate_frame::<F>(frame, scratch) {
        Some(()) => conclude(frame, scratch, work, verdict),
        None => conclude(frame, scratch, Counter::RewriteFailed, XDP_DROP),
    }
}

/// Counts what was done with a frame, and tells whoever watches.
#[inline(always)]
fn conclude<A: Address>(frame: &Frame<'_>, scratch: &Scratch<A>, reason: Counter, verdict: u32) -> u32 {
    count(reason);
    if !matches!(reason, Counter::FrameEstablished | Counter::FrameTunnelled) {
        events::packet(scratch, frame.interface(), Direction::Ingress, reason as u32);
    }
    verdict
}

#[inline(always)]
fn established<F: PacketFamily>(frame: &Frame<'_>, scratch: &mut Scratch<F::A>) -> Option<u32> {
    if scratch.flow.is_stacks() {
        return None;
    }
    if scratch.flow.is_direct() {
        return way_in_tunnel::<F>(frame, scratch);
    }
    if is_known(frame, &scratch.flow) {
        return leave(frame, scratch);
    }
    let verdict = way_out::<F>(frame, scratch)?;
    conntrack::remember_route::<F>(scratch);
    Some(verdict)
}

/// A new flow from one machine to another. What is to be refused or dropped, or has its endpoint here, is the tc hook's.
#[inline(always)]
fn open<F: PacketFamily>(frame: &Frame<'_>, scratch: &mut Scratch<F::A>, transport: &Transport) -> Option<u32> {
    let source = decide::<F>(frame, scratch)?;
    if !transport.opens() && !dsr::rejoins(scratch, &source) {
        return None;
    }
    conntrack::prepare::<F>(scratch, &source);
    let verdict = match source.is_direct() {
        true => way_in_tunnel::<F>(frame, scratch)?,
        false => way_out::<F>(frame, scratch)?,
    };
    if let Err(reason) = conntrack::write::<F>(frame, scratch, &source) {
        return Some(conclude(frame, scratch, reason, XDP_DROP));
    }
    count_connection::<F>(source.service_id, scratch.flow.backend_id);
    Some(verdict)
}

/// The backend goes into `scratch.chosen`.
#[inline(always)]
fn decide<F: PacketFamily>(frame: &Frame<'_>, scratch: &mut Scratch<F::A>) -> Option<Source<F::A>> {
    let crossing = Crossing { interface: frame.interface(), egress: false };
    let Scratch { key, found, chosen, .. } = scratch;
    match new_flow(&Maps::<F>::NEW, crossing, key, true, found, chosen) {
        Outcome::Forward(source) if chosen.backend.local == 0 => Some(source),
        _ => None,
    }
}

/// Asks for the route; `None` when the frame does not leave through an interface that takes frames.
#[inline(always)]
fn way_out<F: PacketFamily>(frame: &Frame<'_>, scratch: &mut Scratch<F::A>) -> Option<u32> {
    match route::<F>(frame, scratch, dsr::around::<F>(&scratch.flow)) {
        Route::Out { neighbour: true } => leave(frame, scratch),
        _ => None,
    }
}

/// The same for a frame that goes in a tunnel; the route is kept for all flows of the backend.
#[inline(always)]
fn way_in_tunnel<F: PacketFamily>(frame: &Frame<'_>, scratch: &mut Scratch<F::A>) -> Option<u32> {
    if dsr::recall::<F>(frame, scratch) {
        return leave(frame, scratch);
    }
    let verdict = way_out::<F>(frame, scratch)?;
    dsr::keep::<F>(scratch);
    Some(verdict)
}

/// Hands the frame to the interface of `scratch.flow`.
#[inline(always)]
fn leave<A>(frame: &Frame<'_>, scratch: &Scratch<A>) -> Option<u32> {
    if scratch.flow.interface == frame.interface() {
        return Some(XDP_TX);
    }
    match DEVICES.redirect(scratch.flow.interface, u64::from(XDP_PASS)) {
        Ok(XDP_REDIRECT) => Some(XDP_REDIRECT),
        _ => None,
    }
}
