//! What this process may do and what this kernel is: asked before anything is made.

use std::fs;

use nix::time::ClockId;

use crate::SysError;

/// A capability by its number in `linux/capability.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Capability {
    /// Links, addresses, routes, tc and cgroup programs.
    NetAdmin = 12,
    /// Namespaces and mounts.
    SysAdmin = 21,
    /// Pointers in BPF programs, which the verifier otherwise forbids (Linux 5.8).
    Perfmon = 38,
    /// BPF maps and programs (Linux 5.8).
    Bpf = 39,
}

impl Capability {
    /// The name in capabilities(7).
    pub fn name(self) -> &'static str {
        match self {
            Self::NetAdmin => "CAP_NET_ADMIN",
            Self::SysAdmin => "CAP_SYS_ADMIN",
            Self::Perfmon => "CAP_PERFMON",
            Self::Bpf => "CAP_BPF",
        }
    }
}

/// Ticks of the kernel's clock in a second (`CONFIG_HZ`, 100 to 1000): the coarse clock moves once a tick.
///
/// # Errors
/// When the clock cannot be asked for its resolution.
pub fn ticks_per_second() -> Result<u32, SysError> {
    let clock = "CLOCK_MONOTONIC_COARSE";
    let tick = ClockId::CLOCK_MONOTONIC_COARSE.res();
    let tick = tick.map_err(|e| SysError::new("read the resolution of", clock, e))?;
    Ok(u32::try_from(1_000_000_000 / tick.tv_nsec().max(1)).unwrap_or(1000).max(1))
}

/// Those of `wanted` that the calling thread does not have in effect.
///
/// # Errors
/// When `/proc/thread-self/status` cannot be read.
pub fn missing_capabilities(wanted: &[Capability]) -> Result<Vec<Capability>, SysError> {
    let status = "/proc/thread-self/status";
    let text = fs::read_to_string(status).map_err(|e| SysError::new("read", status, e))?;
    let effective = parse_effective(&text);
    Ok(wanted.iter().copied().filter(|capability| effective & (1 << *capability as u8) == 0).collect())
}

/// Version of the running kernel, ordered: `(6, 1)` on Debian 12.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelVersion {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
}

/// The running kernel's version.
///
/// # Errors
/// When `/proc/sys/kernel/osrelease` cannot be read or is not a version.
pub fn kernel_version() -> Result<KernelVersion, SysError> {
    let release = crate::sysctl::read("kernel/osrelease")?;
    let invalid = || SysError::new("understand kernel version", &release, std::io::ErrorKind::InvalidData);
    parse_release(&release).ok_or_else(invalid)
}

fn parse_effective(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

fn parse_release(release: &str) -> Option<KernelVersion> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some(KernelVersion { major: numbers.next()?.ok()?, minor: numbers.next()?.ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_understood() {
        assert_eq!(parse_release("6.1.0-28-amd64"), Some(KernelVersion { major: 6, minor: 1 }));
        assert_eq!(parse_release("6.18"), Some(KernelVersion { major: 6, minor: 18 }));
        assert_eq!(parse_release("linux"), None);
        assert!(kernel_version().unwrap() > KernelVersion { major: 4, minor: 0 });
    }

    #[test]
    fn effective_capabilities_are_read() {
        assert_eq!(parse_effective("CapPrm:\t0000000000000000\nCapEff:\t0000000000001000\n"), 1 << 12);
        assert_eq!(parse_effective("nothing"), 0);
    }
}
