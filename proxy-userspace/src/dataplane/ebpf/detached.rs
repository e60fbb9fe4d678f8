//! The programs and their maps without an interface, a cgroup or a pin: for those who run packets of their own through them.
//!
//! What is written to the maps, and by whom, is as in [`EbpfDataplane`](super::EbpfDataplane); only who calls the programs differs. No
//! thread ends flows.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use aya::maps::{HashMap, MapData, PerCpuArray, PerCpuValues};
use aya::programs::{Program, ProgramFd};
use aya::{Ebpf, EbpfLoader};
use node_sys::bpf::{TestRun, test_run};
use proxy_common::{Affinity, AffinityKey, Counter, V4, V6};

use super::alloc::RangeAllocator;
use super::attach::refused;
use super::family::{Constants, Family};
use super::flows;
use super::interfaces::{addresses, kinds_of_interfaces};
use super::load::{OBJECT, preflight};
use super::maps::{Counters, Interfaces, map_sizes};
use super::{EbpfConfig, EbpfError, service_ids};
use crate::dataplane::{SyncError, SyncScope};
use crate::model::{IpFamily, NodeConfig, ServicePortName, ServiceSnapshot};

/// Offsets of `mark` and `ifindex` in `struct __sk_buff` (include/uapi/linux/bpf.h), and the size of the whole.
const CONTEXT_MARK: usize = 8;
const CONTEXT_IFINDEX: usize = 40;
const CONTEXT_SIZE: usize = 192;

/// Where a packet meets a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// XDP: a frame as the driver received it.
    Frame,
    /// tc, into the node.
    Ingress,
    /// tc, out of the node.
    Egress,
}

/// What a program did with a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passage {
    /// What it returned: one of `TC_ACT_*` or of `XDP_*`.
    pub verdict: u32,
    /// The frame as it left it, Ethernet header first.
    pub frame: Vec<u8>,
    /// The packet's mark behind it; 0 behind [`Hook::Frame`].
    pub mark: u32,
}

/// Programs that no packet reaches but those of [`Detached::pass`].
pub struct Detached {
    object: Ebpf,
    counters: Counters,
    interfaces: Interfaces,
    programs: [ProgramFd; 3],
    v4: Family<V4>,
    v6: Family<V6>,
    service_ids: RangeAllocator,
    config: EbpfConfig,
    now_ms: u64,
}

impl Detached {
    /// Loads the programs with maps of the configured sizes, all empty. Nothing else of the configuration counts.
    ///
    /// # Errors
    /// [`EbpfError`] names what is missing.
    pub fn load(config: &EbpfConfig) -> Result<Self, EbpfError> {
        preflight()?;
        let (sizes, buckets) = (map_sizes(config), flows::buckets(config.max_flows));
        let mut loader = EbpfLoader::new();
        for (map, size) in &sizes {
            loader.map_max_entries(map, *size);
        }
        loader.override_global("FLOW_BUCKETS", &buckets, true);
        let mut object = loader.load(OBJECT).map_err(|source| EbpfError::Object { source: Box::new(source) })?;
        let programs = [
            loaded(&mut object, "xdp_ingress")?,
            loaded(&mut object, "tc_ingress")?,
            loaded(&mut object, "tc_egress")?,
        ];
        flows::make_secret(&mut object)?;
        let constants = Constants::of(config)?;
        Ok(Self {
            counters: Counters::take(&mut object)?,
            interfaces: Interfaces::take(&mut object)?,
            v4: Family::take(&mut object, "V4", constants)?,
            v6: Family::take(&mut object, "V6", constants)?,
            programs,
            object,
            service_ids: service_ids(config),
            config: config.clone(),
            now_ms: 0,
        })
    }

    /// Whether tunnels to other nodes are GUE, from the next sync on.
    pub fn set_tunnels(&mut self, gue: bool) {
        self.v4.set_tunnels(gue);
        self.v6.set_tunnels(gue);
    }

    /// Makes the maps express `desired`. What one sync frees the next one may use again.
    ///
    /// # Errors
    /// When the kernel refuses a write, or a map is full.
    pub fn sync(&mut self, desired: &ServiceSnapshot, scope: SyncScope<'_>) -> Result<(), SyncError> {
        self.now_ms += 1000;
        let (names, node_changed) = match scope {
            SyncScope::Changed(delta) => (delta.changed.clone(), delta.node_changed),
            SyncScope::Full => {
                self.service_ids = service_ids(&self.config);
                self.v4.adopt(desired, IpFamily::V4, &mut self.service_ids, self.now_ms)?;
                self.v6.adopt(desired, IpFamily::V6, &mut self.service_ids, self.now_ms)?;
                let mut names: Vec<ServicePortName> = desired.services.keys().cloned().collect();
                names.extend(self.v4.stale(desired).chain(self.v6.stale(desired)));
                (names, true)
            }
        };
        names.iter().try_for_each(|name| self.change(name, desired))?;
        if node_changed {
            self.sync_addresses(&desired.node)?;
        }
        let changed = match scope {
            SyncScope::Changed(delta) if !node_changed => Some(delta.cluster_ips.as_slice()),
            _ => None,
        };
        self.v4.commit(desired, changed)?;
        self.v6.commit(desired, changed)?;
        Ok(())
    }

    fn change(&mut self, name: &ServicePortName, desired: &ServiceSnapshot) -> Result<(), SyncError> {
        let service = desired.services.get(name);
        let (ids, now_ms) = (&mut self.service_ids, self.now_ms);
        let planned = match name.family {
            IpFamily::V4 => self.v4.change(name, service, ids, now_ms),
            IpFamily::V6 => self.v6.change(name, service, ids, now_ms),
        };
        match planned {
            Ok(_) => Ok(()),
            Err(full) => Err(SyncError::Kernel { object: format!("map {}", full.map), source: io::Error::other(full) }),
        }
    }

    fn sync_addresses(&mut self, node: &NodeConfig) -> Result<(), SyncError> {
        self.v4.maps.write_node_addresses(&addresses(node))?;
        self.v6.maps.write_node_addresses(&addresses(node))?;
        self.interfaces.write(&kinds_of_interfaces(&self.config, node)).map(|_written| ())
    }

    /// Lets the XDP program send frames out through an interface of this network namespace, whether or not its driver takes them.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn add_device(&mut self, interface: u32) -> Result<(), SyncError> {
        let failed = |source| SyncError::Kernel { object: "map DEVICES".to_owned(), source };
        let map = self.object.map_mut("DEVICES").ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let mut devices = aya::maps::xdp::DevMapHash::try_from(map).map_err(|e| failed(io::Error::other(e)))?;
        devices.insert(interface, interface, None, 0).map_err(|e| failed(io::Error::other(e)))
    }

    /// Runs the program of a hook on a packet that crosses `interface` of this network namespace with this mark. No interface sees it,
    /// whatever the program returns; only what it puts back on purpose (fragments) arrives.
    ///
    /// # Errors
    /// `EINVAL` for a frame without an Ethernet header, or an unknown interface.
    pub fn pass(&self, hook: Hook, interface: u32, mark: u32, frame: &[u8]) -> io::Result<Passage> {
        let [frames, ingress, egress] = &self.programs;
        let (program, context) = match hook {
            Hook::Frame => (frames, frame_context(interface, frame.len())),
            Hook::Ingress => (ingress, packet_context(interface, mark)),
            Hook::Egress => (egress, packet_context(interface, mark)),
        };
        let program: BorrowedFd<'_> = program.as_fd();
        let TestRun { verdict, frame, context } = test_run(program, frame, &context)?;
        let mark = if hook == Hook::Frame { 0 } else { word_at(&context, CONTEXT_MARK) };
        Ok(Passage { verdict, frame, mark })
    }

    /// Forgets every flow, every affinity, every datagram in fragments and the routes of tunnels.
    ///
    /// # Errors
    /// When the kernel refuses to delete one.
    pub fn forget_packets(&mut self) -> Result<(), SyncError> {
        // Keys and values by their sizes: only the programs know what is in them.
        empty::<[u8; 16], [u8; 36]>(&mut self.object, "DATAGRAMS_V4")?;
        empty::<[u8; 40], [u8; 48]>(&mut self.object, "DATAGRAMS_V6")?;
        empty::<[u8; 20], [u8; 2056]>(&mut self.object, "HELD_V4")?;
        empty::<[u8; 44], [u8; 2056]>(&mut self.object, "HELD_V6")?;
        flows::forget(&mut self.object, "FLOW_HEADS_V4")?;
        flows::forget(&mut self.object, "FLOW_HEADS_V6")?;
        forget_routes(&mut self.object)?;
        empty::<AffinityKey<V4>, Affinity>(&mut self.object, "AFFINITY_V4")?;
        empty::<AffinityKey<V6>, Affinity>(&mut self.object, "AFFINITY_V6")
    }

    /// What the programs have counted so far.
    pub fn count(&self, counter: Counter) -> u64 {
        self.counters.total(counter)
    }
}

fn loaded(object: &mut Ebpf, name: &'static str) -> Result<ProgramFd, EbpfError> {
    let failed = |reason: String| EbpfError::Load { program: name.to_owned(), reason };
    let program = object.program_mut(name).ok_or_else(|| EbpfError::MissingProgram { program: name.to_owned() })?;
    match program {
        Program::SchedClassifier(program) => program.load(),
        Program::Xdp(program) => program.load(),
        _ => return Err(failed("it is no packet program".to_owned())),
    }
    .map_err(|error| refused(name, &error))?;
    let descriptor = program.fd().map_err(|error| refused(name, &error))?;
    descriptor.try_clone().map_err(|error| failed(error.to_string()))
}

fn empty<K: aya::Pod, V: aya::Pod>(object: &mut Ebpf, name: &str) -> Result<(), SyncError> {
    let failed = |source| SyncError::Kernel { object: format!("map {name}"), source };
    let map = object.map_mut(name).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let mut map: HashMap<&mut MapData, K, V> = map.try_into().map_err(|e| failed(io::Error::other(e)))?;
    let keys: Vec<K> = map.keys().collect::<Result<_, _>>().map_err(|e| failed(io::Error::other(e)))?;
    keys.iter().try_for_each(|key| map.remove(key)).map_err(|e| failed(io::Error::other(e)))
}

/// The routes of tunnels; by their size: only the programs know what is in them.
fn forget_routes(object: &mut Ebpf) -> Result<(), SyncError> {
    let failed = |source| SyncError::Kernel { object: "map TUNNEL_ROUTES".to_owned(), source };
    let map = object.map_mut("TUNNEL_ROUTES").ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let mut routes: PerCpuArray<_, [u8; 32]> = map.try_into().map_err(|e| failed(io::Error::other(e)))?;
    let cpus = aya::util::nr_cpus().map_err(|(_, error)| failed(error))?;
    for index in 0..routes.len() {
        let none = PerCpuValues::try_from(vec![[0; 32]; cpus]).map_err(failed)?;
        routes.set(index, none, 0).map_err(|e| failed(io::Error::other(e)))?;
    }
    Ok(())
}

fn packet_context(interface: u32, mark: u32) -> Vec<u8> {
    let mut context = vec![0; CONTEXT_SIZE];
    for (offset, word) in [(CONTEXT_MARK, mark), (CONTEXT_IFINDEX, interface)] {
        if let Some(field) = context.get_mut(offset..offset + size_of::<u32>()) {
            field.copy_from_slice(&word.to_ne_bytes());
        }
    }
    context
}

/// `struct xdp_md`: the frame's end, and the interface at which it arrives.
fn frame_context(interface: u32, length: usize) -> Vec<u8> {
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    [0, length, 0, interface, 0, 0].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect()
}

fn word_at(bytes: &[u8], offset: usize) -> u32 {
    let word = bytes.get(offset..offset + size_of::<u32>()).and_then(|bytes| bytes.try_into().ok());
    word.map_or(0, u32::from_ne_bytes)
}
