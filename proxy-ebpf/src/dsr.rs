//! Direct server return, the side of the node that a client's packet comes to: the packet goes to its endpoint's node as it is, in a tunnel,
//! and the answer goes from there to the client. [`crate::decap`] is the other side.
//!
//! The tunnel ends at the endpoint's own address, so that whatever routes packets to pods routes these, and no table of nodes is needed. A
//! flow has one entry here, with the tunnel's addresses; its route is kept by backend, as it is the same for all of them.
//!
//! IPIP (RFC 2003; RFC 2473 for IPv6) adds a network header. GUE (draft-ietf-intarea-gue, variant 1: the packet lies directly in UDP) adds a
//! UDP header too, whose source port tells flows apart for routers and network cards that look no deeper.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{
    BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO,
};
use aya_ebpf::helpers::{bpf_skb_adjust_room, bpf_xdp_adjust_head};
use proxy_common::checksum::{fold, update, word_difference};
use proxy_common::decide::Source;
use proxy_common::hash::flow_hash;
use proxy_common::{
    Address, Be16, Counter, FLOOD_TICKS, FLOW_CLOSED, FLOW_CLOSING, FLOW_CONFIRMED, FLOW_COUNTED, FRONTEND_MAGLEV,
    Flow, NODE_DIRECT_TABLES, NODE_TUNNELS_ARE_GUE, V4, V6,
};

use crate::conntrack::{count_closed, count_opened, seen};
use crate::counters::count;
use crate::ctx::{ETHERNET_LENGTH, Frame, Hook, Packet};
use crate::forward::{holds_since, ticks};
use crate::maps::{FLOOD, Family, Ipv4, Ipv6, Scratch, TUNNEL_ROUTES};
use crate::parse::{IPV4_DO_NOT_FRAGMENT, Ipv4Header, Ipv6Header, TCP, Transport, UDP};
use crate::tc::{ETHER_TYPE_IPV4, ETHER_TYPE_IPV6};

/// IPv4 in IP (RFC 2003) and IPv6 in IP (RFC 2473).
pub const IPV4_IN_IP: u8 = 4;
pub const IPV6_IN_IP: u8 = 41;
/// Port of GUE (IANA's registry). No masqueraded flow has it, see [`proxy_common::select::is_tunnel_port`].
pub const GUE_PORT: Be16 = Be16::from_host(6080);

/// Backends of a family whose routes are kept, a power of two.
pub const ROUTES_MAX: u32 = 1024;

/// Hops of a tunnel.
const HOPS: u8 = 64;
/// The part of TOS or traffic class that the tunnel takes over: the class of service, and not the congestion mark, which would have to be
/// brought back at the other end (RFC 6040, 4.1, compatibility mode).
const CLASS_MASK: u8 = 0xfc;
/// The same and version and flow label, in the first word of an IPv6 header.
const CLASS_AND_FLOW_MASK: u32 = !0x0030_0000;
/// Source ports of GUE: the ephemeral ones (RFC 6335, 6).
const ENTROPY_PORTS: u16 = 0xc000;

/// The route to a backend.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct BackendRoute {
    backend_id: u32,
    backend_generation: u32,
    /// When the kernel was asked.
    tick: u32,
    /// As in [`Flow`], with the tunnel's headers taken off the MTU.
    interface: u32,
    link: [u32; 3],
    mtu: u16,
    padding: [u8; 2],
}

/// New flows within [`FLOOD_TICKS`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Flood {
    /// Number of the period.
    period: u32,
    flows: u32,
}

/// A UDP header (RFC 768).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UdpHeader {
    source: Be16,
    destination: Be16,
    length: Be16,
    checksum: u16,
}

/// The part of a tunnel that differs by family.
pub trait Encapsulate: Family {
    /// The tunnel's network header.
    type Header: Copy;
    /// What the kernel is told of it.
    const ENCAP_FLAG: u32;
    /// Protocol of IPIP.
    const IN_IP: u8;
    /// EtherType of the tunnel, in network byte order.
    const ETHER_TYPE: u16;
    /// The header around the packet at the Ethernet header, with `payload` bytes of protocol behind its own and that packet's; the packet
    /// has made one hop.
    fn around(hook: &impl Hook, flow: &Flow<Self::A>, protocol: u8, udp_length: u16) -> Option<(Self::Header, u16)>;
}

impl Encapsulate for Ipv4 {
    type Header = Ipv4Header;
    const ENCAP_FLAG: u32 = BPF_F_ADJ_ROOM_ENCAP_L3_IPV4;
    const IN_IP: u8 = IPV4_IN_IP;
    const ETHER_TYPE: u16 = ETHER_TYPE_IPV4;

    #[inline(always)]
    fn around(hook: &impl Hook, flow: &Flow<V4>, protocol: u8, udp_length: u16) -> Option<(Ipv4Header, u16)> {
        let inner = hook.at::<Ipv4Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let inner = unsafe { &mut *inner };
        // TTL is the first byte of its 16-bit word.
        let ttl = u32::from(inner.ttl);
        inner.checksum = update(inner.checksum, word_difference(ttl, ttl.wrapping_sub(1) & 0xff));
        inner.ttl = inner.ttl.wrapping_sub(1);
        let length = inner.total_length.to_host();
        let mut header = Ipv4Header {
            version_and_length: 0x45,
            tos: inner.tos & CLASS_MASK,
            total_length: Be16::from_host(length.wrapping_add(size_of::<Ipv4Header>() as u16).wrapping_add(udp_length)),
            // Of no use to what is never cut (RFC 6864, 4.1).
            identification: Be16(0),
            fragment: Be16::from_host(IPV4_DO_NOT_FRAGMENT),
            ttl: HOPS,
            protocol,
            checksum: 0,
            source: flow.source,
            destination: flow.destination,
        };
        let sum = u64::from(u16::from_ne_bytes([0x45, header.tos]))
            + u64::from(header.total_length.0)
            + u64::from(header.fragment.0)
            + u64::from(u16::from_ne_bytes([HOPS, protocol]))
            + u64::from(flow.source.0)
            + u64::from(flow.destination.0);
        header.checksum = !fold(sum);
        Some((header, length))
    }
}

impl Encapsulate for Ipv6 {
    type Header = Ipv6Header;
    const ENCAP_FLAG: u32 = BPF_F_ADJ_ROOM_ENCAP_L3_IPV6;
    const IN_IP: u8 = IPV6_IN_IP;
    const ETHER_TYPE: u16 = ETHER_TYPE_IPV6;

    #[inline(always)]
    fn around(hook: &impl Hook, flow: &Flow<V6>, protocol: u8, udp_length: u16) -> Option<(Ipv6Header, u16)> {
        let inner = hook.at::<Ipv6Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let inner = unsafe { &mut *inner };
        inner.hop_limit = inner.hop_limit.wrapping_sub(1);
        let length = inner.payload_length.to_host().wrapping_add(size_of::<Ipv6Header>() as u16);
        let header = Ipv6Header {
            version_and_flow: inner.version_and_flow & CLASS_AND_FLOW_MASK.to_be(),
            payload_length: Be16::from_host(length.wrapping_add(udp_length)),
            next_header: protocol,
            hop_limit: HOPS,
            source: flow.source,
            destination: flow.destination,
        };
        Some((header, length))
    }
}

/// Bytes that this node's tunnels add, by its settings: the flag of GUE is the length of a UDP header, so that there is nothing to branch on.
#[inline(always)]
pub const fn tunnel_length<A: Address>(node_flags: u32) -> u32 {
    const { assert!(NODE_TUNNELS_ARE_GUE as usize == size_of::<UdpHeader>()) };
    let network = if A::WORDS == 1 { size_of::<Ipv4Header>() } else { size_of::<Ipv6Header>() };
    network as u32 + (node_flags & NODE_TUNNELS_ARE_GUE)
}

/// The node's flags.
#[inline(always)]
pub fn node_flags<F: Family>() -> u32 {
    F::settings().map_or(0, |settings| settings.flags)
}

/// Bytes that the tunnel of this flow adds; 0 for a flow without one.
#[inline(always)]
pub fn around<F: Family>(flow: &Flow<F::A>) -> u16 {
    if flow.is_direct() { tunnel_length::<F::A>(node_flags::<F>()) as u16 } else { 0 }
}

/// Whether a packet that opens nothing and belongs to no known flow may be one whose endpoint a Maglev table finds. Only the settings are
/// asked: most nodes have no such Service.
#[inline(always)]
pub fn may_rejoin<F: Family>(transport: &Transport) -> bool {
    let tables = F::settings().is_some_and(|settings| settings.flags & NODE_DIRECT_TABLES != 0);
    tables && transport.protocol == TCP && !transport.resets()
}

/// Whether it is one, once decided.
#[inline(always)]
pub fn rejoins<A>(scratch: &Scratch<A>, source: &Source<A>) -> bool {
    source.is_direct() && scratch.found.frontend.flags & FRONTEND_MAGLEV != 0
}

/// Writes the entry that `prepare` made. Above a rate, flows that a Maglev table finds again are not remembered: an insert costs more than all
/// the rest, and floods would push out those that are in use.
#[inline(always)]
pub fn write<F: Family>(scratch: &mut Scratch<F::A>) -> Result<(), Counter> {
    if scratch.found.frontend.flags & FRONTEND_MAGLEV != 0
        && scratch.found.frontend.affinity_seconds == 0
        && is_flood::<F>()
    {
        count(Counter::FlowNotRemembered);
        return Ok(());
    }
    match F::flows().set(&scratch.key, &scratch.flow) {
        Ok(()) => {
            if scratch.flow.flags & FLOW_COUNTED != 0 {
                count_opened::<F>(scratch.flow.backend_id);
            }
            Ok(())
        }
        Err(_) => Err(Counter::FlowInsertFailed),
    }
}

#[inline(always)]
fn is_flood<F: Family>() -> bool {
    let limit = F::settings().map_or(0, |settings| settings.flood_limit);
    let Some(flood) = FLOOD.get_ptr_mut(0) else { return false };
    // SAFETY: the value is this CPU's, and programs of one CPU do not interleave.
    let flood = unsafe { &mut *flood };
    let period = ticks() / FLOOD_TICKS;
    if flood.period != period {
        *flood = Flood { period, flows: 0 };
    }
    flood.flows = flood.flows.saturating_add(1);
    limit != 0 && flood.flows > limit
}

/// Follows the state of a flow that is seen in one direction only: what a client sends after its SYN says that it was answered, and its FIN
/// or RST that the flow is over. A datagram that is not the first counts as the answer to an answer.
#[inline(always)]
pub fn track<F: Family>(scratch: &Scratch<F::A>, transport: &Transport, now: u32) {
    let before = scratch.flow.flags;
    let mut flags = before;
    if !transport.opens() || transport.protocol == UDP {
        flags |= FLOW_CONFIRMED;
    }
    if transport.closes() {
        flags = (flags | FLOW_CLOSING | FLOW_CLOSED) & !FLOW_COUNTED;
    }
    seen::<F>(scratch.place, flags, now);
    if before & !flags & FLOW_COUNTED != 0 {
        count_closed::<F>(scratch.flow.backend_id);
    }
}

/// Where the route to a backend is kept.
#[inline(always)]
fn place<F: Family>(backend_id: u32) -> u32 {
    let half = if F::AF == Ipv4::AF { 0 } else { ROUTES_MAX };
    half + (backend_id & (ROUTES_MAX - 1))
}

/// Whether packets to this backend took a route a moment ago that takes this one; it is then in `scratch.flow`.
#[inline(always)]
pub fn recall<F: Family>(hook: &impl Hook, scratch: &mut Scratch<F::A>) -> bool {
    let Some(kept) = TUNNEL_ROUTES.get_ptr(place::<F>(scratch.flow.backend_id)) else { return false };
    let flow = &mut scratch.flow;
    // SAFETY: the value is this CPU's, and programs of one CPU do not interleave.
    let kept = unsafe { &*kept };
    if kept.interface == 0
        || kept.backend_id != flow.backend_id
        || kept.backend_generation != flow.backend_generation
        || !holds_since(kept.tick)
    {
        return false;
    }
    (flow.interface, flow.link, flow.mtu) = (kept.interface, kept.link, kept.mtu);
    hook.fits(flow.mtu.into())
}

/// Keeps the route that the lookup has left in `scratch.flow`.
#[inline(always)]
pub fn keep<F: Family>(scratch: &Scratch<F::A>) {
    let Some(kept) = TUNNEL_ROUTES.get_ptr_mut(place::<F>(scratch.flow.backend_id)) else { return };
    let Flow { backend_id, backend_generation, interface, link, mtu, .. } = scratch.flow;
    // SAFETY: as above.
    unsafe {
        *kept = BackendRoute { backend_id, backend_generation, tick: ticks(), interface, link, mtu, padding: [0; 2] };
    }
}

/// The tunnel's headers.
struct Headers<F: Encapsulate> {
    network: F::Header,
    udp: UdpHeader,
}

#[inline(always)]
fn headers<F: Encapsulate>(hook: &impl Hook, scratch: &Scratch<F::A>, gue: bool) -> Option<Headers<F>> {
    let (protocol, udp_length) = if gue { (UDP, size_of::<UdpHeader>() as u16) } else { (F::IN_IP, 0) };
    let (network, length) = F::around(hook, &scratch.flow, protocol, udp_length)?;
    let entropy = if gue { flow_hash(&scratch.key) as u16 } else { 0 };
    let udp = UdpHeader {
        source: Be16::from_host(entropy | ENTROPY_PORTS),
        destination: GUE_PORT,
        length: Be16::from_host(length.wrapping_add(udp_length)),
        // None: the packet inside has its own (RFC 6935 for IPv6).
        checksum: 0,
    };
    Some(Headers { network, udp })
}

/// Writes them behind the Ethernet header.
#[inline(always)]
fn write_headers<F: Encapsulate>(hook: &impl Hook, headers: &Headers<F>, gue: bool) -> Option<()> {
    let network = hook.at::<F::Header>(ETHERNET_LENGTH)?;
    // SAFETY: `at` checked that the whole header is inside the packet.
    unsafe { *network = headers.network };
    if gue {
        let udp = hook.at::<UdpHeader>(ETHERNET_LENGTH + size_of::<F::Header>())?;
        // SAFETY: as above.
        unsafe { *udp = headers.udp };
    }
    Some(())
}

/// Puts the packet into the tunnel of `scratch.flow`. What a device is to cut is cut inside of the tunnel, into pieces of the same size.
#[inline(always)]
pub fn encapsulate<F: Encapsulate>(packet: &Packet<'_>, scratch: &Scratch<F::A>) -> Option<()> {
    let node_flags = node_flags::<F>();
    let gue = node_flags & NODE_TUNNELS_ARE_GUE != 0;
    let headers = headers::<F>(packet, scratch, gue)?;
    let udp = if gue { BPF_F_ADJ_ROOM_ENCAP_L4_UDP } else { 0 };
    let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO | F::ENCAP_FLAG | udp);
    let length = tunnel_length::<F::A>(node_flags) as i32;
    // SAFETY: the context is the kernel's; the room appears between the Ethernet and the IP header.
    if unsafe { bpf_skb_adjust_room(packet.raw(), length, BPF_ADJ_ROOM_MAC, flags) } != 0 {
        return None;
    }
    write_headers::<F>(packet, &headers, gue)?;
    count(Counter::PacketTunnelled);
    Some(())
}

/// Puts the frame into the tunnel of `scratch.flow`, with the link-layer addresses of its next hop. `None` drops it.
#[inline(always)]
pub fn encapsulate_frame<F: Encapsulate>(frame: &Frame<'_>, scratch: &Scratch<F::A>) -> Option<()> {
    let node_flags = node_flags::<F>();
    let gue = node_flags & NODE_TUNNELS_ARE_GUE != 0;
    let headers = headers::<F>(frame, scratch, gue)?;
    let length = tunnel_length::<F::A>(node_flags) as i32;
    // SAFETY: the context is the kernel's.
    if unsafe { bpf_xdp_adjust_head(frame.xdp.ctx, -length) } != 0 {
        return None;
    }
    write_headers::<F>(frame, &headers, gue)?;
    let ethernet = frame.at::<[u32; 3]>(0)?;
    let kind = frame.at::<u16>(ETHERNET_LENGTH - size_of::<u16>())?;
    // SAFETY: `at` checked both places.
    unsafe {
        *ethernet = scratch.flow.link;
        *kind = F::ETHER_TYPE;
    }
    Some(())
}
