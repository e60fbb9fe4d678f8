//! What connected sockets have to turn back, without socket storage: that the kernel allocates it costs more than all else in connect().
//!
//! A socket has one place in an array, by its cookie. It takes the place with connect() and gives it back when it is closed, which a hook
//! of its own tells (`BPF_CGROUP_INET_SOCK_RELEASE`, Linux 5.9). Whose place is another's uses storage, and so do sockets that are not
//! connected. Nobody tells when a socket of the kernel's own is closed (NFS, MPTCP's subflows): its place stays taken.

use core::ffi::c_void;
use core::intrinsics::{AtomicOrdering, atomic_cxchg};
use core::ptr::{addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::bpf_get_socket_cookie;
use aya_ebpf::programs::SockContext;
use proxy_common::{ConnectedPeer, SocketPeer, connected_place};

use crate::maps::{Family, Ipv4, Ipv6};

/// `AF_INET6` of Linux.
const AF_INET6: u32 = 10;
/// No socket has this cookie.
const FREE: u64 = 0;

/// Number of the socket that the hook is about.
///
/// # Safety
/// `ctx` is the kernel's, of a hook of sockets.
#[inline(always)]
pub unsafe fn cookie(ctx: *mut c_void) -> u64 {
    // SAFETY: the caller's.
    unsafe { bpf_get_socket_cookie(ctx) }
}

/// Remembers that the socket is connected to `peer`. Returns what is for the storage: `peer` where the place is another socket's, or what
/// the socket was connected to before by another frontend.
#[inline(always)]
pub fn put<F: Family>(cookie: u64, peer: &SocketPeer<F::A>) -> Option<SocketPeer<F::A>> {
    let Some(place) = F::connected().get_ptr_mut(connected_place(cookie)) else { return Some(*peer) };
    if is_of(place, cookie) {
        // SAFETY: an element of the array, whose socket calls one hook at a time.
        let before = unsafe { core::ptr::replace(addr_of_mut!((*place).peer), *peer) };
        let other = before.frontend_port != peer.frontend_port || before.frontend != peer.frontend;
        return other.then_some(before);
    }
    if !take(place, cookie) {
        return Some(*peer);
    }
    // SAFETY: an element of the array, which nobody else writes from here on.
    unsafe { (*place).peer = *peer };
    None
}

/// What the socket is connected to, as far as its place says.
#[inline(always)]
pub fn get<F: Family>(cookie: u64) -> Option<&'static SocketPeer<F::A>> {
    let place = F::connected().get_ptr_mut(connected_place(cookie))?;
    // SAFETY: an element of the array, which only the socket itself writes.
    is_of(place, cookie).then(|| unsafe { &(*place).peer })
}

/// The socket is closed.
#[inline(always)]
pub fn closed(ctx: &SockContext) {
    // SAFETY: the context is the kernel's.
    let cookie = unsafe { cookie(ctx.as_ptr()) };
    // SAFETY: field access through the kernel's context.
    let family = unsafe { addr_of_mut!((*ctx.sock).family).read_volatile() };
    forget::<Ipv4>(cookie);
    // Sockets of IPv6 may be connected to IPv4 addresses.
    if family == AF_INET6 {
        forget::<Ipv6>(cookie);
    }
}

#[inline(always)]
fn forget<F: Family>(cookie: u64) {
    if let Some(place) = F::connected().get_ptr_mut(connected_place(cookie))
        && is_of(place, cookie)
    {
        // SAFETY: an element of the array.
        unsafe { write_volatile(addr_of_mut!((*place).cookie), FREE) };
    }
}

#[inline(always)]
fn is_of<A>(place: *mut ConnectedPeer<A>, cookie: u64) -> bool {
    // SAFETY: an element of the array; another CPU may take or free the place meanwhile, but not for this cookie.
    cookie != FREE && unsafe { read_volatile(addr_of_mut!((*place).cookie)) } == cookie
}

/// Whether the place was free and now is the socket's.
#[inline(always)]
fn take<A>(place: *mut ConnectedPeer<A>, cookie: u64) -> bool {
    // SAFETY: an aligned field of an element of the array.
    let (owner, _) = unsafe {
        let owner = addr_of_mut!((*place).cookie);
        atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(owner, FREE, cookie)
    };
    owner == FREE
}
