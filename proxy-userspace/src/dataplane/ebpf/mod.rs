//! The eBPF backend: plans the maps' contents and writes them; the programs read them.
//!
//! ```text
//!  ServiceSnapshot ─► plan (pure, per family) ─► Writes ─► maps (mapped memory, map updates)
//!                       ▲ adopt: what an earlier process left is read back first
//! ```
//! Everything is pinned under `<bpffs>/trama/v<ABI>/`: this process may die at any time and traffic goes on.

mod alloc;
mod attach;
mod cluster_ips;
mod encode;
mod error;
mod family;
mod load;
mod maps;
mod migrate;
mod pins;
mod plan;
mod sockets;
mod takeover;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use proxy_common::counter::CounterKind;
use proxy_common::{Counter, NODE_ADDRESS_LOCAL, NODE_ADDRESS_NODE_PORT, NodeAddress, V4, V6};

pub use self::attach::AttachMode;
pub use self::error::EbpfError;
pub use self::sockets::pinned_sockets;

use self::alloc::RangeAllocator;
use self::attach::{Attacher, LOOPBACK};
use self::encode::{UserAddress, pod_interfaces};
use self::family::Family;
use self::load::{load, preflight};
use self::maps::{Counters, Interfaces};
use self::pins::{Pins, pin_directory, remove_directory};
use self::takeover::Takeover;
use super::{Dataplane, SyncError, SyncReport, SyncScope};
use crate::model::{IpFamily, NodeConfig, ServicePortName, ServiceSnapshot};

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
    /// ServicePorts that there is room for, 1 to 4194304.
    pub max_services: u32,
    /// Endpoints of one family that there is room for, 1 to 16777216.
    pub max_endpoints: u32,
    /// Flows of one family that are remembered, 1 to 67108864; two entries a connection.
    pub max_flows: u32,
}

/// The eBPF backend of this node.
pub struct EbpfDataplane {
    config: EbpfConfig,
    directory: PathBuf,
    pins: Pins,
    attacher: Attacher,
    counters: Counters,
    interfaces: Interfaces,
    v4: Family<V4>,
    v6: Family<V6>,
    service_ids: RangeAllocator,
    /// Until the first sync.
    takeover: Option<Takeover>,
    started: Instant,
    /// Milliseconds from `started` to the plan that is being made.
    now_ms: u64,
}

impl EbpfDataplane {
    /// Loads the programs and maps, adopting pinned maps, and attaches the socket programs. Nothing is changed in the
    /// maps before the first sync.
    ///
    /// # Errors
    /// [`EbpfError`] names what is missing; what was attached before stays.
    pub fn open(config: &EbpfConfig) -> Result<Self, EbpfError> {
        let kernel = preflight()?;
        let directory = pin_directory(&config.bpffs)?;
        let links = directory.join("links");
        fs::create_dir_all(&links).map_err(|source| EbpfError::Bpffs { path: links.clone(), source })?;
        // The programs are loaded while the object still owns all its maps: afterwards they keep them alive.
        let object = load(config, &directory)?;
        let pins = Pins::hold(&directory.join("maps"))?;
        let mut attacher = Attacher::load(object, links, config.attach_mode, kernel)?;
        let netns_cookie = node_sys::netns_cookie()?;
        let v4 = Family::take(attacher.object(), "V4", netns_cookie)?;
        let v6 = Family::take(attacher.object(), "V6", netns_cookie)?;
        let counters = Counters::take(attacher.object())?;
        let interfaces = Interfaces::take(attacher.object())?;
        let takeover = Some(Takeover::take(attacher.object(), config.max_flows)?);
        migrate::keep_nat();
        attacher.attach_cgroup(&config.cgroup)?;
        Ok(Self {
            config: config.clone(),
            directory,
            pins,
            attacher,
            counters,
            interfaces,
            v4,
            v6,
            service_ids: service_ids(config),
            takeover,
            started: Instant::now(),
            now_ms: 0,
        })
    }

    /// Removes what an `EbpfDataplane` with this bpffs made on this node, whether or not one is running.
    ///
    /// # Errors
    /// What could not be removed; that there is nothing is no error.
    pub fn remove(bpffs: &Path) -> Result<(), EbpfError> {
        migrate::hand_over(
            &bpffs.join(pins::PIN_DIRECTORY).join(format!("v{}", proxy_common::ABI_VERSION)).join("maps"),
        );
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
        let changed = match name.family {
            IpFamily::V4 => self.v4.change(name, service, &mut self.service_ids, now_ms),
            IpFamily::V6 => self.v6.change(name, service, &mut self.service_ids, now_ms),
        };
        match changed {
            Ok(changed) => report.services_changed += usize::from(changed),
            Err(full) => {
                tracing::error!(service = %name, map = full.map, "ServicePort refused: the map is full");
                report.refused.push(name.clone());
            }
        }
        report.kernel_writes += match name.family {
            IpFamily::V4 => self.v4.write_ahead()?,
            IpFamily::V6 => self.v6.write_ahead()?,
        };
        Ok(())
    }

    fn sync_addresses(&mut self, node: &NodeConfig) -> Result<usize, SyncError> {
        Ok(self.v4.maps.write_node_addresses(&addresses(node))?
            + self.v6.maps.write_node_addresses(&addresses(node))?
            + self.interfaces.write(&pod_interfaces(node))?)
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
        self.attacher.attach_interfaces(&interfaces).map_err(|error| not_attached(&error))
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
        self.take_over(&desired.node);
        report.kernel_writes += self.v4.commit(desired, changed)?;
        report.kernel_writes += self.v6.commit(desired, changed)?;
        self.take_over(&desired.node);
        self.takeover = None;
        report.kernel_writes += attached?;
        if matches!(scope, SyncScope::Full) {
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
        let changed = match self.v4.difference()? {
            None => self.v6.difference()?,
            found => found,
        };
        let changed = changed.or_else(|| (!self.interfaces.are_intact()).then_some("interfaces"));
        if unpinned + detached > 0 || changed.is_some() {
            tracing::warn!(
                unpinned,
                detached,
                map = changed,
                "somebody took our programs or maps away, or changed them"
            );
        }
        Ok(unpinned + detached == 0 && changed.is_none())
    }

    fn counters(&self) -> Vec<(String, Vec<(String, String)>, u64)> {
        Counter::ALL
            .iter()
            .map(|counter| {
                let (metric, label) = match counter.kind() {
                    CounterKind::Path => ("trama_dataplane_path_total", "path"),
                    CounterKind::Drop => ("trama_dataplane_drop_total", "reason"),
                    CounterKind::Pass => ("trama_dataplane_pass_total", "reason"),
                };
                let labels = vec![(label.to_owned(), counter.name().to_owned())];
                (metric.to_owned(), labels, self.counters.total(*counter))
            })
            .collect()
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

fn addresses<A: UserAddress>(node: &NodeConfig) -> Vec<(A, NodeAddress)> {
    let all = node.node_addresses.union(&node.node_port_addresses);
    all.filter_map(|ip| {
        let local = if node.node_addresses.contains(ip) { NODE_ADDRESS_LOCAL } else { 0 };
        let node_port = if node.node_port_addresses.contains(ip) { NODE_ADDRESS_NODE_PORT } else { 0 };
        Some((A::from_ip(*ip)?, NodeAddress { flags: local | node_port }))
    })
    .collect()
}

/// Whether an interface is one of the configured ones. `lo` always is: what is for the node itself goes over it.
fn carries_programs(patterns: &[String], interface: &str) -> bool {
    let matches = |pattern: &String| match pattern.strip_suffix('*') {
        Some(prefix) => interface.starts_with(prefix),
        None => interface == pattern,
    };
    interface == LOOPBACK || patterns.is_empty() || patterns.iter().any(matches)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_match_by_name_and_prefix() {
        let patterns = ["eth0".to_owned(), "veth*".to_owned()];
        assert!(carries_programs(&patterns, "eth0"));
        assert!(carries_programs(&patterns, "veth12"));
        assert!(!carries_programs(&patterns, "eth01"));
        assert!(carries_programs(&[], "anything"));
        assert!(carries_programs(&patterns, "lo"));
    }
}
