//! Headers as they lie in packets, in network byte order.

use proxy_common::{Be16, V4, V6};

/// An IPv4 header without options (RFC 791).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv4Header {
    pub version_and_length: u8,
    pub tos: u8,
    pub total_length: Be16,
    pub identification: Be16,
    pub fragment: Be16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: u16,
    pub source: V4,
    pub destination: V4,
}

/// [`Ipv4Header::fragment`]: no router may cut the packet.
pub const IPV4_DO_NOT_FRAGMENT: u16 = 0x4000;

/// An IPv6 header (RFC 8200).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv6Header {
    pub version_and_flow: u32,
    pub payload_length: Be16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: V6,
    pub destination: V6,
}

impl Ipv6Header {
    #[inline(always)]
    pub(super) const fn is_of_version_6(&self) -> bool {
        u32::from_be(self.version_and_flow) >> 28 == 6
    }
}

/// The ports, at the start of TCP, UDP and SCTP alike.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ports {
    pub source: Be16,
    pub destination: Be16,
}
