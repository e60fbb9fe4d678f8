//! Frames, read twice: by the parser of the kernel's programs, compiled for this machine as it is, and by the reader of `cargo xtask fuzz`, which
//! shares nothing with it. Both must find the same.
//!
//! The first byte says how much of the frame is in its linear part; the rest is the frame.
#![no_main]
#![allow(dead_code, unused_imports, reason = "whole files of other packages, of which this needs a part")]

// The parser names its neighbours as they are called in its own package.
#[path = "packets/ctx.rs"]
mod ctx;
#[path = "packets/maps.rs"]
mod maps;
#[path = "../../tests/src/packet.rs"]
mod packet;
#[path = "../../proxy-ebpf/src"]
mod programs {
    pub mod parse;
}
#[path = "../../tests/src/fuzz"]
mod lab {
    pub mod read;
}

use std::net::SocketAddr;

use lab::read::{ETHERNET, HEADERS, Kind, Outline, Tuple, read};
use packet::{TCP, UDP};
use programs::parse::{self, Parse, ParseNetwork, Transport, parse_plain};
use proxy_common::{Address, Be16, FlowKey};

use ctx::{Frame, Packet};
use maps::{Ipv4, Ipv6, Socket};

/// Bytes of a frame that are looked at.
const FRAME_MAX: usize = 2048;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((linear, frame)) = input.split_first() else { return };
    // Linux runs a program on nothing shorter than a network header.
    if frame.len() > FRAME_MAX || frame.len() < ETHERNET + 20 {
        return;
    }
    let aligned = Aligned::new(frame);
    // An odd number is a frame that is linear as a whole.
    let linear = if linear % 2 == 1 { frame.len() } else { usize::from(*linear).max(ETHERNET + 20).min(frame.len()) };
    match [frame[12], frame[13]] {
        [0x08, 0x00] => compare::<Ipv4>(aligned.bytes(), linear),
        [0x86, 0xdd] if frame.len() >= ETHERNET + 40 => compare::<Ipv6>(aligned.bytes(), linear),
        _ => assert!(frame[12..14] == [0x86, 0xdd] || read(frame).is_none()),
    }
});

/// A frame whose network header begins at a whole word, as network cards put it: BPF may read words anywhere, and Rust may not.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
}

impl Aligned {
    const WORD: usize = 8;

    fn new(frame: &[u8]) -> Self {
        let mut memory = vec![0; frame.len() + 3 * Self::WORD];
        // With the Ethernet header whole words.
        let start = memory.as_ptr().align_offset(Self::WORD) + 2 * Self::WORD - ETHERNET;
        memory[start..start + frame.len()].copy_from_slice(frame);
        memory.truncate(start + frame.len());
        Self { memory, start }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..]
    }
}

/// What both may find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Other,
    Malformed,
    Segment(Tuple, u8),
    Later,
    Portless,
    Error,
}

fn compare<F: ParseNetwork>(frame: &[u8], linear: usize)
where
    F::A: Socket,
{
    let Some((outline, kind)) = read(frame) else { panic!("an IP packet is none") };
    let found = by_programs::<F>(frame, linear);
    // What is not linear and has more headers than are made linear is left alone.
    let reaches = |outline: Outline| outline.transport + 20 > HEADERS;
    let far = linear < frame.len() && outline.is_none_or(reaches) && frame.len() > HEADERS;
    match by_reader(kind) {
        Some(expected) if !far => assert_eq!(found, expected, "{outline:?}"),
        _ => {}
    }
    compare_plain::<F>(frame, outline, kind);
}

/// `None` where either of two is right.
fn by_reader(kind: Kind) -> Option<Found> {
    Some(match kind {
        Kind::Other => Found::Other,
        Kind::Malformed => Found::Malformed,
        Kind::Doubtful => return None,
        Kind::Segment(tuple, flags) => Found::Segment(tuple, flags),
        Kind::Later => Found::Later,
        Kind::Portless => Found::Portless,
        Kind::Error => Found::Error,
    })
}

fn by_programs<F: ParseNetwork>(frame: &[u8], linear: usize) -> Found
where
    F::A: Socket,
{
    let packet = Packet::new(frame, linear);
    let mut key = FlowKey::default();
    match parse::parse::<F>(&packet, &mut key) {
        Parse::Tuple(transport) if transport.has_ports() => segment(&key, transport),
        Parse::Tuple(_) => Found::Portless,
        Parse::Error(_) => Found::Error,
        Parse::Other | Parse::TooManyExtensions => Found::Other,
        Parse::Malformed => Found::Malformed,
        Parse::Fragment(network) if network.is_later() => Found::Later,
        Parse::Fragment(network) => match parse::first_fragment(&packet, &network, &mut key) {
            Some(transport) => segment(&key, transport),
            None => Found::Other,
        },
    }
}

fn segment<A: Socket>(key: &FlowKey<A>, transport: Transport) -> Found {
    assert_eq!(key.protocol, transport.protocol);
    Found::Segment(tuple(key), transport.tcp_flags)
}

fn tuple<A: Socket>(key: &FlowKey<A>) -> Tuple {
    let end = |address: &A, port: Be16| SocketAddr::new(address.ip(), port.to_host());
    Tuple {
        source: end(&key.source, key.source_port),
        destination: end(&key.destination, key.destination_port),
        protocol: key.protocol,
    }
}

/// The XDP program's parser takes plain packets only, and all of those.
fn compare_plain<F: ParseNetwork>(frame: &[u8], outline: Option<Outline>, kind: Kind)
where
    F::A: Socket,
{
    let mut key = FlowKey::default();
    let taken = parse_plain::<F>(&Frame { bytes: frame }, &mut key);
    let (Some(outline), Kind::Segment(tuple_of_reader, flags)) = (outline, kind) else {
        assert!(taken.is_none(), "{kind:?} is taken for plain");
        return;
    };
    let header = match outline.protocol {
        TCP => usize::from(frame[outline.transport + 12] >> 4) * 4,
        UDP => 8,
        _ => usize::MAX,
    };
    let plain = outline.piece.is_none()
        && outline.transport == F::PLAIN_OFFSET
        && outline.hops > 1
        && header <= outline.end - outline.transport;
    match taken {
        Some(transport) => assert_eq!((tuple(&key), transport.tcp_flags), (tuple_of_reader, flags)),
        None => assert!(!plain, "{outline:?} is left"),
    }
    assert_eq!(key.protocol != 0, plain, "{outline:?}");
}
