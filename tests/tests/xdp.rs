//! What comes from another machine and goes to another machine is translated at the XDP hook, with the answers that the tc hook gives;
//! everything else is left to that.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{Cluster, ClusterOptions, FrameLinks, PathCounts, Transport};

fn cluster(arguments: &'static [&'static str]) -> (Cluster, FrameLinks) {
    let cluster = Cluster::start(&ClusterOptions { proxy_arguments: arguments, ..ClusterOptions::default() }).unwrap();
    let links = FrameLinks::of(cluster.topology()).unwrap();
    cluster.apply(pod("shop-2", 2, "shop", &[8080], &[5353])).unwrap();
    let service = ServiceManifest::new("shop", Some("shop")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply(service.build()).unwrap();
    (cluster, links)
}

/// Every address of a node with the NodePort, over TCP and UDP.
fn targets(cluster: &Cluster, node: usize) -> Vec<(SocketAddr, Transport)> {
    let tcp = cluster.node_port("shop", "TCP", 80).unwrap();
    let udp = cluster.node_port("shop", "UDP", 53).unwrap();
    let addresses = cluster.topology().node(node).unwrap().addresses();
    let both = |ip: IpAddr| [(SocketAddr::new(ip, tcp), Transport::Tcp), (SocketAddr::new(ip, udp), Transport::Udp)];
    addresses.into_iter().flat_map(both).collect()
}

/// Asks every target of both nodes; returns the path that each took.
fn paths(cluster: &Cluster) -> Vec<(usize, SocketAddr, String)> {
    let client = cluster.topology().client();
    let mut taken = Vec::new();
    for node in [1, 2] {
        for (target, transport) in targets(cluster, node) {
            cluster.wait_for_answers(&client, target, transport, &["shop-2"]).unwrap();
            let before = PathCounts::of(cluster).unwrap();
            let tally = cluster.wait_for_answers(&client, target, transport, &["shop-2"]).unwrap();
            taken.push((node, target, PathCounts::of(cluster).unwrap().since(&before)));
            let of = cluster.topology().node(node).unwrap().addresses();
            let seen: BTreeSet<IpAddr> = of.into_iter().filter(|ip| ip.is_ipv4() == target.is_ipv4()).collect();
            assert_eq!(tally.sources(), &seen, "{transport:?} {target}");
        }
    }
    taken
}

#[test]
fn frames_for_another_machine_are_translated_in_the_driver_and_others_are_not() {
    let (cluster, _links) = cluster(&["--xdp-interfaces", "eth0"]);
    for (node, target, path) in paths(&cluster) {
        assert_eq!(path, if node == 1 { "xdp" } else { "packet" }, "{target} at node-{node}");
    }
}

#[test]
fn generic_xdp_does_the_same() {
    let (cluster, _links) = cluster(&["--xdp-interfaces", "eth*", "--xdp-mode", "generic"]);
    for (node, target, path) in paths(&cluster) {
        assert_eq!(path, if node == 1 { "xdp" } else { "packet" }, "{target} at node-{node}");
    }
}

#[test]
fn a_connection_outlives_the_hook_and_the_process() {
    let (cluster, _links) = cluster(&["--xdp-interfaces", "eth0"]);
    let client = cluster.topology().client();
    for (target, transport) in targets(&cluster, 1) {
        cluster.wait_for_answers(&client, target, transport, &["shop-2"]).unwrap();
    }
    let (target, _) = targets(&cluster, 1)[0];
    let mut kept = client.connect(target, Duration::from_secs(5)).unwrap();
    kept.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut ask = || {
        kept.write_all(b"hello\n").unwrap();
        let mut answer = [0; 512];
        assert_ne!(kept.read(&mut answer).unwrap(), 0, "the connection was closed");
    };
    ask();
    cluster.kill_proxy(1).unwrap();
    ask();
    cluster.restart_proxy(1).unwrap();
    ask();
    // Without the XDP program its flows go on at the tc hook.
    cluster.restart_proxy_with(1, &[]).unwrap();
    ask();
}
