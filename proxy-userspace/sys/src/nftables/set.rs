//! Sets and maps, and their elements.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::expression::write_value;
use super::{LIST_ELEMENT, Name, Verdict, attribute_u32, attribute_u64, read_u64};
use crate::netlink::{ATTRIBUTE_HEADER, attribute_string, attributes, find, nested};

/// One field of a key or of a map's data. Its value fills whole registers of four bytes, the rest of the last one zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// An IPv4 address.
    Ipv4,
    /// An IPv6 address.
    Ipv6,
    /// A transport protocol's number, one byte.
    Protocol,
    /// A port in network byte order, two bytes.
    Port,
    /// A number in host byte order, four bytes.
    Number,
    /// An interface's name, 16 bytes.
    Interface,
}

impl Field {
    /// Bytes without padding, and the number by which nft(8) knows the type when it lists the set.
    fn shape(self) -> (u32, u32) {
        match self {
            Self::Ipv4 => (4, 7),
            Self::Ipv6 => (16, 8),
            Self::Protocol => (1, 12),
            Self::Port => (2, 13),
            Self::Number => (4, 19),
            Self::Interface => (16, 41),
        }
    }

    fn length(self) -> u32 {
        self.shape().0.next_multiple_of(4)
    }
}

/// Properties of a set, joined with [`SetFlags::and`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SetFlags(u32);

impl SetFlags {
    /// Elements are ranges (`NFT_SET_INTERVAL`).
    pub const INTERVAL: Self = Self(0x4);
    /// Elements may have a timeout (`NFT_SET_TIMEOUT`).
    pub const TIMEOUT: Self = Self(0x10);
    /// Rules add and delete elements (`NFT_SET_EVAL`).
    pub const DYNAMIC: Self = Self(0x20);

    /// Both.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// What the elements of a map lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data {
    /// None: a set.
    None,
    /// Values of these fields, together at most 64 bytes.
    Value(&'static [Field]),
    /// A verdict. Every transaction that adds a jump to such a map makes the kernel walk all of it: keep it small.
    Verdict,
}

/// A set or map to be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Its name.
    pub name: Name,
    /// Fields of its key, together at most 64 bytes.
    pub key: &'static [Field],
    /// What its elements lead to.
    pub data: Data,
    /// Its properties.
    pub flags: SetFlags,
    /// Elements that it may hold; `None` is no bound but memory. A dynamic set without a bound can be filled by anyone who
    /// sends packets.
    pub size: Option<u32>,
}

/// `NFT_SET_MAP` and `NFT_SET_CONCAT`.
const FLAG_MAP: u32 = 0x8;
const FLAG_CONCAT: u32 = 0x80;
/// `NFT_DATA_VERDICT` of `enum nft_data_types`.
const TYPE_VERDICT: u32 = 0xffff_ff00;
/// Bits of one field's type in the type of a concatenation, as nft(8) has them.
const CONCAT_TYPE_BITS: u32 = 6;

impl Set {
    /// The attributes behind table and name. `id` is the set's number in its batch.
    pub(super) fn write(&self, buffer: &mut Vec<u8>, id: u32) {
        let interval_of_fields = self.flags.has(SetFlags::INTERVAL) && self.key.len() > 1;
        let map = if self.data == Data::None { 0 } else { FLAG_MAP };
        let concat = if interval_of_fields { FLAG_CONCAT } else { 0 };
        attribute_u32(buffer, 3, self.flags.0 | map | concat);
        attribute_u32(buffer, 4, concatenated_type(self.key));
        attribute_u32(buffer, 5, length(self.key));
        match self.data {
            Data::None => (),
            Data::Value(fields) => {
                attribute_u32(buffer, 6, concatenated_type(fields));
                attribute_u32(buffer, 7, length(fields));
            }
            Data::Verdict => attribute_u32(buffer, 6, TYPE_VERDICT),
        }
        if self.size.is_some() || interval_of_fields {
            nested(buffer, 9, |buffer| self.write_description(buffer, interval_of_fields));
        }
        attribute_u32(buffer, 10, id);
    }

    /// `NFTA_SET_DESC`: how many elements, and where the fields of a key begin, without which ranges are of the whole key.
    fn write_description(&self, buffer: &mut Vec<u8>, fields: bool) {
        if let Some(size) = self.size {
            attribute_u32(buffer, 1, size);
        }
        if fields {
            nested(buffer, 2, |buffer| {
                for field in self.key {
                    nested(buffer, LIST_ELEMENT, |buffer| attribute_u32(buffer, 1, field.shape().0));
                }
            });
        }
    }
}

fn length(fields: &[Field]) -> u32 {
    fields.iter().map(|field| field.length()).sum()
}

fn concatenated_type(fields: &[Field]) -> u32 {
    fields.iter().fold(0, |all, field| (all << CONCAT_TYPE_BITS) | field.shape().1)
}

/// An element as it is written: the bytes of its key and data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ElementRef<'a> {
    /// Key, or the first key of a range.
    pub key: &'a [u8],
    /// Last key of a range, the end included; `None` is a single key. For sets with [`SetFlags::INTERVAL`] and several fields.
    pub key_end: Option<&'a [u8]>,
    /// Value of a map's element.
    pub value: Option<&'a [u8]>,
    /// Verdict of a map's element.
    pub verdict: Option<&'a Verdict>,
    /// Milliseconds that the element lives after its last use, and milliseconds that are left of them.
    pub timeout_ms: Option<(u64, u64)>,
}

impl<'a> ElementRef<'a> {
    /// A member of a set, or a key to be deleted.
    pub fn key(key: &'a [u8]) -> Self {
        Self { key, key_end: None, value: None, verdict: None, timeout_ms: None }
    }

    /// The same with a value.
    #[must_use]
    pub fn value(self, value: &'a [u8]) -> Self {
        Self { value: Some(value), ..self }
    }

    /// The same with a verdict.
    #[must_use]
    pub fn verdict(self, verdict: &'a Verdict) -> Self {
        Self { verdict: Some(verdict), ..self }
    }

    /// The same as the first of a range that ends with `last`.
    #[must_use]
    pub fn to(self, last: &'a [u8]) -> Self {
        Self { key_end: Some(last), ..self }
    }

    /// The same with a timeout of which something has passed.
    #[must_use]
    pub fn timeout(self, timeout_ms: u64, left_ms: u64) -> Self {
        Self { timeout_ms: Some((timeout_ms, left_ms)), ..self }
    }

    /// Upper bound of the bytes that [`ElementRef::write`] appends.
    pub(super) fn bytes_max(&self) -> usize {
        // Nine headers at most, and padding of four values.
        let chain = match self.verdict {
            Some(Verdict::Jump(chain) | Verdict::Goto(chain)) => chain.len(),
            _ => 0,
        };
        let values = self.key.len() + self.key_end.map_or(0, <[u8]>::len) + self.value.map_or(0, <[u8]>::len) + chain;
        values + 16 * ATTRIBUTE_HEADER + 32
    }

    pub(super) fn write(&self, buffer: &mut Vec<u8>) {
        nested(buffer, LIST_ELEMENT, |buffer| {
            nested(buffer, 1, |buffer| write_value(buffer, self.key));
            if let Some(value) = self.value {
                nested(buffer, 2, |buffer| write_value(buffer, value));
            }
            if let Some(verdict) = self.verdict {
                nested(buffer, 2, |buffer| verdict.write(buffer));
            }
            if let Some((timeout, left)) = self.timeout_ms {
                attribute_u64(buffer, 4, timeout);
                attribute_u64(buffer, 5, left);
            }
            if let Some(key_end) = self.key_end {
                nested(buffer, 10, |buffer| write_value(buffer, key_end));
            }
        });
    }
}

/// An element as it was read back.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Element {
    /// Key, or the first of a range.
    pub key: Vec<u8>,
    /// Last key of a range.
    pub key_end: Option<Vec<u8>>,
    /// Value of a map's element; empty for a set's and for a verdict.
    pub value: Vec<u8>,
    /// Chain that a verdict leads to.
    pub chain: Option<String>,
    /// Milliseconds that it lives after its last use; `None` for ever.
    pub timeout_ms: Option<u64>,
    /// Milliseconds that it has left.
    pub left_ms: Option<u64>,
}

impl Element {
    /// Reads `NFTA_SET_ELEM_LIST_ELEMENTS`.
    pub(super) fn read_all(list: &[u8]) -> impl Iterator<Item = Self> {
        attributes(list).filter(|(kind, _)| *kind == LIST_ELEMENT).map(|(_, element)| Self::read(element))
    }

    fn read(bytes: &[u8]) -> Self {
        let mut element = Self::default();
        for (kind, value) in attributes(bytes) {
            match kind {
                1 => element.key = find(value, 1).unwrap_or_default().to_vec(),
                2 => {
                    element.value = find(value, 1).unwrap_or_default().to_vec();
                    let chain = find(value, 2).and_then(|verdict| find(verdict, 2));
                    element.chain = chain.map(super::read_string);
                }
                4 => element.timeout_ms = read_u64(value),
                5 => element.left_ms = read_u64(value),
                10 => element.key_end = find(value, 1).map(<[u8]>::to_vec),
                _ => (),
            }
        }
        element
    }
}

/// What a set holds, in sixteen bytes: how many elements, and a sum over them in which their order does not matter. Sets that
/// differ have different sums, but for one case in 2^64; sums are of one process and not to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Contents {
    elements: u64,
    sum: u64,
}

impl Contents {
    /// Counts an element in. `data` is a map's value, or the last key of a range; empty for a verdict.
    pub fn add(&mut self, key: &[u8], data: &[u8]) {
        self.elements = self.elements.wrapping_add(1);
        self.sum = self.sum.wrapping_add(hash(key, data));
    }

    /// Takes out an element that was counted in.
    pub fn remove(&mut self, key: &[u8], data: &[u8]) {
        self.elements = self.elements.wrapping_sub(1);
        self.sum = self.sum.wrapping_sub(hash(key, data));
    }

    /// Counts in what `NFTA_SET_ELEM_LIST_ELEMENTS` lists.
    pub(super) fn add_all(&mut self, list: &[u8]) {
        for (_, element) in attributes(list).filter(|(kind, _)| *kind == LIST_ELEMENT) {
            let value = |kind| find(element, kind).and_then(|nested| find(nested, 1));
            self.add(value(1).unwrap_or_default(), value(10).or(value(2)).unwrap_or_default());
        }
    }
}

fn hash(key: &[u8], data: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (key, data).hash(&mut hasher);
    hasher.finish()
}

/// Writes which set elements belong to: `NFTA_SET_ELEM_LIST_TABLE` and `NFTA_SET_ELEM_LIST_SET`.
pub(super) fn write_owner(buffer: &mut Vec<u8>, table: &str, set: &str) {
    attribute_string(buffer, 1, table);
    attribute_string(buffer, 2, set);
}
