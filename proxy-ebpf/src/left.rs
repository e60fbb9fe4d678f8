//! What a socket has chosen and leaves to its packet: an endpoint that may be the socket's own pod, whose packets need another source.
//!
//! From the hook in connect() or sendmsg() the kernel goes on to the packet at once and on the same CPU, as a rule, so one place a CPU is enough.
//! Where it does not, or where another packet to the same frontend comes between, that one is chosen for by chance as ever.

use proxy_common::FrontendKey;
use proxy_common::decide::Chosen;

use crate::forward::ticks;
use crate::maps::Family;

/// Ticks of the kernel's clock for which it is believed: 16 to 160 ms, as the kernel is built. A packet may wait for its neighbour's address.
const LEFT_TICKS: u32 = 16;

/// One choice.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Left<A> {
    /// When it was made; 0 while there is none.
    tick: u32,
    backend_id: u32,
    backend_generation: u32,
    key: FrontendKey<A>,
}

/// Leaves a choice. A packet may interrupt this, and then finds none: volatile writes keep their order.
#[inline(always)]
pub fn put<F: Family>(key: &FrontendKey<F::A>, chosen: &Chosen<F::A>) {
    let Some(left) = F::left() else { return };
    // SAFETY: the value is this CPU's, and programs of sockets do not migrate.
    unsafe {
        (&raw mut (*left).tick).write_volatile(0);
        (&raw mut (*left).key).write_volatile(*key);
        (&raw mut (*left).backend_id).write_volatile(chosen.id);
        (&raw mut (*left).backend_generation).write_volatile(chosen.backend.generation);
        (&raw mut (*left).tick).write_volatile(ticks() | 1);
    }
}

/// Takes the choice that was left behind this frontend: id and generation of the backend.
#[inline(always)]
pub fn take<F: Family>(key: &FrontendKey<F::A>) -> Option<(u32, u32)> {
    let left = F::left()?;
    // SAFETY: as above, and packets come one at a time.
    let left = unsafe { &mut *left };
    // Odd, as `put` makes it.
    if left.tick == 0 || (ticks() | 1).wrapping_sub(left.tick) > LEFT_TICKS || left.key != *key {
        return None;
    }
    left.tick = 0;
    Some((left.backend_id, left.backend_generation))
}
