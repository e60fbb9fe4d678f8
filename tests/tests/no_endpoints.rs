//! A Service without endpoints refuses at once, everywhere; it does not leave its clients to time out.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{Cluster, Failure, Place, Probe, Transport, wait_for};

/// A socket program refuses at once.
const SOCKET_LIMIT: Duration = Duration::from_millis(300);
/// An ICMP message that comes back while `connect` still holds its socket is dropped by the kernel (`TcpExtLockDroppedIcmps`): then
/// the SYN's first repetition, a second later, is refused.
const PACKET_LIMIT: Duration = Duration::from_millis(2500);

/// Waits until a refusal comes, and then asks that every further one comes in time.
fn refuses(place: &Place, target: SocketAddr, transport: Transport) {
    let timeout = if place.cgroup().is_some() { SOCKET_LIMIT } else { PACKET_LIMIT };
    let probe = Probe { timeout, ..Probe::new(target, transport) };
    let refused =
        wait_for("a refusal", CHANGE_LIMIT, || Ok((place.probe(probe)? == Err(Failure::Refused)).then_some(())));
    assert!(refused.is_ok(), "{transport:?} {target}: {:?}", place.probe(probe).unwrap());
    for outcome in place.probe_times(probe, 5).unwrap() {
        assert_eq!(outcome, Err(Failure::Refused), "{transport:?} {target}");
    }
}

#[test]
fn clusterip_and_nodeport_refuse_in_both_families() {
    let cluster = Cluster::new().unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    let service = ServiceManifest::new("empty", Some("nobody")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply(service.build()).unwrap();
    let client = cluster.place_in_pod("default/client").unwrap();
    let node = cluster.topology().node(1).unwrap();
    for ip in cluster.cluster_ips("empty").unwrap() {
        for place in [client.clone(), client.outside_cgroup(), node.place()] {
            refuses(&place, (ip, 80).into(), Transport::Tcp);
            refuses(&place, (ip, 53).into(), Transport::UdpConnected);
        }
    }
    let tcp = cluster.node_port("empty", "TCP", 80).unwrap();
    let udp = cluster.node_port("empty", "UDP", 53).unwrap();
    for ip in node.addresses() {
        refuses(&cluster.topology().client(), (ip, tcp).into(), Transport::Tcp);
        refuses(&cluster.topology().client(), (ip, udp).into(), Transport::UdpConnected);
    }
}

#[test]
fn the_last_endpoint_to_go_turns_answers_into_refusals() {
    let cluster = Cluster::new().unwrap();
    let last = pod("last", 2, "web", &[8080], &[]);
    cluster.apply_all([last.clone(), pod("client", 1, "client", &[], &[])]).unwrap();
    cluster.apply(ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).build()).unwrap();
    let target = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    let client = cluster.place_in_pod("default/client").unwrap();
    cluster.wait_for_answers(&client, target, Transport::Tcp, &["last"]).unwrap();
    cluster.delete(last).unwrap();
    for place in [client.clone(), client.outside_cgroup()] {
        refuses(&place, target, Transport::Tcp);
    }
}
