//! What rules are made of: expressions that load registers, look up, compare and give verdicts.

use super::{Name, attribute_u32, attribute_u64};
use crate::netlink::{attribute, attribute_string, nested};

/// `NFT_REG32_00`.
const FIRST_REGISTER: u32 = 8;
/// `NFT_REG_VERDICT`.
const VERDICT_REGISTER: u32 = 0;
/// `NFTA_DATA_VALUE` and `NFTA_DATA_VERDICT`.
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;

/// A register of 32 bits, 0 to 15. A longer value lies in this one and those behind it. Registers hold nothing from one rule
/// to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Register(pub u8);

impl Register {
    fn number(self) -> u32 {
        FIRST_REGISTER + u32::from(self.0)
    }
}

/// What happens to a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The hook is done with it.
    Accept,
    /// It is gone.
    Drop,
    /// The chain ends; in a chain that was jumped to, the rule behind the jump is next.
    Return,
    /// The next rule is next.
    Continue,
    /// Evaluates a chain, then comes back.
    Jump(Name),
    /// Evaluates a chain, and does not come back.
    Goto(Name),
}

impl Verdict {
    fn code(&self) -> i32 {
        match self {
            Self::Drop => 0,
            Self::Accept => 1,
            Self::Continue => -1,
            Self::Jump(_) => -3,
            Self::Goto(_) => -4,
            Self::Return => -5,
        }
    }

    pub(super) fn write(&self, buffer: &mut Vec<u8>) {
        nested(buffer, DATA_VERDICT, |buffer| {
            attribute_u32(buffer, 1, self.code().cast_unsigned());
            if let Self::Jump(chain) | Self::Goto(chain) = self {
                attribute_string(buffer, 2, chain);
            }
        });
    }
}

pub(super) fn write_value(buffer: &mut Vec<u8>, value: &[u8]) {
    attribute(buffer, DATA_VALUE, value);
}

/// Where the bytes of a packet are counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum PayloadBase {
    /// Start of the IPv4 or IPv6 header.
    Network = 1,
    /// Start of the TCP, UDP, SCTP or ICMP header.
    Transport = 2,
}

/// What is known of a packet beside its bytes (`enum nft_meta_keys`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MetaKey {
    /// The packet's mark, four bytes, host byte order.
    Mark = 3,
    /// Index of the interface that it came in through; 0 for a packet made here.
    InputInterface = 4,
    /// Name of that interface, 16 bytes, padded with zeros.
    InputInterfaceName = 6,
    /// Name of the interface that it goes out through.
    OutputInterfaceName = 7,
    /// Family of the packet, one byte.
    Family = 15,
    /// Transport protocol, one byte.
    Protocol = 16,
}

/// What conntrack knows of a packet (`enum nft_ct_keys`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum CtKey {
    /// A bit of `NF_CT_STATE_BIT`: 2 established, 4 related, 8 new, 64 untracked, 1 invalid.
    State = 0,
    /// Which way the packet goes, one byte: 0 as the first of its connection, 1 the other way.
    Direction = 1,
    /// Bits of `enum ip_conntrack_status`: 0x20 is destination translated.
    Status = 2,
    /// The connection's mark, four bytes, host byte order.
    Mark = 3,
}

/// How a register is compared; less and greater are of bytes in network order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Comparison {
    /// Equal.
    Equal = 0,
    /// Not equal.
    NotEqual = 1,
    /// Less.
    Less = 2,
    /// Less or equal.
    LessOrEqual = 3,
    /// Greater.
    Greater = 4,
    /// Greater or equal.
    GreaterOrEqual = 5,
}

/// Whose type a fib expression looks up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum FibAddress {
    /// The source address.
    Source = 1,
    /// The destination address.
    Destination = 2,
}

/// What becomes of what a lookup finds. Before Linux 6.4 the first two are for sets only, not for maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookupTarget {
    /// Nothing: the rule goes on if the key is in the set.
    Nothing,
    /// Nothing: the rule goes on if the key is not in the set.
    NothingUnless,
    /// The map's data goes to a register; the rule ends if there is no such key.
    Register(Register),
    /// The map's data is the verdict; the rule ends if there is no such key.
    Verdict,
}

/// What the packet path does to a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum DynsetOperation {
    /// Adds a key that is not there; one that is stays as it is.
    Add = 0,
    /// Adds a key that is not there; one that is starts its timeout again and keeps its data.
    Update = 1,
    /// Deletes a key; the rule goes on whether it was there or not.
    Delete = 2,
}

/// How a packet is refused; it is dropped after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RejectKind {
    /// ICMP port unreachable, in a table of IPv4.
    PortUnreachableV4,
    /// ICMPv6 port unreachable, in a table of IPv6.
    PortUnreachableV6,
    /// A TCP reset.
    TcpReset,
}

/// One step of a rule. A step that does not match ends the rule, and the next rule is next.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are registers and the numbers that the variant names")]
pub enum Expression {
    /// Loads `length` bytes of the packet; the rest of the last register becomes zero.
    Payload { base: PayloadBase, offset: u32, length: u32, to: Register },
    /// Loads what is known of the packet.
    Meta { key: MetaKey, to: Register },
    /// Sets the packet's mark.
    SetMark { from: Register },
    /// Loads what conntrack knows of the packet.
    Ct { key: CtKey, to: Register },
    /// Sets the connection's mark.
    SetConnectionMark { from: Register },
    /// Loads the type of an address, `RTN_LOCAL` (2) for one of this machine; four bytes, host byte order.
    FibType { address: FibAddress, to: Register },
    /// Goes on if the comparison holds.
    Compare { from: Register, comparison: Comparison, with: Vec<u8> },
    /// `to = (from & mask) ^ xor`.
    Bitwise { from: Register, to: Register, mask: Vec<u8>, xor: Vec<u8> },
    /// Loads a constant.
    Constant { value: Vec<u8>, to: Register },
    /// Looks `key` up; it is as long as the set's key.
    Lookup { set: Name, key: Register, target: LookupTarget },
    /// Loads a random number from `offset` to `offset + modulus - 1`, four bytes, host byte order.
    Random { modulus: u32, offset: u32, to: Register },
    /// Changes a set that has [`SetFlags::DYNAMIC`](super::SetFlags::DYNAMIC); a map wants data even to delete. The rule ends
    /// when a new key finds the set full.
    Dynset { set: Name, operation: DynsetOperation, key: Register, data: Option<Register>, timeout_ms: Option<u64> },
    /// Translates the destination of the connection.
    DestinationNat { family: super::Family, address: Register, port: Register },
    /// Translates the source of the connection to the address of the interface that it leaves through.
    Masquerade { fully_random: bool },
    /// Hides the packet from conntrack: only before it has looked, at a priority below -200.
    Notrack,
    /// Refuses the packet.
    Reject(RejectKind),
    /// Gives the packet to whoever reads this queue of nfnetlink_queue. Without a reader it is gone and, unlike one that is dropped on its way
    /// out, no error for its sender. Takes `nft_queue` in the kernel.
    Queue { number: u16 },
    /// Counts packets and bytes.
    Counter,
    /// Ends the rule with a verdict.
    Verdict(Verdict),
}

impl Expression {
    /// Loads the source address of an IPv4 or IPv6 packet.
    #[must_use]
    pub const fn source_address(family: super::Family, to: Register) -> Self {
        let (offset, length) = if matches!(family, super::Family::Ipv6) { (8, 16) } else { (12, 4) };
        Self::Payload { base: PayloadBase::Network, offset, length, to }
    }

    /// Loads the destination address of an IPv4 or IPv6 packet.
    #[must_use]
    pub const fn destination_address(family: super::Family, to: Register) -> Self {
        let (offset, length) = if matches!(family, super::Family::Ipv6) { (24, 16) } else { (16, 4) };
        Self::Payload { base: PayloadBase::Network, offset, length, to }
    }

    /// Loads the source port of a TCP, UDP or SCTP packet, network byte order.
    #[must_use]
    pub const fn source_port(to: Register) -> Self {
        Self::Payload { base: PayloadBase::Transport, offset: 0, length: 2, to }
    }

    /// Loads the destination port of a TCP, UDP or SCTP packet, network byte order.
    #[must_use]
    pub const fn destination_port(to: Register) -> Self {
        Self::Payload { base: PayloadBase::Transport, offset: 2, length: 2, to }
    }

    /// `nft_expr_ops` by its name.
    fn name(&self) -> &'static str {
        match self {
            Self::Payload { .. } => "payload",
            Self::Meta { .. } | Self::SetMark { .. } => "meta",
            Self::Ct { .. } | Self::SetConnectionMark { .. } => "ct",
            Self::FibType { .. } => "fib",
            Self::Compare { .. } => "cmp",
            Self::Bitwise { .. } => "bitwise",
            Self::Constant { .. } | Self::Verdict(_) => "immediate",
            Self::Lookup { .. } => "lookup",
            Self::Random { .. } => "numgen",
            Self::Dynset { .. } => "dynset",
            Self::DestinationNat { .. } => "nat",
            Self::Masquerade { .. } => "masq",
            Self::Notrack => "notrack",
            Self::Reject(_) => "reject",
            Self::Queue { .. } => "queue",
            Self::Counter => "counter",
        }
    }

    /// `NFTA_EXPR_NAME` and `NFTA_EXPR_DATA` in a list element.
    pub(super) fn write(&self, buffer: &mut Vec<u8>) {
        nested(buffer, super::LIST_ELEMENT, |buffer| {
            attribute_string(buffer, 1, self.name());
            nested(buffer, 2, |buffer| self.write_attributes(buffer));
        });
    }

    fn write_attributes(&self, buffer: &mut Vec<u8>) {
        match self {
            Self::Payload { base, offset, length, to } => {
                let attributes = [(1, to.number()), (2, *base as u32), (3, *offset), (4, *length)];
                write_numbers(buffer, &attributes);
            }
            Self::Meta { key, to } => write_numbers(buffer, &[(1, to.number()), (2, *key as u32)]),
            Self::SetMark { from } => write_numbers(buffer, &[(2, MetaKey::Mark as u32), (3, from.number())]),
            Self::Ct { key, to } => write_numbers(buffer, &[(1, to.number()), (2, *key as u32)]),
            Self::SetConnectionMark { from } => write_numbers(buffer, &[(2, CtKey::Mark as u32), (4, from.number())]),
            Self::FibType { address, to } => {
                // NFT_FIB_RESULT_ADDRTYPE.
                write_numbers(buffer, &[(1, to.number()), (2, 3), (3, *address as u32)]);
            }
            Self::Compare { from, comparison, with } => {
                write_numbers(buffer, &[(1, from.number()), (2, *comparison as u32)]);
                nested(buffer, 3, |buffer| write_value(buffer, with));
            }
            Self::Bitwise { from, to, mask, xor } => {
                let length = u32::try_from(mask.len()).unwrap_or(u32::MAX);
                write_numbers(buffer, &[(1, from.number()), (2, to.number()), (3, length)]);
                nested(buffer, 4, |buffer| write_value(buffer, mask));
                nested(buffer, 5, |buffer| write_value(buffer, xor));
            }
            Self::Constant { value, to } => {
                write_numbers(buffer, &[(1, to.number())]);
                nested(buffer, 2, |buffer| write_value(buffer, value));
            }
            Self::Verdict(verdict) => {
                write_numbers(buffer, &[(1, VERDICT_REGISTER)]);
                nested(buffer, 2, |buffer| verdict.write(buffer));
            }
            Self::Lookup { set, key, target } => write_lookup(buffer, set, *key, *target),
            Self::Random { modulus, offset, to } => {
                // NFT_NG_RANDOM.
                write_numbers(buffer, &[(1, to.number()), (2, *modulus), (3, 1), (4, *offset)]);
            }
            Self::Dynset { set, operation, key, data, timeout_ms } => {
                attribute_string(buffer, 1, set);
                write_numbers(buffer, &[(3, *operation as u32), (4, key.number())]);
                if let Some(data) = data {
                    attribute_u32(buffer, 5, data.number());
                }
                if let Some(timeout_ms) = timeout_ms {
                    attribute_u64(buffer, 6, *timeout_ms);
                }
            }
            Self::DestinationNat { family, address, port } => {
                // NFT_NAT_DNAT.
                write_numbers(buffer, &[(1, 1), (2, *family as u32), (3, address.number()), (5, port.number())]);
            }
            Self::Masquerade { fully_random } => {
                // NF_NAT_RANGE_PROTO_RANDOM_FULLY.
                write_numbers(buffer, if *fully_random { &[(1, 1 << 4)] } else { &[] });
            }
            Self::Reject(kind) => write_reject(buffer, *kind),
            Self::Queue { number } => {
                // NFTA_QUEUE_NUM and NFTA_QUEUE_TOTAL.
                attribute(buffer, 1, &number.to_be_bytes());
                attribute(buffer, 2, &1u16.to_be_bytes());
            }
            Self::Counter | Self::Notrack => (),
        }
    }
}

fn write_numbers(buffer: &mut Vec<u8>, numbers: &[(u16, u32)]) {
    for (kind, value) in numbers {
        attribute_u32(buffer, *kind, *value);
    }
}

fn write_lookup(buffer: &mut Vec<u8>, set: &str, key: Register, target: LookupTarget) {
    attribute_string(buffer, 1, set);
    attribute_u32(buffer, 2, key.number());
    match target {
        LookupTarget::Nothing => (),
        // NFT_LOOKUP_F_INV.
        LookupTarget::NothingUnless => attribute_u32(buffer, 5, 1),
        LookupTarget::Register(to) => attribute_u32(buffer, 3, to.number()),
        LookupTarget::Verdict => attribute_u32(buffer, 3, VERDICT_REGISTER),
    }
}

/// `NFT_REJECT_ICMP_UNREACH` with ICMP_PORT_UNREACH or ICMPV6_PORT_UNREACH, or `NFT_REJECT_TCP_RST`.
fn write_reject(buffer: &mut Vec<u8>, kind: RejectKind) {
    let (kind, code) = match kind {
        RejectKind::PortUnreachableV4 => (0, 3),
        RejectKind::PortUnreachableV6 => (0, 4),
        RejectKind::TcpReset => (1, 0),
    };
    attribute_u32(buffer, 1, kind);
    attribute(buffer, 2, &[code]);
}
