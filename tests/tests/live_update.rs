//! What changes in the API changes in the kernel: endpoints come and go, Services appear, change and disappear.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{Cluster, Probe, Transport, wait_for};

#[test]
fn endpoints_come_and_go() {
    let cluster = Cluster::new().unwrap();
    let web = |n: usize| pod(&format!("web-{n}"), n, "web", &[8080], &[]);
    cluster.apply_all([web(1), pod("client", 1, "client", &[], &[])]).unwrap();
    cluster.apply(ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).build()).unwrap();
    let target = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    let client = cluster.place_in_pod("default/client").unwrap();
    for place in [client.clone(), client.outside_cgroup()] {
        cluster.wait_for_answers(&place, target, Transport::Tcp, &["web-1"]).unwrap();
        cluster.apply(web(2)).unwrap();
        cluster.wait_for_answers(&place, target, Transport::Tcp, &["web-1", "web-2"]).unwrap();
        cluster.delete(web(2)).unwrap();
        cluster.wait_for_answers(&place, target, Transport::Tcp, &["web-1"]).unwrap();
    }
}

#[test]
fn services_appear_change_their_port_and_disappear() {
    let cluster = Cluster::new().unwrap();
    cluster.apply_all([pod("web-1", 2, "web", &[8080, 9090], &[]), pod("client", 1, "client", &[], &[])]).unwrap();
    let client = cluster.place_in_pod("default/client").unwrap();
    cluster.place_in_pod("default/web-1").unwrap();
    let service = |port| ServiceManifest::new("web", Some("web")).port("TCP", port, 8080).build();
    cluster.apply(service(80)).unwrap();
    let created = Instant::now();
    let vip = cluster.cluster_ips("web").unwrap()[0];
    for place in [client.clone(), client.outside_cgroup()] {
        cluster.wait_for_answers(&place, (vip, 80).into(), Transport::Tcp, &["web-1"]).unwrap();
    }
    println!("a new Service answered on both paths after {:?}", created.elapsed());
    cluster.apply(service(81)).unwrap();
    for place in [client.clone(), client.outside_cgroup()] {
        cluster.wait_for_answers(&place, (vip, 81).into(), Transport::Tcp, &["web-1"]).unwrap();
    }
    cluster.delete(service(81)).unwrap();
    for place in [client.clone(), client.outside_cgroup()] {
        for port in [80, 81] {
            let probe = Probe { timeout: Duration::from_millis(200), ..Probe::new((vip, port).into(), Transport::Tcp) };
            wait_for("the end of the Service", CHANGE_LIMIT, || Ok(place.probe(probe)?.is_err().then_some(())))
                .unwrap();
        }
    }
}
