//! The entry points of trama-proxy's programs, one per hook; the work is in the library.
#![no_std]
#![no_main]

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_UNSPEC};
use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp};
use aya_ebpf::programs::{SockAddrContext, SockContext, TcContext, XdpContext};

use proxy_common::{SocketPeers, V4, V6};
use proxy_ebpf::connected;
use proxy_ebpf::edit;
use proxy_ebpf::expire;
use proxy_ebpf::iterator::StorageContext;
use proxy_ebpf::maps::{Ipv4, Ipv6};
use proxy_ebpf::peers;
use proxy_ebpf::{sock, tc};

/// A packet that goes on is for the programs behind ours too, with TCX and with clsact: "OK" would end the hook there.
#[inline(always)]
const fn on_to_others(verdict: i32) -> i32 {
    if verdict == TC_ACT_OK { TC_ACT_UNSPEC } else { verdict }
}

/// Packets that enter the node at an interface: from a pod or from outside.
#[classifier]
#[inline(always)]
fn tc_ingress(ctx: TcContext) -> i32 {
    on_to_others(tc::run(&ctx, tc::Direction::Ingress))
}

/// Frames that enter the node at an interface to other machines, before the tc hook.
#[xdp]
#[inline(always)]
fn xdp_ingress(ctx: XdpContext) -> u32 {
    proxy_ebpf::xdp::run(&ctx)
}

/// Packets that leave the node at an interface: answers of local sockets, and local sockets outside the cgroup.
#[classifier]
#[inline(always)]
fn tc_egress(ctx: TcContext) -> i32 {
    on_to_others(tc::run(&ctx, tc::Direction::Egress))
}

/// Changes to the IPv4 flows that user space asks for; hangs nowhere.
#[classifier]
#[inline(always)]
fn edit_flows_v4(ctx: TcContext) -> i32 {
    edit::run::<Ipv4>(&ctx)
}

/// Changes to the IPv6 flows that user space asks for; hangs nowhere.
#[classifier]
#[inline(always)]
fn edit_flows_v6(ctx: TcContext) -> i32 {
    edit::run::<Ipv6>(&ctx)
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

/// Ends IPv4 flows; hangs nowhere.
#[classifier]
#[inline(always)]
fn expire_v4(_: TcContext) -> i32 {
    expire::bucket::<Ipv4>()
}

/// Ends IPv6 flows; hangs nowhere.
#[classifier]
#[inline(always)]
fn expire_v6(_: TcContext) -> i32 {
    expire::bucket::<Ipv6>()
}

/// Makes the count of the open flows of each IPv4 backend the one that was just taken; hangs nowhere.
#[classifier]
#[inline(always)]
fn recount_v4(_: TcContext) -> i32 {
    expire::recount::<Ipv4>()
}

/// The same of IPv6; hangs nowhere.
#[classifier]
#[inline(always)]
fn recount_v6(_: TcContext) -> i32 {
    expire::recount::<Ipv6>()
}

/// connect() on an IPv4 socket.
#[cgroup_sock_addr(connect4)]
#[inline(always)]
fn connect4(ctx: SockAddrContext) -> i32 {
    sock::connect::<Ipv4>(&ctx)
}

/// connect() on an IPv6 socket, IPv4-mapped destinations included.
#[cgroup_sock_addr(connect6)]
#[inline(always)]
fn connect6(ctx: SockAddrContext) -> i32 {
    match sock::mapped_address(&ctx) {
        true => sock::connect::<sock::MappedV4>(&ctx),
        false => sock::connect::<Ipv6>(&ctx),
    }
}

/// sendto() and sendmsg() with a destination on an IPv4 datagram socket.
#[cgroup_sock_addr(sendmsg4)]
#[inline(always)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    sock::send::<Ipv4>(&ctx)
}

/// sendto() and sendmsg() with a destination on an IPv6 datagram socket.
#[cgroup_sock_addr(sendmsg6)]
#[inline(always)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    match sock::mapped_address(&ctx) {
        true => sock::send::<sock::MappedV4>(&ctx),
        false => sock::send::<Ipv6>(&ctx),
    }
}

/// recvfrom() and recvmsg() that ask for the sender on an IPv4 datagram socket.
#[cgroup_sock_addr(recvmsg4)]
#[inline(always)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    sock::restore::<Ipv4>(&ctx)
}

/// recvfrom() and recvmsg() that ask for the sender on an IPv6 datagram socket.
#[cgroup_sock_addr(recvmsg6)]
#[inline(always)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    match sock::mapped_address(&ctx) {
        true => sock::restore::<sock::MappedV4>(&ctx),
        false => sock::restore::<Ipv6>(&ctx),
    }
}

/// close() of the last descriptor of a socket of IPv4 or IPv6.
#[cgroup_sock(sock_release)]
#[inline(always)]
fn sock_release(ctx: SockContext) -> i32 {
    connected::closed(&ctx);
    1
}

/// getpeername() on an IPv4 socket.
#[cgroup_sock_addr(getpeername4)]
#[inline(always)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    sock::restore::<Ipv4>(&ctx)
}

/// getpeername() on an IPv6 socket.
#[cgroup_sock_addr(getpeername6)]
#[inline(always)]
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
