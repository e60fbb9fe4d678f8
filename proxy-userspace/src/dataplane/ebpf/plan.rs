//! What has to be written when a ServicePort changes: pure, one family at a time.
//!
//! A plan is executed in the order of [`Writes`]' fields: backends and slots that nothing refers to yet, then the
//! frontends that flip to them, then what nothing refers to any more. No packet sees half of a change.

mod adopt;
pub(super) mod filled;
mod held;
mod ranges;
mod slots;
mod tunnels;
mod writes;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use proxy_common::{
    BACKEND_ACTIVE, BACKEND_DRAINING, BACKEND_FREE, BACKEND_LOCAL_ONLY, Backend, Be16, FRONTEND_SOURCE_RANGES,
    Frontend, FrontendKey, SourceRange,
};

pub(super) use self::adopt::Found;
use self::slots::{Target, algorithm_flags, slots};
use self::tunnels::endpoint_keys;
pub(super) use self::writes::Writes;
use super::alloc::RangeAllocator;
use super::encode::{UserAddress, frontend_key, rules};
use crate::model::{Algorithm, Endpoint, FrontendKind, ServicePort, ServicePortName};

/// Room in the maps of one family.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Entries of `frontends`.
    pub(super) frontends: u32,
    /// Entries of `slots`.
    pub(super) slots: u32,
    /// Entries of `backends`.
    pub(super) backends: u32,
    /// Entries of `source_ranges`.
    pub(super) source_ranges: u32,
    /// Entries of `endpoints`.
    pub(super) endpoints: u32,
}

/// Prefix length and key of an entry of `source_ranges`.
pub(super) type Range<A> = (u32, SourceRange<A>);

/// The kernel has no room for a ServicePort; nothing of the change was planned.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no room left in map {map}")]
pub(super) struct Full {
    /// Which map.
    pub(super) map: &'static str,
}

/// What a change came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Planned {
    /// Everything was so already.
    Nothing,
    /// It is planned.
    Whole,
    /// It is planned, but without a Maglev table, for which there is no room: the choice is random.
    WithoutTable,
}

/// One backend of a ServicePort, small: there may be hundreds of thousands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Placed<A> {
    address: A,
    port: Be16,
    /// As in [`Backend`].
    local: u8,
    /// [`BACKEND_ACTIVE`], [`BACKEND_LOCAL_ONLY`] or [`BACKEND_DRAINING`].
    state: u8,
    id: u32,
}

/// What the kernel holds for one ServicePort.
#[derive(Debug, Clone)]
struct Programmed<A> {
    /// `None` for what an earlier process left.
    desired: Option<Arc<ServicePort>>,
    service_id: u32,
    frontends: Vec<(FrontendKey<A>, Frontend)>,
    layout: Layout,
    /// Sorted by address and port.
    backends: Vec<Placed<A>>,
    /// Sorted.
    ranges: Vec<Range<A>>,
    /// Where other nodes' tunnels lead: addresses and backend ids, sorted.
    endpoints: Vec<(A, u32)>,
    /// Whether a Maglev table finds the endpoint of any packet of a flow with direct server return.
    direct_table: bool,
}

/// The slot block of a ServicePort: the cluster list, and the local list behind it unless it is its beginning.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Layout {
    first: u32,
    ids: Vec<u32>,
    algorithm: Algorithm,
    cluster_count: u32,
    local_offset: u32,
    local_count: u32,
}

/// The believed state of one family, and the plan of every change to it.
#[derive(Debug)]
pub(super) struct Planner<A> {
    limits: Limits,
    services: BTreeMap<ServicePortName, Box<Programmed<A>>>,
    /// Service id behind every frontend. The model gives a frontend to one ServicePort at a time, but one change may
    /// move it from one to another.
    owners: HashMap<FrontendKey<A>, u32>,
    backend_ids: RangeAllocator,
    slots: RangeAllocator,
    generations: Vec<u32>,
    /// Entries of `source_ranges` in use.
    ranges: usize,
    /// Entries of `endpoints` in use.
    endpoints: usize,
    /// ServicePorts with a [`Programmed::direct_table`].
    direct_tables: usize,
}

impl<A: UserAddress> Planner<A> {
    /// Nothing is programmed.
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            services: BTreeMap::new(),
            owners: HashMap::new(),
            backend_ids: RangeAllocator::new(0, limits.backends),
            slots: RangeAllocator::new(0, limits.slots),
            generations: Vec::new(),
            ranges: 0,
            endpoints: 0,
            direct_tables: 0,
        }
    }

    /// Names of everything that is programmed.
    pub(super) fn names(&self) -> impl Iterator<Item = &ServicePortName> {
        self.services.keys()
    }

    /// Plans the change of one ServicePort to `desired`, or its removal.
    ///
    /// # Errors
    /// When a map is full: what was programmed before stays as it is.
    pub(super) fn change(
        &mut self,
        name: &ServicePortName,
        desired: Option<&Arc<ServicePort>>,
        service_ids: &mut RangeAllocator,
        now_ms: u64,
        writes: &mut Writes<A>,
    ) -> Result<Planned, Full> {
        let Some(desired) = desired else {
            let known = self.withdraw(name, service_ids, now_ms, writes);
            return Ok(if known { Planned::Whole } else { Planned::Nothing });
        };
        if self.services.get(name).is_some_and(|old| old.desired.as_ref() == Some(desired)) {
            return Ok(Planned::Nothing);
        }
        self.update(name, desired, service_ids, now_ms, writes)
    }

    fn update(
        &mut self,
        name: &ServicePortName,
        desired: &Arc<ServicePort>,
        service_ids: &mut RangeAllocator,
        now_ms: u64,
        writes: &mut Writes<A>,
    ) -> Result<Planned, Full> {
        self.check_frontend_room(desired)?;
        self.check_range_room(desired)?;
        self.check_endpoint_room(desired)?;
        let old = self.services.remove(name);
        let service_id = match &old {
            Some(old) => old.service_id,
            None => service_ids.take(1, now_ms).ok_or(Full { map: "service_stats" })?,
        };
        let planned = writes.backends.len();
        match self.place_and_lay_out(desired, old.as_deref(), service_id, now_ms, writes) {
            Ok((backends, layout)) => {
                let known = old.as_ref().map_or(&[][..], |old| &old.ranges);
                let ranges = self.change_ranges(desired, known, service_id, writes);
                let known = old.as_ref().map_or(&[][..], |old| &old.endpoints);
                let endpoints = self.change_endpoints(desired, &backends, known, service_id, writes);
                let direct_table = desired.direct_return && layout.algorithm == Algorithm::Maglev;
                self.direct_tables += usize::from(direct_table);
                self.direct_tables -= usize::from(old.as_ref().is_some_and(|old| old.direct_table));
                let frontends = self.flip(desired, old.as_deref(), service_id, &layout, writes);
                let complete = layout.algorithm == desired.algorithm;
                writes.retired.extend(self.drained(&backends, old.as_deref(), service_id));
                if let Some(old) = &old {
                    self.retire(old.backends.iter().filter(|old| !holds(&backends, old)), now_ms, writes);
                    self.release_block(&old.layout, Some(&layout), now_ms);
                }
                // What is not as desired is tried again with the next full sync.
                let desired = complete.then(|| desired.clone());
                let programmed =
                    Programmed { desired, service_id, frontends, layout, backends, ranges, endpoints, direct_table };
                self.services.insert(name.clone(), Box::new(programmed));
                Ok(if complete { Planned::Whole } else { Planned::WithoutTable })
            }
            Err(full) => {
                let known = |id| old.iter().flat_map(|old| &old.backends).any(|placed| placed.id == id);
                for (id, _) in writes.backends.drain(planned..).filter(|(id, _)| !known(*id)) {
                    self.backend_ids.give_back(id, 1, now_ms);
                }
                match old {
                    Some(old) => drop(self.services.insert(name.clone(), old)),
                    None => service_ids.give_back(service_id, 1, now_ms),
                }
                Err(full)
            }
        }
    }

    fn place_and_lay_out(
        &mut self,
        desired: &ServicePort,
        old: Option<&Programmed<A>>,
        service_id: u32,
        now_ms: u64,
        writes: &mut Writes<A>,
    ) -> Result<(Vec<Placed<A>>, Layout), Full> {
        let known = old.map_or(&[][..], |old| &old.backends);
        let backends = self.place(desired, known, service_id, now_ms, writes)?;
        let old = old.map(|old| &old.layout);
        let laid_out = self.lay_out(layout(desired, &backends, desired.algorithm), old, now_ms, writes);
        let layout = match laid_out {
            Err(_) if desired.algorithm == Algorithm::Maglev => {
                self.lay_out(layout(desired, &backends, Algorithm::Random), old, now_ms, writes)?
            }
            result => result?,
        };
        Ok((backends, layout))
    }

    fn release_block(&mut self, old: &Layout, new: Option<&Layout>, now_ms: u64) {
        if new.is_none_or(|new| new.first != old.first || new.ids != old.ids) {
            self.slots.give_back(old.first, old.ids.len() as u32, now_ms);
        }
    }

    fn check_frontend_room(&self, desired: &ServicePort) -> Result<(), Full> {
        let new = keys::<A>(desired).filter(|key| !self.owners.contains_key(key)).count();
        if self.owners.len() + new > self.limits.frontends as usize { Err(Full { map: "frontends" }) } else { Ok(()) }
    }

    /// Gives every endpoint a backend id, the old one where it has one. Those that had one and take no new flows keep it. Returns the
    /// backends, sorted.
    fn place(
        &mut self,
        desired: &ServicePort,
        known: &[Placed<A>],
        service_id: u32,
        now_ms: u64,
        writes: &mut Writes<A>,
    ) -> Result<Vec<Placed<A>>, Full> {
        let mut backends: Vec<Placed<A>> = Vec::with_capacity(desired.cluster_endpoints.len());
        for (address, port, local, state) in endpoints::<A>(desired) {
            // One that moved to another node, or from it, is another endpoint.
            let known = find(known, address, port).filter(|placed| placed.local == local);
            let id = match known {
                Some(placed) => placed.id,
                None => self.backend_ids.take(1, now_ms).ok_or(Full { map: "backends" })?,
            };
            let placed = Placed { address, port, local, state, id };
            if known != Some(&placed) {
                writes.backends.push((id, self.backend(&placed, service_id)));
            }
            backends.push(placed);
        }
        for address in desired.kept_endpoints.iter().chain(&desired.draining_endpoints) {
            let Some(ip) = A::from_ip(address.ip()) else { continue };
            if let Some(placed) = find(known, ip, Be16::from_host(address.port())) {
                backends.push(Placed { state: BACKEND_DRAINING, ..*placed });
            }
        }
        backends.sort_unstable_by_key(|placed| (placed.address, placed.port.to_host()));
        // An endpoint is in one of the lists; were it in two, it would have one id all the same.
        backends.dedup_by_key(|placed| (placed.address, placed.port.to_host()));
        Ok(backends)
    }

    /// The backends that begin to drain: once no frontend leads to them.
    fn drained(&self, backends: &[Placed<A>], old: Option<&Programmed<A>>, service_id: u32) -> Vec<(u32, Backend<A>)> {
        let draining = backends.iter().filter(|placed| placed.state == BACKEND_DRAINING);
        let new = draining.filter(|placed| !old.is_some_and(|old| old.backends.contains(placed)));
        new.map(|placed| (placed.id, self.backend(placed, service_id))).collect()
    }

    /// The value of a backend.
    fn backend(&self, placed: &Placed<A>, service_id: u32) -> Backend<A> {
        Backend {
            address: placed.address,
            port: placed.port,
            state: placed.state,
            local: placed.local,
            service_id,
            generation: self.generation(placed.id),
        }
    }

    fn generation(&self, id: u32) -> u32 {
        self.generations.get(id as usize).copied().unwrap_or(0)
    }

    /// Keeps the old block when the list is the same, else fills a fresh one.
    fn lay_out(
        &mut self,
        mut layout: Layout,
        old: Option<&Layout>,
        now_ms: u64,
        writes: &mut Writes<A>,
    ) -> Result<Layout, Full> {
        if let Some(old) = old.filter(|old| !old.ids.is_empty() && old.ids == layout.ids) {
            layout.first = old.first;
            return Ok(layout);
        }
        let length = u32::try_from(layout.ids.len()).unwrap_or(u32::MAX);
        layout.first = self.slots.take(length, now_ms).ok_or(Full { map: filled::SLOTS })?;
        writes.slots.extend((layout.first..).zip(layout.ids.iter().copied()));
        Ok(layout)
    }

    /// Plans the frontends: new and changed ones are written, those that went are released.
    fn flip(
        &mut self,
        desired: &ServicePort,
        old: Option<&Programmed<A>>,
        service_id: u32,
        layout: &Layout,
        writes: &mut Writes<A>,
    ) -> Vec<(FrontendKey<A>, Frontend)> {
        let mut frontends = Vec::with_capacity(desired.frontends.len());
        for frontend in &desired.frontends {
            let Some(key) = frontend_key::<A>(frontend.address, frontend.port, desired.name.protocol) else { continue };
            let mut value = value(desired, rules(&frontend.rules, desired.direct_return), service_id, layout);
            if frontend.kind == FrontendKind::LoadBalancerIp && !desired.load_balancer_source_ranges.is_empty() {
                value.flags |= FRONTEND_SOURCE_RANGES;
            }
            let entry = (key, value);
            frontends.push(entry);
            let moved = self.owners.insert(key, service_id) != Some(service_id);
            if moved || old.is_none_or(|old| !old.frontends.contains(&entry)) {
                writes.frontends.push(entry);
            }
        }
        for (key, _) in old.iter().flat_map(|old| &old.frontends) {
            if !frontends.iter().any(|(kept, _)| kept == key) {
                self.release(service_id, key, writes);
            }
        }
        frontends
    }

    /// Gives a frontend up, unless another ServicePort has it by now.
    fn release(&mut self, service_id: u32, key: &FrontendKey<A>, writes: &mut Writes<A>) {
        if self.owners.get(key) == Some(&service_id) {
            self.owners.remove(key);
            writes.deleted.push(*key);
        }
    }

    fn withdraw(
        &mut self,
        name: &ServicePortName,
        service_ids: &mut RangeAllocator,
        now_ms: u64,
        writes: &mut Writes<A>,
    ) -> bool {
        let Some(old) = self.services.remove(name) else { return false };
        for (key, _) in &old.frontends {
            self.release(old.service_id, key, writes);
        }
        self.ranges = self.ranges.saturating_sub(old.ranges.len());
        writes.ranges_gone.extend(old.ranges);
        self.endpoints = self.endpoints.saturating_sub(old.endpoints.len());
        self.direct_tables -= usize::from(old.direct_table);
        writes.endpoints_gone.extend(endpoint_keys(&old.endpoints, old.service_id));
        self.retire(old.backends.iter(), now_ms, writes);
        self.release_block(&old.layout, None, now_ms);
        service_ids.give_back(old.service_id, 1, now_ms);
        true
    }

    fn retire<'b>(&mut self, gone: impl Iterator<Item = &'b Placed<A>>, now_ms: u64, writes: &mut Writes<A>)
    where
        A: 'b,
    {
        for placed in gone {
            writes.retired.push((placed.id, self.next_generation(placed.id)));
            self.backend_ids.give_back(placed.id, 1, now_ms);
        }
    }

    /// A free backend of the next generation: every flow that knows the id finds out.
    fn next_generation(&mut self, id: u32) -> Backend<A> {
        let generation = self.generation(id).wrapping_add(1);
        self.set_generation(id, generation);
        Backend { state: BACKEND_FREE, generation, ..Backend::default() }
    }

    fn set_generation(&mut self, id: u32, generation: u32) {
        let index = id as usize;
        if self.generations.len() <= index {
            self.generations.resize(index + 1, 0);
        }
        if let Some(slot) = self.generations.get_mut(index) {
            *slot = generation;
        }
    }
}

/// First slot and length of the block that holds both lists of a frontend.
pub(super) fn block(frontend: &Frontend) -> (u32, u32) {
    let end = |first: u32, count: u32| first.saturating_add(count);
    let cluster = end(frontend.cluster_first, frontend.cluster_count);
    let end = cluster.max(end(frontend.local_first, frontend.local_count));
    (frontend.cluster_first, end.saturating_sub(frontend.cluster_first))
}

fn keys<A: UserAddress>(service: &ServicePort) -> impl Iterator<Item = FrontendKey<A>> {
    let protocol = service.name.protocol;
    service.frontends.iter().filter_map(move |frontend| frontend_key(frontend.address, frontend.port, protocol))
}

/// Every endpoint once, sorted by address and port.
fn endpoints<A: UserAddress>(service: &ServicePort) -> Vec<(A, Be16, u8, u8)> {
    let listed = |list, state| -> Vec<_> {
        let placed = |one: &Endpoint| endpoint(one).map(|(address, port)| (address, port, u8::from(one.local), state));
        <[Endpoint]>::iter(list).filter_map(placed).collect()
    };
    let mut endpoints = listed(&service.cluster_endpoints, BACKEND_ACTIVE);
    endpoints.extend(listed(&service.local_endpoints, BACKEND_LOCAL_ONLY));
    // The active one of two comes first and stays.
    endpoints.sort_unstable_by_key(|(address, port, _, state)| (*address, port.to_host(), *state));
    endpoints.dedup_by_key(|(address, port, ..)| (*address, port.to_host()));
    endpoints
}

fn endpoint<A: UserAddress>(endpoint: &Endpoint) -> Option<(A, Be16)> {
    Some((A::from_ip(endpoint.address().ip())?, Be16::from_host(endpoint.address().port())))
}

fn find<A: UserAddress>(backends: &[Placed<A>], address: A, port: Be16) -> Option<&Placed<A>> {
    let key = (address, port.to_host());
    let index = backends.binary_search_by_key(&key, |placed| (placed.address, placed.port.to_host())).ok()?;
    backends.get(index)
}

fn holds<A: UserAddress>(backends: &[Placed<A>], old: &Placed<A>) -> bool {
    find(backends, old.address, old.port).is_some_and(|placed| placed.id == old.id)
}

fn layout<A: UserAddress>(service: &ServicePort, backends: &[Placed<A>], algorithm: Algorithm) -> Layout {
    let block = |list: &[Endpoint]| -> Vec<u32> {
        let targets = list.iter().filter_map(|one| {
            let (address, port) = endpoint(one)?;
            let id = find(backends, address, port)?.id;
            Some(Target { id, address, port, weight: one.weight })
        });
        slots(&targets.collect::<Vec<_>>(), algorithm)
    };
    let (mut cluster, local) = (block(&service.cluster_endpoints), block(&service.local_endpoints));
    let cluster_count = cluster.len() as u32;
    let local_count = local.len() as u32;
    let local_offset = if cluster.starts_with(&local) { 0 } else { cluster_count };
    if local_offset > 0 || cluster_count == 0 {
        cluster.extend(local);
    }
    Layout { first: 0, ids: cluster, algorithm, cluster_count, local_offset, local_count }
}

fn value(service: &ServicePort, rules: u32, service_id: u32, layout: &Layout) -> Frontend {
    Frontend {
        service_id,
        cluster_first: layout.first,
        cluster_count: layout.cluster_count,
        local_first: layout.first + layout.local_offset,
        local_count: layout.local_count,
        rules,
        affinity_seconds: service.affinity_seconds.unwrap_or(0),
        flags: algorithm_flags(layout.algorithm),
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod decided;
