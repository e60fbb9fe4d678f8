//! What is pinned where, so that it outlives this process, and what is done when somebody removes the pins.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use aya::maps::MapInfo;
use node_sys::bpf::{open_pinned, pin};
use proxy_common::ABI_VERSION;

use super::error::EbpfError;
use super::maps::map_sizes;
use super::{EbpfConfig, flows};

/// Directory below the bpffs mount that holds everything of ours.
pub(super) const PIN_DIRECTORY: &str = "trama";

/// Maps that outlive the process: all but the working space.
pub(super) const PINNED_MAPS: [&str; 40] = [
    "FRONTENDS_V4",
    "FRONTENDS_V6",
    "ABSENT_V4",
    "ABSENT_V6",
    "SLOTS_V4",
    "SLOTS_V6",
    "BACKENDS_V4",
    "BACKENDS_V6",
    "LOADS_V4",
    "LOADS_V6",
    "FLOWS_V4",
    "FLOWS_V6",
    "FLOW_HEADS_V4",
    "FLOW_HEADS_V6",
    "FLOW_SECRET",
    "AFFINITY_V4",
    "AFFINITY_V6",
    "AFFINITY_SOCKETS",
    "CLUSTER_IPS_V4",
    "CLUSTER_IPS_V6",
    "SOURCE_RANGES_V4",
    "SOURCE_RANGES_V6",
    "ENDPOINTS_V4",
    "ENDPOINTS_V6",
    "INTERFACES",
    "DEVICES",
    "NODE_ADDRS_V4",
    "NODE_ADDRS_V6",
    "NODE_V4",
    "NODE_V6",
    "SOCKETS_V4",
    "SOCKETS_V6",
    "CONNECTED_V4",
    "CONNECTED_V6",
    "COUNTERS",
    "SERVICE_STATS",
    "BACKEND_STATS_V4",
    "BACKEND_STATS_V6",
    "MONITOR",
    "EVENTS",
];

/// Where a version's maps are pinned.
pub(super) fn maps_of(directory: &Path) -> PathBuf {
    directory.join("maps")
}

/// Where a version's links are pinned.
pub(super) fn links_of(directory: &Path) -> PathBuf {
    directory.join("links")
}

/// The pinned maps, held open: a removed pin can be made again.
pub(super) struct Pins {
    directory: PathBuf,
    maps: Vec<(PathBuf, OwnedFd)>,
}

impl Pins {
    /// Opens every map that is pinned in `directory`.
    pub(super) fn hold(directory: &Path) -> Result<Self, EbpfError> {
        let open = |name: &&str| {
            let path = directory.join(name);
            match open_pinned(&path) {
                Ok(map) => Ok((path, map)),
                Err(source) => Err(EbpfError::Bpffs { path, source }),
            }
        };
        let maps = PINNED_MAPS.iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { directory: directory.to_owned(), maps })
    }

    /// Makes the pins again that are gone. Returns how many were.
    pub(super) fn restore(&self) -> io::Result<usize> {
        let mut gone = 0;
        for (path, map) in self.maps.iter().filter(|(path, _)| !path.exists()) {
            fs::create_dir_all(&self.directory)?;
            pin(map.as_fd(), path)?;
            gone += 1;
        }
        Ok(gone)
    }
}

/// Removes what a version with other layouts pinned beside `directory`: its programs, which would see the packets as well, go
/// with their links. What cannot be removed is removed by the next full sync.
pub(super) fn remove_other_versions(directory: &Path) {
    let versions = directory.parent().and_then(|parent| fs::read_dir(parent).ok());
    for other in versions.into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| path != directory) {
        match remove_directory(&other) {
            Ok(()) => tracing::info!(path = %other.display(), "removed what an earlier version left"),
            Err(error) => tracing::warn!(path = %other.display(), %error, "cannot remove what an earlier version left"),
        }
    }
}

/// What the name of a layout's second place ends with.
const RESIZED: &str = "-resized";

/// The two places where pins of this layout can be. Maps of other sizes take the place that is not in use, as another version does.
fn places(bpffs: &Path) -> [PathBuf; 2] {
    ["", RESIZED].map(|suffix| bpffs.join(PIN_DIRECTORY).join(format!("v{ABI_VERSION}{suffix}")))
}

/// Whether two versions' directories are the two places of one layout.
pub(super) fn is_same_layout(one: &Path, other: &Path) -> bool {
    let layout = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        Some(name.strip_suffix(RESIZED).unwrap_or(name).to_owned())
    };
    layout(one).is_some_and(|name| Some(name) == layout(other))
}

/// When a program was attached last that is pinned in a version's directory, or its pin went.
pub(super) fn attached_at(directory: &Path) -> Option<SystemTime> {
    fs::metadata(links_of(directory)).and_then(|links| links.modified()).ok()
}

/// The place in use: the one whose programs were attached last, and the first where nothing is.
pub(super) fn current_directory(bpffs: &Path) -> PathBuf {
    let [first, second] = places(bpffs);
    if attached_at(&second) > attached_at(&first) { second } else { first }
}

/// The configuration with the sizes of the maps in use, where those are larger: what they hold would not fit into smaller ones.
pub(super) fn with_sizes_in_use(config: &EbpfConfig) -> EbpfConfig {
    let maps = maps_of(&current_directory(&config.bpffs));
    let found = |name: &str| MapInfo::from_pin(maps.join(name)).map_or(0, |info| info.max_entries());
    let (services, endpoints) = (found("CLUSTER_IPS_V4"), found("BACKENDS_V4"));
    let flows = flows::flows_of(found("FLOW_HEADS_V4"));
    let in_use = EbpfConfig {
        max_services: config.max_services.max(services),
        max_endpoints: config.max_endpoints.max(endpoints),
        max_flows: config.max_flows.max(flows),
        ..config.clone()
    };
    if map_sizes(&in_use) != map_sizes(config) {
        let EbpfConfig { max_services, max_endpoints, max_flows, .. } = in_use;
        tracing::info!(
            max_services,
            max_endpoints,
            max_flows,
            "the maps in use are larger than configured and stay so"
        );
    }
    in_use
}

/// Makes our directory for maps of the configured sizes: the place in use where its maps
/// have them, else the other one.
pub(super) fn pin_directory(config: &EbpfConfig) -> Result<PathBuf, EbpfError> {
    let failed = |source| EbpfError::Bpffs { path: config.bpffs.clone(), source };
    let current = current_directory(&config.bpffs);
    let (maps, sizes) = (maps_of(&current), map_sizes(config));
    let pinned = |name: &str| MapInfo::from_pin(maps.join(name)).ok().map(|info| info.max_entries());
    let fits = sizes.iter().all(|(name, wanted)| pinned(name).is_none_or(|found| found == *wanted));
    if !fits {
        return make_other_place(&config.bpffs, &current);
    }
    fs::create_dir_all(maps_of(&current)).map_err(failed)?;
    Ok(current)
}

/// Makes the directory for maps of other sizes than those that are in use in `current`, one of the two places.
pub(super) fn make_other_place(bpffs: &Path, current: &Path) -> Result<PathBuf, EbpfError> {
    let failed = |source| EbpfError::Bpffs { path: bpffs.to_owned(), source };
    let directory = other_place(bpffs, current).map_err(failed)?;
    fs::create_dir_all(maps_of(&directory)).map_err(failed)?;
    Ok(directory)
}

/// The place that is not in use; what a process left there that ended before its first sync goes.
fn other_place(bpffs: &Path, current: &Path) -> io::Result<PathBuf> {
    let [first, second] = places(bpffs);
    let other = if first == current { second } else { first };
    remove_directory(&other)?;
    Ok(other)
}

/// Mounts the BPF file system where none is mounted.
pub(super) fn mount(bpffs: &Path) -> Result<(), EbpfError> {
    let failed = |source| EbpfError::Bpffs { path: bpffs.to_owned(), source };
    fs::create_dir_all(bpffs).map_err(failed)?;
    let kind = nix::sys::statfs::statfs(bpffs).map_err(|errno| failed(errno.into()))?.filesystem_type();
    if kind != nix::sys::statfs::BPF_FS_MAGIC {
        node_sys::mount_bpffs(bpffs).map_err(|error| failed(io::Error::other(error.to_string())))?;
    }
    Ok(())
}

/// Removes a directory of pins with everything in it; that there is none is no error.
pub(super) fn remove_directory(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
