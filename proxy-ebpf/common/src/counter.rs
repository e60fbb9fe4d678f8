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
    /// A fragment without a transport header.
    Fragment = "fragment" Pass,
    /// TTL or hop limit 1: the kernel answers time exceeded.
    TimeToLive = "ttl" Pass,
    /// The translated packet is larger than the next hop takes: the kernel answers.
    TooBig = "too_big" Pass,
    /// The route lookup found no way to forward: the kernel delivers or refuses.
    NoRoute = "no_route" Pass,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_indices_dense() {
        for (index, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, index);
            assert!(Counter::ALL[..index].iter().all(|other| other.name() != counter.name()));
        }
    }
}
