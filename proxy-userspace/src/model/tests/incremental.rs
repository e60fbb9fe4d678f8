//! Replacing Services one by one, and addresses that several of them name.

use proptest::prelude::*;

use super::build::{decided, endpoint, exposed, key, node, policy, service, slice, world};
use crate::model::{
    Desired, FrontendAddress, NodeConfig, ServiceObject, ServiceSnapshot, SliceObject, apply, decide, diff,
    health_checks,
};

/// Puts `services` (each with the endpoints 10.1.0.0 to .n) into one state, in this order.
fn build(services: &[(u8, ServiceObject)]) -> Desired {
    let mut desired = Desired::default();
    for (count, service) in services {
        put(&mut desired, service, *count, services);
    }
    desired
}

/// What the tracker does: replaces, then replaces again whoever was touched.
fn put(desired: &mut Desired, service: &ServiceObject, count: u8, all: &[(u8, ServiceObject)]) {
    let slice = slice_of(service, count);
    desired.set_health_checks(&service.key, &health_checks(service, &[&slice]));
    let mut work = vec![(service.key.clone(), decide_one(service, count))];
    while let Some((key, ports)) = work.pop() {
        for touched in desired.replace(&key, ports) {
            let (count, other) = all.iter().find(|(_, s)| s.key == touched).expect("only known Services are touched");
            work.push((touched, decide_one(other, *count)));
        }
    }
}

fn decide_one(service: &ServiceObject, count: u8) -> Vec<crate::model::ServicePort> {
    decide(service, &[&slice_of(service, count)], &policy())
}

fn slice_of(service: &ServiceObject, count: u8) -> SliceObject {
    let endpoints = (0..count).map(|i| endpoint(&format!("10.1.0.{i} l"))).collect();
    slice("one", &service.key.name, endpoints)
}

fn arbitrary_service() -> impl Strategy<Value = (u8, ServiceObject)> {
    let shape = (0..6_u8, 0..4_u8, 0..3_u8, 0..3_u8, any::<bool>(), 0..4_u8);
    shape.prop_map(|(name, cluster, external, balancer, local, count)| {
        let mut service = service(&format!("s{name}"));
        service.cluster_ips = vec![format!("10.96.0.{cluster}").parse().unwrap()];
        service.external_ips = (0..external).map(|i| format!("192.0.2.{i}").parse().unwrap()).collect();
        service.load_balancer_ips = (0..balancer).map(|i| format!("192.0.2.{i}").parse().unwrap()).collect();
        service.ports[0].node_port = local.then_some(30080);
        service.external_local = local;
        service.health_check_node_port = local.then_some(30999);
        (count, service)
    })
}

/// A cluster: one object per name.
fn arbitrary_cluster() -> impl Strategy<Value = Vec<(u8, ServiceObject)>> {
    proptest::collection::vec(arbitrary_service(), 0..6).prop_map(|mut list| {
        list.sort_by(|a, b| a.1.key.cmp(&b.1.key));
        list.dedup_by(|a, b| a.1.key == b.1.key);
        list
    })
}

/// Every address belongs to one ServicePort.
fn assert_exclusive(snapshot: &ServiceSnapshot) {
    let mut seen = std::collections::HashSet::new();
    for (name, port) in &snapshot.services {
        assert_eq!(*name, port.name);
        assert!(!port.frontends.is_empty());
        for frontend in &port.frontends {
            assert!(seen.insert((name.family, name.protocol, frontend.address, frontend.port)), "{name}: {frontend:?}");
        }
    }
}

proptest! {
    #[test]
    fn applying_the_difference_gives_the_other_snapshot(a in arbitrary_cluster(), b in arbitrary_cluster(), moved: bool) {
        let (a, mut b) = (build(&a), build(&b));
        if moved {
            b.set_node(node());
        }
        let (before, after) = (a.snapshot(), b.checkout().0);
        let delta = diff(before, after);
        prop_assert_eq!(&apply(before, &delta, after), after);
        prop_assert_eq!(delta.node_changed, moved);
        prop_assert!(diff(after, after).changed.is_empty());
    }

    #[test]
    fn the_order_of_services_does_not_matter(cluster in arbitrary_cluster(), seed: u64) {
        let expect = build(&cluster);
        assert_exclusive(expect.snapshot());
        let mut shuffled = cluster.clone();
        let length = shuffled.len().max(1);
        shuffled.rotate_left(usize::try_from(seed % 97).unwrap() % length);
        if seed % 2 == 0 {
            shuffled.reverse();
        }
        let other = build(&shuffled);
        prop_assert_eq!(other.snapshot(), expect.snapshot());
    }

    #[test]
    fn what_is_checked_out_is_what_changed(from in arbitrary_cluster(), to in arbitrary_cluster()) {
        let mut desired = build(&from);
        let before = desired.checkout().0.clone();
        let gone = from.iter().filter(|(_, s)| to.iter().all(|(_, t)| t.key != s.key));
        let nothing = |s: &ServiceObject| ServiceObject { ports: Vec::new(), health_check_node_port: None, ..s.clone() };
        let empty: Vec<_> = gone.map(|(count, s)| (*count, nothing(s))).collect();
        let mut all = from.clone();
        for (count, next) in to.iter().chain(&empty) {
            all.retain(|(_, s)| s.key != next.key);
            all.push((*count, next.clone()));
            put(&mut desired, next, *count, &all);
        }
        let expect = build(&to);
        prop_assert_eq!(desired.conflicts(), expect.conflicts());
        prop_assert_eq!(desired.no_local_endpoints(), expect.no_local_endpoints());
        let (after, delta) = desired.checkout();
        prop_assert_eq!(&ServiceSnapshot { version: 0, ..after.clone() }, expect.snapshot());
        prop_assert_eq!(&apply(&before, &delta, after), after);
        let changes = diff(&before, after);
        prop_assert_eq!(&delta.cluster_ips, &changes.cluster_ips);
        prop_assert!(delta.health_checks_changed || !changes.health_checks_changed);
    }
}

#[test]
fn replacing_with_the_same_changes_nothing() {
    let mut desired = world(&exposed("a"), &["10.1.0.1"], &policy());
    desired.set_node(node());
    let version = desired.checkout().0.version;
    desired.replace(&key("a"), vec![decided(&exposed("a"), &["10.1.0.1"], &policy())]);
    desired.set_node(node());
    assert!(!desired.is_changed());
    desired.set_node(NodeConfig::default());
    assert!(desired.is_changed());
    let (snapshot, delta) = desired.checkout();
    assert_eq!((snapshot.version, delta.node_changed, delta.changed.len()), (version + 1, true, 0));
}

#[test]
fn an_external_ip_cannot_take_another_services_cluster_ip() {
    let victim = service("victim");
    let mut thief = service("a-thief");
    thief.cluster_ips = vec!["10.96.0.2".parse().unwrap()];
    thief.external_ips = vec!["10.96.0.1".parse().unwrap()];
    let all = [(1, thief.clone()), (1, victim.clone())];
    let mut desired = build(&all);
    let place = FrontendAddress::Ip("10.96.0.1".parse().unwrap());
    let owner = |desired: &Desired| {
        let owners = desired.snapshot().services.values().filter(|s| s.frontends.iter().any(|f| f.address == place));
        owners.map(|s| s.name.service.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(owner(&desired), ["victim"]);
    assert_eq!(desired.conflicts(), 1);
    // Gone, its address falls to who waits for it.
    let touched = desired.replace(&key("victim"), Vec::new());
    assert_eq!(touched, [key("a-thief")]);
    desired.replace(&key("a-thief"), decide_one(&thief, 1));
    assert_eq!(owner(&desired), ["a-thief"]);
    assert_eq!(desired.conflicts(), 0);
}
