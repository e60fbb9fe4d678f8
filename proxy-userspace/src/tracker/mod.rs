//! Joins Services and their EndpointSlices and remembers which Services have to be decided again.
//!
//! It holds the latest state of every object, not a queue of events: however many events arrive between two syncs, its
//! size is that of the cluster. Every change marks its Service; [`Tracker::checkout`] decides the marked ones.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use tracing::warn;

use crate::model::{Desired, NodePolicy, ServiceKey, ServiceObject, SliceObject, decide, health_checks};

#[cfg(test)]
mod tests;

/// Which of the two lists an event belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListKind {
    /// Services.
    Services,
    /// EndpointSlices.
    Slices,
}

/// Something that the API server told us.
#[derive(Debug, Clone)]
pub enum ObjectEvent {
    /// A list begins: objects that it does not name have been deleted meanwhile.
    ListStarted(ListKind),
    /// A list is complete.
    ListDone(ListKind),
    /// A Service is there or has changed.
    ServiceApplied(ServiceObject),
    /// A Service is gone, or is none of ours any more.
    ServiceDeleted(ServiceKey),
    /// An EndpointSlice is there or has changed.
    SliceApplied(SliceObject),
    /// An EndpointSlice is gone, or is none of ours any more.
    SliceDeleted {
        /// Its namespace.
        namespace: Arc<str>,
        /// Its name.
        name: Arc<str>,
    },
}

/// One object and the list in which it was last seen.
#[derive(Debug)]
struct Seen<T> {
    object: T,
    round: u64,
}

/// A Service name with whatever is known under it; it exists while anything is. Small, because a hash table has room to spare.
#[derive(Debug, Default)]
struct Entry {
    service: Option<Box<Seen<ServiceObject>>>,
    slices: Slices,
}

/// The slices of one Service by name: kube-proxy's order of precedence is undefined, ours is this. Nearly always one or two.
#[derive(Debug, Default)]
struct Slices(Vec<Seen<SliceObject>>);

impl Slices {
    fn get(&self, name: &str) -> Option<&SliceObject> {
        let index = self.position(name).ok()?;
        self.0.get(index).map(|seen| &seen.object)
    }

    fn put(&mut self, seen: Seen<SliceObject>) {
        match self.position(&seen.object.name) {
            Ok(index) => self.0.splice(index..=index, [seen]).for_each(drop),
            Err(index) => {
                self.0.reserve_exact(1);
                self.0.insert(index, seen);
            }
        }
    }

    fn take(&mut self, name: &str) -> Option<SliceObject> {
        let index = self.position(name).ok()?;
        Some(self.0.remove(index).object)
    }

    fn position(&self, name: &str) -> Result<usize, usize> {
        self.0.binary_search_by(|seen| (*seen.object.name).cmp(name))
    }
}

/// Progress of one of the two lists.
#[derive(Debug, Default)]
struct ListState {
    round: u64,
    listing: bool,
    complete: bool,
}

/// The joined objects of the cluster.
#[derive(Debug, Default)]
pub struct Tracker {
    entries: HashMap<ServiceKey, Entry>,
    /// (namespace, slice name) to its Service: a deletion does not say which it was.
    slice_owners: HashMap<(Arc<str>, Arc<str>), ServiceKey>,
    dirty: BTreeSet<ServiceKey>,
    services: ListState,
    slices: ListState,
    policy: NodePolicy,
    rejected_endpoints: u64,
}

impl Tracker {
    /// Takes in one event. Returns whether anything has to be decided again because of it.
    pub fn handle(&mut self, event: ObjectEvent) -> bool {
        match event {
            ObjectEvent::ListStarted(kind) => self.start_list(kind),
            ObjectEvent::ListDone(kind) => self.finish_list(kind),
            ObjectEvent::ServiceApplied(service) => self.apply_service(service),
            ObjectEvent::ServiceDeleted(key) => self.delete_service(&key),
            ObjectEvent::SliceApplied(slice) => self.apply_slice(slice),
            ObjectEvent::SliceDeleted { namespace, name } => self.delete_slice(&namespace, &name),
        }
    }

    /// Whether both lists have been complete once. Before that nothing may be programmed.
    pub fn is_complete(&self) -> bool {
        self.services.complete && self.slices.complete
    }

    /// Services that wait to be decided.
    pub fn pending(&self) -> usize {
        self.dirty.len()
    }

    /// Endpoints left out because of their address, in all slices held now.
    pub fn rejected_endpoints(&self) -> u64 {
        self.rejected_endpoints
    }

    /// Sets what decisions depend on besides the objects. A difference marks every Service.
    pub fn set_policy(&mut self, policy: NodePolicy) {
        if self.policy != policy {
            self.policy = policy;
            let with_service = self.entries.iter().filter(|(_, entry)| entry.service.is_some());
            self.dirty.extend(with_service.map(|(key, _)| key.clone()));
        }
    }

    /// Decides every marked Service into `desired`.
    pub fn checkout(&mut self, desired: &mut Desired) {
        while let Some(key) = self.dirty.pop_first() {
            let entry = self.entries.get(&key);
            let decided = entry.and_then(|entry| {
                let service = &entry.service.as_ref()?.object;
                let slices: Vec<_> = entry.slices.0.iter().map(|seen| &seen.object).collect();
                Some((decide(service, &slices, &self.policy), health_checks(service, &slices)))
            });
            let (ports, checks) = decided.unwrap_or_default();
            desired.set_health_checks(&key, &checks);
            self.dirty.extend(desired.replace(&key, ports));
        }
    }

    fn list(&mut self, kind: ListKind) -> &mut ListState {
        match kind {
            ListKind::Services => &mut self.services,
            ListKind::Slices => &mut self.slices,
        }
    }

    fn start_list(&mut self, kind: ListKind) -> bool {
        let list = self.list(kind);
        list.round += 1;
        list.listing = true;
        false
    }

    /// What the list did not name is deleted. A list that was broken off never gets here, and deletes nothing.
    fn finish_list(&mut self, kind: ListKind) -> bool {
        let list = self.list(kind);
        if !std::mem::take(&mut list.listing) {
            return false;
        }
        list.complete = true;
        let round = list.round;
        let before = self.dirty.len();
        match kind {
            ListKind::Services => self.drop_unseen_services(round),
            ListKind::Slices => self.drop_unseen_slices(round),
        }
        self.dirty.len() != before
    }

    fn drop_unseen_services(&mut self, round: u64) {
        let unseen = |entry: &Entry| entry.service.as_ref().is_some_and(|seen| seen.round != round);
        let gone: Vec<_> = self.entries.iter().filter(|(_, e)| unseen(e)).map(|(key, _)| key.clone()).collect();
        for key in gone {
            self.delete_service(&key);
        }
    }

    fn drop_unseen_slices(&mut self, round: u64) {
        let unseen = self.entries.values().flat_map(|entry| &entry.slices.0).filter(|seen| seen.round != round);
        let id = |slice: &SliceObject| (Arc::clone(&slice.service.namespace), Arc::clone(&slice.name));
        let gone: Vec<_> = unseen.map(|seen| id(&seen.object)).collect();
        for (namespace, name) in gone {
            self.delete_slice(&namespace, &name);
        }
    }

    fn apply_service(&mut self, object: ServiceObject) -> bool {
        let round = self.services.round;
        let entry = self.entries.entry(object.key.clone()).or_default();
        let changed = entry.service.as_ref().is_none_or(|seen| seen.object != object);
        if changed {
            self.dirty.insert(object.key.clone());
        }
        entry.service = Some(Box::new(Seen { object, round }));
        changed
    }

    fn delete_service(&mut self, key: &ServiceKey) -> bool {
        let Some(entry) = self.entries.get_mut(key) else { return false };
        let existed = entry.service.take().is_some();
        if entry.slices.0.is_empty() {
            self.entries.remove(key);
        }
        if existed {
            self.dirty.insert(key.clone());
        }
        existed
    }

    fn apply_slice(&mut self, object: SliceObject) -> bool {
        let id = (Arc::clone(&object.service.namespace), Arc::clone(&object.name));
        let mut changed = false;
        // A slice whose label now names another Service has left the one it was with.
        if self.slice_owners.get(&id).is_some_and(|owner| *owner != object.service) {
            changed = self.delete_slice(&id.0, &id.1);
        }
        let round = self.slices.round;
        let (key, rejected) = (object.service.clone(), u64::from(object.rejected));
        let entry = self.entries.entry(key.clone()).or_default();
        let old = entry.slices.get(&object.name);
        let old_rejected = old.map_or(0, |slice| u64::from(slice.rejected));
        if rejected > 0 && old_rejected == 0 {
            let (slice, count) = (&object.name, rejected);
            warn!(service = %key, %slice, count, "ignoring endpoints whose address may never be a target");
        }
        self.rejected_endpoints = self.rejected_endpoints.saturating_sub(old_rejected) + rejected;
        let different = old.is_none_or(|slice| *slice != object);
        entry.slices.put(Seen { object, round });
        // Without its Service a slice decides nothing yet.
        if different && entry.service.is_some() {
            self.dirty.insert(key.clone());
            changed = true;
        }
        self.slice_owners.entry(id).or_insert(key);
        changed
    }

    fn delete_slice(&mut self, namespace: &Arc<str>, name: &Arc<str>) -> bool {
        let Some(key) = self.slice_owners.remove(&(Arc::clone(namespace), Arc::clone(name))) else { return false };
        let Some(entry) = self.entries.get_mut(&key) else { return false };
        if let Some(slice) = entry.slices.take(name) {
            self.rejected_endpoints = self.rejected_endpoints.saturating_sub(u64::from(slice.rejected));
        }
        let has_service = entry.service.is_some();
        if has_service {
            self.dirty.insert(key);
        } else if entry.slices.0.is_empty() {
            self.entries.remove(&key);
        }
        has_service
    }
}
