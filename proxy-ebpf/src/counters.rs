//! Counting, per CPU and without atomics.

use proxy_common::Counter;

use crate::maps::{COUNTERS, SERVICE_STATS};

/// Adds one to a counter.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot belongs to this CPU and programs of one CPU do not interleave within the increment.
        unsafe { *slot += 1 };
    }
}

/// Adds one new connection to a service; ids beyond the map are not counted.
#[inline(always)]
pub fn count_connection(service_id: u32) {
    if let Some(slot) = SERVICE_STATS.get_ptr_mut(service_id) {
        // SAFETY: as in `count`.
        unsafe { *slot += 1 };
    }
}
