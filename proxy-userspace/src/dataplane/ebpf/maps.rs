//! The maps as this process holds them, and the one place that writes them.

mod absent;
mod compare;

pub(super) use self::compare::COMPARED;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray};
use node_sys::bpf::MappedArray;
use proxy_common::flow_table::WAYS;
use proxy_common::{
    ABSENT_WORDS, Backend, CLUSTER_IP_IN_USE, COUNTED_BACKENDS_MAX, COUNTED_SERVICES_MAX, Counter, EndpointKey,
    Frontend, FrontendKey, NodeAddress, NodeSettings, SourceRange,
};

use self::absent::Absent;
use super::encode::UserAddress;
use super::flows;
use super::inspect::{BackendCounts, ServiceCounts};
use super::plan::{Found, Limits, Range, Writes, block};
use crate::dataplane::SyncError;

/// Slots for each endpoint: a block is rewritten before the old one is freed, and the largest services want room.
const SLOTS_PER_ENDPOINT: u32 = 4;

/// Frontends for each Service: ClusterIP, NodePort, external and load-balancer addresses.
const FRONTENDS_PER_SERVICE: u32 = 4;

/// Endpoints of this node, of one family, that other nodes' tunnels may lead to: one for each ServicePort that is reached from outside.
pub(super) const TUNNEL_ENDPOINTS_MAX: u32 = 65_536;

/// The maps of one family.
pub(super) struct FamilyMaps<A: UserAddress>
where
    NodeSettings<A>: aya::Pod,
    FrontendKey<A>: aya::Pod,
    SourceRange<A>: aya::Pod,
    EndpointKey<A>: aya::Pod,
{
    frontends: HashMap<MapData, FrontendKey<A>, Frontend>,
    absent: Absent<A>,
    node_addresses: HashMap<MapData, A, NodeAddress>,
    settings: Array<MapData, NodeSettings<A>>,
    cluster_ips: HashMap<MapData, A, u32>,
    cluster_ips_max: u32,
    source_ranges: LpmTrie<MapData, SourceRange<A>, u32>,
    endpoints: HashMap<MapData, EndpointKey<A>, u32>,
    /// What `node_addresses` was last made to hold.
    addresses: BTreeMap<A, NodeAddress>,
    descriptors: Descriptors,
    slots: MappedArray,
    backends: MappedArray,
    /// What the backends were given.
    connections: BackendCounts,
    limits: Limits,
}

/// The maps that are read whole.
struct Descriptors {
    frontends: OwnedFd,
    node_addresses: OwnedFd,
    cluster_ips: OwnedFd,
    source_ranges: OwnedFd,
    endpoints: OwnedFd,
}

impl<A: UserAddress> FamilyMaps<A>
where
    NodeSettings<A>: aya::Pod,
    FrontendKey<A>: aya::Pod,
    SourceRange<A>: aya::Pod,
    EndpointKey<A>: aya::Pod,
{
    /// Takes the maps with this suffix (`V4`, `V6`) out of the loaded object.
    pub(super) fn take(ebpf: &mut Ebpf, suffix: &str) -> Result<Self, SyncError> {
        let frontends = take(ebpf, &format!("FRONTENDS_{suffix}"))?;
        let cluster_ips = take(ebpf, &format!("CLUSTER_IPS_{suffix}"))?;
        let source_ranges = take(ebpf, &format!("SOURCE_RANGES_{suffix}"))?;
        let endpoints = take(ebpf, &format!("ENDPOINTS_{suffix}"))?;
        let node_addresses = take(ebpf, &format!("NODE_ADDRS_{suffix}"))?;
        let slots = take_data(ebpf, &format!("SLOTS_{suffix}"))?;
        let absent = take_data(ebpf, &format!("ABSENT_{suffix}"))?;
        let backends = take_data(ebpf, &format!("BACKENDS_{suffix}"))?;
        let limits = Limits {
            frontends: max_entries(&frontends, "frontends")?,
            slots: data_entries(&slots, "slots")?,
            backends: data_entries(&backends, "backends")?,
            source_ranges: max_entries(&source_ranges, "source_ranges")?,
            endpoints: max_entries(&endpoints, "endpoints")?,
        };
        let descriptors = Descriptors {
            frontends: descriptor(&frontends, "frontends")?,
            node_addresses: descriptor(&node_addresses, "node_addresses")?,
            cluster_ips: descriptor(&cluster_ips, "cluster_ips")?,
            source_ranges: descriptor(&source_ranges, "source_ranges")?,
            endpoints: descriptor(&endpoints, "endpoints")?,
        };
        Ok(Self {
            addresses: BTreeMap::new(),
            descriptors,
            frontends: open(frontends, "frontends")?,
            absent: Absent::new(mapped(&absent, ABSENT_WORDS, size_of::<u64>(), "absent")?),
            node_addresses: open(node_addresses, "node_addresses")?,
            settings: open(take(ebpf, &format!("NODE_{suffix}"))?, "node_settings")?,
            cluster_ips_max: max_entries(&cluster_ips, "cluster_ips")?,
            cluster_ips: open(cluster_ips, "cluster_ips")?,
            source_ranges: open(source_ranges, "source_ranges")?,
            endpoints: open(endpoints, "endpoints")?,
            connections: BackendCounts::new(open(take(ebpf, &format!("BACKEND_STATS_{suffix}"))?, "backend_stats")?),
            slots: mapped(&slots, limits.slots, size_of::<u32>(), "slots")?,
            backends: mapped(&backends, limits.backends, size_of::<Backend<A>>(), "backends")?,
            limits,
        })
    }

    /// Room in the maps.
    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    /// Reads everything that is programmed.
    pub(super) fn read(&self) -> Result<Found<A>, SyncError> {
        let frontends = self.frontends.iter().collect::<Result<Vec<_>, _>>().map_err(|e| failed("frontends", e))?;
        let mut backends = Vec::new();
        let words = size_of::<Backend<A>>() / size_of::<u32>();
        let used = |id, words: &[u32]| {
            let backend = A::backend_from_words(words).unwrap_or_default();
            if backend != Backend::default() {
                backends.push((id, backend));
            }
        };
        self.backends.read(0, self.limits.backends, words, used).map_err(|source| kernel("backends", source))?;
        let ranges: BTreeSet<(u32, u32)> = frontends.iter().map(|(_, value)| block(value)).collect();
        let blocks: Result<_, _> = ranges.into_iter().map(|range| Ok((range, self.read_block(range)?))).collect();
        let blocks = blocks?;
        let range = |key: Key<SourceRange<A>>| (key.prefix_len(), key.data());
        let ranges = self.source_ranges.keys().map(|key| key.map(range)).collect::<Result<Vec<_>, _>>();
        let ranges = ranges.map_err(|e| failed("source_ranges", e))?;
        let endpoints = self.endpoints.iter().collect::<Result<_, _>>().map_err(|e| failed("endpoints", e))?;
        Ok(Found { frontends, backends, blocks, ranges, endpoints })
    }

    /// The backend ids of a slot block; none for a range that this map does not have.
    fn read_block(&self, (first, length): (u32, u32)) -> Result<Vec<u32>, SyncError> {
        let mut ids = Vec::with_capacity(length as usize);
        match self.slots.read(first, length, 1, |_, words| ids.extend_from_slice(words)) {
            Err(error) if error.kind() != io::ErrorKind::InvalidInput => Err(kernel("slots", error)),
            _ => Ok(ids),
        }
    }

    /// Executes a plan, in the order that its documentation gives. Returns the number of entries written.
    pub(super) fn write(&mut self, writes: &Writes<A>) -> Result<usize, SyncError> {
        self.write_backends(&writes.backends)?;
        for (index, id) in &writes.slots {
            self.slots.write(*index, &[*id], 0).map_err(|source| kernel("slots", source))?;
        }
        for range in &writes.ranges {
            self.source_ranges.insert(&key(range), 1, 0).map_err(|e| failed("source_ranges", e))?;
        }
        for (key, id) in &writes.endpoints {
            self.endpoints.insert(key, id, 0).map_err(|e| failed("endpoints", e))?;
        }
        for (key, value) in &writes.frontends {
            self.absent.add(&key.address).map_err(|source| kernel("absent", source))?;
            self.frontends.insert(key, value, 0).map_err(|e| failed("frontends", e))?;
        }
        for key in &writes.deleted {
            ignore_missing(self.frontends.remove(key)).map_err(|e| failed("frontends", e))?;
        }
        for range in &writes.ranges_gone {
            ignore_missing(self.source_ranges.remove(&key(range))).map_err(|e| failed("source_ranges", e))?;
        }
        for key in &writes.endpoints_gone {
            ignore_missing(self.endpoints.remove(key)).map_err(|e| failed("endpoints", e))?;
        }
        self.write_backends(&writes.retired)?;
        for (id, _) in &writes.retired {
            self.connections.forget(*id);
        }
        Ok(writes.len())
    }

    fn write_backends(&mut self, backends: &[(u32, Backend<A>)]) -> Result<(), SyncError> {
        for (id, backend) in backends {
            let (words, state) = A::backend_words(backend);
            self.backends.write(*id, &words, state).map_err(|source| kernel("backends", source))?;
        }
        Ok(())
    }

    /// Has the programs look for every address: another process's bits are not known to be right.
    pub(super) fn forget_absent(&mut self) -> Result<(), SyncError> {
        self.absent.forget().map_err(|source| kernel("absent", source))
    }

    /// Tells the programs what they need not look for, now that `frontends`, `cluster_ips` and the node's addresses are all there are.
    pub(super) fn write_absent<'a>(
        &mut self,
        frontends: impl Iterator<Item = &'a (FrontendKey<A>, Frontend)>,
        cluster_ips: &'a BTreeSet<A>,
    ) -> Result<(), SyncError>
    where
        A: 'a,
    {
        let present = frontends.map(|(key, _)| &key.address).chain(cluster_ips).chain(self.addresses.keys());
        self.absent.replace(present).map_err(|source| kernel("absent", source))
    }

    /// Writes the node's facts.
    pub(super) fn write_settings(&mut self, settings: &NodeSettings<A>) -> Result<(), SyncError> {
        self.settings.set(0, settings, 0).map_err(|e| failed("node_settings", e))
    }

    /// The node's facts as the kernel has them; all zero before they are written.
    pub(super) fn settings(&self) -> Result<NodeSettings<A>, SyncError> {
        self.settings.get(&0, 0).map_err(|e| failed("node_settings", e))
    }

    /// Room for ClusterIPs.
    pub(super) fn cluster_ips_max(&self) -> usize {
        self.cluster_ips_max as usize
    }

    /// The ClusterIPs that the kernel has.
    pub(super) fn cluster_ips(&self) -> Result<BTreeSet<A>, SyncError> {
        self.cluster_ips.keys().collect::<Result<_, _>>().map_err(|e| failed("cluster_ips", e))
    }

    /// Adds or removes a ClusterIP.
    pub(super) fn write_cluster_ip(&mut self, address: A, in_use: bool) -> Result<(), SyncError> {
        if in_use {
            self.absent.add(&address).map_err(|source| kernel("absent", source))?;
        }
        let written = match in_use {
            true => self.cluster_ips.insert(address, CLUSTER_IP_IN_USE, 0),
            false => ignore_missing(self.cluster_ips.remove(&address)),
        };
        written.map_err(|e| failed("cluster_ips", e))
    }

    /// Makes `node_addresses` equal to `desired`.
    pub(super) fn write_node_addresses(&mut self, desired: &[(A, NodeAddress)]) -> Result<usize, SyncError> {
        let present: Vec<A> = self.node_addresses.keys().filter_map(Result::ok).collect();
        let gone = present.iter().filter(|address| !desired.iter().any(|(wanted, _)| wanted == *address));
        let mut written = desired.len();
        for address in gone {
            ignore_missing(self.node_addresses.remove(address)).map_err(|e| failed("node_addresses", e))?;
            written += 1;
        }
        for (address, value) in desired {
            self.absent.add(address).map_err(|source| kernel("absent", source))?;
            self.node_addresses.insert(address, value, 0).map_err(|e| failed("node_addresses", e))?;
        }
        self.addresses = desired.iter().copied().collect();
        Ok(written)
    }
}

fn key<A: UserAddress>(range: &Range<A>) -> Key<SourceRange<A>>
where
    SourceRange<A>: aya::Pod,
{
    Key::new(range.0, range.1)
}

/// What the packets of interfaces are.
pub(super) struct Interfaces {
    map: HashMap<MapData, u32, u32>,
    limit: usize,
    /// What it was last made to hold.
    held: BTreeMap<u32, u32>,
}

impl Interfaces {
    /// Takes the map out of the loaded object.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, SyncError> {
        let map = take(ebpf, "INTERFACES")?;
        let limit = max_entries(&map, "interfaces")? as usize;
        Ok(Self { map: open(map, "interfaces")?, limit, held: BTreeMap::new() })
    }

    /// Makes the map equal to `desired`, as far as there is room. Returns the number of entries written.
    pub(super) fn write(&mut self, desired: &BTreeMap<u32, u32>) -> Result<usize, SyncError> {
        let present: BTreeMap<u32, u32> = self.map.iter().filter_map(Result::ok).collect();
        let mut written = 0;
        for index in present.keys().filter(|index| !desired.contains_key(index)) {
            ignore_missing(self.map.remove(index)).map_err(|e| failed("interfaces", e))?;
            written += 1;
        }
        if desired.len() > self.limit {
            tracing::error!(
                interfaces = desired.len(),
                limit = self.limit,
                "pods behind the other interfaces are not known as pods"
            );
        }
        // What is there already goes first: it needs no room.
        let (known, new): (Vec<_>, Vec<_>) = desired.iter().partition(|(index, _)| present.contains_key(index));
        self.held = known.into_iter().chain(new).take(self.limit).map(|(index, kinds)| (*index, *kinds)).collect();
        for (index, kinds) in self.held.iter().filter(|(index, kinds)| present.get(index) != Some(kinds)) {
            self.map.insert(index, kinds, 0).map_err(|e| failed("interfaces", e))?;
            written += 1;
        }
        Ok(written)
    }

    /// Whether the map holds what it was last given, and nothing else.
    pub(super) fn are_intact(&self) -> bool {
        self.map.iter().collect::<Result<BTreeMap<u32, u32>, _>>().is_ok_and(|present| present == self.held)
    }
}

/// The counters of the programs.
pub(super) struct Counters {
    totals: PerCpuArray<MapData, u64>,
}

/// Whether a predecessor's programs open the new flows.
pub(super) struct TakingOver {
    map: Array<MapData, u32>,
    is_set: bool,
}

impl TakingOver {
    /// Takes the map out of the loaded object.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, SyncError> {
        Ok(Self { map: open(take(ebpf, "TAKING_OVER")?, "taking_over")?, is_set: false })
    }

    /// From now on they do: to be called before a packet program of ours is attached in front of one of theirs.
    pub(super) fn begin(&mut self) -> Result<(), SyncError> {
        self.is_set = true;
        self.map.set(0, 1, 0).map_err(|error| failed("taking_over", error))
    }

    /// From now on ours do: to be called when they are on every interface.
    pub(super) fn end(&mut self) -> Result<(), SyncError> {
        if self.is_set {
            self.map.set(0, 0, 0).map_err(|error| failed("taking_over", error))?;
            self.is_set = false;
        }
        Ok(())
    }
}

impl Counters {
    /// Takes the map out of the loaded object.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, SyncError> {
        Ok(Self { totals: open(take(ebpf, "COUNTERS")?, "counters")? })
    }

    /// Sum of a counter over all CPUs; 0 when the kernel does not answer.
    pub(super) fn total(&self, counter: Counter) -> u64 {
        self.totals.get(&(counter as u32), 0).map_or(0, |values| values.iter().sum())
    }
}

/// Takes the counters of ServicePorts out of the loaded object.
pub(super) fn take_service_counts(ebpf: &mut Ebpf) -> Result<ServiceCounts, SyncError> {
    let map = take(ebpf, "SERVICE_STATS")?;
    let descriptor = descriptor(&map, "service_stats")?;
    Ok(ServiceCounts::new(open(map, "service_stats")?, descriptor))
}

pub(super) fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map, SyncError> {
    ebpf.take_map(name).ok_or_else(|| failed(name, "it is not in the object"))
}

fn take_data(ebpf: &mut Ebpf, name: &str) -> Result<MapData, SyncError> {
    match take(ebpf, name)? {
        Map::Array(data) => Ok(data),
        _ => Err(failed(name, "it is not an array")),
    }
}

pub(super) fn open<M: TryFrom<Map>>(map: Map, name: &str) -> Result<M, SyncError>
where
    M::Error: std::fmt::Display,
{
    M::try_from(map).map_err(|e| failed(name, e))
}

fn max_entries(map: &Map, name: &str) -> Result<u32, SyncError> {
    match map {
        Map::HashMap(data) | Map::LpmTrie(data) => data_entries(data, name),
        _ => Err(failed(name, "it is neither a hash nor a trie")),
    }
}

/// A descriptor of the map beside the one that its typed view takes.
fn descriptor(map: &Map, name: &str) -> Result<OwnedFd, SyncError> {
    match map {
        Map::HashMap(data) | Map::LpmTrie(data) | Map::PerCpuArray(data) => {
            data.fd().as_fd().try_clone_to_owned().map_err(|source| kernel(name, source))
        }
        _ => Err(failed(name, "it is neither a hash nor a trie nor a per-CPU array")),
    }
}

fn data_entries(data: &MapData, name: &str) -> Result<u32, SyncError> {
    Ok(data.info().map_err(|e| failed(name, e))?.max_entries())
}

fn mapped(data: &MapData, entries: u32, value_size: usize, name: &str) -> Result<MappedArray, SyncError> {
    MappedArray::map(data.fd().as_fd(), entries, value_size).map_err(|source| kernel(name, source))
}

fn ignore_missing(result: Result<(), aya::maps::MapError>) -> Result<(), aya::maps::MapError> {
    match result {
        Err(aya::maps::MapError::KeyNotFound) => Ok(()),
        Err(aya::maps::MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn failed(map: &str, reason: impl std::fmt::Display) -> SyncError {
    kernel(map, io::Error::other(reason.to_string()))
}

fn kernel(map: &str, source: io::Error) -> SyncError {
    SyncError::Kernel { object: format!("map {map}"), source }
}

/// Entries of each map whose size is configured.
pub(super) fn map_sizes(config: &super::EbpfConfig) -> Vec<(&'static str, u32)> {
    let frontends = config.max_services.saturating_mul(FRONTENDS_PER_SERVICE);
    let slots = config.max_endpoints.saturating_mul(SLOTS_PER_ENDPOINT);
    let flow_buckets = flows::buckets(config.max_flows);
    vec![
        ("FRONTENDS_V4", frontends),
        ("FRONTENDS_V6", frontends),
        ("SLOTS_V4", slots),
        ("SLOTS_V6", slots),
        ("BACKENDS_V4", config.max_endpoints),
        ("BACKENDS_V6", config.max_endpoints),
        ("LOADS_V4", config.max_endpoints),
        ("LOADS_V6", config.max_endpoints),
        ("FLOWS_V4", flow_buckets.saturating_mul(WAYS)),
        ("FLOWS_V6", flow_buckets.saturating_mul(WAYS)),
        ("FLOW_HEADS_V4", flow_buckets),
        ("FLOW_HEADS_V6", flow_buckets),
        ("CLUSTER_IPS_V4", config.max_services),
        ("CLUSTER_IPS_V6", config.max_services),
        ("SOURCE_RANGES_V4", frontends),
        ("SOURCE_RANGES_V6", frontends),
        ("ENDPOINTS_V4", config.max_endpoints.min(TUNNEL_ENDPOINTS_MAX)),
        ("ENDPOINTS_V6", config.max_endpoints.min(TUNNEL_ENDPOINTS_MAX)),
        ("SERVICE_STATS", config.max_services.saturating_mul(2).min(COUNTED_SERVICES_MAX).saturating_add(1)),
        ("BACKEND_STATS_V4", config.max_endpoints.min(COUNTED_BACKENDS_MAX)),
        ("BACKEND_STATS_V6", config.max_endpoints.min(COUNTED_BACKENDS_MAX)),
    ]
}
