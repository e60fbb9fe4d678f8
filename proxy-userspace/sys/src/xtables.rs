//! What the kernel says of a table of iptables-legacy without handing it out: how large it is.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::SysError;

/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO` (`IPT_BASE_CTL`, include/uapi/linux/netfilter_ipv4/ip_tables.h).
const GET_INFO: libc::c_int = 64;
/// `XT_TABLE_MAXNAMELEN`, the terminator included.
const NAME_MAX: usize = 32;

/// Size of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableSize {
    /// Rules, and one more for the head and the end of each chain.
    pub entries: u32,
    /// Bytes of all of them.
    pub bytes: u32,
}

/// `struct ipt_getinfo`, which is the same for IPv6.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    name: [u8; NAME_MAX],
    valid_hooks: u32,
    hook_entry: [u32; 5],
    underflow: [u32; 5],
    entries: u32,
    bytes: u32,
}

/// Asks for a table (`nat`, `filter`) of iptables-legacy, or of ip6tables-legacy, in the calling thread's network namespace.
///
/// # Errors
/// When there is no such table, or the caller lacks `CAP_NET_ADMIN`.
pub fn table_size(v6: bool, table: &str) -> Result<TableSize, SysError> {
    let failed = |source: io::Error| SysError::new("ask for the size of table", table, source);
    let (domain, level) = if v6 { (libc::AF_INET6, libc::SOL_IPV6) } else { (libc::AF_INET, libc::SOL_IP) };
    let name = table.as_bytes();
    let mut info =
        Info { name: [0; NAME_MAX], valid_hooks: 0, hook_entry: [0; 5], underflow: [0; 5], entries: 0, bytes: 0 };
    let Some(place) = info.name.get_mut(..name.len()).filter(|place| place.len() < NAME_MAX) else {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    };
    place.copy_from_slice(name);
    // SAFETY: socket(2) takes no pointer; a negative result is looked at below.
    let socket = unsafe { libc::socket(domain, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) };
    if socket < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is open and nobody else's: socket(2) has just returned it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut length = size_of::<Info>() as libc::socklen_t;
    // SAFETY: the kernel reads and writes `length` bytes at `info`, which is so large and lives until the call returns; every
    // pattern of bits is a valid `Info`.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, GET_INFO, std::ptr::from_mut(&mut info).cast(), &raw mut length)
    };
    if result < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(TableSize { entries: info.entries, bytes: info.bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Netns, Placement, spawn};
    use std::process::Command;

    #[test]
    fn a_table_grows_with_its_rules() {
        let netns = Netns::anonymous().unwrap();
        for (v6, program) in [(false, "iptables-legacy"), (true, "ip6tables-legacy")] {
            let add = |arguments: &[&str]| {
                let place = Placement { netns: Some(&netns), cgroup: None };
                let mut child = spawn(Command::new(program).args(arguments), place).unwrap();
                assert!(child.wait().unwrap().success(), "{program} {arguments:?}");
                netns.run(|| table_size(v6, "nat")).unwrap().unwrap()
            };
            let before = add(&["-t", "nat", "-N", "A"]);
            let after = add(&["-t", "nat", "-A", "A", "-j", "RETURN"]);
            assert_eq!(after.entries, before.entries + 1);
            assert!(after.bytes > before.bytes);
        }
    }

    #[test]
    fn an_impossible_name_is_refused() {
        let error = table_size(false, &"x".repeat(NAME_MAX)).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::InvalidInput);
    }
}
