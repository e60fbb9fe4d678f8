//! What is known of a packet between the stages of the tc hooks, each of which writes it to a map and the next one reads back: from a map the
//! verifier knows nothing, and walks the rest once.

use proxy_common::Counter;

use crate::forward::Route;
use crate::parse::Transport;
use crate::reject::{ErrorKind, Refusal, Reject};

/// A packet that is not one of those below.
pub const WHOLE: u32 = 0;
/// An ICMP error.
pub const ERROR: u32 = 1;
/// The first part of a packet.
pub const FIRST_FRAGMENT: u32 = 2;
/// Another part of it.
pub const LATER_FRAGMENT: u32 = 3;

/// What parsing found, in a map: see [`Plan`]. In whole words, as it is read back: a word that was written in pieces is waited for.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Parsed {
    /// [`WHOLE`] or another of these.
    kind: u32,
    /// Offset of the transport header.
    offset: u32,
    protocol: u32,
    tcp_flags: u32,
}

impl Parsed {
    #[inline(always)]
    pub fn new(kind: u32, transport: &Transport) -> Self {
        let Transport { protocol, offset, tcp_flags } = *transport;
        Self { kind, offset: offset as u32, protocol: protocol.into(), tcp_flags: tcp_flags.into() }
    }

    #[inline(always)]
    pub fn read(self) -> (Transport, u32) {
        let offset = (self.offset & OFFSET_MASK) as usize;
        (Transport { protocol: self.protocol as u8, offset, tcp_flags: self.tcp_flags as u8 }, self.kind)
    }
}

/// What is left to do with a packet whose flow is known. It is read back from a map, where the verifier knows nothing of it: else it
/// would walk the translation once for each way that leads there.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Plan {
    /// One of `ROUTE_*`.
    pub route: u32,
    /// What the packet is counted as.
    pub work: u32,
    /// Why the kernel goes on with it, or why it goes nowhere.
    pub reason: u32,
    /// Offset of the transport header.
    pub offset: u32,
    /// What it is answered with.
    pub answer: ErrorKind,
}

pub const PACKET_ERROR: u32 = Counter::PacketError as u32;
pub const PACKET_FRAGMENT: u32 = Counter::PacketFragment as u32;

pub const ROUTE_NEIGHBOUR: u32 = 0;
pub const ROUTE_RESOLVE: u32 = 1;
pub const ROUTE_LOCAL: u32 = 2;
pub const ROUTE_KERNEL: u32 = 3;
/// The kernel forwards it, as it has to be cut into fragments.
pub const ROUTE_FRAGMENTS: u32 = 4;
/// Back to its sender, as an answer.
pub const ROUTE_BACK: u32 = 5;
pub const ROUTE_NOWHERE: u32 = 6;
/// Greater than the offset of any transport header, and a power of two less one: the verifier wants a bound.
pub const OFFSET_MASK: u32 = 0xfff;

impl Plan {
    #[inline(always)]
    pub fn new(route: &Route, work: Counter, offset: usize) -> Self {
        let (route, reason) = match route {
            Route::Out { neighbour: true } => (ROUTE_NEIGHBOUR, 0),
            Route::Out { neighbour: false } => (ROUTE_RESOLVE, 0),
            Route::Local => (ROUTE_LOCAL, 0),
            Route::Kernel(reason) => (ROUTE_KERNEL, *reason as u32),
            Route::TooBig { .. } => (ROUTE_FRAGMENTS, Counter::Fragmented as u32),
        };
        Self { route, work: work as u32, reason, offset: offset as u32, answer: ErrorKind::default() }
    }

    #[inline(always)]
    pub fn refuse<F: Reject>(refusal: Refusal, reason: Counter, offset: usize) -> Self {
        Self { route: ROUTE_BACK, work: 0, reason: reason as u32, offset: offset as u32, answer: F::kind(refusal) }
    }
}
