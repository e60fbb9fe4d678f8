//! Packets as data: built field by field, read back, cut into fragments; checksums by their definitions.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// IP protocol numbers.
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// Fragment header of IPv6.
pub const FRAGMENT: u8 = 44;
/// ICMP for IPv6.
pub const ICMP6: u8 = 58;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

/// An IP packet of either family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Sender.
    pub source: IpAddr,
    /// Receiver; of the same family.
    pub destination: IpAddr,
    /// What the payload is: of IPv6 what follows the headers in `options`.
    pub protocol: u8,
    /// TTL or hop limit.
    pub hops: u8,
    /// Whether an IPv4 packet may not be cut.
    pub dont_fragment: bool,
    /// Identification, offset in bytes (a multiple of 8) and whether more follow, of a fragment.
    pub fragment: Option<(u32, u16, bool)>,
    /// IPv4 options, or extension headers of IPv6 without their first byte's chain: see [`Packet::with_extensions`].
    pub options: Vec<u8>,
    /// IPv6: what the first header names as the next one, where that is not the protocol.
    pub first_extension: Option<u8>,
    /// Everything behind the IP header and its options.
    pub payload: Vec<u8>,
}

impl Packet {
    /// A packet without options that may not be cut, with 64 hops to go.
    pub fn new(source: IpAddr, destination: IpAddr, protocol: u8, payload: Vec<u8>) -> Self {
        Self {
            source,
            destination,
            protocol,
            hops: 64,
            dont_fragment: true,
            fragment: None,
            options: Vec::new(),
            first_extension: None,
            payload,
        }
    }

    /// A UDP datagram with its checksum.
    pub fn udp(source: SocketAddr, destination: SocketAddr, data: &[u8]) -> Self {
        let length = u16::try_from(8 + data.len()).unwrap_or(u16::MAX);
        let head = [source.port(), destination.port(), length, 0].map(u16::to_be_bytes).concat();
        let mut packet = Self::new(source.ip(), destination.ip(), UDP, [&head, data].concat());
        packet.fill_checksum(6);
        packet
    }

    /// A TCP segment with these flags and its checksum.
    pub fn tcp(source: SocketAddr, destination: SocketAddr, flags: u8, sequence: u32, data: &[u8]) -> Self {
        let mut payload = [source.port(), destination.port()].map(u16::to_be_bytes).concat();
        payload.extend(sequence.to_be_bytes());
        payload.extend([0, 0, 0, 0, 5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
        payload.extend(data);
        let mut packet = Self::new(source.ip(), destination.ip(), TCP, payload);
        packet.fill_checksum(16);
        packet
    }

    /// A TCP segment with options behind the header, which must have none yet; they are padded to whole words (RFC 9293, 3.1).
    #[must_use]
    pub fn with_tcp_options(mut self, options: &[u8]) -> Self {
        let words = options.len().div_ceil(4);
        let mut padded = options.to_vec();
        padded.resize(words * 4, 0);
        self.payload.splice(20..20, padded);
        if let Some(offset) = self.payload.get_mut(12) {
            *offset = (5 + words as u8) << 4;
        }
        if let Some(checksum) = self.payload.get_mut(16..18) {
            checksum.fill(0);
        }
        self.fill_checksum(16);
        self
    }

    /// An ICMP error with type and code, the four bytes behind the checksum, and what it quotes.
    pub fn icmp_error(source: IpAddr, destination: IpAddr, kind: [u8; 2], detail: u32, quoted: &[u8]) -> Self {
        let payload = [&kind[..], &[0, 0], &detail.to_be_bytes(), quoted].concat();
        let protocol = if source.is_ipv4() { ICMP } else { ICMP6 };
        let mut packet = Self::new(source, destination, protocol, payload);
        packet.fill_checksum(2);
        packet
    }

    /// Puts extension headers before the payload: `first` is the number of the first, and each names its successor itself, the last
    /// one the protocol.
    #[must_use]
    pub fn with_extensions(mut self, first: u8, headers: Vec<u8>) -> Self {
        self.first_extension = Some(first);
        self.options = headers;
        self
    }

    /// Source and destination port of TCP and UDP; zeros of a payload that is too short.
    pub fn ports(&self) -> [u16; 2] {
        [0, 2].map(|offset| word(&self.payload, offset))
    }

    /// Source with its port.
    pub fn from(&self) -> SocketAddr {
        SocketAddr::new(self.source, self.ports()[0])
    }

    /// Destination with its port.
    pub fn to(&self) -> SocketAddr {
        SocketAddr::new(self.destination, self.ports()[1])
    }

    /// The packet that an ICMP error quotes, as far as it goes.
    pub fn quoted(&self) -> Option<Self> {
        Self::parse_some(self.payload.get(8..)?)
    }

    /// EtherType.
    pub fn ether_type(&self) -> u16 {
        if self.source.is_ipv4() { 0x0800 } else { 0x86dd }
    }

    /// The sum over payload and pseudo header is what a receiver wants to see (RFC 1071): a checksum is right. An ICMP message of
    /// IPv4 has no pseudo header.
    pub fn checksum_is_right(&self) -> bool {
        fold(self.pseudo_header() + sum(&self.payload)) == 0xffff
    }

    /// The packet cut into fragments with at most `size` bytes of payload each, rounded down to a multiple of 8.
    pub fn fragments(&self, identification: u32, size: usize) -> Vec<Self> {
        let pieces: Vec<&[u8]> = self.payload.chunks((size / 8 * 8).max(8)).collect();
        let mut offset = 0;
        let mut cut = Vec::with_capacity(pieces.len());
        for (index, piece) in pieces.iter().enumerate() {
            let more = index + 1 < pieces.len();
            let fragment = Some((identification, offset, more));
            cut.push(Self { fragment, dont_fragment: self.source.is_ipv6(), payload: piece.to_vec(), ..self.clone() });
            offset += u16::try_from(piece.len()).unwrap_or(u16::MAX);
        }
        cut
    }

    /// The packet on the wire.
    pub fn bytes(&self) -> Vec<u8> {
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => self.bytes_v4(source, destination),
            (IpAddr::V6(source), IpAddr::V6(destination)) => self.bytes_v6(source, destination),
            _ => Vec::new(),
        }
    }

    fn bytes_v4(&self, source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
        let header = IPV4_HEADER + self.options.len();
        let total = u16::try_from(header + self.payload.len()).unwrap_or(u16::MAX);
        let (identification, offset, more) = self.fragment.unwrap_or((0, 0, false));
        let cut = u16::from(self.dont_fragment) << 14 | u16::from(more) << 13 | (offset / 8);
        let mut bytes = vec![0x40 | (header / 4) as u8, 0];
        bytes.extend([total, identification as u16, cut].map(u16::to_be_bytes).concat());
        bytes.extend([self.hops, self.protocol, 0, 0]);
        bytes.extend(source.octets());
        bytes.extend(destination.octets());
        bytes.extend(&self.options);
        let checksum = !fold(sum(&bytes));
        if let Some(field) = bytes.get_mut(10..12) {
            field.copy_from_slice(&checksum.to_be_bytes());
        }
        bytes.extend(&self.payload);
        bytes
    }

    fn bytes_v6(&self, source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
        let mut body = self.options.clone();
        let mut next = self.first_extension.unwrap_or(self.protocol);
        if let Some((identification, offset, more)) = self.fragment {
            let cut = (offset | u16::from(more)).to_be_bytes();
            body.extend([&[next, 0], &cut[..], &identification.to_be_bytes()].concat());
            next = FRAGMENT;
        }
        body.extend(&self.payload);
        let length = u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes();
        let mut bytes = vec![0x60, 0, 0, 0, length[0], length[1], next, self.hops];
        bytes.extend(source.octets());
        bytes.extend(destination.octets());
        bytes.extend(body);
        bytes
    }

    /// Reads a packet; `None` for what is none, is cut short, or has a wrong IPv4 header checksum.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        Self::read(bytes, true)
    }

    /// As [`Packet::parse`], of a packet that may end early.
    fn parse_some(bytes: &[u8]) -> Option<Self> {
        Self::read(bytes, false)
    }

    fn read(bytes: &[u8], whole: bool) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => Self::read_v4(bytes, whole),
            6 => Self::read_v6(bytes, whole),
            _ => None,
        }
    }

    fn read_v4(bytes: &[u8], whole: bool) -> Option<Self> {
        let header = usize::from(bytes.first()? & 0xf) * 4;
        let head = bytes.get(..header.max(IPV4_HEADER))?;
        if fold(sum(head)) != 0xffff {
            return None;
        }
        let total = usize::from(word(head, 2));
        let end = if whole { total } else { total.min(bytes.len()) };
        let address = |at: usize| head.get(at..at + 4).and_then(|octets| <[u8; 4]>::try_from(octets).ok());
        let cut = word(head, 6);
        let (offset, more) = ((cut & 0x1fff) * 8, cut & 0x2000 != 0);
        Some(Self {
            hops: *head.get(8)?,
            dont_fragment: cut & 0x4000 != 0,
            fragment: (offset != 0 || more).then(|| (word(head, 4).into(), offset, more)),
            options: head.get(IPV4_HEADER..)?.to_vec(),
            ..Self::new(
                Ipv4Addr::from(address(12)?).into(),
                Ipv4Addr::from(address(16)?).into(),
                *head.get(9)?,
                bytes.get(header..end)?.to_vec(),
            )
        })
    }

    fn read_v6(bytes: &[u8], whole: bool) -> Option<Self> {
        let head = bytes.get(..IPV6_HEADER)?;
        let end = IPV6_HEADER + usize::from(word(head, 4));
        let end = if whole { end } else { end.min(bytes.len()) };
        let address = |at: usize| head.get(at..at + 16).and_then(|octets| <[u8; 16]>::try_from(octets).ok());
        let (mut next, mut at) = (*head.get(6)?, IPV6_HEADER);
        let (mut fragment, mut options) = (None, Vec::new());
        let mut first_extension = None;
        while let 0 | 43 | 44 | 60 = next {
            let header = bytes.get(at..at + 8)?;
            let length = if next == FRAGMENT { 8 } else { (usize::from(*header.get(1)?) + 1) * 8 };
            if next == FRAGMENT {
                let cut = word(header, 2);
                let identification = u32::from(word(header, 4)) << 16 | u32::from(word(header, 6));
                fragment = Some((identification, cut & 0xfff8, cut & 1 != 0));
            } else {
                first_extension.get_or_insert(next);
                options.extend(bytes.get(at..at + length)?);
            }
            (next, at) = (*header.first()?, at + length);
            if fragment.is_some_and(|(_, offset, _)| offset != 0) {
                break;
            }
        }
        Some(Self {
            hops: *head.get(7)?,
            fragment,
            options,
            first_extension,
            ..Self::new(
                Ipv6Addr::from(address(8)?).into(),
                Ipv6Addr::from(address(24)?).into(),
                next,
                bytes.get(at..end)?.to_vec(),
            )
        })
    }

    fn fill_checksum(&mut self, offset: usize) {
        let checksum = !fold(self.pseudo_header() + sum(&self.payload));
        let checksum = if checksum == 0 && self.protocol == UDP { u16::MAX } else { checksum };
        if let Some(field) = self.payload.get_mut(offset..offset + 2) {
            field.copy_from_slice(&checksum.to_be_bytes());
        }
    }

    fn pseudo_header(&self) -> u64 {
        if self.protocol == ICMP {
            return 0;
        }
        let octets = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => sum(&ip.octets()),
            IpAddr::V6(ip) => sum(&ip.octets()),
        };
        octets(self.source) + octets(self.destination) + self.payload.len() as u64 + u64::from(self.protocol)
    }
}

/// The 16-bit number at `offset`; 0 beyond the end.
fn word(bytes: &[u8], offset: usize) -> u16 {
    let byte = |at: usize| u16::from(bytes.get(at).copied().unwrap_or(0));
    byte(offset) << 8 | byte(offset + 1)
}

fn sum(bytes: &[u8]) -> u64 {
    (0..bytes.len()).step_by(2).map(|offset| u64::from(word(bytes, offset))).sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(family: usize) -> Packet {
        let [from, to] = [["10.0.0.1:1000", "10.0.0.2:53"], ["[fd00::1]:1000", "[fd00::2]:53"]][family];
        Packet::udp(from.parse().unwrap(), to.parse().unwrap(), &[7; 100])
    }

    #[test]
    fn packets_read_back() {
        for family in [0, 1] {
            let packet = datagram(family);
            assert!(packet.checksum_is_right());
            assert_eq!(Packet::parse(&packet.bytes()).unwrap(), packet);
            for fragment in packet.fragments(77, 40) {
                assert_eq!(Packet::parse(&fragment.bytes()).unwrap(), Packet { ..fragment.clone() });
            }
            let error = Packet::icmp_error(packet.destination, packet.source, [3, 3], 0, &packet.bytes());
            assert!(error.checksum_is_right());
            assert_eq!(error.quoted().unwrap(), packet);
        }
    }

    #[test]
    fn damage_is_seen() {
        let mut packet = datagram(0);
        packet.payload[9] ^= 1;
        assert!(!packet.checksum_is_right());
        let mut bytes = datagram(0).bytes();
        bytes[8] ^= 1;
        assert_eq!(Packet::parse(&bytes), None);
    }
}
