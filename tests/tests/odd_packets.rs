//! Packets that are legal and not plain: options, extension headers, no checksum, VLAN tags, tuples that are used again.
#![allow(
    missing_docs,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use serde_json::json;
use socket2::{Domain, Socket, Type};
use trama_lab::packet::Packet;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{CLIENT_ADDRESSES, Cluster, Place, Transport, Wire, link_address, patient, wait_for};

const LIMIT: Duration = Duration::from_secs(5);
/// Hop-by-hop options, routing, destination options.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;
const UDP: u8 = 17;
const PASSED: &str = "trama_dataplane_pass_total{reason=\"extension_headers\"}";

/// The pod `web` on the second node behind two Services, both with NodePorts.
fn start() -> Cluster {
    let cluster = Cluster::new().unwrap();
    cluster.apply_all([pod("web", 2, "web", &[8080], &[5353]), pod("client", 1, "client", &[], &[])]).unwrap();
    for name in ["web", "also"] {
        let service = ServiceManifest::new(name, Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
        let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
        cluster.apply(service.build()).unwrap();
    }
    cluster
}

/// A client outside with a socket and a wire, and the first node's NodePort.
struct Talk {
    wire: Wire,
    gateway: [u8; 6],
    socket: UdpSocket,
    own: SocketAddr,
    target: SocketAddr,
}

impl Talk {
    fn open(cluster: &Cluster, family: usize) -> Self {
        let (node, outside) = (cluster.topology().node(1).unwrap(), cluster.topology().client());
        let target = SocketAddr::new(node.addresses()[family], cluster.node_port("web", "UDP", 53).unwrap());
        cluster.wait_for_answers(&outside, target, Transport::Udp, &["web"]).unwrap();
        let any = if family == 0 { IpAddr::from([0, 0, 0, 0]) } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = outside.netns().run(|| UdpSocket::bind((any, 0))).unwrap().unwrap();
        socket.set_read_timeout(Some(patient(Duration::from_secs(1)))).unwrap();
        let own = SocketAddr::new(CLIENT_ADDRESSES[family], socket.local_addr().unwrap().port());
        let gateway = link_address(node.netns(), "eth0").unwrap();
        Self { wire: Wire::open(&outside, "eth0").unwrap(), gateway, socket, own, target }
    }

    fn question(&self) -> Packet {
        Packet::udp(self.own, self.target, b"who\n")
    }

    fn is_answered(&self, packet: &Packet) -> bool {
        self.wire.send(self.gateway, packet).unwrap();
        let mut answer = [0; 512];
        let Ok((length, from)) = self.socket.recv_from(&mut answer) else { return false };
        from == self.target && answer[..length].starts_with(b"web ")
    }
}

#[test]
fn ipv4_options_are_kept() {
    let cluster = start();
    let talk = Talk::open(&cluster, 0);
    let server = Wire::open(&cluster.place_in_pod("default/web").unwrap(), "eth0").unwrap();
    // Router alert (RFC 2113) and no-operations, up to the longest header.
    for options in [vec![148, 4, 0, 0], vec![1; 40]] {
        assert!(talk.is_answered(&Packet { options: options.clone(), ..talk.question() }), "{options:?}");
        let arrived = server.receive(LIMIT, |packet| (packet.options == options).then(|| packet.clone())).unwrap();
        assert!(arrived.checksum_is_right());
    }
}

#[test]
fn a_datagram_without_checksum_stays_without() {
    let cluster = start();
    let talk = Talk::open(&cluster, 0);
    let server = Wire::open(&cluster.place_in_pod("default/web").unwrap(), "eth0").unwrap();
    let mut question = talk.question();
    question.payload[6..8].fill(0);
    assert!(talk.is_answered(&question));
    let none = |packet: &Packet| packet.ports()[1] == 5353 && packet.payload[6..8] == [0, 0];
    server.receive(LIMIT, |packet| none(packet).then_some(())).unwrap();
}

/// An extension header of eight bytes times `length`.
fn extension(next: u8, length: u8) -> Vec<u8> {
    // An option that nobody knows and everybody is to skip (RFC 4727).
    let mut header = vec![next, length - 1, 0x1e, length * 8 - 4];
    header.resize(usize::from(length) * 8, 0);
    header
}

#[test]
fn ipv6_extension_headers_are_looked_through_and_kept() {
    let cluster = start();
    let talk = Talk::open(&cluster, 1);
    let with = |first, headers: &[Vec<u8>]| talk.question().with_extensions(first, headers.concat());
    // A routing header of an experimental type (RFC 4727) with no segments left.
    let routed = vec![UDP, 0, 253, 0, 0, 0, 0, 0];
    assert!(talk.is_answered(&with(HOP_BY_HOP, &[extension(UDP, 1)])));
    assert!(talk.is_answered(&with(DESTINATION, &[extension(UDP, 4)])));
    assert!(talk.is_answered(&with(ROUTING, &[routed])));
    assert!(
        talk.is_answered(&with(HOP_BY_HOP, &[extension(DESTINATION, 2), extension(DESTINATION, 1), extension(UDP, 3)]))
    );
    let four: Vec<_> = [DESTINATION, DESTINATION, DESTINATION, UDP].map(|next| extension(next, 1)).into();
    assert!(talk.is_answered(&with(DESTINATION, &four)));
    // One more than is looked through, and sixty-four: the node is left to say that nobody listens there.
    for count in [5, 64] {
        let mut chain: Vec<_> = vec![extension(DESTINATION, 1); count - 1];
        chain.push(extension(UDP, 1));
        assert!(!talk.is_answered(&with(DESTINATION, &chain)), "{count} headers");
    }
    wait_for("the count", LIMIT, || Ok((cluster.metrics(1)?.get(PASSED) == Some(&2.0)).then_some(()))).unwrap();
    // What has segments left is on its way to somebody else.
    let under_way = vec![UDP, 2, 253, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert!(!talk.is_answered(&with(ROUTING, &[under_way])));
}

#[test]
fn what_is_tagged_for_a_vlan_is_left_to_it() {
    let cluster = start();
    for family in [0, 1] {
        let talk = Talk::open(&cluster, family);
        let (question, ether_type) = (talk.question(), talk.question().ether_type().to_be_bytes());
        let is_answered = |tags: &[[u16; 2]]| {
            // Each tag is in front of the type of what it tags.
            let mut bytes: Vec<u8> = tags.iter().flatten().skip(1).flat_map(|word| word.to_be_bytes()).collect();
            bytes.extend(ether_type);
            bytes.extend(question.bytes());
            talk.wire.send_bytes(talk.gateway, tags[0][0], &bytes).unwrap();
            let mut answer = [0; 512];
            talk.socket.recv_from(&mut answer).is_ok_and(|(_, from)| from == talk.target)
        };
        // A priority and no VLAN: a packet of the interface itself.
        assert!(is_answered(&[[0x8100, 5 << 13]]));
        assert!(!is_answered(&[[0x8100, 7]]), "VLAN 7");
        assert!(!is_answered(&[[0x88a8, 8], [0x8100, 9]]), "VLAN 9 in VLAN 8");
    }
}

/// A connection from a fixed port.
fn connect(place: &Place, own: SocketAddr, target: SocketAddr) -> std::io::Result<TcpStream> {
    let open = || {
        let socket = Socket::new(Domain::for_address(own), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&own.into())?;
        socket.connect_timeout(&target.into(), patient(LIMIT))?;
        Ok(socket.into())
    };
    place.netns().run(open).unwrap()
}

fn ask(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(patient(LIMIT))).unwrap();
    stream.write_all(b"who\n").unwrap();
    let mut line = String::new();
    BufReader::new(&mut *stream).read_line(&mut line).unwrap();
    line
}

#[test]
fn a_closed_tuple_is_used_again_at_once() {
    let cluster = start();
    let outside = cluster.topology().client();
    let port = cluster.node_port("web", "TCP", 80).unwrap();
    for (family, ip) in cluster.topology().node(1).unwrap().addresses().into_iter().enumerate() {
        let target = SocketAddr::new(ip, port);
        cluster.wait_for_answers(&outside, target, Transport::Tcp, &["web"]).unwrap();
        let own = SocketAddr::new(CLIENT_ADDRESSES[family], 21000);
        for _ in 0..3 {
            // Once with a reset, once with the server's FIN first, after which nothing holds the client's port.
            let mut stream = connect(&outside, own, target).unwrap();
            assert!(ask(&mut stream).starts_with("web "));
            let socket = Socket::from(stream);
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            drop(socket);
            let mut stream = connect(&outside, own, target).unwrap();
            stream.set_read_timeout(Some(patient(LIMIT))).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.contains("web "), "{answer}");
        }
    }
}

#[test]
fn one_client_port_reaches_one_endpoint_through_two_services() {
    let cluster = start();
    let (outside, client) =
        (cluster.topology().client(), cluster.place_in_pod("default/client").unwrap().outside_cgroup());
    let own = cluster.pod_addresses("default/client").unwrap();
    for (family, node_ip) in cluster.topology().node(1).unwrap().addresses().into_iter().enumerate() {
        let services = ["web", "also"].map(|name| {
            let node_port = SocketAddr::new(node_ip, cluster.node_port(name, "TCP", 80).unwrap());
            let cluster_ip = SocketAddr::new(cluster.cluster_ips(name).unwrap()[family], 80);
            cluster.wait_for_answers(&outside, node_port, Transport::Tcp, &["web"]).unwrap();
            cluster.wait_for_answers(&client, cluster_ip, Transport::Tcp, &["web"]).unwrap();
            [node_port, cluster_ip]
        });
        for (way, place, own) in [(0, &outside, CLIENT_ADDRESSES[family]), (1, &client, own[family])] {
            let own = SocketAddr::new(own, 22000);
            let [mut first, mut second] = services.map(|service| connect(place, own, service[way]).unwrap());
            let lines = [ask(&mut first), ask(&mut second), ask(&mut first), ask(&mut second)];
            assert!(lines.iter().all(|line| line.starts_with("web ")), "{lines:?}");
            assert_eq!((&lines[0], &lines[1]), (&lines[2], &lines[3]), "each has its own tuple");
            assert_ne!(lines[0], lines[1]);
        }
    }
}
