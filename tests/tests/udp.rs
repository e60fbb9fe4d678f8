//! UDP: an unconnected socket is translated datagram by datagram and sees the Service's address in every answer.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{Cluster, Transport, patient};

#[test]
fn connected_and_unconnected_sockets_are_answered_by_the_service() {
    let cluster = cluster_with_service();
    let target = SocketAddr::new(cluster.cluster_ips("dns").unwrap()[0], 53);
    let client = cluster.place_in_pod("default/client").unwrap();
    for place in [client.clone(), client.outside_cgroup(), cluster.topology().node(1).unwrap().place()] {
        for transport in [Transport::Udp, Transport::UdpConnected] {
            // The tally fails when an answer does not come from the address that was asked.
            cluster.wait_for_answers(&place, target, transport, &["dns-1", "dns-2"]).unwrap();
        }
    }
}

#[test]
fn one_socket_keeps_its_backend_and_is_answered_by_whom_it_asks() {
    let cluster = cluster_with_service();
    let service = SocketAddr::new(cluster.cluster_ips("dns").unwrap()[0], 53);
    let client = cluster.place_in_pod("default/client").unwrap();
    cluster.wait_for_answers(&client.outside_cgroup(), service, Transport::Udp, &["dns-1", "dns-2"]).unwrap();
    let socket = client.netns().run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    socket.set_read_timeout(Some(patient(Duration::from_secs(2)))).unwrap();
    let ask = |target: SocketAddr| {
        socket.send_to(b"who\n", target).unwrap();
        let mut buffer = [0; 512];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        (from, String::from_utf8_lossy(&buffer[..length]).split(' ').next().unwrap().to_owned())
    };
    let (_, first) = ask(service);
    // The other pod: two flows of one socket to the same endpoint are the same packets to it.
    let pod = if first == "dns-1" { "10.244.2.2:5353" } else { "10.244.1.2:5353" }.parse().unwrap();
    for _ in 0..10 {
        assert_eq!(ask(service), (service, first.clone()), "packets of one flow go to one endpoint");
        assert_eq!(ask(pod).0, pod, "a pod asked directly answers as itself");
    }
}

fn cluster_with_service() -> Cluster {
    let cluster = Cluster::new().unwrap();
    cluster.apply_all([1, 2].map(|n| pod(&format!("dns-{n}"), n, "dns", &[], &[5353]))).unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    cluster.apply(ServiceManifest::new("dns", Some("dns")).port("UDP", 53, 5353).build()).unwrap();
    cluster
}
