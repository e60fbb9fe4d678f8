//! The entry points of trama-proxy's programs, one per hook; the work is in the library.
#![no_std]
#![no_main]

use aya_ebpf::macros::{cgroup_sock_addr, classifier};
use aya_ebpf::programs::{SockAddrContext, TcContext};

use proxy_common::{SocketPeers, V4, V6};
use proxy_ebpf::maps::{Ipv4, Ipv6};
use proxy_ebpf::peers::{self, StorageContext};
use proxy_ebpf::{sock, tc};

/// Packets that enter the node at an interface: from a pod or from outside.
#[classifier]
fn tc_ingress(ctx: TcContext) -> i32 {
    tc::run(&ctx, tc::Direction::Ingress)
}

/// Packets that leave the node at an interface: answers of local sockets, and local sockets outside the cgroup.
#[classifier]
fn tc_egress(ctx: TcContext) -> i32 {
    tc::run(&ctx, tc::Direction::Egress)
}

/// What IPv4 sockets remember.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
pub extern "C" fn peers_v4(ctx: &StorageContext) -> i32 {
    peers::write::<SocketPeers<V4>>(ctx)
}

/// What IPv6 sockets remember.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
pub extern "C" fn peers_v6(ctx: &StorageContext) -> i32 {
    peers::write::<SocketPeers<V6>>(ctx)
}

/// connect() on an IPv4 socket.
#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    sock::connect::<Ipv4>(&ctx)
}

/// connect() on an IPv6 socket, IPv4-mapped destinations included.
#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    match sock::mapped_address(&ctx) {
        true => sock::connect::<sock::MappedV4>(&ctx),
        false => sock::connect::<Ipv6>(&ctx),
    }
}

/// sendto() and sendmsg() with a destination on an IPv4 datagram socket.
#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    sock::send::<Ipv4>(&ctx)
}

/// sendto() and sendmsg() with a destination on an IPv6 datagram socket.
#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    match sock::mapped_address(&ctx) {
        true => sock::send::<sock::MappedV4>(&ctx),
        false => sock::send::<Ipv6>(&ctx),
    }
}

/// recvfrom() and recvmsg() that ask for the sender on an IPv4 datagram socket.
#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    sock::restore::<Ipv4>(&ctx)
}

/// recvfrom() and recvmsg() that ask for the sender on an IPv6 datagram socket.
#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    match sock::mapped_address(&ctx) {
        true => sock::restore::<sock::MappedV4>(&ctx),
        false => sock::restore::<Ipv6>(&ctx),
    }
}

/// getpeername() on an IPv4 socket.
#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    sock::restore::<Ipv4>(&ctx)
}

/// getpeername() on an IPv6 socket.
#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    match sock::mapped_address(&ctx) {
        true => sock::restore::<sock::MappedV4>(&ctx),
        false => sock::restore::<Ipv6>(&ctx),
    }
}

/// Tells the kernel that helpers reserved for GPL programs may be used.
// SAFETY: the kernel reads this section as a NUL-terminated string.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
