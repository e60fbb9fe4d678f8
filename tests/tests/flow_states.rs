//! Flows know how far they have got, end when they are idle for as long as their state allows, and heal when half of one is lost.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use proxy_common::{Be16, FLOW_CLOSED, FLOW_CONFIRMED, FLOW_REPLY, Flow, FlowKey, SEEN_TICKS, V4};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{Cluster, ClusterOptions, Conversation, Place, Transport, Turn, patient, wait_for};
use trama_proxy::dataplane::ebpf::FlowTable;

const PATIENCE: Duration = Duration::from_millis(200);
/// Two looks at all flows, and a short timeout.
const END_LIMIT: Duration = Duration::from_secs(20);

struct Lab {
    cluster: Cluster,
    client: Place,
    target: std::net::IpAddr,
    version: PathBuf,
}

impl Lab {
    fn start(proxy_arguments: &'static [&'static str]) -> Self {
        let cluster = Cluster::start(&ClusterOptions { proxy_arguments, ..ClusterOptions::default() }).unwrap();
        cluster.apply_all([pod("web", 2, "web", &[8080], &[5353]), pod("client", 1, "client", &[], &[])]).unwrap();
        let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
        cluster.apply(service.build()).unwrap();
        let client = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
        let target = cluster.cluster_ips("web").unwrap().remove(0);
        for (port, transport) in [(80, Transport::Tcp), (53, Transport::Udp)] {
            cluster.wait_for_answers(&client, SocketAddr::new(target, port), transport, &["web"]).unwrap();
        }
        let trama = cluster.topology().node(1).unwrap().bpffs().join("trama");
        let version = std::fs::read_dir(trama).unwrap().next().unwrap().unwrap().path();
        Self { cluster, client, target, version }
    }

    fn table(&self) -> FlowTable<V4> {
        FlowTable::open(&self.version).unwrap()
    }

    fn flows(&self) -> Vec<(FlowKey<V4>, Flow<V4>)> {
        let mut flows = Vec::new();
        self.table().each(|key, flow| flows.push((key, flow))).unwrap();
        flows
    }

    fn connect(&self) -> TcpStream {
        self.client.connect(SocketAddr::new(self.target, 80), patient(CHANGE_LIMIT)).unwrap()
    }

    fn last_seen(&self, port: u16) -> Option<u32> {
        let of_client = |(key, flow): &(FlowKey<V4>, Flow<V4>)| {
            key.source_port == Be16::from_host(port) && flow.flags & FLOW_REPLY == 0
        };
        self.flows().iter().find(|entry| of_client(entry)).map(|(_, flow)| flow.last_seen)
    }

    /// The flags of both entries of the client's flow from `port`.
    fn flags(&self, port: u16) -> Option<[u8; 2]> {
        let (key, flow) = self
            .flows()
            .into_iter()
            .find(|(key, flow)| key.source_port == Be16::from_host(port) && flow.flags & FLOW_REPLY == 0)?;
        let twin = self.table().get(&flow.twin_key(key.protocol)).unwrap()?;
        Some([flow.flags, twin.flags])
    }

    fn have_all(&self, port: u16, wanted: u8) -> bool {
        self.flags(port).is_some_and(|flags| flags.iter().all(|flags| flags & wanted == wanted))
    }
}

fn ask(mut stream: &TcpStream) -> anyhow::Result<String> {
    stream.set_read_timeout(Some(patient(CHANGE_LIMIT)))?;
    stream.write_all(b"who\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line.split(' ').next().unwrap_or_default().to_owned())
}

#[test]
fn a_connection_is_followed_from_its_answer_to_its_end() {
    let lab = Lab::start(&[]);
    let connection = lab.connect();
    let port = connection.local_addr().unwrap().port();
    wait_for("the answer", CHANGE_LIMIT, || Ok(lab.have_all(port, FLOW_CONFIRMED).then_some(()))).unwrap();
    assert_eq!(ask(&connection).unwrap(), "web");
    assert!(lab.flags(port).unwrap().iter().all(|flags| flags & FLOW_CLOSED == 0));
    drop(connection);
    wait_for("the end of both sides", CHANGE_LIMIT, || Ok(lab.have_all(port, FLOW_CLOSED).then_some(()))).unwrap();
    // With an RST at once.
    let connection = lab.connect();
    let port = connection.local_addr().unwrap().port();
    assert_eq!(ask(&connection).unwrap(), "web");
    socket2::SockRef::from(&connection).set_linger(Some(Duration::ZERO)).unwrap();
    drop(connection);
    wait_for("the reset", CHANGE_LIMIT, || Ok(lab.have_all(port, FLOW_CLOSED).then_some(()))).unwrap();
}

#[test]
fn what_is_idle_ends_as_configured_and_what_is_not_stays() {
    let lab = Lab::start(&[
        "--conntrack-udp-timeout=1s",
        "--conntrack-udp-timeout-stream=1s",
        "--conntrack-tcp-timeout-established=1s",
    ]);
    let target = SocketAddr::new(lab.target, 53);
    let mut busy = Conversation::start(&lab.client, target, PATIENCE).unwrap();
    let mut idle = Conversation::start(&lab.client, target, PATIENCE).unwrap();
    let answer = Turn::Answer("web".to_owned());
    assert_eq!(idle.ask().unwrap(), answer);
    let connection = lab.connect();
    assert_eq!(ask(&connection).unwrap(), "web");
    let port = connection.local_addr().unwrap().port();
    assert!(lab.flags(port).is_some());
    let entries = |protocol: u8| lab.flows().iter().filter(|(key, _)| key.protocol == protocol).count();
    wait_for("the end of all but one flow of datagrams", END_LIMIT, || {
        assert_eq!(busy.ask()?, answer, "an active flow stays");
        Ok((entries(17) == 2).then_some(()))
    })
    .unwrap();
    wait_for("the end of the connection", END_LIMIT, || Ok(lab.flags(port).is_none().then_some(()))).unwrap();
    assert_eq!(idle.ask().unwrap(), answer, "a new flow where the old one was");
    let ended = lab.cluster.metrics(1).unwrap()[r#"trama_flow_entries_ended_total{reason="idle"}"#];
    assert!(ended >= 2.0, "{ended}");
}

#[test]
fn an_answers_entry_that_was_evicted_is_made_again() {
    let lab = Lab::start(&[]);
    let connection = lab.connect();
    assert_eq!(ask(&connection).unwrap(), "web");
    let port = Be16::from_host(connection.local_addr().unwrap().port());
    let flows = lab.flows();
    let is_ours = |(key, flow): &(FlowKey<V4>, Flow<V4>)| key.destination_port == port && flow.flags & FLOW_REPLY != 0;
    let (answer, _) = flows.iter().find(|entry| is_ours(entry)).unwrap();
    // Only a packet that comes some time after the last looks at both entries. Another connection shows how time goes on.
    let other = lab.connect();
    let other_port = other.local_addr().unwrap().port();
    let seen = lab.last_seen(port.to_host()).unwrap();
    wait_for("some ticks", CHANGE_LIMIT, || {
        assert_eq!(ask(&other)?, "web");
        Ok(lab.last_seen(other_port).filter(|now| now.wrapping_sub(seen) > 2 * SEEN_TICKS).map(drop))
    })
    .unwrap();
    assert!(lab.table().remove(answer).unwrap());
    // The client's packet, or its repetition, brings it back before the answer comes.
    assert_eq!(ask(&connection).unwrap(), "web");
    assert!(lab.have_all(port.to_host(), FLOW_CONFIRMED));
}
