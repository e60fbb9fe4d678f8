//! A NodePort answers on every node, whether or not it has an endpoint; with the policy Local, only where one is, and unmasked.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{CLIENT_ADDRESSES, Cluster, Failure, Probe, Transport, wait_for};

fn cluster_with_one_endpoint(policy: &str) -> Cluster {
    let cluster = Cluster::new().unwrap();
    cluster.apply(pod("shop-1", 1, "shop", &[8080], &[5353])).unwrap();
    let service = ServiceManifest::new("shop", Some("shop")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("type", json!("NodePort")).with("externalTrafficPolicy", json!(policy));
    cluster.apply(service.with("ipFamilyPolicy", json!("RequireDualStack")).build()).unwrap();
    cluster
}

/// Every address of a node with the NodePort, over TCP and UDP.
fn targets(cluster: &Cluster, node: usize) -> Vec<(SocketAddr, Transport)> {
    let tcp = cluster.node_port("shop", "TCP", 80).unwrap();
    let udp = cluster.node_port("shop", "UDP", 53).unwrap();
    let addresses = cluster.topology().node(node).unwrap().addresses();
    let both = |ip: IpAddr| [(SocketAddr::new(ip, tcp), Transport::Tcp), (SocketAddr::new(ip, udp), Transport::Udp)];
    addresses.into_iter().flat_map(both).collect()
}

#[test]
fn every_node_answers_and_masks_the_client_on_the_way_to_another_node() {
    let cluster = cluster_with_one_endpoint("Cluster");
    let client = cluster.topology().client();
    for node in [1, 2] {
        let own = cluster.topology().node(node).unwrap().addresses();
        for (target, transport) in targets(&cluster, node) {
            let tally = cluster.wait_for_answers(&client, target, transport, &["shop-1"]).unwrap();
            if node == 2 {
                let masked: BTreeSet<IpAddr> = own.into_iter().filter(|ip| ip.is_ipv4() == target.is_ipv4()).collect();
                assert_eq!(tally.sources(), &masked, "{transport:?} {target}");
            }
        }
    }
}

#[test]
fn local_keeps_the_client_and_is_silent_elsewhere() {
    let cluster = cluster_with_one_endpoint("Local");
    let client = cluster.topology().client();
    for (target, transport) in targets(&cluster, 1) {
        let tally = cluster.wait_for_answers(&client, target, transport, &["shop-1"]).unwrap();
        let seen: BTreeSet<IpAddr> =
            CLIENT_ADDRESSES.into_iter().filter(|ip| ip.is_ipv4() == target.is_ipv4()).collect();
        assert_eq!(tally.sources(), &seen, "{transport:?} {target}");
    }
    for (target, transport) in targets(&cluster, 2) {
        let probe = Probe { timeout: Duration::from_millis(500), ..Probe::new(target, transport) };
        // Until trama-proxy on node-2 knows the Service, no one listens there and the node itself refuses.
        let silent = || Ok((client.probe(probe)? == Err(Failure::Timeout)).then_some(()));
        wait_for("silence", CHANGE_LIMIT, silent).unwrap();
        assert_eq!(client.probe(probe).unwrap(), Err(Failure::Timeout), "{transport:?} {target}");
    }
}

#[test]
fn pods_and_nodes_reach_a_nodeport_too() {
    let cluster = cluster_with_one_endpoint("Cluster");
    cluster.apply(pod("client", 2, "client", &[], &[])).unwrap();
    let pod = cluster.place_in_pod("default/client").unwrap();
    let node = cluster.topology().node(2).unwrap().place();
    for (target, transport) in targets(&cluster, 1).into_iter().chain(targets(&cluster, 2)) {
        for place in [pod.clone(), pod.outside_cgroup(), node.clone()] {
            cluster.wait_for_answers(&place, target, transport, &["shop-1"]).unwrap();
        }
    }
}
