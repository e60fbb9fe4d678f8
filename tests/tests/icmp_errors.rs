//! ICMP errors about translated packets reach whom they are for, and name the tuple that he knows.
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
use trama_lab::packet::{ICMP, ICMP6, Packet};
use trama_lab::scenario::{ServiceManifest, endpoint_slice, pod};
use trama_lab::{CLIENT_ADDRESSES, Cluster, Failure, Place, Probe, Transport, Wire, link_address, wait_for};

const LIMIT: Duration = Duration::from_secs(5);
/// Where no pod listens.
const CLOSED: u16 = 5999;
/// Type and code by family: too big, time exceeded, host unreachable; and a router that may have sent them.
const ERRORS: [[[u8; 2]; 3]; 2] = [[[3, 4], [11, 0], [3, 1]], [[2, 0], [3, 0], [1, 3]]];
const ROUTER: [&str; 2] = ["172.18.0.1", "fd00:172:18::1"];
const DROPPED: &str = "trama_dataplane_drop_total{reason=\"icmp_redirect\"}";

/// Two nodes, a client pod on the first and a server on the second; the Service's port 54 leads to where nobody listens.
fn start() -> Cluster {
    let cluster = Cluster::new().unwrap();
    cluster.apply_all([pod("web", 2, "web", &[8080], &[5353]), pod("client", 1, "client", &[], &[])]).unwrap();
    let service = ServiceManifest::new("web", Some("web")).port("UDP", 53, 5353).port("UDP", 54, CLOSED);
    let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply(service.build()).unwrap();
    let client = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
    for ip in cluster.cluster_ips("web").unwrap() {
        cluster.wait_for_answers(&client, (ip, 53).into(), Transport::Udp, &["web"]).unwrap();
    }
    cluster
}

/// A flow from outside through the first node's NodePort to the pod on the other one, one of each family.
struct Flow {
    client: Wire,
    server: Wire,
    /// Link-layer addresses of the next hops of both.
    gateways: [[u8; 6]; 2],
    /// Keeps the client's kernel from refusing the answers.
    _socket: UdpSocket,
    family: usize,
    own: SocketAddr,
    service: SocketAddr,
    /// The datagram as the client sent it, as the pod got it, and the answer as the client got it.
    sent: Packet,
    arrived: Packet,
    answer: Packet,
}

impl Flow {
    fn open(cluster: &Cluster, family: usize) -> Self {
        let (node, outside) = (cluster.topology().node(1).unwrap(), cluster.topology().client());
        let place = cluster.place_in_pod("default/web").unwrap();
        let interface = cluster.host_interface("default/web").unwrap();
        let (client, server) = (Wire::open(&outside, "eth0").unwrap(), Wire::open(&place, "eth0").unwrap());
        let other = cluster.topology().node(2).unwrap();
        let gateways = [link_address(node.netns(), "eth0").unwrap(), link_address(other.netns(), &interface).unwrap()];
        let ip = CLIENT_ADDRESSES[family];
        let socket = outside.netns().run(|| UdpSocket::bind((ip, 0))).unwrap().unwrap();
        let own = socket.local_addr().unwrap();
        let port = cluster.node_port("web", "UDP", 53).unwrap();
        let service = SocketAddr::new(node.addresses()[family], port);
        // The neighbours of both ends get to know each other.
        cluster.wait_for_answers(&outside, service, Transport::Udp, &["web"]).unwrap();
        let sent = Packet::udp(own, service, b"who\n");
        client.send(gateways[0], &sent).unwrap();
        let to_web =
            |packet: &Packet| (packet.ports()[1] == 5353 && packet.payload.ends_with(b"who\n")).then(|| packet.clone());
        let mut arrived = None;
        while arrived.as_ref().is_none_or(|packet: &Packet| !packet.checksum_is_right()) {
            arrived = Some(server.receive(LIMIT, to_web).unwrap());
        }
        let answer = client.receive(LIMIT, |packet| (packet.to() == own).then(|| packet.clone())).unwrap();
        assert_eq!(answer.from(), service);
        Self {
            client,
            server,
            gateways,
            _socket: socket,
            family,
            own,
            service,
            sent,
            arrived: arrived.unwrap(),
            answer,
        }
    }

    /// What the client is told when somebody behind the Service says this about the datagram.
    fn tell_client(&self, source: IpAddr, kind: [u8; 2], quoted: &[u8]) -> Packet {
        let error = Packet::icmp_error(source, self.arrived.source, kind, 1400, quoted);
        self.client.send(self.gateways[0], &error).unwrap();
        self.client.receive(LIMIT, |packet| is_error(packet, kind)).unwrap()
    }
}

fn is_error(packet: &Packet, kind: [u8; 2]) -> Option<Packet> {
    let is_icmp = packet.protocol == ICMP || packet.protocol == ICMP6;
    (is_icmp && packet.payload.starts_with(&kind)).then(|| packet.clone())
}

/// The start of a packet with so many bytes of its transport.
fn cut(packet: &Packet, length: usize) -> Vec<u8> {
    let bytes = packet.bytes();
    bytes[..bytes.len() - packet.payload.len() + length].to_vec()
}

#[test]
fn an_error_from_behind_the_service_names_the_client_s_tuple() {
    let cluster = start();
    for family in [0, 1] {
        let flow = Flow::open(&cluster, family);
        let pod = flow.arrived.destination;
        for kind in ERRORS[family] {
            for source in [ROUTER[family].parse().unwrap(), pod] {
                for length in [8, flow.arrived.payload.len()] {
                    let told = flow.tell_client(source, kind, &cut(&flow.arrived, length));
                    assert!(told.checksum_is_right(), "{kind:?} from {source}");
                    assert_eq!((told.source, told.destination), (flow.service.ip(), flow.own.ip()));
                    let quoted = told.quoted().unwrap();
                    assert_eq!((quoted.from(), quoted.to()), (flow.own, flow.service));
                    // The UDP checksum is among the first eight bytes: it is that of the datagram that the client sent.
                    assert_eq!(quoted.payload, flow.sent.payload[..length]);
                    assert_eq!(told.payload[6..8], 1400_u16.to_be_bytes(), "the MTU stays");
                }
            }
        }
    }
}

#[test]
fn an_error_about_an_answer_names_the_endpoint_s_tuple() {
    let cluster = start();
    for family in [0, 1] {
        let flow = Flow::open(&cluster, family);
        for kind in ERRORS[family] {
            let error = Packet::icmp_error(flow.own.ip(), flow.service.ip(), kind, 1400, &cut(&flow.answer, 8));
            flow.client.send(flow.gateways[0], &error).unwrap();
            let told = flow.server.receive(LIMIT, |packet| is_error(packet, kind)).unwrap();
            assert!(told.checksum_is_right(), "{kind:?}");
            assert_eq!((told.source, told.destination), (flow.arrived.source, flow.arrived.destination));
            let quoted = told.quoted().unwrap();
            assert_eq!((quoted.from(), quoted.to()), (flow.arrived.to(), flow.arrived.from()));
        }
    }
}

#[test]
fn a_quoted_tcp_checksum_is_that_of_the_client_s_packet() {
    let cluster = start();
    let service = ServiceManifest::new("tcp", Some("web")).port("TCP", 80, 8080).with("type", json!("NodePort"));
    cluster.apply(service.with("ipFamilyPolicy", json!("RequireDualStack")).build()).unwrap();
    let port = cluster.node_port("tcp", "TCP", 80).unwrap();
    for family in [0, 1] {
        let flow = Flow::open(&cluster, family);
        let outside = cluster.topology().client();
        let target = SocketAddr::new(flow.service.ip(), port);
        cluster.wait_for_answers(&outside, target, Transport::Tcp, &["web"]).unwrap();
        let syn = Packet::tcp((flow.own.ip(), 41234).into(), target, 2, 7, &[]);
        flow.client.send(flow.gateways[0], &syn).unwrap();
        let is_syn =
            |packet: &Packet| packet.protocol == 6 && packet.payload[4..8] == [0, 0, 0, 7] && packet.ports()[1] == 8080;
        let arrived = flow.server.receive(LIMIT, |packet| is_syn(packet).then(|| packet.clone())).unwrap();
        for (length, kind) in [(20, ERRORS[family][0]), (8, ERRORS[family][1])] {
            let told = flow.tell_client(ROUTER[family].parse().unwrap(), kind, &cut(&arrived, length));
            assert!(told.checksum_is_right());
            assert_eq!(told.quoted().unwrap().payload, syn.payload[..length]);
        }
    }
}

#[test]
fn a_refusal_of_the_endpoint_is_a_refusal_for_the_client() {
    let cluster = start();
    let node = cluster.topology().node(1).unwrap();
    let service = ServiceManifest::new("host", None).port("UDP", 54, CLOSED);
    let service = service.with("type", json!("NodePort"));
    cluster.apply(service.with("ipFamilyPolicy", json!("RequireDualStack")).build()).unwrap();
    for (name, ip) in ["host-v4", "host-v6"].into_iter().zip(node.addresses()) {
        let mut slice = endpoint_slice(name, "host", 54, CLOSED, &[ip]);
        slice["ports"][0]["protocol"] = json!("UDP");
        slice["ports"][0]["name"] = json!("udp-54");
        cluster.apply(slice).unwrap();
    }
    let pod = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
    let (own, outside) = (node.place().outside_cgroup(), cluster.topology().client());
    for name in ["web", "host"] {
        let port = cluster.node_port(name, "UDP", 54).unwrap();
        for (ip, node_ip) in cluster.cluster_ips(name).unwrap().into_iter().zip(node.addresses()) {
            for place in [&pod, &own] {
                is_refused(place, (ip, 54).into());
                is_refused(place, (node_ip, port).into());
            }
            is_refused(&outside, (node_ip, port).into());
        }
    }
}

#[test]
fn errors_about_what_is_no_service_s_are_left_alone() {
    let cluster = start();
    let pod = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
    for (node_ip, web) in
        cluster.topology().node(1).unwrap().addresses().into_iter().zip(cluster.pod_addresses("default/web").unwrap())
    {
        is_refused(&cluster.topology().client(), (node_ip, CLOSED).into());
        is_refused(&pod, (node_ip, CLOSED).into());
        is_refused(&pod, (web, CLOSED).into());
    }
}

fn is_refused(place: &Place, target: SocketAddr) {
    let probe = Probe { timeout: Duration::from_millis(500), ..Probe::new(target, Transport::UdpConnected) };
    let refused = wait_for("a refusal", LIMIT, || Ok((place.probe(probe)? == Err(Failure::Refused)).then_some(())));
    refused.unwrap_or_else(|error| panic!("{target} from {}: {error}", place.netns().label()));
}

#[test]
fn a_packet_without_hops_is_answered_in_the_service_s_name() {
    let cluster = start();
    for family in [0, 1] {
        let flow = Flow::open(&cluster, family);
        let hopless = Packet { hops: 1, ..flow.sent.clone() };
        flow.client.send(flow.gateways[0], &hopless).unwrap();
        let told = flow.client.receive(LIMIT, |packet| is_error(packet, ERRORS[family][1])).unwrap();
        assert!(told.checksum_is_right());
        assert_eq!((told.source, told.destination), (flow.service.ip(), flow.own.ip()));
        assert_eq!(told.payload[8..], hopless.bytes()[..told.payload.len() - 8], "quotes what the client sent");
    }
}

#[test]
fn redirects_of_translated_packets_are_dropped() {
    let cluster = start();
    let flow = Flow::open(&cluster, 0);
    assert_eq!(flow.family, 0);
    let redirect = Packet::icmp_error(flow.arrived.destination, flow.arrived.source, [5, 1], 0, &cut(&flow.arrived, 8));
    flow.server.send(flow.gateways[1], &redirect).unwrap();
    wait_for("the count", LIMIT, || Ok((cluster.metrics(1)?.get(DROPPED) == Some(&1.0)).then_some(()))).unwrap();
}
