//! SCTP (RFC 9260) as a new connection needs it: sockets where the kernel has them, else INIT and INIT ACK with a right CRC32c, made
//! by hand.
//!
//! It is one or the other: a kernel that has SCTP answers an INIT for which it knows no socket with ABORT.

use std::io;
use std::net::SocketAddr;
use std::sync::OnceLock;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

/// IP protocol number.
pub(super) const PROTOCOL: i32 = 132;
/// Chunk type of the first packet.
pub(super) const INIT: u8 = 1;
/// Chunk type of its answer.
pub(super) const INIT_ACK: u8 = 2;
/// Parameter of the answer that the asker only stores and returns: the server's text.
const STATE_COOKIE: u16 = 7;
/// Common header: ports, verification tag, checksum.
const COMMON_HEADER: usize = 12;
/// Chunk header and the fixed part of INIT and INIT ACK.
const FIXED_CHUNK: usize = 20;

/// Whether this kernel has SCTP sockets; asking loads the module.
pub(super) fn has_sockets() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| stream(Domain::IPV4).is_ok())
}

/// An unbound socket: a stream of one association where the kernel has that, else a raw one.
pub(super) fn socket(local: SocketAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(local);
    if !has_sockets() {
        return Socket::new(domain, Type::RAW, Some(PROTOCOL.into()));
    }
    let socket = stream(domain)?;
    // Without this an ICMP error ends no attempt to connect.
    match local {
        SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?,
        SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?,
    }
    Ok(socket)
}

fn stream(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::STREAM, Some(PROTOCOL.into()))
}

/// A packet with one INIT or INIT ACK chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) source_port: u16,
    pub(super) destination_port: u16,
    /// 0 in an INIT, the other side's tag in an INIT ACK.
    pub(super) verification_tag: u32,
    pub(super) chunk: u8,
    /// The sender's own tag, never 0.
    pub(super) initiate_tag: u32,
    /// The state cookie of an INIT ACK; empty in an INIT.
    pub(super) cookie: Vec<u8>,
}

impl Packet {
    pub(super) fn encode(&self) -> Vec<u8> {
        let parameters = self.encode_parameters();
        let mut bytes = Vec::with_capacity(COMMON_HEADER + FIXED_CHUNK + parameters.len());
        bytes.extend(self.source_port.to_be_bytes());
        bytes.extend(self.destination_port.to_be_bytes());
        bytes.extend(self.verification_tag.to_be_bytes());
        bytes.extend([0; 4]);
        let length = FIXED_CHUNK + parameters.len();
        bytes.extend([self.chunk, 0]);
        bytes.extend(u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
        bytes.extend(self.initiate_tag.to_be_bytes());
        // Receiver window, streams out and in, first TSN.
        bytes.extend(65_536_u32.to_be_bytes());
        bytes.extend([0, 1, 0, 1]);
        bytes.extend(self.initiate_tag.to_be_bytes());
        bytes.extend(parameters);
        let sum = crc32c(&bytes).to_le_bytes();
        bytes.splice(8..COMMON_HEADER, sum);
        bytes
    }

    fn encode_parameters(&self) -> Vec<u8> {
        if self.cookie.is_empty() {
            return Vec::new();
        }
        let mut bytes = Vec::from(STATE_COOKIE.to_be_bytes());
        let length = u16::try_from(4 + self.cookie.len()).unwrap_or(u16::MAX);
        bytes.extend(length.to_be_bytes());
        bytes.extend(&self.cookie);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// `None` for what is no INIT or INIT ACK, and for a wrong checksum: a real stack drops it too.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let chunk = *bytes.get(COMMON_HEADER)?;
        let mut zeroed = bytes.to_vec();
        let sum: Vec<u8> = zeroed.splice(8..COMMON_HEADER, [0; 4]).collect();
        let right = crc32c(&zeroed).to_le_bytes();
        if sum != right || !(chunk == INIT || chunk == INIT_ACK) {
            return None;
        }
        Some(Self {
            source_port: u16::from_be_bytes(take(bytes, 0)?),
            destination_port: u16::from_be_bytes(take(bytes, 2)?),
            verification_tag: u32::from_be_bytes(take(bytes, 4)?),
            chunk,
            initiate_tag: u32::from_be_bytes(take(bytes, COMMON_HEADER + 4)?),
            cookie: cookie_of(bytes).unwrap_or_default(),
        })
    }
}

/// The first parameter, where it is a state cookie.
fn cookie_of(bytes: &[u8]) -> Option<Vec<u8>> {
    let start = COMMON_HEADER + FIXED_CHUNK;
    let is_cookie = u16::from_be_bytes(take(bytes, start)?) == STATE_COOKIE;
    let length = usize::from(u16::from_be_bytes(take(bytes, start + 2)?));
    let cookie = bytes.get(start + 4..start + length)?;
    is_cookie.then(|| cookie.to_vec())
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// CRC32c (RFC 9260 appendix A), bit by bit: packets are few and small.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_published_one() {
        // RFC 3720 appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn packets_read_back_and_damage_is_seen() {
        for (chunk, cookie) in [(INIT, &b""[..]), (INIT_ACK, b"10.0.0.1:80 10.0.0.2:5")] {
            let packet = Packet {
                source_port: 40_000,
                destination_port: 53,
                verification_tag: 7,
                chunk,
                initiate_tag: 9,
                cookie: cookie.to_vec(),
            };
            let bytes = packet.encode();
            assert_eq!(bytes.len() % 4, 0);
            assert_eq!(Packet::decode(&bytes), Some(packet));
            for index in [0, 9, bytes.len() - 1] {
                let mut damaged = bytes.clone();
                damaged[index] ^= 1;
                assert_eq!(Packet::decode(&damaged), None, "byte {index}");
            }
        }
        assert_eq!(Packet::decode(&[]), None);
        assert_eq!(Packet::decode(&[0; 11]), None);
    }
}
