//! Ethernet frames with TCP, built and checked byte by byte.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};

/// TCP flags.
pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 16;

const PAYLOAD: &[u8; 32] = b"thirty-two bytes of tcp payload!";
const HOPS: u8 = 64;

/// A TCP segment from `source` to `destination`, both of one family.
pub(crate) fn tcp(source: SocketAddr, destination: SocketAddr, flags: u8) -> Vec<u8> {
    let mut segment = Vec::with_capacity(52);
    segment.extend(source.port().to_be_bytes());
    segment.extend(destination.port().to_be_bytes());
    segment.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(PAYLOAD);
    let checksum = !sum(&pseudo(source.ip(), destination.ip(), segment.len()), &segment);
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(network_header(source.ip(), destination.ip(), segment.len()));
    frame.extend(segment);
    frame
}

/// Offset of the TCP header.
pub(crate) fn tcp_offset(frame: &[u8]) -> usize {
    if frame.get(12) == Some(&0x08) { 34 } else { 54 }
}

/// Checks that `frame` is the segment from `source` to `destination` with both checksums right and one hop less.
pub(crate) fn check(frame: &[u8], source: SocketAddr, destination: SocketAddr, hops_less: u8) -> Result<()> {
    let flags = frame[tcp_offset(frame) + 13];
    let mut expected = tcp(source, destination, flags);
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

fn network_header(source: IpAddr, destination: IpAddr, length: usize) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = vec![0x45, 0];
            header.extend(((length + 20) as u16).to_be_bytes());
            header.extend([0, 1, 0x40, 0, HOPS, 6, 0, 0]);
            header.extend(source.octets());
            header.extend(destination.octets());
            let checksum = !sum(&[], &header);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
            [vec![0x08, 0x00], header].concat()
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut header = vec![0x86, 0xdd, 0x60, 0, 0, 0];
            header.extend((length as u16).to_be_bytes());
            header.extend([6, HOPS]);
            header.extend(source.octets());
            header.extend(destination.octets());
            header
        }
        _ => Vec::new(),
    }
}

fn pseudo(source: IpAddr, destination: IpAddr, length: usize) -> Vec<u8> {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    [octets(source), octets(destination), vec![0, 6], (length as u16).to_be_bytes().to_vec()].concat()
}

/// One's complement sum (RFC 1071) of two byte strings of even length.
fn sum(first: &[u8], second: &[u8]) -> u16 {
    let words = first.chunks(2).chain(second.chunks(2)).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}
