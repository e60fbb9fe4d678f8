//! What the kernel is to hold, kept up to date by the size of the change. Knows no kernel.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;

use node_sys::ipvs::{Command, Scheduler, ServiceId};
use node_sys::nftables::Contents;

use super::compile::{self, Compiled, Key, Value};
use super::layout::SetName;
use super::marks::{Marks, Owner};
use crate::dataplane::elements::Words;
use crate::model::{IpFamily, Protocol, ServiceDelta, ServicePortName, ServiceSnapshot};

/// What a virtual service is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Virtual {
    pub(super) endpoints: BTreeSet<SocketAddr>,
    /// Those whose connections go on in any case, though they get no new ones.
    pub(super) kept: BTreeSet<SocketAddr>,
    /// Whether connections to an endpoint that goes are left to end by themselves.
    pub(super) graceful: bool,
}

/// An element that several ServicePorts may need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shared {
    value: Value,
    users: u32,
}

/// What has to be looked at after a change: value before it, by key; virtual services.
#[derive(Debug, Default)]
pub(super) struct Touched {
    pub(super) elements: BTreeMap<Key, Option<Value>>,
    pub(super) services: BTreeSet<ServiceId>,
}

/// Elements to be taken out and put in; an element that changes is in both.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Elements {
    pub(super) delete: Vec<Key>,
    pub(super) add: Vec<(Key, Value)>,
}

/// The desired state.
#[derive(Debug, Default)]
pub(super) struct Planner {
    marks: Marks,
    compiled: HashMap<ServicePortName, Compiled>,
    elements: BTreeMap<Key, Shared>,
    services: BTreeMap<ServiceId, Virtual>,
}

impl Planner {
    /// Decides everything again. Marks stay with their owners.
    pub(super) fn rebuild(&mut self, desired: &ServiceSnapshot) {
        let marks = std::mem::take(&mut self.marks);
        let gone =
            self.compiled.keys().filter(|name| !desired.services.contains_key(*name)).cloned().collect::<Vec<_>>();
        let before = std::mem::replace(self, Self { marks, ..Self::default() });
        for owner in gone.iter().filter_map(|name| before.compiled.get(name)).flat_map(|compiled| &compiled.owners) {
            self.marks.release(owner);
        }
        let mut touched = Touched::default();
        for name in desired.services.keys() {
            self.add_service(desired, name, &mut touched);
        }
        for (key, value) in compile::node(&desired.node, desired.cluster_ips.keys().copied()) {
            self.add_element(key, value, &mut touched);
        }
    }

    /// Decides what the delta names. The node's facts have to be the same.
    pub(super) fn change(&mut self, desired: &ServiceSnapshot, delta: &ServiceDelta) -> Touched {
        let mut touched = Touched::default();
        // All that goes first: a frontend may pass from one ServicePort to another.
        let removed: Vec<Compiled> = delta.changed.iter().filter_map(|name| self.compiled.remove(name)).collect();
        for compiled in &removed {
            self.remove_service(compiled, &mut touched);
        }
        for name in &delta.changed {
            self.add_service(desired, name, &mut touched);
        }
        for owner in removed.iter().flat_map(|compiled| &compiled.owners) {
            if !self.is_owner(owner) {
                self.marks.release(owner);
            }
        }
        for address in &delta.cluster_ips {
            let key = compile::address_key(SetName::ClusterIps, *address);
            let (is, was) = (desired.cluster_ips.contains_key(address), self.elements.contains_key(&key));
            match (was, is) {
                (false, true) => self.add_element(key, Value::Member, &mut touched),
                (true, false) => self.remove_element(&key, &mut touched),
                _ => (),
            }
        }
        touched
    }

    fn is_owner(&self, owner: &Owner) -> bool {
        let (Owner::Set(name, _) | Owner::Endpoint(name, _)) = owner;
        self.compiled.get(name).is_some_and(|compiled| compiled.owners.contains(owner))
    }

    fn add_service(&mut self, desired: &ServiceSnapshot, name: &ServicePortName, touched: &mut Touched) {
        let Some(service) = desired.services.get(name) else { return };
        let compiled = compile::service_port(service, &mut self.marks);
        let graceful = name.protocol != Protocol::Udp;
        for (id, endpoints) in &compiled.services {
            touched.services.insert(*id);
            let kept = compiled.kept.clone();
            self.services.insert(*id, Virtual { endpoints: endpoints.clone(), kept, graceful });
        }
        for (key, value) in &compiled.elements {
            self.add_element(key.clone(), *value, touched);
        }
        self.compiled.insert(name.clone(), compiled);
    }

    fn remove_service(&mut self, compiled: &Compiled, touched: &mut Touched) {
        for id in compiled.services.keys() {
            touched.services.insert(*id);
            self.services.remove(id);
        }
        for key in compiled.elements.keys() {
            self.remove_element(key, touched);
        }
    }

    fn add_element(&mut self, key: Key, value: Value, touched: &mut Touched) {
        let before = self.elements.get(&key).map(|shared| shared.value);
        touched.elements.entry(key.clone()).or_insert(before);
        let shared = self.elements.entry(key).or_insert(Shared { value, users: 0 });
        shared.users += 1;
        shared.value = value;
    }

    fn remove_element(&mut self, key: &Key, touched: &mut Touched) {
        let Some(shared) = self.elements.get_mut(key) else { return };
        touched.elements.entry(key.clone()).or_insert(Some(shared.value));
        shared.users = shared.users.saturating_sub(1);
        if shared.users == 0 {
            self.elements.remove(key);
        }
    }

    /// What leads from the elements that were there to those that are wanted, of those that were touched.
    pub(super) fn elements_since(&self, before: impl IntoIterator<Item = (Key, Option<Value>)>) -> Elements {
        let mut out = Elements::default();
        for (key, was) in before {
            let is = self.elements.get(&key).map(|shared| shared.value);
            if was == is {
                continue;
            }
            if was.is_some() {
                out.delete.push(key.clone());
            }
            if let Some(value) = is {
                out.add.push((key, value));
            }
        }
        out
    }

    /// The elements that a full comparison with the `kernel` has to look at, in one family: those that are there, and all that are wanted.
    pub(super) fn everything(&self, family: IpFamily, kernel: BTreeMap<Key, Value>) -> BTreeMap<Key, Option<Value>> {
        let wanted = self.elements.keys().filter(|key| key.family == family);
        let mut all: BTreeMap<Key, Option<Value>> = wanted.map(|key| (key.clone(), None)).collect();
        all.extend(kernel.into_iter().map(|(key, value)| (key, Some(value))));
        all
    }

    /// What each set of a family is to hold.
    pub(super) fn contents(&self, family: IpFamily) -> BTreeMap<SetName, Contents> {
        let mut contents: BTreeMap<SetName, Contents> = BTreeMap::new();
        for (key, shared) in self.elements.iter().filter(|(key, _)| key.family == family) {
            let of_set = contents.entry(key.set).or_default();
            match shared.value {
                Value::Mark(mark) => of_set.add(key.first.bytes(), &mark.to_ne_bytes()),
                Value::Member => of_set.add(key.first.bytes(), key.last.as_ref().map_or(&[], Words::bytes)),
                Value::Sticky(_) => of_set.add(key.first.bytes(), &[]),
            }
        }
        contents
    }

    /// The virtual service that is wanted.
    pub(super) fn service(&self, id: ServiceId) -> Option<&Virtual> {
        self.services.get(&id)
    }

    /// Whose virtual services these are. Looks at everything: for the rare case that one is refused.
    pub(super) fn names_of(&self, ids: &[ServiceId]) -> Vec<ServicePortName> {
        let has = |compiled: &Compiled| ids.iter().any(|id| compiled.services.contains_key(id));
        let mut names: Vec<_> =
            self.compiled.iter().filter(|(_, compiled)| has(compiled)).map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    /// All virtual services.
    pub(super) fn service_ids(&self) -> impl Iterator<Item = ServiceId> {
        self.services.keys().copied()
    }

    /// Timeouts for which there has to be a chain before `elements` are added.
    pub(super) fn sticky_seconds(family: IpFamily, elements: &Elements) -> BTreeSet<u32> {
        let seconds = |(key, value): &(Key, Value)| match value {
            Value::Sticky(seconds) if key.family == family => Some(*seconds),
            _ => None,
        };
        elements.add.iter().filter_map(seconds).collect()
    }
}

/// What IPVS holds of one virtual service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) scheduler: String,
    /// Weights of its servers.
    pub(super) servers: BTreeMap<SocketAddr, u32>,
    /// Whether its connections don't matter: it is UDP's. Not known of what another process made.
    pub(super) abrupt: bool,
}

/// Commands before packets are led to a virtual service, and those after none are led away from it any more.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Commands {
    pub(super) before: Vec<Command>,
    pub(super) after: Vec<Command>,
}

impl Commands {
    /// Adds what makes `held` what is `wanted`. A server that goes gets no new connections; it is deleted at once where
    /// connections don't matter, else when it has none any more. A service without servers goes.
    pub(super) fn lead(&mut self, id: ServiceId, held: Option<&Held>, wanted: Option<&Virtual>, scheduler: Scheduler) {
        let none = Held::default();
        let (servers, empty) = (&held.unwrap_or(&none).servers, BTreeSet::new());
        match (held, wanted) {
            (None, Some(_)) => self.before.push(Command::AddService(id, scheduler)),
            (Some(held), Some(_)) if held.scheduler != scheduler.name() => {
                self.before.push(Command::SetScheduler(id, scheduler));
            }
            _ => (),
        }
        let endpoints = wanted.map_or(&empty, |wanted| &wanted.endpoints);
        for address in endpoints {
            match servers.get(address) {
                None => self.before.push(Command::AddServer(id, *address, 1)),
                Some(0) => self.before.push(Command::SetWeight(id, *address, 1)),
                Some(_) => (),
            }
        }
        let abrupt = wanted.map_or(held.is_some_and(|held| held.abrupt), |wanted| !wanted.graceful);
        for (address, weight) in servers.iter().filter(|(address, _)| !endpoints.contains(*address)) {
            let kept = wanted.is_some_and(|wanted| wanted.kept.contains(address));
            match (abrupt && !kept, *weight) {
                (true, _) => self.after.push(Command::DeleteServer(id, *address)),
                (false, 0) => (),
                (false, _) => self.after.push(Command::SetWeight(id, *address, 0)),
            }
        }
        if held.is_some() && wanted.is_none() && (abrupt || servers.is_empty()) {
            self.after.push(Command::DeleteService(id));
        }
    }
}

/// Notes what a command that was done has changed.
pub(super) fn note(held: &mut BTreeMap<ServiceId, Held>, command: Command) {
    match command {
        Command::AddService(id, scheduler) | Command::SetScheduler(id, scheduler) => {
            held.entry(id).or_default().scheduler = scheduler.name().to_owned();
        }
        Command::DeleteService(id) => {
            held.remove(&id);
        }
        // Ours are known by marks.
        Command::DeleteServiceAt(_) => {}
        Command::AddServer(id, address, weight) | Command::SetWeight(id, address, weight) => {
            held.entry(id).or_default().servers.insert(address, weight);
        }
        Command::DeleteServer(id, address) => {
            if let Some(held) = held.get_mut(&id) {
                held.servers.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests;
