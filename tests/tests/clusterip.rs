//! A ClusterIP reaches every endpoint, from pods and nodes, on the socket path and on the packet path, and looks like itself.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::net::SocketAddr;

use trama_lab::scenario::{ServiceManifest, endpoint_slice, pod};
use trama_lab::{Cluster, PathCounts, Transport};

const WEB: [&str; 3] = ["web-1", "web-2", "web-3"];

#[test]
fn every_client_reaches_every_endpoint_on_every_port() {
    let cluster = Cluster::new().unwrap();
    let nodes = [1, 2, 2];
    cluster
        .apply_all(WEB.iter().zip(nodes).map(|(name, node)| pod(name, node, "web", &[8080, 9090], &[5353])))
        .unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    let service = ServiceManifest::new("web", Some("web"));
    cluster.apply(service.port("TCP", 80, 8080).port("TCP", 90, 9090).port("UDP", 53, 5353).build()).unwrap();
    let vip = cluster.cluster_ips("web").unwrap()[0];
    let client = cluster.place_in_pod("default/client").unwrap();
    let node = cluster.topology().node(2).unwrap().place();
    for (port, transport) in [(80, Transport::Tcp), (90, Transport::Tcp), (53, Transport::Udp)] {
        for (place, path) in [(client.clone(), "socket"), (client.outside_cgroup(), "packet"), (node.clone(), "socket")]
        {
            let target = SocketAddr::new(vip, port);
            cluster.wait_for_answers(&place, target, transport, &WEB).unwrap();
            let before = PathCounts::of(&cluster).unwrap();
            cluster.wait_for_answers(&place, target, transport, &WEB).unwrap();
            let after = PathCounts::of(&cluster).unwrap();
            assert_eq!(after.since(&before), path, "{transport:?} {target}");
        }
    }
}

#[test]
fn pods_keep_their_source_address_and_may_reach_themselves() {
    let cluster = Cluster::new().unwrap();
    cluster.apply(pod("alone", 1, "alone", &[8080], &[])).unwrap();
    cluster.apply(pod("client", 2, "client", &[], &[])).unwrap();
    cluster.apply(ServiceManifest::new("alone", Some("alone")).port("TCP", 80, 8080).build()).unwrap();
    let target = SocketAddr::new(cluster.cluster_ips("alone").unwrap()[0], 80);
    let client = cluster.place_in_pod("default/client").unwrap();
    for place in [client.clone(), client.outside_cgroup()] {
        let tally = cluster.wait_for_answers(&place, target, Transport::Tcp, &["alone"]).unwrap();
        let own: BTreeSet<_> = ["10.244.2.2".parse().unwrap()].into();
        assert_eq!(tally.sources(), &own);
    }
    let alone = cluster.place_in_pod("default/alone").unwrap();
    for place in [alone.clone(), alone.outside_cgroup()] {
        cluster.wait_for_answers(&place, target, Transport::Tcp, &["alone"]).unwrap();
    }
}

#[test]
fn bad_addresses_of_a_slice_are_left_out_and_the_rest_works() {
    let cluster = Cluster::new().unwrap();
    cluster.apply(pod("web-1", 1, "web", &[8080], &[])).unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    let client = cluster.place_in_pod("default/client").unwrap();
    let good = cluster.place_in_pod("default/web-1").map(|_| "10.244.1.2".parse().unwrap()).unwrap();
    cluster.apply(ServiceManifest::new("own", None).port("TCP", 80, 8080).build()).unwrap();
    // The API server refuses loopback and link-local addresses in a slice; an address that no one has is for the client to notice.
    cluster.apply(endpoint_slice("own-1", "own", 80, 8080, &[good])).unwrap();
    let target = SocketAddr::new(cluster.cluster_ips("own").unwrap()[0], 80);
    let name = cluster.pod_at(good).unwrap();
    cluster.wait_for_answers(&client, target, Transport::Tcp, &[&name]).unwrap();
    for bad in ["127.0.0.1", "169.254.7.7", "0.0.0.0", "224.0.0.1"] {
        let slice = endpoint_slice("own-2", "own", 80, 8080, &[bad.parse().unwrap(), good]);
        // Refused by the server, or left out by the proxy: either way no one else than the pod ever answers.
        let _ = cluster.apply(slice);
        cluster.wait_for_answers(&client, target, Transport::Tcp, &[&name]).unwrap();
    }
}
