//! Direct server return, the side of the endpoint's node: a packet that another node put into a tunnel ([`crate::dsr`]) is taken out, and goes
//! on as if it had come to the Service's address here. Its flow leads to the endpoint that the tunnel was sent to, and answers get the
//! Service's address and go to the client by this node's own route.
//!
//! Every packet tells all that a flow is made of: the packet inside names client and Service, the tunnel's destination the endpoint. So any
//! packet makes a flow that is missing. Whether the Service asks for direct server return here does not matter: nodes learn of a
//! change one after the other.
//!
//! A tunnel that ends at no endpoint of a Service is somebody else's, and is left alone. Into a known flow nothing comes by a tunnel that could
//! not come without one; still, no pod may say who its packet is from: see [`is_trusted`].

use core::ptr::read_volatile;

use aya_ebpf::bindings::{__sk_buff, BPF_F_ADJ_ROOM_FIXED_GSO, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC};
use aya_ebpf::helpers::{bpf_l4_csum_replace, bpf_skb_adjust_room};
use aya_ebpf::programs::TcContext;
use proxy_common::decide::{self, Source, impossible_source, in_networks};
use proxy_common::{
    Address, BACKEND_FREE, Be16, Counter, EndpointKey, FLOW_FOREIGN, FLOW_REPLY, FLOW_TUNNEL, FRONTEND_SOURCE_RANGES,
    FrontendKey, INTERFACE_TUNNELS, NODE_TUNNELS_ARE_GUE, SourceRange,
};

use crate::conntrack;
use crate::counters::count;
use crate::ctx::{ETHERNET_LENGTH, Hook, Packet};
use crate::dsr::{Encapsulate, GUE_PORT, IPV4_IN_IP, IPV6_IN_IP, node_flags, tunnel_length};
use crate::icmp::Quote;
use crate::maps::{Family, INTERFACES, Ipv4, Ipv6, Scratch};
use crate::nat::TCP_CHECKSUM_OFFSET;
use crate::node_port::SocketLookup;
use crate::parse::{
    self, FRAGMENT_BITS, ICMP, ICMP6, Ipv4Header, Ipv6Header, Network, Ports, Transport, UDP, has_ports,
};
use crate::service::Maps;
use crate::tc::{ETHER_TYPE_IPV4, ETHER_TYPE_IPV6};

/// What is known of the tunnel that a packet came in. It is read back from a map, where the verifier knows nothing of it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tunnel<A> {
    /// The node that sent it.
    source: A,
    /// The endpoint.
    destination: A,
    /// Bytes of its headers.
    length: u32,
    /// 1 for a packet that was taken out of it.
    taken_out: u32,
    /// One more than the index of the reason to drop the packet; 0 for none.
    pub refused: u32,
}

impl<A> Tunnel<A> {
    /// Whether the packet was taken out of one.
    #[inline(always)]
    pub const fn is_behind(&self) -> bool {
        self.taken_out != 0
    }
}

/// Greater than the length of any tunnel's headers, and a power of two less one.
const LENGTH_MASK: u32 = 0x3f;
/// Greater than the offset of any transport header in a tunnel, and a power of two less one.
const OFFSET_MASK: usize = 0xfff;

/// The part of a tunnel's end that differs by family.
pub trait Decapsulate: Encapsulate {
    /// Whether the packet's protocol is one of those that tunnels have.
    fn may_be_tunnel(packet: &Packet<'_>) -> bool;
    /// The family's function of [`functions`].
    fn take_out(packet: &Packet<'_>) -> u32;
    /// Likewise: makes the SYN with its TCP header at `offset` ask for segments that fit into the tunnel.
    fn clamp(packet: &Packet<'_>, offset: usize);
    /// Protocol behind a network header that is whole and plain; the addresses go into `tunnel`.
    fn outside(packet: &Packet<'_>, tunnel: &mut Tunnel<Self::A>) -> Option<u8>;
    /// Whether the header at `offset` is of this family.
    fn is_inside(packet: &Packet<'_>, offset: usize) -> bool;
    /// Bytes of a network header and a TCP header.
    const SEGMENT_HEADERS: u32;
}

impl Decapsulate for Ipv4 {
    #[inline(always)]
    fn may_be_tunnel(packet: &Packet<'_>) -> bool {
        let header = packet.at::<Ipv4Header>(ETHERNET_LENGTH);
        // SAFETY: `at` checked that the whole header is inside the packet.
        header.is_some_and(|header| matches!(unsafe { (*header).protocol }, IPV4_IN_IP | UDP))
    }

    #[inline(always)]
    fn take_out(packet: &Packet<'_>) -> u32 {
        // SAFETY: the context is the kernel's.
        unsafe { take_out_v4(packet.raw()) }
    }

    #[inline(always)]
    fn clamp(packet: &Packet<'_>, offset: usize) {
        // SAFETY: as above.
        let _changed = unsafe { clamp_v4(packet.raw(), offset as u32) };
    }

    #[inline(always)]
    fn outside(packet: &Packet<'_>, tunnel: &mut Tunnel<Self::A>) -> Option<u8> {
        let header = packet.at::<Ipv4Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let header = unsafe { &*header };
        if header.version_and_length != 0x45 || header.fragment.0 & FRAGMENT_BITS.to_be() != 0 {
            return None;
        }
        if header.protocol != IPV4_IN_IP && header.protocol != UDP {
            return None;
        }
        (tunnel.source, tunnel.destination) = (header.source, header.destination);
        Some(header.protocol)
    }

    #[inline(always)]
    fn is_inside(packet: &Packet<'_>, offset: usize) -> bool {
        // A word: of a single byte older verifiers do not see the bound.
        // SAFETY: `at` checked the four bytes.
        packet.at::<[u8; 4]>(offset).is_some_and(|word| unsafe { (*word)[0] } >> 4 == 4)
    }

    const SEGMENT_HEADERS: u32 = 20 + 20;
}

impl Decapsulate for Ipv6 {
    #[inline(always)]
    fn may_be_tunnel(packet: &Packet<'_>) -> bool {
        let header = packet.at::<Ipv6Header>(ETHERNET_LENGTH);
        // SAFETY: `at` checked that the whole header is inside the packet.
        header.is_some_and(|header| matches!(unsafe { (*header).next_header }, IPV6_IN_IP | UDP))
    }

    #[inline(always)]
    fn take_out(packet: &Packet<'_>) -> u32 {
        // SAFETY: the context is the kernel's.
        unsafe { take_out_v6(packet.raw()) }
    }

    #[inline(always)]
    fn clamp(packet: &Packet<'_>, offset: usize) {
        // SAFETY: as above.
        let _changed = unsafe { clamp_v6(packet.raw(), offset as u32) };
    }

    #[inline(always)]
    fn outside(packet: &Packet<'_>, tunnel: &mut Tunnel<Self::A>) -> Option<u8> {
        let header = packet.at::<Ipv6Header>(ETHERNET_LENGTH)?;
        // SAFETY: `at` checked that the whole header is inside the packet.
        let header = unsafe { &*header };
        if header.next_header != IPV6_IN_IP && header.next_header != UDP {
            return None;
        }
        (tunnel.source, tunnel.destination) = (header.source, header.destination);
        Some(header.next_header)
    }

    #[inline(always)]
    fn is_inside(packet: &Packet<'_>, offset: usize) -> bool {
        // A word: of a single byte older verifiers do not see the bound.
        // SAFETY: `at` checked the four bytes.
        packet.at::<[u8; 4]>(offset).is_some_and(|word| unsafe { (*word)[0] } >> 4 == 6)
    }

    const SEGMENT_HEADERS: u32 = 40 + 20;
}

/// Takes a packet for an endpoint of this node out of its tunnel; any other stays as it is. What was found is left in the working space, for
/// [`crate::tc`].
#[inline(always)]
pub fn arrive(packet: &Packet<'_>) {
    match packet.ether_type() {
        ETHER_TYPE_IPV4 => arrive_of::<Ipv4>(packet),
        ETHER_TYPE_IPV6 => arrive_of::<Ipv6>(packet),
        _ => {}
    }
}

#[inline(always)]
fn arrive_of<F: Decapsulate>(packet: &Packet<'_>) {
    let Some(scratch) = F::scratch() else { return };
    (scratch.tunnel.taken_out, scratch.tunnel.refused) = (0, 0);
    if F::may_be_tunnel(packet) {
        scratch.tunnel.refused = F::take_out(packet);
    }
}

/// The functions of one family. They are global for the verifier, as those of the table of flows: it walks each of them once, and forgets
/// what it found, so that all that follows is not walked for each way through them.
macro_rules! functions {
    ($family:ty, $take_out:ident, $clamp:ident) => {
        /// As [`take_out`]; 0, or one more than the index of the reason to drop the packet.
        ///
        /// # Safety
        /// The context is the kernel's.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub unsafe extern "C" fn $take_out(ctx: *mut __sk_buff) -> u32 {
            let Some(scratch) = <$family>::scratch() else { return 0 };
            let ctx = TcContext::new(ctx);
            take_out::<$family>(&Packet::new(&ctx), scratch).map_or(0, |reason| reason as u32 + 1)
        }

        /// As [`clamp_segments`]. Returns 1 if the packet was changed.
        ///
        /// # Safety
        /// As above.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub unsafe extern "C" fn $clamp(ctx: *mut __sk_buff, offset: u32) -> u32 {
            let Some(scratch) = <$family>::scratch() else { return 0 };
            let ctx = TcContext::new(ctx);
            clamp_segments::<$family>(&Packet::new(&ctx), offset as usize & OFFSET_MASK, scratch).is_some().into()
        }
    };
}

functions!(Ipv4, take_out_v4, clamp_v4);
functions!(Ipv6, take_out_v6, clamp_v6);

#[inline(always)]
fn take_out<F: Quote + Decapsulate + SocketLookup>(
    packet: &Packet<'_>,
    scratch: &mut Scratch<F::A>,
) -> Option<Counter> {
    let protocol = F::outside(packet, &mut scratch.tunnel)?;
    let kind = match protocol {
        protocol if protocol == F::IN_IP => 0,
        UDP if is_gue::<F>(packet) => NODE_TUNNELS_ARE_GUE,
        _ => return None,
    };
    scratch.tunnel.length = tunnel_length::<F::A>(kind);
    // SAFETY: a reference is valid and aligned.
    let length = (unsafe { read_volatile(&scratch.tunnel.length) } & LENGTH_MASK) as usize;
    packet.pull_headers();
    if !F::is_inside(packet, ETHERNET_LENGTH + length) {
        return None;
    }
    let network = F::network_at(packet, ETHERNET_LENGTH + length, &mut scratch.key)?;
    match is_ours::<F>(packet, scratch, &network) {
        Belongs::No => return None,
        Belongs::Known if !is_trusted::<F>(packet, scratch) => return Some(Counter::TunnelSource),
        Belongs::Known => {}
        Belongs::New(_) if !is_trusted::<F>(packet, scratch) => return Some(Counter::TunnelSource),
        Belongs::New(source) => {
            if let Err(reason) = open::<F>(packet, scratch, &source) {
                return Some(reason);
            }
        }
    }
    let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
    // SAFETY: the context is the kernel's; the room goes from between the Ethernet and the IP header.
    if unsafe { bpf_skb_adjust_room(packet.raw(), -(length as i32), BPF_ADJ_ROOM_MAC, flags) } != 0 {
        return Some(Counter::RewriteFailed);
    }
    scratch.tunnel.taken_out = 1;
    count(Counter::Untunnelled);
    None
}

#[inline(always)]
fn is_gue<F: Encapsulate>(packet: &Packet<'_>) -> bool {
    // SAFETY: `at` checked the four bytes.
    packet
        .at::<Ports>(ETHERNET_LENGTH + size_of::<F::Header>())
        .is_some_and(|ports| unsafe { (*ports).destination } == GUE_PORT)
}

/// Whether a packet in a tunnel is one for an endpoint of this node.
enum Belongs<A> {
    /// It is not.
    No,
    /// Nothing has to be made for it.
    Known,
    /// It opens a flow here, with this source; the endpoint is in `scratch.chosen`.
    New(Source<A>),
}

/// What has ports tells whose it is. An error about an answer, and a fragment without ports, find their flow once they are out of the
/// tunnel; they are believed at an address that is not the node's own, where no other tunnel of this kind ends.
#[inline(always)]
fn is_ours<F: Quote + Decapsulate + SocketLookup>(
    packet: &Packet<'_>,
    scratch: &mut Scratch<F::A>,
    network: &Network,
) -> Belongs<F::A> {
    if network.is_later() || is_error::<F>(packet, network) {
        return match decide::is_own(&Maps::<F>::NEW, &scratch.tunnel.destination) || !is_trusted::<F>(packet, scratch) {
            true => Belongs::No,
            false => Belongs::Known,
        };
    }
    if !has_ports(network.protocol) || network.l4_offset > OFFSET_MASK {
        return Belongs::No;
    }
    let Some(transport) = parse::tuple(packet, network, &mut scratch.key) else { return Belongs::No };
    if scratch.key.protocol == parse::NO_HEADER {
        return Belongs::No;
    }
    if is_known::<F>(scratch, &transport) {
        return Belongs::Known;
    }
    match endpoint::<F>(scratch) {
        Some(ports) if !conntrack::leaves_new_flows() => Belongs::New(Source {
            address: scratch.key.source,
            masquerade: false,
            ports,
            service_id: scratch.found.frontend.service_id,
            flags: 0,
            reply_flags: FLOW_TUNNEL,
        }),
        _ => Belongs::No,
    }
}

#[inline(always)]
fn is_error<F: Quote>(packet: &Packet<'_>, network: &Network) -> bool {
    if !matches!(network.protocol, ICMP | ICMP6) || network.l4_offset > OFFSET_MASK {
        return false;
    }
    // SAFETY: `at` checked the four bytes.
    packet.at::<[u8; 4]>(network.l4_offset).is_some_and(|word| F::is_error(network.protocol, unsafe { (*word)[0] }))
}

/// Whether the packet's flow is known and leads to the tunnel's endpoint. A connection that is open stays with the endpoint that it has: the
/// other node may have lost the flow and chosen again.
#[inline(always)]
fn is_known<F: Family>(scratch: &mut Scratch<F::A>, transport: &Transport) -> bool {
    if F::flows().read(&scratch.key, &mut scratch.other).is_none() {
        return false;
    }
    let flow = &scratch.other;
    let usable = flow.flags & (FLOW_REPLY | FLOW_FOREIGN) == 0 && !flow.is_direct();
    usable && (!transport.opens() || flow.destination == scratch.tunnel.destination)
}

/// Finds the endpoint of the tunnel among those of the frontend that the packet names, which may be a NodePort of another node: at any address
/// that a machine can have. Returns the range of source ports.
#[inline(always)]
fn endpoint<F: Family>(scratch: &mut Scratch<F::A>) -> Option<(u16, u16)> {
    let settings = F::settings()?;
    let key = &scratch.key;
    let mut name =
        FrontendKey { address: key.destination, port: key.destination_port, protocol: key.protocol, padding: 0 };
    // SAFETY: copied at once, as are the others.
    let mut frontend = unsafe { F::frontends().get(&name) };
    let port = key.destination_port.to_host();
    let in_range = port >= settings.node_port_min && port <= settings.node_port_max;
    if frontend.is_none() && in_range && !key.destination.is_never_a_source() {
        name.address = F::A::default();
        // SAFETY: as above.
        frontend = unsafe { F::frontends().get(&name) };
    }
    scratch.found.frontend = *frontend?;
    let place = EndpointKey { address: scratch.tunnel.destination, service_id: scratch.found.frontend.service_id };
    // SAFETY: as above.
    let id = *unsafe { F::endpoints().get(&place) }?;
    let backend = F::backends().get(id)?;
    scratch.chosen.id = id;
    scratch.chosen.backend = *backend;
    let backend = &scratch.chosen.backend;
    let holds = backend.service_id == place.service_id && backend.state != BACKEND_FREE;
    holds.then_some((settings.source_port_min, settings.source_port_max))
}

/// Whether the tunnel comes from where other nodes are: through an interface to them, and from an address that is neither a pod's nor this
/// node's own. A pod that sends such a packet would choose itself who it is from.
#[inline(always)]
fn is_trusted<F: Family>(packet: &Packet<'_>, scratch: &Scratch<F::A>) -> bool {
    // SAFETY: read at once.
    let kinds = unsafe { INTERFACES.get(&packet.interface()) }.map_or(0, |kinds| *kinds);
    let source = &scratch.tunnel.source;
    let Some(settings) = F::settings() else { return false };
    kinds & INTERFACE_TUNNELS != 0
        && !source.is_never_a_source()
        && !in_networks(source, &settings.pod_cidrs, settings.pod_cidr_count)
        && !decide::is_own(&Maps::<F>::NEW, source)
}

/// Makes the flow of the packet inside. Who may not open one here directly may not do it through a tunnel.
#[inline(always)]
fn open<F: SocketLookup>(
    packet: &Packet<'_>,
    scratch: &mut Scratch<F::A>,
    source: &Source<F::A>,
) -> Result<(), Counter> {
    if let Some(reason) = impossible_source(&Maps::<F>::NEW, &source.address) {
        return Err(reason);
    }
    if scratch.found.frontend.flags & FRONTEND_SOURCE_RANGES != 0 {
        let client = SourceRange { service_id: source.service_id, client: source.address };
        if !decide::Tables::source_range(&Maps::<F>::NEW, &client) {
            return Err(Counter::SourceRange);
        }
    }
    conntrack::create::<F>(packet, scratch, source)
}

/// Kinds of TCP options (RFC 9293, 3.1): the end, one byte of padding, the longest segment that the sender takes.
const OPTION_END: u8 = 0;
const OPTION_NONE: u8 = 1;
const OPTION_SEGMENT: u8 = 2;
/// Options that are looked at: all that a SYN of Linux has, with their padding.
const OPTIONS_MAX: usize = 10;
/// Bytes of a TCP header without options, and offset of the byte that says how many words the header has.
const TCP_HEADER: usize = 20;
const TCP_WORDS: usize = 12;
/// Where the route is not known, Ethernet's usual one.
const MTU: u16 = 1500;

/// Makes the endpoint's SYN ask the client for segments that fit into the tunnel, which the client does not know of. `offset` is that of its
/// TCP header. `None` where there is nothing to change.
#[inline(always)]
fn clamp_segments<F: Decapsulate>(packet: &Packet<'_>, offset: usize, scratch: &Scratch<F::A>) -> Option<()> {
    let mtu = if scratch.flow.mtu == 0 { MTU } else { scratch.flow.mtu };
    let headers = tunnel_length::<F::A>(node_flags::<F>()) + F::SEGMENT_HEADERS;
    let longest = mtu.saturating_sub(headers as u16);
    let (place, segment) = find_segment_option(packet, offset)?;
    if segment <= longest { None } else { lower(packet, offset, place, [segment, longest]) }
}

/// Offset and value of the option that says how long segments may be. What lies behind the header is data, whatever it looks like.
#[inline(always)]
fn find_segment_option(packet: &Packet<'_>, start: usize) -> Option<(usize, u16)> {
    let end = start + usize::from(packet.byte(start + TCP_WORDS)? >> 4) * 4;
    let mut offset = start + TCP_HEADER;
    for _ in 0..OPTIONS_MAX {
        if offset >= end {
            return None;
        }
        match packet.byte(offset)? {
            OPTION_END => return None,
            OPTION_NONE => offset += 1,
            OPTION_SEGMENT if offset + 4 <= end => {
                let value = [packet.byte(offset + 2)?, packet.byte(offset + 3)?];
                return Some((offset + 2, u16::from_be_bytes(value)));
            }
            _ => offset += usize::from(packet.byte(offset + 1)?),
        }
    }
    None
}

/// Replaces the value, and what it adds to the checksum. That is a sum of words of two bytes, and the value may begin in the middle of one.
#[inline(always)]
fn lower(packet: &Packet<'_>, start: usize, offset: usize, [old, new]: [u16; 2]) -> Option<()> {
    let is_split = (offset - start) & 1 != 0;
    let word = |value: u16| if is_split { Be16::from_host(value.swap_bytes()).0 } else { Be16::from_host(value).0 };
    let field = (start + TCP_CHECKSUM_OFFSET) as u32;
    // SAFETY: the context is the kernel's; the helper checks the offset. It knows whether a device is still to compute the checksum.
    if unsafe { bpf_l4_csum_replace(packet.raw(), field, word(old).into(), word(new).into(), 2) } != 0 {
        return None;
    }
    let place = packet.at::<Be16>(offset & OFFSET_MASK)?;
    // SAFETY: `at` checked the two bytes.
    unsafe { *place = Be16::from_host(new) };
    Some(())
}
