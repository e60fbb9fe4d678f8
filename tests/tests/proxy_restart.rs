//! trama-proxy may die at any time: the kernel goes on with what it was told, and a new process takes over without a gap.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{Cluster, Place, Probe, Transport, patient};

#[test]
fn traffic_flows_while_the_proxy_is_dead_and_while_it_starts_again() {
    let cluster = Cluster::new().unwrap();
    cluster.apply_all([1, 2].map(|n| pod(&format!("web-{n}"), n, "web", &[8080], &[5353]))).unwrap();
    cluster.apply_all(["client", "client-2"].map(|name| pod(name, 1, "client", &[], &[]))).unwrap();
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    cluster.apply(service.build()).unwrap();
    let vip = cluster.cluster_ips("web").unwrap()[0];
    let client = cluster.place_in_pod("default/client").unwrap();
    let places = [client, cluster.place_in_pod("default/client-2").unwrap().outside_cgroup()];
    for place in &places {
        cluster.wait_for_answers(place, (vip, 80).into(), Transport::Tcp, &["web-1", "web-2"]).unwrap();
        cluster.wait_for_answers(place, (vip, 53).into(), Transport::Udp, &["web-1", "web-2"]).unwrap();
    }
    let mut kept = places[1].connect((vip, 80).into(), patient(Duration::from_secs(2))).unwrap();
    let first = line_of(&mut kept);

    cluster.kill_proxy(1).unwrap();
    every_question_is_answered("no proxy", &places, (vip, 80).into(), Transport::Tcp);
    every_question_is_answered("no proxy", &places, (vip, 53).into(), Transport::Udp);
    assert_eq!(line_of(&mut kept), first, "an open connection goes on");

    std::thread::scope(|scope| {
        let restart = scope.spawn(|| cluster.restart_proxy(1));
        while !restart.is_finished() {
            every_question_is_answered("takeover", &places, (vip, 80).into(), Transport::Tcp);
        }
        restart.join().unwrap().unwrap();
    });
    assert_eq!(line_of(&mut kept), first, "an open connection outlives the takeover");

    cluster.apply(pod("web-3", 2, "web", &[8080], &[5353])).unwrap();
    for place in &places {
        cluster.wait_for_answers(place, (vip, 80).into(), Transport::Tcp, &["web-1", "web-2", "web-3"]).unwrap();
    }
}

/// Not once a failure: there is no moment in which the Service is gone.
fn every_question_is_answered(when: &str, places: &[Place], target: SocketAddr, transport: Transport) {
    for place in places {
        let path = if place.cgroup().is_some() { "socket" } else { "packet" };
        let outcomes = place.probe_times(Probe::new(target, transport), 20).unwrap();
        let failed: Vec<_> = outcomes.iter().enumerate().filter(|(_, outcome)| outcome.is_err()).collect();
        assert!(failed.is_empty(), "{when}, {path} path, {transport:?}: {failed:?}");
    }
}

fn line_of(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(patient(Duration::from_secs(2)))).unwrap();
    stream.write_all(b"who\n").unwrap();
    let mut line = String::new();
    BufReader::new(&mut *stream).read_line(&mut line).unwrap();
    assert!(!line.is_empty(), "the connection was closed");
    line
}
