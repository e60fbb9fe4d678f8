//! A smaller MTU behind a Service: its clients are told, and what may be cut is cut.
#![allow(
    missing_docs,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::json;
use trama_lab::packet::{ICMP, ICMP6, Packet};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{CLIENT_ADDRESSES, Cluster, Place, Wire, link_address, patient, wait_for};

const LIMIT: Duration = Duration::from_secs(5);
/// What the endpoint's link takes.
const SMALL: u16 = 1300;
const TCP_PORT: u16 = 9000;
const UDP_PORT: u16 = 9001;
/// Bytes of a TCP transfer.
const TRANSFER: usize = 2 << 20;
const CUT: &str = "trama_dataplane_pass_total{reason=\"fragmented\"}";
/// Too big, by family.
const TOO_BIG: [[u8; 2]; 2] = [[3, 4], [2, 0]];

/// The pod `web` on the first node, behind a link that takes less than all others.
fn start() -> Cluster {
    let cluster = Cluster::new().unwrap();
    cluster.apply_all([pod("web", 1, "web", &[], &[]), pod("client", 2, "client", &[], &[])]).unwrap();
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, TCP_PORT).port("UDP", 53, UDP_PORT);
    let service = service.with("type", json!("NodePort"));
    cluster.apply(service.with("ipFamilyPolicy", json!("RequireDualStack")).build()).unwrap();
    let place = cluster.place_in_pod("default/web").unwrap();
    serve(&place);
    limit_route(&cluster);
    cluster
}

/// The node's routes to the pod take [`SMALL`] packets. Both ends of the link itself take more, so that nobody knows before he is told.
fn limit_route(cluster: &Cluster) {
    let node = cluster.topology().node(1).unwrap();
    let interface = cluster.host_interface("default/web").unwrap();
    for address in cluster.pod_addresses("default/web").unwrap() {
        let mut ip = Command::new("ip");
        ip.args(["-n", node.netns().label(), "route", "replace", &address.to_string(), "dev", &interface]);
        // The route lookup of a program heeds the MTU of a route only where it is locked (`ip_mtu_from_fib_result`).
        assert!(ip.args(["mtu", "lock", &SMALL.to_string()]).status().unwrap().success());
    }
}

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

/// Sends a large piece there and back over one connection.
fn transfer(place: &Place, target: SocketAddr) {
    let transferred = wait_for("a transfer", CHANGE_LIMIT, || {
        let Ok(mut stream) = place.connect(target, LIMIT) else { return Ok(None) };
        stream.set_read_timeout(Some(patient(LIMIT)))?;
        stream.set_write_timeout(Some(patient(LIMIT)))?;
        let sent: Vec<u8> = (0..TRANSFER).map(|byte| (byte / 7) as u8).collect();
        let mut back = vec![0; TRANSFER];
        stream.write_all(&sent)?;
        stream.read_exact(&mut back)?;
        Ok((sent == back).then_some(()))
    });
    transferred.unwrap_or_else(|error| panic!("{target} from {}: {error}", place.netns().label()));
}

#[test]
fn connections_find_the_path_s_mtu() {
    let cluster = start();
    let client = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
    let outside = cluster.topology().client();
    let (near, far) = (cluster.topology().node(1).unwrap(), cluster.topology().node(2).unwrap());
    let port = cluster.node_port("web", "TCP", 80).unwrap();
    for (family, ip) in cluster.cluster_ips("web").unwrap().into_iter().enumerate() {
        // The small link is this node's own, or beyond another one.
        transfer(&outside, (near.addresses()[family], port).into());
        transfer(&outside, (far.addresses()[family], port).into());
        transfer(&client, (ip, 80).into());
        transfer(&near.place().outside_cgroup(), (ip, 80).into());
        transfer(&far.place().outside_cgroup(), (ip, 80).into());
    }
}

#[test]
fn a_too_big_datagram_is_answered_with_the_mtu_and_the_client_s_tuple() {
    let cluster = start();
    let node = cluster.topology().node(1).unwrap();
    let outside = cluster.topology().client();
    let gateway = link_address(node.netns(), "eth0").unwrap();
    let port = cluster.node_port("web", "UDP", 53).unwrap();
    for (family, node_ip) in node.addresses().into_iter().enumerate() {
        let target = SocketAddr::new(node_ip, port);
        let socket = bind(&outside, target.ip());
        is_given_back(&socket, target, 100);
        let own = SocketAddr::new(CLIENT_ADDRESSES[family], socket.local_addr().unwrap().port());
        let wire = Wire::open(&outside, "eth0").unwrap();
        let sent = Packet::udp(own, target, &[1; 1400]);
        wire.send(gateway, &sent).unwrap();
        let is_answer =
            |packet: &Packet| packet.payload.starts_with(&TOO_BIG[family]) && [ICMP, ICMP6].contains(&packet.protocol);
        let told = wire.receive(LIMIT, |packet| is_answer(packet).then(|| packet.clone()));
        let told = told.unwrap_or_else(|error| panic!("{target}: {error}"));
        assert!(told.checksum_is_right());
        assert_eq!((told.source, told.destination), (target.ip(), own.ip()));
        assert_eq!(told.payload[6..8], SMALL.to_be_bytes());
        assert_eq!(told.payload[8..], sent.bytes()[..told.payload.len() - 8]);
        // The client's kernel believes it, and cuts what it sends from now on.
        is_given_back(&socket, target, 1400);
        is_given_back(&socket, target, 8000);
    }
}

#[test]
fn what_may_be_cut_is_cut() {
    let cluster = start();
    let (node, outside) = (cluster.topology().node(1).unwrap(), cluster.topology().client());
    let gateway = link_address(node.netns(), "eth0").unwrap();
    let target = SocketAddr::new(node.addresses()[0], cluster.node_port("web", "UDP", 53).unwrap());
    let socket = bind(&outside, target.ip());
    is_given_back(&socket, target, 100);
    let own = SocketAddr::new(CLIENT_ADDRESSES[0], socket.local_addr().unwrap().port());
    let wire = Wire::open(&outside, "eth0").unwrap();
    for length in [1400, 1472, 5000] {
        let question = vec![length as u8; length];
        // What fits the client's link goes whole, the rest in fragments that are cut again.
        let mut cut = Packet::udp(own, target, &question).fragments(length as u32, 1480);
        cut.iter_mut()
            .filter(|packet| packet.fragment.is_some_and(|(_, offset, more)| offset == 0 && !more))
            .for_each(|packet| packet.fragment = None);
        cut.iter().for_each(|packet| wire.send(gateway, packet).unwrap());
        assert!(comes_back(&socket, target, &question), "{length} bytes");
    }
    // Two whole ones, and the three of four fragments that are longer than the link takes.
    let cut = cluster.metrics(1).unwrap().get(CUT).copied();
    assert_eq!(cut, Some(5.0));
}

fn bind(place: &Place, like: IpAddr) -> UdpSocket {
    let any: IpAddr = if like.is_ipv4() { [0, 0, 0, 0].into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = place.netns().run(|| UdpSocket::bind((any, 0))).unwrap().unwrap();
    socket.set_read_timeout(Some(patient(Duration::from_millis(500)))).unwrap();
    socket
}

fn comes_back(socket: &UdpSocket, target: SocketAddr, question: &[u8]) -> bool {
    let mut answer = vec![0; 1 << 16];
    loop {
        match socket.recv_from(&mut answer) {
            Ok((length, from)) if from == target && answer[..length] == *question => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
}

fn is_given_back(socket: &UdpSocket, target: SocketAddr, length: usize) {
    let question = vec![length as u8; length];
    let given_back = wait_for("the answer", CHANGE_LIMIT, || {
        socket.send_to(&question, target)?;
        Ok(comes_back(socket, target, &question).then_some(()))
    });
    given_back.unwrap_or_else(|error| panic!("{length} bytes to {target}: {error}"));
}
