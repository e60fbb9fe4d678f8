//! What is in the kernel, read from the pins: for those who look at a node, whether or not a process runs.

mod explain;
mod fill;
mod monitor;
mod stats;
mod tables;
mod trial;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use aya::maps::{Map, MapData, MapError};
use node_sys::bpf::open_pinned;

use super::pins::current_directory;

pub use self::explain::{Agreement, Explanation, Question};
pub use self::monitor::{Monitor, MonitorOptions, Seen, Watched};
pub use self::stats::{Reading, ServiceReading};

pub(super) use self::fill::fills;
pub(super) use self::stats::{BackendCounts, ServiceCounts};

/// Why the kernel's state can't be read.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// Nothing is pinned.
    #[error("no eBPF data plane is on this node: there is nothing at {}; a trama-proxy in another mode has no maps", path.display())]
    Absent {
        /// Where it would be.
        path: PathBuf,
    },
    /// A map can't be read or written.
    #[error("cannot use map {map}: {reason}")]
    Map {
        /// Its name.
        map: String,
        /// The kernel's answer.
        reason: String,
    },
    /// The packet program can't be run.
    #[error("cannot run {program} on a packet of our own: {reason}")]
    Program {
        /// Its name.
        program: &'static str,
        /// The kernel's answer.
        reason: String,
    },
    /// Two watchers would take each other's events.
    #[error("another monitor watches this node until {seconds} s from now at least; end it first")]
    Watched {
        /// When it has to renew itself, rounded up.
        seconds: u64,
    },
}

/// The data plane's pins on this node.
#[derive(Debug, Clone)]
pub struct Pinned {
    directory: PathBuf,
}

impl Pinned {
    /// Looks for what is pinned below this mount of the BPF file system.
    ///
    /// # Errors
    /// [`InspectError::Absent`] when nothing of this version is.
    pub fn find(bpffs: &Path) -> Result<Self, InspectError> {
        let directory = current_directory(bpffs);
        if directory.join("maps").is_dir() {
            Ok(Self { directory })
        } else {
            Err(InspectError::Absent { path: directory })
        }
    }

    /// Of a version, whose pins are in this directory.
    pub(super) fn at(version: &Path) -> Self {
        Self { directory: version.to_owned() }
    }

    fn path(&self, map: &str) -> PathBuf {
        self.directory.join("maps").join(map)
    }

    /// A descriptor of a map.
    fn descriptor(&self, map: &str) -> Result<OwnedFd, InspectError> {
        open_pinned(&self.path(map)).map_err(|error| map_error(map, &error))
    }

    /// Opens a map as `M`.
    fn open<M>(&self, map: &str) -> Result<M, InspectError>
    where
        M: TryFrom<Map>,
        M::Error: std::fmt::Display,
    {
        let data = MapData::from_pin(self.path(map)).map_err(|error| map_error(map, &error))?;
        let typed = Map::from_map_data(data).map_err(|error| map_error(map, &error))?;
        M::try_from(typed).map_err(|error| InspectError::Map { map: map.to_owned(), reason: error.to_string() })
    }
}

/// The kernel's answer with what caused it: aya keeps that in the cause.
fn map_error(map: &str, error: &dyn std::error::Error) -> InspectError {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    let reason = causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
    InspectError::Map { map: map.to_owned(), reason }
}

/// What a map holds under a key; `None` for nothing.
fn absent<T>(map: &str, result: Result<T, MapError>) -> Result<Option<T>, InspectError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(map_error(map, &error)),
    }
}
