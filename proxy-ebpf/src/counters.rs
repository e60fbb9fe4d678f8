//! Counting, per CPU and without atomics.

use proxy_common::Counter;

use crate::maps::{COUNTERS, Family, SERVICE_STATS};

/// Adds one to a counter.
#[inline(always)]
pub fn count(counter: Counter) {
    count_index(counter as u32);
}

/// Adds one to the counter of this number.
#[inline(always)]
pub fn count_index(counter: u32) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter) {
        // SAFETY: the slot belongs to this CPU and programs of one CPU do not interleave within the increment.
        unsafe { *slot += 1 };
    }
}

/// Adds one packet to a ServicePort; ids beyond the map are not counted, and what is no ServicePort's counts for id 0.
#[inline(always)]
pub fn count_packet(service_id: u32, bytes: u32) {
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service_id) {
        // SAFETY: as in `count_index`.
        unsafe { (*stats).packets += 1 };
        // SAFETY: as in `count_index`.
        unsafe { (*stats).bytes += u64::from(bytes) };
    }
}

/// Adds one connection to a ServicePort and to the backend that it was given to.
#[inline(always)]
pub fn count_connection<F: Family>(service_id: u32, backend_id: u32) {
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service_id) {
        // SAFETY: as in `count_index`.
        unsafe { (*stats).connections += 1 };
    }
    if let Some(connections) = F::backend_stats().get_ptr_mut(backend_id) {
        // SAFETY: as in `count_index`.
        unsafe { *connections += 1 };
    }
}
