//! Load balancing at the socket: the destination is chosen once, before a packet exists.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_set_retval};
use aya_ebpf::programs::SockAddrContext;
use proxy_common::{Be16, Counter, Origin, RuleBits, SOCKET_PEERS_MAX, SocketPeer, SocketPeers, V4, V6};

use crate::counters::{count, count_connection};
use crate::maps::{Family, Ipv4, Ipv6};
use crate::service::{self, Chosen, Found, SocketClient};

/// The system call goes on.
const ALLOW: i32 = 1;
/// The system call fails with what `bpf_set_retval` set.
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

/// How an address is read from and written to the hook's context.
pub trait SocketFamily {
    /// Family whose maps are used.
    type F: Family;
    /// Reads the address.
    fn read(ctx: &SockAddrContext) -> <Self::F as Family>::A;
    /// Writes the address.
    fn write(ctx: &SockAddrContext, address: &<Self::F as Family>::A);
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
fn write_port(ctx: &SockAddrContext, port: Be16) {
    // SAFETY: as above.
    unsafe { addr_of_mut!((*ctx.sock_addr).user_port).write_volatile(u32::from(port.0)) };
}

/// What the hook does with the call.
enum Decision<A> {
    /// Not for us.
    Pass,
    /// The service has no endpoints.
    Refuse,
    /// Goes to this peer.
    Translate(SocketPeer<A>),
}

/// connect(): every call chooses anew.
#[inline(always)]
pub fn connect<S: SocketFamily>(ctx: &SockAddrContext) -> i32 {
    choose::<S>(ctx, Counter::SocketConnect)
}

/// sendmsg(): a socket stays with the backend that it used for this destination, as a conntrack entry would make it.
#[inline(always)]
pub fn send<S: SocketFamily>(ctx: &SockAddrContext) -> i32 {
    let (address, port) = (S::read(ctx), read_port(ctx));
    // SAFETY: the map is made for this hook; a null pointer means that the socket never met a frontend.
    let known = unsafe { S::F::sockets().get_ptr_mut(ctx).as_ref() };
    if let Some(peer) = known.and_then(|peers| last_peer::<S::F>(peers, &address, port)) {
        return rewrite::<S>(ctx, &peer, Counter::SocketSend);
    }
    choose::<S>(ctx, Counter::SocketSend)
}

/// Decides, remembers and rewrites.
#[inline(always)]
fn choose<S: SocketFamily>(ctx: &SockAddrContext, done: Counter) -> i32 {
    match decide::<S>(ctx) {
        Decision::Pass => ALLOW,
        Decision::Refuse => refuse(),
        Decision::Translate(peer) => {
            if let Some(peers) = storage::<S::F>(ctx) {
                remember(peers, &peer);
            }
            rewrite::<S>(ctx, &peer, done)
        }
    }
}

/// recvmsg() and getpeername(): the application sees the address that it named.
#[inline(always)]
pub fn restore<S: SocketFamily>(ctx: &SockAddrContext) -> i32 {
    // SAFETY: as in `send`.
    let Some(peers) = (unsafe { S::F::sockets().get_ptr_mut(ctx).as_ref() }) else { return ALLOW };
    let (address, port) = (S::read(ctx), read_port(ctx));
    for peer in &peers.peers {
        if peer.backend_port == port && peer.backend == address && port != Be16(0) {
            S::write(ctx, &peer.frontend);
            write_port(ctx, peer.frontend_port);
            break;
        }
    }
    ALLOW
}

#[inline(always)]
fn decide<S: SocketFamily>(ctx: &SockAddrContext) -> Decision<<S::F as Family>::A> {
    let (address, port) = (S::read(ctx), read_port(ctx));
    // SAFETY: field access through the kernel's context.
    let protocol = unsafe { addr_of!((*ctx.sock_addr).protocol).read_volatile() } as u8;
    let mut found = Found::default();
    if !service::find::<S::F>(&address, port, protocol, &mut found) {
        return Decision::Pass;
    }
    // Node and pod differ only in masquerading, which a socket does not need: its source is chosen after this.
    let rule = found.frontend.rule(Origin::Node);
    match rule.action() {
        RuleBits::FORWARD => {}
        RuleBits::REJECT => return Decision::Refuse,
        // The packet itself is dropped at the interface, so that the caller sees the silence that kube-proxy gives.
        _ => return Decision::Pass,
    }
    // SAFETY: the context is the kernel's.
    let client = SocketClient(unsafe { bpf_get_netns_cookie(ctx.as_ptr().cast()) });
    let mut chosen = Chosen::default();
    if !service::select::<S::F>(&mut found, rule, &client, &mut chosen) {
        return Decision::Pass;
    }
    count_connection(found.frontend.service_id);
    Decision::Translate(peer(address, port, &chosen))
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

/// The peer that the socket last used for a destination, while its backend lives.
#[inline(always)]
fn last_peer<F: Family>(peers: &SocketPeers<F::A>, address: &F::A, port: Be16) -> Option<SocketPeer<F::A>> {
    for peer in &peers.peers {
        if peer.backend_port != Be16(0) && peer.frontend_port == port && peer.frontend == *address {
            return service::live::<F>(peer.backend_id, peer.backend_generation).map(|_| *peer);
        }
    }
    None
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
fn refuse() -> i32 {
    count(Counter::SocketReject);
    // SAFETY: no pointers are passed.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}
