//! Rows of Services, Endpoints, EndpointSlices, ServiceCIDRs and IPAddresses.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;

use super::duration::age;
use crate::meta::{name, text_at, value_at};

/// Ports or addresses shown before the rest is only counted.
const SHOWN_MAX: usize = 3;

pub(super) fn service(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = |key: &str| text_at(object, &["spec", key]);
    let cluster_ip = texts(object, &["spec", "clusterIPs"]).next().unwrap_or("<none>");
    let ports: Vec<String> = items(object, &["spec", "ports"]).iter().map(service_port).collect();
    let selector: Vec<String> = value_at(object, &["spec", "selector"])
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    vec![
        name(object).into(),
        spec("type").into(),
        cluster_ip.into(),
        external_ip(object).into(),
        or_none(ports.join(",")).into(),
        age(object, now),
        or_none(selector.join(",")).into(),
    ]
}

fn service_port(port: &Value) -> String {
    let number = |key: &str| port.get(key).and_then(Value::as_i64).unwrap_or_default();
    let protocol = text_at(port, &["protocol"]);
    match number("nodePort") {
        0 => format!("{}/{protocol}", number("port")),
        node_port => format!("{}:{node_port}/{protocol}", number("port")),
    }
}

fn external_ip(object: &Value) -> String {
    let external: Vec<&str> = texts(object, &["spec", "externalIPs"]).collect();
    match text_at(object, &["spec", "type"]) {
        "ClusterIP" | "NodePort" => or_none(external.join(",")),
        "LoadBalancer" => {
            let ingress = items(object, &["status", "loadBalancer", "ingress"]);
            let address = |entry| match text_at(entry, &["ip"]) {
                "" => text_at(entry, &["hostname"]),
                ip => ip,
            };
            let ingress: BTreeSet<&str> = ingress.iter().map(address).filter(|text| !text.is_empty()).collect();
            let all: Vec<&str> = ingress.into_iter().chain(external).collect();
            if all.is_empty() { "<pending>".to_owned() } else { all.join(",") }
        }
        "ExternalName" => text_at(object, &["spec", "externalName"]).to_owned(),
        _ => "<unknown>".to_owned(),
    }
}

pub(super) fn endpoints(object: &Value, now: Timestamp) -> Vec<Value> {
    let mut shown = Vec::new();
    let mut count = 0;
    for subset in items(object, &["subsets"]) {
        let ports = items(subset, &["ports"]);
        let addresses = items(subset, &["addresses"]);
        let addresses = || addresses.iter().map(|address| text_at(address, &["ip"]));
        // Headless Services may have no ports at all.
        count += addresses().count() * ports.len().max(1);
        let lines: Box<dyn Iterator<Item = String>> = if ports.is_empty() {
            Box::new(addresses().map(str::to_owned))
        } else {
            Box::new(ports.iter().flat_map(|port| addresses().map(|ip| host_port(ip, port))))
        };
        shown.extend(lines.take(SHOWN_MAX - shown.len()));
    }
    let text = if items(object, &["subsets"]).is_empty() { "<none>".to_owned() } else { with_more(&shown, count) };
    vec![name(object).into(), text.into(), age(object, now)]
}

fn host_port(ip: &str, port: &Value) -> String {
    let port = port.get("port").and_then(Value::as_i64).unwrap_or_default();
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}

pub(super) fn endpoint_slice(object: &Value, now: Timestamp) -> Vec<Value> {
    let ports: Vec<String> = items(object, &["ports"]).iter().map(slice_port).collect();
    let addresses: Vec<String> = items(object, &["endpoints"])
        .iter()
        .flat_map(|endpoint| texts(endpoint, &["addresses"]))
        .map(str::to_owned)
        .collect();
    vec![
        name(object).into(),
        text_at(object, &["addressType"]).into(),
        unset(&ports).into(),
        unset(&addresses).into(),
        age(object, now),
    ]
}

fn slice_port(port: &Value) -> String {
    match (port.get("port").and_then(Value::as_i64), port.get("name").and_then(Value::as_str)) {
        (Some(number), _) => number.to_string(),
        (None, Some(name)) => name.to_owned(),
        (None, None) => "*".to_owned(),
    }
}

fn unset(list: &[String]) -> String {
    let shown = list.get(..SHOWN_MAX).unwrap_or(list);
    let text = with_more(shown, list.len());
    if text.is_empty() { "<unset>".to_owned() } else { text }
}

/// The shown ones, and how many more there are.
fn with_more(shown: &[String], count: usize) -> String {
    let text = shown.join(",");
    if count > shown.len() { format!("{text} + {} more...", count - shown.len()) } else { text }
}

pub(super) fn service_cidr(object: &Value, now: Timestamp) -> Vec<Value> {
    let cidrs: Vec<&str> = texts(object, &["spec", "cidrs"]).collect();
    vec![name(object).into(), cidrs.join(",").into(), age(object, now)]
}

pub(super) fn ip_address(object: &Value, now: Timestamp) -> Vec<Value> {
    let parent = value_at(object, &["spec", "parentRef"]).map_or_else(|| "<none>".to_owned(), parent_reference);
    vec![name(object).into(), parent.into(), age(object, now)]
}

/// `services/default/web`, or with the group: `things.example.org/name`.
fn parent_reference(parent: &Value) -> String {
    let text = |key: &str| text_at(parent, &[key]);
    let group = if text("group").is_empty() { String::new() } else { format!(".{}", text("group")) };
    let namespace = if text("namespace").is_empty() { String::new() } else { format!("/{}", text("namespace")) };
    let resource = format!("{}{group}", text("resource")).to_lowercase();
    format!("{resource}{namespace}/{}", text("name"))
}

fn items<'a>(object: &'a Value, path: &[&str]) -> &'a [Value] {
    value_at(object, path).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn texts<'a>(object: &'a Value, path: &[&str]) -> impl Iterator<Item = &'a str> {
    items(object, path).iter().filter_map(Value::as_str)
}

fn or_none(text: String) -> String {
    if text.is_empty() { "<none>".to_owned() } else { text }
}
