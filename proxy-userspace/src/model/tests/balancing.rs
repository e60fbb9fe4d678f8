//! Weights and algorithms, from annotations to the lists of endpoints.

use super::build::{decided, endpoint, exposed, policy, service, slice};
use crate::model::{Algorithm, Balancing, Forwarding, NodePolicy, Protocol, ServiceObject, decide, health_checks};

fn balanced(algorithm: Option<&str>, weights: Option<&str>) -> ServiceObject {
    ServiceObject { balancing: Balancing::parse(algorithm, weights, None).map(Box::new), ..service("web") }
}

/// Last bytes and weights of the cluster list, and of those that drain.
fn check(service: &ServiceObject, endpoints: &[&str], expect: &[(u8, u8)], draining: &[u8]) {
    let decided = decided(service, endpoints, &policy());
    let last = |ip: std::net::IpAddr| match ip {
        std::net::IpAddr::V4(ip) => ip.octets()[3],
        std::net::IpAddr::V6(ip) => ip.octets()[15],
    };
    let chosen: Vec<_> = decided.cluster_endpoints.iter().map(|e| (last(e.address().ip()), e.weight)).collect();
    let drains: Vec<_> = decided.draining_endpoints.iter().map(|address| last(address.ip())).collect();
    assert_eq!((chosen.as_slice(), drains.as_slice()), (expect, draining), "{endpoints:?}");
}

#[test]
fn a_service_says_how_it_is_balanced_and_random_is_the_default() {
    let algorithm = |service: &ServiceObject| decided(service, &["10.1.0.1"], &policy()).algorithm;
    assert_eq!(algorithm(&service("web")), Algorithm::Random);
    assert_eq!(algorithm(&balanced(Some("maglev"), None)), Algorithm::Maglev);
    assert_eq!(algorithm(&balanced(Some("nonsense"), None)), Algorithm::Random);
}

#[test]
fn weights_go_with_their_endpoints_and_zero_drains() {
    let weights = Some("10.1.0.1=3,10.1.0.2=0");
    check(&balanced(None, weights), &["10.1.0.1", "10.1.0.2", "10.1.0.3"], &[(1, 3), (3, 1)], &[2]);
    check(&balanced(None, Some("10.1.0.0/24=0")), &["10.1.0.1", "10.1.0.2"], &[], &[1, 2]);
    check(&balanced(None, weights), &["10.1.0.2 t", "10.1.0.1 t"], &[(1, 3)], &[2]);
}

#[test]
fn whoever_is_there_and_not_chosen_drains() {
    check(&service("web"), &["10.1.0.1", "10.1.0.2 u", "10.1.0.3 t", "10.1.0.4 ts"], &[(1, 1)], &[2, 3, 4]);
}

#[test]
fn a_slice_gives_its_weight_to_whom_the_service_gives_none() {
    let service = balanced(None, Some("10.1.0.1=5"));
    let mut slice = slice("one", "web", ["10.1.0.1", "10.1.0.2"].map(endpoint).into());
    slice.weight = Some(2);
    let decided = decide(&service, &[&slice], &policy()).remove(0);
    let weights: Vec<_> = decided.cluster_endpoints.iter().map(|endpoint| endpoint.weight).collect();
    assert_eq!(weights, [5, 2]);
}

#[test]
fn a_drained_endpoint_does_not_call_a_load_balancer_here() {
    let mut service = balanced(None, Some("10.1.0.1=0"));
    service.health_check_node_port = Some(32000);
    let slice = slice("one", "web", ["10.1.0.1 l", "10.1.0.2 l"].map(endpoint).into());
    assert_eq!(health_checks(&service, &[&slice])[0].1.local_endpoints, 1);
}

#[test]
fn datagrams_of_who_does_not_serve_go_elsewhere() {
    let mut service = service("web");
    service.ports[0].protocol = Protocol::Udp;
    let mut slice = slice("one", "web", ["10.1.0.1", "10.1.0.2 u", "10.1.0.3 t"].map(endpoint).into());
    slice.ports[0].protocol = Protocol::Udp;
    let decided = decide(&service, &[&slice], &policy()).remove(0);
    assert_eq!(decided.kept_endpoints, ["10.1.0.3:8080".parse().unwrap()]);
    assert!(decided.draining_endpoints.is_empty());
}

/// Only what is reached from outside, with policy Cluster, and a protocol that the way is for.
#[test]
fn answers_go_straight_where_the_service_or_else_the_node_says_so() {
    let is_direct = |edit: &dyn Fn(&mut ServiceObject), annotation, forwarding| {
        let balancing = Balancing::parse(None, None, annotation).map(Box::new);
        let mut service = ServiceObject { balancing, ..exposed("web") };
        edit(&mut service);
        decided(&service, &["10.1.0.1"], &NodePolicy { forwarding, ..policy() }).direct_return
    };
    let as_is = |_: &mut ServiceObject| {};
    assert!(!is_direct(&as_is, None, Forwarding::Snat));
    assert!(is_direct(&as_is, None, Forwarding::Dsr));
    assert!(is_direct(&as_is, Some("dsr"), Forwarding::Snat));
    assert!(is_direct(&as_is, Some("hybrid"), Forwarding::Snat));
    assert!(!is_direct(&as_is, Some("snat"), Forwarding::Dsr));
    assert!(is_direct(&as_is, Some("nonsense"), Forwarding::Dsr));
    assert!(!is_direct(&|service| service.external_local = true, Some("dsr"), Forwarding::Snat));
    assert!(
        !decided(&service("web"), &["10.1.0.1"], &NodePolicy { forwarding: Forwarding::Dsr, ..policy() }).direct_return
    );
}
