//! What the programs counted for ServicePorts and backends.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use aya::maps::{MapData, PerCpuArray};
use aya::util::nr_cpus;
use node_sys::read_elements;
use proxy_common::pod::Pod;
use proxy_common::{COUNTED_SERVICES_MAX, Frontend, ServiceStats};
use tracing::debug;

use super::{InspectError, Pinned};
use crate::model::IpFamily;

/// What was counted for one ServicePort since its id was given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ServiceReading {
    /// Packets that were translated, both directions.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Connections.
    pub connections: u64,
}

/// Readings by service id; those of which nothing was counted are left out.
pub type Reading = BTreeMap<u32, ServiceReading>;

/// The map of ServicePorts' counters.
pub(in crate::dataplane::ebpf) struct ServiceCounts {
    map: PerCpuArray<MapData, ServiceStats>,
    /// Of the same map, for what aya does not do.
    descriptor: OwnedFd,
}

impl ServiceCounts {
    /// Over the map, with another descriptor of it.
    pub(in crate::dataplane::ebpf) fn new(map: PerCpuArray<MapData, ServiceStats>, descriptor: OwnedFd) -> Self {
        Self { map, descriptor }
    }

    /// What was counted for the ServicePorts 0 to `last` over all CPUs, by id; for fewer where the map ends or the kernel refuses. A system
    /// call for a thousand of them.
    pub(in crate::dataplane::ebpf) fn read_up_to(&self, last: u32) -> Vec<ServiceReading> {
        let last = last.min(COUNTED_SERVICES_MAX);
        let mut readings = Vec::with_capacity(last as usize + 1);
        if let Err(error) = self.read_at_once(last, &mut readings) {
            debug!(%error, "cannot read the counters of ServicePorts");
        }
        readings
    }

    fn read_at_once(&self, last: u32, readings: &mut Vec<ServiceReading>) -> io::Result<()> {
        let cpus = nr_cpus().map_err(|(_, error)| error)?;
        let size = size_of::<ServiceStats>();
        read_elements(self.descriptor.as_fd(), size * cpus, 0, last as usize + 1, |values| {
            readings.push(sum(values.chunks_exact(size).filter_map(ServiceStats::from_bytes)));
        })
    }

    /// Begins again at nothing: the id goes to another ServicePort.
    pub(in crate::dataplane::ebpf) fn forget(&mut self, id: u32) {
        if let Ok(values) = self.map.get(&id, 0)
            && values.iter().any(|value| *value != ServiceStats::default())
            && let Ok(zeros) = aya::maps::PerCpuValues::try_from(vec![ServiceStats::default(); values.len()])
        {
            // What is left of the other ServicePort's counts then is a number too large and no more.
            let _kept = self.map.set(id, zeros, 0);
        }
    }
}

fn sum(values: impl Iterator<Item = ServiceStats>) -> ServiceReading {
    values.fold(ServiceReading::default(), |sum, value| ServiceReading {
        packets: sum.packets + value.packets,
        bytes: sum.bytes + value.bytes,
        connections: sum.connections + value.connections,
    })
}

/// The map of the backends' counters of one family.
pub(in crate::dataplane::ebpf) struct BackendCounts {
    map: PerCpuArray<MapData, u64>,
}

impl BackendCounts {
    /// Over the map.
    pub(in crate::dataplane::ebpf) fn new(map: PerCpuArray<MapData, u64>) -> Self {
        Self { map }
    }

    /// Connections that a backend got; 0 for an id beyond the map.
    pub(in crate::dataplane::ebpf) fn read(&self, id: u32) -> u64 {
        self.map.get(&id, 0).map_or(0, |values| values.iter().sum())
    }

    /// Begins again at nothing: the id goes to another endpoint.
    pub(in crate::dataplane::ebpf) fn forget(&mut self, id: u32) {
        if let Ok(values) = self.map.get(&id, 0)
            && values.iter().any(|value| *value != 0)
            && let Ok(zeros) = aya::maps::PerCpuValues::try_from(vec![0; values.len()])
        {
            // As above.
            let _kept = self.map.set(id, zeros, 0);
        }
    }
}

impl Pinned {
    /// What was counted for every ServicePort up to the highest id that is given out.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn read_services(&self) -> Result<Reading, InspectError> {
        let counts = self.service_counts()?;
        let ids = self.service_ids()?;
        let counted = counts.read_up_to(ids.last().copied().unwrap_or_default());
        let of = |id: &u32| Some((*id, *counted.get(*id as usize)?));
        let reading = ids.iter().filter_map(of).filter(|(_, counted)| *counted != ServiceReading::default()).collect();
        Ok(reading)
    }

    /// The map of ServicePorts' counters.
    pub(in crate::dataplane::ebpf) fn service_counts(&self) -> Result<ServiceCounts, InspectError> {
        Ok(ServiceCounts::new(self.open("SERVICE_STATS")?, self.descriptor("SERVICE_STATS")?))
    }

    /// The map of the backends' counters of a family.
    pub(in crate::dataplane::ebpf) fn backend_counts(&self, family: IpFamily) -> Result<BackendCounts, InspectError> {
        let map = match family {
            IpFamily::V4 => "BACKEND_STATS_V4",
            IpFamily::V6 => "BACKEND_STATS_V6",
        };
        Ok(BackendCounts::new(self.open(map)?))
    }

    /// The ids of all ServicePorts that have a frontend.
    pub(super) fn service_ids(&self) -> Result<BTreeSet<u32>, InspectError> {
        let mut ids = BTreeSet::new();
        for map in ["FRONTENDS_V4", "FRONTENDS_V6"] {
            self.each(map, |value| ids.extend(Frontend::from_bytes(value).map(|frontend| frontend.service_id)))?;
        }
        Ok(ids)
    }
}
