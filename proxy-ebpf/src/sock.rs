//! Load balancing at the socket: the destination is chosen once, before a packet exists.
//!
//! TCP and UDP only: the kernel runs these hooks for no SCTP socket, whose packets take the packet path.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{
    BPF_F_CURRENT_NETNS, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1 as Tuple,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as Tuple4, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as Tuple6,
};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_set_retval, bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release};
use aya_ebpf::programs::SockAddrContext;
use proxy_common::decide::{Chosen, Found, Unserved, find, is_own, select, unserved};
use proxy_common::{
    Address, Be16, Counter, FRONTEND_LEAST_CONNECTIONS, FRONTEND_SOURCE_RANGES, NODE_PODS_BY_INTERFACE, NodeSettings,
    Origin, RuleBits, SOCKET_PEERS_MAX, SocketPeer, SocketPeers, V4, V6,
};

use crate::connected;
use crate::counters::{count, count_connection};
use crate::events;
use crate::left;
use crate::maps::{Family, Ipv4, Ipv6};
use crate::parse::{TCP, UDP};
use crate::service::{self, Maps, SocketClient, is_absent};

/// The system call goes on.
const ALLOW: i32 = 1;
/// The system call fails with what `bpf_set_retval` set.
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

/// How an address is read from and written to the hook's context.
pub trait SocketFamily {
    /// Family whose maps are used.
    type F: SocketLookup;
    /// Reads the address.
    fn read(ctx: &SockAddrContext) -> <Self::F as Family>::A;
    /// Writes the address.
    fn write(ctx: &SockAddrContext, address: &<Self::F as Family>::A);
}

/// The part of looking for a listening socket that differs by family.
pub trait SocketLookup: Family {
    /// Bytes of the tuple that the family uses.
    const TUPLE_LENGTH: u32;
    /// Anybody's connection to this destination.
    fn tuple(address: &Self::A, port: Be16) -> bpf_sock_tuple;
}

impl SocketLookup for Ipv4 {
    const TUPLE_LENGTH: u32 = 12;

    #[inline(always)]
    fn tuple(address: &V4, port: Be16) -> bpf_sock_tuple {
        let ipv4 = Tuple4 { saddr: 0, daddr: address.0, sport: 0, dport: port.0 };
        bpf_sock_tuple { __bindgen_anon_1: Tuple { ipv4 } }
    }
}

impl SocketLookup for Ipv6 {
    const TUPLE_LENGTH: u32 = 36;

    #[inline(always)]
    fn tuple(address: &V6, port: Be16) -> bpf_sock_tuple {
        let ipv6 = Tuple6 { saddr: [0; 4], daddr: address.0, sport: 0, dport: port.0 };
        bpf_sock_tuple { __bindgen_anon_1: Tuple { ipv6 } }
    }
}

/// IPv4 addresses in an IPv6 socket, as `::ffff:a.b.c.d`.
pub struct MappedV4;

impl SocketFamily for Ipv4 {
    type F = Ipv4;

    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> V4 {
        // SAFETY: field access through the kernel's context; volatile keeps it one access of the field's size.
        V4(unsafe { addr_of!((*ctx.sock_addr).user_ip4).read_volatile() })
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, address: &V4) {
        // SAFETY: as above.
        unsafe { addr_of_mut!((*ctx.sock_addr).user_ip4).write_volatile(address.0) };
    }
}

impl SocketFamily for Ipv6 {
    type F = Ipv6;

    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> V6 {
        V6([word(ctx, 0), word(ctx, 1), word(ctx, 2), word(ctx, 3)])
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, address: &V6) {
        for (index, value) in address.0.iter().enumerate() {
            // SAFETY: as in `word`.
            unsafe { addr_of_mut!((*ctx.sock_addr).user_ip6[index]).write_volatile(*value) };
        }
    }
}

impl SocketFamily for MappedV4 {
    type F = Ipv4;

    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> V4 {
        V4(word(ctx, 3))
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, address: &V4) {
        // The prefix is there already: the hook saw a mapped address.
        // SAFETY: as in `word`.
        unsafe { addr_of_mut!((*ctx.sock_addr).user_ip6[3]).write_volatile(address.0) };
    }
}

/// One word of the IPv6 address in the context.
#[inline(always)]
fn word(ctx: &SockAddrContext, index: usize) -> u32 {
    // SAFETY: field access through the kernel's context; volatile keeps it one access of four bytes.
    unsafe { addr_of!((*ctx.sock_addr).user_ip6[index]).read_volatile() }
}

/// Whether the IPv6 address in the context is an IPv4 one.
#[inline(always)]
pub fn mapped_address(ctx: &SockAddrContext) -> bool {
    Ipv6::read(ctx).mapped_v4().is_some()
}

#[inline(always)]
fn read_port(ctx: &SockAddrContext) -> Be16 {
    // SAFETY: field access through the kernel's context. The port is the low half of the field.
    Be16(unsafe { addr_of!((*ctx.sock_addr).user_port).read_volatile() } as u16)
}

#[inline(always)]
fn read_protocol(ctx: &SockAddrContext) -> u8 {
    // SAFETY: field access through the kernel's context.
    unsafe { addr_of!((*ctx.sock_addr).protocol).read_volatile() as u8 }
}

/// Tells whoever watches what becomes of the call, before its address is written over.
#[inline(always)]
fn tell<S: SocketFamily>(
    ctx: &SockAddrContext,
    service_id: u32,
    peer: Option<&SocketPeer<<S::F as Family>::A>>,
    reason: Counter,
) {
    let asked = (&S::read(ctx), read_port(ctx));
    let backend = peer.map_or(asked, |peer| (&peer.backend, peer.backend_port));
    events::socket(asked, read_protocol(ctx), service_id, backend, reason);
}

#[inline(always)]
fn write_port(ctx: &SockAddrContext, port: Be16) {
    // SAFETY: as above.
    unsafe { addr_of_mut!((*ctx.sock_addr).user_port).write_volatile(u32::from(port.0)) };
}

/// What the hook does with the call.
enum Decision<A> {
    /// Not for us.
    Pass,
    /// Refused, for the reason counted; the ServicePort where there is one.
    Refuse(Counter, u32),
    /// Goes to this peer, one of this ServicePort.
    Translate(SocketPeer<A>, u32),
    /// Its packet does, under the address that the call named.
    Leave(SocketPeer<A>),
}

/// connect(): every call chooses anew.
#[inline(always)]
pub fn connect<S: SocketFamily>(ctx: &SockAddrContext) -> i32 {
    if is_foreign::<S::F>(&S::read(ctx)) { ALLOW } else { choose::<S>(ctx, Counter::SocketConnect) }
}

/// sendmsg(): a socket stays with the backend that it used for this destination, as a conntrack entry would make it.
#[inline(always)]
pub fn send<S: SocketFamily>(ctx: &SockAddrContext) -> i32 {
    let (address, port) = (S::read(ctx), read_port(ctx));
    if is_foreign::<S::F>(&address) {
        return ALLOW;
    }
    let connected = connected::get::<S::F>(socket_cookie(ctx)).filter(|peer| is_for(peer, &address, port));
    // SAFETY: the map is made for this hook; a null pointer means that the socket never met a frontend.
    let stored = || unsafe { S::F::sockets().get_ptr_mut(ctx).as_ref() };
    let known =
        connected.or_else(|| stored().and_then(|peers| peers.peers.iter().find(|peer| is_for(peer, &address, port))));
    match known.filter(|peer| service::live::<S::F>(peer.backend_id, peer.backend_generation).is_some()) {
        Some(peer) if is_left(peer) => ALLOW,
        Some(peer) => rewrite::<S>(ctx, &peer.clone(), Counter::SocketSend),
        None => choose::<S>(ctx, Counter::SocketSend),
    }
}

/// Most calls end here: nothing at all is known of the address. A loopback address may have NodePorts.
#[inline(always)]
fn is_foreign<F: Family>(address: &F::A) -> bool {
    is_absent::<F>(address) && !address.is_loopback()
}

/// Decides, remembers and rewrites.
#[inline(always)]
fn choose<S: SocketFamily>(ctx: &SockAddrContext, done: Counter) -> i32 {
    match decide::<S>(ctx) {
        Decision::Pass => ALLOW,
        Decision::Leave(peer) => {
            // What the socket sends there next belongs to the same flow. A connected one asks no more.
            if done == Counter::SocketSend
                && let Some(peers) = storage::<S::F>(ctx)
            {
                remember(peers, &peer);
            }
            ALLOW
        }
        Decision::Refuse(reason, service_id) => {
            tell::<S>(ctx, service_id, None, reason);
            refuse(reason)
        }
        Decision::Translate(peer, service_id) => {
            tell::<S>(ctx, service_id, Some(&peer), done);
            let for_storage = match done {
                Counter::SocketConnect => connected::put::<S::F>(socket_cookie(ctx), &peer),
                _ => Some(peer),
            };
            if let Some(peer) = for_storage
                && let Some(peers) = storage::<S::F>(ctx)
            {
                remember(peers, &peer);
            }
            rewrite::<S>(ctx, &peer, done)
        }
    }
}

/// recvmsg() and getpeername(): the application sees the address that it named.
#[inline(always)]
pub fn restore<S: SocketFamily>(ctx: &SockAddrContext) -> i32 {
    let (address, port) = (S::read(ctx), read_port(ctx));
    let is_of = |peer: &&SocketPeer<<S::F as Family>::A>| {
        peer.backend_port == port && peer.backend == address && port != Be16(0)
    };
    // What it is connected to comes first: it may have used the same backend by another frontend before.
    if let Some(peer) = connected::get::<S::F>(socket_cookie(ctx)).filter(is_of) {
        return restored::<S>(ctx, peer);
    }
    // SAFETY: as in `send`.
    let stored = unsafe { S::F::sockets().get_ptr_mut(ctx).as_ref() };
    match stored.and_then(|peers| peers.peers.iter().find(is_of)) {
        Some(peer) => restored::<S>(ctx, peer),
        None => ALLOW,
    }
}

#[inline(always)]
fn restored<S: SocketFamily>(ctx: &SockAddrContext, peer: &SocketPeer<<S::F as Family>::A>) -> i32 {
    S::write(ctx, &peer.frontend);
    write_port(ctx, peer.frontend_port);
    ALLOW
}

/// What the packet path must decide is passed: there a packet has a source, here a socket of a pod has none yet. That is every
/// pod's connection whose source is to be rewritten, whose client's address counts (affinity, source ranges), or that may go
/// back to the pod itself. A socket of the node needs no rewriting: it gets one of the node's addresses after this.
#[inline(always)]
fn decide<S: SocketFamily>(ctx: &SockAddrContext) -> Decision<<S::F as Family>::A> {
    let (address, port) = (S::read(ctx), read_port(ctx));
    let protocol = read_protocol(ctx);
    let Some(settings) = S::F::settings() else { return Decision::Pass };
    let own_loopback = address.is_loopback();
    if own_loopback && !is_node(cookie(ctx), settings) {
        return Decision::Pass;
    }
    let maps = Maps::<S::F>::NEW;
    let mut found = Found::default();
    if !find(&maps, &address, port, protocol, own_loopback, &mut found) {
        return match unserved(&maps, &address) {
            // A datagram may be an answer to a client that another proxy masqueraded with a ClusterIP: its packet tells.
            Unserved::Port if protocol == TCP => Decision::Refuse(Counter::SocketUnserved, 0),
            Unserved::Port => Decision::Pass,
            // The packet is dropped at the interface.
            Unserved::Address | Unserved::Foreign => Decision::Pass,
        };
    }
    // Nobody says when a socket is closed, so flows are counted as packets; a loopback address is never translated in one.
    let counted = found.frontend.flags & FRONTEND_LEAST_CONNECTIONS != 0 && !own_loopback;
    if found.frontend.flags & FRONTEND_SOURCE_RANGES != 0 || counted {
        return Decision::Pass;
    }
    let cookie = cookie(ctx);
    let node = is_node(cookie, settings);
    let rule = found.frontend.rule(origin(node, settings));
    match rule.action() {
        RuleBits::FORWARD => {}
        RuleBits::REJECT => return Decision::Refuse(Counter::SocketReject, found.frontend.service_id),
        // The packet itself is dropped at the interface, so that the caller sees the silence that kube-proxy gives.
        _ => return Decision::Pass,
    }
    if !node && (rule.masquerade() || found.frontend.affinity_seconds != 0) {
        return Decision::Pass;
    }
    let mut chosen = Chosen::default();
    if !select(&maps, &mut found, rule, None, &SocketClient(cookie), &mut chosen) {
        return Decision::Pass;
    }
    if !node && may_be_itself::<S::F>(&chosen) && listens::<S::F>(ctx, protocol, &chosen) {
        left::put::<S::F>(&found.key, &chosen);
        // The call keeps what it named.
        (chosen.backend.address, chosen.backend.port) = (address, port);
        return Decision::Leave(peer(address, port, &chosen));
    }
    count_connection::<S::F>(found.frontend.service_id, chosen.id);
    Decision::Translate(peer(address, port, &chosen), found.frontend.service_id)
}

/// Number of the socket.
#[inline(always)]
fn socket_cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is the kernel's, of a hook of sockets.
    unsafe { connected::cookie(ctx.as_ptr()) }
}

/// Cookie of the socket's network namespace.
#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is the kernel's.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr().cast()) }
}

#[inline(always)]
fn is_node<A>(cookie: u64, settings: &NodeSettings<A>) -> bool {
    let [low, high] = settings.netns_cookie;
    cookie == u64::from(low) | u64::from(high) << 32
}

/// A socket outside of the node's network namespace is taken for a pod's: its address is not known yet. Where pods of the family
/// are not detected, it is anybody.
#[inline(always)]
fn origin<A>(node: bool, settings: &NodeSettings<A>) -> Origin {
    let detected = settings.pod_cidr_count != 0 || settings.flags & NODE_PODS_BY_INTERFACE != 0;
    match (node, detected) {
        (true, _) => Origin::Node,
        (false, true) => Origin::Pod,
        (false, false) => Origin::External,
    }
}

/// Whether the endpoint may be the pod that connects: it is on this node, and no address of the node itself.
#[inline(always)]
fn may_be_itself<F: Family>(chosen: &Chosen<F::A>) -> bool {
    chosen.backend.local != 0 && !is_own(&Maps::<F>::NEW, &chosen.backend.address)
}

/// Whether somebody in the socket's own namespace would take the connection if the endpoint were this pod. It may be another
/// pod with the same port; then the packet path serves the connection, which costs time and no more.
#[inline(always)]
fn listens<F: SocketLookup>(ctx: &SockAddrContext, protocol: u8, chosen: &Chosen<F::A>) -> bool {
    let mut tuple = F::tuple(&chosen.backend.address, chosen.backend.port);
    let (context, tuple, current) = (ctx.as_ptr().cast(), &raw mut tuple, BPF_F_CURRENT_NETNS as i64 as u64);
    // SAFETY: the context is the kernel's, and the tuple is as large as said.
    let socket = unsafe {
        match protocol {
            TCP => bpf_sk_lookup_tcp(context, tuple.cast(), F::TUPLE_LENGTH, current, 0),
            UDP => bpf_sk_lookup_udp(context, tuple.cast(), F::TUPLE_LENGTH, current, 0),
            _ => return false,
        }
    };
    if socket.is_null() {
        return false;
    }
    // SAFETY: the lookup gave a reference, which is given back once.
    unsafe { bpf_sk_release(socket.cast()) };
    true
}

#[inline(always)]
fn peer<A: Copy>(frontend: A, frontend_port: Be16, chosen: &Chosen<A>) -> SocketPeer<A> {
    SocketPeer {
        frontend,
        backend: chosen.backend.address,
        frontend_port,
        backend_port: chosen.backend.port,
        backend_id: chosen.id,
        backend_generation: chosen.backend.generation,
    }
}

/// Whether the socket's packets go there under the frontend's address.
#[inline(always)]
fn is_left<A: PartialEq>(peer: &SocketPeer<A>) -> bool {
    peer.backend_port == peer.frontend_port && peer.backend == peer.frontend
}

/// Whether the socket used this peer for a destination.
#[inline(always)]
fn is_for<A: PartialEq>(peer: &SocketPeer<A>, address: &A, port: Be16) -> bool {
    peer.backend_port != Be16(0) && peer.frontend_port == port && peer.frontend == *address
}

/// The socket's storage, made on first use; `None` when the kernel has no memory for it.
#[inline(always)]
fn storage<F: Family>(ctx: &SockAddrContext) -> Option<&'static mut SocketPeers<F::A>> {
    // SAFETY: the map is made for this hook; new storage is zeroed, which is a valid value.
    unsafe { F::sockets().get_or_insert_ptr_mut(ctx, None).as_mut() }
}

/// Replaces the entry of the same frontend, or the oldest.
#[inline(always)]
fn remember<A: PartialEq + Copy>(peers: &mut SocketPeers<A>, peer: &SocketPeer<A>) {
    for known in &mut peers.peers {
        if known.frontend_port == peer.frontend_port && known.frontend == peer.frontend {
            *known = *peer;
            return;
        }
    }
    let next = peers.next as usize % SOCKET_PEERS_MAX;
    if let Some(oldest) = peers.peers.get_mut(next) {
        *oldest = *peer;
    }
    peers.next = peers.next.wrapping_add(1);
}

#[inline(always)]
fn rewrite<S: SocketFamily>(ctx: &SockAddrContext, peer: &SocketPeer<<S::F as Family>::A>, done: Counter) -> i32 {
    S::write(ctx, &peer.backend);
    write_port(ctx, peer.backend_port);
    count(done);
    ALLOW
}

#[inline(always)]
fn refuse(reason: Counter) -> i32 {
    count(reason);
    // SAFETY: no pointers are passed.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}
