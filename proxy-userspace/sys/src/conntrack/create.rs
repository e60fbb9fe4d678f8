//! Entries for flows that conntrack did not see begin.

use std::io;
use std::net::{IpAddr, SocketAddr};

use super::{
    CTA_PROTOINFO, CTA_PROTOINFO_TCP, CTA_PROTOINFO_TCP_STATE, CTA_STATUS, CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, Conntrack,
    DELETE, TCP, Tuple, put_generic, put_tuple,
};
use crate::netlink::{CREATE, EXCL, Request, Socket, attribute, nested};

/// `NFNL_SUBSYS_CTNETLINK` with `IPCTNL_MSG_CT_NEW`.
const NEW: u16 = 0x100;

/// `enum ctattr_type`.
const CTA_NAT_SRC: u16 = 6;
const CTA_TIMEOUT: u16 = 7;
const CTA_NAT_DST: u16 = 13;
/// `ctattr_protoinfo_tcp`.
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

/// How often an entry is tried when a packet makes another in its place meanwhile.
const ATTEMPTS: usize = 4;

/// A TCP connection or UDP flow that is established and translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Translation {
    /// 6 or 17.
    pub protocol: u8,
    /// The client's packets as they arrive.
    pub arriving: Tuple,
    /// The same as they go on.
    pub leaving: Tuple,
}

impl Conntrack {
    /// Makes conntrack go on with a flow that something else has translated, in place of what it believes of it: it may have seen
    /// some of the flow's packets, before or after their translation, and it may have given the tuple of the answers to another
    /// flow, whose source port it chose without knowing of this one. The entry lives for `timeout_s` seconds until the next
    /// packet, and then as long as any.
    ///
    /// # Errors
    /// `EEXIST` when packets keep making another entry; `ENOMEM` when the table is full; `EOPNOTSUPP` or `EINVAL` where the kernel has no ctnetlink or no NAT; `EPERM` without
    /// `CAP_NET_ADMIN`.
    pub fn replace(&mut self, translation: &Translation, timeout_s: u32) -> io::Result<()> {
        replace(&mut self.changes, translation, timeout_s)
    }
}

fn replace(socket: &mut Socket, translation: &Translation, timeout_s: u32) -> io::Result<()> {
    let Translation { protocol, arriving, leaving } = *translation;
    let answer = Tuple { source: leaving.destination, destination: leaving.source };
    let [arriving, leaving, answer] =
        [arriving, leaving, answer].map(|tuple| move |body: &mut Vec<u8>| put_forget(body, protocol, tuple));
    let new = |body: &mut Vec<u8>| put(body, translation, timeout_s);
    for _ in 0..ATTEMPTS {
        // Together: a packet that finds no entry would be untranslated, and who gets it then resets the connection.
        let [forgotten @ .., made] = socket.ask_together([
            Request { kind: DELETE, flags: 0, body: &arriving },
            Request { kind: DELETE, flags: 0, body: &leaving },
            Request { kind: DELETE, flags: 0, body: &answer },
            Request { kind: NEW, flags: CREATE | EXCL, body: &new },
        ])?;
        let refused = forgotten.into_iter().find(|error| !matches!(*error, 0 | libc::ENOENT | libc::EBUSY));
        match (refused, made) {
            (None, 0) => return Ok(()),
            (None, libc::EEXIST) => {}
            (refused, made) => return Err(io::Error::from_raw_os_error(refused.unwrap_or(made))),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EEXIST))
}

/// Asks for the deletion of the entry with this tuple in one of its directions, if there is one.
fn put_forget(body: &mut Vec<u8>, protocol: u8, tuple: Tuple) {
    put_generic(body, tuple.destination.is_ipv6());
    nested(body, CTA_TUPLE_ORIG, |part| put_tuple(part, protocol, tuple));
}

fn put(body: &mut Vec<u8>, translation: &Translation, timeout_s: u32) {
    let Translation { protocol, arriving, leaving } = *translation;
    put_generic(body, arriving.destination.is_ipv6());
    // The answers as they would be without translation: the kernel works out the rest from the two ranges below.
    let answers = Tuple { source: arriving.destination, destination: arriving.source };
    nested(body, CTA_TUPLE_ORIG, |tuple| put_tuple(tuple, protocol, arriving));
    nested(body, CTA_TUPLE_REPLY, |tuple| put_tuple(tuple, protocol, answers));
    attribute(body, CTA_STATUS, &STATUS.to_be_bytes());
    attribute(body, CTA_TIMEOUT, &timeout_s.to_be_bytes());
    if protocol == TCP {
        nested(body, CTA_PROTOINFO, |info| {
            nested(info, CTA_PROTOINFO_TCP, |tcp| {
                attribute(tcp, CTA_PROTOINFO_TCP_STATE, &[TCP_ESTABLISHED]);
                attribute(tcp, CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, &TCP_BE_LIBERAL);
                attribute(tcp, CTA_PROTOINFO_TCP_FLAGS_REPLY, &TCP_BE_LIBERAL);
            });
        });
    }
    nested(body, CTA_NAT_DST, |range| put_range(range, leaving.destination));
    // Also where the source stays: without a range the kernel takes any free port when another flow has the tuple, and the
    // endpoint would not know the connection.
    nested(body, CTA_NAT_SRC, |range| put_range(range, leaving.source));
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
