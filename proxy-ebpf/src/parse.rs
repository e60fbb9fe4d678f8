//! From bytes to a five-tuple: Ethernet, IPv4 with options or IPv6 with extension headers, TCP, UDP or SCTP.

mod headers;

use core::ptr::read_volatile;

use proxy_common::{FlowKey, V4, V6};

use crate::ctx::{ETHERNET_LENGTH, Frame, HEADERS_LENGTH, Hook, Packet};
use crate::maps::{Family, Ipv4, Ipv6};

pub use headers::{IPV4_DO_NOT_FRAGMENT, Ipv4Header, Ipv6Header, Ports};

/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// SCTP.
pub const SCTP: u8 = 132;
/// ICMP.
pub const ICMP: u8 = 1;
/// ICMP for IPv6.
pub const ICMP6: u8 = 58;
const ICMP_ECHO_REQUEST: u8 = 8;
const ICMP6_ECHO_REQUEST: u8 = 128;
/// FIN, SYN, RST and ACK of the TCP flags byte.
pub const TCP_FIN: u8 = 1;
pub const TCP_SYN: u8 = 2;
pub const TCP_RST: u8 = 4;
pub const TCP_ACK: u8 = 16;

/// Farthest offset of a transport header that is looked at; what goes on with it knows no farther one.
const OFFSET_MAX: usize = 0xf00;

/// Bytes that the header of a transport has at least (RFC 9293, 3.1; RFC 9260, 3.1; RFC 768; RFC 792).
#[inline(always)]
const fn header_min(protocol: u8) -> u32 {
    match protocol {
        TCP => 20,
        SCTP => SCTP_HEADER_LENGTH as u32,
        _ => 8,
    }
}

/// Ports, verification tag, checksum (RFC 9260, 3.1); the first chunk follows.
const SCTP_HEADER_LENGTH: usize = 12;

/// First chunks that matter (RFC 9260, 3.2): one opens an association, the others end it.
const SCTP_INIT: u8 = 1;
const SCTP_ABORT: u8 = 6;
const SCTP_SHUTDOWN_ACK: u8 = 8;
const SCTP_SHUTDOWN_COMPLETE: u8 = 14;

/// Routing header of IPv6.
const ROUTING: u8 = 43;

/// The part of [`Network::fragment`] that is an offset.
const FRAGMENT_OFFSET_MASK: u16 = 0xfff8;

/// IPv6 extension headers that are walked; a packet with more is not ours.
const EXTENSION_HEADERS_MAX: usize = 4;

/// Of the fragment field of IPv4 (RFC 791, 3.1): "more fragments" and the offset.
pub const FRAGMENT_BITS: u16 = 0x3fff;

/// What parsing found.
pub enum Parse {
    /// A packet that may be ours: with ports, or one that asks for an answer as an ICMP echo request does.
    Tuple(Transport),
    /// An ICMP error about another packet.
    Error(Transport),
    /// Another message of ICMP: the kernel's business.
    Other,
    /// Headers that contradict each other or the packet's length.
    Malformed,
    /// IPv6 with more extension headers than are looked through.
    TooManyExtensions,
    /// A part of a packet that may be ours.
    Fragment(Network),
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

    /// Whether the packet ends it at once: nobody waits for an answer.
    #[inline(always)]
    pub fn resets(&self) -> bool {
        self.tcp_flags & TCP_RST != 0
    }

    /// Whether the packet ends a TCP connection or an SCTP association.
    #[inline(always)]
    pub fn closes(&self) -> bool {
        self.tcp_flags & (TCP_FIN | TCP_RST) != 0
    }
}

/// What the network header says beside the addresses.
pub struct Network {
    /// Protocol of what follows.
    pub protocol: u8,
    /// Its offset from the start of the packet.
    pub l4_offset: usize,
    /// Of a fragment its offset in bytes, and 1 if more follow (the field of RFC 8200, 4.5); 0 for a whole packet.
    pub fragment: u16,
    /// Bytes of the packet by its own account, network header included.
    pub length: u32,
    /// Of a fragment what it has in common with the others, host byte order.
    pub identification: u32,
}

impl Network {
    /// Whether the transport header is in another packet.
    #[inline(always)]
    pub fn is_later(&self) -> bool {
        self.fragment & FRAGMENT_OFFSET_MASK != 0
    }

    /// Offset in the datagram, in bytes.
    #[inline(always)]
    pub fn offset(&self) -> u32 {
        u32::from(self.fragment & FRAGMENT_OFFSET_MASK)
    }

    /// Whether more fragments follow.
    #[inline(always)]
    pub fn more(&self) -> bool {
        self.fragment & 1 != 0
    }
}

/// The part of parsing that differs by family.
pub trait ParseNetwork: Family {
    /// Reads the network header at `start`; the addresses go into `key`.
    fn network_at(packet: &Packet<'_>, start: usize, key: &mut FlowKey<Self::A>) -> Option<Network>;

    /// Reads the packet's own network header.
    #[inline(always)]
    fn network(packet: &Packet<'_>, key: &mut FlowKey<Self::A>) -> Option<Network> {
        Self::network_at(packet, ETHERNET_LENGTH, key)
    }

    /// Whether an ICMP message of this type is an error about another packet.
    fn is_error(protocol: u8, kind: u8) -> bool;

    /// Offset of the transport header of a plain packet.
    const PLAIN_OFFSET: usize;
    /// Reads the network header of a plain packet: whole, without options or extension headers, no fragment, with more than one hop
    /// to go. Returns its protocol and the bytes behind the header, as it counts them; the addresses go into `key`.
    fn plain(frame: &Frame<'_>, key: &mut FlowKey<Self::A>) -> Option<(u8, usize)>;
}

impl ParseNetwork for Ipv4 {
    const PLAIN_OFFSET: usize = ETHERNET_LENGTH + size_of::<Ipv4Header>();

    #[inline(always)]
    fn plain(frame: &Frame<'_>, key: &mut FlowKey<V4>) -> Option<(u8, usize)> {
        let header = frame.at::<Ipv4Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the frame.
        let header = unsafe { &*header };
        let is_fragment = header.fragment.0 & FRAGMENT_BITS.to_be() != 0;
        if header.version_and_length != 0x45 || is_fragment || header.ttl <= 1 {
            return None;
        }
        key.source = header.source;
        key.destination = header.destination;
        let length = (header.total_length.to_host() as usize).checked_sub(size_of::<Ipv4Header>())?;
        Some((header.protocol, length))
    }

    #[inline(always)]
    fn network_at(packet: &Packet<'_>, start: usize, key: &mut FlowKey<V4>) -> Option<Network> {
        let header = packet.at::<Ipv4Header>(start)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let header = unsafe { &*header };
        // Version 4, and five to fifteen words.
        if header.version_and_length.wrapping_sub(0x45) > 0x4f - 0x45 {
            return None;
        }
        key.source = header.source;
        key.destination = header.destination;
        let fragment = header.fragment.to_host();
        Some(Network {
            protocol: header.protocol,
            l4_offset: start + ((header.version_and_length & 0xf) as usize) * 4,
            // "More fragments" is the bit above the offset, which counts eights.
            fragment: (fragment << 3) | (fragment >> 13 & 1),
            identification: header.identification.to_host().into(),
            length: header.total_length.to_host().into(),
        })
    }

    /// Destination unreachable, source quench, redirect, time exceeded, parameter problem (RFC 792).
    #[inline(always)]
    fn is_error(protocol: u8, kind: u8) -> bool {
        protocol == ICMP && matches!(kind, 3 | 4 | 5 | 11 | 12)
    }
}

impl ParseNetwork for Ipv6 {
    const PLAIN_OFFSET: usize = ETHERNET_LENGTH + size_of::<Ipv6Header>();

    #[inline(always)]
    fn plain(frame: &Frame<'_>, key: &mut FlowKey<V6>) -> Option<(u8, usize)> {
        let header = frame.at::<Ipv6Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the frame.
        let header = unsafe { &*header };
        if !header.is_of_version_6() || header.hop_limit <= 1 {
            return None;
        }
        key.source = header.source;
        key.destination = header.destination;
        Some((header.next_header, header.payload_length.to_host() as usize))
    }

    #[inline(always)]
    fn network_at(packet: &Packet<'_>, start: usize, key: &mut FlowKey<V6>) -> Option<Network> {
        let header = packet.at::<Ipv6Header>(start)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let header = unsafe { &*header };
        if !header.is_of_version_6() {
            return None;
        }
        key.source = header.source;
        key.destination = header.destination;
        let mut network = Network {
            protocol: header.next_header,
            l4_offset: start + size_of::<Ipv6Header>(),
            fragment: 0,
            identification: 0,
            length: size_of::<Ipv6Header>() as u32 + u32::from(header.payload_length.to_host()),
        };
        if !has_ports(network.protocol) {
            skip_extension_headers(packet, &mut network)?;
        }
        Some(network)
    }

    /// Errors are the types below 128 (RFC 4443, 2.1).
    #[inline(always)]
    fn is_error(protocol: u8, kind: u8) -> bool {
        protocol == ICMP6 && kind < 128
    }
}

/// Hop-by-hop options, routing, fragment, destination options (RFC 8200, 4).
#[inline(always)]
fn skip_extension_headers(packet: &Packet<'_>, network: &mut Network) -> Option<()> {
    for _ in 0..EXTENSION_HEADERS_MAX {
        let length = match network.protocol {
            0 | ROUTING | 60 => {
                let header = packet.at::<[u8; 4]>(network.l4_offset)?;
                // SAFETY: `at` checked the four bytes.
                let [next, length, _, segments_left] = unsafe { *header };
                // On its way to somebody else, whose address is the one that its checksum covers.
                if network.protocol == ROUTING && segments_left != 0 {
                    return Some(());
                }
                network.protocol = next;
                (length as usize + 1) * 8
            }
            44 => {
                let header = packet.at::<[u8; 8]>(network.l4_offset)?;
                // SAFETY: `at` checked the eight bytes.
                let header = unsafe { *header };
                network.protocol = header[0];
                network.fragment = u16::from_be_bytes([header[2], header[3]]) & (FRAGMENT_OFFSET_MASK | 1);
                network.identification = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                if network.is_later() {
                    network.l4_offset += 8;
                    return Some(());
                }
                8
            }
            _ => return Some(()),
        };
        network.l4_offset += length;
        if network.l4_offset > OFFSET_MAX {
            return None;
        }
    }
    Some(())
}

/// Parses a plain TCP or UDP packet into `key`; `None` for any other.
#[inline(always)]
pub fn parse_plain<F: ParseNetwork>(frame: &Frame<'_>, key: &mut FlowKey<F::A>) -> Option<Transport> {
    let (protocol, length) = F::plain(frame, key)?;
    let (header_length, tcp_flags) = match protocol {
        TCP => {
            let header = frame.at::<[u8; 20]>(F::PLAIN_OFFSET)?;
            // SAFETY: `at` checked all twenty bytes.
            unsafe { ((*header)[12] as usize / 16 * 4, (*header)[13]) }
        }
        UDP => frame.at::<[u8; 8]>(F::PLAIN_OFFSET).map(|_header| (8, 0))?,
        _ => return None,
    };
    // What contradicts itself is dropped and counted at the tc hook.
    let shortest = if protocol == TCP { 20 } else { 8 };
    if header_length < shortest || length < header_length || F::PLAIN_OFFSET + length > frame.length() {
        return None;
    }
    let ports = frame.at::<u32>(F::PLAIN_OFFSET)?;
    // SAFETY: `at` checked the four bytes.
    key.set_transport(unsafe { *ports }, protocol);
    Some(Transport { protocol, offset: F::PLAIN_OFFSET, tcp_flags })
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
            // As it lies in the map: else the compiler moves what no kind of packet has initialized, which the verifier refuses.
            // SAFETY: a reference is valid and aligned.
            let protocol = unsafe { read_volatile(&key.protocol) };
            if protocol == NO_HEADER { Parse::Malformed } else { Parse::Tuple(Transport { protocol, ..transport }) }
        }
        Some(parse) => parse,
        // Headers of IPv4 are never longer than what was made linear.
        None if F::AF == Ipv4::AF || packet.length() <= HEADERS_LENGTH => Parse::Malformed,
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
    let end = ETHERNET_LENGTH as u32 + network.length;
    let is_short = end > packet.length() || end < network.l4_offset as u32 + header_min(network.protocol);
    if is_short && let Some(parse) = short(packet, &network) {
        return Some(parse);
    }
    if !has_ports(network.protocol) {
        return portless::<F>(packet, &network);
    }
    if network.fragment != 0 {
        // SCTP's checksum needs the length of the whole packet, and it does not let its packets be cut.
        return Some(if network.protocol == SCTP { Parse::Other } else { Parse::Fragment(network) });
    }
    tuple(packet, &network, key).map(Parse::Tuple)
}

/// Looks at a packet that ends early: before its own account of its length, inside its headers, or legally so.
#[inline(always)]
fn short(packet: &Packet<'_>, network: &Network) -> Option<Parse> {
    // What is to be cut may be too long to say how long it is.
    if packet.segment_size() != 0 {
        return None;
    }
    let end = ETHERNET_LENGTH as u32 + network.length;
    if end > packet.length() || end < network.l4_offset as u32 {
        return Some(Parse::Malformed);
    }
    // The last fragment may be as short as one byte.
    if network.fragment != 0 && has_ports(network.protocol) {
        return None;
    }
    Some(if has_ports(network.protocol) { Parse::Malformed } else { Parse::Other })
}

/// [`FlowKey::protocol`] of what [`tuple`] has found to be no such header.
pub const NO_HEADER: u8 = 0;

/// Reads the transport header; its ports and protocol go into `key`, and [`NO_HEADER`] where it is none. `None` when the linear part is
/// too short.
///
/// That it is none is said in memory: as an `Option` it would leave the rest undefined, of which the compiler makes what the verifier
/// refuses.
#[inline(always)]
pub fn tuple<A>(packet: &Packet<'_>, network: &Network, key: &mut FlowKey<A>) -> Option<Transport> {
    let (ports, tcp_flags, is_header) = transport(packet, network)?;
    key.set_transport(ports, network.protocol * u8::from(is_header));
    Some(Transport { protocol: network.protocol, offset: network.l4_offset, tcp_flags })
}

/// Reads the transport header of a first fragment, which [`parse`] has not asked for: it may lie behind the linear part still. `None` where there
/// is none in this packet: it is left to its receiver.
#[inline(always)]
pub fn first_fragment<A>(packet: &Packet<'_>, network: &Network, key: &mut FlowKey<A>) -> Option<Transport> {
    packet.pull_headers();
    let transport = tuple(packet, network, key)?;
    if key.protocol == NO_HEADER { None } else { Some(transport) }
}

/// Whether the protocol is one of those that Services know.
#[inline(always)]
pub fn has_ports(protocol: u8) -> bool {
    protocol == TCP || protocol == UDP || protocol == SCTP
}

/// Of ICMP only the echo request opens something; errors and neighbour discovery never do.
#[inline(always)]
fn portless<F: ParseNetwork>(packet: &Packet<'_>, network: &Network) -> Option<Parse> {
    if network.is_later() {
        return Some(Parse::Other);
    }
    if F::AF == Ipv6::AF && matches!(network.protocol, 0 | ROUTING | 44 | 60) {
        return Some(Parse::TooManyExtensions);
    }
    let header = packet.at::<[u8; 8]>(network.l4_offset)?;
    // SAFETY: `at` checked all eight bytes.
    let kind = unsafe { (*header)[0] };
    let transport = Transport { protocol: network.protocol, offset: network.l4_offset, tcp_flags: 0 };
    if F::is_error(network.protocol, kind) {
        return Some(Parse::Error(transport));
    }
    Some(match network.protocol {
        ICMP if kind != ICMP_ECHO_REQUEST => Parse::Other,
        ICMP6 if kind != ICMP6_ECHO_REQUEST => Parse::Other,
        _ => Parse::Tuple(transport),
    })
}

/// Both ports as one word, as they are in memory, TCP flags, which only TCP has here, and whether that is a header. One of TCP is checked whole, the others likewise. `None` as above.
#[inline(always)]
fn transport(packet: &Packet<'_>, network: &Network) -> Option<(u32, u8, bool)> {
    if network.protocol == TCP {
        let header = packet.at::<[u8; 20]>(network.l4_offset)?;
        // SAFETY: `at` checked all twenty bytes.
        let (ports, words, flags) = unsafe { (*header.cast::<u32>(), (*header)[12] >> 4, (*header)[13]) };
        // A header of less than five words is none (RFC 9293, 3.1).
        return Some((ports, flags, words >= 5));
    }
    if network.protocol == SCTP {
        let header = packet.at::<[u8; SCTP_HEADER_LENGTH]>(network.l4_offset)?;
        // SAFETY: `at` checked all twelve bytes.
        return unsafe { Some((*header.cast::<u32>(), 0, true)) };
    }
    let header = packet.at::<[u8; 8]>(network.l4_offset)?;
    // SAFETY: `at` checked all eight bytes.
    unsafe { Some((*header.cast::<u32>(), 0, true)) }
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
