//! From the configuration to a data plane: the one place that knows which ones this build has.

use super::Dataplane;
use super::ebpf::{EbpfDataplane, EbpfError};
use super::iptables::{IptablesDataplane, IptablesError};
use crate::config::{Config, Mode};

/// Why the kernel can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The eBPF data plane names what is missing.
    #[error("cannot use the eBPF data plane: {0}")]
    Ebpf(#[from] EbpfError),
    /// The iptables data plane names what is missing.
    #[error("cannot use the iptables data plane: {0}")]
    Iptables(#[from] IptablesError),
}

/// Opens the configured data plane. Frontends are not touched before its first sync.
///
/// # Errors
/// What this kernel, or this user, lacks.
pub fn open(config: &Config) -> Result<Box<dyn Dataplane>, OpenError> {
    match config.mode {
        Mode::Ebpf => Ok(Box::new(EbpfDataplane::open(&config.ebpf)?)),
        Mode::Iptables => Ok(Box::new(IptablesDataplane::open(&config.iptables)?)),
    }
}

/// Removes everything of ours from this node's kernel, whatever process made it.
///
/// # Errors
/// What could not be removed; that there is nothing is no error.
pub fn remove(config: &Config) -> Result<(), OpenError> {
    let iptables = IptablesDataplane::remove();
    EbpfDataplane::remove(&config.ebpf.bpffs)?;
    Ok(iptables?)
}
