//! Which backend of a frontend gets a new flow.

use super::{Chosen, Found, Step, Tables};
use crate::hash::{client_hash, flow_hash};
use crate::select::pick;
use crate::{
    Affinity, BACKEND_ACTIVE, FRONTEND_LEAST_CONNECTIONS, FRONTEND_MAGLEV, FlowKey, Frontend, RuleBits, SLOT_ID_BITS,
    SLOT_ID_MASK,
};

/// Who holds an affinity: a packet's source, or a socket's network namespace.
pub trait Client {
    /// The last choice for a service.
    fn recall(&self, service_id: u32) -> Option<&Affinity>;
    /// Records a choice; a full map forgets the least recently used client.
    fn remember(&self, service_id: u32, affinity: &Affinity);
}

/// Picks a backend for a new flow, by affinity where the service asks for it. `key` is the flow's tuple; a socket has none yet, and
/// chooses at random: it is the flow, and never comes from another node.
///
/// `false` when the block changed under us twice: an update frees a block only after a while, so once is rare already.
#[inline(always)]
pub fn select<T: Tables>(
    tables: &T,
    found: &mut Found<T::A>,
    rule: RuleBits,
    key: Option<&FlowKey<T::A>>,
    client: &impl Client,
    chosen: &mut Chosen<T::A>,
) -> bool {
    if found.frontend.affinity_seconds == 0 {
        return choose(tables, found, rule, key, chosen);
    }
    let service_id = found.frontend.service_id;
    let now = tables.now_seconds();
    let held = match client.recall(service_id) {
        Some(affinity) if !expired(affinity, now, found.frontend.affinity_seconds) => {
            held_backend(tables, (affinity.backend_id, affinity.backend_generation), service_id, rule, chosen)
        }
        _ => false,
    };
    tables.note(Step::Affinity(held));
    if !held && !choose(tables, found, rule, key, chosen) {
        return false;
    }
    let affinity = Affinity {
        backend_id: chosen.id,
        backend_generation: chosen.backend.generation,
        last_used_seconds: now,
        padding: 0,
    };
    client.remember(service_id, &affinity);
    true
}

#[inline(always)]
fn expired(affinity: &Affinity, now: u32, timeout_seconds: u32) -> bool {
    now.wrapping_sub(affinity.last_used_seconds) >= timeout_seconds
}

/// Takes what a socket on this node has chosen behind the same frontend and left to its packet. Chosen anew it would be an endpoint that is
/// the socket's own pod, or looks like it, seldom: both choices would have to fall on it.
#[inline(always)]
pub(super) fn take_left<T: Tables>(tables: &T, found: &Found<T::A>, rule: RuleBits, chosen: &mut Chosen<T::A>) -> bool {
    match tables.left_by_socket(&found.key) {
        Some(backend) => held_backend(tables, backend, found.frontend.service_id, rule, chosen),
        None => false,
    }
}

/// The backend of this id and generation that was chosen earlier, if it is one that the rule's policy may choose: it may have been chosen at a
/// frontend with the other policy.
#[inline(always)]
fn held_backend<T: Tables>(
    tables: &T,
    (id, generation): (u32, u32),
    service_id: u32,
    rule: RuleBits,
    chosen: &mut Chosen<T::A>,
) -> bool {
    chosen.id = id;
    tables.live(chosen.id, generation, &mut chosen.backend)
        && chosen.backend.service_id == service_id
        && match rule.local() {
            true => chosen.backend.takes_flows() && chosen.backend.local != 0,
            false => chosen.backend.state == BACKEND_ACTIVE,
        }
}

/// A backend from the block of the rule; reads the frontend again once if its block was replaced meanwhile.
#[inline(always)]
fn choose<T: Tables>(
    tables: &T,
    found: &mut Found<T::A>,
    rule: RuleBits,
    key: Option<&FlowKey<T::A>>,
    chosen: &mut Chosen<T::A>,
) -> bool {
    let place = place(tables, &found.frontend, key);
    backend_at(tables, &found.frontend, rule, place, chosen)
        || (tables.frontend(&found.key, &mut found.frontend)
            && backend_at(tables, &found.frontend, rule, place, chosen))
}

/// Where in the block to look, as a part of 2^32: by the flow's hash in a Maglev table, else anywhere. All flows of a client have one
/// place where it is to stay with an endpoint.
#[inline(always)]
fn place<T: Tables>(tables: &T, frontend: &Frontend, key: Option<&FlowKey<T::A>>) -> u32 {
    match key {
        Some(key) if frontend.flags & FRONTEND_MAGLEV != 0 => match frontend.affinity_seconds {
            0 => flow_hash(key),
            _ => client_hash(&key.source),
        },
        _ => tables.random(),
    }
}

#[inline(always)]
fn backend_at<T: Tables>(
    tables: &T,
    frontend: &Frontend,
    rule: RuleBits,
    place: u32,
    chosen: &mut Chosen<T::A>,
) -> bool {
    let (first, count) = frontend.block(rule.local());
    let Some(mut slot) = tables.slot(first.wrapping_add(pick(place, count))) else { return false };
    if frontend.flags & FRONTEND_LEAST_CONNECTIONS != 0 {
        slot = less_loaded(tables, slot, first.wrapping_add(pick(tables.random(), count)));
    }
    chosen.id = slot & SLOT_ID_MASK;
    // A reused slot leads to a backend of another service: never send a packet there.
    tables.backend(chosen.id, &mut chosen.backend)
        && chosen.backend.service_id == frontend.service_id
        && chosen.backend.takes_flows()
}

/// The one of two slots whose backend has fewer open flows for its weight; the first where they are even.
#[inline(always)]
fn less_loaded<T: Tables>(tables: &T, one: u32, other: u32) -> u32 {
    let Some(other) = tables.slot(other) else { return one };
    // Flows of one times the weight of the other: a division less. 2^24 backends have no 2^32 flows between them that fit a map.
    let load = |slot: u32, against: u32| {
        u64::from(tables.open_flows(slot & SLOT_ID_MASK)) * u64::from(against >> SLOT_ID_BITS)
    };
    if load(other, one) < load(one, other) { other } else { one }
}
