//! Direct server return and packets that do not fit into the tunnel: connections never meet them, and who sends datagrams is told.
#![allow(
    missing_docs,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::thread;
use std::time::Duration;

use serde_json::json;
use trama_lab::packet::{ICMP, ICMP6, Packet};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{CLIENT_ADDRESSES, Cluster, ClusterOptions, FrameLinks, Place, Wire, link_address, patient, wait_for};

const LIMIT: Duration = Duration::from_secs(5);
/// Where [`serve`] listens.
const TCP_PORT: u16 = 9000;
const UDP_PORT: u16 = 9001;
const TRANSFER: usize = 2 << 20;

/// Counts what comes over TCP and sends as much back, and gives datagrams back.
fn serve(place: &Place) {
    let listener = place.netns().run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, TCP_PORT))).unwrap().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || -> std::io::Result<()> {
                let mut all = vec![0; TRANSFER];
                stream.read_exact(&mut all)?;
                stream.write_all(&all)
            });
        }
    });
    let socket = place.netns().run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, UDP_PORT))).unwrap().unwrap();
    thread::spawn(move || {
        let mut datagram = vec![0; 1 << 16];
        while let Ok((length, from)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..length], from);
        }
    });
}

fn transfer(client: &Place, target: SocketAddr) {
    let mut stream = client.connect(target, patient(LIMIT)).unwrap();
    stream.set_read_timeout(Some(patient(LIMIT))).unwrap();
    stream.set_write_timeout(Some(patient(LIMIT))).unwrap();
    let sent: Vec<u8> = (0..TRANSFER).map(|byte| (byte / 7) as u8).collect();
    let mut back = vec![0; TRANSFER];
    stream.write_all(&sent).unwrap();
    stream.read_exact(&mut back).unwrap();
    assert!(sent == back, "{target}: other bytes came back");
}

/// What a segment may hold, by the SYN in this packet.
fn segment_size(packet: &Packet) -> Option<u16> {
    let options = packet.payload.get(20..)?;
    let at = options.windows(2).position(|pair| pair == [2, 4])?;
    Some(u16::from_be_bytes([*options.get(at + 2)?, *options.get(at + 3)?]))
}

fn large_packets(arguments: &'static [&'static str], headers: [u16; 2], frames: bool) {
    let options = ClusterOptions { nodes: 2, proxy_arguments: arguments, ..ClusterOptions::default() };
    let cluster = Cluster::start(&options).unwrap();
    let _links = frames.then(|| FrameLinks::of(cluster.topology()).unwrap());
    cluster.apply(pod("big", 2, "big", &[], &[])).unwrap();
    serve(&cluster.place_in_pod("default/big").unwrap());
    let service = ServiceManifest::new("big", Some("big")).port("TCP", 80, TCP_PORT).port("UDP", 53, UDP_PORT);
    let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply(service.build()).unwrap();
    let (node, client) = (cluster.topology().node(1).unwrap(), cluster.topology().client());
    let [tcp, udp] = [("TCP", 80), ("UDP", 53)].map(|(kind, port)| cluster.node_port("big", kind, port).unwrap());
    let gateway = link_address(node.netns(), "eth0").unwrap();
    for (family, ip) in node.addresses().into_iter().enumerate() {
        let (target, mtu) = (SocketAddr::new(ip, udp), 1500 - headers[family]);
        let any: IpAddr = if ip.is_ipv4() { [0, 0, 0, 0].into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = client.netns().run(|| UdpSocket::bind((any, 0))).unwrap().unwrap();
        socket.set_read_timeout(Some(patient(Duration::from_millis(500)))).unwrap();
        is_given_back(&socket, target, 100);
        // A connection never meets the MTU: it is told at its beginning.
        let wire = Wire::open(&client, "eth0").unwrap();
        transfer(&client, (ip, tcp).into());
        let answer = |packet: &Packet| (packet.from() == (ip, tcp).into()).then(|| segment_size(packet)).flatten();
        let segment = wire.receive(LIMIT, answer).unwrap();
        assert_eq!(segment, mtu - if family == 0 { 40 } else { 60 }, "{ip}");
        let own = SocketAddr::new(CLIENT_ADDRESSES[family], socket.local_addr().unwrap().port());
        let wire = Wire::open(&client, "eth0").unwrap();
        let longest = usize::from(mtu) - if family == 0 { 28 } else { 48 };
        wire.send(gateway, &Packet::udp(own, target, &vec![1; longest + 1])).unwrap();
        let told = wire.receive(LIMIT, |packet| {
            let is_error = [ICMP, ICMP6].contains(&packet.protocol);
            (is_error && packet.payload.starts_with(&[[3, 4], [2, 0]][family])).then(|| packet.clone())
        });
        let told = told.unwrap_or_else(|error| panic!("{target}: {error}"));
        assert!(told.checksum_is_right());
        assert_eq!((told.source, told.payload[6..8].to_vec()), (ip, mtu.to_be_bytes().to_vec()));
        // The client's kernel believes it; what it cuts then goes through the tunnel in pieces.
        for length in [longest, longest + 1, 8000] {
            is_given_back(&socket, target, length);
        }
    }
}

fn is_given_back(socket: &UdpSocket, target: SocketAddr, length: usize) {
    let question = vec![length as u8; length];
    let given_back = wait_for("the answer", CHANGE_LIMIT, || {
        socket.send_to(&question, target)?;
        let mut answer = vec![0; 1 << 16];
        let received = socket.recv_from(&mut answer);
        Ok(received.is_ok_and(|(got, from)| from == target && answer[..got] == *question).then_some(()))
    });
    given_back.unwrap_or_else(|error| panic!("{length} bytes to {target}: {error}"));
}

#[test]
fn large_packets_fit_or_their_sender_is_told() {
    large_packets(&["--forwarding", "dsr"], [20, 40], false);
}

#[test]
fn large_packets_fit_into_gue_or_their_sender_is_told() {
    large_packets(&["--forwarding", "dsr", "--dsr-tunnel", "gue"], [28, 48], false);
}

#[test]
fn large_frames_fit_or_their_sender_is_told() {
    large_packets(&["--forwarding", "dsr", "--xdp-interfaces", "eth0"], [20, 40], true);
}
