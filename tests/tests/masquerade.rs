//! Whom an endpoint sees: the pod at a ClusterIP, the node where kube-proxy masquerades, whichever way the client's socket takes.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{Cluster, ClusterOptions, Place, Transport};

/// A Service with one endpoint on node-2; pods come in the order of their addresses.
fn start(proxy_arguments: &'static [&'static str], policy: &str) -> Cluster {
    let cluster = Cluster::start(&ClusterOptions { proxy_arguments, ..ClusterOptions::default() }).unwrap();
    cluster.apply_all([pod("web", 2, "web", &[8080], &[5353]), pod("client", 1, "client", &[], &[])]).unwrap();
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply(service.with("externalTrafficPolicy", json!(policy)).build()).unwrap();
    cluster
}

/// Asks over TCP and UDP; the endpoint must see `expect` and nobody else.
fn sees(cluster: &Cluster, place: &Place, ip: IpAddr, ports: [u16; 2], expect: IpAddr) {
    for (port, transport) in ports.into_iter().zip([Transport::Tcp, Transport::Udp]) {
        let target = SocketAddr::new(ip, port);
        let tally = cluster.wait_for_answers(place, target, transport, &["web"]).unwrap();
        assert_eq!(tally.sources(), &BTreeSet::from([expect]), "{transport:?} {target} from {place:?}");
    }
}

fn node_ports(cluster: &Cluster) -> [u16; 2] {
    [cluster.node_port("web", "TCP", 80).unwrap(), cluster.node_port("web", "UDP", 53).unwrap()]
}

const CLIENT: [&str; 2] = ["10.244.1.2", "fd00:10:244:1::2"];
const WEB: [&str; 2] = ["10.244.2.2", "fd00:10:244:2::2"];

#[test]
fn pods_are_seen_at_a_clusterip_and_masqueraded_at_a_nodeport() {
    let cluster = start(&[], "Cluster");
    let client = cluster.place_in_pod("default/client").unwrap();
    let node = cluster.topology().node(1).unwrap();
    for (index, cluster_ip) in cluster.cluster_ips("web").unwrap().into_iter().enumerate() {
        let (pod, node_ip) = (CLIENT[index].parse().unwrap(), node.addresses()[index]);
        for place in [client.clone(), client.outside_cgroup()] {
            sees(&cluster, &place, cluster_ip, [80, 53], pod);
            sees(&cluster, &place, node_ip, node_ports(&cluster), node_ip);
        }
        for ip_and_ports in [(cluster_ip, [80, 53]), (node_ip, node_ports(&cluster))] {
            sees(&cluster, &node.place(), ip_and_ports.0, ip_and_ports.1, node_ip);
        }
    }
}

#[test]
fn policy_local_keeps_a_pod_s_address() {
    let cluster = start(&[], "Local");
    let client = cluster.place_in_pod("default/client").unwrap();
    let node = cluster.topology().node(1).unwrap();
    for (index, ip) in node.addresses().into_iter().enumerate() {
        for place in [client.clone(), client.outside_cgroup()] {
            // Inside the cluster the policy does not count: the endpoint on the other node answers.
            sees(&cluster, &place, ip, node_ports(&cluster), CLIENT[index].parse().unwrap());
        }
    }
}

#[test]
fn masquerade_all_hides_pods_at_a_clusterip_too() {
    let cluster = start(&["--masquerade-all"], "Cluster");
    let client = cluster.place_in_pod("default/client").unwrap();
    let node = cluster.topology().node(1).unwrap();
    for (cluster_ip, node_ip) in cluster.cluster_ips("web").unwrap().into_iter().zip(node.addresses()) {
        for place in [client.clone(), client.outside_cgroup()] {
            sees(&cluster, &place, cluster_ip, [80, 53], node_ip);
        }
    }
}

#[test]
fn a_pod_that_reaches_itself_is_masqueraded() {
    let cluster = start(&[], "Cluster");
    let web = cluster.place_in_pod("default/web").unwrap();
    let node = cluster.topology().node(2).unwrap();
    for (index, cluster_ip) in cluster.cluster_ips("web").unwrap().into_iter().enumerate() {
        assert_eq!(cluster_ip.is_ipv4(), WEB[index].parse::<IpAddr>().unwrap().is_ipv4());
        for place in [web.clone(), web.outside_cgroup()] {
            sees(&cluster, &place, cluster_ip, [80, 53], node.addresses()[index]);
        }
    }
}
