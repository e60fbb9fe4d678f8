//! Maps that are too small for what comes grow in the running process, and neither open connections nor new ones notice; where they cannot,
//! those in use stay.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::maps::MapInfo;
use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::steady::{SERVERS, Steady};
use trama_lab::{Cluster, ClusterOptions, FrameLinks, PathCounts, Place, Probe, Transport, binary, wait_for};

/// One at a time: the first takes as much of the machine as it can have.
static ALONE: Mutex<()> = Mutex::new(());

/// Room for a few Services.
const SMALL: &[&str] = &["--max-services=16", "--max-endpoints=64"];
/// The same, where the programs are filters that are replaced one by one; and in front of them.
const SMALL_CLSACT: &[&str] = &["--max-services=16", "--max-endpoints=64", "--attach-mode=clsact"];
const SMALL_XDP: &[&str] =
    &["--max-services=16", "--max-endpoints=64", "--attach-mode=clsact", "--xdp-interfaces=eth0"];
/// How many Services there are to be after each wave: more than there is room for each time.
const WAVES: [usize; 2] = [24, 96];
/// How long a wave may take to be programmed, on both nodes.
const LIMIT: Duration = Duration::from_secs(60);
/// What the proxies count.
const GROWN: &str = "trama_map_growths_total{result=\"grown\"}";
const FAILED: &str = "trama_map_growths_total{result=\"failed\"}";
const SERVICE_PORTS: &str = "trama_service_ports";
const REFUSED: &str = "trama_service_ports_refused";

#[test]
fn maps_grow_twice_in_the_running_process_without_a_loss() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    grow_twice(&Steady::start(SMALL).unwrap());
}

#[test]
fn maps_of_clsact_filters_and_of_the_xdp_hook_grow_without_a_loss() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let steady = Steady::start(SMALL_CLSACT).unwrap();
    let cluster = &steady.cluster;
    let _links = FrameLinks::of(cluster.topology()).unwrap();
    cluster.kill_proxy(1).unwrap();
    cluster.restart_proxy_with(1, SMALL_XDP).unwrap();
    let before = PathCounts::of(cluster).unwrap();
    grow_twice(&steady);
    let paths = PathCounts::of(cluster).unwrap().since(&before);
    assert!(["socket", "packet", "xdp"].iter().all(|path| paths.contains(path)), "{paths}");
}

/// Lets Services come in waves that the maps have no room for, under traffic.
fn grow_twice(steady: &Steady) {
    let cluster = &steady.cluster;
    // A pod of its own: the ports of its connections are nobody else's.
    cluster.apply(pod("asker", 1, "asker", &[], &[])).unwrap();
    let asker = cluster.place_in_pod("default/asker").unwrap();
    let before = sample(cluster, 1, SERVICE_PORTS) as usize;
    let pids = [1, 2].map(|node| cluster.proxy_pid(node).unwrap());
    let (sizes, outcome) = steady
        .during(|| {
            let mut sizes = vec![size(cluster, 1)];
            let mut there = 0;
            for (wave, services) in (1..).zip(WAVES) {
                (there..services).try_for_each(|number| cluster.apply(service(number)))?;
                wait_for("room for all Services", LIMIT, || {
                    Ok(is_programmed(cluster, before + 2 * services)?.then_some(()))
                })?;
                steady.change_endpoints(wave)?;
                there = services;
                sizes.push(size(cluster, 1));
            }
            (0..there).try_for_each(|number| answers(cluster, &asker, number))?;
            Ok(sizes)
        })
        .unwrap();
    println!("room for Services: {sizes:?}");
    assert!(sizes.is_sorted_by(|before, after| before < after), "{sizes:?}");
    for node in [1, 2] {
        assert!(sample(cluster, node, GROWN) >= 2.0, "node {node}");
    }
    assert_eq!(pids, [1, 2].map(|node| cluster.proxy_pid(node).unwrap()), "the same processes");
    outcome.is_clean().unwrap();
}

/// A table needs more room at once than a few endpoints ever fill.
#[test]
fn maps_grow_for_a_maglev_table() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let cluster = Cluster::start(&ClusterOptions { proxy_arguments: SMALL, ..ClusterOptions::default() }).unwrap();
    cluster.apply_all([pod("web-1", 1, "web", &[8080], &[]), pod("asker", 1, "asker", &[], &[])]).unwrap();
    let asker = cluster.place_in_pod("default/asker").unwrap();
    let mut service = service(0);
    service["metadata"]["annotations"] = json!({ "service.trama.dev/lb-algorithm": "maglev" });
    cluster.apply(service).unwrap();
    answers(&cluster, &asker, 0).unwrap();
    wait_for("room for the table", LIMIT, || Ok(explain(&cluster)?.contains("Maglev").then_some(()))).unwrap();
    assert!(sample(&cluster, 1, GROWN) >= 1.0);
    answers(&cluster, &asker, 0).unwrap();
}

#[test]
fn where_maps_cannot_grow_those_in_use_stay() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let cluster = Cluster::start(&ClusterOptions { proxy_arguments: SMALL, ..ClusterOptions::default() }).unwrap();
    cluster.apply_all([pod("web-1", 1, "web", &[8080], &[]), pod("asker", 1, "asker", &[], &[])]).unwrap();
    let asker = cluster.place_in_pod("default/asker").unwrap();
    cluster.apply(service(0)).unwrap();
    answers(&cluster, &asker, 0).unwrap();
    cluster.keep_maps_from_growing(1).unwrap();
    (1..WAVES[0]).try_for_each(|number| cluster.apply(service(number))).unwrap();
    let of = |samples: &trama_lab::metrics::Samples, name: &str| samples.get(name).copied().unwrap_or_default();
    let samples = wait_for("the attempt to grow", LIMIT, || {
        let samples = cluster.metrics(1).unwrap_or_default();
        Ok((of(&samples, FAILED) > 0.0 && of(&samples, REFUSED) > 0.0).then_some(samples))
    });
    assert_eq!(of(&samples.unwrap(), GROWN), 0.0);
    assert_eq!(size(&cluster, 1), 16);
    let trama = cluster.topology().node(1).unwrap().bpffs().join("trama");
    assert_eq!(std::fs::read_dir(trama).unwrap().count(), 1, "nothing is left of the attempt");
    answers(&cluster, &asker, 0).unwrap();
}

fn service(number: usize) -> serde_json::Value {
    let service = ServiceManifest::new(&format!("more-{number}"), Some("web")).port("TCP", 80, 8080);
    service.with("ipFamilyPolicy", json!("RequireDualStack")).build()
}

/// How the first node decides a packet to the first Service of a wave.
fn explain(cluster: &Cluster) -> Result<String> {
    let node = cluster.topology().node(1).context("no first node")?;
    let source = cluster.pod_addresses("default/asker").context("no asker")?[0];
    let vip = cluster.cluster_ips("more-0")?.into_iter().find(IpAddr::is_ipv4).context("no IPv4 address")?;
    let mut command = Command::new(binary("trama-proxy")?);
    command.args(["explain", &source.to_string(), &format!("{vip}:80/TCP"), "--bpffs"]).arg(node.bpffs());
    let output = node.netns().run(|| command.output())??;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn sample(cluster: &Cluster, node: usize, name: &str) -> f64 {
    cluster.metrics(node).unwrap().get(name).copied().unwrap()
}

/// Whether both nodes have programmed so many ServicePorts, and refused none.
fn is_programmed(cluster: &Cluster, service_ports: usize) -> Result<bool> {
    let mut all = true;
    for node in [1, 2] {
        // A process that grows answers late.
        let samples = cluster.metrics(node).unwrap_or_default();
        let of = |name: &str| samples.get(name).copied();
        all &= of(SERVICE_PORTS) == Some(service_ports as f64) && of(REFUSED) == Some(0.0);
    }
    Ok(all)
}

/// Entries of the largest map of ClusterIPs on a node; while it grows there are two.
fn size(cluster: &Cluster, node: usize) -> u32 {
    let trama = cluster.topology().node(node).unwrap().bpffs().join("trama");
    let versions = std::fs::read_dir(trama).unwrap().map(|entry| entry.unwrap().path());
    let maps = versions.filter_map(|version| MapInfo::from_pin(version.join("maps/CLUSTER_IPS_V4")).ok());
    maps.map(|map| map.max_entries()).max().unwrap()
}

/// By the socket path and by the packet path.
fn answers(cluster: &Cluster, asker: &Place, number: usize) -> Result<()> {
    for address in cluster.cluster_ips(&format!("more-{number}"))? {
        for place in [asker.clone(), asker.outside_cgroup()] {
            is_answered(&place, address)?;
        }
    }
    Ok(())
}

fn is_answered(place: &Place, address: IpAddr) -> Result<()> {
    let target = SocketAddr::new(address, 80);
    let servers: BTreeSet<&str> = SERVERS.into();
    // Its endpoints may have come a moment ago.
    let reply = wait_for("an answer", CHANGE_LIMIT, || Ok(place.probe(Probe::new(target, Transport::Tcp))?.ok()))?;
    ensure!(servers.contains(reply.server.as_str()), "{target} was answered by {}", reply.server);
    Ok(())
}
