//! From the configuration to a data plane: the one place that knows which ones this build has.

use std::path::Path;

use tracing::{info, warn};

use super::Dataplane;
use super::ebpf::{EbpfDataplane, EbpfError};
use super::iptables::{IptablesDataplane, IptablesError};
use super::ipvs::{IpvsDataplane, IpvsOpenError};
use super::nftables::{NftablesDataplane, NftablesOpenError};
use crate::config::{Config, Mode};
use crate::conntrack::held;

/// What [`Mode::Auto`] tries, best first. IPVS is for those who ask for it: its kernel part gets no new features.
const CANDIDATES: [Mode; 3] = [Mode::Ebpf, Mode::Nftables, Mode::Iptables];

/// Why the kernel can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The eBPF data plane names what is missing.
    #[error("cannot use the eBPF data plane: {0}")]
    Ebpf(#[from] EbpfError),
    /// The iptables data plane names what is missing.
    #[error("cannot use the iptables data plane: {0}")]
    Iptables(#[from] IptablesError),
    /// The IPVS data plane names what is missing.
    #[error("cannot use the IPVS data plane: {0}")]
    Ipvs(#[from] IpvsOpenError),
    /// No mode works, each with its reason.
    #[error("no data plane works on this node: {0}")]
    None(String),
    /// Not everything could be removed, each with its reason.
    #[error("cannot remove everything: {0}")]
    Remove(String),
    /// The nftables data plane names what is missing.
    #[error("cannot use the nftables data plane: {0}")]
    Nftables(#[from] NftablesOpenError),
}

/// Opens the configured data plane. Frontends are not touched before its first sync.
///
/// # Errors
/// What this kernel, or this user, lacks.
pub fn open(config: &Config) -> Result<Opened, OpenError> {
    match config.mode {
        Mode::Auto => best(|mode| open_mode(mode, config)).map(|(dataplane, why)| Opened { dataplane, why }),
        mode => open_mode(mode, config).map(|dataplane| Opened { dataplane, why: "as configured".to_owned() }),
    }
}

/// A data plane that works here.
pub struct Opened {
    /// It.
    pub dataplane: Box<dyn Dataplane>,
    /// Why this one, for an operator.
    pub why: String,
}

/// Every mode of this build has an arm here and in [`remove_mode`].
fn open_mode(mode: Mode, config: &Config) -> Result<Box<dyn Dataplane>, OpenError> {
    match mode {
        Mode::Ebpf => Ok(Box::new(EbpfDataplane::open(&config.ebpf)?)),
        Mode::Iptables => Ok(Box::new(IptablesDataplane::open(&config.iptables)?)),
        Mode::Nftables => Ok(Box::new(NftablesDataplane::open(config.nftables)?)),
        Mode::Ipvs => Ok(Box::new(IpvsDataplane::open(&config.ipvs)?)),
        // Candidates are modes of their own.
        Mode::Auto => Err(OpenError::None("auto is no mode of its own".to_owned())),
    }
}

/// The first candidate that opens, said in one line with what the better ones lack.
fn best<D>(mut open: impl FnMut(Mode) -> Result<D, OpenError>) -> Result<(D, String), OpenError> {
    let mut lacking = Vec::new();
    for mode in CANDIDATES {
        match open(mode) {
            Ok(dataplane) => {
                let why = if lacking.is_empty() { "the best one works here".to_owned() } else { lacking.join("; ") };
                info!(%mode, why, "mode chosen");
                return Ok((dataplane, why));
            }
            Err(error) => lacking.push(error.to_string()),
        }
    }
    Err(OpenError::None(lacking.join("; ")))
}

/// What may leave something in the kernel.
const MODES: [Mode; 4] = [Mode::Ebpf, Mode::Nftables, Mode::Iptables, Mode::Ipvs];

/// Removes everything of ours from this node's kernel, whatever mode and process made it. What one mode can't remove does not
/// keep the others from it.
///
/// # Errors
/// What could not be removed; that there is nothing is no error.
pub fn remove(config: &Config) -> Result<(), OpenError> {
    let mut problems = Vec::new();
    if let Err(error) = held::give_back() {
        problems.push(error.to_string());
    }
    for mode in MODES {
        match remove_mode(mode, &config.ebpf.bpffs) {
            Ok(()) => info!(%mode, "nothing of ours is left"),
            Err(problem) => {
                warn!(%mode, problem, "something of ours is left");
                problems.push(format!("{mode}: {problem}"));
            }
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(OpenError::Remove(problems.join("; "))) }
}

/// Removes what a process of another mode than `mode`, given by its name, has left on this node, with connections handed over. To be called when `mode` has
/// programmed everything. What cannot be removed is logged: both are in force then.
pub fn remove_others(mode: &str, bpffs: &Path) {
    for other in MODES.into_iter().filter(|other| other.name() != mode && is_left(*other, bpffs)) {
        match remove_mode(other, bpffs) {
            Ok(()) => info!(mode = %other, "removed what a process of another mode had left"),
            Err(problem) => warn!(mode = %other, problem, "something of another mode is left, and goes on"),
        }
    }
}

fn remove_mode(mode: Mode, bpffs: &Path) -> Result<(), String> {
    match mode {
        Mode::Ebpf => EbpfDataplane::remove(bpffs).map_err(|error| error.to_string()),
        Mode::Nftables => NftablesDataplane::remove().map_err(|error| error.to_string()),
        Mode::Iptables => IptablesDataplane::remove().map_err(|error| error.to_string()),
        Mode::Ipvs => IpvsDataplane::remove().map_err(|error| error.to_string()),
        Mode::Auto => Ok(()),
    }
}

/// Told without loading anything into the kernel; without a program but for the legacy kind of iptables, and that only where it has tables.
fn is_left(mode: Mode, bpffs: &Path) -> bool {
    match mode {
        Mode::Ebpf => EbpfDataplane::is_left(bpffs),
        Mode::Nftables => NftablesDataplane::is_left(),
        Mode::Iptables => IptablesDataplane::is_left(),
        Mode::Ipvs => IpvsDataplane::is_left(),
        Mode::Auto => false,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn lacks(what: &str) -> OpenError {
        OpenError::Ebpf(EbpfError::Bpffs { path: PathBuf::from(what), source: std::io::ErrorKind::NotFound.into() })
    }

    #[test]
    fn auto_takes_the_first_that_opens() {
        assert_eq!(best(Ok).unwrap(), (Mode::Ebpf, "the best one works here".to_owned()));
        let tried = |works: Mode| best(|mode| if mode == works { Ok(mode) } else { Err(lacks("/a")) });
        let (chosen, why) = tried(Mode::Iptables).unwrap();
        assert_eq!(chosen, Mode::Iptables);
        assert!(why.contains("/a"), "{why}");
        assert!(matches!(tried(Mode::Ipvs), Err(OpenError::None(_))), "only who asks for IPVS gets it");
    }

    #[test]
    fn auto_without_anything_names_every_reason() {
        let mut reasons = ["/first", "/second", "/third"].into_iter();
        let error = best(|_| Err::<(), _>(lacks(reasons.next().unwrap()))).unwrap_err().to_string();
        assert!(["/first", "/second", "/third"].iter().all(|reason| error.contains(reason)), "{error}");
        assert_eq!(error.lines().count(), 1);
    }
}
