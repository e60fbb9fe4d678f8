//! Who answers where several claim one address: the first owner, whatever the order of events, and never against the node.

use super::build::{decided, exposed, key, node, policy, service, slice, world};
use crate::model::{
    Action, Desired, FrontendAddress, FrontendKind, NodePolicy, Protocol, ServiceKey, ServiceObject, decide,
    tests::build::endpoint,
};

/// A Service of its own ClusterIP that also claims the external IP 192.0.2.1, created at this second.
fn claimant(name: &str, cluster_ip: &str, created_seconds: i64) -> ServiceObject {
    let (cluster_ips, external_ips) = (vec![cluster_ip.parse().unwrap()], vec!["192.0.2.1".parse().unwrap()]);
    ServiceObject { created_seconds, cluster_ips, external_ips, ..service(name) }
}

/// Puts `services` in as the tracker does: whoever is touched by another is put in again.
fn build(services: &[&ServiceObject]) -> Desired {
    let mut desired = Desired::default();
    desired.set_node(node());
    for service in services {
        put(&mut desired, service, services);
    }
    desired
}

fn put(desired: &mut Desired, service: &ServiceObject, all: &[&ServiceObject]) {
    for touched in desired.replace(&service.key, vec![decided(service, &["10.1.0.1"], &policy())]) {
        let other = all.iter().find(|other| other.key == touched).unwrap();
        desired.replace(&touched, vec![decided(other, &["10.1.0.1"], &policy())]);
    }
}

fn owner(desired: &Desired, kind: FrontendKind) -> Vec<String> {
    let services = desired.snapshot().services.values();
    let owners = services.filter(|service| service.frontends.iter().any(|frontend| frontend.kind == kind));
    owners.map(|service| service.name.service.to_string()).collect()
}

#[test]
fn the_older_service_keeps_its_address_in_any_order() {
    let (old, young) = (claimant("z-old", "10.96.0.1", 100), claimant("a-young", "10.96.0.2", 200));
    let unknown = ServiceObject { created_seconds: i64::MAX, ..claimant("a", "10.96.0.3", 0) };
    let orders = [[&old, &young, &unknown], [&unknown, &young, &old], [&young, &old, &unknown]];
    let first = build(&orders[0]);
    for order in orders {
        let desired = build(&order);
        assert_eq!(owner(&desired, FrontendKind::ExternalIp), ["z-old"]);
        assert_eq!(desired.conflicts(), 2);
        assert_eq!(desired.snapshot(), first.snapshot(), "a restart answers the same");
    }
    let twins = [&claimant("b", "10.96.0.1", 100), &claimant("a", "10.96.0.2", 100)];
    assert_eq!(owner(&build(&twins), FrontendKind::ExternalIp), ["a"], "of the same second: by name");
}

#[test]
fn a_service_that_was_deleted_and_made_again_is_young() {
    let (first, second) = (claimant("a", "10.96.0.1", 100), claimant("b", "10.96.0.2", 200));
    let mut desired = build(&[&first, &second]);
    assert_eq!(owner(&desired, FrontendKind::ExternalIp), ["a"]);
    let again = ServiceObject { created_seconds: 300, ..first };
    put(&mut desired, &again, &[&again, &second]);
    assert_eq!(owner(&desired, FrontendKind::ExternalIp), ["b"]);
    assert_eq!(desired.snapshot(), build(&[&second, &again]).snapshot());
}

#[test]
fn sshd_and_the_kubelet_keep_their_ports() {
    for (port, protocol, taken) in [
        (22, Protocol::Tcp, false),
        (10250, Protocol::Tcp, false),
        (10250, Protocol::Udp, true),
        (30080, Protocol::Tcp, true),
    ] {
        let mut service = exposed("a");
        service.ports[0].node_port = Some(port);
        service.ports[0].protocol = protocol;
        let mut slice = slice("one", "a", vec![endpoint("10.1.0.1")]);
        slice.ports[0].protocol = protocol;
        let mut desired = Desired::default();
        desired.replace(&service.key, decide(&service, &[&slice], &policy()));
        let service = desired.snapshot().services.values().next().unwrap();
        let has = service.frontends.iter().any(|frontend| frontend.address == FrontendAddress::NodePort);
        assert_eq!(has, taken, "{port} {protocol:?}");
        assert_eq!(service.frontends.len(), 3 + usize::from(taken), "its other addresses work");
        assert_eq!(desired.conflicts(), usize::from(!taken));
    }
}

#[test]
fn the_nodes_own_address_is_no_cluster_ip() {
    let mut bad = exposed("bad");
    bad.cluster_ips = vec!["192.168.0.2".parse().unwrap()];
    assert!(decide(&bad, &[], &policy()).is_empty());
    // Only this node's: elsewhere it is an address as any other.
    assert_eq!(decide(&bad, &[], &NodePolicy::default()).len(), 1);
    // As an external or load-balancer IP it is a choice that people make.
    let mut lent = exposed("lent");
    lent.load_balancer_ips = vec!["192.168.0.2".parse().unwrap()];
    assert_eq!(decide(&lent, &[], &policy()).len(), 1);
}

#[test]
fn the_api_server_is_not_taken_over() {
    let api_server = "192.0.2.1:80".parse().unwrap();
    let build = |key: ServiceKey| {
        let mut desired = Desired::default();
        desired.reserve_for_api_server(api_server);
        let service = ServiceObject { key, ..claimant("", "10.96.0.1", 0) };
        desired.replace(&service.key, decide(&service, &[], &policy()));
        let owned = owner(&desired, FrontendKind::ExternalIp).len();
        (owned, owner(&desired, FrontendKind::ClusterIp).len())
    };
    assert_eq!(build(key("thief")), (0, 1));
    assert_eq!(build(ServiceKey { namespace: "default".into(), name: "kubernetes".into() }), (1, 1));
    // Another port of the same address is free.
    let mut desired = world(&service("a"), &["10.1.0.1"], &policy());
    desired.reserve_for_api_server("10.96.0.1:6443".parse().unwrap());
    assert!(desired.replace(&key("a"), vec![decided(&service("a"), &["10.1.0.1"], &policy())]).is_empty());
    assert_eq!(owner(&desired, FrontendKind::ClusterIp), ["a"]);
}

#[test]
fn the_way_to_the_api_server_is_never_closed() {
    let kubernetes = ServiceKey { namespace: "default".into(), name: "kubernetes".into() };
    let endpoints_left = |api_server: &str| {
        let key = &kubernetes;
        let mut desired = Desired::default();
        desired.reserve_for_api_server(api_server.parse().unwrap());
        let service = ServiceObject { key: key.clone(), ..service("") };
        let slice = slice("1", "", vec![endpoint("192.168.0.7"), endpoint("192.168.0.8")]);
        desired.replace(key, decide(&service, &[&slice], &policy()));
        desired.replace(key, decide(&service, &[], &policy()));
        let port = desired.snapshot().services.values().next().unwrap();
        let forwards = port.frontends.iter().all(|f| matches!(f.rules.node.action, Action::Forward(_)));
        assert_eq!(forwards, !port.cluster_endpoints.is_empty());
        port.cluster_endpoints.len()
    };
    assert_eq!(endpoints_left("10.96.0.1:80"), 2);
    assert_eq!(endpoints_left("192.168.0.7:6443"), 0, "reached without the Service");
}
