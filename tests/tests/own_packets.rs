//! The node's own connections on the packet path reach endpoints on this node, on another and on the node itself, also to
//! addresses that are the node's, whatever reverse path filter the node has.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, Patch, PatchParams};
use node_sys::sysctl;
use serde_json::json;
use trama_cni::{NetlinkError, in_netns};
use trama_lab::scenario::{ServiceManifest, endpoint_slice, pod};
use trama_lab::{Cluster, EchoServer, Place, Transport};

/// Load-balancer IPs: nobody's, an address of the node, and one that only a route makes the node's.
const FOREIGN: [&str; 2] = ["203.0.113.10", "2001:db8:1b::10"];
const OWN: [&str; 2] = ["203.0.113.11", "2001:db8:1b::11"];
const ROUTED: [&str; 2] = ["203.0.113.12", "2001:db8:1b::12"];
/// Where the node itself serves.
const HOST_PORT: u16 = 9090;

fn parse(addresses: [&str; 2]) -> [IpAddr; 2] {
    addresses.map(|address| address.parse().unwrap())
}

/// A load balancer that lets in nobody but node-1, with endpoints on both nodes.
fn apply_web(cluster: &Cluster, node: [IpAddr; 2]) {
    cluster.apply_all([1, 2].map(|n| pod(&format!("web-{n}"), n, "web", &[8080], &[5353]))).unwrap();
    let ranges = node.map(|ip| ipnet::IpNet::from(ip).to_string());
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("type", json!("LoadBalancer")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply(service.with("loadBalancerSourceRanges", json!(ranges)).build()).unwrap();
    let ingress = [FOREIGN, OWN, ROUTED].concat();
    let ingress: Vec<_> = ingress.iter().map(|ip| json!({ "ip": ip, "ipMode": "VIP" })).collect();
    let status = Patch::Merge(json!({ "status": { "loadBalancer": { "ingress": ingress } } }));
    let services: Api<Service> = Api::namespaced(cluster.client(), "default");
    cluster.block_on(services.patch_status("web", &PatchParams::default(), &status)).unwrap();
}

/// A Service whose endpoint is node-1 itself.
fn apply_host(cluster: &Cluster, node: [IpAddr; 2]) {
    let service = ServiceManifest::new("host", None).port("TCP", 80, HOST_PORT);
    cluster.apply(service.with("ipFamilyPolicy", json!("RequireDualStack")).build()).unwrap();
    for (name, ip) in ["host-v4", "host-v6"].into_iter().zip(node) {
        cluster.apply(endpoint_slice(name, "host", 80, HOST_PORT, &[ip])).unwrap();
    }
}

fn give_load_balancer_ips(node: &Place) {
    in_netns(node.netns(), async |session| -> Result<(), NetlinkError> {
        let loopback = session.link("lo").await?;
        for ip in parse(OWN) {
            session.add_host_address(loopback, ip).await?;
        }
        Ok(())
    })
    .unwrap();
    for ip in ROUTED {
        let ip = ["-n", node.netns().label(), "route", "add", "local", ip, "dev", "lo"];
        assert!(Command::new("ip").args(ip).status().unwrap().success());
    }
}

/// On every interface that there is.
fn set_reverse_path_filter(node: &Place, value: &str) {
    let set = || {
        for interface in fs::read_dir("/proc/sys/net/ipv4/conf").unwrap() {
            let interface = interface.unwrap().file_name();
            sysctl::write(&format!("net/ipv4/conf/{}/rp_filter", interface.display()), value).unwrap();
        }
    };
    node.netns().run(set).unwrap();
}

fn is_answered(cluster: &Cluster, place: &Place, ip: IpAddr, ports: [u16; 2]) {
    for (port, transport) in [(ports[0], Transport::Tcp), (ports[1], Transport::Udp)] {
        cluster.wait_for_answers(place, SocketAddr::new(ip, port), transport, &["web-1", "web-2"]).unwrap();
    }
}

#[test]
fn no_reverse_path_filter_keeps_answers_from_the_node() {
    let cluster = Cluster::new().unwrap();
    let node = cluster.topology().node(1).unwrap();
    let (addresses, node) = (node.addresses(), node.place());
    give_load_balancer_ips(&node);
    apply_web(&cluster, addresses);
    apply_host(&cluster, addresses);
    let _server = node.netns().run(|| EchoServer::start("host", &[HOST_PORT], &[])).unwrap().unwrap();
    let node_ports = [cluster.node_port("web", "TCP", 80).unwrap(), cluster.node_port("web", "UDP", 53).unwrap()];
    let packets = node.outside_cgroup();
    for filter in ["1", "2"] {
        set_reverse_path_filter(&node, filter);
        for (ip, node_ip) in cluster.cluster_ips("web").unwrap().into_iter().zip(addresses) {
            is_answered(&cluster, &packets, ip, [80, 53]);
            is_answered(&cluster, &packets, node_ip, node_ports);
        }
        // Source ranges are judged by the packet, whether the socket is in the node's cgroup or not.
        for ip in [FOREIGN, OWN, ROUTED].into_iter().flat_map(parse) {
            is_answered(&cluster, &packets, ip, [80, 53]);
            is_answered(&cluster, &node, ip, [80, 53]);
        }
        for ip in cluster.cluster_ips("host").unwrap() {
            cluster.wait_for_answers(&packets, (ip, 80).into(), Transport::Tcp, &["host"]).unwrap();
        }
    }
}

#[test]
fn what_the_node_sends_to_itself_and_no_service_serves_is_left_alone() {
    let cluster = Cluster::new().unwrap();
    let node = cluster.topology().node(1).unwrap();
    let (addresses, node) = (node.addresses(), node.place());
    cluster.apply(ServiceManifest::new("nobody", Some("nobody")).port("TCP", 80, 80).build()).unwrap();
    let _server = node.netns().run(|| EchoServer::start("itself", &[HOST_PORT], &[HOST_PORT])).unwrap().unwrap();
    let loopback = parse(["127.0.0.1", "::1"]);
    for ip in addresses.into_iter().chain(loopback) {
        for transport in [Transport::Tcp, Transport::Udp] {
            cluster.wait_for_answers(&node, (ip, HOST_PORT).into(), transport, &["itself"]).unwrap();
        }
    }
}
