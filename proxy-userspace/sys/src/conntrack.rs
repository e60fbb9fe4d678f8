//! The kernel's connection tracking table (nf_conntrack): listed with a filter that the kernel applies, deleted
//! and made entry by entry.
//!
//! Needs `CAP_NET_ADMIN` and ctnetlink; the filter needs Linux 5.8. Entries belong to the network namespace of the thread that
//! opens the table.

mod create;

pub use create::Translation;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::netlink::{ACK, DUMP, Socket, attribute, find, nested};

/// `NFNL_SUBSYS_CTNETLINK` with `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE` (nfnetlink_conntrack.h).
const GET: u16 = 0x101;
const DELETE: u16 = 0x102;

/// `enum ctattr_type`.
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
const CTA_MARK: u16 = 8;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;

/// `enum ctattr_protoinfo` and `ctattr_protoinfo_tcp`.
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;

/// `enum ctattr_tuple`, `ctattr_ip`, `ctattr_l4proto` and `ctattr_filter`.
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;

/// Which parts of the original tuple the filter compares (net/netfilter/nf_internals.h, `CTA_FILTER_F_*`).
const FILTER_IP_DST: u32 = 1 << 1;
const FILTER_PROTO_NUM: u32 = 1 << 3;
const FILTER_PROTO_DST_PORT: u32 = 1 << 5;

/// `IPS_DST_NAT` of `enum ip_conntrack_status`.
const DESTINATION_NAT: u32 = 1 << 5;
/// `TCP_CONNTRACK_LAST_ACK`: from here on both ends have said that they end.
const TCP_LAST_ACK: u8 = 6;
/// TCP's number.
const TCP: u8 = 6;

/// A dump during which the kernel rearranges its table is repeated until there were this many.
const DUMPS_MAX: usize = 3;

/// `struct nfgenmsg` behind the message header.
const GENERIC_BYTES: usize = 4;

/// One direction of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Sender.
    pub source: SocketAddr,
    /// Receiver.
    pub destination: SocketAddr,
}

/// One tracked flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// IP protocol number.
    pub protocol: u8,
    /// As the first packet was when it arrived.
    pub original: Tuple,
    /// As the answer is when it arrives: its source is where the first packet was sent on to.
    pub reply: Tuple,
    /// Conntrack zone, 0 by default.
    pub zone: u16,
    /// Whether it is a TCP connection of which both ends have said that it ends, or one has reset it.
    pub ended: bool,
    /// The connection's mark, 0 by default.
    pub mark: u32,
    /// Whether NAT rewrites the destination. Where it does not and [`Entry::is_redirected`] holds, something else does, as IPVS.
    pub destination_nat: bool,
    /// What tells this entry from a later one of the same tuple; opaque.
    id: [u8; 4],
}

/// Which entries the kernel hands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filter {
    /// IP protocol number.
    pub protocol: u8,
    /// Whether IPv6 entries are wanted; else IPv4 entries are.
    pub v6: bool,
    /// Original destination address, of the same family; `None` is any.
    pub destination: Option<IpAddr>,
    /// Original destination port; `None` is any.
    pub port: Option<u16>,
}

impl Filter {
    /// The kernel compares everything but IPv6 addresses: of those it hands out all but the one that is asked for
    /// (net/netfilter/nf_conntrack_netlink.c `ctnetlink_filter_match_tuple`, seen on 6.18, takes `ipv6_addr_cmp` for whether they are equal).
    fn describes(&self, entry: &Entry) -> bool {
        self.destination.is_none_or(|address| address == entry.original.destination.ip())
    }
}

/// Whether a dump saw everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dump {
    /// Every entry that was there throughout has been visited.
    Complete,
    /// The kernel rearranged its table meanwhile, at each of the attempts: entries may be missing.
    Interrupted,
}

/// The connection tracking table of one network namespace.
#[derive(Debug)]
pub struct Conntrack {
    /// Dumps and changes each have a socket: a deletion is asked for while a dump is being read.
    dumps: Socket,
    changes: Socket,
}

impl Conntrack {
    /// Opens the table of the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel has no netlink sockets for netfilter.
    pub fn open() -> io::Result<Self> {
        let open = || Socket::open(libc::NETLINK_NETFILTER);
        Ok(Self { dumps: open()?, changes: open()? })
    }

    /// Visits every entry that `filter` describes, some more than once, and deletes those for which `is_unwanted` holds.
    /// Memory does not grow with the table. Returns how many were deleted, and whether the list was complete.
    ///
    /// # Errors
    /// `EOPNOTSUPP` or `EINVAL` where the kernel has no ctnetlink, `EPERM` without `CAP_NET_ADMIN`. Some entries may have been
    /// deleted then.
    pub fn delete_if(
        &mut self,
        filter: &Filter,
        mut is_unwanted: impl FnMut(&Entry) -> bool,
    ) -> io::Result<(usize, Dump)> {
        let (mut deleted, mut failed) = (0, None);
        let changes = &mut self.changes;
        let end = dump(&mut self.dumps, filter, |entry| {
            if !is_unwanted(entry) {
                return;
            }
            match delete(changes, entry) {
                Ok(was_there) => deleted += usize::from(was_there),
                Err(error) => failed = failed.take().or(Some(error)),
            }
        })?;
        failed.map_or(Ok((deleted, end)), Err)
    }

    /// Visits every entry that `filter` describes: some more than once, where the kernel rearranges its table meanwhile.
    ///
    /// # Errors
    /// As [`Conntrack::delete_if`].
    pub fn for_each(&mut self, filter: &Filter, visit: impl FnMut(&Entry)) -> io::Result<Dump> {
        dump(&mut self.dumps, filter, visit)
    }
}

fn dump(socket: &mut Socket, filter: &Filter, mut visit: impl FnMut(&Entry)) -> io::Result<Dump> {
    for _ in 1..DUMPS_MAX {
        if dump_once(socket, filter, &mut visit)? == Dump::Complete {
            return Ok(Dump::Complete);
        }
    }
    dump_once(socket, filter, &mut visit)
}

fn dump_once(socket: &mut Socket, filter: &Filter, mut visit: impl FnMut(&Entry)) -> io::Result<Dump> {
    let asked = socket.ask(
        GET,
        DUMP,
        |body| put_filter(body, filter),
        |message| {
            if let Some(entry) = Entry::parse(message.body).filter(|entry| filter.describes(entry)) {
                visit(&entry);
            }
            Ok(())
        },
    );
    match asked {
        Ok(()) => Ok(Dump::Complete),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
            // The rest of the answer is still to come, and the socket takes no other dump before it has been read.
            *socket = Socket::open(libc::NETLINK_NETFILTER)?;
            Ok(Dump::Interrupted)
        }
        Err(error) => Err(error),
    }
}

/// Whether it was there to be deleted. An entry that the kernel has handed to a flow table can't be deleted (`EBUSY`): it ends
/// when that lets go of it.
fn delete(socket: &mut Socket, entry: &Entry) -> io::Result<bool> {
    let body = |body: &mut Vec<u8>| {
        put_generic(body, entry.original.destination.is_ipv6());
        nested(body, CTA_TUPLE_ORIG, |tuple| put_tuple(tuple, entry.protocol, entry.original));
        attribute(body, CTA_ZONE, &entry.zone.to_be_bytes());
        attribute(body, CTA_ID, &entry.id);
    };
    match socket.ask(DELETE, ACK, body, |_| Ok(())) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EBUSY)) => Ok(false),
        Err(error) => Err(error),
    }
}

fn put_generic(body: &mut Vec<u8>, v6: bool) {
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    // Family, version 0, resource 0.
    body.extend([u8::try_from(family).unwrap_or_default(), 0, 0, 0]);
}

fn put_filter(body: &mut Vec<u8>, filter: &Filter) {
    put_generic(body, filter.v6);
    let mut flags = FILTER_PROTO_NUM;
    nested(body, CTA_TUPLE_ORIG, |tuple| {
        if let Some(address) = filter.destination.filter(IpAddr::is_ipv4) {
            flags |= FILTER_IP_DST;
            nested(tuple, CTA_TUPLE_IP, |ip| put_address(ip, address, (CTA_IP_V4_DST, CTA_IP_V6_DST)));
        }
        nested(tuple, CTA_TUPLE_PROTO, |protocol| {
            attribute(protocol, CTA_PROTO_NUM, &[filter.protocol]);
            if let Some(port) = filter.port {
                flags |= FILTER_PROTO_DST_PORT;
                attribute(protocol, CTA_PROTO_DST_PORT, &port.to_be_bytes());
            }
        });
    });
    nested(body, CTA_FILTER, |parts| {
        attribute(parts, CTA_FILTER_ORIG_FLAGS, &flags.to_ne_bytes());
        attribute(parts, CTA_FILTER_REPLY_FLAGS, &0_u32.to_ne_bytes());
    });
}

fn put_tuple(body: &mut Vec<u8>, number: u8, tuple: Tuple) {
    let Tuple { source, destination } = tuple;
    nested(body, CTA_TUPLE_IP, |ip| {
        put_address(ip, source.ip(), (CTA_IP_V4_SRC, CTA_IP_V6_SRC));
        put_address(ip, destination.ip(), (CTA_IP_V4_DST, CTA_IP_V6_DST));
    });
    nested(body, CTA_TUPLE_PROTO, |protocol| {
        attribute(protocol, CTA_PROTO_NUM, &[number]);
        attribute(protocol, CTA_PROTO_SRC_PORT, &source.port().to_be_bytes());
        attribute(protocol, CTA_PROTO_DST_PORT, &destination.port().to_be_bytes());
    });
}

fn put_address(body: &mut Vec<u8>, address: IpAddr, (v4, v6): (u16, u16)) {
    match address {
        IpAddr::V4(address) => attribute(body, v4, &address.octets()),
        IpAddr::V6(address) => attribute(body, v6, &address.octets()),
    }
}

impl Entry {
    /// `None` for an entry without addresses or ports (ICMP).
    fn parse(body: &[u8]) -> Option<Self> {
        let attributes = body.get(GENERIC_BYTES..)?;
        let (protocol, original) = parse_tuple(find(attributes, CTA_TUPLE_ORIG)?)?;
        let (_, reply) = parse_tuple(find(attributes, CTA_TUPLE_REPLY)?)?;
        let zone = find(attributes, CTA_ZONE).and_then(be_u16).unwrap_or_default();
        let ended = protocol == TCP && tcp_state(attributes).is_some_and(|state| state >= TCP_LAST_ACK);
        let number = |kind| find(attributes, kind).and_then(be_u32).unwrap_or_default();
        let (mark, destination_nat) = (number(CTA_MARK), number(CTA_STATUS) & DESTINATION_NAT != 0);
        let id = *find(attributes, CTA_ID)?.first_chunk()?;
        Some(Self { protocol, original, reply, zone, ended, mark, destination_nat, id })
    }

    /// Whether its packets go to another destination than they name.
    pub fn is_redirected(&self) -> bool {
        self.original.destination != self.reply.source
    }

    /// What is done with its packets.
    pub fn translation(&self) -> Translation {
        let leaving = Tuple { source: self.reply.destination, destination: self.reply.source };
        Translation { protocol: self.protocol, arriving: self.original, leaving }
    }

    /// Whether conntrack rewrites its packets.
    pub fn is_translated(&self) -> bool {
        self.is_redirected() || self.original.source != self.reply.destination
    }
}

/// `enum tcp_conntrack`.
fn tcp_state(attributes: &[u8]) -> Option<u8> {
    let tcp = find(find(attributes, CTA_PROTOINFO)?, CTA_PROTOINFO_TCP)?;
    find(tcp, CTA_PROTOINFO_TCP_STATE)?.first().copied()
}

fn parse_tuple(tuple: &[u8]) -> Option<(u8, Tuple)> {
    let (ip, protocol) = (find(tuple, CTA_TUPLE_IP)?, find(tuple, CTA_TUPLE_PROTO)?);
    let port = |kind| find(protocol, kind).and_then(be_u16);
    let source = SocketAddr::new(parse_address(ip, CTA_IP_V4_SRC, CTA_IP_V6_SRC)?, port(CTA_PROTO_SRC_PORT)?);
    let destination = SocketAddr::new(parse_address(ip, CTA_IP_V4_DST, CTA_IP_V6_DST)?, port(CTA_PROTO_DST_PORT)?);
    Some((*find(protocol, CTA_PROTO_NUM)?.first()?, Tuple { source, destination }))
}

fn parse_address(ip: &[u8], v4: u16, v6: u16) -> Option<IpAddr> {
    match (find(ip, v4), find(ip, v6)) {
        (Some(octets), _) => Some(Ipv4Addr::from(*octets.first_chunk::<4>()?).into()),
        (_, Some(octets)) => Some(Ipv6Addr::from(*octets.first_chunk::<16>()?).into()),
        (None, None) => None,
    }
}

fn be_u32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.first_chunk()?))
}

fn be_u16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.first_chunk()?))
}

/// Reads a message as one about a flow.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzzing(body: &[u8]) {
    let _translated = Entry::parse(body).map(|entry| entry.is_translated());
}

#[cfg(test)]
mod tests;
