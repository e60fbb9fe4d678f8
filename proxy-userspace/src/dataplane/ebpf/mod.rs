//! The eBPF backend: plans the maps' contents and writes them; the programs read them.
//!
//! ```text
//!  ServiceSnapshot ─► plan (pure, per family) ─► Writes ─► maps (mapped memory, map updates)
//!                       ▲ adopt: what an earlier process left is read back first
//! ```
//! Everything is pinned under `<bpffs>/trama/v<ABI>/`: this process may die at any time and traffic goes on.

mod alloc;
mod attach;
mod encode;
mod error;
mod maps;
mod plan;
mod sockets;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use aya::EbpfLoader;
use node_sys::probe::{self, Capability, KernelVersion};
use proxy_common::counter::CounterKind;
use proxy_common::{
    ABI_VERSION, Counter, FrontendKey, NODE_ADDRESS_LOCAL, NODE_ADDRESS_NODE_PORT, NodeAddress, NodeSettings, V4, V6,
};

pub use self::attach::AttachMode;
pub use self::error::EbpfError;
pub use self::sockets::pinned_sockets;

use self::alloc::RangeAllocator;
use self::attach::Attacher;
use self::encode::{UserAddress, node_settings};
use self::maps::{Counters, FamilyMaps};
use self::plan::{Planner, Writes};
use super::{Dataplane, SyncError, SyncReport, SyncScope};
use crate::model::{FrontendAddress, IpFamily, NodeConfig, ServicePort, ServicePortName, ServiceSnapshot};

/// Directory below the bpffs mount that holds everything of ours.
const PIN_DIRECTORY: &str = "trama";

/// Slots for each endpoint: a block is rewritten before the old one is freed, and the largest services want room.
const SLOTS_PER_ENDPOINT: u32 = 4;

/// Frontends for each Service: ClusterIP, NodePort, external and load-balancer addresses.
const FRONTENDS_PER_SERVICE: u32 = 4;

/// First kernel with everything that the programs need; the last of it was `bpf_set_retval`.
const KERNEL_MIN: KernelVersion = KernelVersion { major: 5, minor: 18 };

/// Settings of the backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EbpfConfig {
    /// cgroup v2 directory whose sockets are load-balanced.
    pub cgroup: PathBuf,
    /// Mount point of the BPF file system; it is mounted there if nothing is.
    pub bpffs: PathBuf,
    /// Names of interfaces that carry the packet programs, with `*` at the end for a prefix; empty is all but loopback.
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
    attacher: Attacher,
    counters: Counters,
    v4: Family<V4>,
    v6: Family<V6>,
    service_ids: RangeAllocator,
    started: Instant,
}

/// Maps and plan of one family.
struct Family<A: UserAddress>
where
    NodeSettings<A>: aya::Pod,
    FrontendKey<A>: aya::Pod,
{
    maps: FamilyMaps<A>,
    planner: Planner<A>,
    writes: Writes<A>,
    /// Lowest and highest NodePort ever programmed; only grows, so that no packet meets a range that is too small.
    node_ports: Option<(u16, u16)>,
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
        let mut attacher = Attacher::load(load(config, &directory)?, links, config.attach_mode, kernel)?;
        let v4 = Family::take(attacher.object(), "V4")?;
        let v6 = Family::take(attacher.object(), "V6")?;
        let counters = Counters::take(attacher.object())?;
        attacher.attach_cgroup(&config.cgroup)?;
        Ok(Self {
            config: config.clone(),
            directory,
            attacher,
            counters,
            v4,
            v6,
            service_ids: service_ids(config),
            started: Instant::now(),
        })
    }

    /// Removes what an `EbpfDataplane` with this bpffs made on this node, whether or not one is running.
    ///
    /// # Errors
    /// What could not be removed; that there is nothing is no error.
    pub fn remove(bpffs: &Path) -> Result<(), EbpfError> {
        for interface in nix::net::if_::if_nameindex().iter().flatten() {
            attach::remove_filters(&interface.name().to_string_lossy());
        }
        remove_directory(&bpffs.join(PIN_DIRECTORY))
            .map_err(|source| EbpfError::Bpffs { path: bpffs.to_owned(), source })
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Forgets what is believed and reads it from the kernel.
    fn adopt(&mut self, desired: &ServiceSnapshot) -> Result<(), SyncError> {
        let now_ms = self.now_ms();
        self.service_ids = service_ids(&self.config);
        self.v4.adopt(desired, IpFamily::V4, &mut self.service_ids, now_ms)?;
        self.v6.adopt(desired, IpFamily::V6, &mut self.service_ids, now_ms)
    }

    fn change(&mut self, name: &ServicePortName, desired: &ServiceSnapshot, report: &mut SyncReport) {
        let now_ms = self.now_ms();
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
    }

    fn sync_addresses(&mut self, node: &NodeConfig) -> Result<usize, SyncError> {
        Ok(self.v4.maps.write_node_addresses(&addresses(node))?
            + self.v6.maps.write_node_addresses(&addresses(node))?)
    }

    fn sync_interfaces(&mut self, node: &NodeConfig) -> Result<usize, SyncError> {
        let interfaces = node.interfaces.iter().filter(|(_, name)| carries_programs(&self.config.interfaces, name));
        let interfaces: BTreeMap<u32, Arc<str>> = interfaces.map(|(index, name)| (*index, name.clone())).collect();
        self.attacher.attach_interfaces(&interfaces).map_err(|error| SyncError::Kernel {
            object: "packet programs".to_owned(),
            source: io::Error::other(error.to_string()),
        })
    }
}

impl Dataplane for EbpfDataplane {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn sync(&mut self, desired: &ServiceSnapshot, scope: SyncScope<'_>) -> Result<SyncReport, SyncError> {
        let mut report = SyncReport::default();
        let node_changed = match scope {
            SyncScope::Full => {
                self.adopt(desired)?;
                let mut names: Vec<ServicePortName> = desired.services.keys().cloned().collect();
                names.extend(self.v4.stale(desired).chain(self.v6.stale(desired)));
                names.iter().for_each(|name| self.change(name, desired, &mut report));
                true
            }
            SyncScope::Changed(delta) => {
                delta.changed.iter().for_each(|name| self.change(name, desired, &mut report));
                delta.node_changed
            }
        };
        if node_changed {
            report.kernel_writes += self.sync_addresses(&desired.node)?;
        }
        report.kernel_writes += self.v4.commit(&desired.node, node_changed)?;
        report.kernel_writes += self.v6.commit(&desired.node, node_changed)?;
        // Last: an interface that refuses the programs keeps no Service from the others.
        if node_changed {
            report.kernel_writes += self.sync_interfaces(&desired.node)?;
        }
        Ok(report)
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
        remove_directory(&self.directory)
            .map_err(|source| SyncError::Kernel { object: self.directory.display().to_string(), source })
    }
}

impl<A: UserAddress> Family<A>
where
    NodeSettings<A>: aya::Pod,
    FrontendKey<A>: aya::Pod,
{
    fn take(ebpf: &mut aya::Ebpf, suffix: &str) -> Result<Self, SyncError> {
        let maps = FamilyMaps::take(ebpf, suffix)?;
        let planner = Planner::new(maps.limits());
        Ok(Self { maps, planner, writes: Writes::default(), node_ports: None })
    }

    fn adopt(
        &mut self,
        desired: &ServiceSnapshot,
        family: IpFamily,
        service_ids: &mut RangeAllocator,
        now_ms: u64,
    ) -> Result<(), SyncError> {
        let found = self.maps.read()?;
        self.planner = Planner::new(self.maps.limits());
        self.writes = Writes::default();
        let services = desired.services.values().filter(|service| service.name.family == family).map(Arc::as_ref);
        self.planner.adopt(&found, services, service_ids, now_ms, &mut self.writes);
        Ok(())
    }

    /// What is programmed and no longer desired.
    fn stale<'a>(&'a self, desired: &'a ServiceSnapshot) -> impl Iterator<Item = ServicePortName> + 'a {
        self.planner.names().filter(|name| !desired.services.contains_key(*name)).cloned()
    }

    fn change(
        &mut self,
        name: &ServicePortName,
        desired: Option<&Arc<ServicePort>>,
        service_ids: &mut RangeAllocator,
        now_ms: u64,
    ) -> Result<bool, plan::Full> {
        if let Some(service) = desired {
            self.widen_node_ports(service);
        }
        self.planner.change(name, desired, service_ids, now_ms, &mut self.writes)
    }

    fn widen_node_ports(&mut self, service: &ServicePort) {
        let node_ports = service.frontends.iter().filter(|frontend| frontend.address == FrontendAddress::NodePort);
        for port in node_ports.map(|frontend| frontend.port) {
            let (min, max) = self.node_ports.unwrap_or((port, port));
            self.node_ports = Some((min.min(port), max.max(port)));
        }
    }

    /// Writes the node's facts, then the plan: a NodePort is in range before its frontend exists.
    fn commit(&mut self, node: &NodeConfig, node_changed: bool) -> Result<usize, SyncError> {
        let mut writes = std::mem::take(&mut self.writes);
        writes.keep_moved_frontends();
        if node_changed || !writes.frontends.is_empty() {
            self.maps.write_settings(&node_settings(node, self.node_ports.unwrap_or((u16::MAX, 0))))?;
        }
        self.maps.write(&writes)
    }
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

/// Whether an interface is one of the configured ones; loopback never is.
fn carries_programs(patterns: &[String], interface: &str) -> bool {
    let matches = |pattern: &String| match pattern.strip_suffix('*') {
        Some(prefix) => interface.starts_with(prefix),
        None => interface == pattern,
    };
    interface != "lo" && (patterns.is_empty() || patterns.iter().any(matches))
}

/// Names what this process or this kernel lacks, before anything is made.
fn preflight() -> Result<KernelVersion, EbpfError> {
    let missing = probe::missing_capabilities(&[Capability::NetAdmin, Capability::SysAdmin, Capability::Bpf])?;
    if !missing.is_empty() {
        let names: Vec<&str> = missing.iter().map(|capability| capability.name()).collect();
        return Err(EbpfError::Privileges { missing: names.join(", ") });
    }
    let kernel = probe::kernel_version()?;
    if kernel < KERNEL_MIN { Err(EbpfError::KernelTooOld { found: kernel }) } else { Ok(kernel) }
}

/// Mounts the BPF file system where it is missing and makes our directory in it.
fn pin_directory(bpffs: &Path) -> Result<PathBuf, EbpfError> {
    let failed = |source| EbpfError::Bpffs { path: bpffs.to_owned(), source };
    fs::create_dir_all(bpffs).map_err(failed)?;
    let kind = nix::sys::statfs::statfs(bpffs).map_err(|errno| failed(errno.into()))?.filesystem_type();
    if kind != nix::sys::statfs::BPF_FS_MAGIC {
        node_sys::mount_bpffs(bpffs).map_err(|error| failed(io::Error::other(error.to_string())))?;
    }
    let directory = bpffs.join(PIN_DIRECTORY).join(format!("v{ABI_VERSION}"));
    fs::create_dir_all(directory.join("maps")).map_err(failed)?;
    Ok(directory)
}

fn load(config: &EbpfConfig, directory: &Path) -> Result<aya::Ebpf, EbpfError> {
    let maps = directory.join("maps");
    let sizes = map_sizes(config);
    let mut loader = EbpfLoader::new();
    for (map, size) in &sizes {
        check_pinned_size(&maps, map, *size)?;
        loader.map_max_entries(map, *size);
    }
    for map in PINNED_MAPS {
        loader.map_pin_path(map, maps.join(map));
    }
    loader.load(OBJECT).map_err(|source| EbpfError::Object { source: Box::new(source) })
}

/// The compiled programs, aligned as the ELF reader wants them.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/proxy-ebpf"));

/// Maps that outlive the process: all but the working space.
const PINNED_MAPS: [&str; 19] = [
    "FRONTENDS_V4",
    "FRONTENDS_V6",
    "SLOTS_V4",
    "SLOTS_V6",
    "BACKENDS_V4",
    "BACKENDS_V6",
    "FLOWS_V4",
    "FLOWS_V6",
    "AFFINITY_V4",
    "AFFINITY_V6",
    "AFFINITY_SOCKETS",
    "NODE_ADDRS_V4",
    "NODE_ADDRS_V6",
    "NODE_V4",
    "NODE_V6",
    "SOCKETS_V4",
    "SOCKETS_V6",
    "COUNTERS",
    "SERVICE_STATS",
];

fn map_sizes(config: &EbpfConfig) -> Vec<(&'static str, u32)> {
    let frontends = config.max_services.saturating_mul(FRONTENDS_PER_SERVICE);
    let slots = config.max_endpoints.saturating_mul(SLOTS_PER_ENDPOINT);
    vec![
        ("FRONTENDS_V4", frontends),
        ("FRONTENDS_V6", frontends),
        ("SLOTS_V4", slots),
        ("SLOTS_V6", slots),
        ("BACKENDS_V4", config.max_endpoints),
        ("BACKENDS_V6", config.max_endpoints),
        ("FLOWS_V4", config.max_flows),
        ("FLOWS_V6", config.max_flows),
        ("SERVICE_STATS", config.max_services.saturating_mul(2).saturating_add(1)),
    ]
}

fn check_pinned_size(directory: &Path, map: &str, wanted: u32) -> Result<(), EbpfError> {
    let Ok(info) = aya::maps::MapInfo::from_pin(directory.join(map)) else { return Ok(()) };
    let found = info.max_entries();
    if found == wanted {
        return Ok(());
    }
    Err(EbpfError::PinnedSize { map: map.to_owned(), path: directory.to_owned(), found, wanted })
}

fn remove_directory(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
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
        assert!(!carries_programs(&[], "lo"));
        assert!(!carries_programs(&["lo".to_owned()], "lo"));
    }
}
