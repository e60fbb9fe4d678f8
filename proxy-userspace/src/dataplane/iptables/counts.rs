//! Packets that kube-proxy counts in iptables mode and shows as metrics, counted by the kernel in counters with names.

use std::io;

use node_sys::nfacct;
use tracing::warn;

use crate::dataplane::Counters;

/// Forwarded packets that conntrack calls INVALID, which are dropped.
pub(super) const INVALID: &str = "trama_ct_invalid";
/// New connections to NodePorts on a loopback address.
pub(super) const LOOPBACK: &str = "trama_lo_node_ports";

/// Counter and metric (kube-proxy 1.36 `pkg/proxy/metrics/metrics.go`).
const METRICS: [(&str, &str); 2] = [
    (INVALID, "kubeproxy_iptables_ct_state_invalid_dropped_packets_total"),
    (LOOPBACK, "kubeproxy_iptables_localhost_nodeports_accepted_packets_total"),
];

/// Whether the kernel can count so; told once where it can't.
pub(super) fn available() -> bool {
    match nfacct::packets(INVALID) {
        Ok(_) => true,
        Err(error) => {
            warn!(%error, "this kernel has no named packet counters (nfnetlink_acct): two metrics are missing");
            false
        }
    }
}

/// Makes the counters that rules are going to name.
///
/// # Errors
/// The kernel's.
pub(super) fn ensure() -> io::Result<()> {
    METRICS.iter().try_for_each(|(counter, _)| nfacct::ensure(counter))
}

/// Removes the counters; those that a rule still names stay.
pub(super) fn remove() {
    for (counter, _) in METRICS {
        // Nobody misses a counter that is left, and the kernel may have none at all.
        let _ = nfacct::remove(counter);
    }
}

/// The metrics, as far as the kernel answers.
pub(super) fn read() -> Counters {
    let read = |(counter, metric): &(&str, &str)| {
        let packets = nfacct::packets(counter).ok().flatten()?;
        Some(((*metric).to_owned(), Vec::new(), packets))
    };
    METRICS.iter().filter_map(read).collect()
}
