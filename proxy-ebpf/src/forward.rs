//! Where a translated packet goes: the kernel's own route and neighbour tables decide.

use aya_ebpf::Global;
use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS,
    bpf_fib_lookup as FibParameters, bpf_redir_neigh,
};
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_jiffies64, bpf_redirect_neigh};
use proxy_common::{Counter, Flow, MARK_DONE, SEEN_TICKS, V4, V6};

use crate::ctx::{Hook, Packet};
use crate::maps::{Family, Ipv4, Ipv6, Scratch};

/// Ticks of the kernel's clock for which the packets of a flow follow one lookup: 64 ms to 640 ms, as the kernel is built. A route that
/// changes is followed that much later. With 0, which a benchmark sets at load, every packet asks. The kernel freezes the value before
/// the programs come, so that the verifier knows it as it knows a constant.
#[unsafe(no_mangle)]
static ROUTE_TICKS: Global<u32> = Global::new(64);

/// What the route lookup said.
pub enum Route {
    /// Another interface or host, named in `scratch.flow`, or `scratch.route` alone where its link-layer address is not known.
    Out { neighbour: bool },
    /// The next hop takes no packet that is longer than this.
    TooBig { mtu: u32 },
    /// Not to be forwarded: an address of this node.
    Local,
    /// The kernel must deal with it, for the reason counted.
    Kernel(Counter),
}

/// The part of a route lookup that differs by family.
pub trait RouteAddresses: Family {
    /// Fills in source and destination.
    fn addresses(parameters: &mut FibParameters, flow: &Flow<Self::A>);
}

impl RouteAddresses for Ipv4 {
    #[inline(always)]
    fn addresses(parameters: &mut FibParameters, flow: &Flow<V4>) {
        parameters.__bindgen_anon_3.ipv4_src = flow.source.0;
        parameters.__bindgen_anon_4.ipv4_dst = flow.destination.0;
    }
}

impl RouteAddresses for Ipv6 {
    #[inline(always)]
    fn addresses(parameters: &mut FibParameters, flow: &Flow<V6>) {
        parameters.__bindgen_anon_3.ipv6_src = flow.source.0;
        parameters.__bindgen_anon_4.ipv6_dst = flow.destination.0;
    }
}

/// Whether a packet of the flow before this one asked for the route a moment ago; the answer is in the flow.
///
/// Of the tick the flow has eight bits: those of a flow that was silent for longer mean nothing.
#[inline(always)]
pub fn is_known<A>(packet: &impl Hook, flow: &Flow<A>) -> bool {
    let (now, limit) = (ticks(), ROUTE_TICKS.load());
    let passed = (now as u8).wrapping_sub(flow.route_tick);
    flow.interface != 0
        && limit != 0
        && u32::from(passed) <= limit
        && now.wrapping_sub(flow.last_seen) <= 2 * SEEN_TICKS
        && packet.fits(flow.mtu.into())
}

/// Whether what the kernel said of a route at this tick still holds.
#[inline(always)]
pub fn holds_since(tick: u32) -> bool {
    let limit = ROUTE_TICKS.load();
    limit != 0 && ticks().wrapping_sub(tick) <= limit
}

/// Leaves in the flow what its next packets need to know of the lookup that was made last; `around` bytes of the route are a tunnel's.
#[inline(always)]
fn keep<A>(flow: &mut Flow<A>, route: &FibParameters, around: u16) {
    let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (route.dmac, route.smac);
    flow.link = [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes);
    flow.interface = route.ifindex;
    // SAFETY: the lookup has left the MTU there.
    flow.mtu = unsafe { route.__bindgen_anon_1.mtu_result }.saturating_sub(around);
    flow.route_tick = ticks() as u8;
}

/// The low half of the kernel's clock, which ticks 100 to 1000 times a second.
#[inline(always)]
pub fn ticks() -> u32 {
    // SAFETY: no arguments.
    unsafe { bpf_jiffies64() as u32 }
}

/// Looks up where the packet goes once it has the flow's tuple, or `around` bytes of a tunnel's headers.
#[inline(always)]
pub fn route<F: RouteAddresses>(packet: &impl Hook, scratch: &mut Scratch<F::A>, around: u16) -> Route {
    let parameters = &mut scratch.route;
    parameters.family = F::AF;
    parameters.l4_protocol = scratch.key.protocol;
    parameters.sport = scratch.flow.source_port.0;
    parameters.dport = scratch.flow.destination_port.0;
    parameters.__bindgen_anon_1.tot_len = packet.routed_length().saturating_add(around);
    parameters.__bindgen_anon_2.flowinfo = 0;
    parameters.__bindgen_anon_5.tbid = 0;
    parameters.ifindex = packet.interface();
    F::addresses(parameters, &scratch.flow);
    let size = size_of::<FibParameters>() as i32;
    // SAFETY: the context is the kernel's and the structure is as large as said.
    let result = unsafe { bpf_fib_lookup(packet.context(), parameters, size, 0) } as u32;
    match result {
        BPF_FIB_LKUP_RET_SUCCESS => {
            keep(&mut scratch.flow, parameters, around);
            Route::Out { neighbour: true }
        }
        BPF_FIB_LKUP_RET_NO_NEIGH => Route::Out { neighbour: false },
        BPF_FIB_LKUP_RET_NOT_FWDED => Route::Local,
        BPF_FIB_LKUP_RET_FRAG_NEEDED => {
            // SAFETY: the lookup has left the MTU there.
            let mtu = unsafe { parameters.__bindgen_anon_1.mtu_result };
            Route::TooBig { mtu: mtu.saturating_sub(around).into() }
        }
        _ => Route::Kernel(Counter::NoRoute),
    }
}

/// Sends the packet on its way; the mark keeps the hook of the other interface from looking at it again.
#[inline(always)]
pub fn transmit<A>(packet: &Packet<'_>, scratch: &mut Scratch<A>, neighbour: bool) -> Option<i32> {
    packet.tc.set_mark(packet.mark() | MARK_DONE);
    if !neighbour {
        return Some(resolve_and_transmit(scratch));
    }
    let link = packet.at::<[u32; 3]>(0)?;
    // SAFETY: `at` checked both addresses.
    unsafe { *link = scratch.flow.link };
    Some(packet.redirect(scratch.flow.interface, 0))
}

/// Lets the kernel resolve the next hop that the lookup left in the destination field.
#[inline(always)]
fn resolve_and_transmit<A>(scratch: &mut Scratch<A>) -> i32 {
    let parameters = &scratch.route;
    let next_hop = &mut scratch.next_hop;
    next_hop.nh_family = u32::from(parameters.family);
    // SAFETY: both unions are sixteen bytes of integers, any pattern of which is valid.
    next_hop.__bindgen_anon_1.ipv6_nh = unsafe { parameters.__bindgen_anon_4.ipv6_dst };
    let size = size_of::<bpf_redir_neigh>() as i32;
    // SAFETY: the structure is as large as said.
    unsafe { bpf_redirect_neigh(parameters.ifindex, next_hop, size, 0) as i32 }
}
