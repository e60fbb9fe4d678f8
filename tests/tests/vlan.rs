//! A node that is reached through an 802.1Q device on its uplink: NodePorts answer at the device's address, and answers carry its tag.
//!
//! Only where the kernel has such devices: `cargo xtask vm test vlan`.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use node_sys::Netns;
use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{Cluster, ClusterOptions, FrameLinks, PathCounts, Transport, wait_for};

/// Networks of the VLAN, and in them the first node and the client.
const NETWORKS: [&str; 2] = ["172.20.0.0/24", "fd00:172:20::/64"];
const NODE: [&str; 2] = ["172.20.0.11/24", "fd00:172:20::11/64"];
const CLIENT: [&str; 2] = ["172.20.0.200/24", "fd00:172:20::200/64"];

/// Services with an endpoint on the node that is asked, and on the other one.
const SERVICES: [(&str, usize); 2] = [("near", 1), ("far", 2)];

fn cluster(proxy_arguments: &'static [&'static str]) -> Cluster {
    let cluster = Cluster::start(&ClusterOptions { proxy_arguments, ..ClusterOptions::default() }).unwrap();
    add_vlan(cluster.topology().node(1).unwrap().netns(), NODE);
    add_vlan(cluster.topology().client().netns(), CLIENT);
    refuse_untagged(cluster.topology().client().netns());
    for (name, node) in SERVICES {
        cluster.apply(pod(&format!("{name}-1"), node, name, &[8080], &[5353])).unwrap();
        let service = ServiceManifest::new(name, Some(name)).port("TCP", 80, 8080).port("UDP", 53, 5353);
        let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
        cluster.apply(service.build()).unwrap();
    }
    cluster
}

fn add_vlan(netns: &Netns, addresses: [&str; 2]) {
    run(netns, "ip", &["link", "add", "link", "eth0", "name", "eth0.7", "type", "vlan", "id", "7"]);
    for address in addresses {
        run(netns, "ip", &["address", "add", address, "dev", "eth0.7", "nodad"]);
    }
    run(netns, "ip", &["link", "set", "eth0.7", "up"]);
}

/// Drops what comes from the VLAN's networks without its tag, which the machine itself would take.
fn refuse_untagged(netns: &Netns) {
    run(netns, "nft", &["add", "table", "inet", "tagged"]);
    run(netns, "nft", &["add", "chain", "inet", "tagged", "pre", "{ type filter hook prerouting priority raw ; }"]);
    for (family, network) in ["ip", "ip6"].into_iter().zip(NETWORKS) {
        let rule = format!("iifname eth0 {family} saddr {network} drop");
        run(netns, "nft", &["add", "rule", "inet", "tagged", "pre", &rule]);
    }
}

fn run(netns: &Netns, program: &str, arguments: &[&str]) {
    let status = netns.run(|| Command::new(program).args(arguments).status()).unwrap().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

/// Asks every NodePort at the VLAN's addresses; returns by Service the paths of new flows.
fn paths(cluster: &Cluster) -> Vec<(&'static str, String)> {
    let (client, own) = (cluster.topology().client(), cluster.topology().node(1).unwrap().addresses());
    let mut taken = Vec::new();
    for (name, _) in SERVICES {
        let ports = [("TCP", 80, Transport::Tcp), ("UDP", 53, Transport::Udp)];
        for (ip, (protocol, port, transport)) in NODE.into_iter().flat_map(|ip| ports.map(|port| (ip, port))) {
            let ip: IpAddr = ip.split('/').next().unwrap().parse().unwrap();
            let target = SocketAddr::new(ip, cluster.node_port(name, protocol, port).unwrap());
            let server = format!("{name}-1");
            cluster.wait_for_answers(&client, target, transport, &[&server]).unwrap();
            let before = PathCounts::of(cluster).unwrap();
            let tally = cluster.wait_for_answers(&client, target, transport, &[&server]).unwrap();
            taken.push((name, PathCounts::of(cluster).unwrap().since(&before)));
            // As everywhere, the node's first address: the endpoint is not in the VLAN.
            let seen: BTreeSet<IpAddr> = own.into_iter().filter(|own| own.is_ipv4() == ip.is_ipv4()).collect();
            assert_eq!(tally.sources(), &seen, "{transport:?} {target}");
        }
    }
    taken
}

#[test]
#[ignore = "needs a kernel with VLAN devices: cargo xtask vm test vlan"]
fn a_node_port_answers_in_a_vlan() {
    for (name, path) in paths(&cluster(&[])) {
        assert_eq!(path, "packet", "{name}");
    }
}

/// The parent's program sees frames of the VLAN too, with their tag. It leaves them to tc on their way to the node itself, and sends those for
/// another node's endpoint on.
#[test]
#[ignore = "needs a kernel with VLAN devices: cargo xtask vm test vlan"]
fn a_node_port_answers_in_a_vlan_with_xdp_at_the_parent() {
    let cluster = cluster(&["--xdp-interfaces", "eth0"]);
    let _links = FrameLinks::of(cluster.topology()).unwrap();
    for (name, path) in paths(&cluster) {
        assert_eq!(path, if name == "near" { "packet" } else { "xdp" }, "{name}");
    }
}

/// The kernel has taken the tag off before generic XDP and puts it on again behind it, so that is not used at such an interface; it is again
/// when the VLAN's device is gone.
#[test]
#[ignore = "needs a kernel with VLAN devices: cargo xtask vm test vlan"]
fn a_node_port_answers_in_a_vlan_where_generic_xdp_is_asked_for() {
    let cluster = cluster(&["--xdp-interfaces", "eth0", "--xdp-mode", "generic"]);
    for (name, path) in paths(&cluster) {
        assert_eq!(path, "packet", "{name}");
    }
    let node = cluster.topology().node(1).unwrap();
    run(node.netns(), "ip", &["link", "delete", "eth0.7"]);
    let versions = || fs::read_dir(node.bpffs().join("trama")).unwrap().flatten();
    let links = || versions().flat_map(|version| fs::read_dir(version.path().join("links")).unwrap().flatten());
    let is_frames = |link: fs::DirEntry| link.file_name().to_string_lossy().starts_with("xdp_ingress");
    wait_for("generic XDP", CHANGE_LIMIT, || Ok(links().any(is_frames).then_some(()))).unwrap();
}
