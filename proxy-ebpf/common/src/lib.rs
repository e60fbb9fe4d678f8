//! The ABI between the BPF programs and user space, and the packet arithmetic that both sides use.
//!
//! ```text
//!  trama-proxy (dataplane::ebpf) --writes--> maps --read by--> proxy-ebpf (tc, socket hooks)
//!                        \________ proxy-common: one definition of every key and value ________/
//! ```
//!
//! Invariants:
//! - every type that crosses the boundary is `repr(C)`, has no implicit padding and no invalid bit pattern;
//! - addresses and ports are in network byte order and say so in their type ([`Be16`], [`V4`], [`V6`]);
//! - a change of any layout raises [`ABI_VERSION`], which is part of the pin path.
//!
//! Start reading at [`Frontend`], [`Flow`] and [`decide::new_flow`]. No kernel or std dependency: the crate compiles for BPF and for the host.
#![no_std]

pub mod absent;
pub mod address;
pub mod checksum;
pub mod counter;
pub mod crc32c;
pub mod decide;
pub mod event;
pub mod flow;
pub mod flow_table;
pub mod hash;
pub mod map;
pub mod pod;
pub mod select;

pub use absent::{ABSENT_BITS, ABSENT_WORDS, absent_place, fill_absent};
pub use address::{Address, Be16, Cidr, V4, V6};
pub use counter::Counter;
pub use flow::{BackendLoad, FlowCensus, FlowLimits, FlowState, SEEN_TICKS};
pub use map::*;

/// Version of every layout in this crate.
const LAYOUT: u32 = 6;

/// Version of every layout in this crate; pins live under a directory that carries it. The one that tests exchange it for is far away from
/// all that will ever be.
pub const ABI_VERSION: u32 = if cfg!(feature = "layout-test") { 1000 + LAYOUT } else { LAYOUT };

/// Mark bit that says: this packet was translated on this node, later hooks leave it alone.
///
/// It is cleared by the kernel when a packet crosses a network namespace. kube-proxy's own bits (0x4000, 0x8000) and
/// the bits of the common overlay plugins (the lowest and the highest eight) are avoided.
pub const MARK_DONE: u32 = 0x0020_0000;

/// Bit of the packet mark beside [`MARK_DONE`]: the packet is translated but for its source, which it gets where it leaves the node.
pub const MARK_SOURCE: u32 = 0x0040_0000;
