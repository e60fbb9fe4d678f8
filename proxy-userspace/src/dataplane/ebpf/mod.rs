//! The eBPF backend: plans the maps' contents and writes them; the programs read them.
//!
//! ```text
//!  ServiceSnapshot ─► plan (pure, per family) ─► Writes ─► maps (mapped memory, map updates)
//!                       ▲ adopt: what an earlier process left is read back first
//! ```
//! Everything is pinned under `<bpffs>/trama/v<ABI>/`, or `v<ABI>-resized/` whenever the sizes have changed: this process may die at any time and traffic goes on.

mod alloc;
mod attach;
mod carry;
mod cluster_ips;
mod detached;
mod drift;
mod encode;
mod error;
mod expiry;
mod exports;
mod family;
mod flows;
mod frames;
mod growth;
pub mod inspect;
mod interfaces;
mod load;
mod maps;
mod migrate;
mod open;
mod pins;
mod plan;
mod programs;
mod sockets;
mod takeover;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use proxy_common::counter::CounterKind;
use proxy_common::{Counter, V4, V6};

pub use self::attach::AttachMode;
pub use self::detached::{Detached, Hook, Passage};
pub use self::encode::UserAddress;
pub use self::error::EbpfError;
pub use self::expiry::FlowTimeouts;
pub use self::flows::FlowTable;
pub use self::frames::FrameMode;
pub use self::growth::{ENDPOINTS_MAX, SERVICES_MAX};
pub use self::load::OBJECT;
pub use self::sockets::pinned_sockets;

use self::alloc::RangeAllocator;
use self::attach::Attacher;
use self::carry::Predecessor;
use self::drift::Drift;
use self::expiry::Expiry;
use self::exports::Exports;
use self::family::Family;
use self::growth::Growth;
use self::interfaces::{addresses, carries_programs, kinds_of_interfaces};
use self::maps::{Counters, Interfaces, TakingOver};
use self::pins::{Pins, current_directory, remove_directory};
use self::plan::Planned;
use self::plan::filled::SLOTS;
use self::takeover::Takeover;
use super::{Dataplane, NumberedService, Scrape, SyncError, SyncReport, SyncScope};
use crate::model::{IpFamily, NodeConfig, ServicePortName, ServiceSnapshot};
use crate::status::Description;

/// Settings of the backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EbpfConfig {
    /// cgroup v2 directory whose sockets are load-balanced.
    pub cgroup: PathBuf,
    /// Mount point of the BPF file system; it is mounted there if nothing is.
    pub bpffs: PathBuf,
    /// Names of interfaces that carry the packet programs, with `*` at the end for a prefix; empty is all. `lo` always does.
    pub interfaces: Vec<String>,
    /// How the packet programs are attached.
    pub attach_mode: AttachMode,
    /// Names of interfaces to other machines that carry the XDP program, as in `interfaces`; empty is none.
    pub xdp_interfaces: Vec<String>,
    /// Where the XDP program runs.
    pub xdp_mode: FrameMode,
    /// Whether packets with direct server return go to other nodes by GUE; else by IPIP.
    pub tunnels_are_gue: bool,
    /// Names of interfaces at which other nodes' tunnels end, as in `interfaces`; empty is the node's uplinks.
    pub tunnel_interfaces: Vec<String>,
    /// ServicePorts that there is room for at first, 1 to [`SERVICES_MAX`].
    pub max_services: u32,
    /// Endpoints of one family that there is room for at first, 1 to [`ENDPOINTS_MAX`].
    pub max_endpoints: u32,
    /// Flows of one family that are remembered, 1 to 67108864; two entries a connection.
    pub max_flows: u32,
    /// When idle flows end.
    pub flow_timeouts: FlowTimeouts,
}

/// The eBPF backend of this node.
pub struct EbpfDataplane {
    config: EbpfConfig,
    directory: PathBuf,
    pins: Pins,
    attacher: Attacher,
    counters: Counters,
    exports: Exports,
    interfaces: Interfaces,
    v4: Family<V4>,
    v6: Family<V6>,
    service_ids: RangeAllocator,
    /// `None` where the kernel refuses it: then flows end when their room is needed.
    expiry: Option<Expiry>,
    /// Until the first sync.
    takeover: Option<Takeover>,
    /// Until the first full sync; another version of ours whose flows are carried over.
    predecessor: Option<Predecessor>,
    taking_over: TakingOver,
    growth: Growth,
    started: Instant,
    /// Milliseconds from `started` to the plan that is being made.
    now_ms: u64,
    /// What the last audit found changed.
    drift: Drift,
}

impl EbpfDataplane {
    /// Removes what an `EbpfDataplane` with this bpffs made on this node, whether or not one is running.
    ///
    /// # Errors
    /// What could not be removed; that there is nothing is no error.
    pub fn remove(bpffs: &Path) -> Result<(), EbpfError> {
        migrate::hand_over(&current_directory(bpffs));
        for interface in nix::net::if_::if_nameindex().iter().flatten() {
            attach::remove_filters(&interface.name().to_string_lossy());
        }
        let removed = remove_directory(&bpffs.join(pins::PIN_DIRECTORY))
            .map_err(|source| EbpfError::Bpffs { path: bpffs.to_owned(), source });
        // Last: the programs leave packets behind that must not be tracked as long as they run.
        if let Err(error) = migrate::remove_hooks() {
            tracing::warn!(%error, "cannot remove the tables of the exchange");
        }
        removed
    }

    /// Whether a process has left something here.
    pub fn is_left(bpffs: &Path) -> bool {
        bpffs.join(pins::PIN_DIRECTORY).is_dir()
    }

    /// Stops the clock for one plan: what the plan gives back must not be free again before the plan is written.
    fn stop_clock(&mut self) {
        self.now_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
    }

    /// Forgets what is believed and reads it from the kernel.
    fn adopt(&mut self, desired: &ServiceSnapshot) -> Result<(), SyncError> {
        let now_ms = self.now_ms;
        self.service_ids = service_ids(&self.config);
        self.v4.adopt(desired, IpFamily::V4, &mut self.service_ids, now_ms)?;
        self.v6.adopt(desired, IpFamily::V6, &mut self.service_ids, now_ms)
    }

    /// # Errors
    /// When the kernel refuses a write; a map without room is reported.
    fn change(
        &mut self,
        name: &ServicePortName,
        desired: &ServiceSnapshot,
        report: &mut SyncReport,
    ) -> Result<(), SyncError> {
        let now_ms = self.now_ms;
        let service = desired.services.get(name);
        let id = self.service_id(name);
        let changed = match name.family {
            IpFamily::V4 => self.v4.change(name, service, &mut self.service_ids, now_ms),
            IpFamily::V6 => self.v6.change(name, service, &mut self.service_ids, now_ms),
        };
        match changed {
            Ok(Planned::Nothing) => {}
            Ok(change) => {
                report.services_changed += 1;
                if change == Planned::WithoutTable {
                    tracing::warn!(service = %name, "no room for the Maglev table of a ServicePort: its choice is random");
                    report.without_table.push(name.clone());
                    self.growth.refused(SLOTS);
                }
            }
            Err(full) => {
                tracing::error!(service = %name, map = full.map, "ServicePort refused: the map is full");
                self.growth.refused(full.map);
                report.refused.push(name.clone());
            }
        }
        // An id that was another ServicePort's has its counts still.
        if let Some(new) = self.service_id(name).filter(|new| Some(*new) != id) {
            self.exports.services.forget(new);
        }
        report.kernel_writes += match name.family {
            IpFamily::V4 => self.v4.write_ahead()?,
            IpFamily::V6 => self.v6.write_ahead()?,
        };
        Ok(())
    }

    fn service_id(&self, name: &ServicePortName) -> Option<u32> {
        match name.family {
            IpFamily::V4 => self.v4.planner.service_id(name),
            IpFamily::V6 => self.v6.planner.service_id(name),
        }
    }

    /// Ids and addresses of the first endpoints of a ServicePort.
    fn endpoints(&self, name: &ServicePortName, max: usize) -> Vec<(u32, SocketAddr)> {
        match name.family {
            IpFamily::V4 => self.v4.planner.endpoints(name).take(max).collect(),
            IpFamily::V6 => self.v6.planner.endpoints(name).take(max).collect(),
        }
    }

    fn sync_addresses(&mut self, node: &NodeConfig) -> Result<usize, SyncError> {
        Ok(self.v4.maps.write_node_addresses(&addresses(node))?
            + self.v6.maps.write_node_addresses(&addresses(node))?
            + self.interfaces.write(&kinds_of_interfaces(&self.config, node))?)
    }

    /// Nothing after the first sync: what conntrack translates then is not another proxy's.
    fn take_over(&mut self, node: &NodeConfig) {
        if let Some(takeover) = &mut self.takeover {
            takeover.run(&self.v4.planner, &self.v6.planner, node);
        }
    }

    fn sync_interfaces(&mut self, node: &NodeConfig) -> Result<usize, SyncError> {
        let interfaces = node.interfaces.iter().filter(|(_, name)| carries_programs(&self.config.interfaces, name));
        let interfaces: BTreeMap<u32, Arc<str>> = interfaces.map(|(index, name)| (*index, name.clone())).collect();
        self.attacher.attach_interfaces(&interfaces, &node.vlan_parents).map_err(|error| not_attached(&error))
    }
}

impl Dataplane for EbpfDataplane {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn sync(&mut self, desired: &ServiceSnapshot, scope: SyncScope<'_>) -> Result<SyncReport, SyncError> {
        let mut report = SyncReport::default();
        self.stop_clock();
        let node_changed = match scope {
            SyncScope::Full => {
                self.adopt(desired)?;
                let mut names: Vec<ServicePortName> = desired.services.keys().cloned().collect();
                names.extend(self.v4.stale(desired).chain(self.v6.stale(desired)));
                names.iter().try_for_each(|name| self.change(name, desired, &mut report))?;
                true
            }
            SyncScope::Changed(delta) => {
                delta.changed.iter().try_for_each(|name| self.change(name, desired, &mut report))?;
                delta.node_changed
            }
        };
        if node_changed {
            report.kernel_writes += self.sync_addresses(&desired.node)?;
        }
        let changed = match scope {
            SyncScope::Changed(delta) if !node_changed => Some(delta.cluster_ips.as_slice()),
            _ => None,
        };
        // Before the frontends: a connection that is taken on one interface needs all of them. One that refuses the programs keeps no
        // Service from the others.
        let attached = if node_changed { self.sync_interfaces(&desired.node) } else { Ok(0) };
        self.taking_over.end()?;
        self.take_over(&desired.node);
        report.kernel_writes += self.v4.commit(desired, changed)?;
        report.kernel_writes += self.v6.commit(desired, changed)?;
        self.take_over(&desired.node);
        self.takeover = None;
        if let Some(expiry) = &self.expiry {
            expiry.endpoints_changed();
        }
        report.kernel_writes += attached?;
        if matches!(scope, SyncScope::Full) {
            if let Some(predecessor) = self.predecessor.take() {
                predecessor.copy_again();
            }
            pins::remove_other_versions(&self.directory);
        }
        Ok(report)
    }

    /// Pins and programs that are gone are put back at once, before the full sync that follows.
    fn audit(&mut self) -> Result<bool, SyncError> {
        let unpinned = self.pins.restore().map_err(|source| kernel(&self.directory, source))?;
        let links = self.directory.join("links");
        fs::create_dir_all(&links).map_err(|source| kernel(&links, source))?;
        let detached = self.attacher.reattach(&self.config.cgroup).map_err(|error| not_attached(&error))?;
        let mut drift = Drift::default();
        drift.add("pins", unpinned);
        drift.add("programs", detached);
        drift.add_family("v4", self.v4.differences()?);
        drift.add_family("v6", self.v6.differences()?);
        drift.add("interfaces", usize::from(!self.interfaces.are_intact()));
        let found = drift.describe();
        self.drift = drift;
        if let Some(found) = &found {
            tracing::warn!(found, "somebody took our programs or maps away, or changed them");
        }
        Ok(found.is_none())
    }

    fn grow(&mut self) -> bool {
        self.grow_where_crowded()
    }

    fn counters(&self) -> Vec<(String, Vec<(String, String)>, u64)> {
        let mut counters: Vec<_> = Counter::ALL
            .iter()
            .map(|counter| {
                let (metric, label) = match counter.kind() {
                    CounterKind::Path => ("trama_dataplane_path_total", "path"),
                    CounterKind::Drop => ("trama_dataplane_drop_total", "reason"),
                    CounterKind::Pass => ("trama_dataplane_pass_total", "reason"),
                    CounterKind::Monitor => ("trama_monitor_events_total", "result"),
                };
                let labels = vec![(label.to_owned(), counter.name().to_owned())];
                (metric.to_owned(), labels, self.counters.total(*counter))
            })
            .collect();
        counters.extend(self.exports.maps());
        counters.extend(self.growth.samples());
        counters.extend(self.drift.samples());
        counters.extend(self.expiry.iter().flat_map(Expiry::samples));
        counters
    }

    fn scrape(&self) -> Scrape {
        Scrape::at_hand(self.counters()).with_rest(self.exports.services(self.service_ids.end()))
    }

    fn numbered(&self, ids: &[u32], endpoints_max: usize) -> Vec<NumberedService> {
        let all = self.v4.planner.service_ids().chain(self.v6.planner.service_ids());
        exports::numbered(all, ids, endpoints_max, |name, max| self.endpoints(name, max))
    }

    fn describe(&self) -> Description {
        let maps = inspect::fills(&self.directory.join("maps")).unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot count the entries of the maps");
            Vec::new()
        });
        Description { maps, programs: self.attacher.attached(), drift: self.drift.describe() }
    }

    fn service_names(&self) -> BTreeMap<u32, String> {
        let all = self.v4.planner.service_ids().chain(self.v6.planner.service_ids());
        all.map(|(name, id)| (id, name.to_string())).collect()
    }

    fn cleanup(&mut self) -> Result<(), SyncError> {
        self.attacher.remove_filters();
        remove_directory(&self.directory).map_err(|source| kernel(&self.directory, source))
    }
}

fn not_attached(error: &EbpfError) -> SyncError {
    SyncError::Kernel { object: "programs".to_owned(), source: io::Error::other(error.to_string()) }
}

fn kernel(path: &Path, source: io::Error) -> SyncError {
    SyncError::Kernel { object: path.display().to_string(), source }
}

/// Ids start at 1: a backend that was never written has id 0.
fn service_ids(config: &EbpfConfig) -> RangeAllocator {
    RangeAllocator::new(1, config.max_services.saturating_mul(2).saturating_add(1))
}
