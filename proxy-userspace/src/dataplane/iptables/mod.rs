//! The iptables data plane: `iptables-restore` is given what changed, in chains of our own.
//!
//! ```text
//!  snapshot, delta ─► plan (pure) ─► text, as it is written ─► iptables-restore --noflush ─► kernel
//!  iptables-save ──► existing ──┘ (only when everything is written)
//!
//!  nat    PREROUTING, OUTPUT ─► SERVICES ─► ADDR ─► ADDR-5 ─► ADDR-a5 ─► <ServicePort>-INT ─► DNAT
//!                                       └─► PORT ─► PORT-tcp-30080 ─► <ServicePort>-EXT ─► -SVC or -SVL ─► DNAT
//!         POSTROUTING ─► MASQ (marked), HAIRPIN (a local endpoint sent back to itself)
//!  filter INPUT, FORWARD, OUTPUT ─► SERVICES (refusals of what nat left), UNSERVED (unknown ports and addresses of Services)
//! ```
//! Invariants: only chains that begin with `TRAMA-`, and the six rules that lead to them, are ever touched; each table changes in one
//! transaction, filter before nat. The mark's bit is kube-proxy's (0x4000) and means the same: with both proxies on a node, whoever
//! comes first in POSTROUTING masquerades and clears it. Start reading at `Planner::change`.

mod chain;
mod counts;
mod error;
mod existing;
mod frame;
mod plan;
mod process;
mod rule;
mod service;
mod text;
mod tool;
mod watch;

use std::fs;
use std::path::Path;

use node_sys::nftables::{Chain, Nftables};
use node_sys::sysctl;
use tracing::{debug, info, warn};

pub use chain::Table;
pub use error::IptablesError;
pub use tool::Variant;

use super::elements::kernel_family;
use super::{Counters, Dataplane, SyncError, SyncReport, SyncScope};
use crate::model::{IpFamily, ServiceSnapshot};
use chain::PREFIX;
use frame::Settings;
use plan::{Plan, Planner};
use tool::{Tool, variant_in_use};
use watch::Watch;

/// Lets packets to and from 127.0.0.0/8 be routed.
const ROUTE_LOCALNET: &str = "net/ipv4/conf/all/route_localnet";
const BE_LIBERAL: &str = "net/netfilter/nf_conntrack_tcp_be_liberal";

/// What the data plane is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IptablesConfig {
    /// Which kind of iptables; `None` is the one that the node uses.
    pub variant: Option<Variant>,
    /// Number of the mark's bit that means "masquerade", 0 to 31.
    pub masquerade_bit: u8,
    /// Whether 127.0.0.0/8 answers NodePorts, which needs route_localnet.
    pub localhost_node_ports: bool,
}

/// Services as rules of iptables.
#[derive(Debug)]
pub struct IptablesDataplane {
    variant: Variant,
    families: Vec<Family>,
    localhost_node_ports: bool,
}

/// The rules of one family.
#[derive(Debug)]
struct Family {
    tool: Tool,
    planner: Planner,
    watch: Watch,
    counts: Counts,
}

/// What has been written.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    rules: u64,
    restores: u64,
    failures: u64,
    partial_failures: u64,
}

impl IptablesDataplane {
    /// Finds out which iptables to use and that it works; changes nothing.
    ///
    /// # Errors
    /// What is not installed, not permitted, or not in this kernel.
    pub fn open(config: &IptablesConfig) -> Result<Self, IptablesError> {
        let (variant, why) = match config.variant {
            Some(variant) => (variant, "configured"),
            None => (variant_in_use()?, "in use on this node"),
        };
        info!(%variant, why, "programming with iptables");
        let settings = Settings {
            masquerade_bit: 1u32.checked_shl(config.masquerade_bit.into()).unwrap_or(1 << 14),
            localhost_node_ports: config.localhost_node_ports,
            drop_invalid: sysctl::read(BE_LIBERAL).map_or(true, |value| value == "0"),
            counts: counts::available(),
        };
        let families = families().into_iter().map(|family| {
            let tool = Tool { variant, family };
            tool.preflight()?;
            Ok(Family {
                tool,
                planner: Planner::new(family, settings),
                watch: Watch::default(),
                counts: Counts::default(),
            })
        });
        let families = families.collect::<Result<_, IptablesError>>()?;
        Ok(Self { variant, families, localhost_node_ports: config.localhost_node_ports })
    }

    /// Removes everything of ours from both kinds of iptables, whatever process made it. Idempotent.
    ///
    /// # Errors
    /// The first thing that could not be removed; the rest is removed all the same.
    pub fn remove() -> Result<(), IptablesError> {
        let mut result = Ok(());
        for variant in Variant::ALL {
            result = result.and(remove_variant(variant));
        }
        counts::remove();
        result
    }

    /// Whether a process has left something here.
    pub fn is_left() -> bool {
        [IpFamily::V4, IpFamily::V6].into_iter().any(|family| has_our_chains(family) || has_our_legacy_chains(family))
    }

    /// A process before this one may have used the other kind, and then both would translate.
    fn remove_other_variant(&self) -> Result<(), IptablesError> {
        let mut others = Variant::ALL.into_iter().filter(|variant| *variant != self.variant);
        others.try_for_each(|variant| {
            remove_variant(variant).map_err(|source| IptablesError::Leftover { variant, source: Box::new(source) })
        })
    }

    /// Only where something answers there, and never undone by a sync: others may have come to need it.
    fn allow_localhost(&self, snapshot: &ServiceSnapshot) -> Result<(), IptablesError> {
        let wanted = self.localhost_node_ports && snapshot.node.loopback_node_ports_v4;
        if !wanted || sysctl::read(ROUTE_LOCALNET).is_ok_and(|value| value == "1") {
            return Ok(());
        }
        info!("setting {ROUTE_LOCALNET} to 1, for NodePorts on 127.0.0.1");
        sysctl::write(ROUTE_LOCALNET, "1").map_err(|source| IptablesError::RouteLocalnet { source })
    }
}

/// As kube-proxy's metrics write it.
fn family_label(family: IpFamily) -> &'static str {
    match family {
        IpFamily::V4 => "IPv4",
        IpFamily::V6 => "IPv6",
    }
}

impl Family {
    fn sync(
        &mut self,
        desired: &ServiceSnapshot,
        scope: SyncScope<'_>,
        report: &mut SyncReport,
    ) -> Result<(), IptablesError> {
        let plan = match scope {
            SyncScope::Full => {
                self.make_counters();
                self.planner.full(desired, &self.tool.existing()?)
            }
            SyncScope::Changed(delta) => self.planner.change(desired, delta),
        };
        if !plan.refused.is_empty() {
            warn!(count = plan.refused.len(), "ServicePorts refused: their chains' names are another one's");
        }
        report.services_changed += plan.services_changed;
        report.refused.extend(plan.refused.iter().cloned());
        if plan.is_empty() {
            return Ok(());
        }
        let written = self.tool.restore(&plan, &self.planner).inspect_err(|_| {
            self.counts.failures += 1;
            self.counts.partial_failures += u64::from(matches!(scope, SyncScope::Changed(_)));
            // The next sync is a full one, and does without what iptables may not know.
            self.planner.count_no_more();
        })?;
        debug!(family = ?self.tool.family, rules = written, "restored");
        self.counts.restores += 1;
        self.counts.rules += written as u64;
        report.kernel_writes += written;
        self.watch.synced(self.tool);
        Ok(())
    }

    /// Makes the counters that the rules name. Without them the rules name none.
    fn make_counters(&mut self) {
        if self.planner.counts()
            && let Err(error) = counts::ensure()
        {
            warn!(%error, "cannot make packet counters: two metrics are missing");
            self.planner.count_no_more();
        }
    }

    fn audit(&mut self) -> Result<bool, IptablesError> {
        let Self { tool, planner, watch, .. } = self;
        watch.is_as_it_was(*tool, || Ok(planner.is_in(&tool.existing()?)))
    }
}

impl Dataplane for IptablesDataplane {
    fn name(&self) -> &'static str {
        "iptables"
    }

    fn sync(&mut self, desired: &ServiceSnapshot, scope: SyncScope<'_>) -> Result<SyncReport, SyncError> {
        let mut report = SyncReport::default();
        if matches!(scope, SyncScope::Full) {
            self.remove_other_variant().map_err(SyncError::Iptables)?;
        }
        for family in &mut self.families {
            family.sync(desired, scope, &mut report).map_err(SyncError::Iptables)?;
        }
        // After the rule that keeps strangers out.
        self.allow_localhost(desired).map_err(SyncError::Iptables)?;
        Ok(report)
    }

    fn audit(&mut self) -> Result<bool, SyncError> {
        for family in &mut self.families {
            if !family.audit().map_err(SyncError::Iptables)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn counters(&self) -> Counters {
        let mut counters = counts::read();
        for family in &self.families {
            let labels = || vec![("ip_family".to_owned(), family_label(family.tool.family).to_owned())];
            let mut add = |name: &str, value| counters.push((name.to_owned(), labels(), value));
            add("trama_iptables_rules_written_total", family.counts.rules);
            add("trama_iptables_restores_total", family.counts.restores);
            add("kubeproxy_sync_proxy_rules_iptables_restore_failures_total", family.counts.failures);
            add("kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total", family.counts.partial_failures);
        }
        counters
    }

    fn cleanup(&mut self) -> Result<(), SyncError> {
        Self::remove().map_err(SyncError::Iptables)
    }
}

/// IPv6 may be switched off.
fn families() -> Vec<IpFamily> {
    let v6 = Path::new("/proc/thread-self/net/if_inet6").exists();
    if !v6 {
        info!("this kernel has no IPv6; only IPv4 is programmed");
    }
    [IpFamily::V4].into_iter().chain(v6.then_some(IpFamily::V6)).collect()
}

/// One that is not installed, or that the kernel does not have, holds nothing.
/// Names of the tables of the legacy kind in this thread's network namespace; not there where the kernel has none.
const LEGACY_TABLES: [&str; 2] = ["/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"];

/// Of the kind that lies in nf_tables; asked without a program.
fn has_our_chains(family: IpFamily) -> bool {
    let chains = |table: Table| Nftables::open()?.chains(kernel_family(family), table.name());
    let is_ours = |chain: Chain| chain.name.starts_with(PREFIX);
    Table::ALL.into_iter().any(|table| chains(table).is_ok_and(|chains| chains.into_iter().any(is_ours)))
}

/// The programs of the legacy kind would make tables where there are none.
fn has_our_legacy_chains(family: IpFamily) -> bool {
    let exist = LEGACY_TABLES.into_iter().any(|path| fs::read(path).is_ok_and(|names| !names.is_empty()));
    let tool = Tool { variant: Variant::Legacy, family };
    exist && tool.existing().is_ok_and(|existing| !existing.is_empty())
}

fn remove_variant(variant: Variant) -> Result<(), IptablesError> {
    let mut result = Ok(());
    for family in families() {
        let tool = Tool { variant, family };
        let Ok(existing) = tool.existing() else { continue };
        if existing.is_empty() {
            continue;
        }
        info!(%variant, ?family, "removing our chains");
        let planner = Planner::new(family, Settings::default());
        let removed = tool.restore(&Plan::removal(&existing), &planner).map(|_| ());
        result = result.and(removed);
        if existing.guards_loopback && !existing.others_guard_loopback {
            result = result.and(forbid_localhost());
        }
    }
    result
}

/// Without our rule, and without the kubelet's, packets for 127.0.0.0/8 must not be let in from outside.
fn forbid_localhost() -> Result<(), IptablesError> {
    info!("setting {ROUTE_LOCALNET} to 0: the rule that guards it goes");
    sysctl::write(ROUTE_LOCALNET, "0").map_err(|source| IptablesError::RouteLocalnet { source })
}
