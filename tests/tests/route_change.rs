//! A flow remembers where its packets go. That a route changes is noticed within a second all the same, there and back.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use trama_cni::{NetlinkError, Route, in_netns};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{CLIENT_ADDRESSES, Cluster, Transport, patient, wait_for};

/// Until an answer counts as lost; far more than one takes here.
const ANSWER_LIMIT: Duration = Duration::from_millis(200);

#[test]
fn packets_of_a_known_flow_follow_a_changed_route() {
    let cluster = Cluster::new().unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    cluster.apply(pod("web", 2, "web", &[], &[5353])).unwrap();
    cluster.apply(ServiceManifest::new("web", Some("web")).port("UDP", 53, 5353).build()).unwrap();
    let target = (cluster.cluster_ips("web").unwrap()[0], 53).into();
    let client = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
    cluster.wait_for_answers(&client, target, Transport::Udp, &["web"]).unwrap();
    let socket = client.netns().run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    socket.connect(target).unwrap();
    socket.set_read_timeout(Some(patient(ANSWER_LIMIT))).unwrap();
    assert!(is_answered(&socket), "the first packet opens the flow");
    assert!(is_answered(&socket), "the second one remembers the route");

    let right = cluster.topology().node(2).unwrap().addresses()[0];
    // The outside client forwards nothing.
    for (gateway, answered) in [(CLIENT_ADDRESSES[0], false), (right, true)] {
        route_pods_of_node_2(&cluster, gateway);
        let changed = Instant::now();
        let limit = patient(Duration::from_secs(5));
        wait_for("the packets following the route", limit, || Ok((is_answered(&socket) == answered).then_some(())))
            .unwrap();
        // One answer that was waited for is part of it.
        let limit = patient(Duration::from_secs(1) + ANSWER_LIMIT);
        assert!(changed.elapsed() <= limit, "{gateway}: {:?}", changed.elapsed());
    }
}

/// Whether the datagram is answered; late answers to earlier ones are thrown away first.
fn is_answered(socket: &UdpSocket) -> bool {
    let mut answer = [0; 512];
    socket.set_nonblocking(true).unwrap();
    while socket.recv(&mut answer).is_ok() {}
    socket.set_nonblocking(false).unwrap();
    socket.send(b"who").unwrap();
    socket.recv(&mut answer).is_ok()
}

fn route_pods_of_node_2(cluster: &Cluster, gateway: IpAddr) {
    let to = IpNet::V4(cluster.topology().node(2).unwrap().pod_cidrs().v4);
    in_netns(cluster.topology().node(1).unwrap().netns(), async |session| -> Result<(), NetlinkError> {
        let interface = session.link("eth0").await?;
        session.set_route(Route { to, via: Some(gateway), interface }).await
    })
    .unwrap();
}
