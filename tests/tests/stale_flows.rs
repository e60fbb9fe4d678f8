//! Nothing keeps sending to an endpoint that is gone: neither a connected socket nor a conntrack entry.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use node_sys::conntrack::{Conntrack, Entry, Filter};
use node_sys::sysctl;
use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{Cluster, ClusterOptions, Conversation, Place, Transport, Turn, wait_for};

/// How long the client waits for an answer before it asks again.
const PATIENCE: Duration = Duration::from_millis(100);

#[test]
fn a_connected_socket_ends_with_its_endpoint() {
    let cluster = Cluster::new().unwrap();
    let dns = |n: usize| pod(&format!("dns-{n}"), n, "dns", &[], &[5353]);
    cluster.apply_all([dns(1), dns(2), pod("client", 1, "client", &[], &[])]).unwrap();
    let service = ServiceManifest::new("dns", Some("dns")).port("UDP", 53, 5353);
    cluster.apply(service.with("ipFamilyPolicy", json!("RequireDualStack")).build()).unwrap();
    let client = cluster.place_in_pod("default/client").unwrap();
    let places = [client, cluster.topology().node(1).unwrap().place()];
    let targets: Vec<SocketAddr> =
        cluster.cluster_ips("dns").unwrap().into_iter().map(|ip| SocketAddr::new(ip, 53)).collect();
    for place in &places {
        for target in &targets {
            cluster.wait_for_answers(place, *target, Transport::UdpConnected, &["dns-1", "dns-2"]).unwrap();
        }
    }
    let mut to_leaving: Vec<Conversation> = Vec::new();
    let mut to_staying: Vec<Conversation> = Vec::new();
    for (place, target) in places.iter().flat_map(|place| targets.iter().map(move |target| (place, *target))) {
        to_leaving.push(with(place, target, "dns-2"));
        to_staying.push(with(place, target, "dns-1"));
    }
    // Sockets that go to the pod itself, and that no Service translated.
    let direct = ["10.244.2.2:5353", "[fd00:10:244:2::2]:5353"].map(|address| address.parse().unwrap());
    let mut direct = direct.map(|address| with(&places[0], address, "dns-2"));

    cluster.delete(dns(2)).unwrap();
    let deleted = Instant::now();
    for conversation in &mut to_leaving {
        wait_for("the end of a socket", CHANGE_LIMIT, || Ok(conversation.ask()?.is_the_end().then_some(()))).unwrap();
    }
    println!("{} sockets ended {:?} after the deletion of their endpoint", to_leaving.len(), deleted.elapsed());
    for conversation in &mut to_staying {
        assert_eq!(conversation.ask().unwrap(), Turn::Answer("dns-1".to_owned()), "the endpoint is still there");
    }
    for conversation in &mut direct {
        assert!(!conversation.ask().unwrap().is_the_end(), "no Service, none of ours");
    }
    let destroyed = cluster.metrics(1).unwrap()["trama_stale_sockets_destroyed_total"];
    assert!((destroyed - to_leaving.len() as f64).abs() < f64::EPSILON, "{destroyed} destroyed");
    for place in &places {
        for target in &targets {
            cluster.wait_for_answers(place, *target, Transport::UdpConnected, &["dns-1"]).unwrap();
        }
    }
    // Without any endpoint the sockets end as well.
    cluster.delete(dns(1)).unwrap();
    for conversation in &mut to_staying {
        wait_for("the end of a socket", CHANGE_LIMIT, || Ok(conversation.ask()?.is_the_end().then_some(()))).unwrap();
    }
}

/// A conversation with `server` over `target`; sockets that chose another are dropped.
fn with(place: &Place, target: SocketAddr, server: &str) -> Conversation {
    let found = wait_for("a socket to the right endpoint", CHANGE_LIMIT, || {
        let mut conversation = Conversation::start(place, target, PATIENCE)?;
        Ok((conversation.ask()? == Turn::Answer(server.to_owned())).then_some(conversation))
    });
    found.unwrap()
}

/// Where the kernel's connection tracking translates, a socket that goes on asking is answered again, by whoever there is.
#[test]
fn a_flow_moves_on_when_its_endpoint_goes() {
    moves_on(&["--proxy-mode=iptables"]);
    moves_on(&["--proxy-mode=nftables"]);
}

fn moves_on(proxy_arguments: &'static [&'static str]) {
    let cluster = Cluster::start(&ClusterOptions { proxy_arguments, ..ClusterOptions::default() }).unwrap();
    let dns = |n: usize| pod(&format!("dns-{n}"), n.min(2), "dns", &[], &[5353]);
    cluster.apply_all([dns(1), dns(2), pod("client", 1, "client", &[], &[])]).unwrap();
    cluster.apply(ServiceManifest::new("dns", Some("dns")).port("UDP", 53, 5353).build()).unwrap();
    let vip = SocketAddr::new(*cluster.cluster_ips("dns").unwrap().first().unwrap(), 53);
    let client = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
    cluster.wait_for_answers(&client, vip, Transport::Udp, &["dns-1", "dns-2"]).unwrap();
    let socket = conversation(&client, vip);
    let answered = |by: &[&str]| {
        let start = Instant::now();
        let found = wait_for(&format!("an answer of {by:?}"), CHANGE_LIMIT, || {
            Ok(ask(&socket).filter(|name| by.contains(&name.as_str())))
        });
        (found.unwrap(), start.elapsed())
    };
    let (first, _) = answered(&["dns-1", "dns-2"]);
    let (leaving, staying) = if first == "dns-1" { (1, 2) } else { (2, 1) };
    cluster.delete(dns(leaving)).unwrap();
    let (_, after) = answered(&[&format!("dns-{staying}")]);
    println!("{proxy_arguments:?}: the flow was answered by another endpoint {after:?} after the deletion of its own");
    // Without endpoints nothing is remembered either: the flow must not lead to the dead one for ever.
    cluster.delete(dns(staying)).unwrap();
    let node = cluster.topology().node(1).unwrap().place();
    wait_for("the end of every entry", CHANGE_LIMIT, || {
        let _refused = ask(&socket);
        Ok((!tracked(&node).iter().any(|entry| entry.original.destination == vip)).then_some(()))
    })
    .unwrap();
    cluster.apply(dns(3)).unwrap();
    answered(&["dns-3"]);
}

/// Who answers one question on a kept socket; nobody, or an ICMP error, is `None`.
fn ask(socket: &UdpSocket) -> Option<String> {
    let mut buffer = [0; 512];
    socket.send(b"who\n").ok()?;
    let length = socket.recv(&mut buffer).ok()?;
    Some(String::from_utf8_lossy(buffer.get(..length)?).split(' ').next()?.to_owned())
}

/// What another proxy left in the connection tracking table goes with the endpoints, and only that.
#[test]
fn conntrack_entries_go_with_their_endpoint_their_last_endpoint_and_their_service() {
    let cluster = Cluster::start(&ClusterOptions { proxies: false, ..ClusterOptions::default() }).unwrap();
    let server = |name: &str, app: &str| pod(name, 2, app, &[], &[5353]);
    let pods = [("two-1", "two"), ("two-2", "two"), ("one-1", "one"), ("deleted-1", "deleted")];
    cluster.apply_all(pods.map(|(name, app)| server(name, app))).unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    let service = |name: &str| ServiceManifest::new(name, Some(name)).port("UDP", 53, 5353).build();
    cluster.apply_all(["two", "one", "deleted"].map(service)).unwrap();
    let address_of = |pod: &str| ipv4_of(&cluster, pod);
    let vip = |name: &str| SocketAddr::new(cluster.cluster_ips(name).unwrap()[0], 53);
    let client = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
    let node = cluster.topology().node(1).unwrap();

    // Entries end by themselves when a slow machine takes its time.
    for key in ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"] {
        node.netns().run(|| sysctl::write(&format!("net/netfilter/{key}"), "3600")).unwrap().unwrap();
    }
    // Another proxy, which goes and leaves its entries.
    let former = [("two", "two-1"), ("one", "one-1"), ("deleted", "deleted-1")];
    let former = former.map(|(service, pod)| (vip(service), SocketAddr::new(address_of(pod), 5353)));
    translate(&node.place(), &former);
    let other = SocketAddr::new(address_of("two-2"), 5353);
    let destinations: Vec<SocketAddr> = former.iter().map(|(vip, _)| *vip).chain([other]).collect();
    let sockets: Vec<UdpSocket> = destinations.iter().map(|to| conversation(&client, *to)).collect();
    nft(&node.place(), &["delete", "table", "ip", "former"]);
    assert_eq!(tracked(&node.place()).len(), 4);

    cluster.restart_proxy(1).unwrap();
    let first_pass = r#"kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family="IPv4"}"#;
    wait_for("the first pass", CHANGE_LIMIT, || {
        Ok((cluster.metrics(1)?.get(first_pass).copied().unwrap_or(0.0) >= 1.0).then_some(()))
    })
    .unwrap();
    assert_eq!(tracked(&node.place()).len(), 4, "every flow leads to an endpoint of its Service");

    cluster.delete(server("two-1", "two")).unwrap();
    gone(&cluster, former[0]);
    cluster.delete(server("one-1", "one")).unwrap();
    gone(&cluster, former[1]);
    cluster.delete(service("deleted")).unwrap();
    gone(&cluster, former[2]);
    let left = tracked(&node.place());
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0].original.destination, other, "a flow to a pod itself is nobody's but its own");
    let deleted = r#"kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family="IPv4"}"#;
    assert!((cluster.metrics(1).unwrap()[deleted] - 3.0).abs() < f64::EPSILON);
    drop(sockets);
}

fn ipv4_of(cluster: &Cluster, pod: &str) -> IpAddr {
    let place = cluster.place_in_pod(&format!("default/{pod}")).unwrap();
    let address = place.netns().run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect("10.244.1.1:9")?;
        socket.local_addr()
    });
    address.unwrap().unwrap().ip()
}

/// A connected socket outside of every cgroup that has been answered.
fn conversation(place: &Place, to: SocketAddr) -> UdpSocket {
    let socket = place.netns().run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    wait_for("an answer", CHANGE_LIMIT, || {
        // The first datagrams may be lost while neighbours are resolved.
        socket.send(b"who\n")?;
        Ok(socket.recv(&mut [0; 512]).is_ok().then_some(()))
    })
    .unwrap();
    socket
}

fn translate(place: &Place, flows: &[(SocketAddr, SocketAddr)]) {
    nft(place, &["add", "table", "ip", "former"]);
    let chain = "{ type nat hook prerouting priority dstnat ; }";
    nft(place, &["add", "chain", "ip", "former", "pre", chain]);
    for (from, to) in flows {
        let rule = format!("ip daddr {} udp dport {} dnat to {to}", from.ip(), from.port());
        nft(place, &["add", "rule", "ip", "former", "pre", &rule]);
    }
}

fn nft(place: &Place, arguments: &[&str]) {
    let status = place.netns().run(|| Command::new("nft").args(arguments).status()).unwrap().unwrap();
    assert!(status.success(), "nft {arguments:?}");
}

fn tracked(place: &Place) -> Vec<Entry> {
    let filter = Filter { protocol: 17, v6: false, destination: None, port: None };
    let mut found = Vec::new();
    let list = || Conntrack::open()?.for_each(&filter, |entry| found.push(*entry));
    place.netns().run(list).unwrap().unwrap();
    found
}

fn gone(cluster: &Cluster, (vip, endpoint): (SocketAddr, SocketAddr)) {
    let start = Instant::now();
    let place = cluster.topology().node(1).unwrap().place();
    let is_it = |entry: &Entry| entry.original.destination == vip && entry.reply.source == endpoint;
    wait_for("the end of a conntrack entry", CHANGE_LIMIT, || Ok((!tracked(&place).iter().any(is_it)).then_some(())))
        .unwrap();
    println!("the entry of {vip} was gone {:?} after the change", start.elapsed());
}
