//! Why the eBPF backend cannot start.

use std::io;
use std::path::PathBuf;

/// What failed while opening the backend, with what to check next.
#[derive(Debug, thiserror::Error)]
pub enum EbpfError {
    /// Not root and without the capabilities.
    #[error("the eBPF backend lacks {missing}: run it as root")]
    Privileges {
        /// Names of the missing capabilities.
        missing: String,
    },
    /// The kernel is too old.
    #[error("the eBPF backend needs Linux 5.18 or later, this is {}.{}", found.major, found.minor)]
    KernelTooOld {
        /// Version of the running kernel.
        found: node_sys::probe::KernelVersion,
    },
    /// The kernel cannot be asked what it can do.
    #[error(transparent)]
    Probe {
        /// What failed.
        #[from]
        source: node_sys::SysError,
    },
    /// The cgroup cannot be opened.
    #[error("cannot open cgroup {}: {source}; --cgroup wants a directory of a cgroup2 mount", path.display())]
    Cgroup {
        /// The configured path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The bpffs directory cannot be used.
    #[error("cannot use {} for pins: {source}; --bpffs wants a place where a BPF file system is or can be mounted", path.display())]
    Bpffs {
        /// The configured path.
        path: PathBuf,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The object or its maps are refused.
    #[error("cannot load the BPF object: {source}")]
    Object {
        /// What aya says.
        #[source]
        source: Box<aya::EbpfError>,
    },
    /// The verifier refused a program.
    #[error("the kernel refused program {program}: {reason}; RUST_LOG=debug shows the verifier's log")]
    Load {
        /// Name of the program.
        program: String,
        /// What the kernel says.
        reason: String,
    },
    /// The object lacks a program: it was built from other sources.
    #[error("the BPF object has no program {program}")]
    MissingProgram {
        /// Name of the program.
        program: String,
    },
    /// A program cannot be attached.
    #[error("cannot attach {program} to {target}: {reason}")]
    Attach {
        /// Name of the program.
        program: String,
        /// Cgroup or interface.
        target: String,
        /// What aya and the kernel say.
        reason: String,
    },
    /// A link cannot be pinned.
    #[error("cannot pin {}: {source}", path.display())]
    Pin {
        /// Path of the pin.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: Box<aya::pin::PinError>,
    },
    /// Larger maps would not hold everything.
    #[error("cannot take over every map that is in use; the log says which before this")]
    Incomplete,
    /// A map cannot be used.
    #[error(transparent)]
    Map {
        /// What failed.
        #[from]
        source: crate::dataplane::SyncError,
    },
}
