//! A process that is configured for another mode than the one before it takes everything over, and nothing of the other mode stays in force.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use node_sys::nftables::{Family, Nftables};
use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{Cluster, Failure, Node, Place, Probe, Transport, patient, wait_for};

const WEB: [&str; 2] = ["web-1", "web-2"];
/// Each mode once behind each other.
const MODES: [&str; 7] = ["nftables", "ebpf", "iptables", "nftables", "iptables", "ebpf", "nftables"];

fn service(name: &str, app: Option<&str>) -> serde_json::Value {
    let service = ServiceManifest::new(name, app).port("TCP", 80, 8080).port("UDP", 53, 5353);
    service.with("type", json!("NodePort")).build()
}

/// Modes that have something in a node's kernel.
fn left_at(node: &Node) -> Vec<&'static str> {
    let has_table = || Nftables::open().unwrap().table(Family::Ipv4, "trama").unwrap().is_some();
    let saved = || Command::new("iptables-save").output().unwrap().stdout;
    let iptables = node.netns().run(|| String::from_utf8_lossy(&saved()).contains("TRAMA-")).unwrap();
    let all = [
        ("ebpf", node.bpffs().join("trama").exists()),
        ("nftables", node.netns().run(has_table).unwrap()),
        ("iptables", iptables),
    ];
    all.into_iter().filter(|(_, there)| *there).map(|(mode, _)| mode).collect()
}

fn who(mut stream: &TcpStream) -> String {
    stream.set_read_timeout(Some(patient(Duration::from_secs(5)))).unwrap();
    stream.write_all(b"who\n").unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

#[test]
fn nothing_of_another_mode_stays_and_connections_do() {
    let cluster = Cluster::new().unwrap();
    cluster.apply_all((1..=2).map(|n| pod(&format!("web-{n}"), n, "web", &[8080], &[5353]))).unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    cluster.apply(service("web", Some("web"))).unwrap();
    let node = cluster.topology().node(1).unwrap();
    let inside = cluster.place_in_pod("default/client").unwrap();
    let outside = cluster.topology().client();
    let vip = cluster.cluster_ips("web").unwrap()[0];
    let port = cluster.node_port("web", "TCP", 80).unwrap();
    let targets = [(inside.outside_cgroup(), vip, 80), (outside, node.addresses()[0], port)];
    let kept = targets.map(|(place, ip, port)| {
        cluster.wait_for_answers(&place, (ip, port).into(), Transport::Tcp, &WEB).unwrap();
        let stream = place.connect((ip, port).into(), patient(Duration::from_secs(2))).unwrap();
        let first = who(&stream);
        (stream, first)
    });
    assert_eq!(left_at(node), ["ebpf"]);
    for (round, mode) in MODES.into_iter().enumerate() {
        cluster.kill_proxy(1).unwrap();
        cluster.restart_proxy_with(1, &["--proxy-mode", mode]).unwrap();
        assert_eq!(left_at(node), [mode], "round {round}");
        for (stream, first) in &kept {
            assert_eq!(who(stream), *first, "round {round}, {mode}");
        }
        new_services_are_served(&cluster, &inside, round);
    }
}

/// What the programs of a mode before do not know: they would take a connection to it for one to an address that nobody has.
fn new_services_are_served(cluster: &Cluster, place: &Place, round: usize) {
    let (served, empty) = (format!("served-{round}"), format!("empty-{round}"));
    cluster.apply_all([service(&served, Some("web")), service(&empty, Some("nobody"))]).unwrap();
    let address = |name: &str| (cluster.cluster_ips(name).unwrap()[0], 80).into();
    for place in [place.clone(), place.outside_cgroup()] {
        cluster.wait_for_answers(&place, address(&served), Transport::Tcp, &WEB).unwrap();
        let probe = Probe::new(address(&empty), Transport::Tcp);
        wait_for("a refusal", CHANGE_LIMIT, || Ok((place.probe(probe)? == Err(Failure::Refused)).then_some(())))
            .unwrap();
    }
}
