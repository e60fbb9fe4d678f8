//! How an endpoint is chosen: by table, by weight, by open connections; and what an annotation that nobody understands leads to.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, ListParams};
use serde_json::{Value, json};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{Cluster, Place, Probe, Tally, Transport, patient, wait_for};

const EXTERNAL_IP: &str = "192.0.2.77";
/// Questions of one round: a share of three quarters is then off by a tenth less often than once in a hundred thousand rounds.
const ROUND: usize = 400;

fn annotated(service: ServiceManifest, annotations: Value) -> Value {
    let mut service = service.build();
    service["metadata"]["annotations"] = annotations;
    service
}

fn algorithm(name: &str) -> Value {
    json!({ "service.trama.dev/lb-algorithm": name })
}

/// Pods `web-1` to `web-COUNT`, on both nodes in turn.
fn start(count: usize) -> Cluster {
    let cluster = Cluster::new().unwrap();
    let web = |n: usize| pod(&format!("web-{n}"), n % 2 + 1, "web", &[8080], &[5353]);
    cluster.apply_all((1..=count).map(web)).unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    cluster
}

fn web() -> ServiceManifest {
    ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353)
}

/// Leads what the outside client sends to the external IP through a node.
fn route_through(client: &Place, node: IpAddr) {
    let arguments = ["route", "replace", EXTERNAL_IP, "via", &node.to_string()];
    let status = client.netns().run(|| Command::new("ip").args(arguments).status()).unwrap().unwrap();
    assert!(status.success(), "ip {arguments:?}");
}

/// Who answers a datagram from this port of the outside client, asked until somebody does.
fn server_of(client: &Place, source_port: u16) -> String {
    let target = SocketAddr::new(EXTERNAL_IP.parse().unwrap(), 53);
    let socket = client.netns().run(|| UdpSocket::bind(("0.0.0.0", source_port))).unwrap().unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let answer = wait_for("an answer", CHANGE_LIMIT, || {
        socket.send_to(b"who\n", target)?;
        let mut buffer = [0; 512];
        Ok(socket
            .recv_from(&mut buffer)
            .ok()
            .map(|(length, _)| String::from_utf8_lossy(&buffer[..length]).into_owned()))
    });
    answer.unwrap().split(' ').next().unwrap().to_owned()
}

#[test]
fn nodes_agree_where_a_flow_goes_by_maglev_and_do_not_at_random() {
    let cluster = start(4);
    let nodes = [1, 2].map(|number| cluster.topology().node(number).unwrap().addresses()[0]);
    let client = cluster.topology().client();
    let external = || web().with("externalIPs", json!([EXTERNAL_IP]));
    let names: BTreeSet<String> = (1..=4).map(|n| format!("web-{n}")).collect();
    let expected: Vec<&str> = names.iter().map(String::as_str).collect();
    let inside = cluster.place_in_pod("default/client").unwrap();
    let mut ports = 20_000..;
    let mut differing = BTreeMap::new();
    for name in ["maglev", "random"] {
        cluster.apply(annotated(external(), algorithm(name))).unwrap();
        let vip = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 53);
        for place in [inside.clone(), inside.outside_cgroup()] {
            cluster.wait_for_answers(&place, vip, Transport::Udp, &expected).unwrap();
        }
        // Both nodes know: the one that hears last has heard once both send the same flows to the same endpoints.
        let same = |ports: Vec<u16>| {
            let at = |node: IpAddr| -> Vec<String> {
                route_through(&client, node);
                ports.iter().map(|port| server_of(&client, *port)).collect()
            };
            (at(nodes[0]), at(nodes[1]))
        };
        if name == "maglev" {
            let found = wait_for("the same choice on both nodes", CHANGE_LIMIT, || {
                let (one, other) = same(ports.by_ref().take(40).collect());
                Ok((one == other).then_some(one))
            });
            let used: BTreeSet<String> = found.unwrap().into_iter().collect();
            assert_eq!(used, names, "40 flows reach all of four endpoints but once in 25,000 times");
        }
        let (one, other) = same(ports.by_ref().take(40).collect());
        differing.insert(name, one.iter().zip(&other).filter(|(a, b)| a != b).count());
    }
    println!("{differing:?} of 40 flows go to different endpoints through different nodes");
    assert_eq!(differing["maglev"], 0);
    assert!(differing["random"] > 0, "the test would notice");
}

#[test]
fn shares_follow_weights_on_both_paths_and_zero_gets_nothing() {
    let cluster = start(2);
    let client = cluster.place_in_pod("default/client").unwrap();
    let heavy = {
        cluster.place_in_pod("default/web-1").unwrap();
        cluster.pod_addresses("default/web-1").unwrap()[0]
    };
    cluster.apply(web().build()).unwrap();
    let target = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    cluster.wait_for_answers(&client, target, Transport::Tcp, &["web-1", "web-2"]).unwrap();
    for name in ["random", "maglev", "least-connections"] {
        let mut annotations = algorithm(name);
        annotations["service.trama.dev/lb-weights"] = json!(format!("{heavy}=3"));
        cluster.apply(annotated(web(), annotations)).unwrap();
        for place in [client.clone(), client.outside_cgroup()] {
            let share = wait_for("the share of the heavier one", CHANGE_LIMIT, || {
                let tally = Tally::of(&place.probe_times(Probe::new(target, Transport::Tcp), ROUND)?);
                assert_eq!(tally.failures, [], "{name} from {place:?}");
                let share = tally.answers.get("web-1").copied().unwrap_or(0) as f64 / ROUND as f64;
                Ok((0.65..0.9).contains(&share).then_some(share))
            });
            println!("{name}: {:.1}% for three quarters of the weight", share.unwrap() * 100.0);
        }
        let drained =
            json!({ "service.trama.dev/lb-algorithm": name, "service.trama.dev/lb-weights": format!("{heavy}/32=0") });
        cluster.apply(annotated(web(), drained)).unwrap();
        for place in [client.clone(), client.outside_cgroup()] {
            cluster.wait_for_answers(&place, target, Transport::Tcp, &["web-2"]).unwrap();
        }
    }
}

/// An endpoint's sockets leave to the packet path what may come back to their own pod; it is not chosen for a second time there, or each endpoint
/// of that node would get half of its share.
#[test]
fn an_endpoint_gets_its_share_of_its_own_connections() {
    let cluster = start(6);
    cluster.apply(web().with("type", json!("NodePort")).build()).unwrap();
    let vip = cluster.cluster_ips("web").unwrap()[0];
    let own = cluster.place_in_pod("default/web-2").unwrap();
    let node_port = cluster.node_port("web", "TCP", 80).unwrap();
    let at_node = |number| (cluster.topology().node(number).unwrap().addresses()[0], node_port, Transport::Tcp);
    for (ip, port, transport) in [(vip, 80, Transport::Tcp), (vip, 53, Transport::UdpTwice), at_node(1), at_node(2)] {
        let target = SocketAddr::new(ip, port);
        let all = ["web-1", "web-2", "web-3", "web-4", "web-5", "web-6"];
        cluster.wait_for_answers(&own, target, transport, &all).unwrap();
        let tally = Tally::of(&own.probe_times(Probe::new(target, transport), 3 * ROUND).unwrap());
        assert_eq!(tally.failures, []);
        println!("{transport:?} at {target}: {:?}", tally.answers);
        // A sixth is 200; each limit is missed by chance once in 100,000 times.
        let even = |name: &&str| (143..258).contains(&tally.answers.get(*name).copied().unwrap_or(0));
        assert!(all.iter().all(even), "{transport:?} at {target}: {:?}", tally.answers);
    }
}

/// One endpoint keeps its connections open, the other's end at once: so it gets fewer.
#[test]
fn who_has_fewer_open_connections_gets_more() {
    let cluster = start(2);
    let client = cluster.place_in_pod("default/client").unwrap();
    cluster.apply(annotated(web(), algorithm("least-connections"))).unwrap();
    let target = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    for place in [client.clone(), client.outside_cgroup()] {
        cluster.wait_for_answers(&place, target, Transport::Tcp, &["web-1", "web-2"]).unwrap();
    }
    let client = client.outside_cgroup();
    let mut kept = Vec::new();
    for _ in 0..200 {
        let stream = client.connect(target, patient(Duration::from_secs(2))).unwrap();
        let server = who(&stream);
        if server == "web-1" {
            kept.push(stream);
        } else {
            drop(stream);
        }
    }
    println!("{} of 200 connections went to the endpoint that keeps them", kept.len());
    assert!((20..75).contains(&kept.len()), "a quarter is expected, half would be chance: {}", kept.len());
    // Once they have ended they do not count any more.
    drop(kept);
    wait_for("an even share", Duration::from_secs(30), || {
        let tally = Tally::of(&client.probe_times(Probe::new(target, Transport::Tcp), 100)?);
        Ok(tally.answers.get("web-1").is_some_and(|count| (30..=70).contains(count)).then_some(()))
    })
    .unwrap();
}

fn who(mut stream: &TcpStream) -> String {
    stream.set_read_timeout(Some(patient(Duration::from_secs(2)))).unwrap();
    stream.write_all(b"who\n").unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line.split(' ').next().unwrap().to_owned()
}

#[test]
fn an_unknown_algorithm_is_random_and_said_at_the_service() {
    let cluster = start(2);
    cluster.apply(annotated(web(), algorithm("round-robin"))).unwrap();
    let client = cluster.place_in_pod("default/client").unwrap();
    let target = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    cluster.wait_for_answers(&client, target, Transport::Tcp, &["web-1", "web-2"]).unwrap();
    let note = wait_for("the Event", CHANGE_LIMIT, || {
        let api: Api<Event> = Api::namespaced(cluster.client(), "default");
        let events = cluster.block_on(api.list(&ListParams::default()))?;
        let mut found = events.into_iter().filter(|event| event.reason.as_deref() == Some("InvalidAnnotation"));
        let named = |event: &Event| event.regarding.as_ref().and_then(|regarding| regarding.name.clone());
        Ok(found.find(|event| named(event).as_deref() == Some("web")).and_then(|event| event.note))
    });
    let note = note.unwrap();
    assert!(note.contains("\"round-robin\" is none of random, maglev, least-connections"), "{note}");
}
