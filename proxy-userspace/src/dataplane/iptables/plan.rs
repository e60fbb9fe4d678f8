//! From snapshots to what has to be written: which chains, which to delete, which hooks. Pure.
//!
//! The planner remembers ServicePorts, not rules: a chain's rules are made when its text is, so that a large cluster never stands
//! in memory as text.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::chain::{Chain, HOOKS, Leaf, Part, ServiceId, Table};
use super::existing::Existing;
use super::frame::{Chains, Frame, Settings};
use super::rule::{Match, Rule, Target, host};
use super::service::{Expression, last_byte};
use crate::model::{IpFamily, NodeConfig, ServiceDelta, ServicePort, ServicePortName, ServiceSnapshot};

#[cfg(test)]
mod tests;

/// A change of the kernel's own chains.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum HookEdit {
    /// Put first: the kernel's chain, ours.
    Insert(&'static str, Chain),
    /// Remove: the kernel's chain, the rule as `iptables-save` prints it.
    Delete(String, String),
}

/// What has to be written to one table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct TablePlan {
    /// Chains to be written whole; existing or not.
    pub(super) write: BTreeSet<Chain>,
    /// Chains to be deleted, which nothing leads to when the rest is written.
    pub(super) delete: BTreeSet<String>,
    /// Hooks.
    pub(super) hooks: BTreeSet<HookEdit>,
}

impl TablePlan {
    fn is_empty(&self) -> bool {
        self.write.is_empty() && self.delete.is_empty() && self.hooks.is_empty()
    }
}

/// What has to be written to both.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// By table.
    pub(super) tables: BTreeMap<Table, TablePlan>,
    /// ServicePorts whose chain names are another one's.
    pub(super) refused: BTreeSet<ServicePortName>,
    /// ServicePorts that are new, different or gone.
    pub(super) services_changed: usize,
}

impl Plan {
    /// Whether nothing has to be written.
    pub(super) fn is_empty(&self) -> bool {
        self.tables.values().all(TablePlan::is_empty)
    }

    /// Removes everything of ours that is there.
    pub(super) fn removal(existing: &Existing) -> Self {
        let mut plan = Self::default();
        for (table, found) in existing.tables() {
            let delete = |(hook, rule): &(String, String)| HookEdit::Delete(hook.clone(), rule.clone());
            let table = plan.table(table);
            table.delete.clone_from(&found.chains);
            table.hooks = found.hooks.iter().map(delete).collect();
        }
        plan
    }

    fn table(&mut self, table: Table) -> &mut TablePlan {
        self.tables.entry(table).or_default()
    }

    fn write(&mut self, table: Table, chain: Chain) {
        self.table(table).write.insert(chain);
    }

    fn delete(&mut self, table: Table, chain: Chain) {
        let plan = self.table(table);
        plan.write.remove(&chain);
        plan.delete.insert(chain.to_string());
    }
}

/// Which ServicePorts have a rule in a leaf.
type Leaves = BTreeMap<Leaf, BTreeSet<ServiceId>>;

/// One family's desired rules.
#[derive(Debug)]
pub(super) struct Planner {
    family: IpFamily,
    settings: Settings,
    node: Arc<NodeConfig>,
    services: BTreeMap<ServiceId, Arc<ServicePort>>,
    leaves: BTreeMap<Table, Leaves>,
    cluster_ips: BTreeMap<u8, BTreeSet<IpAddr>>,
    /// Local endpoints' addresses and how many ServicePorts have them.
    hairpins: BTreeMap<IpAddr, u32>,
    health_ports: BTreeSet<u16>,
    frame: Chains,
}

impl Planner {
    pub(super) fn new(family: IpFamily, settings: Settings) -> Self {
        Self {
            family,
            settings,
            node: Arc::default(),
            services: BTreeMap::new(),
            leaves: Table::ALL.map(|table| (table, Leaves::new())).into(),
            cluster_ips: BTreeMap::new(),
            hairpins: BTreeMap::new(),
            health_ports: BTreeSet::new(),
            frame: Chains::new(),
        }
    }

    /// Whether rules count packets.
    pub(super) fn counts(&self) -> bool {
        self.settings.counts
    }

    /// From the next full plan on no rule counts.
    pub(super) fn count_no_more(&mut self) {
        self.settings.counts = false;
    }

    /// Forgets everything and plans `snapshot` whole, given what is in the kernel.
    pub(super) fn full(&mut self, snapshot: &ServiceSnapshot, existing: &Existing) -> Plan {
        *self = Self::new(self.family, self.settings);
        self.node = Arc::clone(&snapshot.node);
        let mut plan = Plan::default();
        let family = self.family;
        for (name, port) in snapshot.services.iter().filter(|(name, _)| name.family == family) {
            self.replace(name, Some(port), &mut plan);
        }
        self.set_cluster_ips(snapshot, snapshot.cluster_ips.keys(), &mut plan);
        self.set_health_ports(snapshot);
        self.set_frame(&mut plan);
        for table in Table::ALL {
            let found = existing.table(table);
            let desired: BTreeSet<String> = plan.table(table).write.iter().map(ToString::to_string).collect();
            plan.table(table).delete = found.chains.difference(&desired).cloned().collect();
            plan.table(table).hooks = hook_edits(table, &found.hooks);
        }
        plan
    }

    /// Plans what is different in `snapshot`.
    pub(super) fn change(&mut self, snapshot: &ServiceSnapshot, delta: &ServiceDelta) -> Plan {
        let mut plan = Plan::default();
        let pods_changed = snapshot.node.pod_traffic != self.node.pod_traffic;
        let family = self.family;
        for name in delta.changed.iter().filter(|name| name.family == family) {
            self.replace(name, snapshot.services.get(name), &mut plan);
        }
        if delta.node_changed {
            self.node = Arc::clone(&snapshot.node);
        }
        if pods_changed {
            self.write_all_services(&mut plan);
        }
        self.set_cluster_ips(snapshot, &delta.cluster_ips, &mut plan);
        if delta.health_checks_changed {
            self.set_health_ports(snapshot);
        }
        self.set_frame(&mut plan);
        plan
    }

    /// The rules of a chain, as they are now.
    pub(super) fn rules(&self, table: Table, chain: Chain) -> Vec<Rule> {
        match chain {
            Chain::Service(id, part) => {
                let parts = self.expression(id).map(|service| service.chains()).unwrap_or_default();
                parts.into_iter().find(|(one, _)| *one == part).map(|(_, rules)| rules).unwrap_or_default()
            }
            Chain::Leaf(leaf) => self.leaf(table, leaf),
            Chain::ClusterIpLeaf(byte) => {
                let reject = |address: &IpAddr| Rule::new([Match::Destination(host(*address))], Target::Reject);
                self.cluster_ips.get(&byte).into_iter().flatten().map(reject).collect()
            }
            _ => self.frame.get(&(table, chain)).cloned().unwrap_or_default(),
        }
    }

    /// Whether the kernel holds all that was planned, neither more nor less. Rules are counted, not compared.
    pub(super) fn is_in(&self, existing: &Existing) -> bool {
        Table::ALL.into_iter().all(|table| {
            let found = existing.table(table);
            let chains: Vec<Chain> = self.chains(table).collect();
            let rules: usize = chains.iter().map(|chain| self.rules(table, *chain).len()).sum();
            found.rules == rules
                && found.chains.len() == chains.len()
                && chains.iter().all(|chain| found.chains.contains(&chain.to_string()))
                && hook_edits(table, &found.hooks).is_empty()
        })
    }

    /// Every chain that there should be, in no order.
    fn chains(&self, table: Table) -> impl Iterator<Item = Chain> {
        let services = self.services.keys().filter(move |_| table == Table::Nat);
        let parts = services
            .filter_map(|id| self.expression(*id))
            .flat_map(|service| service.chains().into_iter().map(move |(part, _)| Chain::Service(service.id, part)));
        let leaves =
            self.leaves.get(&table).into_iter().flat_map(|leaves| leaves.keys().map(|leaf| Chain::Leaf(*leaf)));
        let cluster_ips = self.cluster_ips.keys().filter(move |_| table == Table::Filter);
        let frame = self.frame.keys().filter(move |(one, _)| *one == table).map(|(_, chain)| *chain);
        parts.chain(leaves).chain(cluster_ips.map(|byte| Chain::ClusterIpLeaf(*byte))).chain(frame)
    }

    fn expression(&self, id: ServiceId) -> Option<Expression<'_>> {
        self.services.get(&id).map(|port| Expression { id, port, pods: &self.node.pod_traffic })
    }

    fn leaf(&self, table: Table, leaf: Leaf) -> Vec<Rule> {
        let ids = self.leaves.get(&table).and_then(|leaves| leaves.get(&leaf)).into_iter().flatten();
        let rules = ids.filter_map(|id| self.expression(*id)).flat_map(|service| in_leaves(table, &service));
        rules.filter(|(one, _)| *one == leaf).map(|(_, rule)| rule).collect()
    }

    /// Puts `new` in the place of what `name` had.
    fn replace(&mut self, name: &ServicePortName, new: Option<&Arc<ServicePort>>, plan: &mut Plan) {
        let id = ServiceId::of(name);
        if self.services.get(&id).is_some_and(|owner| owner.name != *name) {
            plan.refused.extend(new.map(|_| name.clone()));
            return;
        }
        plan.services_changed += 1;
        let node = Arc::clone(&self.node);
        let pods = &node.pod_traffic;
        let old = match new {
            Some(new) => self.services.insert(id, Arc::clone(new)),
            None => self.services.remove(&id),
        };
        let old = old.as_deref().map(|port| Expression { id, port, pods });
        let new = new.map(|port| Expression { id, port, pods });
        let chains = |service: &Option<Expression<'_>>| -> BTreeMap<Part, Vec<Rule>> {
            service.as_ref().map(Expression::chains).unwrap_or_default().into_iter().collect()
        };
        let (before, after) = (chains(&old), chains(&new));
        for (part, _) in after.iter().filter(|(part, rules)| before.get(part) != Some(rules)) {
            plan.write(Table::Nat, Chain::Service(id, *part));
        }
        for part in before.keys().filter(|part| !after.contains_key(part)) {
            plan.delete(Table::Nat, Chain::Service(id, *part));
        }
        for table in Table::ALL {
            self.move_leaves(table, id, old.as_ref(), new.as_ref(), plan);
        }
        self.count_hairpins(old.as_ref(), new.as_ref());
    }

    /// Its place among the leaves, before and after.
    fn move_leaves(
        &mut self,
        table: Table,
        id: ServiceId,
        old: Option<&Expression<'_>>,
        new: Option<&Expression<'_>>,
        plan: &mut Plan,
    ) {
        let rules = |service: Option<&Expression<'_>>| service.map(|one| in_leaves(table, one)).unwrap_or_default();
        let (old, new) = (rules(old), rules(new));
        if old == new {
            return;
        }
        let leaves = self.leaves.entry(table).or_default();
        for (leaf, _) in &old {
            leaves.entry(*leaf).or_default().remove(&id);
        }
        for (leaf, _) in &new {
            leaves.entry(*leaf).or_default().insert(id);
        }
        let touched: BTreeSet<Leaf> = old.iter().chain(&new).map(|(leaf, _)| *leaf).collect();
        for leaf in touched {
            if leaves.get(&leaf).is_some_and(BTreeSet::is_empty) {
                leaves.remove(&leaf);
                plan.delete(table, Chain::Leaf(leaf));
            } else {
                plan.write(table, Chain::Leaf(leaf));
                plan.table(table).delete.remove(&Chain::Leaf(leaf).to_string());
            }
        }
    }

    fn count_hairpins(&mut self, old: Option<&Expression<'_>>, new: Option<&Expression<'_>>) {
        let addresses = |service: Option<&Expression<'_>>| -> BTreeSet<IpAddr> {
            let ports = service.map(|one| one.port).into_iter();
            let endpoints = ports.flat_map(|port| port.cluster_endpoints.iter().chain(&port.local_endpoints));
            endpoints.filter(|endpoint| endpoint.local).map(|endpoint| endpoint.address().ip()).collect()
        };
        for address in addresses(new) {
            *self.hairpins.entry(address).or_default() += 1;
        }
        for address in addresses(old) {
            let count = self.hairpins.entry(address).or_default();
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.hairpins.remove(&address);
            }
        }
    }

    fn set_cluster_ips<'a>(
        &mut self,
        snapshot: &ServiceSnapshot,
        touched: impl IntoIterator<Item = &'a IpAddr>,
        plan: &mut Plan,
    ) {
        for address in touched.into_iter().filter(|address| IpFamily::of(**address) == self.family) {
            let byte = last_byte(*address);
            let leaf = self.cluster_ips.entry(byte).or_default();
            if snapshot.cluster_ips.contains_key(address) {
                leaf.insert(*address);
            } else {
                leaf.remove(address);
            }
            let chain = Chain::ClusterIpLeaf(byte);
            if leaf.is_empty() {
                self.cluster_ips.remove(&byte);
                plan.delete(Table::Filter, chain);
            } else {
                plan.write(Table::Filter, chain);
                plan.table(Table::Filter).delete.remove(&chain.to_string());
            }
        }
    }

    fn set_health_ports(&mut self, snapshot: &ServiceSnapshot) {
        let checks = snapshot.health_checks.iter().filter(|(name, _)| name.family == self.family);
        self.health_ports = checks.map(|(_, check)| check.port).collect();
    }

    /// The frame is small: it is made anew each time and compared.
    fn set_frame(&mut self, plan: &mut Plan) {
        let leaves = |table| self.leaves.get(&table).into_iter().flat_map(|leaves: &Leaves| leaves.keys().copied());
        let frame = Frame {
            family: self.family,
            settings: self.settings,
            node: &self.node,
            dispatch: &leaves(Table::Nat).collect(),
            refusals: &leaves(Table::Filter).collect(),
            cluster_ips: &self.cluster_ips.keys().copied().collect(),
            hairpins: &self.hairpins.keys().copied().collect(),
            health_ports: &self.health_ports,
        };
        let frame = frame.chains();
        for ((table, chain), _) in frame.iter().filter(|(key, rules)| self.frame.get(key) != Some(rules)) {
            plan.write(*table, *chain);
        }
        for (table, chain) in self.frame.keys().filter(|key| !frame.contains_key(key)) {
            plan.delete(*table, *chain);
        }
        self.frame = frame;
    }

    /// Rules that tell pods apart stand in the chains of ServicePorts.
    fn write_all_services(&self, plan: &mut Plan) {
        for id in self.services.keys() {
            let parts = self.expression(*id).map(|service| service.chains()).unwrap_or_default();
            parts.iter().for_each(|(part, _)| plan.write(Table::Nat, Chain::Service(*id, *part)));
        }
    }
}

fn in_leaves(table: Table, service: &Expression<'_>) -> Vec<(Leaf, Rule)> {
    match table {
        Table::Filter => service.refusals(),
        Table::Nat => service.dispatch(),
    }
}

/// Inserts the hooks that are missing, deletes what is not a hook or is there twice.
fn hook_edits(table: Table, found: &[(String, String)]) -> BTreeSet<HookEdit> {
    let mut edits = BTreeSet::new();
    let hooks = || HOOKS.iter().filter(|(one, ..)| *one == table);
    let is = |(hook, rule): &(String, String), wanted: &str, chain: &Chain| {
        hook == wanted && *rule == Target::Jump(*chain).to_string()
    };
    for (_, hook, chain) in hooks() {
        let count = found.iter().filter(|one| is(one, hook, chain)).count();
        match count {
            0 => edits.insert(HookEdit::Insert(hook, *chain)),
            1 => false,
            _ => edits.insert(HookEdit::Delete((*hook).to_owned(), Target::Jump(*chain).to_string())),
        };
    }
    let stranger = |one: &&(String, String)| !hooks().any(|(_, hook, chain)| is(one, hook, chain));
    edits.extend(found.iter().filter(stranger).map(|(hook, rule)| HookEdit::Delete(hook.clone(), rule.clone())));
    edits
}
