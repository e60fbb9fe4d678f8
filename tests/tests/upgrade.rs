//! A build with other layouts takes over, and the old one again: open connections and new ones do not notice.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::BTreeSet;

use trama_lab::Cluster;
use trama_lab::steady::Steady;

const OTHER: &str = "trama-proxy-other-layout";

/// Names of the versions whose maps are on the first node.
fn versions(cluster: &Cluster) -> BTreeSet<String> {
    let trama = cluster.topology().node(1).unwrap().bpffs().join("trama");
    let names = std::fs::read_dir(trama).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

#[test]
fn to_another_layout_of_flows_and_back_without_a_loss() {
    let steady = Steady::start(&[]).unwrap();
    let cluster = &steady.cluster;
    let before = versions(cluster);
    let (there, outcome) = steady
        .during(|| {
            cluster.kill_proxy(1)?;
            cluster.restart_proxy_as(1, &mut cluster.proxy_command_of(OTHER, 1, &[])?)?;
            let there = versions(cluster);
            steady.change_endpoints(1)?;
            cluster.kill_proxy(1)?;
            cluster.restart_proxy(1)?;
            Ok(there)
        })
        .unwrap();
    assert_eq!((before.len(), there.len()), (1, 1), "{before:?} {there:?}");
    assert_ne!(before, there, "the other build has the same layout");
    assert_eq!(versions(cluster), before);
    outcome.is_clean().unwrap();
}
