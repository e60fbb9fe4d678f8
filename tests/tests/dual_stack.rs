//! A dual-stack Service has a ClusterIP per family; each leads to the same pods by their address of that family.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::IpAddr;

use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{Cluster, Transport};

#[test]
fn each_family_reaches_the_same_pods() {
    let cluster = Cluster::new().unwrap();
    cluster.apply_all([1, 2].map(|n| pod(&format!("web-{n}"), n, "web", &[8080], &[5353]))).unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("ipFamilyPolicy", json!("PreferDualStack")).with("ipFamilies", json!(["IPv6", "IPv4"]));
    cluster.apply(service.build()).unwrap();
    let ips = cluster.cluster_ips("web").unwrap();
    assert_eq!(ips.iter().map(IpAddr::is_ipv6).collect::<Vec<_>>(), [true, false]);
    let client = cluster.place_in_pod("default/client").unwrap();
    for ip in ips {
        for place in [client.clone(), client.outside_cgroup(), cluster.topology().node(2).unwrap().place()] {
            for (port, transport) in [(80, Transport::Tcp), (53, Transport::Udp), (53, Transport::UdpConnected)] {
                let target = (ip, port).into();
                let tally = cluster.wait_for_answers(&place, target, transport, &["web-1", "web-2"]).unwrap();
                assert!(tally.sources().iter().all(|source| source.is_ipv6() == ip.is_ipv6()));
            }
        }
    }
}

#[test]
fn a_single_stack_service_has_one_family_only() {
    let cluster = Cluster::new().unwrap();
    cluster.apply_all([pod("web-1", 1, "web", &[8080], &[]), pod("client", 2, "client", &[], &[])]).unwrap();
    let service = ServiceManifest::new("six", Some("web")).port("TCP", 80, 8080);
    cluster.apply(service.with("ipFamilies", json!(["IPv6"])).build()).unwrap();
    let ips = cluster.cluster_ips("six").unwrap();
    assert!(matches!(ips.as_slice(), [IpAddr::V6(_)]), "{ips:?}");
    let client = cluster.place_in_pod("default/client").unwrap();
    cluster.wait_for_answers(&client, (ips[0], 80).into(), Transport::Tcp, &["web-1"]).unwrap();
}
