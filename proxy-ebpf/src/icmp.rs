//! ICMP errors about translated packets: they follow the flow of the packet that they quote.
//!
//! Who sends an error saw the packet as we made it, so the reverse of the quoted tuple is the key of an entry in the flow table, and
//! that entry says both whom the error is for and what that one knows as its packet. As netfilter does (`nf_nat_icmp_reply_translation`
//! of net/netfilter/nf_nat_proto.c), the error seems to come from the other end of the flow, whichever router made it.

use core::ptr::read_volatile;

use proxy_common::checksum::{address_difference, update, word_difference};
use proxy_common::{Be16, Counter, FLOW_FOREIGN, Flow, FlowKey, V4, V6};

use crate::ctx::{Hook, Packet};
use crate::maps::{Family, Ipv4, Ipv6, Scratch};
use crate::nat::{Rewrite, TCP_CHECKSUM_OFFSET, UDP_CHECKSUM_OFFSET};
use crate::parse::{Ipv4Header, Ipv6Header, ParseNetwork, Ports, TCP, Transport, UDP, has_ports};

/// Bytes between the start of an ICMP error and the packet that it quotes (RFC 792; RFC 4443, 3).
const ICMP_HEADER_LENGTH: usize = 8;
/// Offset of the checksum in both ICMP headers.
const ICMP_CHECKSUM_OFFSET: usize = 2;
/// Redirect (RFC 792).
const ICMP_REDIRECT: u8 = 5;
/// Bytes of an IP packet are counted with 16 bits, and this many hold all headers of one packet that quotes another.
const OFFSET_MASK: u32 = 0xfff;

/// Where things are in the packet. It is read back from a map, where the verifier knows nothing of it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Quotation {
    /// Offset of the ICMP header.
    icmp: u32,
    /// Offset of the quoted transport header.
    transport: u32,
}

impl Quotation {
    #[inline(always)]
    fn icmp(&self) -> usize {
        (self.icmp & OFFSET_MASK) as usize
    }

    #[inline(always)]
    fn quoted(&self) -> usize {
        self.icmp() + ICMP_HEADER_LENGTH
    }

    #[inline(always)]
    fn transport(&self) -> usize {
        (self.transport & OFFSET_MASK) as usize
    }
}

/// The part of quoted packets that differs by family.
pub trait Quote: Rewrite + ParseNetwork {
    /// Whether the checksum of ICMP covers the addresses of the packet around it.
    const ERROR_COVERS_ADDRESSES: bool;
    /// Writes the addresses of the quoted header at `offset`, and its checksum. Returns what that adds to a sum over all of it.
    fn quote(packet: &Packet<'_>, offset: usize, source: &Self::A, destination: &Self::A) -> Option<u64>;
}

impl Quote for Ipv4 {
    const ERROR_COVERS_ADDRESSES: bool = false;

    #[inline(always)]
    fn quote(packet: &Packet<'_>, offset: usize, source: &V4, destination: &V4) -> Option<u64> {
        let header = packet.at::<Ipv4Header>(offset)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let header = unsafe { &mut *header };
        let difference =
            address_difference(&header.source, source) + address_difference(&header.destination, destination);
        let before = header.checksum;
        header.checksum = update(before, difference);
        header.source = *source;
        header.destination = *destination;
        Some(difference + word_difference(before.into(), header.checksum.into()))
    }
}

impl Quote for Ipv6 {
    const ERROR_COVERS_ADDRESSES: bool = true;

    #[inline(always)]
    fn quote(packet: &Packet<'_>, offset: usize, source: &V6, destination: &V6) -> Option<u64> {
        let header = packet.at::<Ipv6Header>(offset)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let header = unsafe { &mut *header };
        let difference =
            address_difference(&header.source, source) + address_difference(&header.destination, destination);
        header.source = *source;
        header.destination = *destination;
        Some(difference)
    }
}

/// Leaves in `scratch.flow` the entry that the quoted packet's answers are translated with, in `scratch.reply_key` the key of it, and in
/// `scratch.reply` the addresses that the error is to have. `Err` says why the error is not ours, or is dropped.
#[inline(always)]
pub fn find<F: Quote>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &mut Scratch<F::A>,
) -> Result<(), Option<Counter>> {
    scratch.quotation = Quotation { icmp: transport.offset as u32, transport: 0 };
    packet.pull_headers();
    // SAFETY: a reference is valid and aligned.
    let quotation = unsafe { read_volatile(&scratch.quotation) };
    read::<F>(packet, quotation.quoted(), scratch).ok_or(None)?;
    // SAFETY: as above.
    let quotation = unsafe { read_volatile(&scratch.quotation) };
    // What lies behind the error's end is no quotation, and its checksum does not cover it.
    if !is_quoted::<F>(packet, &quotation, size_of::<Ports>()) {
        return Err(None);
    }
    F::flows().read(&scratch.reply_key, &mut scratch.flow).ok_or(None)?;
    if scratch.flow.flags & FLOW_FOREIGN != 0 {
        return Err(None);
    }
    if F::AF == Ipv4::AF && is_redirect(packet, &quotation) {
        return Err(Some(Counter::IcmpRedirect));
    }
    let key = &mut scratch.key;
    (key.source_port, key.destination_port) = (Be16(0), Be16(0));
    (key.protocol, key.padding) = (transport.protocol, [0; 3]);
    let from_other_end = scratch.flow.source != scratch.reply_key.source;
    let source = if from_other_end { scratch.flow.source } else { scratch.key.source };
    scratch.reply = Flow { source, ..scratch.flow };
    Ok(())
}

/// Reads the quoted packet's tuple, reversed.
#[inline(always)]
fn read<F: Quote>(packet: &Packet<'_>, offset: usize, scratch: &mut Scratch<F::A>) -> Option<()> {
    let quoted = F::network_at(packet, offset, &mut scratch.reply_key)?;
    if quoted.is_later() || !has_ports(quoted.protocol) {
        return None;
    }
    scratch.quotation.transport = quoted.l4_offset as u32;
    // SAFETY: a reference is valid and aligned.
    let quotation = unsafe { read_volatile(&scratch.quotation) };
    // SAFETY: `at` checked the four bytes.
    let ports = packet.at::<Ports>(quotation.transport()).map(|ports| unsafe { *ports })?;
    let FlowKey { source, destination, .. } = scratch.reply_key;
    scratch.reply_key = FlowKey {
        source: destination,
        destination: source,
        source_port: ports.destination,
        destination_port: ports.source,
        protocol: quoted.protocol,
        padding: [0; 3],
    };
    Some(())
}

/// A redirect would make its receiver send translated packets to a router that does not translate. netfilter drops these as well. That of
/// IPv6 is no error but a message of neighbour discovery (RFC 4861, 4.5).
#[inline(always)]
fn is_redirect(packet: &Packet<'_>, quotation: &Quotation) -> bool {
    // SAFETY: `at` checked the eight bytes.
    packet
        .at::<[u8; ICMP_HEADER_LENGTH]>(quotation.icmp())
        .is_some_and(|header| unsafe { (*header)[0] } == ICMP_REDIRECT)
}

/// Translates the error that [`find`] has found the flow of: its own addresses, the quoted tuple and every checksum on the way.
#[inline(always)]
pub fn translate<F: Quote>(packet: &Packet<'_>, scratch: &mut Scratch<F::A>, forwarded: bool) -> Option<()> {
    // SAFETY: a reference is valid and aligned.
    let quotation = unsafe { read_volatile(&scratch.quotation) };
    let flow = &scratch.flow;
    let mut difference = F::quote(packet, quotation.quoted(), &flow.destination, &flow.source)?;
    difference += quote_ports::<F>(packet, &quotation, scratch)?;
    if F::ERROR_COVERS_ADDRESSES {
        difference += address_difference(&scratch.key.source, &scratch.reply.source);
        difference += address_difference(&scratch.key.destination, &scratch.reply.destination);
    }
    let field = packet.at::<u16>(quotation.icmp() + ICMP_CHECKSUM_OFFSET)?;
    // SAFETY: `at` checked the two bytes. No device fills in the checksum of an error.
    unsafe { *field = update(*field, difference) };
    <F as Rewrite>::network(packet, &scratch.reply, forwarded)?;
    // What crosses to `lo` is recognized by its source.
    scratch.flow.source = scratch.reply.source;
    Some(())
}

/// Writes the quoted ports, and the quoted checksum where there is one. Returns what that adds to a sum over all of it.
///
/// A function of its own, whose stack is in use only here: the caller's and that of the table of flows have to fit beside each other.
#[inline(never)]
fn quote_ports<F: Quote>(packet: &Packet<'_>, quotation: &Quotation, scratch: &Scratch<F::A>) -> Option<u64> {
    let (flow, key) = (&scratch.flow, &scratch.reply_key);
    let ports = packet.at::<[Be16; 2]>(quotation.transport())?;
    let new = [flow.destination_port, flow.source_port];
    // SAFETY: `at` checked the four bytes.
    let mut difference = unsafe { word_difference(word(*ports), word(new)) };
    // SAFETY: as above.
    unsafe { *ports = new };
    let covered = difference
        + address_difference(&key.destination, &flow.destination)
        + address_difference(&key.source, &flow.source);
    let (offset, none_is_zero) = match key.protocol {
        TCP => (TCP_CHECKSUM_OFFSET, false),
        UDP => (UDP_CHECKSUM_OFFSET, true),
        // SCTP's covers all of a packet, of which there is only a part.
        _ => return Some(difference),
    };
    if !is_quoted::<F>(packet, quotation, offset + size_of::<u16>()) {
        return Some(difference);
    }
    let Some(field) = packet.at::<u16>(quotation.transport() + offset) else { return Some(difference) };
    // SAFETY: `at` checked the two bytes.
    let before = unsafe { *field };
    if !(none_is_zero && before == 0) {
        let after = update(before, covered);
        let after = if none_is_zero && after == 0 { u16::MAX } else { after };
        // SAFETY: as above.
        unsafe { *field = after };
        difference += word_difference(before.into(), after.into());
    }
    Some(difference)
}

/// Whether so many bytes of the transport header are in the error, and not padding of the link behind it.
#[inline(always)]
fn is_quoted<F: Quote>(packet: &Packet<'_>, quotation: &Quotation, length: usize) -> bool {
    let needed = quotation.transport() + length - quotation.icmp();
    let error = Transport { protocol: 0, offset: quotation.icmp(), tcp_flags: 0 };
    F::transport_length(packet, &error).is_some_and(|present| present as usize >= needed)
}

/// Both ports as the 32-bit word that they are in memory.
#[inline(always)]
fn word(ports: [Be16; 2]) -> u32 {
    u32::from(ports[0].0) | u32::from(ports[1].0) << 16
}
