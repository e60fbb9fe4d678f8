//! Policy routing by mark: packets of a mark become packets to this machine, whatever their destination.

use std::io;

use crate::SysError;
use crate::netlink::{ACK, CREATE, EXCL, Socket, attribute};

/// `RTM_NEWROUTE`, `RTM_DELROUTE`, `RTM_NEWRULE`, `RTM_DELRULE` (include/uapi/linux/rtnetlink.h).
pub(crate) const NEW_ROUTE: u16 = 24;
pub(crate) const DELETE_ROUTE: u16 = 25;
const NEW_RULE: u16 = 32;
const DELETE_RULE: u16 = 33;
/// `RTN_LOCAL`, `RT_SCOPE_HOST`, `RTPROT_STATIC`, `FR_ACT_TO_TBL`.
pub(crate) const TYPE_LOCAL: u8 = 2;
pub(crate) const SCOPE_HOST: u8 = 254;
const PROTOCOL_STATIC: u8 = 4;
const ACTION_TABLE: u8 = 1;
/// The loopback interface is the first of every namespace.
pub(crate) const LOOPBACK_INDEX: u32 = 1;

/// A rule and the one route of a table of its own, of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Divert {
    /// IPv6 instead of IPv4.
    pub ipv6: bool,
    /// Mark of the packets, and the bits of it that count.
    pub mark: u32,
    /// Which bits of the mark count.
    pub mask: u32,
    /// Number of the routing table.
    pub table: u32,
    /// Priority of the rule; lower is earlier, the table `local` is at 0 and `main` at 32766.
    pub priority: u32,
}

impl Divert {
    /// Adds rule and route to the network namespace of the calling thread; what is there already stays.
    ///
    /// # Errors
    /// When the kernel refuses, for instance without `CAP_NET_ADMIN` or without policy routing.
    pub fn add(&self) -> Result<(), SysError> {
        let ask = |kind, body: &dyn Fn(&mut Vec<u8>)| match request(kind, ACK | CREATE | EXCL, body) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        };
        // The route first: a rule to an empty table would let packets through as if it were not there.
        ask(NEW_ROUTE, &|buffer| self.write_route(buffer))
            .and_then(|()| ask(NEW_RULE, &|buffer| self.write_rule(buffer)))
            .map_err(|source| {
                SysError::new("divert packets by mark with routing table", self.table.to_string(), source)
            })
    }

    /// Removes them; that they are not there is no error.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&self) -> Result<(), SysError> {
        let ask = |kind, body: &dyn Fn(&mut Vec<u8>)| match request(kind, ACK, body) {
            // ESRCH is the answer about a route, ENOENT that about a rule, EAFNOSUPPORT that of a kernel without IPv6.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT | libc::EAFNOSUPPORT)) => {
                Ok(())
            }
            result => result,
        };
        ask(DELETE_RULE, &|buffer| self.write_rule(buffer))
            .and_then(|()| ask(DELETE_ROUTE, &|buffer| self.write_route(buffer)))
            .map_err(|source| SysError::new("remove routing table", self.table.to_string(), source))
    }

    fn family(&self) -> u8 {
        if self.ipv6 { libc::AF_INET6 as u8 } else { libc::AF_INET as u8 }
    }

    /// `struct rtmsg`: everything is local, at the loopback interface. RTA_OIF is 4, RTA_TABLE 15.
    fn write_route(&self, buffer: &mut Vec<u8>) {
        buffer.extend_from_slice(&[self.family(), 0, 0, 0, 0, PROTOCOL_STATIC, SCOPE_HOST, TYPE_LOCAL, 0, 0, 0, 0]);
        attribute(buffer, 4, &LOOPBACK_INDEX.to_ne_bytes());
        attribute(buffer, 15, &self.table.to_ne_bytes());
    }

    /// `struct fib_rule_hdr`. FRA_PRIORITY is 6, FRA_FWMARK 10, FRA_TABLE 15, FRA_FWMASK 16.
    fn write_rule(&self, buffer: &mut Vec<u8>) {
        buffer.extend_from_slice(&[self.family(), 0, 0, 0, 0, 0, 0, ACTION_TABLE, 0, 0, 0, 0]);
        for (kind, value) in [(6, self.priority), (10, self.mark), (15, self.table), (16, self.mask)] {
            attribute(buffer, kind, &value.to_ne_bytes());
        }
    }
}

fn request(kind: u16, flags: u16, body: &dyn Fn(&mut Vec<u8>)) -> io::Result<()> {
    Socket::open(libc::NETLINK_ROUTE)?.ask(kind, flags, body, |_| Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Netns;

    #[test]
    fn rule_and_route_come_and_go() {
        let work = || {
            let lo_up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
            assert!(lo_up.unwrap().success());
            for ipv6 in [false, true] {
                let divert = Divert { ipv6, mark: 0x7000_0000, mask: 0xf000_0000, table: 29_810, priority: 90 };
                divert.remove().unwrap();
                divert.add().unwrap();
                divert.add().unwrap();
                // A second one of the same kind is refused, so both are there.
                for (kind, body) in [(NEW_ROUTE, 0), (NEW_RULE, 1)] {
                    let write = |buffer: &mut Vec<u8>| {
                        if body == 0 { divert.write_route(buffer) } else { divert.write_rule(buffer) }
                    };
                    let error = request(kind, ACK | CREATE | EXCL, &write).unwrap_err();
                    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
                }
                divert.remove().unwrap();
                let again = request(DELETE_RULE, ACK, &|buffer| divert.write_rule(buffer)).unwrap_err();
                assert_eq!(again.raw_os_error(), Some(libc::ENOENT));
            }
        };
        let netns = Netns::anonymous().unwrap();
        netns.run(work).unwrap();
    }
}
