//! What the programs count: one per-CPU slot for each reason.

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $name:literal $kind:ident),+ $(,)?) => {
        /// Index into the `counters` map. Nothing is dropped or handed back to the kernel for a reason that is not here.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u32)]
        pub enum Counter { $($(#[$doc])* $variant),+ }

        impl Counter {
            /// Every counter, in index order.
            pub const ALL: &'static [Counter] = &[$(Counter::$variant),+];

            /// Value of the metric's label.
            pub const fn name(self) -> &'static str {
                match self { $(Counter::$variant => $name),+ }
            }

            /// The counter of this index.
            pub fn from_index(index: u32) -> Option<Self> {
                Self::ALL.get(index as usize).copied()
            }

            /// Which metric it belongs to.
            pub const fn kind(self) -> CounterKind {
                match self { $(Counter::$variant => CounterKind::$kind),+ }
            }
        }
    };
}

/// The metric that a [`Counter`] is a label of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CounterKind {
    /// `trama_dataplane_path_total`: work done.
    Path,
    /// `trama_dataplane_drop_total`: packets that were dropped or refused.
    Drop,
    /// `trama_dataplane_pass_total`: packets of ours that the kernel got back unchanged.
    Pass,
    /// `trama_monitor_events_total`: what somebody who watches was not told.
    Monitor,
}

counters! {
    /// A socket's connect() was translated.
    SocketConnect = "socket_connect" Path,
    /// An unconnected datagram was translated.
    SocketSend = "socket_sendmsg" Path,
    /// A packet opened a new flow.
    PacketNew = "packet_new" Path,
    /// A packet of a known flow was translated.
    PacketEstablished = "packet_established" Path,
    /// An ICMP error about a packet of a known flow was translated.
    PacketError = "packet_icmp_error" Path,
    /// A fragment without a transport header was translated like its first one.
    PacketFragment = "packet_fragment" Path,
    /// A fragment waits for the first one of its datagram.
    FragmentHeld = "fragment_held" Path,
    /// A frame opened a new flow at the XDP hook.
    FrameNew = "frame_new" Path,
    /// A frame of a known flow was translated at the XDP hook.
    FrameEstablished = "frame_established" Path,
    /// A packet went to its endpoint's node in a tunnel; it is counted as new or established too.
    PacketTunnelled = "packet_tunnelled" Path,
    /// A frame of a known flow went to its endpoint's node in a tunnel at the XDP hook.
    FrameTunnelled = "frame_tunnelled" Path,
    /// A packet was taken out of another node's tunnel.
    Untunnelled = "untunnelled" Path,
    /// A flow was not remembered, as too many opened at once: the Maglev table finds the endpoint of its next packet.
    FlowNotRemembered = "flow_not_remembered" Path,
    /// A socket was refused: the service has no endpoints.
    SocketReject = "socket_no_endpoints" Drop,
    /// A packet was refused with ICMP: the service has no endpoints.
    PacketReject = "packet_no_endpoints" Drop,
    /// A packet was dropped: Local policy and no local endpoint.
    PolicyDrop = "no_local_endpoints" Drop,
    /// A packet was refused with ICMP: no Service has this port of the ClusterIP.
    PacketUnserved = "packet_unserved_port" Drop,
    /// A socket was refused: no Service has this port of the ClusterIP.
    SocketUnserved = "socket_unserved_port" Drop,
    /// A packet was dropped: an address of the service network that is no Service's.
    Unallocated = "unallocated_cluster_ip" Drop,
    /// A packet was dropped: its source is in none of the Service's loadBalancerSourceRanges.
    SourceRange = "source_range" Drop,
    /// No free source port towards the endpoint.
    SnatExhausted = "snat_ports_exhausted" Drop,
    /// The node has no address of the family to masquerade with.
    NoMasqueradeAddress = "no_masquerade_address" Drop,
    /// The flow table refused an insert.
    FlowInsertFailed = "flow_insert_failed" Drop,
    /// The chosen slot changed under the reader twice in a row.
    StaleBackend = "stale_backend" Drop,
    /// A header could not be rewritten.
    RewriteFailed = "rewrite_failed" Drop,
    /// The ICMP answer could not be built.
    RejectFailed = "reject_failed" Drop,
    /// An ICMP redirect about a packet of a translated flow.
    IcmpRedirect = "icmp_redirect" Drop,
    /// A packet whose headers contradict each other or its length.
    Malformed = "malformed" Drop,
    /// A packet that opens something, from where nobody can be: loopback, multicast and unspecified addresses, ClusterIPs.
    ImpossibleSource = "impossible_source" Drop,
    /// A packet to a Service that came in with an address of this node as its source.
    NodeSource = "node_source" Drop,
    /// A packet in a tunnel to an endpoint came from where no node can be: a pod's interface, or an address of a pod or of this node.
    TunnelSource = "tunnel_source" Drop,
    /// A packet that came in a tunnel and would go on in one: two nodes each take the other one for the endpoint's.
    TunnelLoop = "tunnel_loop" Drop,
    /// A fragment that overlaps the transport header or another first fragment of its datagram.
    FragmentOverlap = "fragment_overlap" Drop,
    /// TTL or hop limit 1: answered with time exceeded.
    TimeToLive = "ttl" Drop,
    /// The translated packet is larger than the next hop takes, and may not be fragmented: answered with packet too big.
    TooBig = "too_big" Drop,
    /// More extension headers than are looked through.
    ExtensionHeaders = "extension_headers" Pass,
    /// A fragment of nothing that is known.
    Fragment = "fragment" Pass,
    /// The translated packet is larger than the next hop takes: the kernel fragments it.
    Fragmented = "fragmented" Pass,
    /// The route lookup found no way to forward: the kernel delivers or refuses.
    NoRoute = "no_route" Pass,
    /// Somebody watches, and the ring of events was full.
    EventLost = "lost" Monitor,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_indices_dense() {
        for (index, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, index);
            assert_eq!(Counter::from_index(index as u32), Some(*counter));
            assert!(index < 64, "a monitor names reasons by the bits of 64");
            assert!(Counter::ALL[..index].iter().all(|other| other.name() != counter.name()));
        }
    }
}
