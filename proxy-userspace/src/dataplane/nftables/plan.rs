//! From snapshots to changes of one table: pure, and knows what the table holds because it planned all of it.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use super::changes::{Changes, Elements};
use super::classes::{Class, Classes, Pick};
use super::encode::{frontend, preferred_id, unspecified};
use super::layout::{SetName, chain};
use super::rules::{LOCAL_INDEX, Rules};
use crate::dataplane::elements::Words;
use crate::model::{
    Action, Endpoint, EndpointSet, FrontendKind, IpFamily, NodeConfig, PodTraffic, ServicePort, ServicePortName,
    ServiceSnapshot,
};

/// A ServicePort as the table holds it.
#[derive(Debug)]
struct Programmed {
    id: u32,
    service: Arc<ServicePort>,
    cluster: Slots,
    local: Slots,
}

impl Programmed {
    fn cluster(&self) -> Cow<'_, [SocketAddr]> {
        self.cluster.addresses(&self.service.cluster_endpoints)
    }

    fn local(&self) -> Cow<'_, [SocketAddr]> {
        self.local.addresses(&self.service.local_endpoints)
    }
}

/// The endpoints of a list by index. Nearly all lists are as the model has them, and cost no memory of their own.
#[derive(Debug)]
enum Slots {
    /// No frontend sends anybody there, or there is nobody.
    Empty,
    /// In the model's order.
    AsListed,
    /// In an order that has grown with changes.
    Own(Box<[SocketAddr]>),
}

impl Slots {
    fn new(addresses: Vec<SocketAddr>, listed: &[Endpoint]) -> Self {
        if addresses.is_empty() {
            Self::Empty
        } else if listed.iter().map(Endpoint::address).eq(addresses.iter().copied()) {
            Self::AsListed
        } else {
            Self::Own(addresses.into())
        }
    }

    fn addresses(&self, listed: &[Endpoint]) -> Cow<'_, [SocketAddr]> {
        match self {
            Self::Empty => Cow::Borrowed(&[]),
            Self::AsListed => listed.iter().map(Endpoint::address).collect(),
            Self::Own(addresses) => Cow::Borrowed(addresses),
        }
    }

    fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }
}

/// Plans the table of one family.
#[derive(Debug)]
pub(super) struct Planner {
    family: IpFamily,
    rules: Rules,
    programmed: BTreeMap<ServicePortName, Programmed>,
    ids: HashSet<u32>,
    classes: Classes,
    /// How many lists a local endpoint's address is in.
    hairpin: HashMap<IpAddr, u32>,
    cluster_ips: HashSet<IpAddr>,
    node: Arc<NodeConfig>,
    changes: Changes,
}

impl Planner {
    /// A planner of a table that holds nothing.
    pub(super) fn new(family: IpFamily, rules: Rules) -> Self {
        Self {
            family,
            rules,
            programmed: BTreeMap::new(),
            ids: HashSet::new(),
            classes: Classes::default(),
            hairpin: HashMap::new(),
            cluster_ips: HashSet::new(),
            node: Arc::default(),
            changes: Changes::default(),
        }
    }

    /// Plans everything that the snapshot has of this family. Returns the number of ServicePorts.
    pub(super) fn everything(&mut self, desired: &ServiceSnapshot) -> usize {
        self.change_node(&desired.node);
        self.change_cluster_ips(desired, desired.cluster_ips.keys().copied());
        let family = self.family;
        let ours = desired.services.iter().filter(|(name, _)| name.family == family);
        ours.filter(|(name, service)| self.change(name, Some(service))).count()
    }

    /// Plans one ServicePort; `None` removes it. Returns whether that changes anything.
    pub(super) fn change(&mut self, name: &ServicePortName, desired: Option<&Arc<ServicePort>>) -> bool {
        let before = self.programmed.remove(name);
        let changed = match (&before, desired) {
            (None, None) => false,
            (Some(before), Some(service)) => before.service != *service,
            _ => true,
        };
        if !changed {
            self.programmed.extend(before.map(|before| (name.clone(), before)));
            return false;
        }
        let id = match &before {
            Some(before) => before.id,
            None => self.free_id(name),
        };
        let after = desired.map(|service| Programmed {
            id,
            service: Arc::clone(service),
            cluster: arrange(before.as_ref().map(Programmed::cluster), service, EndpointSet::Cluster),
            local: arrange(before.as_ref().map(Programmed::local), service, EndpointSet::Local),
        });
        self.diff(before.as_ref(), after.as_ref());
        match after {
            Some(after) => {
                self.ids.insert(id);
                self.programmed.insert(name.clone(), after);
            }
            None => {
                self.ids.remove(&id);
            }
        }
        true
    }

    /// Plans the ClusterIPs that came or went.
    pub(super) fn change_cluster_ips(&mut self, desired: &ServiceSnapshot, touched: impl Iterator<Item = IpAddr>) {
        for address in touched.filter(|address| IpFamily::of(*address) == self.family) {
            let (key, none) = (Words::new().address(address), Words::new());
            if !desired.cluster_ips.contains_key(&address) {
                if self.cluster_ips.remove(&address) {
                    self.changes.deleted.push(SetName::ClusterIps, &key, &none);
                }
            } else if self.cluster_ips.insert(address) {
                self.changes.added.push(SetName::ClusterIps, &key, &none);
            }
        }
    }

    /// Plans what the node itself decides: its addresses, who is a pod, where ClusterIPs come from.
    pub(super) fn change_node(&mut self, node: &Arc<NodeConfig>) {
        let before = std::mem::replace(&mut self.node, Arc::clone(node));
        self.change_addresses(SetName::NodeAddresses, &before.node_addresses, &node.node_addresses);
        self.change_addresses(SetName::NodePortAddresses, &before.node_port_addresses, &node.node_port_addresses);
        self.changes.replaced.push((chain::ORIGIN, self.rules.origin(node)));
        self.changes.replaced.push((chain::UNSERVED, self.rules.unserved(node)));
    }

    fn change_addresses(&mut self, set: SetName, before: &BTreeSet<IpAddr>, after: &BTreeSet<IpAddr>) {
        let ours = |address: &&IpAddr| IpFamily::of(**address) == self.family;
        let push = |elements: &mut Elements, address: &IpAddr| {
            elements.push(set, &Words::new().address(*address), &Words::new());
        };
        before.difference(after).filter(ours).for_each(|address| push(&mut self.changes.deleted, address));
        after.difference(before).filter(ours).for_each(|address| push(&mut self.changes.added, address));
    }

    /// Takes what was planned since the last call, with the chains that it leads to.
    pub(super) fn take(&mut self) -> Changes {
        let mut changes = std::mem::take(&mut self.changes);
        for (class, number) in self.classes.take_fresh() {
            let name = match &class {
                Class::Pick(pick) => pick.to_string(),
                Class::Reject | Class::Drop => String::new(),
            };
            changes.classes.push((number, Rules::verdict(&class, name.clone())));
            if let Class::Pick(pick) = class {
                changes.chains.push((name, self.rules.pick(&pick)));
            }
        }
        changes
    }

    /// Whether a ServicePort has this id.
    pub(super) fn is_id(&self, id: u32) -> bool {
        self.ids.contains(&id)
    }

    /// ServicePorts, and combinations of action and number of endpoints.
    pub(super) fn sizes(&self) -> (usize, usize) {
        (self.programmed.len(), self.classes.len())
    }

    /// The id that the name alone gives, or the next one that is free.
    fn free_id(&self, name: &ServicePortName) -> u32 {
        let mut id = preferred_id(name);
        // Ends: there are fewer ServicePorts than ids.
        while self.ids.contains(&id) {
            id = id.wrapping_add(1);
        }
        id
    }

    /// Plans one of every kind of class, and a rule for each kind of origin and refusal: what the kernel must be able to do.
    pub(super) fn plan_example(&mut self) {
        for affinity_seconds in [None, Some(1)] {
            for (set, node_port) in [(EndpointSet::Cluster, false), (EndpointSet::Local, true)] {
                self.classes.number(Class::Pick(Pick {
                    node_port,
                    set,
                    count: 2,
                    affinity_seconds,
                    masquerade: node_port,
                }));
            }
        }
        self.classes.number(Class::Reject);
        self.classes.number(Class::Drop);
        let everything = IpNet::from(unspecified(self.family));
        let pod_traffic = PodTraffic::Source(vec![everything]);
        self.change_node(&Arc::new(NodeConfig {
            pod_traffic,
            service_cidrs: vec![everything],
            ..NodeConfig::default()
        }));
    }

    /// Plans the way from one state of a ServicePort to another.
    fn diff(&mut self, before: Option<&Programmed>, after: Option<&Programmed>) {
        let old = before.map(|before| elements(self.family, &mut self.classes, before)).unwrap_or_default();
        let new = after.map(|after| elements(self.family, &mut self.classes, after)).unwrap_or_default();
        let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
        loop {
            let order = match (old.peek(), new.peek()) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(was), Some(is)) => was.place().cmp(&is.place()),
            };
            let gone = if order.is_le() { old.next() } else { None };
            let come = if order.is_ge() { new.next() } else { None };
            if gone != come {
                gone.into_iter().for_each(|element| element.push(&mut self.changes.deleted));
                come.into_iter().for_each(|element| element.push(&mut self.changes.added));
            }
        }
        self.diff_hairpin(before, after);
    }

    /// An address stays as long as one list has it. Counted up before down: what is in both states is not touched.
    fn diff_hairpin(&mut self, before: Option<&Programmed>, after: Option<&Programmed>) {
        let element = |address: &IpAddr| Words::new().address(*address).address(*address);
        for address in after.into_iter().flat_map(local_addresses) {
            let count = self.hairpin.entry(address).or_default();
            *count += 1;
            if *count == 1 {
                self.changes.added.push(SetName::Hairpin, &element(&address), &Words::new());
            }
        }
        for address in before.into_iter().flat_map(local_addresses) {
            let count = self.hairpin.entry(address).or_default();
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.hairpin.remove(&address);
                self.changes.deleted.push(SetName::Hairpin, &element(&address), &Words::new());
            }
        }
    }
}

/// Everything that a ServicePort has in sets of its own, in the order of [`Element::place`].
fn elements(family: IpFamily, classes: &mut Classes, programmed: &Programmed) -> Vec<Element> {
    let Programmed { id, service, .. } = programmed;
    let mut elements = frontend_elements(family, classes, *id, service);
    let lists = [
        (programmed.cluster(), 0, SetName::ClusterEndpoints),
        (programmed.local(), LOCAL_INDEX, SetName::LocalEndpoints),
    ];
    for (list, first, set) in &lists {
        for (index, endpoint) in (*first..).zip(list.iter()) {
            let (slot, value) = (Words::new().number(*id).number(index), Words::new().socket(*endpoint));
            elements.push(Element { set: SetName::Slots, key: slot, value });
            if service.affinity_seconds.is_some() {
                let key = Words::new().number(*id).socket(*endpoint);
                elements.push(Element { set: *set, key, value: Words::new() });
            }
        }
    }
    elements.sort_unstable_by(|a, b| a.place().cmp(&b.place()));
    elements
}

fn frontend_elements(family: IpFamily, classes: &mut Classes, id: u32, service: &ServicePort) -> Vec<Element> {
    let mut elements = Vec::with_capacity(2 * service.frontends.len() + service.cluster_endpoints.len());
    let restricted = !service.load_balancer_source_ranges.is_empty();
    for one in &service.frontends {
        let key = frontend(family, one.address, service.name.protocol, one.port);
        let rules = [one.rules.pod, one.rules.node, one.rules.external];
        let numbers = rules.map(|rule| classes.number(Class::of(service, one.address, rule)));
        let value = numbers.into_iter().fold(Words::new().number(id), Words::number);
        elements.push(Element { set: SetName::Frontends, key, value });
        if restricted && one.kind == FrontendKind::LoadBalancerIp {
            elements.push(Element { set: SetName::Restricted, key, value: Words::new().number(id) });
        }
    }
    // The kernel takes no ranges that overlap.
    for net in IpNet::aggregate(&service.load_balancer_source_ranges) {
        let at = |address| Words::new().number(id).address(address);
        let (key, value) = (at(net.network()), at(net.broadcast()));
        elements.push(Element { set: SetName::SourceRanges, key, value });
    }
    elements
}

/// An element of a ServicePort.
#[derive(Debug, PartialEq, Eq)]
struct Element {
    set: SetName,
    key: Words,
    value: Words,
}

impl Element {
    /// No two elements have one place.
    fn place(&self) -> (SetName, &[u8]) {
        (self.set, self.key.bytes())
    }

    fn push(&self, elements: &mut Elements) {
        elements.push(self.set, &self.key, &self.value);
    }
}

/// The list as slots: those that stay keep their index, those that come take the place of those that go. Empty if no frontend
/// sends anybody to it.
fn arrange(before: Option<Cow<'_, [SocketAddr]>>, service: &ServicePort, set: EndpointSet) -> Slots {
    let all = service.frontends.iter().map(|one| one.rules);
    let mut actions = all.flat_map(|rules| [rules.pod.action, rules.node.action, rules.external.action]);
    if !actions.any(|action| action == Action::Forward(set)) {
        return Slots::Empty;
    }
    let wanted: &[Endpoint] = match set {
        EndpointSet::Cluster => &service.cluster_endpoints,
        EndpointSet::Local => &service.local_endpoints,
    };
    let Some(before) = before.filter(|before| !before.is_empty()) else {
        return Slots::new(wanted.iter().map(Endpoint::address).collect(), wanted);
    };
    let stay: HashSet<SocketAddr> = wanted.iter().map(Endpoint::address).collect();
    let had: HashSet<SocketAddr> = before.iter().copied().collect();
    let mut come = wanted.iter().map(Endpoint::address).filter(|address| !had.contains(address));
    let mut slots: Vec<Option<SocketAddr>> =
        before.iter().map(|address| if stay.contains(address) { Some(*address) } else { come.next() }).collect();
    slots.extend(come.map(Some));
    Slots::new(close_gaps(slots), wanted)
}

/// Moves elements from the end into gaps.
fn close_gaps(mut slots: Vec<Option<SocketAddr>>) -> Vec<SocketAddr> {
    let mut closed = Vec::with_capacity(slots.len());
    let mut index = 0;
    while index < slots.len() {
        match slots.get(index).copied().flatten() {
            Some(address) => {
                closed.push(address);
                index += 1;
            }
            None => {
                let last = slots.pop();
                if let (Some(last), Some(gap)) = (last, slots.get_mut(index)) {
                    *gap = last;
                }
            }
        }
    }
    closed
}

/// Addresses of the local endpoints in lists that are used.
fn local_addresses(programmed: &Programmed) -> impl Iterator<Item = IpAddr> {
    let used = [
        (programmed.cluster.is_empty(), &programmed.service.cluster_endpoints),
        (programmed.local.is_empty(), &programmed.service.local_endpoints),
    ];
    let lists = used.into_iter().filter(|(unused, _)| !unused).map(|(_, list)| list);
    lists.flatten().filter(|endpoint| endpoint.local).map(|endpoint| endpoint.address().ip())
}
