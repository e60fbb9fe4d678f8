//! What is pinned where, so that it outlives this process, and what is done when somebody removes the pins.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use node_sys::bpf::{open_pinned, pin};
use proxy_common::ABI_VERSION;

use super::error::EbpfError;

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

/// Mounts the BPF file system where it is missing and makes our directory in it.
pub(super) fn pin_directory(bpffs: &Path) -> Result<PathBuf, EbpfError> {
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

/// Refuses a pinned map of another size than the configuration asks for; that there is none is no error.
pub(super) fn check_size(directory: &Path, map: &str, wanted: u32) -> Result<(), EbpfError> {
    let Ok(info) = aya::maps::MapInfo::from_pin(directory.join(map)) else { return Ok(()) };
    let found = info.max_entries();
    if found == wanted {
        return Ok(());
    }
    Err(EbpfError::PinnedSize { map: map.to_owned(), path: directory.to_owned(), found, wanted })
}

/// Removes a directory of pins with everything in it; that there is none is no error.
pub(super) fn remove_directory(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
