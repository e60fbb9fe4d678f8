//! Packets that lie about where they come from or how long they are: dropped and counted, and the node is unharmed.
#![allow(
    missing_docs,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use serde_json::json;
use trama_lab::packet::Packet;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{CLIENT_ADDRESSES, Cluster, Transport, Wire, link_address, wait_for};

const LIMIT: Duration = Duration::from_secs(5);
/// An address of a load balancer that is also a machine: it may send.
const MACHINE: [&str; 2] = ["172.18.0.201", "fd00:172:18::201"];

/// The pod `web` on the second node, with a wire from outside and one from a pod of the first node.
struct Scene {
    cluster: Cluster,
    outside: Wire,
    pod: Wire,
    server: Wire,
    /// The first node's link-layer addresses towards both.
    gateways: [[u8; 6]; 2],
    port: u16,
}

impl Scene {
    fn new() -> Self {
        let cluster = Cluster::new().unwrap();
        cluster.apply_all([pod("web", 2, "web", &[8080], &[5353]), pod("client", 1, "client", &[], &[])]).unwrap();
        let service = ServiceManifest::new("web", Some("web")).port("UDP", 53, 5353).port("TCP", 80, 8080);
        let service = service.with("type", json!("NodePort")).with("externalIPs", json!(MACHINE));
        cluster.apply(service.with("ipFamilyPolicy", json!("RequireDualStack")).build()).unwrap();
        let node = cluster.topology().node(1).unwrap();
        let client = cluster.place_in_pod("default/client").unwrap();
        let port = cluster.node_port("web", "UDP", 53).unwrap();
        for (ip, node_ip) in cluster.cluster_ips("web").unwrap().into_iter().zip(node.addresses()) {
            let outside = cluster.topology().client();
            cluster.wait_for_answers(&outside, (node_ip, port).into(), Transport::Udp, &["web"]).unwrap();
            cluster.wait_for_answers(&client.outside_cgroup(), (ip, 53).into(), Transport::Udp, &["web"]).unwrap();
        }
        let interface = cluster.host_interface("default/client").unwrap();
        let gateways = [link_address(node.netns(), "eth0"), link_address(node.netns(), &interface)].map(Result::unwrap);
        let outside = Wire::open(&cluster.topology().client(), "eth0").unwrap();
        let server = Wire::open(&cluster.place_in_pod("default/web").unwrap(), "eth0").unwrap();
        Self { outside, pod: Wire::open(&client, "eth0").unwrap(), server, gateways, port, cluster }
    }

    fn dropped(&self, reason: &str) -> f64 {
        let name = format!("trama_dataplane_drop_total{{reason=\"{reason}\"}}");
        self.cluster.metrics(1).unwrap().get(&name).copied().unwrap_or(0.0)
    }

    /// Sends from outside and from the pod; each time one packet more must have been dropped for this reason. What is malformed comes
    /// from the pod alone: a bridge may drop it on the way from outside (`br_validate_ipv4`).
    fn is_dropped(&self, reason: &str, what: &str, ether_type: u16, bytes: &[u8]) {
        let ways = [(&self.pod, self.gateways[1]), (&self.outside, self.gateways[0])];
        let count = if reason == "malformed" { 1 } else { 2 };
        for (wire, gateway) in ways.into_iter().take(count) {
            let before = self.dropped(reason);
            wire.send_bytes(gateway, ether_type, bytes).unwrap();
            let dropped = wait_for("the drop", LIMIT, || Ok((self.dropped(reason) == before + 1.0).then_some(())));
            dropped.unwrap_or_else(|error| panic!("{what}: {error}, {before} and then {}", self.dropped(reason)));
        }
    }

    /// The node still serves, and the endpoint saw nothing from `from`.
    fn is_unharmed(&self, from: &[IpAddr]) {
        for node_ip in self.cluster.topology().node(1).unwrap().addresses() {
            let (outside, target) = (self.cluster.topology().client(), SocketAddr::new(node_ip, self.port));
            self.cluster.wait_for_answers(&outside, target, Transport::Udp, &["web"]).unwrap();
        }
        let seen = self.server.receive(Duration::from_millis(200), |packet| {
            (packet.ports()[1] == 5353 && packet.payload.ends_with(b"lie\n")).then_some(packet.source)
        });
        assert!(seen.is_err(), "the endpoint got a datagram from {seen:?}, which claimed to be from one of {from:?}");
    }
}

#[test]
fn sources_that_nobody_can_have_are_dropped() {
    let scene = Scene::new();
    let node = scene.cluster.topology().node(1).unwrap().addresses();
    let ips = scene.cluster.cluster_ips("web").unwrap();
    let never = [
        ["127.0.0.1", "127.9.9.9", "0.0.0.0", "224.0.0.1", "255.255.255.255"],
        ["::1", "::", "ff02::1", "ff0e::7", "ff05::2"],
    ];
    let mut all = Vec::new();
    for family in [0, 1] {
        let impossible = never[family].iter().map(|ip| ip.parse().unwrap()).chain([ips[family]]);
        for target in [SocketAddr::new(node[family], scene.port), SocketAddr::new(ips[family], 53)] {
            for from in impossible.clone() {
                let lie = Packet::udp((from, 4000).into(), target, b"lie\n");
                scene.is_dropped("impossible_source", &format!("{from} to {target}"), lie.ether_type(), &lie.bytes());
                all.push(from);
            }
            let lie = Packet::udp((node[family], 4000).into(), target, b"lie\n");
            scene.is_dropped("node_source", &format!("the node's own to {target}"), lie.ether_type(), &lie.bytes());
        }
    }
    scene.is_unharmed(&all);
}

#[test]
fn external_ips_may_be_machines_that_send() {
    let scene = Scene::new();
    for family in [0, 1] {
        let node = scene.cluster.topology().node(1).unwrap().addresses()[family];
        let from = SocketAddr::new(MACHINE[family].parse().unwrap(), 4000);
        scene.outside.send(scene.gateways[0], &Packet::udp(from, (node, scene.port).into(), b"truth\n")).unwrap();
        let told = |packet: &Packet| packet.ports()[1] == 5353 && packet.payload.ends_with(b"truth\n");
        scene.server.receive(LIMIT, |packet| told(packet).then_some(())).unwrap();
    }
}

#[test]
fn headers_that_contradict_themselves_are_dropped() {
    let scene = Scene::new();
    for family in [0, 1] {
        let node = scene.cluster.topology().node(1).unwrap().addresses()[family];
        let (own, target) = (SocketAddr::new(CLIENT_ADDRESSES[family], 4000), SocketAddr::new(node, scene.port));
        let lie = Packet::udp(own, target, b"lie\n");
        let dropped = |what: &str, bytes: &[u8]| scene.is_dropped("malformed", what, lie.ether_type(), bytes);
        if family == 0 {
            for first in [0x44, 0x40, 0x65] {
                let mut bytes = lie.bytes();
                bytes[0] = first;
                dropped(&format!("the first byte {first:#x}"), &bytes);
            }
            // Shorter than its headers, longer than the packet, and options that reach beyond its end.
            for length in [10_u16, 24, 500] {
                let mut bytes = lie.bytes();
                bytes[2..4].copy_from_slice(&length.to_be_bytes());
                dropped(&format!("a total length of {length}"), &bytes);
            }
            let mut bytes = lie.bytes();
            bytes[0] = 0x4f;
            dropped("options beyond the end", &bytes);
        } else {
            for length in [4_u16, 500] {
                let mut bytes = lie.bytes();
                bytes[4..6].copy_from_slice(&length.to_be_bytes());
                dropped(&format!("a payload length of {length}"), &bytes);
            }
        }
        let tcp = SocketAddr::new(node, scene.cluster.node_port("web", "TCP", 80).unwrap());
        for words in [0, 4] {
            let mut syn = Packet::tcp(own, tcp, 2, 1, &[]);
            syn.payload[12] = words << 4;
            dropped(&format!("a TCP header of {words} words"), &syn.bytes());
        }
        let mut cut = Packet::tcp(own, tcp, 2, 1, &[]);
        cut.payload.truncate(12);
        dropped("a TCP header that ends early", &cut.bytes());
    }
    scene.is_unharmed(&CLIENT_ADDRESSES);
}

#[test]
fn errors_that_end_early_harm_nobody() {
    let scene = Scene::new();
    for family in [0, 1] {
        let node = scene.cluster.topology().node(1).unwrap().addresses()[family];
        let kind = if family == 0 { [3, 4] } else { [2, 0] };
        let quoted =
            Packet::udp((node, 1024).into(), SocketAddr::new(MACHINE[family].parse().unwrap(), 5353), b"lie\n").bytes();
        for length in 0..quoted.len() {
            let error = Packet::icmp_error(CLIENT_ADDRESSES[family], node, kind, 0, &quoted[..length]);
            scene.outside.send(scene.gateways[0], &error).unwrap();
        }
    }
    scene.is_unharmed(&[]);
}

#[test]
fn a_claim_to_be_the_node_reaches_no_socket_of_the_node() {
    let scene = Scene::new();
    let node = scene.cluster.topology().node(1).unwrap();
    for family in [0, 1] {
        let ip = node.addresses()[family];
        let victim = node.netns().run(|| UdpSocket::bind((ip, 0))).unwrap().unwrap();
        victim.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let own = victim.local_addr().unwrap();
        let target = SocketAddr::new(scene.cluster.cluster_ips("web").unwrap()[family], 53);
        let lie = Packet::udp(own, target, b"who\n");
        scene.is_dropped("node_source", &own.to_string(), lie.ether_type(), &lie.bytes());
        assert!(victim.recv_from(&mut [0; 64]).is_err(), "an answer to a question that the node did not ask");
    }
}
