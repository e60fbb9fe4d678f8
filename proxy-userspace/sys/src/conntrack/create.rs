//! Entries for connections that conntrack did not see begin.

use std::io;
use std::net::{IpAddr, SocketAddr};

use super::{CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, Conntrack, DELETE, Tuple, put_generic, put_tuple};
use crate::netlink::{ACK, CREATE, EXCL, attribute, nested};

/// `NFNL_SUBSYS_CTNETLINK` with `IPCTNL_MSG_CT_NEW`.
const NEW: u16 = 0x100;

/// `enum ctattr_type`.
const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
const CTA_NAT_SRC: u16 = 6;
const CTA_TIMEOUT: u16 = 7;
const CTA_NAT_DST: u16 = 13;
/// `enum ctattr_protoinfo` and `ctattr_protoinfo_tcp`.
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;
const CTA_PROTOINFO_TCP_FLAGS_ORIGINAL: u16 = 4;
const CTA_PROTOINFO_TCP_FLAGS_REPLY: u16 = 5;
/// `enum ctattr_nat` and `ctattr_protonat`.
const CTA_NAT_V4_MINIP: u16 = 1;
const CTA_NAT_V4_MAXIP: u16 = 2;
const CTA_NAT_PROTO: u16 = 3;
const CTA_NAT_V6_MINIP: u16 = 4;
const CTA_NAT_V6_MAXIP: u16 = 5;
const CTA_PROTONAT_PORT_MIN: u16 = 1;
const CTA_PROTONAT_PORT_MAX: u16 = 2;

/// `IPS_SEEN_REPLY | IPS_ASSURED | IPS_CONFIRMED`: both sides have spoken.
const STATUS: u32 = 2 | 4 | 8;
/// `TCP_CONNTRACK_ESTABLISHED`.
const TCP_ESTABLISHED: u8 = 3;
/// `IP_CT_TCP_FLAG_BE_LIBERAL`, as value and as mask: the windows are not known.
const TCP_BE_LIBERAL: [u8; 2] = [8, 8];

/// A TCP connection that is established and translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// The client's packets as they arrive.
    pub arriving: Tuple,
    /// The same as they go on.
    pub leaving: Tuple,
}

impl Conntrack {
    /// Makes conntrack go on with a connection that something else has translated, in place of what it believes of it: it may
    /// have seen some of the connection's packets, before or after their translation. The entry lives for `timeout_s` seconds
    /// until the next packet, and then as long as any.
    ///
    /// # Errors
    /// `ENOMEM` when the table is full; `EOPNOTSUPP` or `EINVAL` where the kernel has no ctnetlink or no NAT; `EPERM` without
    /// `CAP_NET_ADMIN`.
    pub fn replace(&mut self, translation: &Translation, timeout_s: u32) -> io::Result<()> {
        for tuple in [translation.arriving, translation.leaving] {
            self.forget(tuple)?;
        }
        self.changes.ask(NEW, ACK | CREATE | EXCL, |body| put(body, translation, timeout_s), |_| Ok(()))
    }

    /// Deletes the entry with this tuple in one of its directions, if there is one.
    fn forget(&mut self, tuple: Tuple) -> io::Result<()> {
        let body = |body: &mut Vec<u8>| {
            put_generic(body, tuple.destination.is_ipv6());
            nested(body, CTA_TUPLE_ORIG, |part| put_tuple(part, tcp(), tuple));
        };
        match self.changes.ask(DELETE, ACK, body, |_| Ok(())) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EBUSY)) => Ok(()),
            result => result,
        }
    }
}

fn tcp() -> u8 {
    u8::try_from(libc::IPPROTO_TCP).unwrap_or_default()
}

fn put(body: &mut Vec<u8>, translation: &Translation, timeout_s: u32) {
    let Translation { arriving, leaving } = *translation;
    put_generic(body, arriving.destination.is_ipv6());
    // The answers as they would be without translation: the kernel works out the rest from the two ranges below.
    let answers = Tuple { source: arriving.destination, destination: arriving.source };
    nested(body, CTA_TUPLE_ORIG, |tuple| put_tuple(tuple, tcp(), arriving));
    nested(body, CTA_TUPLE_REPLY, |tuple| put_tuple(tuple, tcp(), answers));
    attribute(body, CTA_STATUS, &STATUS.to_be_bytes());
    attribute(body, CTA_TIMEOUT, &timeout_s.to_be_bytes());
    nested(body, CTA_PROTOINFO, |info| {
        nested(info, CTA_PROTOINFO_TCP, |tcp| {
            attribute(tcp, CTA_PROTOINFO_TCP_STATE, &[TCP_ESTABLISHED]);
            attribute(tcp, CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, &TCP_BE_LIBERAL);
            attribute(tcp, CTA_PROTOINFO_TCP_FLAGS_REPLY, &TCP_BE_LIBERAL);
        });
    });
    nested(body, CTA_NAT_DST, |range| put_range(range, leaving.destination));
    if leaving.source != arriving.source {
        nested(body, CTA_NAT_SRC, |range| put_range(range, leaving.source));
    }
}

/// A range of one address and one port.
fn put_range(body: &mut Vec<u8>, to: SocketAddr) {
    match to.ip() {
        IpAddr::V4(ip) => [CTA_NAT_V4_MINIP, CTA_NAT_V4_MAXIP].map(|end| attribute(body, end, &ip.octets())),
        IpAddr::V6(ip) => [CTA_NAT_V6_MINIP, CTA_NAT_V6_MAXIP].map(|end| attribute(body, end, &ip.octets())),
    };
    nested(body, CTA_NAT_PROTO, |ports| {
        attribute(ports, CTA_PROTONAT_PORT_MIN, &to.port().to_be_bytes());
        attribute(ports, CTA_PROTONAT_PORT_MAX, &to.port().to_be_bytes());
    });
}
