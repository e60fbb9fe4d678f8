//! Which path traffic took, by what the proxies count: never by where the client stood.

use std::collections::BTreeMap;

use anyhow::Result;

use crate::Cluster;

/// Decisions about new flows by path (`socket` or `packet`), summed over all nodes: translations and refusals.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PathCounts(BTreeMap<&'static str, u64>);

impl PathCounts {
    /// What the proxies have counted until now.
    ///
    /// # Errors
    /// When a proxy does not answer.
    pub fn of(cluster: &Cluster) -> Result<Self> {
        let mut counts = Self::default();
        for number in 1..=cluster.topology().nodes().len() {
            for (name, value) in cluster.metrics(number)? {
                if let Some(path) = path_of(&name) {
                    *counts.0.entry(path).or_default() += value as u64;
                }
            }
        }
        Ok(counts)
    }

    /// The paths that were taken since `before`, joined with `+`; `-` when none was.
    pub fn since(&self, before: &Self) -> String {
        let taken = self.0.iter().filter(|(path, count)| **count > before.0.get(*path).copied().unwrap_or_default());
        let taken: Vec<&str> = taken.map(|(path, _)| *path).collect();
        if taken.is_empty() { "-".to_owned() } else { taken.join("+") }
    }
}

/// The path that a counter of the data plane speaks of, by where its decision was made. Packets of flows that exist are left out:
/// the last ones of a connection come after its answer.
fn path_of(sample: &str) -> Option<&'static str> {
    match sample {
        "trama_dataplane_path_total{path=\"socket_connect\"}"
        | "trama_dataplane_path_total{path=\"socket_sendmsg\"}"
        | "trama_dataplane_drop_total{reason=\"socket_no_endpoints\"}"
        | "trama_dataplane_drop_total{reason=\"socket_unserved_port\"}" => Some("socket"),
        "trama_dataplane_path_total{path=\"packet_new\"}"
        | "trama_dataplane_drop_total{reason=\"packet_no_endpoints\"}"
        | "trama_dataplane_drop_total{reason=\"packet_unserved_port\"}"
        | "trama_dataplane_drop_total{reason=\"unallocated_cluster_ip\"}"
        | "trama_dataplane_drop_total{reason=\"source_range\"}"
        | "trama_dataplane_drop_total{reason=\"no_local_endpoints\"}" => Some("packet"),
        "trama_dataplane_path_total{path=\"frame_new\"}" => Some("xdp"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_and_compared() {
        assert_eq!(path_of("trama_dataplane_path_total{path=\"socket_connect\"}"), Some("socket"));
        assert_eq!(path_of("trama_dataplane_drop_total{reason=\"no_local_endpoints\"}"), Some("packet"));
        assert_eq!(path_of("trama_dataplane_path_total{path=\"packet_established\"}"), None);
        let counts = |pairs: &[(&'static str, u64)]| PathCounts(pairs.iter().copied().collect());
        let before = counts(&[("socket", 3), ("packet", 1)]);
        assert_eq!(counts(&[("socket", 4), ("packet", 1)]).since(&before), "socket");
        assert_eq!(counts(&[("socket", 4), ("packet", 2)]).since(&before), "packet+socket");
        assert_eq!(before.since(&before), "-");
    }
}
