//! Ports that no flow may have: answers to them are for somebody else.
//!
//! Of the node's, a masqueraded flow may have none that something on the node has. A client on this node may have connected its own
//! port to the same endpoint itself, at `connect()`: no flow of ours says so, but a socket does.

use core::ptr::addr_of;

use aya_ebpf::bindings::bpf_sock_tuple;
use aya_ebpf::helpers::{bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp};
use proxy_common::decide::Source;
use proxy_common::select::is_tunnel_port;
use proxy_common::{FlowKey, FrontendKey, INTERFACE_NAMESPACE_SHIFT, V4, V6};

use crate::ctx::Hook;
use crate::maps::{Family, INTERFACES, Ipv4, Ipv6, Scratch};
use crate::parse::{TCP, UDP};

/// `BPF_F_CURRENT_NETNS`: sockets of the namespace that the interface is in.
const CURRENT_NAMESPACE: u64 = u64::MAX;
/// No namespace's: its sockets are not asked for.
const NOWHERE: u64 = u32::MAX as u64;
/// `TCP_LISTEN` of include/net/tcp_states.h.
const LISTENS: u32 = 10;

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

/// Where a socket may be that has the tuple of a flow's answers: in the node itself, or in the namespace of the pod that opens the flow.
#[inline(always)]
pub fn namespace_of_answers(hook: &impl Hook, source: &Source<impl Copy>, protocol: u8) -> u64 {
    if source.masquerade {
        return CURRENT_NAMESPACE;
    }
    // Only connections have a tuple of their own. What is no ServicePort's flow is the socket's own connection.
    if protocol != TCP || source.service_id == 0 {
        return NOWHERE;
    }
    // SAFETY: read at once.
    let kinds = unsafe { INTERFACES.get(&hook.interface()) }.map_or(0, |kinds| *kinds);
    match kinds >> INTERFACE_NAMESPACE_SHIFT {
        0 => NOWHERE,
        number => u64::from(number - 1),
    }
}

/// Whether the port in `scratch.reply_key`, to which a flow's answers would come, is somebody else's in this namespace.
#[inline(always)]
pub fn is_taken<F: SocketLookup>(hook: &impl Hook, scratch: &mut Scratch<F::A>, namespace: u64) -> bool {
    match namespace {
        NOWHERE => false,
        CURRENT_NAMESPACE => is_nodes::<F>(hook, scratch),
        _ => is_connected::<F>(hook, scratch, namespace),
    }
}

/// Whether the port of the node in `scratch.reply_key`, to which a flow's answers would come, belongs to a tunnel, a NodePort, or a socket
/// of the node: one that listens, or one that would get such an answer.
#[inline(always)]
fn is_nodes<F: SocketLookup>(hook: &impl Hook, scratch: &mut Scratch<F::A>) -> bool {
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

/// Whether a TCP socket of a pod is connected by this tuple. One that listens at the port is none, and would not mind.
#[inline(always)]
fn is_connected<F: SocketLookup>(hook: &impl Hook, scratch: &mut Scratch<F::A>, namespace: u64) -> bool {
    F::tuple(&mut scratch.tuple, &scratch.reply_key);
    let (context, tuple) = (hook.context(), &raw mut scratch.tuple);
    // SAFETY: the context is the kernel's, and the tuple is as long as said.
    let socket = unsafe { bpf_skc_lookup_tcp(context, tuple, F::TUPLE_LENGTH, namespace, 0) };
    if socket.is_null() {
        return false;
    }
    // SAFETY: a field of the kernel's socket, to which the lookup has given us a reference.
    let state = unsafe { addr_of!((*socket).state).read_volatile() };
    // SAFETY: the reference is given back once.
    unsafe { bpf_sk_release(socket.cast()) };
    state != LISTENS
}
