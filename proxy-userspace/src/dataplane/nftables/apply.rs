//! From a plan to the kernel: the one place that writes.

use std::collections::BTreeMap;

use node_sys::nftables::{Batch, Contents, ElementRef, Nftables, NftablesError};

use super::changes::{Changes, Elements};
use super::layout::{BASE_CHAINS, MARKER, SetName, TABLE, chain};
use super::plan::Planner;
use super::rules::{Rule, Rules};
use super::{NftablesConfig, Written};
use crate::dataplane::elements::kernel_family;
use crate::model::{IpFamily, ServiceDelta, ServiceSnapshot};

/// Name of the table that is made and unmade to see what the kernel can do.
const PREFLIGHT_TABLE: &str = "trama-preflight";

/// Our table of one family: what it holds, and how to change it.
pub(super) struct TableWriter {
    family: IpFamily,
    rules: Rules,
    /// `None` when the table may hold anything: after a failure, and before the first sync.
    planner: Option<Planner>,
    /// How many rules each chain has, to see whether somebody has flushed one.
    rule_counts: BTreeMap<String, usize>,
    /// What each set holds, to see whether somebody has taken or changed an element. Not of the set that the packet path fills.
    contents: BTreeMap<SetName, Contents>,
}

/// A client that is stuck to an endpoint, as it was read back.
struct Stuck {
    key: Vec<u8>,
    value: Vec<u8>,
    timeout_ms: u64,
    left_ms: u64,
}

impl TableWriter {
    /// A writer for the table of `family`.
    pub(super) fn new(family: IpFamily, config: NftablesConfig) -> Self {
        let rules = Rules::new(family, 1 << config.masquerade_bit);
        Self { family, rules, planner: None, rule_counts: BTreeMap::new(), contents: BTreeMap::new() }
    }

    /// `IPv4` or `IPv6`.
    pub(super) fn family_name(&self) -> &'static str {
        match self.family {
            IpFamily::V4 => "IPv4",
            IpFamily::V6 => "IPv6",
        }
    }

    /// ServicePorts and classes in the table.
    pub(super) fn sizes(&self) -> (usize, usize) {
        self.planner.as_ref().map_or((0, 0), Planner::sizes)
    }

    /// Has the kernel make a table with everything that tables of ours are made of, and delete it, in one transaction.
    pub(super) fn preflight(&self, connection: &mut Nftables) -> Result<(), NftablesError> {
        let mut planner = Planner::new(self.family, self.rules);
        planner.plan_example();
        let mut batch = Batch::new(kernel_family(self.family), PREFLIGHT_TABLE);
        batch.add_table(MARKER);
        self.write_frame(&mut batch);
        write(&mut batch, &planner.take());
        batch.delete_table();
        connection.commit(batch)
    }

    /// Makes the table anew, in one transaction: whatever somebody did to the old one, and whichever version of this program
    /// made it, packets meet the old one until they meet the new one. Clients that are stuck to an endpoint stay with it.
    pub(super) fn write_all(
        &mut self,
        connection: &mut Nftables,
        desired: &ServiceSnapshot,
    ) -> Result<Written, NftablesError> {
        self.planner = None;
        let mut planner = Planner::new(self.family, self.rules);
        let services = planner.everything(desired);
        let changes = planner.take();
        let mut batch = Batch::new(kernel_family(self.family), TABLE);
        batch.add_table(MARKER);
        batch.delete_table();
        batch.add_table(MARKER);
        self.rule_counts = self.write_frame(&mut batch);
        self.contents.clear();
        self.note_written(&changes);
        write(&mut batch, &changes);
        let entries = changes.len();
        drop(changes);
        for stuck in self.stuck(connection)?.iter().filter(|stuck| stuck.is_known(&planner)) {
            let element = ElementRef::key(&stuck.key).value(&stuck.value).timeout(stuck.timeout_ms, stuck.left_ms);
            batch.add_element(SetName::Affinity.name(), element);
        }
        connection.commit(batch)?;
        self.planner = Some(planner);
        Ok(Written { services, entries, transactions: 1 })
    }

    /// Writes what the delta names, in one transaction.
    pub(super) fn write_changes(
        &mut self,
        connection: &mut Nftables,
        desired: &ServiceSnapshot,
        delta: &ServiceDelta,
    ) -> Result<Written, NftablesError> {
        // Without a plan nothing is known of the table. With a failure on the way out there is none either.
        let Some(mut planner) = self.planner.take() else { return self.write_all(connection, desired) };
        let ours = delta.changed.iter().filter(|name| name.family == self.family);
        let services = ours.filter(|name| planner.change(name, desired.services.get(name))).count();
        planner.change_cluster_ips(desired, delta.cluster_ips.iter().copied());
        if delta.node_changed {
            planner.change_node(&desired.node);
        }
        let changes = planner.take();
        let mut batch = Batch::new(kernel_family(self.family), TABLE);
        write(&mut batch, &changes);
        let transactions = u32::from(!batch.is_empty());
        connection.commit(batch)?;
        self.note_written(&changes);
        self.planner = Some(planner);
        Ok(Written { services, entries: changes.len(), transactions })
    }

    /// Whether the table is as it was written: it is ours, every chain has its number of rules, and every set holds what was put in.
    /// Not seen are a rule that was exchanged for another, and a class that leads elsewhere.
    pub(super) fn is_intact(&self, connection: &mut Nftables) -> Result<bool, NftablesError> {
        if self.planner.is_none() {
            return Ok(true);
        }
        let family = kernel_family(self.family);
        if connection.table(family, TABLE)?.is_none_or(|table| table.marker != MARKER) {
            return Ok(false);
        }
        if connection.rule_counts(family, TABLE)? != self.rule_counts {
            return Ok(false);
        }
        for set in SetName::ALL.into_iter().filter(|set| *set != SetName::Affinity) {
            let written = self.contents.get(&set).copied().unwrap_or_default();
            if !connection.holds(family, TABLE, set.name(), written)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Sets, chains and the rules that are always there; returns the rules' numbers.
    fn write_frame(&self, batch: &mut Batch) -> BTreeMap<String, usize> {
        for set in SetName::ALL {
            batch.add_set(&set.definition(self.family));
        }
        for chain in chain::REGULAR {
            batch.add_chain(chain, None);
        }
        for (chain, hook) in BASE_CHAINS {
            batch.add_chain(chain, Some(hook));
        }
        let mut counts = BTreeMap::new();
        for chain in chain::REGULAR.into_iter().chain(BASE_CHAINS.map(|(chain, _)| chain)) {
            let rules = self.rules.fixed(chain);
            rules.iter().for_each(|rule| batch.add_rule(chain, rule));
            note(&mut counts, chain, &rules);
        }
        counts
    }

    fn note_written(&mut self, changes: &Changes) {
        for (chain, rules) in &changes.replaced {
            note(&mut self.rule_counts, chain, rules);
        }
        for (chain, rules) in &changes.chains {
            note(&mut self.rule_counts, chain, rules);
        }
        for (number, _) in &changes.classes {
            self.contents.entry(SetName::Classes).or_default().add(&number.to_ne_bytes(), &[]);
        }
        for (set, key, value) in changes.deleted.iter() {
            self.contents.entry(set).or_default().remove(key, value);
        }
        for (set, key, value) in changes.added.iter() {
            self.contents.entry(set).or_default().add(key, value);
        }
    }

    /// The clients that the table of an earlier sync, or of an earlier process, has at their endpoints.
    fn stuck(&self, connection: &mut Nftables) -> Result<Vec<Stuck>, NftablesError> {
        let family = kernel_family(self.family);
        if connection.table(family, TABLE)?.is_none_or(|table| table.marker != MARKER) {
            return Ok(Vec::new());
        }
        let elements = match connection.elements(family, TABLE, SetName::Affinity.name()) {
            Err(error) if error.is_not_found() => Vec::new(),
            elements => elements?,
        };
        let stuck = elements.into_iter().filter_map(|element| {
            let (timeout_ms, left_ms) = (element.timeout_ms?, element.left_ms?);
            Some(Stuck { key: element.key, value: element.value, timeout_ms, left_ms })
        });
        Ok(stuck.filter(|stuck| stuck.left_ms > 0).collect())
    }
}

impl Stuck {
    /// Whether a ServicePort has the id with which the value begins.
    fn is_known(&self, planner: &Planner) -> bool {
        self.value.first_chunk().is_some_and(|id| planner.is_id(u32::from_ne_bytes(*id)))
    }
}

/// Removes the table of `family`. That there is none, or no nf_tables to hold one, is no error.
pub(super) fn remove(connection: &mut Nftables, family: IpFamily) -> Result<(), NftablesError> {
    let kernel_family = kernel_family(family);
    match connection.table(kernel_family, TABLE) {
        Ok(None) => return Ok(()),
        Ok(Some(_)) => (),
        Err(error) if error.is_unsupported() => return Ok(()),
        Err(error) => return Err(error),
    }
    let mut batch = Batch::new(kernel_family, TABLE);
    batch.delete_table();
    match connection.commit(batch) {
        Err(error) if error.is_not_found() => Ok(()),
        result => result,
    }
}

/// A chain without rules is not listed.
fn note(counts: &mut BTreeMap<String, usize>, chain: &str, rules: &[Rule]) {
    if rules.is_empty() {
        counts.remove(chain);
    } else {
        counts.insert(chain.to_owned(), rules.len());
    }
}

/// The kernel takes the messages one by one before all of them come into force at once: chains before what leads to them,
/// deletions before additions of the same key.
fn write(batch: &mut Batch, changes: &Changes) {
    for (chain, rules) in &changes.chains {
        batch.add_chain(chain, None);
        rules.iter().for_each(|rule| batch.add_rule(chain, rule));
    }
    for (chain, rules) in &changes.replaced {
        batch.flush_chain(chain);
        rules.iter().for_each(|rule| batch.add_rule(chain, rule));
    }
    for (number, verdict) in &changes.classes {
        batch.add_element(SetName::Classes.name(), ElementRef::key(&number.to_ne_bytes()).verdict(verdict));
    }
    write_elements(&changes.deleted, |set, element| {
        batch.delete_element(set.name(), ElementRef { value: None, ..element });
    });
    write_elements(&changes.added, |set, element| batch.add_element(set.name(), element));
}

fn write_elements(elements: &Elements, mut write: impl FnMut(SetName, ElementRef<'_>)) {
    for (set, key, value) in elements.iter() {
        let element = ElementRef::key(key);
        match (set, value) {
            (_, []) => write(set, element),
            (SetName::SourceRanges, last) => write(set, element.to(last)),
            (_, value) => write(set, element.value(value)),
        }
    }
}
