//! Direct server return: the endpoint sees the client, answers from the Service's address, and the answer takes its own way.
#![allow(
    missing_docs,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use proxy_common::flow_table::FlowEdit;
use proxy_common::pod::Pod;
use proxy_common::{ABI_VERSION, Flow, FlowKey, V4, V6};
use serde_json::{Value, json};
use trama_lab::packet::{ICMP, ICMP6, Packet};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{
    CLIENT_ADDRESSES, Cluster, ClusterOptions, FrameLinks, PathCounts, Transport, Wire, link_address, patient, wait_for,
};
use trama_proxy::dataplane::ebpf::{FlowTable, UserAddress};

const LIMIT: Duration = Duration::from_secs(5);
const EXTERNAL: [&str; 2] = ["192.0.2.77", "2001:db8::77"];
/// Protocol numbers of packets in packets.
const IN_IP: [u8; 2] = [4, 41];

/// The Service `shop` with its pod on the second node. Clients from outside come to the first one.
fn service(annotations: Value) -> Value {
    let service = ServiceManifest::new("shop", Some("shop")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("type", json!("NodePort")).with("externalIPs", json!(EXTERNAL));
    let mut service = service.with("ipFamilyPolicy", json!("RequireDualStack")).build();
    service["metadata"]["annotations"] = annotations;
    service
}

fn forwarding(name: &str) -> Value {
    json!({ "service.trama.dev/forwarding": name })
}

fn start(nodes: u8, arguments: &'static [&'static str]) -> Cluster {
    let options = ClusterOptions { nodes, proxy_arguments: arguments, ..ClusterOptions::default() };
    let cluster = Cluster::start(&options).unwrap();
    for ip in EXTERNAL {
        cluster.topology().route_client_through(ip.parse::<IpAddr>().unwrap().into(), 1).unwrap();
    }
    cluster
}

/// The NodePorts at the first node, and the external IPs, over both transports.
fn targets(cluster: &Cluster) -> Vec<(SocketAddr, Transport)> {
    let [tcp, udp] = [("TCP", 80), ("UDP", 53)].map(|(kind, port)| cluster.node_port("shop", kind, port).unwrap());
    let at_node = cluster.topology().node(1).unwrap().addresses();
    let at_node = at_node.into_iter().flat_map(|ip| [(ip, tcp, Transport::Tcp), (ip, udp, Transport::Udp)]);
    let external = EXTERNAL.into_iter().flat_map(|ip| {
        let ip: IpAddr = ip.parse().unwrap();
        [(ip, 80, Transport::Tcp), (ip, 53, Transport::Udp)]
    });
    at_node.chain(external).map(|(ip, port, transport)| (SocketAddr::new(ip, port), transport)).collect()
}

fn of_client(target: SocketAddr) -> IpAddr {
    CLIENT_ADDRESSES[usize::from(target.is_ipv6())]
}

fn of_node(cluster: &Cluster, target: SocketAddr) -> IpAddr {
    cluster.topology().node(1).unwrap().addresses()[usize::from(target.is_ipv6())]
}

/// Asks until the endpoint sees `source`.
fn wait_until_seen(cluster: &Cluster, target: SocketAddr, transport: Transport, source: IpAddr) {
    let client = cluster.topology().client();
    let seen = wait_for("the source that the endpoint sees", CHANGE_LIMIT, || {
        let tally = cluster.wait_for_answers(&client, target, transport, &["shop-2"])?;
        Ok((tally.sources() == &BTreeSet::from([source])).then_some(()))
    });
    seen.unwrap_or_else(|error| panic!("{transport:?} {target} is not seen from {source}: {error}"));
}

fn count(cluster: &Cluster, node: usize, name: &str) -> f64 {
    cluster.metrics(node).unwrap().get(name).copied().unwrap_or(0.0)
}

fn path(name: &str) -> String {
    format!("trama_dataplane_path_total{{path=\"{name}\"}}")
}

fn dropped(name: &str) -> String {
    format!("trama_dataplane_drop_total{{reason=\"{name}\"}}")
}

/// The endpoint sees the client at every target, and no answer passes the first node.
fn answers_go_straight(cluster: &Cluster, sent_as: &str, decided_at: &str) {
    let client = cluster.topology().client();
    for (target, transport) in targets(cluster) {
        wait_until_seen(cluster, target, transport, of_client(target));
        // Before that, answers may have come back this way.
        let wire = Wire::open(&cluster.topology().node(1).unwrap().place(), "eth0").unwrap();
        let (before, paths) = (count(cluster, 1, &path(sent_as)), PathCounts::of(cluster).unwrap());
        let taken_out = count(cluster, 2, &path("untunnelled"));
        let tally = cluster.wait_for_answers(&client, target, transport, &["shop-2"]).unwrap();
        assert_eq!(tally.sources(), &BTreeSet::from([of_client(target)]), "{transport:?} {target}");
        assert_eq!(PathCounts::of(cluster).unwrap().since(&paths), decided_at, "{transport:?} {target}");
        // A datagram that opens its flow in the driver is counted as new there, and nothing follows it.
        if transport == Transport::Tcp || sent_as == "packet_tunnelled" {
            assert!(count(cluster, 1, &path(sent_as)) > before, "{transport:?} {target} is not sent through a tunnel");
        }
        assert!(count(cluster, 2, &path("untunnelled")) > taken_out, "{transport:?} {target} is not taken out");
        let passes = wire.receive(Duration::from_millis(100), |packet| (packet.from() == target).then_some(()));
        assert!(passes.is_err(), "an answer from {target} passes the first node");
    }
}

#[test]
fn answers_go_straight_to_the_client_by_ipip() {
    let cluster = start(2, &[]);
    cluster.apply_all([pod("shop-2", 2, "shop", &[8080], &[5353]), service(forwarding("dsr"))]).unwrap();
    answers_go_straight(&cluster, "packet_tunnelled", "packet");
}

#[test]
fn answers_go_straight_to_the_client_by_gue_and_by_the_node_s_default() {
    let cluster = start(2, &["--dsr-tunnel", "gue", "--forwarding", "dsr"]);
    cluster.apply_all([pod("shop-2", 2, "shop", &[8080], &[5353]), service(json!({}))]).unwrap();
    answers_go_straight(&cluster, "packet_tunnelled", "packet");
}

#[test]
fn frames_are_put_into_the_tunnel_in_the_driver() {
    for arguments in [&["--xdp-interfaces", "eth0"][..], &["--xdp-interfaces", "eth0", "--dsr-tunnel", "gue"]] {
        let cluster = start(2, arguments);
        let _links = FrameLinks::of(cluster.topology()).unwrap();
        cluster.apply_all([pod("shop-2", 2, "shop", &[8080], &[5353]), service(forwarding("dsr"))]).unwrap();
        answers_go_straight(&cluster, "frame_tunnelled", "xdp");
    }
}

fn ask(stream: &TcpStream) -> String {
    let mut line = String::new();
    stream.set_read_timeout(Some(patient(LIMIT))).unwrap();
    let mut writer = stream;
    writer.write_all(b"who\n").unwrap();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

/// Connections stay what they were, new ones are what the annotation says.
#[test]
fn the_annotation_changes_while_connections_go_on() {
    let cluster = start(2, &[]);
    cluster.apply_all([pod("shop-2", 2, "shop", &[8080], &[5353]), service(json!({}))]).unwrap();
    let client = cluster.topology().client();
    let mut kept = Vec::new();
    for name in ["snat", "dsr", "snat"] {
        cluster.apply(service(forwarding(name))).unwrap();
        for (target, transport) in targets(&cluster) {
            let source = if name == "dsr" { of_client(target) } else { of_node(&cluster, target) };
            wait_until_seen(&cluster, target, transport, source);
            if transport == Transport::Tcp {
                let stream = client.connect(target, patient(LIMIT)).unwrap();
                kept.push((ask(&stream), stream));
            }
        }
        for (answer, stream) in &kept {
            assert_eq!(&ask(stream), answer, "a connection to {:?} changed with {name}", stream.peer_addr());
        }
    }
    let seen: BTreeSet<&str> = kept.iter().map(|(answer, _)| answer.split([' ', ':']).nth(1).unwrap()).collect();
    assert!(seen.len() > 2, "connections of both kinds were open: {seen:?}");
}

#[test]
fn hybrid_sends_tcp_straight_and_masquerades_datagrams() {
    let cluster = start(2, &["--forwarding", "hybrid"]);
    cluster.apply_all([pod("shop-2", 2, "shop", &[8080], &[5353]), service(json!({}))]).unwrap();
    for (target, transport) in targets(&cluster) {
        let source = if transport == Transport::Tcp { of_client(target) } else { of_node(&cluster, target) };
        wait_until_seen(&cluster, target, transport, source);
    }
}

/// An endpoint on the node that the client comes to needs no tunnel, and sees the client all the same.
#[test]
fn an_endpoint_on_this_node_sees_the_client_without_a_tunnel() {
    let cluster = start(2, &[]);
    cluster.apply_all([pod("shop-2", 1, "shop", &[8080], &[5353]), service(forwarding("dsr"))]).unwrap();
    for (target, transport) in targets(&cluster) {
        wait_until_seen(&cluster, target, transport, of_client(target));
    }
    assert_eq!(count(&cluster, 1, &path("packet_tunnelled")), 0.0);
}

/// Wraps a packet as a node would.
fn wrapped(from: IpAddr, to: IpAddr, inside: &Packet) -> Packet {
    Packet::new(from, to, IN_IP[usize::from(from.is_ipv6())], inside.bytes())
}

#[test]
fn a_tunnel_from_a_pod_is_dropped_and_counted() {
    let cluster = start(2, &[]);
    cluster.apply_all([pod("shop-2", 2, "shop", &[8080], &[5353]), service(forwarding("dsr"))]).unwrap();
    cluster.apply_all([pod("near", 2, "near", &[], &[]), pod("far", 1, "far", &[], &[])]).unwrap();
    for (target, transport) in targets(&cluster) {
        wait_until_seen(&cluster, target, transport, of_client(target));
    }
    let server = Wire::open(&cluster.place_in_pod("default/shop-2").unwrap(), "eth0").unwrap();
    let reason = dropped("tunnel_source");
    let endpoints = cluster.pod_addresses("default/shop-2").unwrap();
    for (name, node) in [("near", 2), ("far", 1)] {
        let place = cluster.place_in_pod(&format!("default/{name}")).unwrap();
        let wire = Wire::open(&place, "eth0").unwrap();
        let interface = cluster.host_interface(&format!("default/{name}")).unwrap();
        let gateway = link_address(cluster.topology().node(node).unwrap().netns(), &interface).unwrap();
        let own = cluster.pod_addresses(&format!("default/{name}")).unwrap();
        for (family, ip) in EXTERNAL.into_iter().enumerate() {
            let target = SocketAddr::new(ip.parse().unwrap(), 53);
            let victim = SocketAddr::new(CLIENT_ADDRESSES[family], 4000);
            let lie = Packet::udp(victim, target, b"lie\n");
            let node_ip = cluster.topology().node(1).unwrap().addresses()[family];
            // From another node only its own pods' addresses get past its uplink.
            let sources = if name == "near" { vec![own[family], node_ip] } else { vec![own[family]] };
            for source in sources {
                let before = count(&cluster, 2, &reason);
                wire.send(gateway, &wrapped(source, endpoints[family], &lie)).unwrap();
                let drop = wait_for("the drop", LIMIT, || Ok((count(&cluster, 2, &reason) > before).then_some(())));
                drop.unwrap_or_else(|error| panic!("{name} as {source}: {error}"));
            }
        }
    }
    let seen = server.receive(Duration::from_millis(200), |packet| packet.payload.ends_with(b"lie\n").then_some(()));
    assert!(seen.is_err(), "the endpoint got what a pod had wrapped");
}

/// A tunnel that is nobody's of ours reaches whom it is for.
#[test]
fn a_stranger_s_tunnel_is_left_alone() {
    let cluster = start(2, &[]);
    cluster.apply_all([pod("shop-2", 2, "shop", &[8080], &[5353]), service(forwarding("dsr"))]).unwrap();
    let (target, transport) = targets(&cluster)[0];
    wait_until_seen(&cluster, target, transport, of_client(target));
    let server = Wire::open(&cluster.place_in_pod("default/shop-2").unwrap(), "eth0").unwrap();
    let outside = Wire::open(&cluster.topology().client(), "eth0").unwrap();
    let gateway = link_address(cluster.topology().node(2).unwrap().netns(), "eth0").unwrap();
    for (family, endpoint) in cluster.pod_addresses("default/shop-2").unwrap().into_iter().enumerate() {
        let client = CLIENT_ADDRESSES[family];
        let nobody = SocketAddr::new(["198.51.100.1", "2001:db8::99"][family].parse().unwrap(), 53);
        let inside = Packet::udp((client, 4000).into(), nobody, b"hello\n");
        outside.send(gateway, &wrapped(client, endpoint, &inside)).unwrap();
        let arrives = |packet: &Packet| (packet.protocol == IN_IP[family]).then(|| packet.payload.clone());
        assert_eq!(server.receive(LIMIT, arrives).unwrap(), inside.bytes());
    }
}

/// Empties the tables of flows of a node, as a crash of the machine would.
fn forget_packets(cluster: &Cluster, node: usize) {
    let version = cluster.topology().node(node).unwrap().bpffs().join(format!("trama/v{ABI_VERSION}"));
    forget(&FlowTable::<V4>::open(&version).unwrap());
    forget(&FlowTable::<V6>::open(&version).unwrap());
}

fn forget<A: UserAddress>(table: &FlowTable<A>)
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
    FlowEdit<A>: Pod + Default,
{
    let mut keys = Vec::new();
    table.each(|key, _| keys.push(key)).unwrap();
    for key in keys {
        let _ = table.remove(&key).unwrap();
    }
}

/// By Maglev any packet finds its endpoint: at another node, and where both tables were lost.
#[test]
fn a_connection_outlives_the_flow_tables_and_the_node_that_it_came_to() {
    let cluster = start(3, &[]);
    let mut annotations = forwarding("dsr");
    annotations["service.trama.dev/lb-algorithm"] = json!("maglev");
    // Of two endpoints none is on a node that the client comes to.
    cluster
        .apply_all([pod("shop-2", 2, "shop", &[8080], &[5353]), pod("shop-4", 2, "shop", &[8080], &[5353])])
        .unwrap();
    cluster.apply(service(annotations)).unwrap();
    let client = cluster.topology().client();
    for ip in EXTERNAL {
        let target = SocketAddr::new(ip.parse().unwrap(), 80);
        for node in [3, 1] {
            cluster.topology().route_client_through(target.ip().into(), node).unwrap();
            cluster.wait_for_answers(&client, target, Transport::Tcp, &["shop-2", "shop-4"]).unwrap();
        }
        let streams: Vec<TcpStream> = (0..8).map(|_| client.connect(target, patient(LIMIT)).unwrap()).collect();
        let first: Vec<String> = streams.iter().map(ask).collect();
        for node in [1, 2] {
            forget_packets(&cluster, node);
        }
        assert_eq!(streams.iter().map(ask).collect::<Vec<_>>(), first, "{ip}: without flows");
        cluster.topology().route_client_through(target.ip().into(), 3).unwrap();
        assert_eq!(streams.iter().map(ask).collect::<Vec<_>>(), first, "{ip}: at another node");
        cluster.kill_proxy(3).unwrap();
        cluster.restart_proxy(3).unwrap();
        assert_eq!(streams.iter().map(ask).collect::<Vec<_>>(), first, "{ip}: with another process");
    }
}

/// Asks once from the client's socket address `own`, and refuses the answer: type and code of the error, and the error.
fn error_about_an_answer(outside: &Wire, gateway: [u8; 6], own: SocketAddr, target: SocketAddr) -> ([u8; 2], Packet) {
    let find = |packet: &Packet| (packet.from() == target && packet.to() == own).then(|| packet.clone());
    // Nobody repeats a lost datagram else.
    let answer = wait_for("an answer", CHANGE_LIMIT, || {
        outside.send(gateway, &Packet::udp(own, target, b"who\n"))?;
        Ok(outside.receive(Duration::from_millis(500), find).ok())
    });
    let answer = answer.unwrap_or_else(|error| panic!("{target} from {own}: {error}"));
    let kind = if target.is_ipv4() { [3, 3] } else { [1, 4] };
    (kind, Packet::icmp_error(own.ip(), target.ip(), kind, 0, &answer.bytes()))
}

/// An error about an answer comes to the Service's address, and so to the first node, and has to reach the endpoint.
#[test]
fn an_error_about_an_answer_finds_the_endpoint() {
    let cluster = start(2, &[]);
    cluster.apply_all([pod("shop-2", 2, "shop", &[8080], &[5353]), service(forwarding("dsr"))]).unwrap();
    let client = cluster.topology().client();
    let server = Wire::open(&cluster.place_in_pod("default/shop-2").unwrap(), "eth0").unwrap();
    let outside = Wire::open(&client, "eth0").unwrap();
    let gateway = link_address(cluster.topology().node(1).unwrap().netns(), "eth0").unwrap();
    let endpoints = cluster.pod_addresses("default/shop-2").unwrap();
    for ((target, transport), port) in targets(&cluster).into_iter().zip(4321..) {
        wait_until_seen(&cluster, target, transport, of_client(target));
        if transport != Transport::Udp {
            continue;
        }
        // One for each: the endpoint would see one client twice, and the second flow gets another port.
        let own = SocketAddr::new(of_client(target), port);
        let (kind, error) = error_about_an_answer(&outside, gateway, own, target);
        outside.send(gateway, &error).unwrap();
        let quoted = server.receive(LIMIT, |packet| {
            let is_error = [ICMP, ICMP6].contains(&packet.protocol) && packet.payload.starts_with(&kind);
            is_error.then(|| packet.quoted()).flatten()
        });
        let quoted = quoted.unwrap_or_else(|error| panic!("{target}: {error}"));
        assert_eq!((quoted.from(), quoted.to()), ((endpoints[usize::from(target.is_ipv6())], 5353).into(), own));
    }
}

/// A packet that came in a tunnel goes on in none: two nodes that each take the other one for the endpoint's would send it to and fro.
#[test]
fn what_came_in_a_tunnel_goes_on_in_none() {
    let cluster = start(2, &[]);
    cluster.apply_all([pod("shop-2", 2, "shop", &[8080], &[5353]), service(forwarding("dsr"))]).unwrap();
    // Else the node, which does not know the external IPs yet, tells the client of another way to them (ICMP redirect).
    let (target, transport) = targets(&cluster)[0];
    wait_until_seen(&cluster, target, transport, of_client(target));
    let outside = Wire::open(&cluster.topology().client(), "eth0").unwrap();
    let gateway = link_address(cluster.topology().node(1).unwrap().netns(), "eth0").unwrap();
    for (family, ip) in EXTERNAL.into_iter().enumerate() {
        let (client, target) = (CLIENT_ADDRESSES[family], SocketAddr::new(ip.parse().unwrap(), 53));
        wait_until_seen(&cluster, target, Transport::Udp, client);
        let (_, error) = error_about_an_answer(&outside, gateway, (client, 4321).into(), target);
        let [looped, sent] = [dropped("tunnel_loop"), path("packet_tunnelled")];
        let before = [&looped, &sent].map(|name| count(&cluster, 1, name));
        let endpoint = cluster.pod_addresses("default/shop-2").unwrap()[family];
        outside.send(gateway, &wrapped(client, endpoint, &error)).unwrap();
        let drop = wait_for("the drop", LIMIT, || Ok((count(&cluster, 1, &looped) > before[0]).then_some(())));
        drop.unwrap_or_else(|error| panic!("{target}: {error}"));
        assert_eq!(count(&cluster, 1, &sent), before[1], "{target}");
    }
}

/// Without a table that would find the endpoint again: the flow alone leads there.
#[test]
fn a_connection_outlives_the_processes_of_both_nodes() {
    let cluster = start(2, &[]);
    cluster.apply_all([pod("shop-2", 2, "shop", &[8080], &[5353]), service(forwarding("dsr"))]).unwrap();
    let client = cluster.topology().client();
    let open = |(target, transport)| {
        wait_until_seen(&cluster, target, transport, of_client(target));
        (transport == Transport::Tcp).then(|| (target, client.connect(target, patient(LIMIT)).unwrap()))
    };
    let streams: Vec<(SocketAddr, TcpStream)> = targets(&cluster).into_iter().filter_map(open).collect();
    assert_eq!(streams.len(), 4);
    let answers = || streams.iter().map(|(_, stream)| ask(stream)).collect::<Vec<_>>();
    let first = answers();
    for node in [1, 2] {
        cluster.kill_proxy(node).unwrap();
        assert_eq!(answers(), first, "without the process of node {node}");
        cluster.restart_proxy(node).unwrap();
        assert_eq!(answers(), first, "with another process of node {node}");
    }
    for ((target, _), answer) in streams.iter().zip(first) {
        assert!(answer.contains(&of_client(*target).to_string()), "{target}: {answer} does not name the client");
    }
}
