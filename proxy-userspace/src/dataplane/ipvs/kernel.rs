//! The one place that writes: IPVS, nf_tables, policy routing and kernel parameters of this network namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use node_sys::ipvs::{Command, Ipvs, IpvsError, Refusal, Service, ServiceId, Timeouts};
use node_sys::nftables::{Batch, Element, ElementRef, Nftables, NftablesError, Verdict};
use node_sys::{Divert, SysError, sysctl};
use tracing::warn;

use super::compile::{Key, Value};
use super::layout::{BASE_CHAINS, MARKER, Origin, REGULAR_CHAINS, SetName, TABLE, sticky_chain};
use super::marks::{TAG, TAG_MASK};
use super::plan::{Elements, Held, Planner, note};
use super::rules::Rules;
use crate::conntrack::redirected::{EXPIRE_NODEST, hand_to_nat};
use crate::dataplane::SyncError;
use crate::dataplane::elements::{Words, kernel_family};
use crate::model::{IpFamily, NodeConfig};

/// Both families, in the order in which they are written.
pub(super) const FAMILIES: [IpFamily; 2] = [IpFamily::V4, IpFamily::V6];
/// Routing table and priority of the rule that leads marked packets to IPVS: the letters "tr".
const ROUTING_TABLE: u32 = 0x7472;
const RULE_PRIORITY: u32 = 90;
/// Kernel parameters of IPVS, our value, and the kernel's own: translated connections are seen by conntrack, whose masquerading
/// we use; what was sent to a server that is gone is sent to another one.
const PARAMETERS: [(&str, &str, &str); 4] = [
    ("net/ipv4/vs/conntrack", "1", "0"),
    ("net/ipv4/vs/conn_reuse_mode", "1", "1"),
    (EXPIRE_NODEST, "1", "0"),
    ("net/ipv4/vs/expire_quiescent_template", "1", "0"),
];
/// The kernel's own.
const KERNEL_TIMEOUTS: Timeouts = Timeouts { tcp: 900, tcp_fin: 120, udp: 300 };
/// Virtual services whose servers are asked for their connections at one time.
const DRAINED_MAX: usize = 256;
/// Virtual services whose servers are compared at one time.
const COMPARED_MAX: usize = 256;

/// Connections to the kernel, and what it holds of IPVS.
#[derive(Debug)]
pub(super) struct Kernel {
    ipvs: Ipvs,
    nftables: Nftables,
    pub(super) held: BTreeMap<ServiceId, Held>,
    sticky_chains: BTreeSet<(IpFamily, u32)>,
    /// Where draining goes on: the services are visited in turn.
    drained: Option<ServiceId>,
    /// Where comparing goes on.
    compared: Option<ServiceId>,
    /// Rules of each chain of our tables, as they were after we wrote them.
    rules: BTreeMap<IpFamily, RuleCounts>,
    /// Number of the last transaction in this network namespace after which the tables were as we wrote them.
    generation: Option<u32>,
}

/// Chains with their numbers of rules.
type RuleCounts = BTreeMap<String, usize>;

impl Kernel {
    /// Connects; nothing is changed.
    pub(super) fn open() -> Result<Self, SyncError> {
        let ipvs = Ipvs::open().map_err(ipvs_error)?;
        let nftables = Nftables::open().map_err(nftables_error)?;
        Ok(Self {
            ipvs,
            nftables,
            held: BTreeMap::new(),
            sticky_chains: BTreeSet::new(),
            drained: None,
            compared: None,
            rules: BTreeMap::new(),
            generation: None,
        })
    }

    /// Sets what does not depend on any Service; a timeout of 0 stays as it is.
    pub(super) fn prepare(&mut self, timeouts: Timeouts) -> Result<(), SyncError> {
        for (key, ours, _) in PARAMETERS {
            sysctl::write(key, ours).map_err(sys_error)?;
        }
        self.ipvs.set_timeouts(timeouts).map_err(ipvs_error)?;
        FAMILIES
            .into_iter()
            .filter(|family| has(*family))
            .try_for_each(|family| divert(family).add().map_err(sys_error))
    }

    /// Reads what IPVS holds of ours.
    pub(super) fn read_services(&mut self) -> Result<(), SyncError> {
        let abrupt: BTreeSet<ServiceId> = self.held.iter().filter(|(_, held)| held.abrupt).map(|(id, _)| *id).collect();
        self.held.clear();
        for service in self.ipvs.services().map_err(ipvs_error)? {
            let Some(id) = service.id.filter(|id| id.mark & TAG_MASK == TAG) else { continue };
            let servers = self.ipvs.servers(id).map_err(ipvs_error)?;
            let servers = servers.into_iter().map(|server| (server.address, server.weight)).collect();
            self.held.insert(id, Held { scheduler: service.scheduler, servers, abrupt: abrupt.contains(&id) });
        }
        Ok(())
    }

    /// Reads the elements of a family's table; `None` where there is no table of this layout.
    pub(super) fn read_elements(&mut self, family: IpFamily) -> Result<Option<BTreeMap<Key, Value>>, SyncError> {
        let table = self.nftables.table(kernel_family(family), TABLE).map_err(nftables_error)?;
        if table.is_none_or(|table| table.marker != MARKER) {
            return Ok(None);
        }
        let mut found = BTreeMap::new();
        for set in SetName::ALL.into_iter().filter(|set| *set != SetName::Affinity) {
            let elements = self.nftables.elements(kernel_family(family), TABLE, set.name());
            let elements = match elements {
                Err(error) if error.is_not_found() => return Ok(None),
                elements => elements.map_err(nftables_error)?,
            };
            found.extend(elements.into_iter().map(|element| read(family, set, &element)));
        }
        Ok(Some(found))
    }

    /// Runs commands, remembers what they changed, and returns the services of which the kernel refused a server: an address
    /// that is no host's here, for instance the broadcast address of a network. The others of the service are used.
    pub(super) fn run(&mut self, commands: &[Command]) -> Result<Vec<ServiceId>, SyncError> {
        let refusals = self.ipvs.run(commands).map_err(ipvs_error)?;
        let (mut refused, mut services) = (BTreeSet::new(), Vec::new());
        for refusal in refusals {
            let Command::AddServer(id, address, _) = refusal.command else { return Err(refused_error(refusal)) };
            warn!(%address, mark = id.mark, error = %refusal.source, "the kernel refuses an endpoint");
            refused.insert((id, address));
            services.push(id);
        }
        for command in commands {
            if !matches!(command, Command::AddServer(id, address, _) if refused.contains(&(*id, *address))) {
                note(&mut self.held, *command);
            }
        }
        Ok(services)
    }

    /// Writes a family's table: `whole` with tables, chains and rules, of which `fresh` says that none of this layout is there.
    pub(super) fn write_table(
        &mut self,
        family: IpFamily,
        whole: Option<(&NodeConfig, bool)>,
        elements: &Elements,
    ) -> Result<(), SyncError> {
        if !has(family) {
            return Ok(());
        }
        let mut batch = Batch::new(kernel_family(family), TABLE);
        if let Some((node, fresh)) = whole {
            if fresh && self.nftables.table(kernel_family(family), TABLE).map_err(nftables_error)?.is_some() {
                batch.delete_table();
            }
            write_skeleton(&mut batch, family, node);
            self.sticky_chains.retain(|(of, _)| *of != family);
        }
        let seconds = Planner::sticky_seconds(family, elements);
        let missing: Vec<u32> = seconds.into_iter().filter(|s| !self.sticky_chains.contains(&(family, *s))).collect();
        for seconds in &missing {
            let chain = sticky_chain(*seconds);
            batch.add_chain(&chain, None);
            batch.flush_chain(&chain);
            batch.add_rule(&chain, &Rules(family).stick_for(*seconds));
        }
        write_elements(&mut batch, family, elements);
        self.nftables.commit(batch).map_err(nftables_error)?;
        if whole.is_some() || !missing.is_empty() {
            let rules = self.rule_counts(family)?;
            self.rules.insert(family, rules);
        }
        self.sticky_chains.extend(missing.into_iter().map(|seconds| (family, seconds)));
        Ok(())
    }

    /// Deletes servers that get no new connections and have no old ones, and virtual services that nobody wants any more.
    /// At most 256 services are asked at one time; the next call goes on behind them.
    pub(super) fn drain(&mut self, planner: &Planner) -> Result<usize, SyncError> {
        let waits = |held: &Held| held.servers.values().any(|weight| *weight == 0);
        let of =
            |id: &ServiceId, held: &Held| waits(held) || (planner.service(*id).is_none() && held.servers.is_empty());
        let all: Vec<ServiceId> = self.held.iter().filter(|(id, held)| of(id, held)).map(|(id, _)| *id).collect();
        let turn = turn(&all, &mut self.drained, DRAINED_MAX);
        let mut commands = Vec::new();
        for id in turn {
            let servers = self.ipvs.servers(id).map_err(ipvs_error)?;
            let done = servers.iter().filter(|server| server.weight == 0 && server.connections == 0);
            let done: Vec<Command> = done.map(|server| Command::DeleteServer(id, server.address)).collect();
            let left = servers.len() - done.len();
            commands.extend(done);
            if left == 0 && planner.service(id).is_none() {
                commands.push(Command::DeleteService(id));
            }
        }
        self.run(&commands)?;
        Ok(commands.len())
    }

    /// Whether everything is as it was written: rules and elements of the tables, looked at when anybody has written to nf_tables
    /// since the last look; the virtual services; and the servers of 256 of them, the next call going on behind them.
    pub(super) fn is_intact(&mut self, planner: &Planner) -> Result<bool, SyncError> {
        let generation = self.nftables.generation().map_err(nftables_error)?;
        if self.generation != Some(generation) {
            for family in FAMILIES.into_iter().filter(|family| has(*family)) {
                if !self.is_table_intact(family, planner)? {
                    return Ok(false);
                }
            }
            // Read before the look: what happened during it is looked at next time.
            self.generation = Some(generation);
        }
        self.are_services_intact()
    }

    fn is_table_intact(&mut self, family: IpFamily, planner: &Planner) -> Result<bool, SyncError> {
        let table = self.nftables.table(kernel_family(family), TABLE).map_err(nftables_error)?;
        if table.is_none_or(|table| table.marker != MARKER)
            || Some(&self.rule_counts(family)?) != self.rules.get(&family)
        {
            return Ok(false);
        }
        let wanted = planner.contents(family);
        for set in SetName::ALL.into_iter().filter(|set| *set != SetName::Affinity) {
            let wanted = wanted.get(&set).copied().unwrap_or_default();
            let holds = self.nftables.holds(kernel_family(family), TABLE, set.name(), wanted);
            if !holds.map_err(nftables_error)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn rule_counts(&mut self, family: IpFamily) -> Result<RuleCounts, SyncError> {
        self.nftables.rule_counts(kernel_family(family), TABLE).map_err(nftables_error)
    }

    fn are_services_intact(&mut self) -> Result<bool, SyncError> {
        let there = self.ipvs.services().map_err(ipvs_error)?;
        let there: BTreeSet<ServiceId> = there.into_iter().filter_map(|service| service.id).collect();
        if self.held.keys().any(|id| !there.contains(id)) {
            return Ok(false);
        }
        let all: Vec<ServiceId> = self.held.keys().copied().collect();
        for id in turn(&all, &mut self.compared, COMPARED_MAX) {
            let servers = self.ipvs.servers(id).map_err(ipvs_error)?;
            let servers: BTreeMap<_, _> = servers.into_iter().map(|server| (server.address, server.weight)).collect();
            if self.held.get(&id).is_some_and(|held| held.servers != servers) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// The next `max` of `all`, which are sorted, behind the `last` one of the turn before; from the beginning again at the end.
fn turn(all: &[ServiceId], last: &mut Option<ServiceId>, max: usize) -> Vec<ServiceId> {
    let start = last.map_or(0, |last| all.partition_point(|id| *id <= last));
    let turn: Vec<ServiceId> = all.iter().cycle().skip(start).take(all.len().min(max)).copied().collect();
    *last = turn.last().copied();
    turn
}

/// Removes everything of ours; goes on after a failure and returns the first. That there is no IPVS is none.
///
/// Connections go on: NAT has them before anything is removed, and our rules leave what NAT has alone.
pub(super) fn remove() -> Result<(), SyncError> {
    let mut results: Vec<Result<(), SyncError>> = Vec::new();
    let had_services = has_services();
    if is_loaded() {
        results.push(stop_marking());
        let _logged = hand_to_nat(|entry| entry.mark & TAG_MASK == TAG, is_ours);
    }
    match Nftables::open() {
        Ok(mut nftables) => results.extend(FAMILIES.map(|family| remove_table(&mut nftables, family))),
        Err(error) => results.push(Err(nftables_error(error))),
    }
    results.extend(FAMILIES.map(|family| divert(family).remove().map_err(sys_error)));
    results.push(remove_services());
    if had_services {
        results.push(give_back_parameters());
    }
    results.into_iter().collect()
}

fn remove_table(nftables: &mut Nftables, family: IpFamily) -> Result<(), SyncError> {
    if nftables.table(kernel_family(family), TABLE).map_err(nftables_error)?.is_none() {
        return Ok(());
    }
    let mut batch = Batch::new(kernel_family(family), TABLE);
    batch.delete_table();
    nftables.commit(batch).map_err(nftables_error)
}

fn has_services() -> bool {
    let services = || Ipvs::open()?.services();
    is_loaded() && services().is_ok_and(|services| services.iter().any(is_ours))
}

fn is_ours(service: &Service) -> bool {
    service.id.is_some_and(|id| id.mark & TAG_MASK == TAG)
}

/// Asking for IPVS would load it, and there can be nothing of ours in what is not loaded.
fn is_loaded() -> bool {
    sysctl::read("net/ipv4/vs/conntrack").is_ok()
}

/// Leaves new connections to whoever comes next; what is known keeps its mark.
fn stop_marking() -> Result<(), SyncError> {
    let mut nftables = Nftables::open().map_err(nftables_error)?;
    for family in FAMILIES {
        if nftables.table(kernel_family(family), TABLE).map_err(nftables_error)?.is_none() {
            continue;
        }
        let mut batch = Batch::new(kernel_family(family), TABLE);
        Origin::ALL.into_iter().for_each(|origin| batch.flush_chain(origin.chain()));
        nftables.commit(batch).map_err(nftables_error)?;
    }
    Ok(())
}

fn remove_services() -> Result<(), SyncError> {
    if !is_loaded() {
        return Ok(());
    }
    let mut ipvs = Ipvs::open().map_err(ipvs_error)?;
    let services = ipvs.services().map_err(ipvs_error)?;
    let ours = services.into_iter().filter(is_ours).filter_map(|service| service.id);
    let commands: Vec<Command> = ours.map(Command::DeleteService).collect();
    if commands.is_empty() {
        return Ok(());
    }
    let before = sysctl::read(EXPIRE_NODEST).map_err(sys_error)?;
    sysctl::write(EXPIRE_NODEST, "0").map_err(sys_error)?;
    let done = ipvs.run(&commands);
    sysctl::write(EXPIRE_NODEST, before.trim()).map_err(sys_error)?;
    let refused = done.map_err(ipvs_error)?.into_iter().next();
    refused.map_or(Ok(()), |refusal| Err(refused_error(refusal)))
}

/// Timeouts and parameters are those of the whole namespace: where somebody else has virtual services, they are theirs now, and
/// without `conntrack` the connections of kube-proxy's ipvs mode are not masqueraded.
fn give_back_parameters() -> Result<(), SyncError> {
    let mut ipvs = Ipvs::open().map_err(ipvs_error)?;
    if !ipvs.services().map_err(ipvs_error)?.is_empty() {
        return Ok(());
    }
    ipvs.set_timeouts(KERNEL_TIMEOUTS).map_err(ipvs_error)?;
    PARAMETERS.into_iter().try_for_each(|(key, _, kernel)| sysctl::write(key, kernel).map_err(sys_error))
}

/// Table, sets, chains and rules. What is there stays, and the rules are written again.
fn write_skeleton(batch: &mut Batch, family: IpFamily, node: &NodeConfig) {
    batch.add_table(MARKER);
    for set in SetName::ALL {
        batch.add_set(&set.definition(family));
    }
    let chains = REGULAR_CHAINS.into_iter().map(|name| (name, None));
    let chains: Vec<_> = chains.chain(BASE_CHAINS.into_iter().map(|(name, hook)| (name, Some(hook)))).collect();
    for (name, hook) in &chains {
        batch.add_chain(name, *hook);
        batch.flush_chain(name);
    }
    for (name, _) in &chains {
        Rules(family).of_chain(name, node).iter().for_each(|rule| batch.add_rule(name, rule));
    }
}

fn write_elements(batch: &mut Batch, family: IpFamily, elements: &Elements) {
    for key in elements.delete.iter().filter(|key| key.family == family) {
        batch.delete_element(key.set.name(), element(key));
    }
    for (key, value) in elements.add.iter().filter(|(key, _)| key.family == family) {
        match value {
            Value::Member => batch.add_element(key.set.name(), element(key)),
            Value::Mark(mark) => batch.add_element(key.set.name(), element(key).value(&mark.to_ne_bytes())),
            Value::Sticky(seconds) => {
                let verdict = Verdict::Goto(sticky_chain(*seconds).into());
                batch.add_element(key.set.name(), element(key).verdict(&verdict));
            }
        }
    }
}

fn element(key: &Key) -> ElementRef<'_> {
    let element = ElementRef::key(key.first.bytes());
    match &key.last {
        Some(last) => element.to(last.bytes()),
        None => element,
    }
}

fn read(family: IpFamily, set: SetName, element: &Element) -> (Key, Value) {
    let sticky = element.chain.as_deref().and_then(|chain| chain.strip_prefix("sticky-")?.parse().ok());
    let value = match (sticky, element.value.first_chunk()) {
        (Some(seconds), _) => Value::Sticky(seconds),
        (None, Some(mark)) => Value::Mark(u32::from_ne_bytes(*mark)),
        (None, None) => Value::Member,
    };
    let last = element.key_end.as_deref().map(Words::from_bytes);
    (Key { family, set, first: Words::from_bytes(&element.key), last }, value)
}

fn divert(family: IpFamily) -> Divert {
    let ipv6 = family == IpFamily::V6;
    Divert { ipv6, mark: TAG, mask: TAG_MASK, table: ROUTING_TABLE, priority: RULE_PRIORITY }
}

/// Whether this kernel has the family: IPv6 can be left out.
fn has(family: IpFamily) -> bool {
    family == IpFamily::V4 || sysctl::read("net/ipv6/conf/all/forwarding").is_ok()
}

fn ipvs_error(error: IpvsError) -> SyncError {
    SyncError::Kernel { object: "IPVS".to_owned(), source: io::Error::other(error) }
}

fn refused_error(refusal: Refusal) -> SyncError {
    SyncError::Kernel { object: "IPVS".to_owned(), source: io::Error::other(refusal) }
}

fn nftables_error(error: NftablesError) -> SyncError {
    SyncError::Kernel { object: format!("nf_tables table {TABLE}"), source: io::Error::other(error) }
}

fn sys_error(error: SysError) -> SyncError {
    SyncError::Kernel { object: error.object.clone(), source: error.source }
}
