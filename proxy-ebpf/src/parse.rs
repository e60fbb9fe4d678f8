//! From bytes to a five-tuple: Ethernet, IPv4 with options or IPv6 with extension headers, TCP, UDP or SCTP.

use core::ptr::read_volatile;

use proxy_common::{Be16, FlowKey, V4, V6};

use crate::ctx::{ETHERNET_LENGTH, Packet};
use crate::maps::{Family, Ipv4, Ipv6};

/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// SCTP.
pub const SCTP: u8 = 132;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;
const ICMP_ECHO_REQUEST: u8 = 8;
const ICMP6_ECHO_REQUEST: u8 = 128;
/// FIN, SYN, RST and ACK of the TCP flags byte.
pub const TCP_FIN: u8 = 1;
pub const TCP_SYN: u8 = 2;
pub const TCP_RST: u8 = 4;
pub const TCP_ACK: u8 = 16;

/// Ports, verification tag, checksum (RFC 9260, 3.1); the first chunk follows.
const SCTP_HEADER_LENGTH: usize = 12;

/// First chunks that matter (RFC 9260, 3.2): one opens an association, the others end it.
const SCTP_INIT: u8 = 1;
const SCTP_ABORT: u8 = 6;
const SCTP_SHUTDOWN_ACK: u8 = 8;
const SCTP_SHUTDOWN_COMPLETE: u8 = 14;

/// IPv6 extension headers that are walked; a packet with more is not ours.
const EXTENSION_HEADERS_MAX: usize = 4;

/// An IPv4 header without options (RFC 791).
#[repr(C)]
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

/// An IPv6 header (RFC 8200).
#[repr(C)]
pub struct Ipv6Header {
    pub version_and_flow: u32,
    pub payload_length: Be16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: V6,
    pub destination: V6,
}

/// The ports, at the start of TCP, UDP and SCTP alike.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ports {
    pub source: Be16,
    pub destination: Be16,
}

/// What parsing found.
pub enum Parse {
    /// A packet that may be ours: with ports, or one that asks for an answer as an ICMP echo request does.
    Tuple(Transport),
    /// An error message, or not well formed: the kernel's business.
    Other,
    /// A later fragment: its ports are in another packet.
    Fragment,
}

/// The transport header of a parsed packet.
#[derive(Clone, Copy)]
pub struct Transport {
    /// [`TCP`], [`UDP`] or [`SCTP`]; any other for a packet without ports.
    pub protocol: u8,
    /// Its offset from the start of the packet.
    pub offset: usize,
    /// TCP flags, or those that an SCTP chunk stands for; 0 for UDP.
    pub tcp_flags: u8,
}

impl Transport {
    /// Whether the packet may open something: a SYN without ACK, an INIT, or any packet of a protocol without these.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.protocol == UDP || !self.has_ports() || self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// Whether the protocol has ports, as all that Services know.
    #[inline(always)]
    pub fn has_ports(&self) -> bool {
        has_ports(self.protocol)
    }

    /// Whether the packet ends a TCP connection or an SCTP association.
    #[inline(always)]
    pub fn closes(&self) -> bool {
        self.tcp_flags & (TCP_FIN | TCP_RST) != 0
    }
}

/// What the network header says beside the addresses.
pub struct Network {
    protocol: u8,
    l4_offset: usize,
    later_fragment: bool,
}

/// The part of parsing that differs by family.
pub trait ParseNetwork: Family {
    /// Reads the network header; the addresses go into `key`.
    fn network(packet: &Packet<'_>, key: &mut FlowKey<Self::A>) -> Option<Network>;
}

impl ParseNetwork for Ipv4 {
    #[inline(always)]
    fn network(packet: &Packet<'_>, key: &mut FlowKey<V4>) -> Option<Network> {
        let header = packet.at::<Ipv4Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let header = unsafe { &*header };
        if header.version_and_length >> 4 != 4 {
            return None;
        }
        key.source = header.source;
        key.destination = header.destination;
        Some(Network {
            protocol: header.protocol,
            l4_offset: ETHERNET_LENGTH + ((header.version_and_length & 0xf) as usize) * 4,
            later_fragment: header.fragment.to_host() & 0x1fff != 0,
        })
    }
}

impl ParseNetwork for Ipv6 {
    #[inline(always)]
    fn network(packet: &Packet<'_>, key: &mut FlowKey<V6>) -> Option<Network> {
        let header = packet.at::<Ipv6Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let header = unsafe { &*header };
        key.source = header.source;
        key.destination = header.destination;
        let mut network = Network {
            protocol: header.next_header,
            l4_offset: ETHERNET_LENGTH + size_of::<Ipv6Header>(),
            later_fragment: false,
        };
        if !has_ports(network.protocol) {
            skip_extension_headers(packet, &mut network)?;
        }
        Some(network)
    }
}

/// Hop-by-hop options, routing, fragment, destination options (RFC 8200, 4).
#[inline(always)]
fn skip_extension_headers(packet: &Packet<'_>, network: &mut Network) -> Option<()> {
    for _ in 0..EXTENSION_HEADERS_MAX {
        let length = match network.protocol {
            0 | 43 | 60 => {
                let header = packet.at::<[u8; 2]>(network.l4_offset)?;
                // SAFETY: `at` checked the two bytes.
                let [next, length] = unsafe { *header };
                network.protocol = next;
                (length as usize + 1) * 8
            }
            44 => {
                let header = packet.at::<[u8; 8]>(network.l4_offset)?;
                // SAFETY: `at` checked the eight bytes.
                let header = unsafe { *header };
                network.protocol = header[0];
                network.later_fragment = u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0;
                8
            }
            _ => return Some(()),
        };
        network.l4_offset += length;
    }
    Some(())
}

/// Parses the packet into `key`; headers in a non-linear part are made linear first.
#[inline(always)]
pub fn parse<F: ParseNetwork>(packet: &Packet<'_>, key: &mut FlowKey<F::A>) -> Parse {
    let mut parse = parse_linear::<F>(packet, key);
    if parse.is_none() {
        packet.pull_headers();
        parse = parse_linear::<F>(packet, key);
    }
    match parse {
        Some(Parse::Tuple(transport)) if transport.protocol == SCTP => chunk(packet, transport),
        Some(Parse::Tuple(transport)) if transport.has_ports() => {
            // As it lies in the map, where the verifier knows nothing of it: else it walks all that follows once more for each protocol.
            // SAFETY: a reference is valid and aligned.
            let protocol = unsafe { read_volatile(&key.protocol) };
            Parse::Tuple(Transport { protocol, ..transport })
        }
        Some(parse) => parse,
        None => Parse::Other,
    }
}

/// Adds what an SCTP packet's first chunk means. Its type is copied from wherever it lies: a packet that is to be cut into several has
/// its header alone in the linear part, which is how the kernel cuts it, and how it reads it when nothing cuts it. Making more of it
/// linear destroys it.
#[inline(always)]
fn chunk(packet: &Packet<'_>, transport: Transport) -> Parse {
    match packet.byte(transport.offset + SCTP_HEADER_LENGTH) {
        Some(chunk) => Parse::Tuple(Transport { tcp_flags: sctp_flags(chunk), ..transport }),
        None => Parse::Other,
    }
}

/// `None` when the linear part is too short.
#[inline(always)]
fn parse_linear<F: ParseNetwork>(packet: &Packet<'_>, key: &mut FlowKey<F::A>) -> Option<Parse> {
    let network = F::network(packet, key)?;
    if !has_ports(network.protocol) {
        return portless(packet, &network);
    }
    if network.later_fragment {
        return Some(Parse::Fragment);
    }
    let (ports, tcp_flags) = transport(packet, &network)?;
    key.source_port = ports.source;
    key.destination_port = ports.destination;
    key.protocol = network.protocol;
    key.padding = [0; 3];
    Some(Parse::Tuple(Transport { protocol: network.protocol, offset: network.l4_offset, tcp_flags }))
}

#[inline(always)]
fn has_ports(protocol: u8) -> bool {
    protocol == TCP || protocol == UDP || protocol == SCTP
}

/// Of ICMP only the echo request opens something; errors and neighbour discovery never do.
#[inline(always)]
fn portless(packet: &Packet<'_>, network: &Network) -> Option<Parse> {
    if network.later_fragment {
        return Some(Parse::Other);
    }
    let header = packet.at::<[u8; 8]>(network.l4_offset)?;
    // SAFETY: `at` checked all eight bytes.
    let kind = unsafe { (*header)[0] };
    Some(match network.protocol {
        ICMP if kind != ICMP_ECHO_REQUEST => Parse::Other,
        ICMP6 if kind != ICMP6_ECHO_REQUEST => Parse::Other,
        protocol => Parse::Tuple(Transport { protocol, offset: network.l4_offset, tcp_flags: 0 }),
    })
}

/// Ports and TCP flags, which only TCP has here. A TCP header is checked whole, the others likewise.
#[inline(always)]
fn transport(packet: &Packet<'_>, network: &Network) -> Option<(Ports, u8)> {
    if network.protocol == TCP {
        let header = packet.at::<[u8; 20]>(network.l4_offset)?;
        // SAFETY: `at` checked all twenty bytes.
        return unsafe { Some((*header.cast::<Ports>(), (*header)[13])) };
    }
    if network.protocol == SCTP {
        let header = packet.at::<[u8; SCTP_HEADER_LENGTH]>(network.l4_offset)?;
        // SAFETY: `at` checked all twelve bytes.
        return unsafe { Some((*header.cast::<Ports>(), 0)) };
    }
    let header = packet.at::<[u8; 8]>(network.l4_offset)?;
    // SAFETY: `at` checked all eight bytes.
    unsafe { Some((*header.cast::<Ports>(), 0)) }
}

/// What the first chunk of an SCTP packet means in TCP's flags. INIT, SHUTDOWN ACK and SHUTDOWN COMPLETE travel alone or first.
///
/// Computed without a branch: the verifier would walk all that follows once for each outcome.
#[inline(always)]
fn sctp_flags(chunk: u8) -> u8 {
    let is_one_of = |chunks: u32| (chunks.checked_shr(u32::from(chunk)).unwrap_or(0) & 1) as u8;
    let opens = is_one_of(1 << SCTP_INIT);
    let ends = is_one_of(1 << SCTP_ABORT | 1 << SCTP_SHUTDOWN_ACK | 1 << SCTP_SHUTDOWN_COMPLETE);
    (opens * TCP_SYN) | ((1 - opens) * TCP_ACK) | (ends * TCP_RST)
}
