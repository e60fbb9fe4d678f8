//! Flows: which packets belong to one, and how a new one gets its two entries.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use proxy_common::select::probe_port;
use proxy_common::{Be16, Counter, FLOW_CLOSING, FLOW_FOREIGN, FLOW_REPLY, FLOW_STACK, Flow, FlowKey};

use crate::maps::{Family, Scratch};
use crate::parse::{Transport, UDP};
use crate::service::{self, Chosen};

/// Source ports that are tried before a flow is refused.
const PORT_ATTEMPTS: u32 = 12;

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
    let Some(entry) = F::flows().get_ptr_mut(&scratch.key) else { return Owner::Nobody };
    // SAFETY: the pointer is valid until the map is changed; copied at once.
    scratch.flow = unsafe { *entry };
    let flow = &scratch.flow;
    if transport.closes() {
        // SAFETY: as above. Both CPUs of a race write the same bit.
        unsafe { (*entry).flags = flow.flags | FLOW_CLOSING };
    }
    let opens = transport.opens();
    if flow.flags & FLOW_FOREIGN != 0 {
        return if opens { Owner::Nobody } else { Owner::Conntrack };
    }
    let ours = flow.flags & FLOW_REPLY != 0 || !opens || reusable::<F>(transport, flow);
    if ours { Owner::Us } else { Owner::Nobody }
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
    // SAFETY: copied before the map is changed.
    let Some(taken) = (unsafe { F::flows().get(&scratch.reply_key) }) else { return false };
    scratch.reply = *taken;
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

/// Where the source of a new flow comes from.
pub struct Source<A> {
    /// Its address.
    pub address: A,
    /// Whether it is the node's, so that the port must come from the node's range.
    pub masquerade: bool,
    /// That range, host byte order.
    pub ports: (u16, u16),
    /// Whether answers are the kernel's to deal with, once translated.
    pub stack: bool,
}

/// Writes both entries of the flow from `scratch.key` to `scratch.chosen`, the answer's first: no packet of the flow can
/// come back before it is known. The flow is left in `scratch.flow`.
///
/// The source port is kept where the answer's tuple is free, and replaced where another flow holds it: two virtual
/// addresses with one backend, or two masqueraded clients with one port.
#[inline(always)]
pub fn create<F: Family>(scratch: &mut Scratch<F::A>, source: &Source<F::A>) -> Result<(), Counter> {
    // SAFETY: no arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    let (min, max) = source.ports;
    let own_port = scratch.key.source_port;
    let keep = !source.masquerade || (own_port.to_host() >= min && own_port.to_host() <= max);
    prepare::<F>(scratch, source);
    for attempt in 0..PORT_ATTEMPTS {
        let source_port = match attempt == 0 && keep {
            true => own_port,
            false => Be16::from_host(probe_port(random, attempt, min, max)),
        };
        scratch.flow.source_port = source_port;
        scratch.reply_key.destination_port = source_port;
        if claim_reply::<F>(scratch) {
            return match F::flows().insert(&scratch.key, &scratch.flow, BPF_ANY.into()) {
                Ok(()) => Ok(()),
                Err(_) => Err(Counter::FlowInsertFailed),
            };
        }
    }
    Err(Counter::SnatExhausted)
}

/// Everything of both entries but the source port.
#[inline(always)]
fn prepare<F: Family>(scratch: &mut Scratch<F::A>, source: &Source<F::A>) {
    scratch.flow = Flow {
        source: source.address,
        destination: scratch.chosen.backend.address,
        source_port: scratch.key.source_port,
        destination_port: scratch.chosen.backend.port,
        flags: 0,
        backend_id: scratch.chosen.id,
        backend_generation: scratch.chosen.backend.generation,
    };
    scratch.reply_key = scratch.flow.twin_key(scratch.key.protocol);
    scratch.reply = Flow {
        source: scratch.key.destination,
        destination: scratch.key.source,
        source_port: scratch.key.destination_port,
        destination_port: scratch.key.source_port,
        flags: if source.stack { FLOW_REPLY | FLOW_STACK } else { FLOW_REPLY },
        backend_id: scratch.chosen.id,
        backend_generation: scratch.chosen.backend.generation,
    };
}

/// Takes the answer's tuple if it is free, already ours, or left over from a closed connection.
#[inline(always)]
fn claim_reply<F: Family>(scratch: &Scratch<F::A>) -> bool {
    if F::flows().insert(&scratch.reply_key, &scratch.reply, BPF_NOEXIST.into()).is_ok() {
        return true;
    }
    // SAFETY: compared before any update.
    let takeable = match unsafe { F::flows().get(&scratch.reply_key) } {
        Some(existing) => existing.flags & FLOW_CLOSING != 0 || same_tuple::<F>(existing, &scratch.reply),
        None => true,
    };
    takeable && F::flows().insert(&scratch.reply_key, &scratch.reply, BPF_ANY.into()).is_ok()
}

#[inline(always)]
fn same_tuple<F: Family>(a: &Flow<F::A>, b: &Flow<F::A>) -> bool {
    a.source == b.source
        && a.destination == b.destination
        && a.source_port == b.source_port
        && a.destination_port == b.destination_port
}
