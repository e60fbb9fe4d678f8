//! Which clients' networks a ServicePort lets in.

use super::{Full, Planner, Range, UserAddress, Writes};
use crate::dataplane::ebpf::encode::source_range;
use crate::model::ServicePort;

impl<A: UserAddress> Planner<A> {
    /// Those of the ServicePort itself, if any, will be gone; they count all the same while both are there.
    pub(super) fn check_range_room(&self, desired: &ServicePort) -> Result<(), Full> {
        let new = desired.load_balancer_source_ranges.len();
        let fits = self.ranges + new <= self.limits.source_ranges as usize;
        if fits { Ok(()) } else { Err(Full { map: "source_ranges" }) }
    }

    /// Plans the client networks: new ones are let in before the frontends flip, others are shut out after.
    pub(super) fn change_ranges(
        &mut self,
        desired: &ServicePort,
        known: &[Range<A>],
        service_id: u32,
        writes: &mut Writes<A>,
    ) -> Vec<Range<A>> {
        let networks = desired.load_balancer_source_ranges.iter();
        let mut ranges: Vec<Range<A>> = networks.filter_map(|network| source_range(service_id, network)).collect();
        ranges.sort_unstable();
        ranges.dedup();
        writes.ranges.extend(ranges.iter().filter(|range| known.binary_search(range).is_err()));
        writes.ranges_gone.extend(known.iter().filter(|range| ranges.binary_search(range).is_err()));
        self.ranges = (self.ranges + ranges.len()).saturating_sub(known.len());
        ranges
    }
}
