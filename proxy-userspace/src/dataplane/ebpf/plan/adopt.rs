//! Taking over what an earlier process left in the maps: what still is desired is kept with its ids, the rest goes.

use std::collections::{BTreeMap, HashMap, HashSet};

use proxy_common::{BACKEND_FREE, Backend, Be16, EndpointKey, Frontend, FrontendKey};

use super::{Layout, Placed, Planner, Programmed, Range, UserAddress, Writes, algorithm_flags, block, find, keys};
use crate::dataplane::ebpf::alloc::RangeAllocator;
use crate::model::{Algorithm, ServicePort};

/// What was found in the kernel's maps of one family.
#[derive(Debug)]
pub(in crate::dataplane::ebpf) struct Found<A> {
    /// All frontends.
    pub(in crate::dataplane::ebpf) frontends: Vec<(FrontendKey<A>, Frontend)>,
    /// Backends that are or were used, by id, ascending; the others are zero.
    pub(in crate::dataplane::ebpf) backends: Vec<(u32, Backend<A>)>,
    /// Slot blocks of the frontends, by first slot and length.
    pub(in crate::dataplane::ebpf) blocks: BTreeMap<(u32, u32), Vec<u32>>,
    /// All entries of `source_ranges`.
    pub(in crate::dataplane::ebpf) ranges: Vec<Range<A>>,
    /// All entries of `endpoints`.
    pub(in crate::dataplane::ebpf) endpoints: Vec<(EndpointKey<A>, u32)>,
}

impl<A: UserAddress> Planner<A> {
    /// Takes over what an earlier process left: what belongs to a desired ServicePort is kept as it is, the rest is
    /// planned to go. Called once, on an empty planner.
    pub(in crate::dataplane::ebpf) fn adopt<'d>(
        &mut self,
        found: &Found<A>,
        desired: impl Iterator<Item = &'d ServicePort>,
        service_ids: &mut RangeAllocator,
        now_ms: u64,
        writes: &mut Writes<A>,
    ) {
        for (id, backend) in &found.backends {
            self.set_generation(*id, backend.generation);
        }
        let mut groups = self.groups(found, now_ms);
        let by_key: HashMap<FrontendKey<A>, u32> =
            found.frontends.iter().map(|(key, value)| (*key, value.service_id)).collect();
        for service in desired {
            let id = keys::<A>(service).find_map(|key| by_key.get(&key).filter(|id| groups.contains_key(id)));
            let Some(programmed) = id.and_then(|id| groups.remove(id)) else { continue };
            if service_ids.reserve(programmed.service_id, 1) {
                self.ranges += programmed.ranges.len();
                self.endpoints += programmed.endpoints.len();
                for (key, _) in &programmed.frontends {
                    self.owners.insert(*key, programmed.service_id);
                }
                self.services.insert(service.name.clone(), Box::new(programmed));
            }
        }
        let ids: HashSet<u32> = self.services.values().map(|programmed| programmed.service_id).collect();
        writes.ranges_gone.extend(found.ranges.iter().filter(|(_, range)| !ids.contains(&range.service_id)));
        let gone = found.endpoints.iter().filter(|(key, _)| !ids.contains(&key.service_id));
        writes.endpoints_gone.extend(gone.map(|(key, _)| *key));
        self.discard(groups.into_values(), now_ms, writes);
        self.discard_unreferenced(found, now_ms, writes);
    }

    /// Finds the backend id and generation of an endpoint behind a frontend.
    pub(in crate::dataplane::ebpf) fn backends_behind(
        &self,
    ) -> impl Fn(&FrontendKey<A>, A, Be16) -> Option<(u32, u32)> + '_ {
        let services: HashMap<u32, &Programmed<A>> =
            self.services.values().map(|held| (held.service_id, &**held)).collect();
        move |key, address, port| {
            let id = find(&services.get(self.owners.get(key)?)?.backends, address, port)?.id;
            Some((id, self.generation(id)))
        }
    }

    /// What was found, by service id.
    fn groups(&mut self, found: &Found<A>, now_ms: u64) -> BTreeMap<u32, Programmed<A>> {
        let mut groups: BTreeMap<u32, Programmed<A>> = BTreeMap::new();
        for (key, value) in &found.frontends {
            let group = groups.entry(value.service_id).or_insert_with(|| Programmed {
                desired: None,
                service_id: value.service_id,
                frontends: vec![],
                layout: Layout::default(),
                backends: vec![],
                ranges: vec![],
                endpoints: vec![],
                // Its flag is not believed: it is found again with the first change, which every full sync makes.
                direct_table: false,
            });
            group.frontends.push((*key, *value));
        }
        for group in groups.values_mut() {
            self.adopt_block(found, group, now_ms);
        }
        for (id, backend) in found.backends.iter().filter(|(_, backend)| backend.state != BACKEND_FREE) {
            if let Some(group) = groups.get_mut(&backend.service_id)
                && self.backend_ids.reserve(*id, 1)
            {
                let &Backend { address, port, local, state, .. } = backend;
                group.backends.push(Placed { address, port, local, state, id: *id });
            }
        }
        for range in &found.ranges {
            if let Some(group) = groups.get_mut(&range.1.service_id) {
                group.ranges.push(*range);
            }
        }
        for (key, id) in &found.endpoints {
            if let Some(group) = groups.get_mut(&key.service_id) {
                group.endpoints.push((key.address, *id));
            }
        }
        for group in groups.values_mut() {
            group.endpoints.sort_unstable();
            group.ranges.sort_unstable();
            group.backends.sort_unstable_by_key(|placed| (placed.address, placed.port.to_host()));
        }
        groups
    }

    /// Keeps the slot block of a group if all its frontends agree on it. A process that died between two flips leaves
    /// frontends with different blocks: the next change writes a fresh one for all of them, and until then no other
    /// ServicePort is given the slots that packets still read.
    fn adopt_block(&mut self, found: &Found<A>, group: &mut Programmed<A>, now_ms: u64) {
        let Some((_, value)) = group.frontends.first().copied() else { return };
        let lists = |frontend: &Frontend| {
            (frontend.cluster_first, frontend.cluster_count, frontend.local_first, frontend.local_count)
        };
        let consistent = group.frontends.iter().all(|(_, other)| lists(other) == lists(&value));
        let (first, length) = block(&value);
        let ids = found.blocks.get(&(first, length)).filter(|ids| consistent && ids.len() == length as usize);
        match ids.filter(|_| self.slots.reserve(first, length)) {
            Some(ids) => {
                group.layout = Layout {
                    first,
                    ids: ids.clone(),
                    algorithm: algorithm(&value),
                    cluster_count: value.cluster_count,
                    local_offset: value.local_first.saturating_sub(value.cluster_first),
                    local_count: value.local_count,
                };
            }
            None => {
                for (first, length) in group.frontends.iter().map(|(_, value)| block(value)) {
                    if self.slots.reserve(first, length) {
                        self.slots.give_back(first, length, now_ms);
                    }
                }
            }
        }
    }

    /// Plans the removal of what no desired ServicePort claims. Service ids were never reserved.
    fn discard(&mut self, groups: impl Iterator<Item = Programmed<A>>, now_ms: u64, writes: &mut Writes<A>) {
        for group in groups {
            writes.deleted.extend(group.frontends.iter().map(|(key, _)| *key));
            self.retire(group.backends.iter(), now_ms, writes);
            self.release_block(&group.layout, None, now_ms);
        }
    }

    /// Frees backends whose service has no frontend: left by a process that died before the flip.
    fn discard_unreferenced(&mut self, found: &Found<A>, now_ms: u64, writes: &mut Writes<A>) {
        for (id, backend) in &found.backends {
            if backend.state != BACKEND_FREE && self.backend_ids.reserve(*id, 1) {
                let retired = self.next_generation(*id);
                writes.retired.push((*id, retired));
                self.backend_ids.give_back(*id, 1, now_ms);
            }
        }
    }
}

fn algorithm(frontend: &Frontend) -> Algorithm {
    let asked =
        |algorithm: &Algorithm| algorithm_flags(*algorithm) != 0 && frontend.flags & algorithm_flags(*algorithm) != 0;
    Algorithm::ALL.into_iter().find(asked).unwrap_or_default()
}
