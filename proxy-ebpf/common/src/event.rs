//! What the programs tell a watcher, packet by packet, while somebody watches.

use crate::address::{Be16, V6};
use crate::pod::impl_pod;

/// Bytes of the ring that events wait in: about 2900 of them. What finds it full is counted and lost.
pub const EVENT_RING_BYTES: usize = 256 * 1024;

/// The only value of `monitor`: whether anybody watches, and what. Zero is nobody.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct MonitorSettings {
    /// Until when events are wanted, in nanoseconds of the monotonic clock; a watcher puts it off as long as it lives.
    pub deadline_ns: u64,
    /// Who watches: a number that the watcher drew.
    pub owner: u64,
    /// Which events: bit `n` for the counter of index `n`.
    pub reasons: u64,
    /// One of how many events is told; 0 and 1 are each.
    pub sample: u32,
    /// Zero.
    pub padding: u32,
}

/// [`Event::path`]: tc, into the node.
pub const EVENT_INGRESS: u8 = 0;
/// [`Event::path`]: tc, out of the node.
pub const EVENT_EGRESS: u8 = 1;
/// [`Event::path`]: a socket, whose source is not known.
pub const EVENT_SOCKET: u8 = 2;

/// One thing that happened to a packet or a socket. IPv4 addresses stand as `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct Event {
    /// When, in nanoseconds of the coarse monotonic clock.
    pub time_ns: u64,
    /// Source address.
    pub source: V6,
    /// Destination address, before translation.
    pub destination: V6,
    /// Where it goes instead; meaningful if the reason is work done.
    pub backend: V6,
    /// Source port; as the destination port it is meaningless for a later fragment and for a protocol without ports.
    pub source_port: Be16,
    /// Destination port.
    pub destination_port: Be16,
    /// Port that it goes to instead.
    pub backend_port: Be16,
    /// IP protocol number.
    pub protocol: u8,
    /// One of `EVENT_*`.
    pub path: u8,
    /// Index of the [`Counter`](crate::Counter) that counted it.
    pub reason: u32,
    /// ServicePort whose frontend was found; meaningful if the reason comes after that and before a flow is known.
    pub frontend_service_id: u32,
    /// ServicePort of the flow; meaningful if the reason comes after the flow is known. 0 for a flow that is no Service's.
    pub flow_service_id: u32,
    /// Interface of the hook; 0 for a socket.
    pub interface: u32,
}

impl_pod! {
    MonitorSettings = 3 * 8 + 2 * 4,
    Event = 8 + 3 * 16 + 3 * 2 + 2 + 4 * 4,
}
