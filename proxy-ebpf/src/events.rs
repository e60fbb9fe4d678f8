//! Telling whoever watches what happened to a packet or a socket. While nobody watches, that is one look at a map, and only
//! where something else than a packet of a known flow is dealt with.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use proxy_common::event::{EVENT_EGRESS, EVENT_INGRESS, EVENT_SOCKET, Event};
use proxy_common::select::pick;
use proxy_common::{Address, Be16, Counter};

use crate::counters::count;
use crate::maps::{EVENTS, MONITOR, Scratch};
use crate::tc::Direction;

/// Tells of a packet that lies in `scratch`, and of the reason that it was counted for.
#[inline(always)]
pub fn packet<A: Address>(scratch: &Scratch<A>, interface: u32, direction: Direction, reason: u32) {
    let Some(now) = wanted(reason) else { return };
    let path = if direction == Direction::Egress { EVENT_EGRESS } else { EVENT_INGRESS };
    tell(Event {
        time_ns: now,
        source: scratch.key.source.widen(),
        destination: scratch.key.destination.widen(),
        backend: scratch.flow.destination.widen(),
        source_port: scratch.key.source_port,
        destination_port: scratch.key.destination_port,
        backend_port: scratch.flow.destination_port,
        protocol: scratch.key.protocol,
        path,
        reason,
        frontend_service_id: scratch.found.frontend.service_id,
        flow_service_id: scratch.flow.service_id,
        interface,
    });
}

/// Tells of a socket that asked for `address` and gets `backend` instead, or was refused.
#[inline(always)]
pub fn socket<A: Address>(
    (address, port): (&A, Be16),
    protocol: u8,
    service_id: u32,
    (backend, backend_port): (&A, Be16),
    reason: Counter,
) {
    let Some(now) = wanted(reason as u32) else { return };
    tell(Event {
        time_ns: now,
        source: A::default().widen(),
        destination: address.widen(),
        backend: backend.widen(),
        source_port: Be16(0),
        destination_port: port,
        backend_port,
        protocol,
        path: EVENT_SOCKET,
        reason: reason as u32,
        frontend_service_id: service_id,
        flow_service_id: service_id,
        interface: 0,
    });
}

/// The time, if somebody watches and this is one of the events that are told.
#[inline(always)]
fn wanted(reason: u32) -> Option<u64> {
    let settings = MONITOR.get(0)?;
    if settings.deadline_ns == 0 {
        return None;
    }
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    if now > settings.deadline_ns || settings.reasons >> (reason & 63) & 1 == 0 {
        return None;
    }
    // SAFETY: no arguments.
    let random = || unsafe { bpf_get_prandom_u32() };
    if settings.sample > 1 && pick(random(), settings.sample) != 0 {
        return None;
    }
    Some(now)
}

#[inline(always)]
fn tell(event: Event) {
    let Some(mut room) = EVENTS.reserve(0) else { return count(Counter::EventLost) };
    let room_for_event: &mut MaybeUninit<Event> = &mut room;
    room_for_event.write(event);
    room.submit(0);
}
