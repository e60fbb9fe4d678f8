//! Hints, and endpoints that appear more than once.

use super::build::{endpoint, exposed, policy, service, slice, zones};
use crate::model::{NodePolicy, ServiceObject, SliceEndpoint, decide};

/// An endpoint with zone hints and, for node hints, `here` (names us), `else` (names another) or nothing.
fn hinted(text: &str, zone_list: &[&str], node: &str) -> SliceEndpoint {
    SliceEndpoint {
        zone_hints: zones(zone_list),
        has_node_hints: !node.is_empty(),
        hinted_for_node: node == "here",
        ..endpoint(text)
    }
}

fn cluster(endpoints: Vec<SliceEndpoint>, policy: &NodePolicy) -> Vec<String> {
    let slice = slice("one", "a", endpoints);
    let ports = decide(&service("a"), &[&slice], policy);
    ports[0].cluster_endpoints.iter().map(|e| e.address().ip().to_string()).collect()
}

#[test]
fn zone_hints_count_only_when_every_ready_endpoint_has_one_and_one_is_ours() {
    let two = |second: &[&str]| vec![hinted("10.1.0.1", &["z1"], ""), hinted("10.1.0.2", second, "")];
    assert_eq!(cluster(two(&["z2"]), &policy()), ["10.1.0.1"]);
    assert_eq!(cluster(two(&["z2", "z1"]), &policy()), ["10.1.0.1", "10.1.0.2"]);
    assert_eq!(cluster(two(&[]), &policy()), ["10.1.0.1", "10.1.0.2"], "one without a hint");
    let elsewhere = NodePolicy { zone: Some("z9".into()), ..policy() };
    assert_eq!(cluster(two(&["z2"]), &elsewhere), ["10.1.0.1", "10.1.0.2"], "no hint for our zone");
    let unknown = NodePolicy { zone: None, ..policy() };
    assert_eq!(cluster(two(&["z2"]), &unknown), ["10.1.0.1", "10.1.0.2"], "zone unknown");
}

#[test]
fn endpoints_that_are_not_ready_do_not_spoil_the_hints() {
    let list = vec![hinted("10.1.0.1", &["z1"], ""), hinted("10.1.0.2", &["z2"], ""), endpoint("10.1.0.3 u")];
    assert_eq!(cluster(list, &policy()), ["10.1.0.1"]);
}

#[test]
fn node_hints_go_before_zone_hints() {
    let two = |a: &str, b: &str| vec![hinted("10.1.0.1", &["z1"], a), hinted("10.1.0.2", &["z2"], b)];
    assert_eq!(cluster(two("else", "here"), &policy()), ["10.1.0.2"]);
    assert_eq!(cluster(two("else", "else"), &policy()), ["10.1.0.1"], "falls back to zones");
    assert_eq!(cluster(two("", "here"), &policy()), ["10.1.0.1"], "one without a node hint");
}

#[test]
fn terminating_fallback_ignores_hints() {
    let list = vec![hinted("10.1.0.1 t", &["z1"], ""), hinted("10.1.0.2 t", &["z2"], "")];
    assert_eq!(cluster(list, &policy()), ["10.1.0.1", "10.1.0.2"]);
}

#[test]
fn policy_local_ignores_hints() {
    let service = ServiceObject { external_local: true, ..exposed("a") };
    let slice = slice("one", "a", vec![hinted("10.1.0.1 l", &["z2"], ""), hinted("10.1.0.2", &["z1"], "")]);
    let port = decide(&service, &[&slice], &policy()).remove(0);
    assert_eq!(port.cluster_endpoints[0].address().ip().to_string(), "10.1.0.2");
    assert_eq!(port.local_endpoints[0].address().ip().to_string(), "10.1.0.1");
}

/// Whether 10.1.0.1 is usable when two slices list it like this.
fn twice(first: &str, second: &str) -> bool {
    let slices = [slice("a", "a", vec![endpoint(first)]), slice("b", "a", vec![endpoint(second)])];
    let port = decide(&service("a"), &slices.each_ref(), &policy()).remove(0);
    assert!(port.cluster_endpoints.len() <= 1, "one address is one endpoint");
    !port.cluster_endpoints.is_empty()
}

#[test]
fn a_terminating_duplicate_never_hides_a_running_endpoint() {
    assert!(twice("10.1.0.1", "10.1.0.1 ts"));
    assert!(twice("10.1.0.1 ts", "10.1.0.1"));
    assert!(!twice("10.1.0.1 ts", "10.1.0.1 ts"));
}

#[test]
fn ports_match_by_name_and_protocol() {
    let mut other = slice("b", "a", vec![endpoint("10.1.0.2")]);
    other.ports[0].name = "metrics".into();
    let mut udp = slice("c", "a", vec![endpoint("10.1.0.3")]);
    udp.ports[0].protocol = crate::model::Protocol::Udp;
    let slices = [slice("a", "a", vec![endpoint("10.1.0.1")]), other, udp];
    let port = decide(&service("a"), &slices.each_ref(), &policy()).remove(0);
    let list: Vec<_> = port.cluster_endpoints.iter().map(|e| e.address().to_string()).collect();
    assert_eq!(list, ["10.1.0.1:8080"]);
}
