//! The only place that touches packet bytes: bounds are checked here and nowhere else.

use core::ffi::c_void;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_redirect, bpf_skb_pull_data, bpf_skb_vlan_pop};
use aya_ebpf::programs::{TcContext, XdpContext};
use proxy_common::decide::LOOPBACK_INTERFACE;

use crate::parse::TCP;

/// Bytes of headers that are made linear when they are not: Ethernet, the longest IPv4 header or IPv6 with extension
/// headers, and TCP.
pub const HEADERS_LENGTH: u32 = 14 + 128 + 20;

/// Length of an Ethernet header, and so the offset of the IP header. VLAN tags are in the packet's metadata, not here.
pub const ETHERNET_LENGTH: usize = 14;

/// Segment size of packets that hold their segments ready (`GSO_BY_FRAGS` of include/linux/skbuff.h).
const SEGMENTS_BY_FRAGMENTS: u32 = 0xffff;

/// The VLAN's number in a tag.
const VLAN_ID_MASK: u32 = 0xfff;

/// What the tc and the XDP hook have in common.
pub trait Hook {
    /// A pointer to `T` at `offset`, or `None` when the linear part of the packet is shorter.
    ///
    /// The pointer is good until the next helper that may move the packet. It may be misaligned: BPF allows that.
    fn at<T>(&self, offset: usize) -> Option<*mut T>;

    /// Interface that the hook is on.
    fn interface(&self) -> u32;

    /// Whether the packet, as it is or once it is cut into segments, is no longer than `mtu` bytes behind the Ethernet header.
    fn fits(&self, mtu: u32) -> bool;

    /// Length behind the Ethernet header that a route lookup compares with the MTU; 0 where the kernel knows the packet.
    fn routed_length(&self) -> u16;

    /// The context as helpers want it.
    fn context(&self) -> *mut c_void;

    /// Whether the hook is on `lo`.
    #[inline(always)]
    fn on_loopback(&self) -> bool {
        self.interface() == LOOPBACK_INTERFACE
    }
}

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

    /// Whether the packet is one of a VLAN above this interface, whose own hook sees it without the tag. A tag that carries a priority
    /// and no VLAN (IEEE 802.1Q, 9.6) is taken off: it says nothing beyond this link.
    #[inline(always)]
    pub fn is_of_vlan(&self) -> bool {
        // SAFETY: field access through the kernel's context.
        if unsafe { (*self.raw()).vlan_present } == 0 {
            return false;
        }
        // SAFETY: as above; the helper takes nothing but the context.
        unsafe { (*self.raw()).vlan_tci & VLAN_ID_MASK != 0 || bpf_skb_vlan_pop(self.raw()) != 0 }
    }

    /// Bytes of payload in each of the packets that a device is to cut this one into; 0 where there is nothing to cut.
    #[inline(always)]
    pub fn segment_size(&self) -> u32 {
        // SAFETY: field access through the kernel's context.
        unsafe { (*self.raw()).gso_size }
    }

    /// Length behind the Ethernet header of each of those packets. 0, which fits everywhere, for what is cut by other rules than a
    /// size (SCTP, whose chunks the kernel made for the path already).
    #[inline(always)]
    fn segment_length(&self, size: u32) -> u32 {
        if size >= SEGMENTS_BY_FRAGMENTS {
            return 0;
        }
        let Some(version) = self.byte(ETHERNET_LENGTH) else { return 0 };
        let (network, protocol) = match version >> 4 {
            4 => (u32::from(version & 0xf) * 4, self.byte(ETHERNET_LENGTH + 9)),
            _ => (40, self.byte(ETHERNET_LENGTH + 6)),
        };
        let transport = match protocol {
            Some(TCP) => self.byte(ETHERNET_LENGTH + network as usize + 12).map_or(20, |byte| u32::from(byte >> 4) * 4),
            _ => 8,
        };
        network + transport + size
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

impl Hook for Packet<'_> {
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let start = self.tc.data() + offset;
        if start + size_of::<T>() > self.tc.data_end() { None } else { Some(start as *mut T) }
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: field access through the kernel's context.
        unsafe { (*self.raw()).ifindex }
    }

    #[inline(always)]
    fn fits(&self, mtu: u32) -> bool {
        match self.segment_size() {
            0 => self.length() <= mtu + ETHERNET_LENGTH as u32,
            size => self.segment_length(size) <= mtu,
        }
    }

    #[inline(always)]
    fn routed_length(&self) -> u16 {
        let length = match self.segment_size() {
            0 => self.length().saturating_sub(ETHERNET_LENGTH as u32),
            size => self.segment_length(size),
        };
        if length > u32::from(u16::MAX) { u16::MAX } else { length as u16 }
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.tc.as_ptr()
    }
}

/// One frame at the XDP hook, as the driver received it.
pub struct Frame<'a> {
    /// The kernel's context.
    pub xdp: &'a XdpContext,
}

impl Frame<'_> {
    /// Length in bytes, Ethernet header included.
    #[inline(always)]
    pub fn length(&self) -> usize {
        self.xdp.data_end() - self.xdp.data()
    }

    /// Length behind the Ethernet header in bytes.
    #[inline(always)]
    fn payload_length(&self) -> usize {
        self.length().saturating_sub(ETHERNET_LENGTH)
    }

    /// EtherType in network byte order; a VLAN's tag is still in front of it.
    #[inline(always)]
    pub fn ether_type(&self) -> Option<u16> {
        // SAFETY: `at` checked the two bytes.
        self.at::<u16>(ETHERNET_LENGTH - size_of::<u16>()).map(|field| unsafe { *field })
    }
}

impl Hook for Frame<'_> {
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let start = self.xdp.data() + offset;
        if start + size_of::<T>() > self.xdp.data_end() { None } else { Some(start as *mut T) }
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        self.xdp.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn fits(&self, mtu: u32) -> bool {
        self.payload_length() <= mtu as usize
    }

    #[inline(always)]
    fn routed_length(&self) -> u16 {
        self.payload_length() as u16
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.xdp.as_ptr()
    }
}
