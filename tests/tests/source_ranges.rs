//! loadBalancerSourceRanges: who is in none of the networks is met with silence at the load-balancer IP, and nowhere else.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use trama_cni::{NetlinkError, Route, in_netns};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{CLIENT_ADDRESSES, Cluster, Failure, Place, Probe, Transport, wait_for};

const ADDRESSES: [&str; 2] = ["203.0.113.10", "2001:db8::10"];

fn addresses() -> [IpAddr; 2] {
    ADDRESSES.map(|address| address.parse().unwrap())
}

fn apply(cluster: &Cluster, ranges: &[String]) {
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("type", json!("LoadBalancer")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply(service.with("loadBalancerSourceRanges", json!(ranges)).build()).unwrap();
    let services: Api<Service> = Api::namespaced(cluster.client(), "default");
    let ingress = ADDRESSES.map(|ip| json!({ "ip": ip, "ipMode": "VIP" }));
    let status = Patch::Merge(json!({ "status": { "loadBalancer": { "ingress": ingress } } }));
    cluster.block_on(services.patch_status("web", &PatchParams::default(), &status)).unwrap();
}

/// Waits until the place meets silence, over TCP and UDP.
fn is_shut_out(place: &Place, ip: IpAddr) {
    for (port, transport) in [(80, Transport::Tcp), (53, Transport::Udp)] {
        let target = SocketAddr::new(ip, port);
        let probe = Probe { timeout: Duration::from_millis(400), ..Probe::new(target, transport) };
        let silent =
            wait_for("silence", CHANGE_LIMIT, || Ok((place.probe(probe)? == Err(Failure::Timeout)).then_some(())));
        assert!(silent.is_ok(), "{transport:?} {target} from {place:?}: {:?}", place.probe(probe));
        assert_eq!(place.probe(probe).unwrap(), Err(Failure::Timeout), "{transport:?} {target} from {place:?}");
    }
}

fn is_let_in(cluster: &Cluster, place: &Place, ip: IpAddr) {
    for (port, transport) in [(80, Transport::Tcp), (53, Transport::Udp)] {
        cluster.wait_for_answers(place, (ip, port).into(), transport, &["web-1", "web-2"]).unwrap();
    }
}

#[test]
fn only_the_named_networks_are_let_in() {
    let cluster = Cluster::new().unwrap();
    cluster.apply_all([1, 2].map(|n| pod(&format!("web-{n}"), n, "web", &[8080], &[5353]))).unwrap();
    cluster.apply_all(["in", "out"].map(|name| pod(name, 1, name, &[], &[]))).unwrap();
    let (inside, outside) = (cluster.place_in_pod("default/in").unwrap(), cluster.place_in_pod("default/out").unwrap());
    let node = cluster.topology().node(1).unwrap();
    let client = cluster.topology().client();
    route_to_node(&client, node.addresses());
    let own = |place: &Place| place.netns().run(pod_addresses).unwrap();
    let alone = |ip: IpAddr| IpNet::from(ip).to_string();
    let clients: Vec<String> = own(&inside).into_iter().chain(CLIENT_ADDRESSES).map(alone).collect();
    apply(&cluster, &clients);
    let node_port = cluster.node_port("web", "TCP", 80).unwrap();
    for ((ip, cluster_ip), node_ip) in
        addresses().into_iter().zip(cluster.cluster_ips("web").unwrap()).zip(node.addresses())
    {
        for place in [inside.clone(), inside.outside_cgroup(), client.clone()] {
            is_let_in(&cluster, &place, ip);
        }
        for place in [outside.clone(), outside.outside_cgroup(), node.place(), node.place().outside_cgroup()] {
            is_shut_out(&place, ip);
        }
        let open = [SocketAddr::new(cluster_ip, 80), SocketAddr::new(node_ip, node_port)];
        for target in open {
            cluster.wait_for_answers(&outside, target, Transport::Tcp, &["web-1", "web-2"]).unwrap();
        }
    }
    // The networks change while the Service stays, a new process takes them over, and none at all is everybody.
    let others: Vec<String> = own(&outside).into_iter().map(alone).collect();
    apply(&cluster, &others);
    for ip in addresses() {
        is_shut_out(&inside, ip);
        is_let_in(&cluster, &outside, ip);
    }
    cluster.kill_proxy(1).unwrap();
    cluster.restart_proxy(1).unwrap();
    for ip in addresses() {
        is_shut_out(&client, ip);
        is_let_in(&cluster, &outside.outside_cgroup(), ip);
    }
    apply(&cluster, &[]);
    for ip in addresses() {
        for place in [inside.clone(), outside.clone(), client.clone(), node.place()] {
            is_let_in(&cluster, &place, ip);
        }
    }
}

/// The addresses of the namespace that this runs in.
fn pod_addresses() -> Vec<IpAddr> {
    let source = |any: &str, far: &str| {
        let socket = std::net::UdpSocket::bind((any.parse::<IpAddr>().unwrap(), 0)).unwrap();
        socket.connect((far.parse::<IpAddr>().unwrap(), 9)).unwrap();
        socket.local_addr().unwrap().ip()
    };
    vec![source("0.0.0.0", "203.0.113.99"), source("::", "2001:db8::99")]
}

/// What a load balancer's router would do.
fn route_to_node(client: &Place, node: [IpAddr; 2]) {
    in_netns(client.netns(), async |session| -> Result<(), NetlinkError> {
        let interface = session.link("eth0").await?;
        for (ip, via) in addresses().into_iter().zip(node) {
            session.set_route(Route { to: IpNet::from(ip), via: Some(via), interface }).await?;
        }
        Ok(())
    })
    .unwrap();
}
