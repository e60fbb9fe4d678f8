//! Endpoints and EndpointSlices: which addresses and ports they may carry.

use std::collections::HashSet;
use std::net::IpAddr;

use super::cursor::{At, Errors};
use super::{address, names, object_meta};
use crate::field::FieldError;

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];

/// Limits of an EndpointSlice (Kubernetes 1.36, discovery.k8s.io/v1).
const ENDPOINTS_MAX: usize = 1_000;
const ADDRESSES_MAX: usize = 100;
const PORTS_MAX: usize = 20_000;
const HINTS_MAX: usize = 8;
const TOPOLOGY_LABELS_MAX: usize = 16;

/// Checks an EndpointSlice. Endpoints that were stored already may stay as they are.
pub(super) fn slice(root: &At<'_>, old: Option<&At<'_>>, errors: &mut Errors) {
    let kind = root.child("addressType");
    errors.one_of(&kind, &["FQDN", "IPv4", "IPv6"]);
    slice_ports(&root.child("ports"), errors);
    let endpoints = root.child("endpoints");
    let unchanged = old.is_some_and(|old| old.child("endpoints").value() == endpoints.value());
    if !unchanged && errors.at_most(&endpoints, ENDPOINTS_MAX) {
        for endpoint in endpoints.items() {
            slice_endpoint(&endpoint, kind.text(), errors);
        }
    }
    if let Some(old) = old {
        errors.immutable(&kind, &old.child("addressType"));
    }
}

fn slice_endpoint(endpoint: &At<'_>, kind: &str, errors: &mut Errors) {
    let addresses = endpoint.child("addresses");
    if addresses.len() == 0 {
        errors.required(&addresses, "must contain at least 1 address");
    }
    errors.at_most(&addresses, ADDRESSES_MAX);
    for at in addresses.items() {
        slice_address(&addresses, &at, kind, errors);
    }
    if let Some(name) = endpoint.child("nodeName").maybe_text() {
        errors.complaints(&endpoint.child("nodeName"), names::dns1123_subdomain(name));
    }
    let topology = endpoint.child("deprecatedTopology");
    errors.at_most(&topology, TOPOLOGY_LABELS_MAX);
    object_meta::labels(&topology, errors);
    if let Some(name) = endpoint.child("hostname").maybe_text() {
        errors.complaints(&endpoint.child("hostname"), names::dns1123_label(name));
    }
    hints(&endpoint.at(&["hints", "forZones"]), names::label_value, errors);
    hints(&endpoint.at(&["hints", "forNodes"]), names::dns1123_subdomain, errors);
}

fn slice_address(list: &At<'_>, at: &At<'_>, kind: &str, errors: &mut Errors) {
    let (ip, of_family) = match kind {
        "IPv4" => (address::ip(at, errors), IpAddr::is_ipv4 as fn(&IpAddr) -> bool),
        "IPv6" => (address::canonical_ip(at, errors), IpAddr::is_ipv6 as fn(&IpAddr) -> bool),
        "FQDN" => return domain_name(at, errors),
        _ => return,
    };
    let Some(ip) = ip else { return };
    if !of_family(&ip) {
        errors.push(FieldError::invalid(list.path(), at.text(), format!("must be an {kind} address")));
    }
    address::endpoint(at, ip, errors);
}

fn domain_name(at: &At<'_>, errors: &mut Errors) {
    if at.text().is_empty() {
        return errors.required(at, "");
    }
    let name = at.text().strip_suffix('.').unwrap_or(at.text());
    let complaints = names::dns1123_subdomain(name);
    if !complaints.is_empty() {
        return errors.invalid(at, complaints.join(","));
    }
    if !name.contains('.') {
        return errors.invalid(at, "should be a domain with at least two segments separated by dots");
    }
    for label in name.split('.') {
        let complaints = names::dns1123_label(label);
        if !complaints.is_empty() {
            errors.push(FieldError::invalid(at.path(), label, complaints.join(",")));
        }
    }
}

fn hints(at: &At<'_>, rule: fn(&str) -> Vec<String>, errors: &mut Errors) {
    if !errors.at_most(at, HINTS_MAX) {
        return;
    }
    let mut seen = HashSet::new();
    for hint in at.items() {
        let name = hint.child("name");
        if !seen.insert(name.text()) {
            errors.duplicate(&name);
        }
        errors.complaints(&name, rule(name.text()));
    }
}

fn slice_ports(at: &At<'_>, errors: &mut Errors) {
    if !errors.at_most(at, PORTS_MAX) {
        return;
    }
    let mut seen = HashSet::new();
    for port in at.items() {
        let name = port.child("name");
        if !name.text().is_empty() {
            errors.complaints(&name, names::dns1123_label(name.text()));
        }
        if !seen.insert(name.text()) {
            errors.duplicate(&name);
        }
        errors.one_of(&port.child("protocol"), PROTOCOLS);
        app_protocol(&port, errors);
    }
}

fn app_protocol(port: &At<'_>, errors: &mut Errors) {
    if let Some(protocol) = port.child("appProtocol").maybe_text() {
        errors.complaints(&port.child("appProtocol"), names::qualified_name(protocol));
    }
}

/// Checks Endpoints. Subsets that were stored already may stay as they are.
pub(super) fn endpoints(root: &At<'_>, old: Option<&At<'_>>, errors: &mut Errors) {
    let subsets = root.child("subsets");
    if old.is_some_and(|old| old.child("subsets").value() == subsets.value()) {
        return;
    }
    for subset in subsets.items() {
        let (ready, not_ready) = (subset.child("addresses"), subset.child("notReadyAddresses"));
        if ready.len() + not_ready.len() == 0 {
            errors.required(&subset, "must specify `addresses` or `notReadyAddresses`");
        }
        for address in ready.items().iter().chain(&not_ready.items()) {
            endpoint_address(address, errors);
        }
        let ports = subset.child("ports").items();
        for port in &ports {
            endpoint_port(port, ports.len() > 1, errors);
        }
    }
}

fn endpoint_address(at: &At<'_>, errors: &mut Errors) {
    if let Some(ip) = address::ip(&at.child("ip"), errors) {
        address::endpoint(&at.child("ip"), ip, errors);
    }
    let hostname = at.child("hostname");
    if !hostname.text().is_empty() {
        errors.complaints(&hostname, names::dns1123_label(hostname.text()));
    }
    if let Some(name) = at.child("nodeName").maybe_text() {
        errors.complaints(&at.child("nodeName"), names::dns1123_subdomain(name));
    }
}

fn endpoint_port(port: &At<'_>, name_required: bool, errors: &mut Errors) {
    let name = port.child("name");
    if !name.text().is_empty() {
        errors.complaints(&name, names::dns1123_label(name.text()));
    } else if name_required {
        errors.required(&name, "");
    }
    errors.port(&port.child("port"));
    errors.one_of(&port.child("protocol"), PROTOCOLS);
    app_protocol(port, errors);
}
