//! What is told between the eBPF programs and conntrack when proxies are exchanged; `cargo xtask migration` does it with kube-proxy.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use node_sys::conntrack::{Conntrack, Entry, Filter, Translation, Tuple};
use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{CLIENT_ADDRESSES, Cluster, ClusterOptions, EchoReply, Transport, patient, wait_for};

const SERVERS: [&str; 4] = ["web-1", "web-2", "web-3", "web-4"];
const LIMIT: Duration = Duration::from_secs(10);
const TCP: u8 = 6;
const UDP: u8 = 17;

#[test]
fn datagrams_stay_where_conntrack_sent_them() {
    let cluster = start(false);
    let endpoints = cluster.pod_addresses("default/web-3").unwrap();
    let node = cluster.topology().node(1).unwrap();
    let port = cluster.node_port("web", "UDP", 80).unwrap();
    let mut flows = Vec::new();
    for ((client, node), endpoint) in CLIENT_ADDRESSES.into_iter().zip(node.addresses()).zip(endpoints) {
        for number in 0..8 {
            let arriving = tuple((client, 40_000 + number), (node, port));
            let leaving = tuple((node, 45_000 + number), (endpoint, 8080));
            flows.push(Translation { protocol: UDP, arriving, leaving });
        }
    }
    let told = |flow| Conntrack::open().unwrap().replace(flow, 600).unwrap();
    node.netns().run(|| flows.iter().for_each(told)).unwrap();
    cluster.restart_proxy(1).unwrap();
    for flow in flows {
        let socket = in_client(&cluster, || UdpSocket::bind(flow.arriving.source).unwrap());
        let reply = wait_for("the first answer", LIMIT, || Ok(ask_by_datagram(&socket, flow.arriving.destination)));
        let reply = reply.unwrap();
        assert_eq!((reply.name.as_str(), reply.peer), ("web-3", flow.leaving.source), "{flow:?}");
    }
}

/// kube-proxy's ipvs mode masquerades IPv6 with a Service's address, which the node then has on an interface of its own.
#[test]
fn an_endpoint_s_own_datagrams_stay_behind_a_service_s_address() {
    let cluster = start(false);
    cluster
        .apply(
            ServiceManifest::new("other", Some("web"))
                .port("TCP", 443, 8080)
                .with("ipFamilyPolicy", json!("RequireDualStack"))
                .build(),
        )
        .unwrap();
    let node = cluster.topology().node(1).unwrap();
    let place = cluster.place_in_pod("default/web-1").unwrap();
    let own = cluster.pod_addresses("default/web-1").unwrap();
    let of = |name: &str, own: &IpAddr| {
        let all = cluster.cluster_ips(name).unwrap();
        all.into_iter().find(|ip| ip.is_ipv4() == own.is_ipv4()).unwrap()
    };
    let flow = |own: IpAddr| Translation {
        protocol: UDP,
        arriving: tuple((own, 40_000), (of("web", &own), 80)),
        leaving: tuple((of("other", &own), 45_000), (own, 8080)),
    };
    let flows = own.map(flow);
    let told = |flow| Conntrack::open().unwrap().replace(flow, 600).unwrap();
    node.netns().run(|| flows.iter().for_each(told)).unwrap();
    cluster.restart_proxy(1).unwrap();
    for flow in flows {
        let socket = place.netns().run(|| UdpSocket::bind(flow.arriving.source).unwrap()).unwrap();
        let reply = wait_for("the first answer", LIMIT, || Ok(ask_by_datagram(&socket, flow.arriving.destination)));
        let reply = reply.unwrap();
        assert_eq!((reply.name.as_str(), reply.peer), ("web-1", flow.leaving.source), "{flow:?}");
    }
}

#[test]
fn conntrack_is_told_of_what_lives_and_of_its_ports() {
    let cluster = start(true);
    let node = cluster.topology().node(1).unwrap();
    let [tcp, udp] = ["TCP", "UDP"].map(|protocol| cluster.node_port("web", protocol, 80).unwrap());
    let (mut kept, mut expected) = (Vec::new(), Vec::new());
    for (client, node) in CLIENT_ADDRESSES.into_iter().zip(node.addresses()) {
        let target = SocketAddr::new(node, tcp);
        let stream = in_client(&cluster, || TcpStream::connect_timeout(&target, patient(LIMIT)).unwrap());
        expected.push((TCP, tuple(stream.local_addr().unwrap(), target), ask(&stream)));
        let socket = in_client(&cluster, || UdpSocket::bind((client, 0)).unwrap());
        let target = SocketAddr::new(node, udp);
        let reply = wait_for("an answer", LIMIT, || Ok(ask_by_datagram(&socket, target))).unwrap();
        expected.push((UDP, tuple(socket.local_addr().unwrap(), target), reply));
        kept.push((stream, socket));
    }
    cluster.kill_proxy(1).unwrap();
    // Another connection, whose source port conntrack changed to one of ours, as it does not know of ours.
    node.netns()
        .run(|| {
            for (protocol, arriving, reply) in &expected {
                let stranger = SocketAddr::new(arriving.source.ip(), 1);
                let translation = Translation {
                    protocol: *protocol,
                    arriving: tuple(stranger, reply.local),
                    leaving: tuple(reply.peer, reply.local),
                };
                Conntrack::open().unwrap().replace(&translation, 600).unwrap();
            }
        })
        .unwrap();
    let mut cleanup = cluster.proxy_command(1, &["--cleanup"]).unwrap();
    assert!(node.place().spawn(&mut cleanup).unwrap().wait().unwrap().success());
    for (protocol, arriving, reply) in expected {
        let entries = node.netns().run(|| entries(protocol, arriving.source.is_ipv6())).unwrap();
        let entry = entries.iter().find(|entry| entry.original == arriving);
        assert_eq!(entry.map(|entry| entry.reply), Some(tuple(reply.local, reply.peer)), "{arriving:?}: {entries:?}");
    }
}

/// Four servers behind a dual-stack NodePort.
fn start(proxies: bool) -> Cluster {
    let options = ClusterOptions { proxies, proxy_arguments: &["--proxy-mode", "ebpf"], ..ClusterOptions::default() };
    let cluster = Cluster::start(&options).unwrap();
    let servers = SERVERS.iter().enumerate();
    cluster.apply_all(servers.map(|(index, name)| pod(name, index / 2 + 1, "web", &[8080], &[8080]))).unwrap();
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 80, 8080);
    let service = service.with("ipFamilyPolicy", json!("RequireDualStack")).with("type", json!("NodePort"));
    cluster.apply(service.build()).unwrap();
    for name in SERVERS {
        cluster.place_in_pod(&format!("default/{name}")).unwrap();
    }
    let complete = || Ok(cluster.slices_are_complete()?.then_some(()));
    wait_for("the EndpointSlices", LIMIT, complete).unwrap();
    if proxies {
        for (protocol, transport) in [("TCP", Transport::Tcp), ("UDP", Transport::Udp)] {
            for address in cluster.topology().node(1).unwrap().addresses() {
                let target = SocketAddr::new(address, cluster.node_port("web", protocol, 80).unwrap());
                cluster.wait_for_answers(&cluster.topology().client(), target, transport, &SERVERS).unwrap();
            }
        }
    }
    cluster
}

fn in_client<T: Send>(cluster: &Cluster, work: impl FnOnce() -> T + Send) -> T {
    cluster.topology().client().netns().run(work).unwrap()
}

fn tuple(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> Tuple {
    Tuple { source: source.into(), destination: destination.into() }
}

fn entries(protocol: u8, v6: bool) -> Vec<Entry> {
    let mut found = Vec::new();
    let filter = Filter { protocol, v6, destination: None::<IpAddr>, port: None };
    Conntrack::open().unwrap().for_each(&filter, |entry| found.push(*entry)).unwrap();
    found
}

fn ask(mut stream: &TcpStream) -> EchoReply {
    stream.set_read_timeout(Some(patient(LIMIT))).unwrap();
    stream.write_all(b"who\n").unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line.parse().unwrap()
}

/// `None` when nothing comes for a while.
fn ask_by_datagram(socket: &UdpSocket, target: SocketAddr) -> Option<EchoReply> {
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket.send_to(b"who\n", target).unwrap();
    let mut buffer = [0; 512];
    let (length, _) = socket.recv_from(&mut buffer).ok()?;
    Some(std::str::from_utf8(&buffer[..length]).unwrap().parse().unwrap())
}
