//! NodePorts answer the node's own sockets on its loopback addresses; a pod's loopback is the pod's.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{Cluster, ClusterOptions, Failure, Probe, Transport};

const LOOPBACK: [IpAddr; 3] =
    [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V4(Ipv4Addr::new(127, 3, 2, 1)), IpAddr::V6(Ipv6Addr::LOCALHOST)];

fn start(proxy_arguments: &'static [&'static str]) -> (Cluster, [(u16, Transport); 3]) {
    let cluster = Cluster::start(&ClusterOptions { proxy_arguments, ..ClusterOptions::default() }).unwrap();
    cluster.apply_all([1, 2].map(|n| pod(&format!("web-{n}"), n, "web", &[8080], &[5353]))).unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply(service.build()).unwrap();
    let tcp = cluster.node_port("web", "TCP", 80).unwrap();
    let udp = cluster.node_port("web", "UDP", 53).unwrap();
    let node = cluster.topology().node(1).unwrap();
    for ip in node.addresses() {
        cluster.wait_for_answers(&node.place(), (ip, tcp).into(), Transport::Tcp, &["web-1", "web-2"]).unwrap();
    }
    (cluster, [(tcp, Transport::Tcp), (udp, Transport::Udp), (udp, Transport::UdpConnected)])
}

#[test]
fn the_node_s_own_sockets_reach_every_endpoint_and_pods_reach_themselves() {
    let (cluster, ports) = start(&[]);
    let node = cluster.topology().node(1).unwrap().place();
    let pod = cluster.place_in_pod("default/client").unwrap();
    for ip in LOOPBACK {
        for (port, transport) in ports {
            let target = SocketAddr::new(ip, port);
            cluster.wait_for_answers(&node, target, transport, &["web-1", "web-2"]).unwrap();
            let unheard =
                Probe::new(target, if transport == Transport::Tcp { transport } else { Transport::UdpConnected });
            assert_eq!(pod.probe(unheard).unwrap(), Err(Failure::Refused), "{transport:?} {target} in a pod");
        }
    }
}

#[test]
fn where_nodeport_addresses_leave_loopback_out_it_does_not_answer() {
    let (cluster, ports) = start(&["--nodeport-addresses", "172.18.0.0/24,fd00:172:18::/64"]);
    let node = cluster.topology().node(1).unwrap().place();
    for ip in LOOPBACK {
        let refused = node.probe(Probe::new((ip, ports[0].0).into(), Transport::Tcp)).unwrap();
        assert_eq!(refused, Err(Failure::Refused), "{ip}");
    }
}
