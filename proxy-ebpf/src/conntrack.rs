//! Flows: which packets belong to one, and how a new one gets its two entries.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use proxy_common::decide::{Chosen, Source};
use proxy_common::select::probe_port;
use proxy_common::{
    Be16, Counter, FLOW_ANSWERED, FLOW_CLOSED, FLOW_CLOSING, FLOW_CONFIRMED, FLOW_COUNTED, FLOW_FOREIGN, FLOW_REPLY,
    FRONTEND_LEAST_CONNECTIONS, Flow, FlowKey, SEEN_TICKS,
};

use crate::ctx::Hook;
use crate::dsr;
use crate::forward::ticks;
use crate::maps::{Family, Scratch, TAKING_OVER};
use crate::node_port::{self, SocketLookup};
use crate::parse::{TCP, Transport, UDP};
use crate::service;

/// Source ports that are tried before a flow is refused.
const PORT_ATTEMPTS: u32 = 12;
/// From this one on a flow whose client has not gone on for [`HANDSHAKE_TICKS`] loses its port: a flood of SYNs fills all ports towards
/// an endpoint with those.
const ATTEMPTS_FOR_FREE: u32 = 8;
/// From this one on it loses its port at any age: the flood fills them faster than that.
const ATTEMPTS_FOR_RECENT: u32 = 10;
/// Ticks within which a client goes on after the answer, unless something is lost: 0.25 to 2.5 seconds.
const HANDSHAKE_TICKS: u32 = 256;

/// Whose flow a packet belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Ours.
    Us,
    /// Conntrack's: it was translating before we came.
    Conntrack,
    /// Nobody's that we know of.
    Nobody,
}

/// Reads the flow of the packet into `scratch.flow`, if it has one that still holds.
///
/// A datagram to a backend that is gone opens a new flow: kube-proxy deletes such conntrack entries, here the generation
/// says it. TCP keeps its backend until the connection ends, and a SYN may take over what is closing or gone.
#[inline(always)]
pub fn find<F: Family>(scratch: &mut Scratch<F::A>, transport: &Transport) -> Owner {
    let Some(place) = F::flows().read(&scratch.key, &mut scratch.flow) else { return Owner::Nobody };
    scratch.place = place;
    let flow = &scratch.flow;
    // Odd, as `last_seen` is: within one tick nothing has passed.
    let (opens, flags, now) = (transport.opens(), flow.flags, ticks() | 1);
    let is_due = transport.closes() || now.wrapping_sub(flow.last_seen) > SEEN_TICKS || is_news(flags, opens);
    if is_due && !track::<F>(scratch, transport, now) {
        return Owner::Nobody;
    }
    if flags & FLOW_FOREIGN != 0 {
        return if opens { Owner::Nobody } else { Owner::Conntrack };
    }
    let ours = flags & FLOW_REPLY != 0 || !opens || reusable::<F>(transport, &scratch.flow);
    if ours { Owner::Us } else { Owner::Nobody }
}

/// Whether a new flow is to be left to the programs of a version before us, which are behind ours on every interface, whereas ours are not on all of
/// them yet: where they are not, nobody would know the answers.
#[inline(always)]
pub fn leaves_new_flows() -> bool {
    TAKING_OVER.get(0).is_some_and(|taking_over| *taking_over != 0)
}

/// Whether the packet brings a flow further: the first answer, or what the client says after it.
#[inline(always)]
const fn is_news(flags: u8, opens: bool) -> bool {
    first_answer(flags) || (!opens && flags & (FLOW_REPLY | FLOW_ANSWERED | FLOW_CONFIRMED) == FLOW_ANSWERED)
}

/// Whether this is the entry of an answer that nobody has given yet.
#[inline(always)]
const fn first_answer(flags: u8) -> bool {
    flags & (FLOW_REPLY | FLOW_ANSWERED) == FLOW_REPLY
}

/// Follows the state of the flow, in both of its entries; seldom, and apart from the way that most packets take. That one looks at its
/// twin keeps both about equally far from being evicted, and one that has lost it makes it again. Returns whether the flow still holds.
///
/// Two CPUs that do this at once may lose a bit: the packet that carried it is repeated, or the flow ends by its timeout.
#[inline(always)]
fn track<F: Family>(scratch: &mut Scratch<F::A>, transport: &Transport, now: u32) -> bool {
    let flags = scratch.flow.flags;
    if flags & FLOW_FOREIGN != 0 {
        seen::<F>(scratch.place, flags, now);
        return true;
    }
    if scratch.flow.is_direct() {
        dsr::track::<F>(scratch, transport, now);
        return true;
    }
    scratch.reply_key = scratch.flow.twin_key(scratch.key.protocol);
    let mut both = flags & (FLOW_ANSWERED | FLOW_CONFIRMED | FLOW_CLOSED);
    let mut own = flags;
    if flags & FLOW_REPLY != 0 {
        both |= FLOW_ANSWERED;
    }
    // Only TCP has a client that must have heard the answer to go on.
    if both & FLOW_ANSWERED != 0 && (transport.protocol != TCP || (flags & FLOW_REPLY == 0 && !transport.opens())) {
        both |= FLOW_CONFIRMED;
    }
    if transport.closes() {
        own |= FLOW_CLOSING;
    }
    let Some(twin) = F::flows().read(&scratch.reply_key, &mut scratch.reply) else {
        restore::<F>(scratch, own | both, now);
        return true;
    };
    if scratch.reply.twin_key(scratch.key.protocol) != scratch.key {
        return take_back::<F>(scratch, transport, own | both, now);
    }
    let twins = scratch.reply.flags;
    let over = transport.resets() || own & twins & FLOW_CLOSING != 0;
    if over {
        both |= FLOW_CLOSING | FLOW_CLOSED;
    }
    let counted = (own | twins) & FLOW_COUNTED;
    let dropped = if over { FLOW_COUNTED } else { 0 };
    let twins = (twins | both) & !dropped;
    if let Some(flow) = F::flows().at(twin) {
        flow.flags = twins;
    }
    F::flows().touch(twin, twins, now);
    seen::<F>(scratch.place, (own | both) & !dropped, now);
    if counted & dropped != 0 {
        count_closed::<F>(scratch.flow.backend_id);
    }
    true
}

/// What the packet's flow can do about another one that has its twin's tuple. The answers to a client that has not gone on were given
/// away with its port: one that opens its flow again gets another port, and one that goes on by now outweighs who never did. An answer
/// whose client has opened another flow says nothing of that one. Returns whether the flow still holds.
#[inline(always)]
fn take_back<F: Family>(scratch: &mut Scratch<F::A>, transport: &Transport, flags: u8, now: u32) -> bool {
    if flags & FLOW_REPLY != 0 {
        seen::<F>(scratch.place, flags, now);
        return true;
    }
    if transport.opens() || scratch.reply.flags & (FLOW_CONFIRMED | FLOW_FOREIGN) != 0 {
        return false;
    }
    // That it is gone already is as good.
    let _gone = F::flows().remove(&scratch.reply_key);
    restore::<F>(scratch, flags, now);
    true
}

/// Writes into the packet's entry when it was seen, and its flags.
#[inline(always)]
pub fn seen<F: Family>(place: u32, flags: u8, now: u32) {
    if let Some(flow) = F::flows().at(place) {
        (flow.last_seen, flow.flags) = (now, flags);
    }
    F::flows().touch(place, flags, now);
}

/// Makes the twin of the packet's entry again, which was evicted. What is not translated towards the endpoint, and what the kernel has
/// more to do with, is more than one entry tells.
#[inline(always)]
fn restore<F: Family>(scratch: &mut Scratch<F::A>, flags: u8, now: u32) {
    seen::<F>(scratch.place, flags, now);
    let (key, flow) = (&scratch.key, &scratch.flow);
    let same = match flags & FLOW_REPLY {
        0 => flow.destination == key.destination && flow.destination_port == key.destination_port,
        _ => flow.source == key.source && flow.source_port == key.source_port,
    };
    if same || flow.is_stacks() {
        return;
    }
    scratch.reply = Flow {
        source: key.destination,
        destination: key.source,
        source_port: key.destination_port,
        destination_port: key.source_port,
        flags: flags & (FLOW_ANSWERED | FLOW_CONFIRMED | FLOW_CLOSED) | (flags & FLOW_REPLY ^ FLOW_REPLY),
        service_id: flow.service_id,
        backend_id: flow.backend_id,
        backend_generation: flow.backend_generation,
        last_seen: now,
        ..Flow::default()
    };
    // That somebody else has it meanwhile is as good.
    let _taken = F::flows().add(&scratch.reply_key, &scratch.reply);
}

/// One open flow more.
#[inline(always)]
pub fn count_opened<F: Family>(backend_id: u32) {
    if let Some(load) = F::loads().get_ptr_mut(backend_id) {
        // SAFETY: the pointer is to a value of an array, which is never freed. An increment that another CPU overwrites is missing
        // until the next count.
        unsafe { (*load).open += 1 };
    }
}

/// One open flow less. A count that is too low already stays at 0.
#[inline(always)]
pub fn count_closed<F: Family>(backend_id: u32) {
    if let Some(load) = F::loads().get_ptr_mut(backend_id) {
        // SAFETY: as above.
        unsafe { (*load).open = (*load).open.saturating_sub(1) };
    }
}

#[inline(always)]
fn reusable<F: Family>(transport: &Transport, flow: &Flow<F::A>) -> bool {
    if transport.protocol != UDP && flow.flags & FLOW_CLOSING != 0 {
        return false;
    }
    service::live::<F>(flow.backend_id, flow.backend_generation).is_some()
}

/// Whether the answers to `scratch.key`, a new flow that is no service's, belong to an open flow of ours. That of a closed one
/// is removed. The destination is then left in `scratch.chosen`, as if it had been chosen.
#[inline(always)]
pub fn answers_are_taken<F: Family>(scratch: &mut Scratch<F::A>) -> bool {
    scratch.reply_key = FlowKey {
        source: scratch.key.destination,
        destination: scratch.key.source,
        source_port: scratch.key.destination_port,
        destination_port: scratch.key.source_port,
        protocol: scratch.key.protocol,
        padding: [0; 3],
    };
    if F::flows().read(&scratch.reply_key, &mut scratch.reply).is_none() {
        return false;
    }
    let flags = scratch.reply.flags;
    if flags & FLOW_REPLY == 0 {
        return false;
    }
    let (id, generation) = (scratch.reply.backend_id, scratch.reply.backend_generation);
    let Some(backend) = service::live::<F>(id, generation).filter(|_| flags & FLOW_CLOSING == 0) else {
        // That it is gone already is as good.
        let _gone = F::flows().remove(&scratch.reply_key);
        return false;
    };
    scratch.chosen = Chosen { id, backend: *backend };
    true
}

/// Writes both entries of the flow from `scratch.key` to `scratch.chosen`, the answer's first: no packet of the flow can
/// come back before it is known. The flow is left in `scratch.flow`.
///
/// The source port is kept where the answer's tuple is free, and replaced where another flow holds it: two virtual
/// addresses with one backend, or two masqueraded clients with one port. A port of the node's is none that something on the node has, and
/// a pod's none that a socket of the pod is connected to the backend with ([`node_port::is_taken`]).
#[inline(always)]
pub fn create<F: SocketLookup>(
    hook: &impl Hook,
    scratch: &mut Scratch<F::A>,
    source: &Source<F::A>,
) -> Result<(), Counter> {
    prepare::<F>(scratch, source);
    write::<F>(hook, scratch, source)
}

/// Writes what [`prepare`] made, once a source port is found.
#[inline(always)]
pub fn write<F: SocketLookup>(
    hook: &impl Hook,
    scratch: &mut Scratch<F::A>,
    source: &Source<F::A>,
) -> Result<(), Counter> {
    if source.is_direct() {
        return dsr::write::<F>(scratch);
    }
    // SAFETY: no arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    let (min, max) = source.ports;
    let own_port = scratch.key.source_port;
    let namespace = node_port::namespace_of_answers(hook, source, scratch.key.protocol);
    let keep = !source.masquerade || (own_port.to_host() >= min && own_port.to_host() <= max);
    for attempt in 0..PORT_ATTEMPTS {
        let source_port = match attempt == 0 && keep {
            true => own_port,
            false => Be16::from_host(probe_port(random, attempt, min, max)),
        };
        scratch.flow.source_port = source_port;
        scratch.reply_key.destination_port = source_port;
        if !claim_reply::<F>(scratch, attempt) {
            continue;
        }
        // Asked last: most ports that cannot be had are other flows', and a lookup of sockets costs more than one of flows.
        if node_port::is_taken::<F>(hook, scratch, namespace) {
            let _ours = F::flows().remove(&scratch.reply_key);
        } else {
            return match F::flows().set(&scratch.key, &scratch.flow) {
                Ok(()) => {
                    if scratch.flow.flags & FLOW_COUNTED != 0 {
                        count_opened::<F>(scratch.flow.backend_id);
                    }
                    Ok(())
                }
                Err(_) => Err(Counter::FlowInsertFailed),
            };
        }
    }
    Err(Counter::SnatExhausted)
}

/// [`FLOW_COUNTED`] for the flags of a frontend that wants it. Without a branch: the verifier would walk all that follows twice.
#[inline(always)]
const fn counted(frontend_flags: u32) -> u8 {
    const SHIFT: u32 = FLOW_COUNTED.trailing_zeros() - FRONTEND_LEAST_CONNECTIONS.trailing_zeros();
    ((frontend_flags & FRONTEND_LEAST_CONNECTIONS) << SHIFT) as u8
}

/// Everything of both entries but the source port.
#[inline(always)]
pub fn prepare<F: Family>(scratch: &mut Scratch<F::A>, source: &Source<F::A>) {
    scratch.flow = Flow {
        service_id: source.service_id,
        source: source.address,
        destination: scratch.chosen.backend.address,
        source_port: scratch.key.source_port,
        destination_port: scratch.chosen.backend.port,
        flags: counted(scratch.found.frontend.flags) | source.flags,
        backend_id: scratch.chosen.id,
        backend_generation: scratch.chosen.backend.generation,
        last_seen: ticks() | 1,
        ..Flow::default()
    };
    scratch.reply_key = scratch.flow.twin_key(scratch.key.protocol);
    scratch.reply = Flow {
        service_id: source.service_id,
        source: scratch.key.destination,
        destination: scratch.key.source,
        source_port: scratch.key.destination_port,
        destination_port: scratch.key.source_port,
        flags: FLOW_REPLY | source.reply_flags,
        backend_id: scratch.chosen.id,
        backend_generation: scratch.chosen.backend.generation,
        last_seen: scratch.flow.last_seen,
        ..Flow::default()
    };
}

/// Takes the answer's tuple if it is free, already ours, or left over; or, in later attempts, its client never went on.
#[inline(always)]
fn claim_reply<F: Family>(scratch: &mut Scratch<F::A>, attempt: u32) -> bool {
    if F::flows().add(&scratch.reply_key, &scratch.reply).is_ok() {
        return true;
    }
    let takeable = match F::flows().read(&scratch.reply_key, &mut scratch.other) {
        Some(_) => {
            let existing = &scratch.other;
            existing.flags & FLOW_CLOSING != 0
                || same_tuple::<F>(existing, &scratch.reply)
                || (attempt >= ATTEMPTS_FOR_FREE && never_went_on(existing, attempt >= ATTEMPTS_FOR_RECENT))
                || is_left_over::<F>(scratch)
        }
        None => true,
    };
    takeable && F::flows().set(&scratch.reply_key, &scratch.reply).is_ok()
}

/// Whether the client of an answer's entry has not gone on after the answer, and had time to do so if not `at_once`.
#[inline(always)]
fn never_went_on<A>(existing: &Flow<A>, at_once: bool) -> bool {
    let had_time = at_once || ticks().wrapping_sub(existing.last_seen) > HANDSHAKE_TICKS;
    had_time && existing.flags & (FLOW_CONFIRMED | FLOW_FOREIGN) == 0
}

/// Ticks after which an answer's entry without a twin counts as unused: 15 to 150 seconds.
const UNUSED_TICKS: u32 = 15_000;

/// Whether an answer's entry has lost its twin to a full table, and no answer was seen of late. The table forgets entries one by one:
/// without this, those that a search for a port has touched would stay for good, until no port is left.
#[inline(always)]
fn is_left_over<F: Family>(scratch: &mut Scratch<F::A>) -> bool {
    let existing = &scratch.other;
    let recent = ticks().wrapping_sub(existing.last_seen) < UNUSED_TICKS;
    if existing.flags & FLOW_FOREIGN != 0 || (recent && !first_answer(existing.flags)) {
        return false;
    }
    let twin = existing.twin_key(scratch.key.protocol);
    F::flows().read(&twin, &mut scratch.other).is_none()
}

/// Leaves in the table where the packets of the flow go, which was just asked for.
#[inline(always)]
pub fn remember_route<F: Family>(scratch: &Scratch<F::A>) {
    if let Some(flow) = F::flows().at(scratch.place) {
        // A reader on another CPU may see half of it when the route changes: that is a packet or two to the wrong neighbour, as while
        // the change itself goes on.
        (flow.interface, flow.link) = (scratch.flow.interface, scratch.flow.link);
        (flow.mtu, flow.route_tick) = (scratch.flow.mtu, scratch.flow.route_tick);
    }
}

#[inline(always)]
fn same_tuple<F: Family>(a: &Flow<F::A>, b: &Flow<F::A>) -> bool {
    a.source == b.source
        && a.destination == b.destination
        && a.source_port == b.source_port
        && a.destination_port == b.destination_port
}
