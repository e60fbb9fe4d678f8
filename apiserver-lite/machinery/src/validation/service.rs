//! Services: ports, addresses, affinity and traffic policies.

use std::collections::HashSet;

use serde_json::json;

use super::cursor::{At, Errors};
use super::{address, names, object_meta};
use crate::field::FieldError;

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];
const TYPES: &[&str] = &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
const FAMILIES: &[&str] = &["IPv4", "IPv6"];
const FAMILY_POLICIES: &[&str] = &["PreferDualStack", "RequireDualStack", "SingleStack"];
const DISTRIBUTIONS: &[&str] = &["PreferClose", "PreferSameZone", "PreferSameNode"];

/// Longest client affinity, seconds (one day).
const AFFINITY_SECONDS_MAX: i64 = 86_400;

/// The facts about a Service that many rules ask for.
pub(super) struct Kind<'a> {
    pub(super) name: &'a str,
    pub(super) headless: bool,
}

impl<'a> Kind<'a> {
    pub(super) fn of(spec: &At<'a>) -> Self {
        let cluster_ips = spec.child("clusterIPs").texts();
        let headless = match cluster_ips.as_slice() {
            [] => spec.child("clusterIP").text() == "None",
            ips => ips == ["None"],
        };
        Self { name: spec.child("type").text(), headless }
    }

    fn is(&self, name: &str) -> bool {
        self.name == name
    }
}

/// Checks everything but the metadata; `old` is the stored Service on an update.
pub(super) fn check(root: &At<'_>, old: Option<&At<'_>>, errors: &mut Errors) {
    let spec = root.child("spec");
    let old = old.map(|old| old.child("spec"));
    let kind = Kind::of(&spec);
    if spec.child("ports").len() == 0 && !kind.headless && !kind.is("ExternalName") {
        errors.required(&spec.child("ports"), "");
    }
    by_type(&spec, &kind, errors);
    ports(&spec, errors);
    object_meta::labels(&spec.child("selector"), errors);
    affinity(&spec, errors);
    if !kind.is("ExternalName") {
        cluster_ips(&spec, old.as_ref(), &kind, errors);
    }
    external_ips(&spec, old.as_ref(), errors);
    errors.one_of(&spec.child("type"), TYPES);
    node_ports(&spec, &kind, errors);
    duplicate_ports(&spec, errors);
    source_ranges(&spec, old.as_ref(), &kind, errors);
    load_balancer(&spec, &kind, errors);
    traffic_policies(&spec, &kind, errors);
}

fn by_type(spec: &At<'_>, kind: &Kind<'_>, errors: &mut Errors) {
    match kind.name {
        "LoadBalancer" | "NodePort" if kind.headless => {
            let path = format!("{}[0]", spec.child("clusterIPs").path());
            let rule = format!("may not be set to 'None' for {} services", kind.name);
            errors.push(FieldError::invalid(path, "None", rule));
        }
        "ExternalName" => external_name(spec, errors),
        _ => {}
    }
}

fn external_name(spec: &At<'_>, errors: &mut Errors) {
    let set = |key: &str| spec.child(key).len() > 0 || spec.child(key).maybe_text().is_some();
    for key in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        if set(key) {
            errors.forbidden(&spec.child(key), "may not be set for ExternalName services");
        }
    }
    let name = spec.child("externalName");
    match name.text().strip_suffix('.').unwrap_or(name.text()) {
        "" => errors.required(&name, ""),
        text => errors.complaints(&name, names::dns1123_subdomain(text)),
    }
}

fn ports(spec: &At<'_>, errors: &mut Errors) {
    let ports = spec.child("ports").items();
    let mut seen = HashSet::new();
    for port in &ports {
        let name = port.child("name");
        if name.text().is_empty() {
            if ports.len() > 1 {
                errors.required(&name, "");
            }
        } else {
            errors.complaints(&name, names::dns1123_label(name.text()));
            if !seen.insert(name.text()) {
                errors.duplicate(&name);
            }
        }
        errors.port(&port.child("port"));
        errors.one_of(&port.child("protocol"), PROTOCOLS);
        target_port(&port.child("targetPort"), errors);
        if let Some(protocol) = port.child("appProtocol").maybe_text() {
            errors.complaints(&port.child("appProtocol"), names::qualified_name(protocol));
        }
    }
}

fn target_port(at: &At<'_>, errors: &mut Errors) {
    match at.maybe_text() {
        Some(name) => errors.complaints(at, names::port_name(name)),
        None => errors.port(at),
    }
}

fn affinity(spec: &At<'_>, errors: &mut Errors) {
    let affinity = spec.child("sessionAffinity");
    errors.one_of(&affinity, &["ClientIP", "None"]);
    let config = spec.child("sessionAffinityConfig");
    match affinity.text() {
        "ClientIP" => {
            let seconds = config.at(&["clientIP", "timeoutSeconds"]);
            let parts = [config, seconds.clone()];
            if let Some(missing) = parts.iter().find(|part| !part.is_set()) {
                errors.required(missing, "when session affinity type is ClientIP");
            } else if !(1..=AFFINITY_SECONDS_MAX).contains(&seconds.number()) {
                errors.invalid(&seconds, format!("must be greater than 0 and less than {AFFINITY_SECONDS_MAX}"));
            }
        }
        "None" if config.is_set() => errors.forbidden(&config, "must not be set when session affinity is None"),
        _ => {}
    }
}

fn cluster_ips(spec: &At<'_>, old: Option<&At<'_>>, kind: &Kind<'_>, errors: &mut Errors) {
    let ips = spec.child("clusterIPs");
    let (first, primary) = (spec.child("clusterIP").text(), ips.texts().first().copied().unwrap_or_default());
    if first.is_empty() && ips.len() > 0 {
        errors.invalid(&ips, "must be empty when `clusterIP` is not specified");
    } else if ips.len() > 0 && first != primary {
        errors.invalid(&ips, "first value must match `clusterIP`");
    }
    families(&spec.child("ipFamilies"), errors);
    errors.one_of_if_set(&spec.child("ipFamilyPolicy"), FAMILY_POLICIES);
    let known = old.map(|old| old.child("clusterIPs").texts()).unwrap_or_default();
    let before = errors.0.len();
    for (index, ip) in ips.items().iter().enumerate() {
        if index == 0 && ip.text() == "None" {
            if ips.len() > 1 {
                errors.invalid(&ips, "'None' must be the first and only value");
            }
        } else if !known.contains(&ip.text()) {
            address::ip(ip, errors);
        }
    }
    let all_valid = errors.0.len() == before;
    if ips.len() > 2 {
        errors.invalid(&ips, "may only hold up to 2 values");
    }
    if all_valid && !kind.headless {
        matching_families(spec, errors);
    }
}

fn families(at: &At<'_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for family in at.items() {
        errors.one_of_if_set(&family, FAMILIES);
        if !seen.insert(family.text()) {
            errors.duplicate(&family);
        }
    }
}

fn matching_families(spec: &At<'_>, errors: &mut Errors) {
    let ips = spec.child("clusterIPs");
    let is_ipv4 = |ip: &At<'_>| !ip.text().contains(':');
    if !address::one_per_family(ips.items().iter().map(is_ipv4)) {
        errors.invalid(&ips, "may specify no more than one IP for each IP family");
    }
    for (index, (ip, family)) in ips.items().iter().zip(spec.child("ipFamilies").items()).enumerate() {
        let wanted = if is_ipv4(ip) { "IPv4" } else { "IPv6" };
        if FAMILIES.contains(&family.text()) && family.text() != wanted {
            let rule = format!("expected an {} value as indicated by `ipFamilies[{index}]`", family.text());
            errors.invalid(ip, rule);
        }
    }
}

fn external_ips(spec: &At<'_>, old: Option<&At<'_>>, errors: &mut Errors) {
    let known = old.map(|old| old.child("externalIPs").texts()).unwrap_or_default();
    for at in spec.child("externalIPs").items() {
        if known.contains(&at.text()) {
            continue;
        }
        if let Some(ip) = address::ip(&at, errors) {
            address::endpoint(&at, ip, errors);
        }
    }
}

fn node_ports(spec: &At<'_>, kind: &Kind<'_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for port in spec.child("ports").items() {
        let node_port = port.child("nodePort");
        if node_port.number() == 0 {
            continue;
        }
        if kind.is("ClusterIP") {
            errors.forbidden(&node_port, "may not be used when `type` is 'ClusterIP'");
        }
        if !seen.insert((port.child("protocol").text(), node_port.number())) {
            errors.duplicate(&node_port);
        }
    }
}

fn duplicate_ports(spec: &At<'_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for port in spec.child("ports").items() {
        let (protocol, number) = (port.child("protocol").text(), port.child("port").number());
        if !seen.insert((protocol, number)) {
            errors.push(FieldError::duplicate(port.path(), json!({"port": number, "protocol": protocol})));
        }
    }
}

fn source_ranges(spec: &At<'_>, old: Option<&At<'_>>, kind: &Kind<'_>, errors: &mut Errors) {
    let ranges = spec.child("loadBalancerSourceRanges");
    if ranges.len() > 0 && !kind.is("LoadBalancer") {
        errors.forbidden(&ranges, "may only be used when `type` is 'LoadBalancer'");
    }
    let known = old.map(|old| old.child("loadBalancerSourceRanges").texts()).unwrap_or_default();
    for range in ranges.items() {
        if !known.contains(&range.text()) {
            address::cidr(&range, errors);
        }
    }
}

fn load_balancer(spec: &At<'_>, kind: &Kind<'_>, errors: &mut Errors) {
    let allocate = spec.child("allocateLoadBalancerNodePorts");
    let class = spec.child("loadBalancerClass");
    if kind.is("LoadBalancer") {
        if !allocate.is_set() {
            errors.required(&allocate, "");
        }
        if let Some(class_name) = class.maybe_text() {
            errors.complaints(&class, names::qualified_name(class_name));
        }
        return;
    }
    for at in [allocate, class].iter().filter(|at| at.is_set()) {
        errors.forbidden(at, "may only be used when `type` is 'LoadBalancer'");
    }
}

fn traffic_policies(spec: &At<'_>, kind: &Kind<'_>, errors: &mut Errors) {
    let external = spec.child("externalTrafficPolicy");
    let accessible =
        kind.is("LoadBalancer") || kind.is("NodePort") || (kind.is("ClusterIP") && spec.child("externalIPs").len() > 0);
    if accessible {
        errors.one_of(&external, &["Cluster", "Local"]);
    } else if !external.text().is_empty() {
        errors.invalid(&external, "may only be set for externally-accessible services");
    }
    let health = spec.child("healthCheckNodePort");
    if needs_health_check(spec) {
        // The server allocates it when the client leaves it out.
        if health.number() != 0 {
            errors.port(&health);
        }
    } else if health.number() != 0 {
        let rule = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
        errors.invalid(&health, rule);
    }
    let internal = spec.child("internalTrafficPolicy");
    if !internal.is_set() && matches!(kind.name, "NodePort" | "LoadBalancer" | "ClusterIP") {
        errors.required(&internal, "");
    }
    errors.one_of_if_set(&internal, &["Cluster", "Local"]);
    errors.one_of_if_set(&spec.child("trafficDistribution"), DISTRIBUTIONS);
}

/// Whether a load balancer asks each node if it has local endpoints.
pub(super) fn needs_health_check(spec: &At<'_>) -> bool {
    spec.child("type").text() == "LoadBalancer" && spec.child("externalTrafficPolicy").text() == "Local"
}
