//! Addresses and ports that nobody serves, loopback, interfaces that tell pods, and health checks.

use super::build::{endpoint, exposed, key, node, policy, service, slice, world};
use super::trace::{Verdict, tcp, through, to};
use crate::model::{
    Desired, HealthCheck, IpFamily, NodeConfig, NodePolicy, PodTraffic, ServiceObject, decide, health_checks,
};

const POD: &str = "10.0.0.5";

fn with_node(node: NodeConfig) -> Desired {
    let mut desired = world(&exposed("a"), &["10.1.0.1 l", "10.1.0.2"], &policy());
    desired.set_node(node);
    desired
}

#[test]
fn an_unknown_port_of_a_cluster_ip_is_refused_and_an_unallocated_address_is_silent() {
    let service_cidrs = vec!["10.96.0.0/16".parse().unwrap()];
    let mut desired = with_node(NodeConfig { service_cidrs, ..node() });
    for src in [POD, "192.168.0.2", "203.0.113.2"] {
        assert_eq!(tcp(desired.snapshot(), src, "10.96.0.1:81"), Verdict::Reject);
        assert_eq!(tcp(desired.snapshot(), src, "10.96.0.9:80"), Verdict::Drop);
        // Other virtual addresses are not ours alone.
        assert_eq!(tcp(desired.snapshot(), src, "192.0.2.1:81"), Verdict::Pass);
        assert_eq!(tcp(desired.snapshot(), src, "192.168.0.2:81"), Verdict::Pass);
    }
    desired.replace(&key("a"), Vec::new());
    assert_eq!(tcp(desired.snapshot(), POD, "10.96.0.1:80"), Verdict::Drop, "the address is free again");
    desired.set_node(node());
    assert_eq!(tcp(desired.snapshot(), POD, "10.96.0.1:80"), Verdict::Pass, "nobody says what a ClusterIP could be");
}

#[test]
fn a_cluster_ip_that_comes_and_goes_within_a_round_has_not_changed() {
    let mut desired = world(&exposed("a"), &["10.1.0.1"], &policy());
    assert_eq!(desired.checkout().1.cluster_ips.len(), 1);
    desired.replace(&key("a"), Vec::new());
    desired.replace(&key("a"), decide(&exposed("a"), &[], &policy()));
    let (snapshot, delta) = desired.checkout();
    assert_eq!((delta.cluster_ips.len(), delta.changed.len(), snapshot.cluster_ips.len()), (0, 1, 1));
}

#[test]
fn two_ports_of_one_service_count_its_cluster_ip_twice() {
    let mut two = service("a");
    two.ports.push(crate::model::PortSpec { name: "b".into(), port: 81, ..two.ports[0].clone() });
    let mut desired = Desired::default();
    desired.replace(&key("a"), decide(&two, &[], &policy()));
    assert_eq!(desired.snapshot().cluster_ips.values().copied().collect::<Vec<_>>(), [2]);
    two.ports.pop();
    desired.replace(&key("a"), decide(&two, &[], &policy()));
    assert_eq!(desired.snapshot().cluster_ips.values().copied().collect::<Vec<_>>(), [1]);
}

#[test]
fn loopback_answers_node_ports_for_the_node_only_where_configured() {
    let both = ["10.1.0.1:8080", "10.1.0.2:8080"];
    let open = with_node(NodeConfig { loopback_node_ports_v4: true, ..node() });
    assert_eq!(tcp(open.snapshot(), "127.0.0.1", "127.0.0.1:30080"), to(&both, true));
    assert_eq!(tcp(open.snapshot(), "192.168.0.2", "127.0.0.5:30080"), to(&both, true));
    assert_eq!(tcp(open.snapshot(), POD, "127.0.0.1:30080"), Verdict::Pass, "a pod's loopback is its own");
    assert_eq!(tcp(open.snapshot(), "127.0.0.1", "127.0.0.1:80"), Verdict::Pass);
    assert_eq!(tcp(with_node(node()).snapshot(), "127.0.0.1", "127.0.0.1:30080"), Verdict::Pass);
}

#[test]
fn pods_are_told_by_interface() {
    let all = ["10.1.0.1:8080", "10.1.0.2:8080"];
    let bridge = with_node(NodeConfig { pod_traffic: PodTraffic::Bridge("cbr0".into()), ..node() });
    let cluster_ip = "10.96.0.1:80";
    assert_eq!(through(bridge.snapshot(), Some("cbr0"), "172.16.0.1", cluster_ip), to(&all, false));
    assert_eq!(through(bridge.snapshot(), Some("cbr01"), POD, cluster_ip), to(&all, true));
    assert_eq!(through(bridge.snapshot(), None, POD, cluster_ip), to(&all, true));
    let prefix = with_node(NodeConfig { pod_traffic: PodTraffic::Prefix("veth".into()), ..node() });
    assert_eq!(through(prefix.snapshot(), Some("veth1234"), "172.16.0.1", cluster_ip), to(&all, false));
    assert_eq!(through(prefix.snapshot(), Some("eth0"), POD, cluster_ip), to(&all, true));
    assert_eq!(through(prefix.snapshot(), Some("veth0"), "192.168.0.2", cluster_ip), to(&all, true), "the node's own");
}

#[test]
fn a_health_check_counts_each_local_ready_address_once() {
    let checked = ServiceObject { health_check_node_port: Some(30999), external_local: true, ..exposed("a") };
    let first = slice("a", "a", ["10.1.0.1 l", "10.1.0.2", "10.1.0.3 lt", "10.1.0.4 lu"].map(endpoint).to_vec());
    let again = slice("b", "a", ["10.1.0.1 l", "10.1.0.5 l"].map(endpoint).to_vec());
    let mut portless = slice("c", "a", vec![endpoint("10.1.0.6 l")]);
    portless.ports = [].into();
    let expect = HealthCheck { port: 30999, local_endpoints: 2 };
    assert_eq!(health_checks(&checked, &[&first, &again, &portless]), [(IpFamily::V4, expect)]);
    assert!(health_checks(&exposed("a"), &[&first]).is_empty());
    let mut desired = Desired::default();
    desired.set_health_checks(&key("a"), &[(IpFamily::V4, expect)]);
    assert!(desired.is_changed() && desired.checkout().1.health_checks_changed);
    desired.set_health_checks(&key("a"), &[(IpFamily::V4, expect)]);
    assert!(!desired.is_changed());
    desired.set_health_checks(&key("a"), &[]);
    assert!(desired.checkout().1.health_checks_changed && desired.snapshot().health_checks.is_empty());
}

#[test]
fn node_policy_of_a_family_without_pods_masquerades_nobody() {
    let blind = NodePolicy { detects_pods_v4: false, ..policy() };
    let desired = world(&service("a"), &["10.1.0.2"], &blind);
    assert_eq!(tcp(desired.snapshot(), "203.0.113.2", "10.96.0.1:80"), to(&["10.1.0.2:8080"], false));
}
