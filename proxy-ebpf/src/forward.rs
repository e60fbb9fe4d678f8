//! Where a translated packet goes: the kernel's own route and neighbour tables decide.

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS,
    bpf_fib_lookup as FibParameters, bpf_redir_neigh,
};
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_redirect_neigh};
use proxy_common::{Counter, Flow, MARK_DONE, V4, V6};

use crate::ctx::Packet;
use crate::maps::{Family, Ipv4, Ipv6, Scratch};

/// What the route lookup said.
pub enum Route {
    /// Another interface or host, named in `scratch.route`, whose link-layer address is known or not.
    Out { neighbour: bool },
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

/// Looks up where the packet goes once it has the flow's tuple.
#[inline(always)]
pub fn route<F: RouteAddresses>(packet: &Packet<'_>, scratch: &mut Scratch<F::A>) -> Route {
    let parameters = &mut scratch.route;
    parameters.family = F::AF;
    parameters.l4_protocol = scratch.key.protocol;
    parameters.sport = scratch.flow.source_port.0;
    parameters.dport = scratch.flow.destination_port.0;
    // A length of 0 makes the kernel compare the packet itself, segmentation offload included, with the interface's MTU.
    parameters.__bindgen_anon_1.tot_len = 0;
    parameters.__bindgen_anon_2.flowinfo = 0;
    parameters.__bindgen_anon_5.tbid = 0;
    parameters.ifindex = packet.interface();
    F::addresses(parameters, &scratch.flow);
    let size = size_of::<FibParameters>() as i32;
    // SAFETY: the context is the kernel's and the structure is as large as said.
    let result = unsafe { bpf_fib_lookup(packet.raw().cast(), parameters, size, 0) } as u32;
    match result {
        BPF_FIB_LKUP_RET_SUCCESS => Route::Out { neighbour: true },
        BPF_FIB_LKUP_RET_NO_NEIGH => Route::Out { neighbour: false },
        BPF_FIB_LKUP_RET_NOT_FWDED => Route::Local,
        BPF_FIB_LKUP_RET_FRAG_NEEDED => Route::Kernel(Counter::TooBig),
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
    let parameters = &scratch.route;
    let ethernet = packet.at::<[[u8; 6]; 2]>(0)?;
    // SAFETY: `at` checked both addresses.
    unsafe { *ethernet = [parameters.dmac, parameters.smac] };
    Some(packet.redirect(parameters.ifindex, 0))
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
