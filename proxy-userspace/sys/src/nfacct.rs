//! Named packet counters of netfilter (nfnetlink_acct), which rules count into: reading one costs one message, whatever the size of
//! the table that the rule is in. Needs `CAP_NET_ADMIN`; counters belong to a network namespace.

use std::io;

use crate::netlink::{ACK, CREATE, Socket, attribute_string, find};

/// `NFNL_SUBSYS_ACCT` (linux/netfilter/nfnetlink.h) and the messages of linux/netfilter/nfnetlink_acct.h.
const SUBSYSTEM: u16 = 7 << 8;
const NEW: u16 = SUBSYSTEM;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 3;
/// `NFACCT_NAME` and `NFACCT_PKTS`.
const NAME: u16 = 1;
const PACKETS: u16 = 2;
/// `struct nfgenmsg`: family, version, resource; all zero here.
const GENERIC: [u8; 4] = [0; 4];

/// Makes sure that the counter exists; one that does keeps its count. `name` has at most 31 bytes.
///
/// # Errors
/// `EINVAL` or `EOPNOTSUPP` where the kernel has no such counters, `EPERM` without the right.
pub fn ensure(name: &str) -> io::Result<()> {
    match ask(NEW, ACK | CREATE, name) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) || error.kind() == io::ErrorKind::AlreadyExists => {
            Ok(())
        }
        other => other.map(drop),
    }
}

/// Packets counted so far; `None` where there is no such counter.
///
/// # Errors
/// As [`ensure`].
pub fn packets(name: &str) -> io::Result<Option<u64>> {
    match ask(GET, ACK, name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other,
    }
}

/// Removes the counter; that there is none is no error.
///
/// # Errors
/// `EBUSY` while a rule counts into it; else as [`ensure`].
pub fn remove(name: &str) -> io::Result<()> {
    match ask(DELETE, ACK, name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map(drop),
    }
}

fn ask(kind: u16, flags: u16, name: &str) -> io::Result<Option<u64>> {
    let mut packets = None;
    let request = |buffer: &mut Vec<u8>| {
        buffer.extend_from_slice(&GENERIC);
        attribute_string(buffer, NAME, name);
    };
    Socket::open(libc::NETLINK_NETFILTER)?.ask(kind, flags, request, |message| {
        let attributes = message.body.get(GENERIC.len()..).unwrap_or_default();
        packets =
            find(attributes, PACKETS).and_then(|value| value.first_chunk()).map(|value| u64::from_be_bytes(*value));
        Ok(())
    })?;
    Ok(packets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Netns;

    #[test]
    fn a_counter_is_made_once_and_removed() {
        let work = || {
            assert_eq!(packets("trama-test").unwrap(), None);
            ensure("trama-test").unwrap();
            ensure("trama-test").unwrap();
            assert_eq!(packets("trama-test").unwrap(), Some(0));
            remove("trama-test").unwrap();
            remove("trama-test").unwrap();
            assert_eq!(packets("trama-test").unwrap(), None);
        };
        Netns::anonymous().unwrap().run(work).unwrap();
    }
}
