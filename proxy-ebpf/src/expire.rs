//! Ends flows, in the kernel: what is idle for too long or leads to an endpoint that is gone, both entries at once.
//!
//! Programs that hang nowhere: the agent has the kernel run them as often as a map has elements, and each time they look at the next one.
//! No entry is copied to user space but the few numbers of a [`FlowCensus`] at the end. They also count the open flows of backends anew,
//! so that what was lost is found again. BPF iterators would do the same, but a kernel that is locked down may have none.

use proxy_common::flow_table::{AGE_TICKS, FlowStore, WAYS};
use proxy_common::{
    BACKEND_FREE, BackendLoad, FLOW_CLOSED, FLOW_CLOSING, FLOW_CONFIRMED, FLOW_COUNTED, FLOW_FOREIGN, FLOW_REPLY, Flow,
    FlowCensus, FlowKey, FlowLimits, FlowState, SEEN_TICKS,
};

use crate::forward::ticks;
use crate::maps::{FLOW_CENSUS, FLOW_LIMITS, Family};
use crate::parse::TCP;

/// What was found so far, and the number of the next element, which is passed.
#[inline(always)]
fn proceed() -> Option<(&'static mut FlowCensus, u32)> {
    // SAFETY: one of these programs runs at a time, and user space reads the map when none does.
    let census = unsafe { &mut *FLOW_CENSUS.get_ptr_mut(0)? };
    let element = census.next;
    census.next = element.wrapping_add(1);
    Some((census, element))
}

/// Looks at the next bucket of the flows.
#[inline(always)]
pub fn bucket<F: Family>() -> i32 {
    let Some((census, bucket)) = proceed() else { return 0 };
    let Some(head) = F::flow_heads().get_ptr(bucket) else { return 0 };
    // SAFETY: an element of an array; what is changed meanwhile is looked at again the next time.
    let tags = unsafe { (*head).tags };
    if tags == 0 {
        return 0;
    }
    let Some(limits) = FLOW_LIMITS.get(0) else { return 0 };
    for way in 0..WAYS {
        if tags >> (way * 8) & 0xff != 0 {
            visit::<F>(bucket * WAYS + way, limits, census);
        }
    }
    0
}

/// Looks at one entry.
#[inline(always)]
fn visit<F: Family>(index: u32, limits: &FlowLimits, census: &mut FlowCensus) {
    let Some(entry) = F::flows().entry(index) else { return };
    // In place, as the stack of this program and of the one that removes a flow is 512 bytes together.
    // SAFETY: an element of an array; any bytes are a value, and one that is being written is looked at again the next time.
    let (Some(key), flow) = (unsafe { ((*entry).key(), &mut (*entry).flow) }) else { return };
    census.entries += 1;
    let now = ticks();
    if flow.last_seen == 0 {
        // Made by user space, which does not know the clock.
        flow.last_seen = now | 1;
    }
    let twin_key = flow.twin_key(key.protocol);
    let mut twin = Flow::default();
    let direct = flow.is_direct();
    let (twin_flags, twin_seen) = match F::flows().read(&twin_key, &mut twin) {
        // What lies there is another flow's.
        _ if direct => (0, flow.last_seen.wrapping_sub(2 * SEEN_TICKS)),
        Some(_) => (twin.flags, twin.last_seen),
        None => (0, flow.last_seen),
    };
    let flags = flow.flags | twin_flags;
    let (idle, twin_idle) = (now.wrapping_sub(flow.last_seen), now.wrapping_sub(twin_seen));
    // A packet of another CPU may have come after `now` was read.
    let idle = signed(idle).min(signed(twin_idle));
    let gone = is_gone::<F>(flow);
    let state = FlowState::of(key.protocol, flags) as usize;
    let Some(limit) = limits.idle_ticks.get(state) else { return };
    if idle > signed(*limit) {
        census.expired += 1;
    } else if gone && ends_with_endpoint::<F>(&key, flow, flags, now, twin_seen, limits) {
        census.orphaned += 1;
    } else {
        if !gone {
            count::<F>(flow, flags, census);
        }
        count_port::<F>(&key, flow, census);
        // What is silent for long must not look young when its age begins anew.
        let age = if idle > AGE_MAX { AGE_MAX } else { idle };
        F::flows().touch(index, flow.flags, now.wrapping_sub(age as u32));
        return;
    }
    // That one of them is gone already is as good.
    let _gone = !direct && F::flows().remove(&twin_key);
    let _gone = F::flows().remove(&key);
}

/// Ticks that an age in a bucket's head tells from a young one: half of its range.
const AGE_MAX: i32 = (AGE_TICKS << 14) as i32;

#[inline(always)]
const fn signed(ticks: u32) -> i32 {
    ticks as i32
}

/// Whether the endpoint of the flow is gone; told at the client's entry. Its backend may be another endpoint's by now.
#[inline(always)]
fn is_gone<F: Family>(flow: &Flow<F::A>) -> bool {
    if flow.flags & (FLOW_REPLY | FLOW_FOREIGN) != 0 {
        return false;
    }
    match F::backends().get(flow.backend_id) {
        Some(backend) => backend.generation != flow.backend_generation || backend.state == BACKEND_FREE,
        None => true,
    }
}

/// Whether a flow ends because its endpoint is gone. What may go on elsewhere ends at once. An established connection may outlive its
/// place among the endpoints: it ends when a packet is not answered. With direct server return nobody here sees whether it is: there it ends
/// with the first pause that its client makes.
#[inline(always)]
fn ends_with_endpoint<F: Family>(
    key: &FlowKey<F::A>,
    flow: &Flow<F::A>,
    flags: u8,
    now: u32,
    answered_at: u32,
    limits: &FlowLimits,
) -> bool {
    let established = key.protocol == TCP && flags & FLOW_CONFIRMED != 0 && flags & FLOW_CLOSING == 0;
    let waits = signed(flow.last_seen.wrapping_sub(answered_at)) > signed(SEEN_TICKS);
    let unanswered = waits && signed(now.wrapping_sub(flow.last_seen)) > signed(limits.unanswered_ticks);
    !established || unanswered
}

/// Counts an open flow for its backend.
#[inline(always)]
fn count<F: Family>(flow: &Flow<F::A>, flags: u8, census: &mut FlowCensus) {
    if flow.flags & FLOW_COUNTED == 0 || flags & FLOW_CLOSED != 0 {
        return;
    }
    if let Some(load) = F::loads().get_ptr_mut(flow.backend_id) {
        // SAFETY: only these programs have this part of the value, and one runs at a time.
        unsafe { (*load).counted += 1 };
        census.counted += 1;
    }
}

/// Counts a source port of the node's that an answer's entry holds.
#[inline(always)]
fn count_port<F: Family>(key: &FlowKey<F::A>, flow: &Flow<F::A>, census: &mut FlowCensus) {
    let is_ours = flow.flags & FLOW_REPLY != 0 && key.destination != flow.destination;
    if !is_ours || F::settings().is_none_or(|settings| settings.masquerade != key.destination) {
        return;
    }
    census.masqueraded += 1;
    if let Some(load) = F::loads().get_ptr_mut(flow.backend_id) {
        // SAFETY: as in `count`.
        unsafe { (*load).masqueraded += 1 };
    }
}

/// Makes what was counted for the next backend its open flows, and says in the end what the fullest has. What was opened or closed since it
/// was counted is missing until the next time.
#[inline(always)]
pub fn recount<F: Family>() -> i32 {
    let Some((census, backend)) = proceed() else { return 0 };
    let Some(load) = F::loads().get_ptr_mut(backend) else { return 0 };
    // SAFETY: an element of an array, of which others write `open` only.
    let load = unsafe { &mut *load };
    if load.masqueraded > census.masqueraded_max {
        census.masqueraded_max = load.masqueraded;
    }
    *load = BackendLoad { open: load.counted, counted: 0, masqueraded: 0 };
    0
}
