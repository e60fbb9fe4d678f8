//! Packets for the node's own sockets, handed over on `lo` as if the node had sent them to itself.
//!
//! What a pod of this node answers to the node enters at the pod's interface, and its source becomes the Service's address there.
//! The kernel would check that source (`fib_validate_source`): reverse path filtering refuses it where the route to the Service's
//! address is another, and it is always refused where that address is the node's own. conntrack translates behind this check,
//! where no program runs. A packet that comes over `lo` is not checked, for it brings along the route that it was sent with.
//! `bpf_redirect_neigh` looks up such a route, for a loopback address: so the packet crosses to `lo` under one, and the program
//! there gives it its destination back before anybody sees it. Firewalls' own reverse path filters spare `lo` as well.

use core::ptr::null_mut;

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::bpf_redirect_neigh;
use proxy_common::decide::LOOPBACK_INTERFACE;
use proxy_common::{Address, Counter, MARK_DONE};

use crate::counters::count;
use crate::ctx::{ETHERNET_LENGTH, Hook, Packet};
use crate::maps::Scratch;
use crate::nat::Rewrite;
use crate::parse::ParseNetwork;

/// Sends a packet that has the tuple of `scratch.flow` to the node's own sockets. At ingress only: a packet on its way out has a
/// route already, which older kernels would lose without freeing it.
#[inline(always)]
pub fn hand_over<F: Rewrite>(packet: &Packet<'_>) -> Option<i32> {
    F::set_destination(packet, &F::LOOPBACK)?;
    let ethernet = packet.at::<[u8; ETHERNET_LENGTH]>(0)?;
    // The kernel adds this header to a checksum that a device computed over the rest, and then replaces it: zeros add nothing.
    // SAFETY: `at` checked the whole header.
    unsafe { *ethernet = [0; ETHERNET_LENGTH] };
    packet.tc.set_mark(packet.mark() | MARK_DONE);
    // SAFETY: no next hop is named, so that the kernel looks up a route to the destination.
    Some(unsafe { bpf_redirect_neigh(LOOPBACK_INTERFACE, null_mut(), 0, 0) as i32 })
}

/// A packet on its way out that turned out to be for the node itself: back in through the same interface, where
/// [`again`] finds it.
#[inline(always)]
pub fn turn_back(packet: &Packet<'_>) -> Option<i32> {
    packet.swap_ethernet_addresses()?;
    packet.tc.set_mark(packet.mark() | MARK_DONE);
    Some(packet.redirect(packet.interface(), u64::from(BPF_F_INGRESS)))
}

/// A packet that was translated before and comes into the node again: what goes from the node to itself is handed over.
#[inline(always)]
pub fn again<F: Rewrite + ParseNetwork>(
    packet: &Packet<'_>,
    scratch: &mut Scratch<F::A>,
    is_own: impl Fn(&F::A) -> bool,
) -> i32 {
    if <F as ParseNetwork>::network(packet, &mut scratch.key).is_none() {
        return TC_ACT_OK;
    }
    if !is_own(&scratch.key.source) || !is_own(&scratch.key.destination) {
        return TC_ACT_OK;
    }
    scratch.flow.source = scratch.key.source;
    scratch.flow.destination = scratch.key.destination;
    match hand_over::<F>(packet) {
        Some(verdict) => verdict,
        None => lost(),
    }
}

/// The other side of [`hand_over`], on `lo`. The kernel runs from there to here without a break on one CPU, so the flow still
/// lies in `scratch`.
#[inline(always)]
pub fn arrive<F: Rewrite + ParseNetwork>(packet: &Packet<'_>, scratch: &mut Scratch<F::A>) -> i32 {
    if <F as ParseNetwork>::network(packet, &mut scratch.key).is_none() {
        return TC_ACT_OK;
    }
    // What was translated on `lo` itself goes on.
    if !scratch.key.destination.is_loopback() || scratch.key.source.is_loopback() {
        return TC_ACT_OK;
    }
    if scratch.key.source != scratch.flow.source {
        return lost();
    }
    match F::set_destination(packet, &scratch.flow.destination) {
        Some(()) => TC_ACT_OK,
        None => lost(),
    }
}

#[inline(always)]
fn lost() -> i32 {
    count(Counter::RewriteFailed);
    TC_ACT_SHOT
}
