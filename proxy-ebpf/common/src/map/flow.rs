//! Flows as the table keeps them: the tuple of a packet, and what becomes of those that have it.

use crate::address::{Be16, V4, V6};
use crate::pod::impl_pod;

/// A packet's five-tuple as it is on the wire at our hook.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct FlowKey<A> {
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
    /// Source port.
    pub source_port: Be16,
    /// Destination port.
    pub destination_port: Be16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub padding: [u8; 3],
}

impl<A> FlowKey<A> {
    /// Writes the ports, both as one word that has them in the order of the fields, and the protocol. In two words: who reads more than was
    /// written at once waits until all of it is in the cache, and the hash of a tuple reads both ports.
    #[inline(always)]
    pub fn set_transport(&mut self, ports: u32, protocol: u8) {
        let words = [ports, u32::from_ne_bytes([protocol, 0, 0, 0])];
        let tail = core::ptr::from_mut(self).cast::<u8>().wrapping_add(core::mem::offset_of!(Self, source_port));
        // SAFETY: the fields behind the addresses are eight bytes of this value without a gap (the tests hold their places), at a multiple of
        // four, as both addresses are whole words.
        unsafe { tail.cast::<[u32; 2]>().write(words) };
    }
}

/// [`Flow::flags`]: this entry translates the backend's answers.
pub const FLOW_REPLY: u8 = 1;
/// [`Flow::flags`]: this side has sent a FIN, or one of them an RST; a SYN may take the tuple over.
pub const FLOW_CLOSING: u8 = 2;
/// [`Flow::flags`]: conntrack translates this tuple, as the proxy before us told it: the packet is left to it, and no flow of ours
/// takes the tuple. The rest of the value is zero.
pub const FLOW_FOREIGN: u8 = 4;
/// [`Flow::flags`]: in an answer's entry of no ServicePort's flow: the kernel has more to do with the translated packet than to route it,
/// conntrack translated the flow too. See [`Flow::is_stacks`].
pub const FLOW_STACK: u8 = 8;
/// [`Flow::flags`]: the same bit in other entries, which have nothing to do with conntrack: the client's packets go or came through a tunnel,
/// see [`Flow::is_direct`] and [`Flow::came_by_tunnel`]. All eight bits are in use.
pub const FLOW_TUNNEL: u8 = FLOW_STACK;
/// [`Flow::flags`]: the endpoint has answered, and of TCP the client has gone on after the answer, which who forges its address never
/// does; in both entries.
pub const FLOW_CONFIRMED: u8 = 128;
/// [`Flow::flags`]: the endpoint has answered; in both entries.
pub const FLOW_ANSWERED: u8 = 16;
/// [`Flow::flags`]: both sides have sent a FIN, or one of them an RST; in both entries.
pub const FLOW_CLOSED: u8 = 32;
/// [`Flow::flags`]: the flow counts as one of its backend's open ones, see [`BackendLoad`](crate::BackendLoad); in the client's entry.
pub const FLOW_COUNTED: u8 = 64;

/// What a packet becomes. The tuple reversed is the key of the twin, so either direction can rebuild the other.
///
/// With its key it is one entry of the table of flows ([`FlowEntry`](crate::flow_table::FlowEntry)): 64 bytes for IPv4.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct Flow<A> {
    /// As below: another layout with the same fields.
    #[cfg(feature = "layout-test")]
    pub last_seen: u32,
    /// Source address after translation.
    pub source: A,
    /// Destination address after translation.
    pub destination: A,
    /// Source port after translation.
    pub source_port: Be16,
    /// Destination port after translation.
    pub destination_port: Be16,
    /// ServicePort that its packets are counted for; 0 for none.
    pub service_id: u32,
    /// Backend that the flow was given to.
    pub backend_id: u32,
    /// Its generation then; a different one now means that the endpoint is gone.
    pub backend_generation: u32,
    /// Tick of the kernel's clock (the low half of jiffies, never 0) at one of the last packets of this direction, at most
    /// [`SEEN_TICKS`](crate::SEEN_TICKS) older than the last; 0 where none was seen yet.
    #[cfg(not(feature = "layout-test"))]
    pub last_seen: u32,
    /// Interface that its packets leave the node by; 0 where the kernel was not asked for the route, or has more to say than this.
    pub interface: u32,
    /// Link-layer addresses of the next hop and of the interface, as a frame begins with them.
    pub link: [u32; 3],
    /// Longest packet that the route takes, network header included.
    pub mtu: u16,
    /// Low bits of the tick at which the kernel was asked for the route.
    pub route_tick: u8,
    /// `FLOW_*` bits.
    pub flags: u8,
}

impl<A: Copy> Flow<A> {
    /// Of direct server return at the node that the client comes to: packets go to the endpoint's node in a tunnel, as they are, and answers
    /// do not pass here. Source and destination are the tunnel's. Such a flow has this one entry.
    #[inline(always)]
    pub const fn is_direct(&self) -> bool {
        self.flags & (FLOW_REPLY | FLOW_TUNNEL) == FLOW_TUNNEL
    }

    /// Of direct server return at the endpoint's node: this is the entry of the answers to packets that came in a tunnel.
    #[inline(always)]
    pub const fn came_by_tunnel(&self) -> bool {
        self.flags & (FLOW_REPLY | FLOW_TUNNEL) == FLOW_REPLY | FLOW_TUNNEL && self.service_id != 0
    }

    /// Whether conntrack translated the flow too, and wants to see its answers once they are translated here.
    #[inline(always)]
    pub const fn is_stacks(&self) -> bool {
        self.flags & (FLOW_REPLY | FLOW_STACK) == FLOW_REPLY | FLOW_STACK && self.service_id == 0
    }

    /// Key under which the opposite direction is found.
    #[inline(always)]
    pub const fn twin_key(&self, protocol: u8) -> FlowKey<A> {
        FlowKey {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            protocol,
            padding: [0; 3],
        }
    }
}

impl_pod! {
    FlowKey<V4> = 4 + 4 + 2 + 2 + 1 + 3,
    FlowKey<V6> = 16 + 16 + 2 + 2 + 1 + 3,
    Flow<V4> = 4 + 4 + 2 + 2 + 4 + 4 + 4 + 4 + 4 + 12 + 2 + 1 + 1,
    Flow<V6> = 16 + 16 + 2 + 2 + 4 + 4 + 4 + 4 + 4 + 12 + 2 + 1 + 1,
}
