//! The decision as a table, and the thread with a pass that only looks.

use std::net::SocketAddr;
use std::sync::mpsc;

use super::index::Place;
use super::*;
use crate::model::tests::build::{endpoint, exposed, key, node, policy, slice};
use crate::model::{Desired, IpFamily, NodeConfig, ServiceObject, SliceObject, decide};

const DEADLINE: Duration = Duration::from_secs(10);

/// [`exposed`] on UDP: 10.96.0.1:80, 192.0.2.1:80, 192.0.2.2:80 and NodePort 30080 of 192.168.0.2.
fn dns() -> ServiceObject {
    let mut service = exposed("dns");
    service.ports[0].protocol = Protocol::Udp;
    service
}

fn udp_slice(endpoints: &[&str]) -> SliceObject {
    let mut slice = slice("one", "dns", endpoints.iter().map(|text| endpoint(text)).collect());
    slice.ports[0].protocol = Protocol::Udp;
    slice
}

fn serve(desired: &mut Desired, service: &ServiceObject, endpoints: &[&str]) {
    desired.replace(&key("dns"), decide(service, &[&udp_slice(endpoints)], &policy()));
}

/// What the reconciler is told of the next round.
fn changes(desired: &mut Desired, full: bool) -> Changes {
    let reconciler = Reconciler { shared: Arc::default() };
    let (snapshot, delta) = desired.checkout();
    reconciler.synced(snapshot, if full { SyncScope::Full } else { SyncScope::Changed(&delta) });
    let mut inbox = reconciler.shared.inbox.lock().unwrap();
    std::mem::take(&mut inbox.changes)
}

/// An index of these endpoints.
fn index(endpoints: &[&str]) -> (Desired, FlowIndex) {
    let (mut desired, mut index) = (Desired::default(), FlowIndex::default());
    desired.set_node(node());
    serve(&mut desired, &dns(), endpoints);
    assert_eq!(index.take_in(changes(&mut desired, true), false), Scope::Everything);
    (desired, index)
}

fn stale(index: &FlowIndex, destination: &str, endpoint: &str) -> bool {
    index.is_stale(&Flow { destination: destination.parse().unwrap(), endpoint: endpoint.parse().unwrap() })
}

#[test]
fn a_flow_to_a_frontend_leads_to_one_of_its_endpoints() {
    let (_, index) = index(&["10.1.0.1 l", "10.1.0.2"]);
    for frontend in ["10.96.0.1:80", "192.0.2.1:80", "192.0.2.2:80", "192.168.0.2:30080"] {
        for (endpoint, expect) in [
            ("10.1.0.1:8080", false),
            ("10.1.0.2:8080", false),
            ("10.1.0.3:8080", true),
            ("10.1.0.1:8081", true),
            // Never translated: made before the Service was.
            (frontend, true),
        ] {
            assert_eq!(stale(&index, frontend, endpoint), expect, "{frontend} -> {endpoint}");
        }
    }
    // None of ours: other ports, and the NodePort's number on another machine.
    for other in ["10.96.0.1:81", "10.96.0.2:80", "203.0.113.1:30080", "127.0.0.1:30080", "10.1.0.9:8080"] {
        assert!(!stale(&index, other, other) && !stale(&index, other, "10.1.0.3:8080"), "{other}");
    }
}

#[test]
fn the_last_endpoint_takes_all_flows_with_it() {
    let (mut desired, mut index) = index(&["10.1.0.1"]);
    serve(&mut desired, &dns(), &[]);
    let scope = index.take_in(changes(&mut desired, false), false);
    assert!(matches!(&scope, Scope::Places(places) if places.len() == 4), "{scope:?}");
    assert!(stale(&index, "10.96.0.1:80", "10.1.0.1:8080"));
    assert!(stale(&index, "10.96.0.1:80", "10.96.0.1:80"));
}

#[test]
fn an_endpoint_that_serves_keeps_its_flows_until_it_is_gone() {
    // Ready ones elsewhere; this one terminates, or is only hinted for another zone: it gets no new flows.
    let (mut desired, mut index) = index(&["10.1.0.1 t", "10.1.0.2"]);
    let service = desired.snapshot().services.values().next().unwrap();
    assert_eq!(service.cluster_endpoints.len(), 1);
    assert_eq!(service.kept_endpoints, ["10.1.0.1:8080".parse::<SocketAddr>().unwrap()]);
    assert!(!stale(&index, "10.96.0.1:80", "10.1.0.1:8080"));
    serve(&mut desired, &dns(), &["10.1.0.1 ts", "10.1.0.2"]);
    index.take_in(changes(&mut desired, false), false);
    assert!(stale(&index, "10.96.0.1:80", "10.1.0.1:8080"), "it does not serve any more");
    serve(&mut desired, &dns(), &["10.1.0.2"]);
    index.take_in(changes(&mut desired, false), false);
    assert!(stale(&index, "10.96.0.1:80", "10.1.0.1:8080"));
    assert!(!stale(&index, "10.96.0.1:80", "10.1.0.2:8080"));
    // Other protocols remember nothing.
    let tcp = crate::model::tests::build::decided(&exposed("a"), &["10.1.0.1 t", "10.1.0.2"], &policy());
    assert!(tcp.kept_endpoints.is_empty());
}

#[test]
fn a_deleted_service_leaves_one_round_to_find_its_flows() {
    for full in [false, true] {
        let (mut desired, mut index) = index(&["10.1.0.1"]);
        desired.replace(&key("dns"), Vec::new());
        index.take_in(changes(&mut desired, full), false);
        for frontend in ["10.96.0.1:80", "192.168.0.2:30080"] {
            assert!(stale(&index, frontend, "10.1.0.1:8080"), "what was translated");
            assert!(!stale(&index, frontend, frontend), "the address may be somebody's again");
            assert!(!stale(&index, frontend, "10.1.0.9:8080"), "not our translation");
        }
        index.forget_gone();
        assert!(!stale(&index, "10.96.0.1:80", "10.1.0.1:8080"));
    }
}

#[test]
fn an_address_that_moves_to_another_service_takes_that_ones_endpoints() {
    let (mut desired, mut index) = index(&["10.1.0.1"]);
    desired.replace(&key("dns"), Vec::new());
    let other = ServiceObject { key: key("aaa"), ..dns() };
    let slice = SliceObject { service: key("aaa"), ..udp_slice(&["10.1.0.7"]) };
    desired.replace(&other.key, decide(&other, &[&slice], &policy()));
    index.take_in(changes(&mut desired, false), false);
    assert!(stale(&index, "10.96.0.1:80", "10.1.0.1:8080"));
    assert!(!stale(&index, "10.96.0.1:80", "10.1.0.7:8080"));
}

#[test]
fn loopback_counts_where_it_answers() {
    let (mut desired, mut index) = index(&["10.1.0.1"]);
    assert!(!stale(&index, "127.0.0.1:30080", "10.1.0.9:8080"));
    desired.set_node(NodeConfig { loopback_node_ports_v4: true, ..node() });
    serve(&mut desired, &dns(), &["10.1.0.1", "10.1.0.2"]);
    index.take_in(changes(&mut desired, false), false);
    assert!(stale(&index, "127.0.0.1:30080", "10.1.0.9:8080"));
    assert!(!stale(&index, "127.0.0.1:30080", "10.1.0.2:8080"));
}

#[test]
fn many_places_are_looked_for_together() {
    let (mut desired, mut index) = index(&["10.1.0.1"]);
    let mut service = dns();
    service.external_ips = (1..=20).map(|i| std::net::Ipv4Addr::new(192, 0, 2, i).into()).collect();
    serve(&mut desired, &service, &["10.1.0.1"]);
    assert_eq!(index.take_in(changes(&mut desired, false), false), Scope::Everything);
    serve(&mut desired, &dns(), &["10.1.0.1"]);
    index.take_in(changes(&mut desired, false), false);
    serve(&mut desired, &dns(), &["10.1.0.2"]);
    let Scope::Places(places) = index.take_in(changes(&mut desired, false), false) else { panic!("few places") };
    assert!(places.contains(&Place::NodePort(IpFamily::V4, 30080)));
}

/// A reconciler whose passes are seen by the test, which lets each of them end with an outcome.
fn watched() -> (Reconciler, mpsc::Receiver<Scope>, mpsc::Sender<bool>) {
    let ((seen, scopes), (outcomes, outcome)) = (mpsc::channel(), mpsc::channel());
    let pass = move |_: &FlowIndex, scope: &Scope| {
        // A test that has ended needs no passes.
        let _ = seen.send(scope.clone());
        outcome.recv().unwrap_or(true)
    };
    (Reconciler::start(Box::new(pass)).unwrap(), scopes, outcomes)
}

#[test]
fn changes_during_a_pass_are_taken_in_together() {
    let (reconciler, scopes, outcomes) = watched();
    let mut desired = Desired::default();
    desired.set_node(node());
    serve(&mut desired, &dns(), &["10.1.0.1"]);
    reconciler.synced(desired.checkout().0, SyncScope::Full);
    assert_eq!(scopes.recv_timeout(DEADLINE), Ok(Scope::Everything));
    for endpoint in ["10.1.0.2", "10.1.0.3", "10.1.0.4"] {
        serve(&mut desired, &dns(), &[endpoint]);
        let (snapshot, delta) = desired.checkout();
        reconciler.synced(snapshot, SyncScope::Changed(&delta));
    }
    outcomes.send(true).unwrap();
    assert!(matches!(scopes.recv_timeout(DEADLINE), Ok(Scope::Places(_))));
    outcomes.send(true).unwrap();
    drop(outcomes);
    drop(reconciler);
    assert!(scopes.recv_timeout(DEADLINE).is_err(), "one pass for three changes, and the thread ends");
}

#[test]
fn after_a_failure_everything_is_looked_at() {
    let (reconciler, scopes, outcomes) = watched();
    let mut desired = Desired::default();
    serve(&mut desired, &dns(), &["10.1.0.1"]);
    reconciler.synced(desired.checkout().0, SyncScope::Full);
    scopes.recv_timeout(DEADLINE).unwrap();
    outcomes.send(false).unwrap();
    serve(&mut desired, &dns(), &["10.1.0.2"]);
    let (snapshot, delta) = desired.checkout();
    reconciler.synced(snapshot, SyncScope::Changed(&delta));
    assert_eq!(scopes.recv_timeout(DEADLINE), Ok(Scope::Everything));
}

#[test]
fn other_protocols_and_the_node_alone_wake_nobody() {
    let mut desired = Desired::default();
    desired.replace(&key("a"), decide(&exposed("a"), &[], &policy()));
    desired.set_node(node());
    let reconciler = Reconciler { shared: Arc::default() };
    let (snapshot, delta) = desired.checkout();
    assert!(delta.node_changed && !delta.changed.is_empty());
    reconciler.synced(snapshot, SyncScope::Changed(&delta));
    let inbox = reconciler.shared.inbox.lock().unwrap();
    assert!(!inbox.due && inbox.changes.services.is_empty() && inbox.changes.node.is_some());
}
