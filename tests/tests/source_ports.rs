//! The ports that masqueraded flows get: none that something on the node has, none twice, and an end of them is counted.
#![allow(
    missing_docs,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use aya::maps::{Array, Map, MapData};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proxy_common::{NodeSettings, V4};
use serde_json::json;
use socket2::{Domain, Socket, Type};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{Cluster, Place, Transport, patient, wait_for};

const LIMIT: Duration = Duration::from_secs(5);
/// Ports that sockets of the node have, one that nobody has, and those of two tunnels.
const UDP_SOCKET: u16 = 21000;
const LISTENER: u16 = 21001;
const FREE: u16 = 21002;
const TUNNELS: [u16; 2] = [4789, 8472];
const EXHAUSTED: &str = "trama_dataplane_drop_total{reason=\"snat_ports_exhausted\"}";

/// The pod `web` on the second node behind a NodePort of the first.
fn start() -> Cluster {
    let cluster = Cluster::new().unwrap();
    cluster.apply(pod("web", 2, "web", &[8080], &[5353])).unwrap();
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply(service.build()).unwrap();
    for family in [0, 1] {
        for transport in [Transport::Tcp, Transport::Udp] {
            let target = node_port(&cluster, family, transport);
            cluster.wait_for_answers(&cluster.topology().client(), target, transport, &["web"]).unwrap();
        }
    }
    cluster
}

fn node_port(cluster: &Cluster, family: usize, transport: Transport) -> SocketAddr {
    let (name, port) = if transport == Transport::Tcp { ("TCP", 80) } else { ("UDP", 53) };
    let ip = cluster.topology().node(1).unwrap().addresses()[family];
    SocketAddr::new(ip, cluster.node_port("web", name, port).unwrap())
}

fn any(like: SocketAddr) -> IpAddr {
    if like.is_ipv4() { IpAddr::from([0, 0, 0, 0]) } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// From which port the endpoint sees a datagram that the client sends from `port`.
fn udp_seen(place: &Place, port: u16, target: SocketAddr) -> u16 {
    let socket = place.netns().run(|| UdpSocket::bind((any(target), port))).unwrap().unwrap();
    socket.set_read_timeout(Some(patient(LIMIT))).unwrap();
    socket.send_to(b"who\n", target).unwrap();
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer).unwrap();
    seen(std::str::from_utf8(&answer[..length]).unwrap())
}

/// The port in the second word of an answer.
fn seen(line: &str) -> u16 {
    line.split(' ').nth(1).unwrap().parse::<SocketAddr>().unwrap().port()
}

/// A connection from a port of the client's; closing it resets it.
fn connect(place: &Place, port: u16, target: SocketAddr) -> std::io::Result<TcpStream> {
    let open = || {
        let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_linger(Some(Duration::ZERO))?;
        socket.bind(&SocketAddr::new(any(target), port).into())?;
        socket.connect_timeout(&target.into(), patient(Duration::from_secs(2)))?;
        Ok(socket.into())
    };
    place.netns().run(open).unwrap()
}

fn tcp_seen(place: &Place, port: u16, target: SocketAddr) -> u16 {
    use std::io::{BufRead, BufReader, Write};
    let mut stream = connect(place, port, target).unwrap();
    stream.set_read_timeout(Some(patient(LIMIT))).unwrap();
    stream.write_all(b"who\n").unwrap();
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    seen(&line)
}

#[test]
fn what_the_node_uses_is_not_given_away() {
    let cluster = start();
    let (node, outside) = (cluster.topology().node(1).unwrap(), cluster.topology().client());
    let everywhere = Ipv6Addr::UNSPECIFIED;
    let _socket = node.netns().run(|| UdpSocket::bind((everywhere, UDP_SOCKET))).unwrap().unwrap();
    let _listener = node.netns().run(|| TcpListener::bind((everywhere, LISTENER))).unwrap().unwrap();
    for family in [0, 1] {
        let (udp, tcp) = (node_port(&cluster, family, Transport::Udp), node_port(&cluster, family, Transport::Tcp));
        for port in TUNNELS.into_iter().chain([UDP_SOCKET]) {
            assert_ne!(udp_seen(&outside, port, udp), port, "UDP, {udp}");
        }
        assert_ne!(tcp_seen(&outside, LISTENER, tcp), LISTENER, "TCP, {tcp}");
        // What nobody has is kept, of either protocol.
        assert_eq!((udp_seen(&outside, FREE, udp), tcp_seen(&outside, FREE, tcp)), (FREE, FREE), "{udp}");
        assert_eq!((udp_seen(&outside, LISTENER, udp), tcp_seen(&outside, TUNNELS[0], tcp)), (LISTENER, TUNNELS[0]));
    }
}

/// Gives the programs of the first node another range of ports, which trama-proxy would take back if it ran.
fn limit_ports(cluster: &Cluster, min: u16, max: u16) {
    let pins = cluster.topology().node(1).unwrap().bpffs().join("trama");
    let version = std::fs::read_dir(&pins).unwrap().next().unwrap().unwrap().path();
    let map = Map::from_map_data(MapData::from_pin(version.join("maps/NODE_V4")).unwrap()).unwrap();
    // The masquerade address, then both ends of the range.
    let mut node: Array<MapData, [u8; SETTINGS_LENGTH]> = map.try_into().unwrap();
    let mut settings = node.get(&0, 0).unwrap();
    settings[4..6].copy_from_slice(&min.to_ne_bytes());
    settings[6..8].copy_from_slice(&max.to_ne_bytes());
    node.set(0, settings, 0).unwrap();
}

/// Bytes of the settings.
const SETTINGS_LENGTH: usize = size_of::<NodeSettings<V4>>();

#[test]
fn the_end_of_the_ports_is_clean_and_closed_ones_are_used_again() {
    let cluster = start();
    let outside = cluster.topology().client();
    let target = node_port(&cluster, 0, Transport::Tcp);
    let proxy = Pid::from_raw(i32::try_from(cluster.proxy_pid(1).unwrap()).unwrap());
    kill(proxy, Signal::SIGSTOP).unwrap();
    limit_ports(&cluster, 20000, 20003);
    let mut open: Vec<TcpStream> = (23000..23004).map(|port| connect(&outside, port, target).unwrap()).collect();
    let refused = connect(&outside, 23004, target).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::TimedOut, "silence, as from a full table");
    // A port whose connection was reset serves the next one.
    drop(open.remove(1));
    let again = wait_for("a port", LIMIT, || Ok(connect(&outside, 23005, target).ok())).unwrap();
    assert!(connect(&outside, 23006, target).is_err());
    drop((again, open));
    // The only port of the range is a NodePort.
    limit_ports(&cluster, target.port(), target.port());
    assert!(connect(&outside, 23007, target).is_err());
    kill(proxy, Signal::SIGCONT).unwrap();
    let exhausted = wait_for("the count", LIMIT, || Ok(cluster.metrics(1)?.get(EXHAUSTED).copied())).unwrap();
    assert!(exhausted >= 3.0, "{exhausted}");
    // The range comes back, and with it all connections.
    wait_for("the whole range", Duration::from_secs(15), || Ok(connect(&outside, 23008, target).ok())).unwrap();
}
