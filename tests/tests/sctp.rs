//! SCTP through a Service, packet by packet: ports are translated and the checksum (CRC32c) of every packet stays right.
//!
//! The packets are made by hand: no SCTP is needed in the kernel.
#![allow(
    missing_docs,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{Cluster, Place, wait_for};

/// IP protocol number.
const SCTP: i32 = 132;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const DATA: u8 = 0;
/// What a kernel that has SCTP loaded answers for us, as it knows no socket of ours.
const ABORT: u8 = 6;
const PORT_UNREACHABLE: [[u8; 2]; 2] = [[3, 3], [1, 4]];

/// CRC32c by its definition (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

/// A packet with one chunk of `length` bytes, and the right checksum.
fn packet(source: u16, destination: u16, chunk: u8, length: u16) -> Vec<u8> {
    let mut packet = Vec::from(source.to_be_bytes());
    packet.extend(destination.to_be_bytes());
    packet.extend([0; 8]);
    packet.extend([chunk, 0]);
    packet.extend(length.to_be_bytes());
    packet.extend((4..length).map(|byte| (byte * 31) as u8));
    let checksum = crc32c(&packet);
    packet[8..12].copy_from_slice(&checksum.to_le_bytes());
    packet
}

fn checksum_is_right(packet: &[u8]) -> bool {
    let mut blank = packet.to_vec();
    blank[8..12].fill(0);
    packet[8..12] == crc32c(&blank).to_le_bytes()
}

fn port(packet: &[u8], offset: usize) -> u16 {
    u16::from_be_bytes([packet[offset], packet[offset + 1]])
}

/// A socket that sees every packet of a protocol.
struct Raw(UdpSocket, i32);

impl Raw {
    fn open(place: &Place, family: IpAddr, protocol: i32) -> Self {
        let domain = Domain::for_address((family, 0).into());
        let open = || Socket::new(domain, Type::RAW, Some(Protocol::from(protocol))).unwrap();
        let socket = UdpSocket::from(place.netns().run(open).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        Self(socket, protocol)
    }

    fn send(&self, packet: &[u8], to: IpAddr) {
        self.0.send_to(packet, (to, 0)).unwrap();
    }

    /// The next packet and its sender; over IPv4 the socket gives the IP header as well.
    fn receive(&self) -> Option<(Vec<u8>, IpAddr)> {
        let mut buffer = vec![0; 65536];
        loop {
            let (length, from) = self.0.recv_from(&mut buffer).ok()?;
            let header = if from.is_ipv4() { 20 } else { 0 };
            let packet = &buffer[header..length];
            if !(self.1 == SCTP && packet.get(12) == Some(&ABORT)) {
                return Some((packet.to_vec(), from.ip()));
            }
        }
    }
}

/// A dual-stack cluster with one server, a client on the other node and an SCTP Service from port 3868 to 8868.
fn start(selector: &str) -> (Cluster, Place, Place) {
    let cluster = Cluster::new().unwrap();
    cluster.apply_all([pod("server", 2, "server", &[], &[]), pod("client", 1, "client", &[], &[])]).unwrap();
    let service = ServiceManifest::new("diameter", Some(selector)).port("SCTP", 3868, 8868);
    let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply(service.build()).unwrap();
    let (client, server) = (cluster.place_in_pod("default/client"), cluster.place_in_pod("default/server"));
    let (client, server) = (client.unwrap(), server.unwrap());
    (cluster, client, server)
}

/// Sends INITs until the server has one, which it returns with its sender.
fn knock(client: &Raw, server: &Raw, to: IpAddr, port: u16) -> (Vec<u8>, IpAddr) {
    let arrived = wait_for("an INIT at the server", CHANGE_LIMIT, || {
        client.send(&packet(40000, port, INIT, 20), to);
        Ok(server.receive())
    });
    arrived.unwrap_or_else(|error| panic!("{to} port {port}: {error}"))
}

/// One association's packets there and back: `seen` is whom the server must see, where that is known.
fn talk(client: &Raw, server: &Raw, to: IpAddr, port_named: u16, seen: Option<IpAddr>) {
    let (init, from) = knock(client, server, to, port_named);
    let source_port = port(&init, 0);
    assert_eq!((port(&init, 2), init[12]), (8868, INIT));
    assert!(checksum_is_right(&init), "{to}: {init:?}");
    if let Some(seen) = seen {
        assert_eq!((from, source_port), (seen, 40000));
    }
    // As often as the client would ask again (RFC 9260, 5.1): nothing says that the first one arrives.
    let answer = wait_for("the INIT ACK", CHANGE_LIMIT, || {
        server.send(&packet(8868, source_port, INIT_ACK, 32), from);
        Ok(client.receive())
    });
    let (answer, answered_by) = answer.unwrap();
    assert_eq!((answered_by, port(&answer, 0), port(&answer, 2), answer[12]), (to, port_named, 40000, INIT_ACK));
    assert!(checksum_is_right(&answer), "{to}: {answer:?}");
    // Every length of a chunk gives another distance from the ports to the end.
    for length in [16, 17, 100, 1000, 1440] {
        client.send(&packet(40000, port_named, DATA, length), to);
        let data = wait_for("the data", CHANGE_LIMIT, || Ok(server.receive().filter(|(data, _)| data[12] == DATA)));
        let (data, _) = data.unwrap();
        assert_eq!((port(&data, 0), port(&data, 2), data.len()), (source_port, 8868, 12 + usize::from(length)));
        assert!(checksum_is_right(&data), "{to}, {length} bytes");
    }
    // A checksum that was wrong stays wrong: the endpoint must find out.
    let mut damaged = packet(40000, port_named, DATA, 64);
    damaged[20] ^= 1;
    client.send(&damaged, to);
    let (damaged, _) = server.receive().expect("the damaged packet");
    assert!(!checksum_is_right(&damaged));
}

#[test]
fn packets_are_translated_there_and_back_with_right_checksums() {
    let (cluster, client, server) = start("server");
    let outside = cluster.topology().client();
    let node_port = cluster.node_port("diameter", "SCTP", 3868).unwrap();
    let own: [IpAddr; 2] = ["10.244.1.2".parse().unwrap(), "fd00:10:244:1::2".parse().unwrap()];
    let nodes = cluster.topology().node(1).unwrap().addresses();
    for (index, cluster_ip) in cluster.cluster_ips("diameter").unwrap().into_iter().enumerate() {
        let at_server = Raw::open(&server, cluster_ip, SCTP);
        talk(&Raw::open(&client, cluster_ip, SCTP), &at_server, cluster_ip, 3868, Some(own[index]));
        talk(&Raw::open(&outside, cluster_ip, SCTP), &at_server, nodes[index], node_port, None);
        // From the server's own node too, to the ClusterIP and over `lo` to the node's own NodePort.
        let other = cluster.topology().node(2).unwrap();
        for node in [cluster.topology().node(1).unwrap(), other] {
            talk(&Raw::open(&node.place(), cluster_ip, SCTP), &at_server, cluster_ip, 3868, None);
        }
        let at_other = Raw::open(&other.place(), cluster_ip, SCTP);
        talk(&at_other, &at_server, other.addresses()[index], node_port, None);
    }
}

#[test]
fn no_endpoint_and_no_such_port_are_refused() {
    let (cluster, client, _) = start("nobody");
    for ip in cluster.cluster_ips("diameter").unwrap() {
        let (icmp, unreachable) = if ip.is_ipv4() { (1, PORT_UNREACHABLE[0]) } else { (58, PORT_UNREACHABLE[1]) };
        let (sctp, answers) = (Raw::open(&client, ip, SCTP), Raw::open(&client, ip, icmp));
        for port in [3868, 3869] {
            let init = packet(40000, port, INIT, 20);
            let quoted = wait_for("a refusal", CHANGE_LIMIT, || {
                sctp.send(&init, ip);
                Ok(answers.receive().filter(|(answer, from)| *from == ip && answer.starts_with(&unreachable)))
            });
            let (quoted, _) = quoted.unwrap_or_else(|error| panic!("{ip} port {port}: {error}"));
            assert!(quoted.ends_with(&init[..20]), "the refusal quotes the header and the initiate tag: {quoted:?}");
        }
    }
}
