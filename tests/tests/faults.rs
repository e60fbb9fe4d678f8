//! Bad input harms nobody else: contested addresses, a Service that the kernel has no room for, endpoints that lead in a circle.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use serde_json::json;
use trama_lab::scenario::{ServiceManifest, endpoint_slice, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{Cluster, ClusterOptions, Probe, Transport, wait_for};

const EXTERNAL: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 10));
/// From the moment that there is room until a refused Service is tried again.
const RETRY_LIMIT: Duration = Duration::from_secs(60);

#[test]
fn the_first_owner_of_an_external_ip_keeps_it_over_restarts() {
    let cluster = Cluster::new().unwrap();
    let web = |name: &str| pod(&format!("{name}-pod"), 2, name, &[8080], &[]);
    cluster.apply_all([web("z-old"), web("a-young"), pod("client", 1, "client", &[], &[])]).unwrap();
    let claimant =
        |name| ServiceManifest::new(name, Some(name)).port("TCP", 80, 8080).with("externalIPs", json!([EXTERNAL]));
    cluster.apply(claimant("z-old").build()).unwrap();
    // Creation times are whole seconds.
    let created = cluster.service("z-old").unwrap().metadata.creation_timestamp.unwrap().0.as_second();
    wait_for("the next second", CHANGE_LIMIT, || {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
        Ok((i64::try_from(now)? > created).then_some(()))
    })
    .unwrap();
    cluster.apply(claimant("a-young").build()).unwrap();
    let young = SocketAddr::new(cluster.cluster_ips("a-young").unwrap()[0], 80);
    let client = cluster.place_in_pod("default/client").unwrap();
    let external = SocketAddr::new(EXTERNAL, 80);
    for round in ["before", "after"] {
        for place in [client.clone(), client.outside_cgroup()] {
            cluster.wait_for_answers(&place, young, Transport::Tcp, &["a-young-pod"]).unwrap();
            let seen = cluster.wait_for_answers(&place, external, Transport::Tcp, &["z-old-pod"]);
            assert!(seen.is_ok(), "{round} the restart: {seen:?}");
        }
        assert!((cluster.metrics(1).unwrap()["trama_frontend_conflicts"] - 1.0).abs() < f64::EPSILON);
        cluster.kill_proxy(1).unwrap();
        cluster.restart_proxy(1).unwrap();
    }
    cluster.delete(claimant("z-old").build()).unwrap();
    for place in [client.clone(), client.outside_cgroup()] {
        cluster.wait_for_answers(&place, external, Transport::Tcp, &["a-young-pod"]).unwrap();
    }
}

#[test]
fn a_service_without_room_is_refused_alone_and_tried_again() {
    let proxy_arguments = &["--max-endpoints=64"];
    let cluster = Cluster::start(&ClusterOptions { proxy_arguments, ..ClusterOptions::default() }).unwrap();
    cluster.keep_maps_from_growing(1).unwrap();
    cluster.apply_all([pod("web-1", 2, "web", &[8080], &[]), pod("client", 1, "client", &[], &[])]).unwrap();
    cluster.apply(ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).build()).unwrap();
    let web = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    let client = cluster.place_in_pod("default/client").unwrap();
    let addresses = |count: u8| (1..=count).map(|host| Ipv4Addr::new(10, 244, 9, host).into()).collect::<Vec<_>>();
    let refused = |count: f64| {
        wait_for("the count of refused Services", RETRY_LIMIT, || {
            let metrics = cluster.metrics(1)?;
            Ok(metrics.get("trama_service_ports_refused").filter(|n| (**n - count).abs() < f64::EPSILON).map(|_| ()))
        })
        .unwrap();
    };
    for (name, count) in [("hog", 40), ("big", 50)] {
        cluster.apply(ServiceManifest::new(name, None).port("TCP", 80, 8080).build()).unwrap();
        cluster.apply(endpoint_slice(&format!("{name}-1"), name, 80, 8080, &addresses(count))).unwrap();
        cluster.wait_for_answers(&client, web, Transport::Tcp, &["web-1"]).unwrap();
    }
    refused(1.0);
    // Others change as they like meanwhile.
    cluster.apply(pod("web-2", 1, "web", &[8080], &[])).unwrap();
    cluster.wait_for_answers(&client, web, Transport::Tcp, &["web-1", "web-2"]).unwrap();
    refused(1.0);
    // Room comes back, and nothing but time has to pass.
    cluster.delete(ServiceManifest::new("hog", None).port("TCP", 80, 8080).build()).unwrap();
    refused(0.0);
    cluster.wait_for_answers(&client, web, Transport::Tcp, &["web-1", "web-2"]).unwrap();
}

#[test]
fn an_endpoint_that_is_a_cluster_ip_leads_nowhere_and_ends() {
    let cluster = Cluster::new().unwrap();
    cluster.apply_all([pod("web-1", 2, "web", &[8080], &[]), pod("client", 1, "client", &[], &[])]).unwrap();
    cluster.apply(ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).build()).unwrap();
    for name in ["loop", "other"] {
        cluster.apply(ServiceManifest::new(name, None).port("TCP", 80, 80).build()).unwrap();
    }
    let vip = |name: &str| cluster.cluster_ips(name).unwrap()[0];
    // Each is the other's endpoint, and its own.
    for (name, others) in [("loop", [vip("other"), vip("loop")]), ("other", [vip("loop"), vip("other")])] {
        cluster.apply(endpoint_slice(&format!("{name}-1"), name, 80, 80, &others)).unwrap();
    }
    let client = cluster.place_in_pod("default/client").unwrap();
    for place in [client.clone(), client.outside_cgroup(), cluster.topology().node(1).unwrap().place()] {
        let web = SocketAddr::new(vip("web"), 80);
        cluster.wait_for_answers(&place, web, Transport::Tcp, &["web-1"]).unwrap();
        let timeout = Duration::from_millis(300);
        let probe = Probe { timeout, ..Probe::new(SocketAddr::new(vip("loop"), 80), Transport::Tcp) };
        for outcome in place.probe_times(probe, 4).unwrap() {
            assert!(outcome.is_err(), "{outcome:?}");
        }
        cluster.wait_for_answers(&place, web, Transport::Tcp, &["web-1"]).unwrap();
    }
}
