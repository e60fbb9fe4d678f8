//! A port that no Service has at a ClusterIP is refused; an address of the service network that no Service has is silent.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{Cluster, Failure, Place, Probe, Transport, wait_for};

/// A refused SYN may come while `connect` holds its socket; then its repetition a second later is refused.
const PACKET_LIMIT: Duration = Duration::from_millis(2500);
const SILENCE: Duration = Duration::from_millis(400);

fn start() -> (Cluster, Vec<IpAddr>, Vec<Place>) {
    let cluster = Cluster::new().unwrap();
    cluster.apply_all([pod("web-1", 1, "web", &[8080], &[]), pod("client", 1, "client", &[], &[])]).unwrap();
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080);
    cluster.apply(service.with("ipFamilyPolicy", json!("RequireDualStack")).build()).unwrap();
    let ips = cluster.cluster_ips("web").unwrap();
    let client = cluster.place_in_pod("default/client").unwrap();
    let node = cluster.topology().node(1).unwrap().place();
    for ip in &ips {
        cluster.wait_for_answers(&client, (*ip, 80).into(), Transport::Tcp, &["web-1"]).unwrap();
    }
    let places = vec![client.clone(), client.outside_cgroup(), node.clone(), node.outside_cgroup()];
    (cluster, ips, places)
}

fn outcome(place: &Place, target: SocketAddr, transport: Transport, timeout: Duration) -> Failure {
    place.probe(Probe { timeout, ..Probe::new(target, transport) }).unwrap().unwrap_err()
}

#[test]
fn an_unknown_port_is_refused_from_everywhere() {
    let (cluster, ips, places) = start();
    for ip in ips {
        for place in &places {
            for (port, transport) in [(81, Transport::Tcp), (80, Transport::UdpConnected)] {
                let failure = outcome(place, (ip, port).into(), transport, PACKET_LIMIT);
                assert_eq!(failure, Failure::Refused, "{transport:?} {ip} port {port} from {place:?}");
            }
        }
    }
    let metrics = cluster.metrics(1).unwrap();
    for reason in ["packet_unserved_port", "socket_unserved_port"] {
        let refused = metrics.get(&format!("trama_dataplane_drop_total{{reason=\"{reason}\"}}"));
        assert!(refused.is_some_and(|count| *count >= 4.0), "{reason}: {refused:?}");
    }
}

#[test]
fn an_address_that_no_service_has_is_silent_until_one_has_it() {
    let (cluster, ips, places) = start();
    let free: [IpAddr; 2] = ["10.96.250.250".parse().unwrap(), "fd00:10:96::fafa".parse().unwrap()];
    for (ip, used) in free.into_iter().zip(&ips) {
        assert_eq!(ip.is_ipv4(), used.is_ipv4());
        for place in &places {
            for transport in [Transport::Tcp, Transport::UdpConnected] {
                let failure = outcome(place, (ip, 80).into(), transport, SILENCE);
                assert_eq!(failure, Failure::Timeout, "{transport:?} {ip} from {place:?}");
            }
        }
    }
    let service = ServiceManifest::new("late", Some("web")).port("TCP", 80, 8080);
    let late = service.with("clusterIP", json!(free[0].to_string())).build();
    cluster.apply(late.clone()).unwrap();
    cluster.wait_for_answers(&places[0], (free[0], 80).into(), Transport::Tcp, &["web-1"]).unwrap();
    assert_eq!(outcome(&places[0], (free[0], 81).into(), Transport::Tcp, SILENCE), Failure::Refused);
    cluster.delete(late).unwrap();
    let probe = Probe { timeout: SILENCE, ..Probe::new((free[0], 80).into(), Transport::Tcp) };
    // Answered as long as the change is on its way.
    let silent = || Ok((places[0].probe(probe)? == Err(Failure::Timeout)).then_some(()));
    wait_for("silence", CHANGE_LIMIT, silent).unwrap();
}

/// Protocols without ports: an ICMP echo request is refused at a ClusterIP, as any other protocol is.
#[test]
fn a_clusterip_answers_no_ping() {
    let (_cluster, ips, places) = start();
    let icmp = |ip: IpAddr| if ip.is_ipv4() { (Protocol::ICMPV4, 8_u8) } else { (Protocol::ICMPV6, 128) };
    for ip in ips {
        let (protocol, echo_request) = icmp(ip);
        let domain = Domain::for_address((ip, 0).into());
        let socket = places[1].netns().run(|| Socket::new(domain, Type::RAW, Some(protocol)).unwrap()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        // A raw socket for ICMP over IPv4 sends what it is given, checksum included; over IPv6 the kernel fills that in.
        let mut request = [echo_request, 0, 0, 0, 0x12, 0x34, 0, 1];
        if ip.is_ipv4() {
            let sum = !(0x0800_u32 + 0x1234 + 1);
            request[2..4].copy_from_slice(&(sum as u16).to_be_bytes());
        }
        socket.send_to(&request, &SocketAddr::new(ip, 0).into()).unwrap();
        let unreachable: &[u8] = if ip.is_ipv4() { &[3, 3] } else { &[1, 4] };
        let answer = wait_for("port unreachable", Duration::from_secs(5), || {
            let mut buffer = [0_u8; 256];
            let length = std::io::Read::read(&mut &socket, &mut buffer).unwrap();
            let header = if ip.is_ipv4() { 20 } else { 0 };
            Ok(buffer[header..length].starts_with(unreachable).then(|| buffer[header..length].to_vec()))
        })
        .unwrap();
        // The last eight bytes; the checksum among them is not this test's where the kernel made it.
        let quoted = &answer[answer.len() - request.len()..];
        assert_eq!((&quoted[..2], &quoted[4..]), (&request[..2], &request[4..]), "the answer quotes the question");
    }
}
