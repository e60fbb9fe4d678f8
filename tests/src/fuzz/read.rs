//! What a frame is, read by the rules that ARCHITECTURE.md gives, byte by byte and without the programs' own code.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::packet::{FRAGMENT, ICMP, ICMP6, TCP, UDP};

pub(crate) const SCTP: u8 = 132;
pub(crate) const ETHERNET: usize = 14;
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;
/// Extension headers that are looked through.
const EXTENSIONS_MAX: usize = 4;
/// Bytes within which all headers must lie: Ethernet, 128, TCP.
pub(crate) const HEADERS: usize = 14 + 128 + 20;

/// Both ends of a packet, and its protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Tuple {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) protocol: u8,
}

impl Tuple {
    /// That of an answer.
    pub(crate) fn reversed(self) -> Self {
        Self { source: self.destination, destination: self.source, protocol: self.protocol }
    }
}

/// What a fragment says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) identification: u32,
    /// In bytes.
    pub(crate) offset: usize,
    pub(crate) more: bool,
}

/// Where the parts of a frame begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outline {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    /// Offset of the network header, and of what follows it and its extensions.
    pub(crate) network: usize,
    pub(crate) transport: usize,
    /// Where the packet ends by its own account, at most the frame's end.
    pub(crate) end: usize,
    pub(crate) hops: u8,
    pub(crate) may_be_cut: bool,
    pub(crate) piece: Option<Piece>,
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Of no protocol that Services know anything of, or a part of a packet that is left alone.
    Other,
    /// It contradicts itself.
    Malformed,
    /// Either of the two: its transport header is not inside of the packet, but padding looks like one.
    Doubtful,
    /// Whole, or the first fragment, with its ports and the flags of TCP, or what stands for them.
    Segment(Tuple, u8),
    /// A later fragment.
    Later,
    /// May ask for an answer, but has no ports.
    Portless,
    /// An ICMP error.
    Error,
}

/// Reads a frame; `None` where it is no IP packet at all.
pub(crate) fn read(frame: &[u8]) -> Option<(Option<Outline>, Kind)> {
    let outline = match word(frame, 12)? {
        0x0800 => outline_v4(frame, ETHERNET),
        0x86dd => match outline_v6(frame, ETHERNET) {
            // More headers than anybody looks at.
            Err(_) if frame.len() > HEADERS => return Some((None, Kind::Other)),
            read => read,
        },
        _ => return None,
    };
    Some(match outline {
        Err(kind) => (None, kind),
        Ok(outline) => (Some(outline), kind(frame, &outline)),
    })
}

pub(crate) fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | SCTP)
}

pub(crate) fn outline_v4(frame: &[u8], at: usize) -> Result<Outline, Kind> {
    let header = frame.get(at..at + 20).ok_or(Kind::Malformed)?;
    let words = usize::from(header[0] & 0xf);
    if header[0] >> 4 != 4 || words < 5 {
        return Err(Kind::Malformed);
    }
    let ip = |offset: usize| {
        IpAddr::from(Ipv4Addr::new(header[offset], header[offset + 1], header[offset + 2], header[offset + 3]))
    };
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let cut = u16::from_be_bytes([header[6], header[7]]);
    let (offset, more) = (usize::from(cut & 0x1fff) * 8, cut & 0x2000 != 0);
    let identification = u32::from(u16::from_be_bytes([header[4], header[5]]));
    Ok(Outline {
        source: ip(12),
        destination: ip(16),
        protocol: header[9],
        network: at,
        transport: at + words * 4,
        end: at + total,
        hops: header[8],
        may_be_cut: cut & 0x4000 == 0,
        piece: (offset != 0 || more).then_some(Piece { identification, offset, more }),
    })
}

pub(crate) fn outline_v6(frame: &[u8], at: usize) -> Result<Outline, Kind> {
    let header = frame.get(at..at + 40).ok_or(Kind::Malformed)?;
    if header[0] >> 4 != 6 {
        return Err(Kind::Malformed);
    }
    let ip = |offset: usize| {
        let octets: [u8; 16] = std::array::from_fn(|index| header[offset + index]);
        IpAddr::from(Ipv6Addr::from(octets))
    };
    let mut outline = Outline {
        source: ip(8),
        destination: ip(24),
        protocol: header[6],
        network: at,
        transport: at + 40,
        end: at + 40 + usize::from(u16::from_be_bytes([header[4], header[5]])),
        hops: header[7],
        may_be_cut: false,
        piece: None,
    };
    for _ in 0..EXTENSIONS_MAX {
        let at = outline.transport;
        match outline.protocol {
            FRAGMENT => {
                let header = frame.get(at..at + 8).ok_or(Kind::Malformed)?;
                let cut = u16::from_be_bytes([header[2], header[3]]);
                let (offset, more) = (usize::from(cut & 0xfff8), cut & 1 != 0);
                let identification = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                (outline.protocol, outline.transport) = (header[0], at + 8);
                outline.piece = (offset != 0 || more).then_some(Piece { identification, offset, more });
                if offset != 0 {
                    break;
                }
            }
            0 | 43 | 60 => {
                let header = frame.get(at..at + 4).ok_or(Kind::Malformed)?;
                if outline.protocol == 43 && header[3] != 0 {
                    break;
                }
                outline.protocol = header[0];
                outline.transport = at + (usize::from(header[1]) + 1) * 8;
            }
            _ => break,
        }
    }
    Ok(outline)
}

fn kind(frame: &[u8], outline: &Outline) -> Kind {
    let Outline { protocol, transport, end, piece, .. } = *outline;
    let later = piece.is_some_and(|piece| piece.offset != 0);
    if end > frame.len() || end < transport {
        return Kind::Malformed;
    }
    if !has_ports(protocol) {
        return if end < transport + 8 { Kind::Other } else { portless(frame, outline, later) };
    }
    if piece.is_some() && protocol == SCTP {
        return Kind::Other;
    }
    if later {
        return Kind::Later;
    }
    let needed = header_min(protocol);
    // A first fragment may be as short as it likes: it is left to its receiver.
    let broken = if piece.is_some() { Kind::Other } else { Kind::Malformed };
    if frame.len() < transport + needed || (end < transport + needed && piece.is_none()) {
        return broken;
    }
    match segment(frame, outline) {
        _ if end < transport + needed => Kind::Doubtful,
        Some(kind) => kind,
        None => broken,
    }
}

fn portless(frame: &[u8], outline: &Outline, later: bool) -> Kind {
    let kind = frame.get(outline.transport).copied().unwrap_or(0);
    match outline.protocol {
        _ if later => Kind::Other,
        0 | 43 | FRAGMENT | 60 if outline.source.is_ipv6() => Kind::Other,
        _ if is_error(frame, outline) => Kind::Error,
        ICMP if kind != 8 => Kind::Other,
        ICMP6 if kind != 128 => Kind::Other,
        _ => Kind::Portless,
    }
}

/// Whether a packet is an ICMP error, as far as its first byte says.
pub(crate) fn is_error(frame: &[u8], outline: &Outline) -> bool {
    let Some(kind) = frame.get(outline.transport..outline.transport + 4).map(|word| word[0]) else { return false };
    match outline.protocol {
        ICMP if outline.source.is_ipv4() => matches!(kind, 3 | 4 | 5 | 11 | 12),
        ICMP6 if outline.source.is_ipv6() => kind < 128,
        _ => false,
    }
}

/// The tuple of a packet in a tunnel, and whether it may open a flow; its chunks are not looked at. `None` where there is no whole header.
pub(crate) fn ends(frame: &[u8], outline: &Outline) -> Option<(Tuple, bool)> {
    let needed = header_min(outline.protocol);
    let header = frame.get(outline.transport..outline.transport + needed)?;
    if outline.protocol == TCP && header[12] >> 4 < 5 {
        return None;
    }
    let tuple = Tuple {
        source: SocketAddr::new(outline.source, word(header, 0)?),
        destination: SocketAddr::new(outline.destination, word(header, 2)?),
        protocol: outline.protocol,
    };
    Some((tuple, opens(tuple.protocol, if tuple.protocol == TCP { header[13] } else { 0 })))
}

/// Bytes that the header of a protocol with ports has at least.
const fn header_min(protocol: u8) -> usize {
    match protocol {
        TCP => 20,
        SCTP => 12,
        _ => 8,
    }
}

fn segment(frame: &[u8], outline: &Outline) -> Option<Kind> {
    let at = outline.transport;
    let (source, destination) = (word(frame, at)?, word(frame, at + 2)?);
    let tuple = Tuple {
        source: SocketAddr::new(outline.source, source),
        destination: SocketAddr::new(outline.destination, destination),
        protocol: outline.protocol,
    };
    let flags = match outline.protocol {
        TCP if frame.get(at + 12)? >> 4 < 5 => return None,
        TCP => *frame.get(at + 13)?,
        SCTP if frame.len() < at + 12 => return None,
        SCTP => match frame.get(at + 12) {
            None => return Some(Kind::Other),
            Some(1) => SYN,
            Some(6 | 8 | 14) => ACK | RST,
            Some(_) => ACK,
        },
        _ => 0,
    };
    Some(Kind::Segment(tuple, flags))
}

/// Whether a segment may open a flow.
pub(crate) fn opens(protocol: u8, flags: u8) -> bool {
    protocol == UDP || flags & (SYN | ACK) == SYN
}

/// The 16-bit number at `offset`.
pub(crate) fn word(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..offset + 2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
}

/// One's complement sum of 16-bit words, folded (RFC 1071); both forms of zero are 0xffff.
pub(crate) fn sum(parts: &[&[u8]]) -> u16 {
    let mut total: u64 = 0;
    for part in parts {
        total +=
            part.chunks(2).map(|pair| u64::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u64::from)).sum::<u64>();
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    if total == 0 { 0xffff } else { total as u16 }
}

/// CRC-32C by its definition (RFC 9260, appendix A), one bit at a time.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Packet;

    #[test]
    fn a_frame_is_what_was_made() {
        let tuple = Tuple {
            source: "[fd00::1]:1000".parse().unwrap(),
            destination: "[fd00::2]:53".parse().unwrap(),
            protocol: UDP,
        };
        let packet = Packet::udp(tuple.source, tuple.destination, &[7; 100]);
        let frame = |packet: &Packet| [&[0; 12], &packet.ether_type().to_be_bytes()[..], &packet.bytes()].concat();
        assert_eq!(read(&frame(&packet)).unwrap().1, Kind::Segment(tuple, 0));
        let pieces = packet.fragments(9, 48);
        assert_eq!(read(&frame(&pieces[0])).unwrap().1, Kind::Segment(tuple, 0));
        assert_eq!(read(&frame(&pieces[1])).unwrap().1, Kind::Later);
        assert_eq!(read(&frame(&packet)[..60]).unwrap().1, Kind::Malformed);
        assert_eq!(read(&[0; 60]), None);
    }

    #[test]
    fn crc_of_the_standard() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
