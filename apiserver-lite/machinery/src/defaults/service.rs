//! Defaults of Services, as far as they need no allocator.

use serde_json::{Map, Value};

use super::{each, fill, fill_text, within, within_made};

/// Seconds for which a client sticks to its endpoint when affinity is on and nothing else is said (3 hours).
const AFFINITY_SECONDS: i64 = 10_800;

pub(super) fn apply(service: &mut Map<String, Value>) {
    within_made(service, "spec", |spec| {
        fill_text(spec, "type", "ClusterIP");
        fill_text(spec, "sessionAffinity", "None");
        affinity(spec);
        each(spec, "ports", port);
        traffic_policies(spec);
    });
    within_made(service, "status", |status| fill(status, "loadBalancer", Map::new()));
}

fn affinity(spec: &mut Map<String, Value>) {
    match spec.get("sessionAffinity").and_then(Value::as_str) {
        Some("ClientIP") => within_made(spec, "sessionAffinityConfig", |config| {
            within_made(config, "clientIP", |client| fill(client, "timeoutSeconds", AFFINITY_SECONDS));
        }),
        Some("None") => {
            spec.remove("sessionAffinityConfig");
        }
        _ => {}
    }
}

fn port(port: &mut Map<String, Value>) {
    fill_text(port, "protocol", "TCP");
    // A node port of 0 asks for none in particular.
    if port.get("nodePort").and_then(Value::as_i64) == Some(0) {
        port.remove("nodePort");
    }
    let number = port.get("port").cloned();
    let unset = match port.get("targetPort") {
        None => true,
        Some(target) => target.as_i64() == Some(0) || target.as_str() == Some(""),
    };
    if let (true, Some(number)) = (unset, number) {
        port.insert("targetPort".to_owned(), number);
    }
}

fn traffic_policies(spec: &mut Map<String, Value>) {
    let kind = spec.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let has_external_ips = spec.get("externalIPs").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
    let external = matches!(kind.as_str(), "NodePort" | "LoadBalancer") || (kind == "ClusterIP" && has_external_ips);
    if external {
        fill_text(spec, "externalTrafficPolicy", "Cluster");
    }
    if kind != "ExternalName" {
        fill_text(spec, "internalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        fill(spec, "allocateLoadBalancerNodePorts", true);
    }
    within(spec, "selector", |selector| selector.retain(|_, value| !value.is_null()));
}
