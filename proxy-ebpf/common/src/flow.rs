//! How far flows have got, when they end, and how many are open to a backend.

use crate::map::{FLOW_CLOSED, FLOW_CLOSING, FLOW_CONFIRMED, FLOW_FOREIGN};
use crate::pod::impl_pod;

/// For so many ticks a packet leaves [`Flow::last_seen`](crate::Flow::last_seen) as it is: 64 to 640 ms, as the kernel is built.
pub const SEEN_TICKS: u32 = 64;

/// How far a flow has got; each state has a timeout of its own (net/netfilter/nf_conntrack_proto_*.c have more of them, with
/// the same timeouts where they are the same).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum FlowState {
    /// TCP: not answered, or the client has not gone on after the answer.
    TcpOpening = 0,
    /// TCP: answered and heard, and nobody has closed it.
    TcpEstablished = 1,
    /// TCP: one side has closed it.
    TcpHalfClosed = 2,
    /// TCP: over.
    TcpClosed = 3,
    /// UDP: not answered.
    UdpUnanswered = 4,
    /// UDP: answered.
    UdpAnswered = 5,
    /// SCTP: not answered.
    SctpOpening = 6,
    /// SCTP: answered, and nobody has closed it.
    SctpEstablished = 7,
    /// SCTP: being closed or over.
    SctpClosed = 8,
}

impl FlowState {
    /// Number of states.
    pub const COUNT: usize = 9;

    /// The state of a flow of `protocol`, an IP protocol number: `flags` are both entries' together. A flow of conntrack's counts as established: conntrack knows better when it ends.
    #[inline(always)]
    pub const fn of(protocol: u8, flags: u8) -> Self {
        const TCP: u8 = 6;
        const UDP: u8 = 17;
        let answered = flags & (FLOW_CONFIRMED | FLOW_FOREIGN) != 0;
        let closing = flags & FLOW_CLOSING != 0;
        match protocol {
            TCP if flags & FLOW_CLOSED != 0 => Self::TcpClosed,
            TCP if closing => Self::TcpHalfClosed,
            TCP if answered => Self::TcpEstablished,
            TCP => Self::TcpOpening,
            UDP if answered => Self::UdpAnswered,
            UDP => Self::UdpUnanswered,
            _ if closing => Self::SctpClosed,
            _ if answered => Self::SctpEstablished,
            _ => Self::SctpOpening,
        }
    }
}

/// The only value of `flow_limits`: what ends flows.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct FlowLimits {
    /// Ticks for which a flow may be idle, by [`FlowState`].
    pub idle_ticks: [u32; FlowState::COUNT],
    /// Ticks for which a packet to an endpoint that is gone may remain unanswered before its TCP flow ends.
    pub unanswered_ticks: u32,
}

/// The only value of `flow_census`: what one look at all flows found so far, and where it is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct FlowCensus {
    /// Entries looked at.
    pub entries: u32,
    /// Entries deleted because they were idle for too long, or their twin was.
    pub expired: u32,
    /// Entries deleted because their endpoint is gone.
    pub orphaned: u32,
    /// Flows that were counted for their backends.
    pub counted: u32,
    /// Flows that hold one of the node's source ports.
    pub masqueraded: u32,
    /// Of those the most towards one backend; in the answer of the program that counts backends.
    pub masqueraded_max: u32,
    /// The bucket or backend that is looked at next.
    pub next: u32,
}

/// Open flows of one backend.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct BackendLoad {
    /// Flows opened and not closed, of a ServicePort that asks for least connections; the others' stay 0. What is lost on the way, by an
    /// entry that was evicted or two CPUs at once, is found again by the next count.
    pub open: u32,
    /// The count that is going on.
    pub counted: u32,
    /// The count of flows that hold one of the node's source ports, while it is going on; of every ServicePort.
    pub masqueraded: u32,
}

impl_pod! {
    FlowLimits = 4 * FlowState::COUNT + 4,
    FlowCensus = 7 * 4,
    BackendLoad = 3 * 4,
}
