//! detectLocalMode InterfaceNamePrefix: who comes in through a pod's interface is a pod, whatever its address.
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
use trama_lab::{Cluster, ClusterOptions, Failure, Probe, Transport, wait_for};

/// What the names of the nodes' ends of pods' links begin with.
const PREFIX: &str = "trama";

/// A NodePort with the policy Local whose only endpoint is on node-2, asked on node-1: pods are answered, others are not.
fn start(proxy_arguments: &'static [&'static str]) -> (Cluster, [SocketAddr; 2]) {
    let cluster = Cluster::start(&ClusterOptions { proxy_arguments, ..ClusterOptions::default() }).unwrap();
    cluster.apply_all([pod("web", 2, "web", &[8080], &[]), pod("client", 1, "client", &[], &[])]).unwrap();
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080);
    let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply(service.with("externalTrafficPolicy", json!("Local")).build()).unwrap();
    let port = cluster.node_port("web", "TCP", 80).unwrap();
    let targets = cluster.topology().node(1).unwrap().addresses().map(|ip| (ip, port).into());
    (cluster, targets)
}

#[test]
fn a_pod_is_known_by_the_interface_that_it_comes_in_through() {
    let (cluster, targets) =
        start(&["--detect-local-mode", "InterfaceNamePrefix", "--pod-interface-name-prefix", PREFIX]);
    let client = cluster.place_in_pod("default/client").unwrap();
    assert!(cluster.host_interface("default/client").unwrap().starts_with(PREFIX));
    for target in targets {
        for place in [client.clone(), client.outside_cgroup()] {
            cluster.wait_for_answers(&place, target, Transport::Tcp, &["web"]).unwrap();
        }
        let outside = Probe { timeout: Duration::from_millis(500), ..Probe::new(target, Transport::Tcp) };
        assert_eq!(cluster.topology().client().probe(outside).unwrap(), Err(Failure::Timeout));
    }
}

#[test]
fn a_pod_behind_another_interface_is_a_stranger() {
    let (cluster, targets) =
        start(&["--detect-local-mode", "InterfaceNamePrefix", "--pod-interface-name-prefix", "none"]);
    let client = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
    for target in targets {
        let probe = Probe { timeout: Duration::from_millis(500), ..Probe::new(target, Transport::Tcp) };
        let silent = || Ok((client.probe(probe)? == Err(Failure::Timeout)).then_some(()));
        wait_for("silence", CHANGE_LIMIT, silent).unwrap();
        assert_eq!(client.probe(probe).unwrap(), Err(Failure::Timeout));
    }
}
