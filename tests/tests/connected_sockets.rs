//! What connected sockets remember: the address they named, wherever it is kept, and no longer than they are open.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use aya::maps::{Array, Map, MapData};
use proxy_common::{ABI_VERSION, CONNECTED_PLACES, connected_place};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::twins::Twins;
use trama_lab::{Cluster, Place, Transport, binary};

#[test]
fn two_sockets_of_one_place_see_whom_they_named() {
    let cluster = Cluster::new().unwrap();
    // Each its own endpoint: who sent an answer is told by the endpoint.
    cluster.apply_all([("dns", 1), ("other", 2)].map(|(name, n)| pod(name, n, name, &[8080], &[5353]))).unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    for name in ["dns", "other"] {
        let service = ServiceManifest::new(name, Some(name)).port("UDP", 53, 5353).port("TCP", 80, 8080);
        cluster.apply(service.build()).unwrap();
    }
    let client = cluster.place_in_pod("default/client").unwrap();
    for (transport, port) in [(Transport::UdpConnected, 53), (Transport::Tcp, 80)] {
        let [target, other] = ["dns", "other"].map(|name| SocketAddr::new(cluster.cluster_ips(name).unwrap()[0], port));
        for (address, name) in [(target, "dns"), (other, "other")] {
            cluster.wait_for_answers(&client, address, transport, &[name]).unwrap();
        }
        check(&cluster, &client, target, other, transport);
    }
}

fn check(cluster: &Cluster, client: &Place, target: SocketAddr, other: SocketAddr, transport: Transport) {
    let mut command = Command::new(binary("trama-lab").unwrap());
    command.args(["twins", "--target", &target.to_string(), "--other", &other.to_string()]);
    command.args(["--transport", if transport == Transport::Tcp { "tcp" } else { "udp-connected" }]);
    command.args(["--places", &CONNECTED_PLACES.to_string()]);
    let mut child = client.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped())).unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut input = child.stdin.take().unwrap();
    let twins: Twins = serde_json::from_str(&answers.next().unwrap().unwrap()).unwrap();
    assert_eq!(
        twins.peers,
        [target, target],
        "{transport:?}: whom two sockets of one place take themselves to be connected to"
    );
    if transport != Transport::Tcp {
        assert_eq!(twins.late_answer, Some(target), "who sent what came before the socket was connected to another");
        assert_eq!(twins.reconnected, Some(other));
    }
    assert_eq!(owner(cluster, twins.cookies[0]), twins.cookies[0], "the place is the first socket's");
    input.write_all(b"\n").unwrap();
    assert_eq!(answers.next().unwrap().unwrap(), "\"closed\"");
    assert_eq!(owner(cluster, twins.cookies[0]), 0, "{transport:?}: the place of a closed socket is free");
    input.write_all(b"\n").unwrap();
    assert!(child.wait().unwrap().success());
}

/// Cookie of the socket that has the place of this one; 0 for nobody.
fn owner(cluster: &Cluster, cookie: u64) -> u64 {
    let pins = cluster.topology().node(1).unwrap().bpffs().join(format!("trama/v{ABI_VERSION}/maps/CONNECTED_V4"));
    let map = Map::from_map_data(MapData::from_pin(pins).unwrap()).unwrap();
    let places: Array<MapData, [u64; 4]> = map.try_into().unwrap();
    places.get(&connected_place(cookie), 0).unwrap()[0]
}
