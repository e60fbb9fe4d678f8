//! An endpoint that is to go keeps what it has and gets nothing new; one that is gone is gone from everywhere.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{Cluster, Conversation, Place, Probe, Tally, Transport, Turn, patient, wait_for};

const PATIENCE: Duration = Duration::from_millis(200);
/// For what is gone.
const SECOND: Duration = Duration::from_secs(1);
const ENDED: &str = r#"trama_flow_entries_ended_total{reason="endpoint_gone"}"#;

struct Lab {
    cluster: Cluster,
    stays: IpAddr,
    goes: IpAddr,
    client: Place,
    target: IpAddr,
}

impl Lab {
    /// Two pods, and a Service whose slice the test writes itself.
    fn start() -> Self {
        let cluster = Cluster::new().unwrap();
        let web = |name: &str, node| pod(name, node, "web", &[8080], &[5353]);
        cluster.apply_all([web("stays", 1), web("goes", 2), pod("client", 1, "client", &[], &[])]).unwrap();
        let address = |name: &str| {
            let key = format!("default/{name}");
            cluster.place_in_pod(&key).unwrap();
            cluster.pod_addresses(&key).unwrap()[0]
        };
        let (stays, goes) = (address("stays"), address("goes"));
        cluster.apply(ServiceManifest::new("web", None).port("TCP", 80, 8080).port("UDP", 53, 5353).build()).unwrap();
        let client = cluster.place_in_pod("default/client").unwrap();
        let target = cluster.cluster_ips("web").unwrap()[0];
        let lab = Self { cluster, stays, goes, client, target };
        lab.set(Some(json!({ "ready": true })));
        let outside = lab.client.outside_cgroup();
        // No datagrams on the packet path: a later socket with the port of one that went to the one that goes is the same flow.
        for (place, port, transport) in
            [(&lab.client, 80, Transport::Tcp), (&lab.client, 53, Transport::Udp), (&outside, 80, Transport::Tcp)]
        {
            let target = SocketAddr::new(lab.target, port);
            lab.cluster.wait_for_answers(place, target, transport, &["stays", "goes"]).unwrap();
        }
        lab
    }

    /// Makes the endpoint that goes have these conditions, or none.
    fn set(&self, conditions: Option<Value>) {
        let mut endpoints = vec![json!({ "addresses": [self.stays.to_string()], "conditions": { "ready": true } })];
        endpoints.extend(conditions.map(|now| json!({ "addresses": [self.goes.to_string()], "conditions": now })));
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": "web-1", "namespace": "default",
                "labels": {
                    "kubernetes.io/service-name": "web",
                    "endpointslice.kubernetes.io/managed-by": "trama-lab",
                },
            },
            "addressType": "IPv4",
            "ports": [
                { "name": "tcp-80", "protocol": "TCP", "port": 8080 },
                { "name": "udp-53", "protocol": "UDP", "port": 5353 },
            ],
            "endpoints": endpoints,
        });
        self.cluster.apply(slice).unwrap();
    }

    fn target(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.target, port)
    }

    /// A connection on the packet path to the endpoint that goes.
    fn connection(&self) -> TcpStream {
        let client = self.client.outside_cgroup();
        let found = wait_for("a connection to the one that goes", CHANGE_LIMIT, || {
            let stream = client.connect(self.target(80), patient(CHANGE_LIMIT))?;
            Ok((who(&stream)? == "goes").then_some(stream))
        });
        found.unwrap()
    }

    /// A connected UDP socket that the endpoint that goes answers.
    fn conversation(&self, place: &Place) -> Conversation {
        let found = wait_for("a socket to the one that goes", CHANGE_LIMIT, || {
            let mut conversation = Conversation::start(place, self.target(53), PATIENCE)?;
            Ok((conversation.ask()? == Turn::Answer("goes".to_owned())).then_some(conversation))
        });
        found.unwrap()
    }

    /// Waits until nothing new goes there, and looks that it stays so.
    fn nothing_new(&self) {
        for (port, transport) in [(80, Transport::Tcp), (53, Transport::Udp)] {
            for place in [self.client.clone(), self.client.outside_cgroup()] {
                self.cluster.wait_for_answers(&place, self.target(port), transport, &["stays"]).unwrap();
                let tally = Tally::of(&place.probe_times(Probe::new(self.target(port), transport), 40).unwrap());
                assert_eq!(
                    (tally.answers.get("stays"), tally.failures.len()),
                    (Some(&40), 0),
                    "{transport:?} {place:?}"
                );
            }
        }
    }

    fn ended(&self) -> f64 {
        self.cluster.metrics(1).unwrap().get(ENDED).copied().unwrap_or(0.0)
    }
}

fn who(mut stream: &TcpStream) -> anyhow::Result<String> {
    stream.set_read_timeout(Some(patient(CHANGE_LIMIT)))?;
    stream.write_all(b"who\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line.split(' ').next().unwrap_or_default().to_owned())
}

#[test]
fn an_endpoint_that_terminates_or_is_not_ready_keeps_its_flows_and_gets_no_new_ones() {
    let lab = Lab::start();
    let connection = lab.connection();
    let mut conversations = [lab.client.clone(), lab.client.outside_cgroup()].map(|place| lab.conversation(&place));
    let goes = Turn::Answer("goes".to_owned());
    lab.set(Some(json!({ "ready": false, "serving": true, "terminating": true })));
    lab.nothing_new();
    assert_eq!(who(&connection).unwrap(), "goes");
    for conversation in &mut conversations {
        assert_eq!(conversation.ask().unwrap(), goes, "a flow of datagrams stays while its endpoint serves");
    }
    lab.set(Some(json!({ "ready": false, "serving": false })));
    lab.nothing_new();
    assert_eq!(who(&connection).unwrap(), "goes", "a connection ends by itself");
    lab.set(Some(json!({ "ready": true })));
    for place in [lab.client.clone(), lab.client.outside_cgroup()] {
        lab.cluster.wait_for_answers(&place, lab.target(80), Transport::Tcp, &["stays", "goes"]).unwrap();
    }
    assert_eq!(who(&connection).unwrap(), "goes");
}

#[test]
fn a_deleted_endpoint_is_gone_from_flows_and_sockets_within_a_second() {
    let lab = Lab::start();
    let connection = lab.connection();
    let (mut socket, mut packets) = (lab.conversation(&lab.client), lab.conversation(&lab.client.outside_cgroup()));
    let before = lab.ended();
    lab.set(None);
    let start = Instant::now();
    wait_for("the end of the socket", SECOND, || Ok(socket.ask()?.is_the_end().then_some(()))).unwrap();
    let stays = Turn::Answer("stays".to_owned());
    wait_for("another endpoint", SECOND, || Ok((packets.ask()? == stays).then_some(()))).unwrap();
    println!("datagrams went elsewhere {:?} after the deletion", start.elapsed());
    lab.nothing_new();
    wait_for("the end of its entries", SECOND, || Ok((lab.ended() > before).then_some(()))).unwrap();
    assert_eq!(who(&connection).unwrap(), "goes", "who is answered, as behind a changed selector, goes on");
}

/// A pod that dies without a word: its connection's entries go once a packet is not answered.
#[test]
fn a_connection_to_a_dead_endpoint_leaves_no_entry_behind() {
    let lab = Lab::start();
    let connection = lab.connection();
    // As when a machine fails: nobody says goodbye.
    let interface = lab.cluster.host_interface("default/goes").unwrap();
    let node = lab.cluster.topology().node(2).unwrap();
    let down = || Command::new("ip").args(["link", "set", &interface, "down"]).status();
    assert!(node.netns().run(down).unwrap().unwrap().success());
    lab.set(None);
    lab.nothing_new();
    let before = lab.ended();
    // Nobody answers this, and the kernel repeats it with growing pauses.
    (&connection).write_all(b"who\n").unwrap();
    let start = Instant::now();
    wait_for("the end of its entries", Duration::from_secs(20), || Ok((lab.ended() > before).then_some(()))).unwrap();
    println!("the entries of an unanswered connection were gone after {:?}", start.elapsed());
}
