//! Frontends by traffic policy, origin and what endpoints there are.

use super::build::{decided, exposed, policy, service, world};
use super::trace::{Verdict, tcp, to};
use crate::model::{EndpointSet, FrontendAddress, FrontendKind, NodePolicy, ServiceObject};

const POD: &str = "10.0.0.5";
const NODE: &str = "192.168.0.2";
const OUTSIDE: &str = "203.0.113.2";
const CLUSTER_IP: &str = "10.96.0.1:80";
const EXTERNAL: [&str; 3] = ["192.168.0.2:30080", "192.0.2.1:80", "192.0.2.2:80"];

/// Checks one destination from a pod, the node and outside.
fn check(service: &ServiceObject, endpoints: &[&str], policy: &NodePolicy, dst: &str, expect: [Verdict; 3]) {
    let desired = world(service, endpoints, policy);
    for (src, expect) in [POD, NODE, OUTSIDE].into_iter().zip(expect) {
        assert_eq!(tcp(desired.snapshot(), src, dst), expect, "{src} to {dst} with {endpoints:?}");
    }
}

fn external_local() -> ServiceObject {
    ServiceObject { external_local: true, ..exposed("a") }
}

fn internal_local() -> ServiceObject {
    ServiceObject { internal_local: true, ..exposed("a") }
}

#[test]
fn cluster_ip_masquerades_whoever_is_no_pod() {
    let all = ["10.1.0.1 l", "10.1.0.2"];
    let list = ["10.1.0.1:8080", "10.1.0.2:8080"];
    check(&service("a"), &all, &policy(), CLUSTER_IP, [to(&list, false), to(&list, true), to(&list, true)]);
}

#[test]
fn without_pod_cidrs_nobody_is_masqueraded_at_a_cluster_ip() {
    let blind = NodePolicy { detects_pods_v4: false, ..policy() };
    let list = ["10.1.0.2:8080"];
    check(&service("a"), &["10.1.0.2"], &blind, CLUSTER_IP, [to(&list, false), to(&list, false), to(&list, false)]);
}

#[test]
fn masquerade_all_is_for_cluster_ips_only() {
    let all = NodePolicy { masquerade_all: true, ..policy() };
    let list = ["10.1.0.1:8080"];
    let everyone = [to(&list, true), to(&list, true), to(&list, true)];
    check(&external_local(), &["10.1.0.1 l"], &all, CLUSTER_IP, everyone);
    let kept = [to(&list, false), to(&list, true), to(&list, false)];
    check(&external_local(), &["10.1.0.1 l"], &all, EXTERNAL[0], kept);
}

#[test]
fn policy_cluster_masquerades_everything_from_outside_addresses() {
    let list = ["10.1.0.1:8080", "10.1.0.2:8080"];
    for dst in EXTERNAL {
        let everyone = [to(&list, true), to(&list, true), to(&list, true)];
        check(&exposed("a"), &["10.1.0.1", "10.1.0.2"], &policy(), dst, everyone);
    }
}

#[test]
fn external_policy_local_keeps_the_source_and_lets_pods_and_node_take_the_short_cut() {
    let (both, local) = (["10.1.0.1:8080", "10.1.0.2:8080"], ["10.1.0.1:8080"]);
    for dst in EXTERNAL {
        let expect = [to(&both, false), to(&both, true), to(&local, false)];
        check(&external_local(), &["10.1.0.1 l", "10.1.0.2"], &policy(), dst, expect);
    }
    let expect = [to(&both, false), to(&both, true), to(&both, true)];
    check(&external_local(), &["10.1.0.1 l", "10.1.0.2"], &policy(), CLUSTER_IP, expect);
}

#[test]
fn external_policy_local_drops_outsiders_without_a_local_endpoint() {
    let all = ["10.1.0.2:8080"];
    for dst in EXTERNAL {
        check(&external_local(), &["10.1.0.2"], &policy(), dst, [to(&all, false), to(&all, true), Verdict::Drop]);
    }
}

#[test]
fn pods_that_cannot_be_told_apart_get_no_short_cut() {
    let blind = NodePolicy { detects_pods_v4: false, ..policy() };
    let rules = decided(&external_local(), &["10.1.0.2"], &blind).frontends[0].rules;
    assert_eq!(rules.pod, rules.external);
}

#[test]
fn internal_policy_local_is_for_the_cluster_ip_only() {
    let (both, local) = (["10.1.0.1:8080", "10.1.0.2:8080"], ["10.1.0.1:8080"]);
    let endpoints = ["10.1.0.1 l", "10.1.0.2"];
    check(
        &internal_local(),
        &endpoints,
        &policy(),
        CLUSTER_IP,
        [to(&local, false), to(&local, true), to(&local, true)],
    );
    check(&internal_local(), &endpoints, &policy(), EXTERNAL[0], [to(&both, true), to(&both, true), to(&both, true)]);
    check(&internal_local(), &["10.1.0.2"], &policy(), CLUSTER_IP, [Verdict::Drop, Verdict::Drop, Verdict::Drop]);
}

#[test]
fn no_endpoint_anywhere_is_refused_whatever_the_policy() {
    for service in [exposed("a"), external_local(), internal_local()] {
        for dst in EXTERNAL.into_iter().chain([CLUSTER_IP]) {
            for none in [&[][..], &["10.1.0.1 lu", "10.1.0.2 ts"]] {
                check(&service, none, &policy(), dst, [Verdict::Reject, Verdict::Reject, Verdict::Reject]);
            }
        }
    }
}

#[test]
fn terminating_endpoints_serve_only_where_nothing_is_ready() {
    let cluster = |endpoints: &[&str], expect: &[&str]| {
        let port = decided(&external_local(), endpoints, &policy());
        let list: Vec<_> = port.cluster_endpoints.iter().map(|e| e.address().ip().to_string()).collect();
        assert_eq!(list, expect, "cluster of {endpoints:?}");
    };
    let local = |endpoints: &[&str], expect: &[&str]| {
        let port = decided(&external_local(), endpoints, &policy());
        let list: Vec<_> = port.local_endpoints.iter().map(|e| e.address().ip().to_string()).collect();
        assert_eq!(list, expect, "local of {endpoints:?}");
    };
    cluster(&["10.1.0.1", "10.1.0.2 t"], &["10.1.0.1"]);
    cluster(&["10.1.0.1 t", "10.1.0.2 ts", "10.1.0.3 u"], &["10.1.0.1"]);
    // The two lists fall back independently.
    cluster(&["10.1.0.1", "10.1.0.2 lt"], &["10.1.0.1"]);
    local(&["10.1.0.1", "10.1.0.2 lt"], &["10.1.0.2"]);
    local(&["10.1.0.1 l", "10.1.0.2 lt"], &["10.1.0.1"]);
    local(&["10.1.0.1", "10.1.0.2 lts"], &[]);
}

#[test]
fn a_remote_terminating_endpoint_makes_it_a_drop_not_a_refusal() {
    let service = ServiceObject { internal_local: true, ..service("a") };
    let nobody_here = [Verdict::Drop, Verdict::Drop, Verdict::Drop];
    check(&service, &["10.1.0.1 t"], &policy(), CLUSTER_IP, nobody_here);
}

#[test]
fn locals_come_first_and_the_local_list_exists_only_where_it_is_used() {
    let port = decided(&service("a"), &["10.1.0.1", "10.1.0.2 l", "10.1.0.3"], &policy());
    let list: Vec<_> = port.cluster_endpoints.iter().map(|e| e.address().to_string()).collect();
    assert_eq!(list, ["10.1.0.2:8080", "10.1.0.1:8080", "10.1.0.3:8080"]);
    assert!(port.local_endpoints.is_empty());
    let internal = ServiceObject { internal_local: true, ..service("a") };
    assert!(decided(&internal, &["10.1.0.1", "10.1.0.2 l"], &policy()).cluster_endpoints.is_empty());
}

#[test]
fn source_ranges_guard_the_load_balancer_ip_alone() {
    let ranges = |list: &[&str]| ServiceObject {
        source_ranges: list.iter().map(|r| r.parse().unwrap()).collect(),
        ..exposed("a")
    };
    let list = ["10.1.0.1:8080"];
    let guarded = ranges(&["10.0.0.0/24"]);
    let [node_port, external_ip, load_balancer] = EXTERNAL;
    check(&guarded, &["10.1.0.1"], &policy(), load_balancer, [to(&list, true), Verdict::Drop, Verdict::Drop]);
    for dst in [node_port, external_ip] {
        check(&guarded, &["10.1.0.1"], &policy(), dst, [to(&list, true), to(&list, true), to(&list, true)]);
    }
    let everybody = [to(&list, true), to(&list, true), to(&list, true)];
    check(&ranges(&["10.0.0.0/24", "0.0.0.0/0"]), &["10.1.0.1"], &policy(), load_balancer, everybody.clone());
    check(&ranges(&["2001:db8::/64"]), &["10.1.0.1"], &policy(), load_balancer, everybody);
    // The node is admitted, so the load-balancer IP is too: it may be the source of the node's own packets.
    let port = decided(&ranges(&["192.168.0.0/24"]), &["10.1.0.1"], &policy());
    assert_eq!(port.load_balancer_source_ranges, ["192.0.2.2/32".parse().unwrap(), "192.168.0.0/24".parse().unwrap()]);
}

#[test]
fn each_family_stands_alone() {
    let mut dual = exposed("a");
    dual.cluster_ips.push("fd00::1".parse().unwrap());
    dual.external_ips.push("2001:db8::1".parse().unwrap());
    let slice = super::build::slice("one", "a", vec![super::build::endpoint("10.1.0.1")]);
    let ports = crate::model::decide(&dual, &[&slice], &policy());
    let [v4, v6] = &ports[..] else { panic!("{ports:?}") };
    assert_eq!((v4.frontends.len(), v4.cluster_endpoints.len()), (4, 1));
    assert_eq!((v6.frontends.len(), v6.cluster_endpoints.len()), (3, 0));
    let places: Vec<_> = v6.frontends.iter().map(|f| (f.address, f.kind)).collect();
    let ip = |text: &str| FrontendAddress::Ip(text.parse().unwrap());
    let expect = [
        (ip("2001:db8::1"), FrontendKind::ExternalIp),
        (ip("fd00::1"), FrontendKind::ClusterIp),
        (FrontendAddress::NodePort, FrontendKind::NodePort),
    ];
    assert_eq!(places, expect);
    assert!(v6.frontends.iter().all(|f| f.rules.external.action == crate::model::Action::Reject));
}

#[test]
fn a_family_without_cluster_ip_has_nothing() {
    let mut v4_only = exposed("a");
    v4_only.external_ips.push("2001:db8::1".parse().unwrap());
    let ports = crate::model::decide(&v4_only, &[], &policy());
    assert_eq!(ports.len(), 1);
}

#[test]
fn an_external_ip_that_is_also_the_load_balancer_ip_is_guarded_as_one() {
    let mut service = exposed("a");
    service.external_ips = service.load_balancer_ips.clone();
    let port = decided(&service, &["10.1.0.1"], &policy());
    let kinds: Vec<_> = port.frontends.iter().map(|f| f.kind).collect();
    assert_eq!(kinds, [FrontendKind::ClusterIp, FrontendKind::LoadBalancerIp, FrontendKind::NodePort]);
}

#[test]
fn a_rule_that_forwards_names_a_list_that_is_not_empty() {
    let conditions = ["", " l", " u", " t", " lt", " ts", " lu"];
    for service in
        [exposed("a"), external_local(), internal_local(), ServiceObject { external_local: true, ..internal_local() }]
    {
        for (a, b) in conditions.iter().flat_map(|a| conditions.iter().map(move |b| (a, b))) {
            let endpoints = [format!("10.1.0.1{a}"), format!("10.1.0.2{b}")];
            let port = decided(&service, &endpoints.each_ref().map(String::as_str), &policy());
            for rule in port.frontends.iter().flat_map(|f| [f.rules.pod, f.rules.node, f.rules.external]) {
                match rule.action {
                    crate::model::Action::Forward(EndpointSet::Cluster) => assert!(!port.cluster_endpoints.is_empty()),
                    crate::model::Action::Forward(EndpointSet::Local) => assert!(!port.local_endpoints.is_empty()),
                    crate::model::Action::Reject | crate::model::Action::Drop => assert!(!rule.masquerade),
                }
            }
        }
    }
}
