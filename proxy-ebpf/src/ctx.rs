//! The only place that touches packet bytes: bounds are checked here and nowhere else.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_redirect, bpf_skb_pull_data};
use aya_ebpf::programs::TcContext;

/// Bytes of headers that are made linear when they are not: Ethernet, the longest IPv4 header or IPv6 with extension
/// headers, and TCP.
const HEADERS_LENGTH: u32 = 14 + 128 + 20;

/// Length of an Ethernet header, and so the offset of the IP header. VLAN tags are in the packet's metadata, not here.
pub const ETHERNET_LENGTH: usize = 14;

/// Index of `lo` in every network namespace (`LOOPBACK_IFINDEX` of include/net/flow.h).
pub const LOOPBACK_INTERFACE: u32 = 1;

/// One packet at a tc hook.
pub struct Packet<'a> {
    /// The kernel's context; helpers that change the packet take it.
    pub tc: &'a TcContext,
}

impl<'a> Packet<'a> {
    /// Wraps the hook's context.
    #[inline(always)]
    pub fn new(tc: &'a TcContext) -> Self {
        Self { tc }
    }

    /// A pointer to `T` at `offset`, or `None` when the linear part of the packet is shorter.
    ///
    /// The pointer is good until the next helper that may move the packet. It may be misaligned: BPF allows that.
    #[inline(always)]
    pub fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let start = self.tc.data() + offset;
        if start + size_of::<T>() > self.tc.data_end() { None } else { Some(start as *mut T) }
    }

    /// One byte at `offset`, copied from the packet's linear or another part; `None` when the packet is shorter.
    #[inline(always)]
    pub fn byte(&self, offset: usize) -> Option<u8> {
        self.tc.load(offset).ok()
    }

    /// Makes the headers linear and private to us; pointers taken before are void.
    #[inline(always)]
    pub fn pull_headers(&self) {
        let length = if self.length() < HEADERS_LENGTH { self.length() } else { HEADERS_LENGTH };
        // SAFETY: the context is the one that the kernel passed.
        unsafe { bpf_skb_pull_data(self.raw(), length) };
    }

    /// Length of the whole packet in bytes, Ethernet header included.
    #[inline(always)]
    pub fn length(&self) -> u32 {
        self.tc.len()
    }

    /// EtherType in network byte order.
    #[inline(always)]
    pub fn ether_type(&self) -> u16 {
        // SAFETY: field access through the kernel's context.
        unsafe { (*self.raw()).protocol as u16 }
    }

    /// Mark of the packet.
    #[inline(always)]
    pub fn mark(&self) -> u32 {
        // SAFETY: field access through the kernel's context.
        unsafe { (*self.raw()).mark }
    }

    /// Interface that the hook is on.
    #[inline(always)]
    pub fn interface(&self) -> u32 {
        // SAFETY: field access through the kernel's context.
        unsafe { (*self.raw()).ifindex }
    }

    /// Exchanges sender and receiver of the link.
    #[inline(always)]
    pub fn swap_ethernet_addresses(&self) -> Option<()> {
        let ethernet = self.at::<[[u8; 6]; 2]>(0)?;
        // SAFETY: `at` checked both addresses.
        unsafe {
            let [destination, source] = *ethernet;
            *ethernet = [source, destination];
        }
        Some(())
    }

    /// Whether the hook is on `lo`.
    #[inline(always)]
    pub fn on_loopback(&self) -> bool {
        self.interface() == LOOPBACK_INTERFACE
    }

    /// Sends the packet to `interface`; `flags` 0 transmits, 1 receives.
    #[inline(always)]
    pub fn redirect(&self, interface: u32, flags: u64) -> i32 {
        // SAFETY: no pointers are passed.
        unsafe { bpf_redirect(interface, flags) as i32 }
    }

    /// The context as helpers want it.
    #[inline(always)]
    pub fn raw(&self) -> *mut __sk_buff {
        self.tc.as_ptr().cast()
    }
}
