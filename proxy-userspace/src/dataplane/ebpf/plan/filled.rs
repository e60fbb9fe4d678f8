//! How full the maps of one family are when every plan so far is written.

use super::{Planner, UserAddress};
use crate::dataplane::ebpf::growth::Filled;

/// Name of the map that Maglev tables lie in too.
pub(in crate::dataplane::ebpf) const SLOTS: &str = "slots";

impl<A: UserAddress> Planner<A> {
    /// Each map that a ServicePort needs room in.
    pub(in crate::dataplane::ebpf) fn filled(&self) -> [Filled; 5] {
        let filled = |map, used, room: u32| Filled { map, used, room: u64::from(room) };
        [
            filled("frontends", self.owners.len() as u64, self.limits.frontends),
            filled(SLOTS, self.slots.taken(), self.limits.slots),
            filled("backends", self.backend_ids.taken(), self.limits.backends),
            filled("source_ranges", self.ranges as u64, self.limits.source_ranges),
            filled("endpoints", self.endpoints as u64, self.limits.endpoints),
        ]
    }
}
