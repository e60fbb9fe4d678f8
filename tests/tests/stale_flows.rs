//! Nothing keeps sending to an endpoint that is gone: neither a connected socket nor a conntrack entry.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
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

/// A socket that goes on asking is answered again, by whoever there is: over both families, at a ClusterIP and at a NodePort.
#[test]
fn a_flow_moves_on_when_its_endpoint_goes() {
    moves_on(&["--proxy-mode=ebpf"]);
    moves_on(&["--proxy-mode=iptables"]);
    moves_on(&["--proxy-mode=nftables"]);
}

fn moves_on(proxy_arguments: &'static [&'static str]) {
    let cluster = Cluster::start(&ClusterOptions { proxy_arguments, ..ClusterOptions::default() }).unwrap();
    let dns = |n: usize| pod(&format!("dns-{n}"), n.min(2), "dns", &[], &[5353]);
    cluster.apply_all([dns(1), dns(2), pod("client", 1, "client", &[], &[])]).unwrap();
    cluster.apply(dual_stack("dns").with("type", json!("NodePort")).build()).unwrap();
    let client = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
    let targets = targets(&cluster);
    for target in &targets {
        cluster.wait_for_answers(&client, *target, Transport::Udp, &["dns-1", "dns-2"]).unwrap();
    }
    let flows: Vec<UdpSocket> = targets.iter().map(|target| served_by(&client, *target, "dns-2")).collect();
    cluster.delete(dns(2)).unwrap();
    all_answered_by(&flows, "dns-1", proxy_arguments);
    // Without endpoints nothing is remembered either: the flow must not lead to the dead one for ever.
    cluster.delete(dns(1)).unwrap();
    let node = cluster.topology().node(1).unwrap().place();
    wait_for("the end of every entry", CHANGE_LIMIT, || {
        flows.iter().for_each(|flow| drop(ask(flow)));
        Ok((!tracked(&node).iter().any(|entry| targets.contains(&entry.original.destination))).then_some(()))
    })
    .unwrap();
    cluster.apply(dns(3)).unwrap();
    all_answered_by(&flows, "dns-3", proxy_arguments);
}

/// A Service for both families.
fn dual_stack(name: &str) -> ServiceManifest {
    ServiceManifest::new(name, Some(name)).port("UDP", 53, 5353).with("ipFamilyPolicy", json!("RequireDualStack"))
}

/// The ClusterIPs of `dns`, and its NodePort at the first node's addresses.
fn targets(cluster: &Cluster) -> Vec<SocketAddr> {
    let node_port = cluster.node_port("dns", "UDP", 53).unwrap();
    let at_node = cluster.topology().node(1).unwrap().addresses().map(|ip| SocketAddr::new(ip, node_port));
    let ips = cluster.cluster_ips("dns").unwrap();
    ips.into_iter().map(|ip| SocketAddr::new(ip, 53)).chain(at_node).collect()
}

/// A connected socket outside of every cgroup that has been answered by `server`; those that chose another are dropped.
fn served_by(place: &Place, to: SocketAddr, server: &str) -> UdpSocket {
    let found = wait_for("a flow to the right endpoint", CHANGE_LIMIT, || {
        let socket = conversation(place, to);
        Ok(ask(&socket).is_some_and(|name| name == server).then_some(socket))
    });
    found.unwrap()
}

fn all_answered_by(flows: &[UdpSocket], server: &str, mode: &[&str]) {
    let start = Instant::now();
    for flow in flows {
        let to = flow.peer_addr().unwrap();
        let answer = || Ok(ask(flow).filter(|name| name == server));
        wait_for(&format!("{mode:?}: an answer of {server} at {to}"), CHANGE_LIMIT, answer).unwrap();
        println!("{mode:?}: the flow to {to} was answered by {server} {:?} after the change", start.elapsed());
    }
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
    let service = |name: &str| dual_stack(name).build();
    cluster.apply_all(["two", "one", "deleted"].map(service)).unwrap();
    let client = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
    let node = cluster.topology().node(1).unwrap();

    // Entries end by themselves when a slow machine takes its time.
    for key in ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"] {
        node.netns().run(|| sysctl::write(&format!("net/netfilter/{key}"), "3600")).unwrap().unwrap();
    }
    // Another proxy, which goes and leaves its entries.
    let [two, one, deleted] = [("two", "two-1"), ("one", "one-1"), ("deleted", "deleted-1")]
        .map(|(service, pod)| by_family(vips(&cluster, service), endpoints(&cluster, pod)));
    translate(&node.place(), &[two, one, deleted].concat());
    let other = endpoints(&cluster, "two-2");
    let destinations = [two, one, deleted].concat().into_iter().map(|(vip, _)| vip).chain(other);
    let sockets: Vec<UdpSocket> = destinations.map(|to| conversation(&client, to)).collect();
    nft(&node.place(), &["delete", "table", "inet", "former"]);
    assert_eq!(tracked(&node.place()).len(), 8);

    cluster.restart_proxy(1).unwrap();
    let first_pass = r#"kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family="IPv6"}"#;
    wait_for("the first pass", CHANGE_LIMIT, || {
        Ok((cluster.metrics(1)?.get(first_pass).copied().unwrap_or(0.0) >= 1.0).then_some(()))
    })
    .unwrap();
    assert_eq!(tracked(&node.place()).len(), 8, "every flow leads to an endpoint of its Service");

    cluster.delete(server("two-1", "two")).unwrap();
    gone(&cluster, two);
    cluster.delete(server("one-1", "one")).unwrap();
    gone(&cluster, one);
    cluster.delete(service("deleted")).unwrap();
    gone(&cluster, deleted);
    let left: Vec<SocketAddr> = tracked(&node.place()).iter().map(|entry| entry.original.destination).collect();
    assert_eq!(left, other, "a flow to a pod itself is nobody's but its own");
    for family in ["IPv4", "IPv6"] {
        let name = format!("kubeproxy_conntrack_reconciler_deleted_entries_total{{ip_family=\"{family}\"}}");
        assert!((cluster.metrics(1).unwrap()[&name] - 3.0).abs() < f64::EPSILON, "{family}");
    }
    drop(sockets);
}

/// What a client names and who answers, of each family.
type Translations = [(SocketAddr, SocketAddr); 2];

fn by_family(vips: [SocketAddr; 2], endpoints: [SocketAddr; 2]) -> Translations {
    let [[v4, v6], [to_v4, to_v6]] = [vips, endpoints];
    [(v4, to_v4), (v6, to_v6)]
}

fn vips(cluster: &Cluster, service: &str) -> [SocketAddr; 2] {
    let ips: [IpAddr; 2] = cluster.cluster_ips(service).unwrap().try_into().unwrap();
    ips.map(|ip| SocketAddr::new(ip, 53))
}

fn endpoints(cluster: &Cluster, pod: &str) -> [SocketAddr; 2] {
    cluster.pod_addresses(&format!("default/{pod}")).unwrap().map(|ip| SocketAddr::new(ip, 5353))
}

/// A connected socket outside of every cgroup that has been answered.
fn conversation(place: &Place, to: SocketAddr) -> UdpSocket {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = place.netns().run(|| UdpSocket::bind((any, 0))).unwrap().unwrap();
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
    nft(place, &["add", "table", "inet", "former"]);
    let chain = "{ type nat hook prerouting priority dstnat ; }";
    nft(place, &["add", "chain", "inet", "former", "pre", chain]);
    for (from, to) in flows {
        let family = if from.is_ipv4() { "ip" } else { "ip6" };
        let rule = format!("{family} daddr {} udp dport {} dnat {family} to {to}", from.ip(), from.port());
        nft(place, &["add", "rule", "inet", "former", "pre", &rule]);
    }
}

fn nft(place: &Place, arguments: &[&str]) {
    let status = place.netns().run(|| Command::new("nft").args(arguments).status()).unwrap().unwrap();
    assert!(status.success(), "nft {arguments:?}");
}

/// Every UDP entry, those of IPv4 first.
fn tracked(place: &Place) -> Vec<Entry> {
    let mut found = Vec::new();
    for v6 in [false, true] {
        let filter = Filter { protocol: 17, v6, destination: None, port: None };
        let list = || Conntrack::open()?.for_each(&filter, |entry| found.push(*entry));
        place.netns().run(list).unwrap().unwrap();
    }
    found
}

fn gone(cluster: &Cluster, translations: Translations) {
    let start = Instant::now();
    let place = cluster.topology().node(1).unwrap().place();
    let is_one = |entry: &Entry| translations.contains(&(entry.original.destination, entry.reply.source));
    let ended = || Ok((!tracked(&place).iter().any(is_one)).then_some(()));
    wait_for(&format!("the end of {translations:?}"), CHANGE_LIMIT, ended).unwrap();
    println!("the entries of {translations:?} were gone {:?} after the change", start.elapsed());
}
