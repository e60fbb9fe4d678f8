//! nf_tables over netlink: batches of changes that the kernel takes whole or not at all, and reading back.
//!
//! A [`Batch`] is written message by message into one buffer and sent as one datagram by [`Nftables::commit`]. Nothing here
//! decides: names, rules and keys are the caller's. Keys and data are raw bytes as the kernel's registers hold them: every
//! field of a concatenation padded to four bytes, addresses and ports in network byte order, numbers in the host's.
//!
//! Needs `CAP_NET_ADMIN` and nf_tables in the kernel (`CONFIG_NF_TABLES`, `NF_TABLES_IPV4`, `NF_TABLES_IPV6`); tried on
//! Linux 6.1 and 6.18. Numbers are those of include/uapi/linux/netfilter/nf_tables.h.

mod batch;
mod connection;
mod expression;
mod set;
#[cfg(test)]
mod tests;

pub use batch::{BATCH_BYTES_MAX, Batch, ChainHook, ChainKind, Hook};
pub use connection::{Chain, Nftables, NftablesError, Rule, Table};
pub use expression::{
    Comparison, CtKey, DynsetOperation, Expression, FibAddress, LookupTarget, MetaKey, PayloadBase, Register,
    RejectKind, Verdict,
};
pub use set::{Contents, Data, Element, ElementRef, Field, Set, SetFlags};

use std::borrow::Cow;

/// Name of a table, chain, set or map: at most 255 bytes.
pub type Name = Cow<'static, str>;

/// Address family of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Family {
    /// `NFPROTO_INET`: IPv4 and IPv6.
    Inet = 1,
    /// `NFPROTO_IPV4`.
    Ipv4 = 2,
    /// `NFPROTO_IPV6`.
    Ipv6 = 10,
}

/// `NFNL_SUBSYS_NFTABLES`, the upper byte of a message's type.
const SUBSYSTEM: u16 = 10;

/// `enum nf_tables_msg_types`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum Message {
    NewTable = 0,
    GetTable = 1,
    DeleteTable = 2,
    NewChain = 3,
    GetChain = 4,
    DeleteChain = 5,
    NewRule = 6,
    GetRule = 7,
    DeleteRule = 8,
    NewSet = 9,
    DeleteSet = 11,
    NewElement = 12,
    GetElement = 13,
    DeleteElement = 14,
    NewGeneration = 15,
    GetGeneration = 16,
}

impl Message {
    fn kind(self) -> u16 {
        (SUBSYSTEM << 8) | self as u16
    }
}

/// Attributes that several messages have in common: the table, and the object in it.
const ATTRIBUTE_TABLE: u16 = 1;
/// `NFTA_LIST_ELEM`.
const LIST_ELEMENT: u16 = 1;

/// `struct nfgenmsg`.
fn family_header(buffer: &mut Vec<u8>, family: u8, resource: u16) {
    buffer.extend_from_slice(&[family, 0]);
    buffer.extend_from_slice(&resource.to_be_bytes());
}

/// The kernel takes the numbers of nf_tables attributes in network byte order.
fn attribute_u32(buffer: &mut Vec<u8>, kind: u16, value: u32) {
    crate::netlink::attribute(buffer, kind, &value.to_be_bytes());
}

fn attribute_u64(buffer: &mut Vec<u8>, kind: u16, value: u64) {
    crate::netlink::attribute(buffer, kind, &value.to_be_bytes());
}

fn read_u32(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*value.first_chunk()?))
}

fn read_u64(value: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*value.first_chunk()?))
}

fn read_string(value: &[u8]) -> String {
    String::from_utf8_lossy(value).trim_end_matches('\0').to_owned()
}

/// Reads a message as a list of elements.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzzing(body: &[u8]) {
    let elements = Element::read_all(body).count();
    let mut contents = Contents::default();
    contents.add_all(body);
    assert_eq!(elements == 0, contents == Contents::default(), "both ways to read find the same elements");
}
