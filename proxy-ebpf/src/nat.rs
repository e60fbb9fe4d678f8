//! Rewriting a packet's tuple with its checksums.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::bpf_l4_csum_replace;
use proxy_common::checksum::{address_difference, as_csum_diff, fold, update, word_difference};
use proxy_common::{Flow, FlowKey, V4, V6, crc32c};

use crate::ctx::{ETHERNET_LENGTH, Frame, Hook, Packet};
use crate::maps::{Family, Ipv4, Ipv6, Scratch};
use crate::parse::{IPV4_DO_NOT_FRAGMENT, Ipv4Header, Ipv6Header, Ports, SCTP, Transport, UDP};

/// Offset of the checksum in a TCP header.
pub const TCP_CHECKSUM_OFFSET: usize = 16;
/// Offset of the checksum in a UDP header.
pub const UDP_CHECKSUM_OFFSET: usize = 6;
const SCTP_CHECKSUM_OFFSET: usize = 8;

/// The part of rewriting that differs by family.
pub trait Rewrite: Family {
    /// TTL or hop limit.
    fn time_to_live(packet: &impl Hook) -> Option<u8>;
    /// Whether a router may cut the packet into fragments.
    fn may_be_fragmented(packet: &impl Hook) -> bool;
    /// Bytes behind the network header and its extensions, padding of the link not counted.
    fn transport_length(packet: &Packet<'_>, transport: &Transport) -> Option<u32>;
    /// Writes the addresses, and one hop less where `forwarded`.
    fn network(packet: &impl Hook, flow: &Flow<Self::A>, forwarded: bool) -> Option<()>;
    /// A loopback address.
    const LOOPBACK: Self::A;
    /// Whether fragments are told apart by their protocol too.
    const IDENTIFICATION_BY_PROTOCOL: bool;
    /// Identification of a packet that a router may cut.
    fn identification(packet: &impl Hook) -> Option<u32>;
    /// Writes the source for the time until the packet leaves: the transport checksum, which covers it too, is left.
    fn set_source(packet: &Packet<'_>, to: &Self::A) -> Option<()>;
    /// Writes the destination for the time between two hooks: the transport checksum, which covers it too, is left.
    fn set_destination(packet: &Packet<'_>, to: &Self::A) -> Option<()>;
}

impl Rewrite for Ipv4 {
    #[inline(always)]
    fn time_to_live(packet: &impl Hook) -> Option<u8> {
        // SAFETY: `at` checked that the whole header is inside the packet.
        packet.at::<Ipv4Header>(ETHERNET_LENGTH).map(|header| unsafe { (*header).ttl })
    }

    #[inline(always)]
    fn may_be_fragmented(packet: &impl Hook) -> bool {
        let header = packet.at::<Ipv4Header>(ETHERNET_LENGTH);
        // SAFETY: `at` checked that the whole header is inside the packet.
        header.is_some_and(|header| unsafe { (*header).fragment }.to_host() & IPV4_DO_NOT_FRAGMENT == 0)
    }

    #[inline(always)]
    fn transport_length(packet: &Packet<'_>, transport: &Transport) -> Option<u32> {
        // SAFETY: `at` checked that the whole header is inside the packet.
        let total = packet.at::<Ipv4Header>(ETHERNET_LENGTH).map(|header| unsafe { (*header).total_length })?;
        u32::from(total.to_host()).checked_sub((transport.offset - ETHERNET_LENGTH) as u32)
    }

    #[inline(always)]
    fn network(packet: &impl Hook, flow: &Flow<V4>, forwarded: bool) -> Option<()> {
        let header = packet.at::<Ipv4Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let header = unsafe { &mut *header };
        let mut difference = address_difference(&header.source, &flow.source);
        difference += address_difference(&header.destination, &flow.destination);
        if forwarded {
            // TTL is the first byte of its 16-bit word.
            let ttl = u32::from(header.ttl);
            difference += word_difference(ttl, ttl - 1);
            header.ttl -= 1;
        }
        header.checksum = update(header.checksum, difference);
        header.source = flow.source;
        header.destination = flow.destination;
        Some(())
    }

    const LOOPBACK: V4 = V4::from_octets([127, 0, 0, 1]);

    const IDENTIFICATION_BY_PROTOCOL: bool = true;

    #[inline(always)]
    fn identification(packet: &impl Hook) -> Option<u32> {
        let header = packet.at::<Ipv4Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        Some(unsafe { (*header).identification }.to_host().into())
    }

    #[inline(always)]
    fn set_source(packet: &Packet<'_>, to: &V4) -> Option<()> {
        let header = packet.at::<Ipv4Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let header = unsafe { &mut *header };
        header.checksum = update(header.checksum, address_difference(&header.source, to));
        header.source = *to;
        Some(())
    }

    #[inline(always)]
    fn set_destination(packet: &Packet<'_>, to: &V4) -> Option<()> {
        let header = packet.at::<Ipv4Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let header = unsafe { &mut *header };
        header.checksum = update(header.checksum, address_difference(&header.destination, to));
        header.destination = *to;
        Some(())
    }
}

impl Rewrite for Ipv6 {
    #[inline(always)]
    fn time_to_live(packet: &impl Hook) -> Option<u8> {
        // SAFETY: `at` checked that the whole header is inside the packet.
        packet.at::<Ipv6Header>(ETHERNET_LENGTH).map(|header| unsafe { (*header).hop_limit })
    }

    #[inline(always)]
    fn may_be_fragmented(_packet: &impl Hook) -> bool {
        false
    }

    #[inline(always)]
    fn transport_length(packet: &Packet<'_>, transport: &Transport) -> Option<u32> {
        // SAFETY: `at` checked that the whole header is inside the packet.
        let payload = packet.at::<Ipv6Header>(ETHERNET_LENGTH).map(|header| unsafe { (*header).payload_length })?;
        let extensions = transport.offset - ETHERNET_LENGTH - size_of::<Ipv6Header>();
        u32::from(payload.to_host()).checked_sub(extensions as u32)
    }

    #[inline(always)]
    fn network(packet: &impl Hook, flow: &Flow<V6>, forwarded: bool) -> Option<()> {
        let header = packet.at::<Ipv6Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let header = unsafe { &mut *header };
        if forwarded {
            header.hop_limit -= 1;
        }
        header.source = flow.source;
        header.destination = flow.destination;
        Some(())
    }

    const LOOPBACK: V6 = V6::from_octets([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);

    const IDENTIFICATION_BY_PROTOCOL: bool = false;

    #[inline(always)]
    fn identification(_packet: &impl Hook) -> Option<u32> {
        None
    }

    #[inline(always)]
    fn set_source(_packet: &Packet<'_>, _to: &V6) -> Option<()> {
        None
    }

    #[inline(always)]
    fn set_destination(packet: &Packet<'_>, to: &V6) -> Option<()> {
        let header = packet.at::<Ipv6Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        unsafe { (*header).destination = *to };
        Some(())
    }
}

/// Gives the packet the flow's tuple. `None` leaves a packet that must be dropped.
///
/// The transport checksum goes through the helper: only it knows whether the packet's checksum is complete or, as for
/// every packet of a local pod, still to be filled in by a device.
#[inline(always)]
pub fn translate<F: Rewrite>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &Scratch<F::A>,
    forwarded: bool,
) -> Option<()> {
    let flow = &scratch.flow;
    transport_checksum::<F>(packet, transport, &scratch.key, flow)?;
    F::network(packet, flow, forwarded)?;
    let ports = packet.at::<Ports>(transport.offset)?;
    // SAFETY: `at` checked the four bytes.
    unsafe { *ports = Ports { source: flow.source_port, destination: flow.destination_port } };
    Some(())
}

/// Gives a frame the flow's tuple, one hop less, and the link-layer addresses of its next hop. Only for TCP and UDP, where a frame's
/// checksum is complete: no device of this machine has anything to add to it. `None` before anything is written.
#[inline(always)]
pub fn translate_frame<F: Rewrite>(frame: &Frame<'_>, transport: &Transport, scratch: &Scratch<F::A>) -> Option<()> {
    let (key, flow) = (&scratch.key, &scratch.flow);
    let is_udp = transport.protocol == UDP;
    let offset = transport.offset + if is_udp { UDP_CHECKSUM_OFFSET } else { TCP_CHECKSUM_OFFSET };
    let ethernet = frame.at::<[u32; 3]>(0)?;
    let field = frame.at::<u16>(offset)?;
    let ports = frame.at::<Ports>(transport.offset)?;
    F::network(frame, flow, true)?;
    let mut difference = address_difference(&key.source, &flow.source);
    difference += address_difference(&key.destination, &flow.destination);
    let old = ports_word(key.source_port.0, key.destination_port.0);
    let new = ports_word(flow.source_port.0, flow.destination_port.0);
    difference += word_difference(old as u32, new as u32);
    // SAFETY: `at` checked all three places, and nothing moves a frame.
    unsafe {
        *ethernet = flow.link;
        let checksum = *field;
        // A UDP checksum of 0 means none (RFC 768) and stays 0; a computed 0 is sent as its other form.
        if !is_udp || checksum != 0 {
            let checksum = update(checksum, difference);
            *field = if is_udp && checksum == 0 { u16::MAX } else { checksum };
        }
        *ports = Ports { source: flow.source_port, destination: flow.destination_port };
    }
    Some(())
}

#[inline(always)]
fn transport_checksum<F: Rewrite>(
    packet: &Packet<'_>,
    transport: &Transport,
    key: &FlowKey<F::A>,
    flow: &Flow<F::A>,
) -> Option<()> {
    if transport.protocol == SCTP {
        return sctp_checksum::<F>(packet, transport, key, flow);
    }
    // A UDP checksum of 0 means none (RFC 768) and stays 0.
    let (offset, flags) = match transport.protocol {
        UDP => (transport.offset + UDP_CHECKSUM_OFFSET, u64::from(BPF_F_MARK_MANGLED_0)),
        _ => (transport.offset + TCP_CHECKSUM_OFFSET, 0),
    };
    let mut difference = address_difference(&key.source, &flow.source);
    difference += address_difference(&key.destination, &flow.destination);
    let before = read_checksum(packet, offset)?;
    replace_checksum(packet, offset, 0, as_csum_diff(difference), flags | u64::from(BPF_F_PSEUDO_HDR))?;
    let old = ports_word(key.source_port.0, key.destination_port.0);
    let new = ports_word(flow.source_port.0, flow.destination_port.0);
    let after = read_checksum(packet, offset)?;
    if !covers_packet(before, after, difference) {
        return replace_checksum(packet, offset, old, new, flags | size_of::<Ports>() as u64);
    }
    let checksum = update(after, word_difference(old as u32, new as u32));
    let field = packet.at::<u16>(offset)?;
    // A computed 0 is sent as its other form where 0 means none.
    let checksum = if checksum == 0 && flags != 0 { u16::MAX } else { checksum };
    // SAFETY: `at` checked the two bytes.
    unsafe { *field = checksum };
    Some(())
}

#[inline(always)]
fn read_checksum(packet: &Packet<'_>, offset: usize) -> Option<u16> {
    // SAFETY: `at` checked the two bytes.
    packet.at::<u16>(offset).map(|field| unsafe { *field })
}

/// Whether a transport checksum covers the whole packet, so that the ports count in it: told by what the kernel made of a change of
/// the addresses. Where a device is to fill it in it holds the sum over the addresses alone, not complemented. What looks the same
/// either way, or is no checksum at all, is left to the kernel, which knows, and costs as much as all other arithmetic together.
#[inline(always)]
fn covers_packet(before: u16, after: u16, difference: u64) -> bool {
    let partial = fold(u64::from(before) + difference);
    after == update(before, difference) && after != partial && before != 0
}

/// SCTP's checksum covers the ports and no address. A field of 0 is left as it is: the kernel writes that where a device, or the
/// other end of the machine, is to fill it in (large packets that are to be cut are of this kind). That a finished checksum is
/// 0 happens to one packet in four thousand million, which its receiver then drops and its sender repeats.
#[inline(always)]
fn sctp_checksum<F: Rewrite>(
    packet: &Packet<'_>,
    transport: &Transport,
    key: &FlowKey<F::A>,
    flow: &Flow<F::A>,
) -> Option<()> {
    let old = ports_word(key.source_port.0, key.destination_port.0) as u32;
    let new = ports_word(flow.source_port.0, flow.destination_port.0) as u32;
    let length = F::transport_length(packet, transport)?;
    let field = packet.at::<u32>(transport.offset + SCTP_CHECKSUM_OFFSET)?;
    // SAFETY: `at` checked the four bytes.
    let checksum = u32::from_le(unsafe { *field });
    if old != new && checksum != 0 {
        let difference = crc32c::first_word_difference(u32::from_le(old ^ new), length);
        // SAFETY: as above; the call touches no packet.
        unsafe { *field = (checksum ^ difference).to_le() };
    }
    Some(())
}

#[inline(always)]
fn replace_checksum(packet: &Packet<'_>, offset: usize, old: u64, new: u64, flags: u64) -> Option<()> {
    // SAFETY: the context is the kernel's; the helper checks the offset.
    match unsafe { bpf_l4_csum_replace(packet.raw(), offset as u32, old, new, flags) } {
        0 => Some(()),
        _ => None,
    }
}

/// Both ports as the 32-bit word that they are in memory.
#[inline(always)]
fn ports_word(source: u16, destination: u16) -> u64 {
    u64::from(source) | u64::from(destination) << 16
}
