//! Answering a packet with an ICMP error (RFC 792; RFC 4443, 3): port unreachable, as kube-proxy's REJECT answers every protocol;
//! time exceeded and packet too big, before the packet is translated, so that the answer names the tuple that the client knows.

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_OK, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC};
use aya_ebpf::helpers::{bpf_skb_adjust_room, bpf_skb_change_tail};
use proxy_common::checksum::fold;
use proxy_common::{Be16, FlowKey, MARK_DONE, V4, V6};

use crate::ctx::{ETHERNET_LENGTH, Hook, Packet};
use crate::maps::{Family, Ipv4, Ipv6};
use crate::parse::{Ipv4Header, Ipv6Header, SCTP, TCP, Transport};
use crate::tc::Direction;

/// Transport bytes that the answer quotes: all of a TCP header, so that a checksum still to be filled in stays inside
/// (the kernel refuses to cut it off), and eight bytes of any other. Of SCTP the common header, for the same reason, and an INIT's
/// first eight bytes: by the initiate tag in them Linux tells that the answer is for its socket (RFC 9260, 10).
const QUOTED_TCP: usize = 20;
const QUOTED_SCTP: usize = 20;
const QUOTED_OTHER: usize = 8;

const ICMP_PROTOCOL: u8 = 1;
const ICMP6_PROTOCOL: u8 = 58;
const HOPS: u8 = 64;

/// The first eight bytes of both ICMP messages.
#[repr(C)]
#[derive(Clone, Copy)]
struct IcmpHeader {
    type_and_code: [u8; 2],
    checksum: u16,
    /// The MTU in "packet too big", else zero.
    detail: u32,
}

/// What a packet is answered with.
#[derive(Clone, Copy)]
pub enum Refusal {
    /// Nobody serves the port.
    PortUnreachable,
    /// The packet would have to be forwarded and has no hop left.
    TimeExceeded,
    /// The packet is longer than the next hop takes.
    TooBig {
        /// Length in bytes that it takes.
        mtu: u32,
    },
}

/// The head of an ICMP error.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct ErrorKind {
    /// Type and code.
    type_and_code: [u8; 2],
    padding: [u8; 2],
    /// The four bytes behind the checksum.
    detail: u32,
}

/// An IPv4 header and an ICMP header, as they are put before the quoted packet.
#[repr(C)]
struct Answer4 {
    ip: Ipv4Header,
    icmp: IcmpHeader,
}

/// An IPv6 header and an ICMPv6 header.
#[repr(C)]
struct Answer6 {
    ip: Ipv6Header,
    icmp: IcmpHeader,
}

/// The part of the answer that differs by family.
pub trait Reject: Family {
    /// Bytes that go before the quoted packet.
    const HEADERS: usize;
    /// How this family says it.
    fn kind(refusal: Refusal) -> ErrorKind;
    /// Writes IP and ICMP headers; `quoted` bytes of the refused packet follow them.
    fn write(packet: &Packet<'_>, key: &FlowKey<Self::A>, kind: &ErrorKind, quoted: usize) -> Option<()>;
}

impl ErrorKind {
    #[inline(always)]
    const fn new(type_and_code: [u8; 2], detail: u32) -> Self {
        Self { type_and_code, padding: [0; 2], detail }
    }
}

impl Reject for Ipv4 {
    const HEADERS: usize = size_of::<Answer4>();

    /// RFC 792; the MTU by RFC 1191, 4.
    #[inline(always)]
    fn kind(refusal: Refusal) -> ErrorKind {
        match refusal {
            Refusal::PortUnreachable => ErrorKind::new([3, 3], 0),
            Refusal::TimeExceeded => ErrorKind::new([11, 0], 0),
            Refusal::TooBig { mtu } => ErrorKind::new([3, 4], (mtu & 0xffff).to_be()),
        }
    }

    #[inline(always)]
    fn write(packet: &Packet<'_>, key: &FlowKey<V4>, kind: &ErrorKind, quoted: usize) -> Option<()> {
        let quoted_sum = sum(packet, ETHERNET_LENGTH + Self::HEADERS, quoted)?;
        let answer = packet.at::<Answer4>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole structure is inside the packet.
        let answer = unsafe { &mut *answer };
        answer.ip = Ipv4Header {
            version_and_length: 0x45,
            tos: 0xc0,
            total_length: Be16::from_host((Self::HEADERS + quoted) as u16),
            identification: Be16(0),
            fragment: Be16(0),
            ttl: HOPS,
            protocol: ICMP_PROTOCOL,
            checksum: 0,
            source: key.destination,
            destination: key.source,
        };
        answer.ip.checksum = !fold(words(&answer.ip));
        answer.icmp = IcmpHeader { type_and_code: kind.type_and_code, checksum: 0, detail: kind.detail };
        answer.icmp.checksum = !fold(quoted_sum + words(&answer.icmp));
        Some(())
    }
}

impl Reject for Ipv6 {
    const HEADERS: usize = size_of::<Answer6>();

    /// RFC 4443, 3.
    #[inline(always)]
    fn kind(refusal: Refusal) -> ErrorKind {
        match refusal {
            Refusal::PortUnreachable => ErrorKind::new([1, 4], 0),
            Refusal::TimeExceeded => ErrorKind::new([3, 0], 0),
            Refusal::TooBig { mtu } => ErrorKind::new([2, 0], mtu.to_be()),
        }
    }

    #[inline(always)]
    fn write(packet: &Packet<'_>, key: &FlowKey<V6>, kind: &ErrorKind, quoted: usize) -> Option<()> {
        let quoted_sum = sum(packet, ETHERNET_LENGTH + Self::HEADERS, quoted)?;
        let payload = quoted + size_of::<IcmpHeader>();
        let answer = packet.at::<Answer6>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole structure is inside the packet.
        let answer = unsafe { &mut *answer };
        answer.ip = Ipv6Header {
            version_and_flow: 0x6000_0000_u32.to_be(),
            payload_length: Be16::from_host(payload as u16),
            next_header: ICMP6_PROTOCOL,
            hop_limit: HOPS,
            source: key.destination,
            destination: key.source,
        };
        answer.icmp = IcmpHeader { type_and_code: kind.type_and_code, checksum: 0, detail: kind.detail };
        // Pseudo-header (RFC 8200, 8.1): addresses, length, next header.
        let pseudo = words(&answer.ip.source) + words(&answer.ip.destination);
        let pseudo = pseudo + u64::from((payload as u32).to_be()) + u64::from(u32::from(ICMP6_PROTOCOL).to_be());
        answer.icmp.checksum = !fold(quoted_sum + pseudo + words(&answer.icmp));
        Some(())
    }
}

/// Turns the packet into the answer and sends it back to where it came from.
#[inline(always)]
pub fn reject<F: Reject>(
    packet: &Packet<'_>,
    transport: &Transport,
    key: &FlowKey<F::A>,
    kind: &ErrorKind,
    direction: Direction,
) -> Option<i32> {
    let quoted_transport = match transport.protocol {
        TCP => QUOTED_TCP,
        SCTP => QUOTED_SCTP,
        _ => QUOTED_OTHER,
    };
    let quoted = transport.offset - ETHERNET_LENGTH + quoted_transport;
    // SAFETY: the context is the kernel's.
    if unsafe { bpf_skb_change_tail(packet.raw(), (ETHERNET_LENGTH + quoted) as u32, 0) } != 0 {
        return None;
    }
    // SAFETY: as above; the room appears between the Ethernet and the IP header.
    if unsafe { bpf_skb_adjust_room(packet.raw(), F::HEADERS as i32, BPF_ADJ_ROOM_MAC, 0) } != 0 {
        return None;
    }
    F::write(packet, key, kind, quoted)?;
    packet.swap_ethernet_addresses()?;
    packet.tc.set_mark(packet.mark() | MARK_DONE);
    // On `lo` the packet is on its way back as it is, and has the route that it needs to be received.
    if packet.on_loopback() {
        return Some(TC_ACT_OK);
    }
    let flags = if direction == Direction::Ingress { 0 } else { u64::from(BPF_F_INGRESS) };
    Some(packet.redirect(packet.interface(), flags))
}

/// One's complement sum of `length` bytes of the packet, which are a multiple of four.
#[inline(always)]
fn sum(packet: &Packet<'_>, offset: usize, length: usize) -> Option<u64> {
    // The verifier wants a bound that it can see: headers are at most 60 bytes each.
    let mut total = 0;
    let mut done = 0;
    for _ in 0..QUOTED_WORDS_MAX {
        if done >= length {
            break;
        }
        let word = packet.at::<u32>(offset + done)?;
        // SAFETY: `at` checked the four bytes.
        total += u64::from(unsafe { *word });
        done += 4;
    }
    if done < length { None } else { Some(total) }
}

/// Words of the longest quotation: IPv6 with 60 bytes of extension headers, and a TCP header.
const QUOTED_WORDS_MAX: usize = (40 + 60 + QUOTED_TCP) / 4;

/// Sum of the 32-bit words of a header.
#[inline(always)]
fn words<T>(header: &T) -> u64 {
    let start = core::ptr::from_ref(header).cast::<u32>();
    let mut total = 0;
    let mut index = 0;
    while index < size_of::<T>() / 4 {
        // SAFETY: inside the header, whose size is a multiple of four.
        total += u64::from(unsafe { *start.add(index) });
        index += 1;
    }
    total
}
