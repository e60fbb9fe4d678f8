//! A build with other layouts takes over, and the old one again, and a process with larger maps: open connections and new ones do not notice.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::process::Command;

use aya::maps::MapInfo;
use trama_lab::Cluster;
use trama_lab::steady::Steady;

const OTHER: &str = "trama-proxy-other-layout";

/// New connections that may wait for a SYN that was lost, on a machine that has other things to do. Where each set of programs takes its own
/// flows only, 6 to 11 do.
const SLOW_MAX: usize = 3;

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
    assert!(outcome.slow() <= SLOW_MAX, "{} new connections waited", outcome.slow());
}

/// Sizes that differ in every table, each step larger.
const LARGER: [&[&str]; 2] = [
    &["--max-services=80000", "--max-endpoints=300000", "--max-flows=300000"],
    &["--max-services=100000", "--max-endpoints=400000", "--max-flows=600000"],
];

/// The same command in a process that may not do what SYS_ADMIN allows, as the layout of a map by its BTF.
fn without_sys_admin(command: &Command) -> Command {
    let mut limited = Command::new("setpriv");
    limited.arg("--bounding-set=-sys_admin").arg(command.get_program()).args(command.get_args());
    limited
}

/// The second time with as few capabilities as the kernel asks for.
#[test]
fn to_larger_maps_twice_without_a_loss() {
    let steady = Steady::start(&[]).unwrap();
    let cluster = &steady.cluster;
    let before = versions(cluster);
    let (seen, outcome) = steady
        .during(|| {
            let mut seen = Vec::new();
            // Smaller ones change nothing.
            for sizes in [LARGER[0], LARGER[1], LARGER[0], &[]] {
                cluster.kill_proxy(1)?;
                let command = cluster.proxy_command(1, sizes)?;
                let mut command = if sizes == LARGER[1] { without_sys_admin(&command) } else { command };
                cluster.restart_proxy_as(1, &mut command)?;
                seen.push(versions(cluster));
                steady.change_endpoints(1)?;
            }
            Ok(seen)
        })
        .unwrap();
    assert!(seen[0] != before && seen[0].len() == 1, "{before:?} {seen:?}");
    assert_eq!(seen[1..], [&before; 3].map(BTreeSet::clone), "two places in turn");
    let map = cluster.topology().node(1).unwrap().bpffs().join("trama").join(before.first().unwrap());
    assert_eq!(MapInfo::from_pin(map.join("maps/CLUSTER_IPS_V4")).unwrap().max_entries(), 100_000);
    outcome.is_clean().unwrap();
    assert!(outcome.slow() <= SLOW_MAX, "{} new connections waited", outcome.slow());
}
