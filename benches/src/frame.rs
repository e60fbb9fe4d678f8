//! Ethernet frames with TCP or UDP, built and checked byte by byte.
#![expect(
    clippy::indexing_slicing,
    reason = "offsets into frames and contexts that the benchmark makes itself: a wrong one ends it at once"
)]

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};

/// TCP's SYN flag.
pub const SYN: u8 = 2;
/// TCP's ACK flag.
pub const ACK: u8 = 16;
/// Bytes of an Ethernet address; a frame begins with its destination's.
pub const LINK_ADDRESS: usize = 6;

const TCP: u8 = 6;
const UDP: u8 = 17;
const PAYLOAD: &[u8; 32] = b"thirty-two bytes of tcp payload!";
/// As long as a TCP header and its payload, so that both kinds of packets have one length.
const UDP_PAYLOAD: &[u8; 44] = b"forty-four bytes, TCP's header and payload!!";
const UDP_HEADER: usize = 8;
const HOPS: u8 = 64;

/// A TCP segment from `source` to `destination`, both of one family.
pub fn tcp(source: SocketAddr, destination: SocketAddr, flags: u8) -> Vec<u8> {
    let mut segment = ports(source, destination);
    segment.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(PAYLOAD);
    frame(source.ip(), destination.ip(), TCP, segment, 16)
}

/// A UDP datagram from `source` to `destination`, both of one family.
pub fn udp(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let mut segment = ports(source, destination);
    segment.extend(((UDP_HEADER + UDP_PAYLOAD.len()) as u16).to_be_bytes());
    segment.extend([0, 0]);
    segment.extend(UDP_PAYLOAD);
    frame(source.ip(), destination.ip(), UDP, segment, 6)
}

fn ports(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat()
}

/// A frame around a segment whose checksum is at this offset.
fn frame(source: IpAddr, destination: IpAddr, protocol: u8, mut segment: Vec<u8>, checksum_at: usize) -> Vec<u8> {
    let checksum = !sum(&pseudo(source, destination, protocol, segment.len()), &segment);
    segment[checksum_at..checksum_at + 2].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(network_header(source, destination, protocol, segment.len()));
    frame.extend(segment);
    frame
}

/// Offset of the transport header.
pub fn transport_offset(frame: &[u8]) -> usize {
    if frame.get(12) == Some(&0x08) { 34 } else { 54 }
}

/// Protocol number of the transport.
pub fn protocol(frame: &[u8]) -> u8 {
    frame[if frame.get(12) == Some(&0x08) { 23 } else { 20 }]
}

/// Checks that `frame` is the segment from `source` to `destination` with both checksums right and this many hops less.
///
/// # Errors
/// When it is another one; both are in the message.
pub fn check(frame: &[u8], source: SocketAddr, destination: SocketAddr, hops_less: u8) -> Result<()> {
    let mut expected = match protocol(frame) {
        UDP => udp(source, destination),
        _ => tcp(source, destination, frame[transport_offset(frame) + 13]),
    };
    let ttl = if source.is_ipv4() { 22 } else { 21 };
    expected[ttl] -= hops_less;
    if source.is_ipv4() {
        let ihl = 14..34;
        expected[24..26].fill(0);
        let checksum = !sum(&[], &expected[ihl]);
        expected[24..26].copy_from_slice(&checksum.to_be_bytes());
    }
    ensure!(
        frame[12..] == expected[12..],
        "the packet became\n  {:02x?}\nand not {source} -> {destination}:\n  {:02x?}",
        &frame[12..],
        &expected[12..]
    );
    Ok(())
}

/// Whether the checksum of an IPv4 header is right.
pub fn checksum_is_right(header: &[u8]) -> bool {
    sum(&[], header) == u16::MAX
}

fn network_header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = vec![0x45, 0];
            header.extend(((length + 20) as u16).to_be_bytes());
            header.extend([0, 1, 0x40, 0, HOPS, protocol, 0, 0]);
            header.extend(source.octets());
            header.extend(destination.octets());
            let checksum = !sum(&[], &header);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
            [vec![0x08, 0x00], header].concat()
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut header = vec![0x86, 0xdd, 0x60, 0, 0, 0];
            header.extend((length as u16).to_be_bytes());
            header.extend([protocol, HOPS]);
            header.extend(source.octets());
            header.extend(destination.octets());
            header
        }
        _ => Vec::new(),
    }
}

fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    [octets(source), octets(destination), vec![0, protocol], (length as u16).to_be_bytes().to_vec()].concat()
}

/// One's complement sum (RFC 1071) of two byte strings of even length.
fn sum(first: &[u8], second: &[u8]) -> u16 {
    let words = first.chunks(2).chain(second.chunks(2)).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}
