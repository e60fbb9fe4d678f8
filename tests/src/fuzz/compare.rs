//! Whether a frame became another one and nothing else of it changed; every checksum counts.

use std::net::{IpAddr, SocketAddr};

use super::fate::{Mac, Refusal};
use super::read::{ETHERNET, Outline, SCTP, Tuple, crc32c, sum, word};
use crate::packet::{ICMP, ICMP6, Packet, TCP, UDP};

/// What becomes of a packet's ends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Change {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) part: Part,
    /// The longest segment that a SYN may ask for.
    pub(crate) segment: Option<u16>,
}

/// Beside the addresses.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    Nothing,
    Ports,
    /// There are no ports in this packet.
    Addresses,
    /// An ICMP error: the packet that it quotes gets these ends.
    Quote {
        outline: Outline,
        source: SocketAddr,
        destination: SocketAddr,
    },
}

impl Change {
    /// None.
    pub(crate) fn of(tuple: Tuple) -> Self {
        Self { source: tuple.source, destination: tuple.destination, part: Part::Ports, segment: None }
    }

    /// None, of a packet in a tunnel.
    pub(crate) fn inside(outline: &Outline) -> Self {
        let (source, destination) = ((outline.source, 0).into(), (outline.destination, 0).into());
        Self { source, destination, part: Part::Nothing, segment: None }
    }
}

/// Offsets of checksums, and sums that no translation changes.
#[derive(Debug, Default)]
struct Sums {
    fields: Vec<(usize, usize)>,
    sums: Vec<(&'static str, u32)>,
}

/// Compares `after` with what `before` must have become. `source_later`: the source is written when the packet leaves, but its
/// checksum covers it already.
pub(crate) fn difference(
    before: &[u8],
    after: &[u8],
    outline: &Outline,
    change: &Change,
    mac: Mac,
    forwarded: bool,
    source_later: bool,
) -> Result<(), String> {
    let mut wanted = before.to_vec();
    write_macs(&mut wanted, mac);
    if forwarded {
        wanted[outline.network + if outline.source.is_ipv4() { 8 } else { 7 }] -= 1;
    }
    if let Some(longest) = change.segment {
        write_segment_size(&mut wanted, outline.transport, longest);
    }
    let source = if source_later { outline.source } else { change.source.ip() };
    write_ends(&mut wanted, outline, source, change.destination.ip());
    match change.part {
        Part::Ports => write_ports(&mut wanted, outline.transport, change.source, change.destination),
        Part::Quote { outline, source, destination } => {
            write_ends(&mut wanted, &outline, source.ip(), destination.ip());
            write_ports(&mut wanted, outline.transport, source, destination);
        }
        Part::Nothing | Part::Addresses => {}
    }
    if wanted.len() != after.len() {
        return Err(format!("{} bytes became {}", wanted.len(), after.len()));
    }
    let mut covered = after.to_vec();
    if source_later {
        write_ends(&mut covered, outline, change.source.ip(), change.destination.ip());
    }
    let (was, is) = (sums(before, outline, change.part), sums(&covered, outline, change.part));
    let mut found = after.to_vec();
    for (at, length) in &was.fields {
        for bytes in [&mut wanted, &mut found] {
            bytes[*at..*at + *length].fill(0);
        }
    }
    if let Some(at) = (0..wanted.len()).find(|at| wanted[*at] != found[*at]) {
        return Err(format!("byte {at} is {:#04x} and must be {:#04x}", found[at], wanted[at]));
    }
    // The header has its own source still.
    let header = header_sum(after, outline);
    if header != header_sum(before, outline) {
        return Err("the network header's checksum is wrong".to_owned());
    }
    match was.sums.iter().zip(&is.sums).find(|(was, is)| was != is) {
        Some((was, is)) => Err(format!("the checksum of {} is wrong: {:#x} became {:#x}", was.0, was.1, is.1)),
        None if was.sums.len() != is.sums.len() => Err("a checksum of 0 came or went".to_owned()),
        None => Ok(()),
    }
}

fn write_macs(frame: &mut [u8], mac: Mac) {
    match mac {
        Mac::Same => {}
        Mac::Zero => frame[..12].fill(0),
        Mac::Swapped => {
            for at in 0..6 {
                frame.swap(at, at + 6);
            }
        }
        Mac::To(destination, source) => {
            frame[..6].copy_from_slice(&destination);
            frame[6..12].copy_from_slice(&source);
        }
    }
}

fn write_ends(frame: &mut [u8], outline: &Outline, source: IpAddr, destination: IpAddr) {
    let at = outline.network + if outline.source.is_ipv4() { 12 } else { 8 };
    let ends = [octets(source), octets(destination)].concat();
    frame[at..at + ends.len()].copy_from_slice(&ends);
}

fn write_ports(frame: &mut [u8], at: usize, source: SocketAddr, destination: SocketAddr) {
    let ports = [source.port(), destination.port()].map(u16::to_be_bytes).concat();
    frame[at..at + 4].copy_from_slice(&ports);
}

/// Lowers what a TCP header at `at` says of the longest segment that its sender takes (RFC 9293, 3.7.1).
fn write_segment_size(frame: &mut [u8], at: usize, longest: u16) {
    let end = at + usize::from(frame[at + 12] >> 4) * 4;
    let mut option = at + 20;
    while let (true, Some([kind, length])) =
        (option < end, frame.get(option..option + 2).map(|pair| [pair[0], pair[1]]))
    {
        match kind {
            0 => return,
            1 => option += 1,
            2 if option + 4 <= end => {
                if word(frame, option + 2).is_some_and(|size| size > longest) {
                    frame[option + 2..option + 4].copy_from_slice(&longest.to_be_bytes());
                }
                return;
            }
            _ => option += usize::from(length).max(1),
        }
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Sum over an IPv4 header with its checksum.
fn header_sum(frame: &[u8], outline: &Outline) -> u16 {
    if outline.source.is_ipv6() {
        return 0;
    }
    let length = usize::from(frame[outline.network] & 0xf) * 4;
    sum(&[frame.get(outline.network..outline.network + length).unwrap_or_default()])
}

fn sums(frame: &[u8], outline: &Outline, part: Part) -> Sums {
    let mut sums = Sums::default();
    header(&mut sums, outline);
    match part {
        Part::Ports => transport(&mut sums, frame, outline, outline.end),
        Part::Quote { outline: quote, .. } => {
            let icmp = outline.transport + 2;
            sums.fields.push((icmp, 2));
            let pseudo = if outline.source.is_ipv4() { Vec::new() } else { pseudo(frame, outline, ICMP6, outline.end) };
            let message = &frame[outline.transport..outline.end];
            sums.sums.push(("the ICMP error", sum(&[&pseudo, message]).into()));
            header(&mut sums, &quote);
            sums.sums.push(("the quoted header", header_sum(frame, &quote).into()));
            if quote.protocol != SCTP {
                transport(&mut sums, frame, &quote, outline.end);
            }
        }
        Part::Nothing | Part::Addresses => {}
    }
    sums
}

fn header(sums: &mut Sums, outline: &Outline) {
    if outline.source.is_ipv4() {
        sums.fields.push((outline.network + 10, 2));
    }
}

/// The sum over what is there of a transport packet and its pseudo-header, up to `end`.
fn transport(sums: &mut Sums, frame: &[u8], outline: &Outline, end: usize) {
    let at = outline.transport;
    let (offset, length) = match outline.protocol {
        TCP => (16, 2),
        UDP => (6, 2),
        _ => (8, 4),
    };
    if at + offset + length > end || end > frame.len() {
        return;
    }
    sums.fields.push((at + offset, length));
    if outline.protocol == SCTP {
        let field: [u8; 4] = std::array::from_fn(|index| frame[at + offset + index]);
        let mut packet = frame[at..end].to_vec();
        packet[offset..offset + 4].fill(0);
        // A field of 0 is for a device to fill in.
        if field != [0; 4] {
            sums.sums.push(("SCTP", crc32c(&packet) ^ u32::from_le_bytes(field)));
        }
        return;
    }
    if outline.protocol == UDP && word(frame, at + offset) == Some(0) {
        return;
    }
    let pseudo = pseudo(frame, outline, outline.protocol, end);
    sums.sums.push(("the transport packet", sum(&[&pseudo, &frame[at..end]]).into()));
}

fn pseudo(frame: &[u8], outline: &Outline, protocol: u8, end: usize) -> Vec<u8> {
    let (at, length) = if outline.source.is_ipv4() { (12, 8) } else { (8, 32) };
    let ends = &frame[outline.network + at..outline.network + at + length];
    let rest = [0, protocol].into_iter().chain(((end - outline.transport) as u16).to_be_bytes());
    ends.iter().copied().chain(rest).collect()
}

/// Whether `after` is an ICMP error about `before`.
pub(crate) fn is_refusal(before: &[u8], after: &[u8]) -> bool {
    let protocol = |frame: &[u8]| match word(frame, 12) {
        Some(0x0800) => frame.get(ETHERNET + 9).copied(),
        _ => frame.get(ETHERNET + 6).copied(),
    };
    let is_icmp = |protocol| matches!(protocol, Some(ICMP | ICMP6));
    is_icmp(protocol(after)) && !is_icmp(protocol(before))
}

/// Compares `after` with the ICMP error that `before` must be answered with.
pub(crate) fn refusal(before: &[u8], after: &[u8], outline: &Outline, refusal: Refusal) -> Result<(), String> {
    let answer = after.get(ETHERNET..).and_then(Packet::parse).ok_or("the answer is no packet")?;
    let v4 = outline.source.is_ipv4();
    let (kind, detail) = match refusal {
        Refusal::Unreachable => (if v4 { [3, 3] } else { [1, 4] }, 0),
        Refusal::TimeExceeded => (if v4 { [11, 0] } else { [3, 0] }, 0),
        Refusal::TooBig(mtu) => (if v4 { [3, 4] } else { [2, 0] }, mtu),
    };
    let quoted = match outline.protocol {
        TCP | SCTP => 20,
        _ => 8,
    };
    let mut wanted = before[ETHERNET..].to_vec();
    wanted.resize(outline.transport - ETHERNET + quoted, 0);
    let swapped = after[..6] == before[6..12] && after[6..12] == before[..6];
    let checks = [
        (answer.protocol == if v4 { ICMP } else { ICMP6 }, "protocol"),
        (answer.source == outline.destination && answer.destination == outline.source, "addresses"),
        (answer.payload.get(..2) == Some(&kind[..]), "type and code"),
        (answer.payload.get(4..8) == Some(&u32::to_be_bytes(detail)[..]), "MTU"),
        (answer.payload.get(8..) == Some(&wanted[..]), "quoted packet"),
        (answer.checksum_is_right(), "checksum"),
        (answer.hops == 64 && answer.options.is_empty() && answer.fragment.is_none(), "header"),
        (swapped, "link-layer addresses"),
    ];
    match checks.iter().find(|(right, _)| !right) {
        Some((_, what)) => Err(format!("the {what} of the answer {refusal:?} is wrong: {answer:?}")),
        None => Ok(()),
    }
}
