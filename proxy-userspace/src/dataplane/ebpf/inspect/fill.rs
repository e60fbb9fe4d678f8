//! How full the maps are.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::MapInfo;
use node_sys::bpf::open_pinned;
use node_sys::read_entries;
use proxy_common::pod::Pod;
use proxy_common::{Backend, Frontend, V4, V6};

use super::super::flows::used;
use super::super::plan::block;
use super::{InspectError, Pinned, map_error};
use crate::status::{Attached, Counts, Description, MapFill, Status};

/// What a map's entries are counted by.
enum Kind {
    /// All that are there.
    Present,
    /// Backends that take flows.
    Active,
    /// Places of sockets.
    Taken,
    /// Flows, whose buckets are in the map of this name.
    Flows(&'static str),
    /// Slots that a frontend in the map of this name leads to.
    Referred(&'static str),
}

const MAPS: [(&str, Kind); 22] = [
    ("FRONTENDS_V4", Kind::Present),
    ("FRONTENDS_V6", Kind::Present),
    ("SLOTS_V4", Kind::Referred("FRONTENDS_V4")),
    ("SLOTS_V6", Kind::Referred("FRONTENDS_V6")),
    ("BACKENDS_V4", Kind::Active),
    ("BACKENDS_V6", Kind::Active),
    ("FLOWS_V4", Kind::Flows("FLOW_HEADS_V4")),
    ("FLOWS_V6", Kind::Flows("FLOW_HEADS_V6")),
    ("AFFINITY_V4", Kind::Present),
    ("AFFINITY_V6", Kind::Present),
    ("AFFINITY_SOCKETS", Kind::Present),
    ("CONNECTED_V4", Kind::Taken),
    ("CONNECTED_V6", Kind::Taken),
    ("CLUSTER_IPS_V4", Kind::Present),
    ("CLUSTER_IPS_V6", Kind::Present),
    ("SOURCE_RANGES_V4", Kind::Present),
    ("SOURCE_RANGES_V6", Kind::Present),
    ("ENDPOINTS_V4", Kind::Present),
    ("ENDPOINTS_V6", Kind::Present),
    ("NODE_ADDRS_V4", Kind::Present),
    ("NODE_ADDRS_V6", Kind::Present),
    ("INTERFACES", Kind::Present),
];

/// How full the maps that are pinned in `maps` are. Every entry is read: tens of milliseconds for full tables.
pub(in crate::dataplane::ebpf) fn fills(maps: &Path) -> Result<Vec<MapFill>, InspectError> {
    MAPS.iter().map(|(map, kind)| fill(maps, map, kind)).collect()
}

fn fill(maps: &Path, map: &str, kind: &Kind) -> Result<MapFill, InspectError> {
    let info = MapInfo::from_pin(maps.join(map)).map_err(|error| map_error(map, &error))?;
    let entries = match kind {
        Kind::Present => count(maps, map, |_| true)?,
        Kind::Taken => count(maps, map, is_taken)?,
        Kind::Active => count(maps, map, is_active)?,
        Kind::Flows(heads) => {
            let mut entries = 0;
            each(maps, heads, |value| entries += used(value))?;
            entries
        }
        Kind::Referred(frontends) => {
            let mut blocks = BTreeSet::new();
            each(maps, frontends, |value| blocks.extend(Frontend::from_bytes(value).as_ref().map(block)))?;
            blocks.iter().map(|(_, length)| *length as usize).sum()
        }
    };
    // A table of flows has twice the room that it is asked for.
    let spare = if matches!(kind, Kind::Flows(_)) { 2 } else { 1 };
    Ok(MapFill { map: map.to_owned(), entries, maximum: info.max_entries() as usize / spare })
}

fn is_active(value: &[u8]) -> bool {
    let v4 = Backend::<V4>::from_bytes(value).map(|backend| backend.takes_flows());
    v4.or_else(|| Backend::<V6>::from_bytes(value).map(|backend| backend.takes_flows())) == Some(true)
}

/// The value begins with a cookie, and no socket's is 0.
fn is_taken(value: &[u8]) -> bool {
    value.first_chunk::<{ size_of::<u64>() }>().is_some_and(|cookie| u64::from_ne_bytes(*cookie) != 0)
}

fn count(maps: &Path, map: &str, counts: impl Fn(&[u8]) -> bool) -> Result<usize, InspectError> {
    let mut entries = 0;
    each(maps, map, |value| entries += usize::from(counts(value)))?;
    Ok(entries)
}

fn each(maps: &Path, map: &str, mut visit: impl FnMut(&[u8])) -> Result<(), InspectError> {
    let failed = |reason: io::Error| InspectError::Map { map: map.to_owned(), reason: reason.to_string() };
    let info = MapInfo::from_pin(maps.join(map)).map_err(|error| map_error(map, &error))?;
    let pinned = open_pinned(&maps.join(map)).map_err(failed)?;
    let sizes = (info.key_size() as usize, info.value_size() as usize);
    read_entries(pinned.as_fd(), sizes, |_, value| visit(value)).map_err(failed)
}

impl Pinned {
    /// What the pins tell when no process does.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn status(&self) -> Result<Status, InspectError> {
        let maps_directory = self.directory.join("maps");
        let maps = fills(&maps_directory)?;
        let entries = |name: &str| maps.iter().find(|fill| fill.map == name).map_or(0, |fill| fill.entries);
        Ok(Status {
            running: false,
            mode: "ebpf".to_owned(),
            why: "its maps are pinned".to_owned(),
            abi: proxy_common::ABI_VERSION,
            counts: Counts {
                services: None,
                service_ports: self.service_ids()?.len(),
                frontends: [entries("FRONTENDS_V4"), entries("FRONTENDS_V6")],
                endpoints: [entries("BACKENDS_V4"), entries("BACKENDS_V6")],
            },
            audit: None,
            last_sync: None,
            kernel: Description { maps, programs: self.programs(), drift: None },
        })
    }

    /// Hands the value of every entry of a map to `visit`.
    pub(super) fn each(&self, map: &str, visit: impl FnMut(&[u8])) -> Result<(), InspectError> {
        each(&self.directory.join("maps"), map, visit)
    }

    /// The links that are pinned, by place. Filters of clsact are not among them: they have no links.
    fn programs(&self) -> Vec<Attached> {
        let links = fs::read_dir(self.directory.join("links")).into_iter().flatten().flatten();
        let names: BTreeSet<String> = links.map(|link| link.file_name().to_string_lossy().into_owned()).collect();
        let mut places: Vec<Attached> = Vec::new();
        for name in names {
            let (program, index) = name.split_once('-').unwrap_or((&name, ""));
            let interface = index.parse().ok().and_then(|index: u32| nix::net::if_::if_indextoname(index).ok());
            let place = match interface {
                Some(interface) => interface.to_string_lossy().into_owned(),
                None if index.is_empty() => "cgroup".to_owned(),
                // Pinned in another network namespace than ours.
                None => format!("interface {index}"),
            };
            match places.iter_mut().find(|attached| attached.place == place) {
                Some(attached) => attached.programs.push(program.to_owned()),
                None => places.push(Attached { place, programs: vec![program.to_owned()] }),
            }
        }
        places
    }
}
