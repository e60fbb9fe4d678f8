//! Whether this kernel can, and the compiled programs into it.

use std::path::Path;

use aya::EbpfLoader;
use aya::programs::Program;
use node_sys::probe::{self, Capability, KernelVersion};

use super::attach::refused;
use super::flows;
use super::maps::map_sizes;
use super::pins::PINNED_MAPS;
use super::{EbpfConfig, EbpfError};

/// First kernel with everything that the programs need; the last of it was `bpf_set_retval`.
const KERNEL_MIN: KernelVersion = KernelVersion { major: 5, minor: 18 };

/// Names what this process or this kernel lacks, before anything is made. CAP_SYS_ADMIN is not among it: only mounting a BPF
/// file system that nobody has mounted takes it.
pub(super) fn preflight() -> Result<KernelVersion, EbpfError> {
    let missing = probe::missing_capabilities(&[Capability::NetAdmin, Capability::Perfmon, Capability::Bpf])?;
    if !missing.is_empty() {
        let names: Vec<&str> = missing.iter().map(|capability| capability.name()).collect();
        return Err(EbpfError::Privileges { missing: names.join(", ") });
    }
    let kernel = probe::kernel_version()?;
    if kernel < KERNEL_MIN { Err(EbpfError::KernelTooOld { found: kernel }) } else { Ok(kernel) }
}

/// Loads the object with maps of the configured sizes, and those that are pinned as they are.
pub(super) fn load(config: &EbpfConfig, directory: &Path) -> Result<aya::Ebpf, EbpfError> {
    let maps = directory.join("maps");
    let sizes = map_sizes(config);
    let mut loader = EbpfLoader::new();
    for (map, size) in &sizes {
        loader.map_max_entries(map, *size);
    }
    let buckets = flows::buckets(config.max_flows);
    loader.override_global("FLOW_BUCKETS", &buckets, true);
    for map in PINNED_MAPS {
        loader.map_pin_path(map, maps.join(map));
    }
    loader.load(OBJECT).map_err(|source| EbpfError::Object { source: Box::new(source) })
}

/// Loads all programs of `ebpf` but the iterators into the kernel; attaches none.
pub(super) fn load_programs(ebpf: &mut aya::Ebpf) -> Result<(), EbpfError> {
    for (name, program) in ebpf.programs_mut() {
        let loaded = match program {
            Program::SchedClassifier(program) => program.load(),
            Program::CgroupSockAddr(program) => program.load(),
            Program::CgroupSock(program) => program.load(),
            Program::Xdp(program) => program.load(),
            _ => continue,
        };
        loaded.map_err(|source| refused(name, &source))?;
    }
    Ok(())
}

/// Gives the memory back that [`OBJECT`] takes once it has been read; whoever reads it again gets it again.
pub(super) fn release_object() {
    node_sys::release_pages(OBJECT);
}

/// The compiled programs, aligned as the ELF reader wants them.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/proxy-ebpf"));
