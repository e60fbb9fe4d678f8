//! The fields of a Service that depend on each other, read from and written to JSON, and what an update carries over.
//!
//! The rules follow `pkg/registry/core/service` of Kubernetes 1.36: `normalizeClusterIPs`, `patchAllocatedValues`,
//! `dropTypeDependentFields`.

use apiserver_machinery::meta;
use serde_json::{Map, Value, json};

/// The cluster IP of a headless Service.
pub(crate) const HEADLESS: &str = "None";

/// `spec.type`.
pub(crate) fn kind(service: &Value) -> &str {
    match meta::text_at(service, &["spec", "type"]) {
        "" => "ClusterIP",
        kind => kind,
    }
}

pub(crate) fn is_external_name(service: &Value) -> bool {
    kind(service) == "ExternalName"
}

/// Whether the type has node ports.
pub(crate) fn has_node_ports(service: &Value) -> bool {
    matches!(kind(service), "NodePort" | "LoadBalancer")
}

/// Whether a load balancer asks each node for its local endpoints.
pub(crate) fn needs_health_check_port(service: &Value) -> bool {
    kind(service) == "LoadBalancer" && text(service, "externalTrafficPolicy") == "Local"
}

/// A text field of `spec`, or the empty text.
pub(crate) fn text<'a>(service: &'a Value, key: &str) -> &'a str {
    meta::text_at(service, &["spec", key])
}

/// A list of texts in `spec`.
pub(crate) fn texts(service: &Value, key: &str) -> Vec<String> {
    let list = meta::value_at(service, &["spec", key]).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// A port number in `spec`.
pub(crate) fn port(service: &Value, key: &str) -> Option<u16> {
    port_of(meta::value_at(service, &["spec"])?, key)
}

/// A port number in any object; 0 and what is no port read as absent.
pub(crate) fn port_of(object: &Value, key: &str) -> Option<u16> {
    let number = object.get(key)?.as_u64()?;
    u16::try_from(number).ok().filter(|port| *port != 0)
}

/// `spec.ports`.
pub(crate) fn ports(service: &Value) -> &[Value] {
    meta::value_at(service, &["spec", "ports"]).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// `spec.ports`, to change them.
pub(crate) fn ports_mut(service: &mut Value) -> &mut [Value] {
    let ports = service.get_mut("spec").and_then(|spec| spec.get_mut("ports")).and_then(Value::as_array_mut);
    ports.map(Vec::as_mut_slice).unwrap_or_default()
}

/// Every node port of the Service's ports.
pub(crate) fn node_ports(service: &Value) -> Vec<u16> {
    ports(service).iter().filter_map(|port| port_of(port, "nodePort")).collect()
}

/// Whether the Service has no selector.
pub(crate) fn is_selectorless(service: &Value) -> bool {
    meta::value_at(service, &["spec", "selector"]).and_then(Value::as_object).is_none_or(Map::is_empty)
}

/// Whether node ports are given out without being asked for.
pub(crate) fn wants_node_ports(service: &Value) -> bool {
    match kind(service) {
        "NodePort" => true,
        "LoadBalancer" => {
            meta::value_at(service, &["spec", "allocateLoadBalancerNodePorts"]).and_then(Value::as_bool).unwrap_or(true)
        }
        _ => false,
    }
}

/// Sets a field of `spec`; an empty list removes it.
pub(crate) fn set(service: &mut Value, key: &str, value: impl Into<Value>) {
    let Some(spec) = service.get_mut("spec").and_then(Value::as_object_mut) else { return };
    let value = value.into();
    if value.as_array().is_some_and(Vec::is_empty) {
        spec.remove(key);
    } else {
        spec.insert(key.to_owned(), value);
    }
}

/// Removes a field of `spec`.
pub(crate) fn unset(service: &mut Value, key: &str) {
    if let Some(spec) = service.get_mut("spec").and_then(Value::as_object_mut) {
        spec.remove(key);
    }
}

fn field<'a>(service: &'a Value, key: &str) -> Option<&'a Value> {
    meta::value_at(service, &["spec", key])
}

fn same(new: &Value, old: &Value, key: &str) -> bool {
    field(new, key) == field(old, key)
}

fn copy(new: &mut Value, old: &Value, key: &str) {
    if let Some(value) = field(old, key) {
        let value = value.clone();
        set(new, key, value);
    }
}

/// Derives `clusterIPs` from `clusterIP` for a client that sent only the latter.
pub(crate) fn normalize_create(service: &mut Value) {
    let ip = text(service, "clusterIP").to_owned();
    if !ip.is_empty() && texts(service, "clusterIPs").is_empty() {
        set(service, "clusterIPs", json!([ip]));
    }
}

/// Brings `clusterIP` and `clusterIPs` of an update together.
pub(crate) fn normalize_update(new: &mut Value, old: &Value) {
    let same_ip = text(new, "clusterIP") == text(old, "clusterIP");
    if texts(new, "clusterIPs").is_empty() && !texts(old, "clusterIPs").is_empty() && same_ip {
        copy(new, old, "clusterIPs");
    }
    if same_ip || texts(new, "clusterIPs") != texts(old, "clusterIPs") {
        return;
    }
    let ip = text(new, "clusterIP").to_owned();
    if ip.is_empty() {
        unset(new, "clusterIPs");
    } else {
        set(new, "clusterIPs", json!([ip]));
    }
}

/// Keeps what was given out before where the client left it open.
pub(crate) fn keep_allocated(new: &mut Value, old: &Value) {
    if !is_external_name(old) && !is_external_name(new) {
        if text(new, "clusterIP").is_empty() {
            copy(new, old, "clusterIP");
        }
        if texts(new, "clusterIPs").is_empty() {
            copy(new, old, "clusterIPs");
        }
    }
    if has_node_ports(old) && has_node_ports(new) {
        keep_node_ports(new, old);
    }
    if needs_health_check_port(old) && needs_health_check_port(new) && port(new, "healthCheckNodePort").is_none() {
        copy(new, old, "healthCheckNodePort");
    }
}

fn keep_node_ports(new: &mut Value, old: &Value) {
    let (before, after) = (node_ports(old), node_ports(new));
    let in_use: Vec<u16> = before.into_iter().filter(|port| after.contains(port)).collect();
    let by_name = |name: &str| {
        let port = ports(old).iter().rev().find(|port| meta::text_at(port, &["name"]) == name)?;
        port_of(port, "nodePort").filter(|port| !in_use.contains(port))
    };
    for port in ports_mut(new).iter_mut().filter(|port| port_of(port, "nodePort").is_none()) {
        if let (Some(kept), Some(fields)) = (by_name(meta::text_at(port, &["name"])), port.as_object_mut()) {
            fields.insert("nodePort".to_owned(), json!(kept));
        }
    }
}

/// Removes what a new type has no use for, where the client did not change it itself.
pub(crate) fn drop_unused(new: &mut Value, old: &Value) {
    if !is_external_name(old) && is_external_name(new) {
        if same(new, old, "clusterIP") && same(new, old, "clusterIPs") {
            unset(new, "clusterIP");
            unset(new, "clusterIPs");
        }
        for key in ["ipFamilies", "ipFamilyPolicy"] {
            if same(new, old, key) {
                unset(new, key);
            }
        }
    }
    if has_node_ports(old) && !has_node_ports(new) && node_ports(new) == node_ports(old) {
        for fields in ports_mut(new).iter_mut().filter_map(Value::as_object_mut) {
            fields.remove("nodePort");
        }
    }
    if needs_health_check_port(old) && !needs_health_check_port(new) && same(new, old, "healthCheckNodePort") {
        unset(new, "healthCheckNodePort");
    }
    drop_balancer_fields(new, old);
}

fn drop_balancer_fields(new: &mut Value, old: &Value) {
    if kind(old) == "LoadBalancer" && kind(new) != "LoadBalancer" {
        for key in ["allocateLoadBalancerNodePorts", "loadBalancerClass"] {
            if same(new, old, key) {
                unset(new, key);
            }
        }
    }
    let external = |service: &Value| {
        has_node_ports(service) || (kind(service) == "ClusterIP" && !texts(service, "externalIPs").is_empty())
    };
    if external(old) && !external(new) && same(new, old, "externalTrafficPolicy") {
        unset(new, "externalTrafficPolicy");
    }
    if kind(new) != "LoadBalancer"
        && let Some(status) = new.get_mut("status").and_then(Value::as_object_mut)
    {
        status.insert("loadBalancer".to_owned(), json!({}));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_without_allocated_values_keeps_them() {
        let old = json!({"spec": {"type": "NodePort", "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"],
            "ports": [{"name": "a", "port": 80, "nodePort": 30001}, {"name": "b", "port": 81, "nodePort": 30002}]}});
        let mut new =
            json!({"spec": {"type": "NodePort", "ports": [{"name": "b", "port": 81}, {"name": "c", "port": 82}]}});
        keep_allocated(&mut new, &old);
        assert_eq!(new["spec"]["clusterIPs"], json!(["10.0.0.1"]));
        assert_eq!(node_ports(&new), [30002]);
    }

    #[test]
    fn a_new_type_loses_what_it_cannot_use() {
        let old = json!({"spec": {"type": "NodePort", "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"],
            "externalTrafficPolicy": "Local", "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "ports": [{"port": 80, "nodePort": 30001}]}});
        let mut new = old.clone();
        new["spec"]["type"] = json!("ClusterIP");
        drop_unused(&mut new, &old);
        assert!(node_ports(&new).is_empty());
        assert!(new["spec"].get("externalTrafficPolicy").is_none());
        assert_eq!(new["spec"]["clusterIP"], "10.0.0.1");
        let mut named = old.clone();
        named["spec"]["type"] = json!("ExternalName");
        drop_unused(&mut named, &old);
        assert!(named["spec"].get("clusterIPs").is_none());
        assert!(named["spec"].get("ipFamilies").is_none());
    }

    #[test]
    fn cluster_ip_and_cluster_ips_follow_each_other() {
        let mut created = json!({"spec": {"clusterIP": "None"}});
        normalize_create(&mut created);
        assert_eq!(created["spec"]["clusterIPs"], json!(["None"]));
        let old = json!({"spec": {"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"]}});
        let mut changed = json!({"spec": {"clusterIP": "10.0.0.2", "clusterIPs": ["10.0.0.1"]}});
        normalize_update(&mut changed, &old);
        assert_eq!(changed["spec"]["clusterIPs"], json!(["10.0.0.2"]));
    }
}
