//! Ports of the node that no masqueraded flow may have: answers to them are for somebody else.

use aya_ebpf::bindings::bpf_sock_tuple;
use aya_ebpf::helpers::{bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp};
use proxy_common::select::is_tunnel_port;
use proxy_common::{FlowKey, FrontendKey, V4, V6};

use crate::ctx::Hook;
use crate::maps::{Family, Ipv4, Ipv6, Scratch};
use crate::parse::{TCP, UDP};

/// `BPF_F_CURRENT_NETNS`: sockets of the namespace that the interface is in.
const CURRENT_NAMESPACE: u64 = u64::MAX;

/// The part of a socket lookup that differs by family.
pub trait SocketLookup: Family {
    /// Bytes of the tuple, by which the kernel tells the family.
    const TUPLE_LENGTH: u32;
    /// Fills in the tuple of a packet with this key.
    fn tuple(tuple: &mut bpf_sock_tuple, key: &FlowKey<Self::A>);
}

impl SocketLookup for Ipv4 {
    const TUPLE_LENGTH: u32 = 4 + 4 + 2 + 2;

    #[inline(always)]
    fn tuple(tuple: &mut bpf_sock_tuple, key: &FlowKey<V4>) {
        tuple.__bindgen_anon_1.ipv4.saddr = key.source.0;
        tuple.__bindgen_anon_1.ipv4.daddr = key.destination.0;
        tuple.__bindgen_anon_1.ipv4.sport = key.source_port.0;
        tuple.__bindgen_anon_1.ipv4.dport = key.destination_port.0;
    }
}

impl SocketLookup for Ipv6 {
    const TUPLE_LENGTH: u32 = 16 + 16 + 2 + 2;

    #[inline(always)]
    fn tuple(tuple: &mut bpf_sock_tuple, key: &FlowKey<V6>) {
        tuple.__bindgen_anon_1.ipv6.saddr = key.source.0;
        tuple.__bindgen_anon_1.ipv6.daddr = key.destination.0;
        tuple.__bindgen_anon_1.ipv6.sport = key.source_port.0;
        tuple.__bindgen_anon_1.ipv6.dport = key.destination_port.0;
    }
}

/// Whether the port of the node in `scratch.reply_key`, to which a flow's answers would come, belongs to a tunnel, a NodePort, or a socket
/// of the node: one that listens, or one that would get such an answer.
#[inline(always)]
pub fn is_taken<F: SocketLookup>(hook: &impl Hook, scratch: &mut Scratch<F::A>) -> bool {
    let (port, protocol) = (scratch.reply_key.destination_port, scratch.reply_key.protocol);
    if protocol == UDP && is_tunnel_port(port.to_host()) {
        return true;
    }
    is_node_port::<F>(scratch) || has_socket::<F>(hook, scratch)
}

#[inline(always)]
fn is_node_port<F: Family>(scratch: &Scratch<F::A>) -> bool {
    let Some(settings) = F::settings() else { return false };
    let (port, protocol) = (scratch.reply_key.destination_port, scratch.reply_key.protocol);
    if port.to_host() < settings.node_port_min || port.to_host() > settings.node_port_max {
        return false;
    }
    let key = FrontendKey { address: F::A::default(), port, protocol, padding: 0 };
    // SAFETY: nothing of the value is used.
    unsafe { F::frontends().get(&key) }.is_some()
}

#[inline(always)]
fn has_socket<F: SocketLookup>(hook: &impl Hook, scratch: &mut Scratch<F::A>) -> bool {
    F::tuple(&mut scratch.tuple, &scratch.reply_key);
    let tuple = &raw mut scratch.tuple;
    let context = hook.context();
    // SAFETY: the context is the kernel's, and the tuple is as long as said.
    let socket = unsafe {
        match scratch.reply_key.protocol {
            TCP => bpf_skc_lookup_tcp(context, tuple, F::TUPLE_LENGTH, CURRENT_NAMESPACE, 0).cast(),
            UDP => bpf_sk_lookup_udp(context, tuple, F::TUPLE_LENGTH, CURRENT_NAMESPACE, 0),
            _ => return false,
        }
    };
    if socket.is_null() {
        return false;
    }
    // SAFETY: the lookup has given us the reference.
    unsafe { bpf_sk_release(socket.cast()) };
    true
}
