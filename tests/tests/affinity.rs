//! ClientIP affinity: one endpoint for a client and a ServicePort, whichever frontend and path, until it is idle too long or the
//! endpoint goes.
#![allow(
    missing_docs,
    clippy::panic,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{Cluster, Place, Probe, Tally, Transport, wait_for};

const WEB: [&str; 3] = ["web-1", "web-2", "web-3"];
/// Questions in one round: that three endpoints without affinity give the same answer is less likely than one in ten million.
const ROUND: usize = 16;

fn start(timeout_seconds: u32) -> Cluster {
    let cluster = Cluster::new().unwrap();
    let nodes = [1, 2, 2];
    cluster.apply_all(WEB.iter().zip(nodes).map(|(name, node)| pod(name, node, "web", &[8080], &[5353]))).unwrap();
    cluster.apply_all(["client", "other"].map(|name| pod(name, 1, name, &[], &[]))).unwrap();
    apply(&cluster, Some(timeout_seconds), "NodePort");
    cluster
}

fn apply(cluster: &Cluster, timeout_seconds: Option<u32>, kind: &str) {
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("type", json!(kind)).with("ipFamilyPolicy", json!("RequireDualStack"));
    let service = match timeout_seconds {
        Some(seconds) => service
            .with("sessionAffinity", json!("ClientIP"))
            .with("sessionAffinityConfig", json!({ "clientIP": { "timeoutSeconds": seconds } })),
        None => service.with("sessionAffinity", json!("None")).with("sessionAffinityConfig", json!(null)),
    };
    cluster.apply(service.build()).unwrap();
}

fn round(place: &Place, target: SocketAddr, transport: Transport) -> Tally {
    let tally = Tally::of(&place.probe_times(Probe::new(target, transport), ROUND).unwrap());
    assert_eq!(tally.failures, [], "{transport:?} {target} from {place:?}");
    tally
}

/// Waits for a round that one endpoint answers alone, and returns its name.
fn sticks(place: &Place, target: SocketAddr, transport: Transport) -> String {
    let alone = wait_for("affinity", CHANGE_LIMIT, || {
        let Ok(outcomes) = place.probe_times(Probe::new(target, transport), ROUND) else { return Ok(None) };
        let tally = Tally::of(&outcomes);
        Ok((tally.failures.is_empty() && tally.answers.len() == 1).then(|| tally.servers()))
    });
    alone.unwrap_or_else(|error| panic!("{transport:?} {target} from {place:?}: {error}")).pop_first().unwrap()
}

#[test]
fn a_client_keeps_its_endpoint_on_every_path_and_frontend() {
    let cluster = start(60);
    let pod = cluster.place_in_pod("default/client").unwrap();
    let node = cluster.topology().node(1).unwrap();
    let client = cluster.topology().client();
    for (index, cluster_ip) in cluster.cluster_ips("web").unwrap().into_iter().enumerate() {
        let node_ip: IpAddr = node.addresses()[index];
        for (port, protocol, transport) in [(80, "TCP", Transport::Tcp), (53, "UDP", Transport::Udp)] {
            let by_cluster_ip = SocketAddr::new(cluster_ip, port);
            let by_node_port = SocketAddr::new(node_ip, cluster.node_port("web", protocol, port).unwrap());
            let chosen = sticks(&pod, by_cluster_ip, transport);
            for place in [pod.clone(), pod.outside_cgroup()] {
                for target in [by_cluster_ip, by_node_port] {
                    let servers = round(&place, target, transport).servers();
                    assert_eq!(servers, [chosen.clone()].into(), "{transport:?} {target} from {place:?}");
                }
            }
            let chosen = sticks(&node.place(), by_cluster_ip, transport);
            assert_eq!(round(&node.place(), by_node_port, transport).servers(), [chosen].into());
            let chosen = sticks(&client, by_node_port, transport);
            assert_eq!(round(&client, by_node_port, transport).servers(), [chosen].into());
        }
    }
}

#[test]
fn an_idle_client_is_forgotten_after_the_timeout() {
    let cluster = start(1);
    let pod = cluster.place_in_pod("default/client").unwrap();
    let node = cluster.topology().node(1).unwrap().place();
    let target = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    for place in [pod.clone(), node] {
        let chosen = sticks(&place, target, Transport::Tcp);
        let question = Probe::new(target, Transport::Tcp);
        let mut last = std::time::Instant::now();
        // Asked less often than the timeout, sooner or later another one answers.
        let moved = wait_for("another choice", Duration::from_secs(60), || {
            if last.elapsed() < Duration::from_millis(2100) {
                return Ok(None);
            }
            last = std::time::Instant::now();
            Ok((place.probe(question)?.unwrap().server != chosen).then_some(()))
        });
        assert!(moved.is_ok(), "{place:?} stays with {chosen}");
    }
}

#[test]
fn affinity_ends_with_its_endpoint_and_comes_and_goes_with_the_service() {
    let cluster = start(600);
    let pods = [1, 2, 2].into_iter().zip(WEB).map(|(node, name)| (name, pod(name, node, "web", &[8080], &[5353])));
    let pods: Vec<_> = pods.collect();
    let client = cluster.place_in_pod("default/client").unwrap();
    let node = cluster.topology().node(1).unwrap().place();
    let target = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    for place in [client.clone(), node] {
        let chosen = sticks(&place, target, Transport::Tcp);
        let (_, manifest) = pods.iter().find(|(name, _)| *name == chosen).unwrap();
        cluster.delete(manifest.clone()).unwrap();
        let next = wait_for("another endpoint", CHANGE_LIMIT, || {
            let answer =
                place.probe(Probe { timeout: Duration::from_millis(300), ..Probe::new(target, Transport::Tcp) })?;
            Ok(answer.ok().map(|reply| reply.server).filter(|server| *server != chosen))
        });
        assert_eq!(sticks(&place, target, Transport::Tcp), next.unwrap(), "a new choice is kept as well");
        cluster.apply(manifest.clone()).unwrap();
        cluster.place_in_pod(&format!("default/{chosen}")).unwrap();
    }
    apply(&cluster, None, "NodePort");
    for place in [client.clone(), client.outside_cgroup()] {
        cluster.wait_for_answers(&place, target, Transport::Tcp, &WEB).unwrap();
    }
    apply(&cluster, Some(600), "ClusterIP");
    for place in [client.clone(), client.outside_cgroup()] {
        sticks(&place, target, Transport::Tcp);
    }
}
