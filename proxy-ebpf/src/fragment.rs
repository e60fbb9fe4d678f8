//! Fragments: later ones go where the first one went, in whatever order they come.
//!
//! Only the first fragment of a datagram has ports. What it says is remembered under the addresses and the identification, and the
//! later ones take the same flow. One that comes before its first is copied into a map and dropped; the first one to come puts all that
//! wait back on the wire's end, as if they had just arrived. The kernel could not do it for us: it puts datagrams together for
//! itself and for netfilter only, behind this hook.
//!
//! Everything is bounded: both maps forget what was not used for longest, a datagram has at most [`HELD_MAX`] fragments waiting, and
//! nothing is believed for longer than [`LIFETIME_TICKS`]. Fragments that overlap are translated like one another, and it is their
//! receiver who drops them (RFC 5722; Linux does for IPv4 too); one that would overlap the ports or the flags is dropped here.

use core::ptr::read_volatile;

use aya_ebpf::bindings::{BPF_ANY, BPF_F_INGRESS, BPF_NOEXIST, TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::{
    bpf_clone_redirect, bpf_csum_update, bpf_jiffies64, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use proxy_common::checksum::{address_difference, as_csum_diff};
use proxy_common::{Be16, Counter, FLOW_FOREIGN, MARK_DONE, MARK_SOURCE};

use crate::counters::count;
use crate::ctx::{ETHERNET_LENGTH, Hook, Packet};
use crate::maps::{FRAGMENT_BUFFER, Family, Scratch};
use crate::nat::Rewrite;
use crate::parse::{self, Network, ParseNetwork, TCP, Transport};

/// Fragments of one datagram that wait for the first one. A datagram of 8 KB has five later ones in Ethernet's usual size.
pub const HELD_MAX: u32 = 16;
/// Longest frame that waits: longer than Ethernet's usual one.
pub const HELD_BYTES: usize = 2048;
/// Ticks of the kernel's clock after which nothing is known of a datagram any more: one to ten seconds, as the kernel is built. A
/// sender may use the identification again after 65536 datagrams.
const LIFETIME_TICKS: u32 = 1024;
/// A UDP header, and what counts of TCP's.
const HEADER_UDP: u32 = 8;
const HEADER_TCP: u32 = 20;

/// What the fragments of one datagram have in common: of IPv6 not the protocol (RFC 8200, 4.5).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DatagramKey<A> {
    source: A,
    destination: A,
    identification: u32,
    protocol: u32,
}

/// Nothing but the later fragments is known.
const WAITING: u32 = 0;
/// The first fragment was seen.
const KNOWN: u32 = 1;
/// The datagram is translated but for its source, which it gets on its way out.
const SOURCE: u32 = 2;

/// What is known of a datagram.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Datagram<A> {
    /// Source that it is to get, of [`SOURCE`].
    source: A,
    source_port: Be16,
    destination_port: Be16,
    protocol: u32,
    state: u32,
    /// Tick until which this is believed.
    valid_until: u32,
    /// Fragments that wait.
    held: u32,
    /// Bytes that came in, and where the last fragment ends; 0 while that did not come.
    seen: u32,
    end: u32,
    /// Interface at which the first fragment came in. At others the same fragments are seen again: at a bridge behind its port.
    interface: u32,
}

impl<A> Datagram<A> {
    /// One of which no more is known.
    #[inline(always)]
    fn new(source: A, state: u32, valid_until: u32, interface: u32) -> Self {
        Self {
            source,
            source_port: Be16(0),
            destination_port: Be16(0),
            protocol: 0,
            state,
            valid_until,
            held: 0,
            seen: 0,
            end: 0,
            interface,
        }
    }
}

/// A fragment that waits.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HeldKey<A> {
    datagram: DatagramKey<A>,
    index: u32,
}

/// Its frame.
#[repr(C)]
pub struct Held {
    valid_until: u32,
    length: u32,
    bytes: [u8; HELD_BYTES],
}

impl<A> Datagram<A> {
    #[inline(always)]
    fn is_fresh(&self) -> bool {
        is_fresh(self.valid_until)
    }

    /// Whether the whole datagram went by, so that another may have its identification.
    #[inline(always)]
    fn is_complete(&self) -> bool {
        self.end != 0 && self.seen >= self.end
    }

    /// Whether a fragment that comes in at this interface has been looked at where it came from.
    #[inline(always)]
    fn was_seen(&self, interface: u32) -> bool {
        self.interface != interface
    }
}

/// What a fragment turned out to be.
pub enum Fragment {
    /// The first one, with its ports.
    First(Transport),
    /// A later one, whose first one is known: with its ports.
    Later(Transport),
    /// Nothing to translate: its verdict.
    Done(i32),
}

/// Gives a fragment its ports, or lets it wait for the one that has them. The tuple is left in `scratch.key`.
#[inline(always)]
pub fn tuple<F: ParseNetwork + Rewrite>(
    packet: &Packet<'_>,
    network: &Network,
    scratch: &mut Scratch<F::A>,
    is_ingress: bool,
) -> Fragment {
    scratch.datagram_key = DatagramKey {
        source: scratch.key.source,
        destination: scratch.key.destination,
        identification: network.identification,
        protocol: if F::IDENTIFICATION_BY_PROTOCOL { network.protocol.into() } else { 0 },
    };
    let transport = Transport { protocol: network.protocol, offset: network.l4_offset, tcp_flags: 0 };
    if !network.is_later() {
        return match parse::first_fragment(packet, network, &mut scratch.key) {
            Some(transport) => Fragment::First(transport),
            None => Fragment::Done(pass()),
        };
    }
    let Some(entry) = F::datagrams().get_ptr_mut(&scratch.datagram_key) else {
        return Fragment::Done(wait::<F>(packet, scratch, is_ingress));
    };
    // SAFETY: the pointer is valid until the map is changed; copied at once.
    scratch.datagram = unsafe { *entry };
    let known = &scratch.datagram;
    let counts = is_ingress && !known.was_seen(packet.interface());
    if known.state != KNOWN || !known.is_fresh() || counts && known.is_complete() {
        return Fragment::Done(wait::<F>(packet, scratch, is_ingress));
    }
    let (offset, length) = (network.offset(), F::transport_length(packet, &transport).unwrap_or(0));
    if offset < if known.protocol == u32::from(TCP) { HEADER_TCP } else { HEADER_UDP } {
        return Fragment::Done(overlap());
    }
    if counts {
        // SAFETY: as above. That two CPUs may lose a count makes a datagram look incomplete, no more.
        unsafe {
            (*entry).seen = known.seen.wrapping_add(length);
            if !network.more() {
                (*entry).end = offset + length;
            }
        }
    }
    (scratch.key.source_port, scratch.key.destination_port) = (known.source_port, known.destination_port);
    (scratch.key.protocol, scratch.key.padding) = (known.protocol as u8, [0; 3]);
    Fragment::Later(Transport { protocol: scratch.key.protocol, ..transport })
}

/// Whether the flow of a later fragment, which is left in `scratch.flow`, is ours.
#[inline(always)]
pub fn find<F: Family>(scratch: &mut Scratch<F::A>) -> bool {
    let Some(place) = F::flows().read(&scratch.key, &mut scratch.flow) else { return false };
    scratch.place = place;
    scratch.flow.flags & FLOW_FOREIGN == 0
}

/// Remembers what the first fragment in `scratch.key` says, once its flow is known. `Some` is the verdict of a packet that is not to
/// go on: it overlaps another first one, or it was put back together with those that had waited for it.
#[inline(always)]
pub fn remember<F: Rewrite>(
    packet: &Packet<'_>,
    transport: &Transport,
    scratch: &mut Scratch<F::A>,
    is_ingress: bool,
) -> Option<i32> {
    let (source_port, destination_port) = (scratch.key.source_port, scratch.key.destination_port);
    if let Some(entry) = F::datagrams().get_ptr(&scratch.datagram_key) {
        // SAFETY: the pointer is valid until the map is changed; copied at once.
        scratch.datagram = unsafe { *entry };
        let other = &scratch.datagram;
        let same = other.source_port == source_port && other.destination_port == destination_port;
        let fresh = other.state == KNOWN && other.is_fresh();
        let holds = fresh && !other.is_complete();
        match is_ingress {
            true if fresh && same && other.was_seen(packet.interface()) => return None,
            true if holds && !same => return Some(overlap()),
            // It was looked at on its way in.
            false if holds && same => return None,
            // What the node itself cuts, it cuts in order and without overlaps.
            _ => {}
        }
    }
    let valid_until = ticks().wrapping_add(LIFETIME_TICKS);
    scratch.datagram = Datagram {
        source_port,
        destination_port,
        protocol: transport.protocol.into(),
        seen: F::transport_length(packet, transport).unwrap_or(0),
        ..Datagram::new(scratch.key.source, KNOWN, valid_until, packet.interface())
    };
    // A full table forgets another datagram; a failure costs this one, as any loss on the way would.
    let _lost = F::datagrams().insert(&scratch.datagram_key, &scratch.datagram, BPF_ANY.into());
    if is_ingress && release::<F>(packet, scratch) { Some(TC_ACT_SHOT) } else { None }
}

/// Puts back those that wait for the first fragment, behind a copy of it. `false` when there are none; else the packet is used up.
#[inline(always)]
fn release<F: Family>(packet: &Packet<'_>, scratch: &mut Scratch<F::A>) -> bool {
    scratch.held_key = HeldKey { datagram: scratch.datagram_key, index: 0 };
    let mut released = false;
    for index in 0..HELD_MAX {
        scratch.held_key.index = index;
        // SAFETY: the element stays as it is until it is removed below and used again, which takes longer.
        let Some(held) = (unsafe { F::held().get(&scratch.held_key) }) else { break };
        let fresh = is_fresh(held.valid_until);
        if fresh && !released {
            released = true;
            put_back(packet);
        }
        if fresh && become_held(packet, held) {
            put_back(packet);
        }
        // That it is gone already is as good.
        let _gone = F::held().remove(&scratch.held_key);
    }
    released
}

/// A copy of the packet arrives at this interface.
#[inline(always)]
fn put_back(packet: &Packet<'_>) {
    // SAFETY: the context is the kernel's. A copy that cannot be made is a packet lost.
    unsafe { bpf_clone_redirect(packet.raw(), packet.interface(), BPF_F_INGRESS.into()) };
}

/// Replaces the whole packet by one that waited.
#[inline(always)]
fn become_held(packet: &Packet<'_>, held: &Held) -> bool {
    // SAFETY: a reference is valid and aligned. Read once: the verifier wants to see that what is bounded is what is used.
    let length = bounded(unsafe { read_volatile(&held.length) });
    // SAFETY: the context is the kernel's.
    if unsafe { bpf_skb_change_tail(packet.raw(), length, 0) } != 0 {
        return false;
    }
    // SAFETY: as above; `length` bytes of the frame are there.
    unsafe { bpf_skb_store_bytes(packet.raw(), 0, held.bytes.as_ptr().cast(), length, 0) == 0 }
}

/// A length that the verifier of every kernel sees the bounds of. It lies within them already. Compared and refused, as one range, it would
/// be compared after a subtraction, of which verifiers before Linux 6.10 learn nothing about the length itself.
#[inline(always)]
fn bounded(length: u32) -> u32 {
    length.clamp(ETHERNET_LENGTH as u32, HELD_BYTES as u32)
}

/// Keeps a copy of a later fragment until its first one comes. On the way out fragments come in order: the node has just cut them, or
/// they were looked at on their way in. What cannot be kept is left to the kernel.
#[inline(always)]
fn wait<F: Family>(packet: &Packet<'_>, scratch: &mut Scratch<F::A>, is_ingress: bool) -> i32 {
    if !is_ingress || packet.length() > HELD_BYTES as u32 {
        return pass();
    }
    let Some(buffer) = FRAGMENT_BUFFER.get_ptr_mut(0) else { return pass() };
    let valid_until = ticks().wrapping_add(LIFETIME_TICKS);
    // SAFETY: the buffer is this CPU's, and programs of one CPU do not interleave. The length is read back, so that what is checked is
    // what is used. The helper checks the packet's end.
    unsafe {
        (*buffer).valid_until = valid_until;
        (*buffer).length = packet.length();
        let length = bounded(read_volatile(&raw const (*buffer).length));
        if bpf_skb_load_bytes(packet.raw().cast(), 0, (*buffer).bytes.as_mut_ptr().cast(), length) != 0 {
            return pass();
        }
    }
    let entry = F::datagrams().get_ptr_mut(&scratch.datagram_key);
    // SAFETY: the pointer is valid until the map is changed, which `hold` does not do with this one.
    let waiting = entry.filter(|entry| unsafe { (**entry).state == WAITING && (**entry).is_fresh() });
    // SAFETY: as above.
    let index = waiting.map_or(0, |entry| unsafe { (*entry).held });
    if index >= HELD_MAX {
        return pass();
    }
    scratch.held_key = HeldKey { datagram: scratch.datagram_key, index };
    // SAFETY: as above.
    if F::held().insert(&scratch.held_key, unsafe { &*buffer }, BPF_ANY.into()).is_err() {
        return pass();
    }
    match waiting {
        // SAFETY: as above. All later fragments of a datagram arrive at one queue, and so at one CPU.
        Some(entry) => unsafe { (*entry).held = index + 1 },
        None => begin::<F>(scratch, valid_until, packet.interface(), entry.is_some()),
    }
    came_too_late::<F>(packet, scratch)
}

/// Remembers that fragments wait.
#[inline(always)]
fn begin<F: Family>(scratch: &mut Scratch<F::A>, valid_until: u32, interface: u32, is_old: bool) {
    scratch.datagram = Datagram { held: 1, ..Datagram::new(scratch.key.source, WAITING, valid_until, interface) };
    let flags = if is_old { BPF_ANY } else { BPF_NOEXIST };
    // It is there already when the first fragment came meanwhile.
    let _known = F::datagrams().insert(&scratch.datagram_key, &scratch.datagram, flags.into());
}

/// The first fragment may have come on another CPU while this one was kept: then it is looked at again at once.
#[inline(always)]
fn came_too_late<F: Family>(packet: &Packet<'_>, scratch: &Scratch<F::A>) -> i32 {
    count(Counter::FragmentHeld);
    // SAFETY: read at once.
    let known = unsafe { F::datagrams().get(&scratch.datagram_key) }.is_some_and(|entry| entry.state == KNOWN);
    if !known {
        return TC_ACT_SHOT;
    }
    let _gone = F::held().remove(&scratch.held_key);
    packet.redirect(packet.interface(), BPF_F_INGRESS.into())
}

/// Translates a fragment without a transport header: addresses only. What the first fragment's checksum says covers them.
#[inline(always)]
pub fn translate<F: Rewrite>(packet: &Packet<'_>, scratch: &Scratch<F::A>, forwarded: bool) -> Option<()> {
    if !F::IDENTIFICATION_BY_PROTOCOL {
        // No header checksum makes up for it in a sum that a device computed over all of the packet; without one this is refused.
        let mut difference = address_difference(&scratch.key.source, &scratch.flow.source);
        difference += address_difference(&scratch.key.destination, &scratch.flow.destination);
        // SAFETY: the context is the kernel's.
        let _not_summed = unsafe { bpf_csum_update(packet.raw(), as_csum_diff(difference) as u32) };
    }
    F::network(packet, &scratch.flow, forwarded)
}

/// Leaves a translated packet to the kernel, which cuts it, with the source that it came with: the kernel forwards nothing that has its
/// own source, and checks whether the interface fits the source. [`give_source`] does the rest when the fragments leave.
#[inline(always)]
pub fn leave<F: Rewrite>(packet: &Packet<'_>, scratch: &mut Scratch<F::A>) -> Option<i32> {
    let identification = F::identification(packet)?;
    scratch.datagram_key = DatagramKey {
        source: scratch.key.source,
        destination: scratch.flow.destination,
        identification,
        protocol: scratch.key.protocol.into(),
    };
    let valid_until = ticks().wrapping_add(LIFETIME_TICKS);
    scratch.datagram = Datagram::new(scratch.flow.source, SOURCE, valid_until, packet.interface());
    F::datagrams().insert(&scratch.datagram_key, &scratch.datagram, BPF_ANY.into()).ok()?;
    F::set_source(packet, &scratch.key.source)?;
    packet.tc.set_mark(packet.mark() | MARK_DONE | MARK_SOURCE);
    Some(TC_ACT_OK)
}

/// A fragment of what [`leave`] left, on its way out.
#[inline(always)]
pub fn give_source<F: Rewrite + ParseNetwork>(packet: &Packet<'_>, scratch: &mut Scratch<F::A>) -> i32 {
    if give::<F>(packet, scratch).is_none() {
        count(Counter::RewriteFailed);
        return TC_ACT_SHOT;
    }
    packet.tc.set_mark(packet.mark() & !MARK_SOURCE);
    TC_ACT_OK
}

#[inline(always)]
fn give<F: Rewrite + ParseNetwork>(packet: &Packet<'_>, scratch: &mut Scratch<F::A>) -> Option<()> {
    let network = <F as ParseNetwork>::network(packet, &mut scratch.key)?;
    scratch.datagram_key = DatagramKey {
        source: scratch.key.source,
        destination: scratch.key.destination,
        identification: network.identification,
        protocol: network.protocol.into(),
    };
    let entry = F::datagrams().get_ptr(&scratch.datagram_key)?;
    // SAFETY: the pointer is valid until the map is changed; copied at once.
    scratch.datagram = unsafe { *entry };
    if scratch.datagram.state != SOURCE {
        return None;
    }
    F::set_source(packet, &scratch.datagram.source)
}

#[inline(always)]
fn is_fresh(valid_until: u32) -> bool {
    valid_until.wrapping_sub(ticks()) <= LIFETIME_TICKS
}

#[inline(always)]
fn ticks() -> u32 {
    // SAFETY: no arguments.
    unsafe { bpf_jiffies64() as u32 }
}

#[inline(always)]
fn pass() -> i32 {
    count(Counter::Fragment);
    TC_ACT_OK
}

#[inline(always)]
fn overlap() -> i32 {
    count(Counter::FragmentOverlap);
    TC_ACT_SHOT
}
