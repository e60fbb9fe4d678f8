//! Tunnels of direct server return as they are on the wire, by the rules that ARCHITECTURE.md gives and without the programs' own code.

use std::net::{IpAddr, SocketAddr};

use super::bed::family;
use super::read::{ETHERNET, word};
use crate::packet::{Packet, UDP};

/// Protocols of packets in packets, by family.
const IN_IP: [u8; 2] = [4, 41];
/// Port of GUE.
const GUE: u16 = 6080;
/// Bytes of a network header, by family, and of a UDP header.
const NETWORK: [usize; 2] = [20, 40];
const UDP_HEADER: usize = 8;
/// The first source port of GUE.
const ENTROPY_PORTS: u16 = 0xc000;

/// Bytes that a tunnel adds.
pub(crate) const fn overhead(of: usize, gue: bool) -> usize {
    NETWORK[of] + if gue { UDP_HEADER } else { 0 }
}

/// A frame that holds a packet in a tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tunnel {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) gue: bool,
    /// The frame without the tunnel.
    pub(crate) inner: Vec<u8>,
}

impl Tunnel {
    /// Reads a frame; `None` where there is no tunnel, or one with options or in fragments.
    pub(crate) fn read(frame: &[u8]) -> Option<Self> {
        let of = match word(frame, 12)? {
            0x0800 => 0,
            0x86dd => 1,
            _ => return None,
        };
        let header = frame.get(ETHERNET..ETHERNET + NETWORK[of])?;
        let plain = if of == 0 { header[0] == 0x45 && word(header, 6)? & 0x3fff == 0 } else { true };
        let protocol = header[if of == 0 { 9 } else { 6 }];
        let gue = protocol == UDP && word(frame, ETHERNET + NETWORK[of] + 2) == Some(GUE);
        if !plain || !(gue || protocol == IN_IP[of]) {
            return None;
        }
        let (ethernet, packet) = (&frame[..ETHERNET], frame.get(ETHERNET + overhead(of, gue)..)?);
        let version = packet.get(..4)?[0] >> 4;
        let ends = if of == 0 { &header[12..] } else { &header[8..] };
        (version == [4, 6][of]).then(|| Self {
            source: address(&ends[..ends.len() / 2]),
            destination: address(&ends[ends.len() / 2..]),
            gue,
            inner: [ethernet, packet].concat(),
        })
    }

    /// Puts a packet into a tunnel; `entropy` becomes GUE's source port.
    pub(crate) fn wrap(packet: &Packet, from: IpAddr, to: IpAddr, entropy: Option<u16>) -> Packet {
        match entropy {
            Some(port) => Packet::udp(SocketAddr::new(from, port), SocketAddr::new(to, GUE), &packet.bytes()),
            None => Packet::new(from, to, IN_IP[family(from)], packet.bytes()),
        }
    }
}

fn address(octets: &[u8]) -> IpAddr {
    match <[u8; 4]>::try_from(octets) {
        Ok(octets) => octets.into(),
        Err(_) => std::array::from_fn::<u8, 16, _>(|index| octets[index]).into(),
    }
}

/// The frame `after` without its tunnel, which must be one of this kind between these ends around the packet of `before`.
pub(crate) fn taken_off(before: &[u8], after: &[u8], ends: [IpAddr; 2], gue: bool) -> Result<Vec<u8>, String> {
    let tunnel = Tunnel::read(after).ok_or("it goes in no tunnel")?;
    if [tunnel.source, tunnel.destination] != ends || tunnel.gue != gue {
        return Err(format!("the tunnel is {tunnel:?}; it must be {ends:?}, GUE {gue}"));
    }
    let (of, packet) = (family(ends[0]), &before[ETHERNET..]);
    let header = &after[ETHERNET..];
    let mut wanted = match of {
        0 => header_v4(packet, ends, gue),
        _ => header_v6(packet, ends, gue),
    };
    if gue {
        let length = own_length(of, packet) + UDP_HEADER;
        let port = word(header, NETWORK[of]).unwrap_or(0);
        wanted.extend([port | ENTROPY_PORTS, GUE, length as u16, 0].map(u16::to_be_bytes).concat());
    }
    match (0..wanted.len()).find(|at| wanted[*at] != header[*at]) {
        Some(at) => Err(format!("byte {at} of the tunnel is {:#04x} and must be {:#04x}", header[at], wanted[at])),
        None => Ok(tunnel.inner),
    }
}

/// Length of a packet by its own account.
fn own_length(of: usize, packet: &[u8]) -> usize {
    match of {
        0 => word(packet, 2).map_or(0, usize::from),
        _ => word(packet, 4).map_or(0, usize::from) + NETWORK[1],
    }
}

fn header_v4(packet: &[u8], [source, destination]: [IpAddr; 2], gue: bool) -> Vec<u8> {
    let around = Packet {
        payload: vec![0; own_length(0, packet) + overhead(0, gue) - NETWORK[0]],
        ..Packet::new(source, destination, if gue { UDP } else { IN_IP[0] }, Vec::new())
    };
    // The checksum follows the class of service.
    let class = packet[1] & 0xfc;
    let mut bytes = around.bytes();
    bytes.truncate(NETWORK[0]);
    bytes[1] = class;
    let checksum = word(&bytes, 10).unwrap_or(0);
    bytes[10..12].copy_from_slice(&less(checksum, class.into()).to_be_bytes());
    bytes
}

/// One's complement difference of two words.
fn less(word: u16, by: u16) -> u16 {
    let (difference, borrowed) = word.overflowing_sub(by);
    difference.wrapping_sub(u16::from(borrowed))
}

fn header_v6(packet: &[u8], [source, destination]: [IpAddr; 2], gue: bool) -> Vec<u8> {
    let around = Packet::new(source, destination, if gue { UDP } else { IN_IP[1] }, Vec::new());
    let length = own_length(1, packet) + overhead(1, gue) - NETWORK[1];
    let mut bytes = around.bytes();
    // Version, class without its congestion mark, and flow label.
    bytes[..4].copy_from_slice(&packet[..4]);
    bytes[1] &= 0xcf;
    bytes[4..6].copy_from_slice(&(length as u16).to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(packet: &Packet) -> Vec<u8> {
        [&[7; 12], &packet.ether_type().to_be_bytes()[..], &packet.bytes()].concat()
    }

    #[test]
    fn what_was_wrapped_is_found_again() {
        for (client, service, from, to) in [
            ("198.51.100.7:4000", "10.96.0.1:80", "172.18.0.12", "10.244.1.2"),
            ("[fd00:c1::7]:4000", "[fd00:96::1]:80", "fd00:18::12", "fd00:244:1::2"),
        ] {
            let packet = Packet::udp(client.parse().unwrap(), service.parse().unwrap(), b"hello");
            let ends: [IpAddr; 2] = [from, to].map(|ip| ip.parse().unwrap());
            for entropy in [None, Some(0xc123)] {
                let wrapped = framed(&Tunnel::wrap(&packet, ends[0], ends[1], entropy));
                let tunnel = Tunnel::read(&wrapped).unwrap();
                let inner = framed(&packet);
                assert_eq!((tunnel.source, tunnel.destination), (ends[0], ends[1]));
                assert_eq!((tunnel.gue, &tunnel.inner), (entropy.is_some(), &inner));
                assert!(taken_off(&inner, &wrapped, [ends[1], ends[0]], tunnel.gue).is_err());
                assert!(Tunnel::read(&inner).is_none());
            }
        }
    }

    #[test]
    fn a_checksum_of_one_s_complement_is_taken_from() {
        assert_eq!(less(5, 3), 2);
        assert_eq!(less(3, 5), 0xfffd);
    }
}
