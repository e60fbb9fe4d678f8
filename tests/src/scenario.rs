//! Manifests for tests, as short as the behaviour that they are about.

use std::net::IpAddr;

use serde_json::{Value, json};

/// A Pod `name` on `node-NODE` with the label `app`, whose echo server listens on the ports.
pub fn pod(name: &str, node: usize, app: &str, tcp: &[u16], udp: &[u16]) -> Value {
    let port = |number: &u16, protocol: &str| json!({ "containerPort": number, "protocol": protocol });
    let ports = tcp.iter().map(|number| port(number, "TCP")).chain(udp.iter().map(|number| port(number, "UDP")));
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": "default", "labels": { "app": app } },
        "spec": {
            "nodeName": format!("node-{node}"),
            "containers": [{ "name": "echo", "image": "trama-lab/echo", "ports": ports.collect::<Vec<_>>() }],
        },
    })
}

/// A Service to be described: by default a ClusterIP of one family.
#[derive(Debug, Clone)]
pub struct ServiceManifest {
    name: String,
    spec: Value,
    ports: Vec<Value>,
}

impl ServiceManifest {
    /// A Service for the Pods with the label `app`; without `app` it has no selector, and its slices are the caller's.
    pub fn new(name: &str, app: Option<&str>) -> Self {
        let spec = app.map_or_else(|| json!({}), |app| json!({ "selector": { "app": app } }));
        Self { name: name.to_owned(), spec, ports: Vec::new() }
    }

    /// A port, named `tcp-PORT` or `udp-PORT`.
    #[must_use]
    pub fn port(mut self, protocol: &str, port: u16, target: u16) -> Self {
        let name = port_name(protocol, port);
        self.ports.push(json!({ "name": name, "protocol": protocol, "port": port, "targetPort": target }));
        self
    }

    /// Any field of the spec, as JSON.
    #[must_use]
    pub fn with(mut self, field: &str, value: Value) -> Self {
        if let Some(spec) = self.spec.as_object_mut() {
            spec.insert(field.to_owned(), value);
        }
        self
    }

    /// The manifest.
    pub fn build(self) -> Value {
        let described = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": self.name, "namespace": "default" },
        });
        merged(described, self.with_ports())
    }

    fn with_ports(mut self) -> Value {
        let ports = std::mem::take(&mut self.ports);
        json!({ "spec": self.with("ports", ports.into()).spec })
    }
}

/// The name that [`ServiceManifest::port`] gives.
pub fn port_name(protocol: &str, port: u16) -> String {
    format!("{}-{port}", protocol.to_lowercase())
}

/// An EndpointSlice of a Service whose only port is the TCP port `port`, with every address ready.
pub fn endpoint_slice(name: &str, service: &str, port: u16, target: u16, addresses: &[IpAddr]) -> Value {
    let family = if addresses.iter().all(IpAddr::is_ipv4) { "IPv4" } else { "IPv6" };
    let endpoints =
        addresses.iter().map(|ip| json!({ "addresses": [ip.to_string()], "conditions": { "ready": true } }));
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": name, "namespace": "default",
            "labels": {
                "kubernetes.io/service-name": service,
                "endpointslice.kubernetes.io/managed-by": "trama-lab",
            },
        },
        "addressType": family,
        "ports": [{ "name": port_name("TCP", port), "protocol": "TCP", "port": target }],
        "endpoints": endpoints.collect::<Vec<_>>(),
    })
}

fn merged(mut base: Value, more: Value) -> Value {
    if let (Some(base), Value::Object(more)) = (base.as_object_mut(), more) {
        base.extend(more);
    }
    base
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_what_was_asked_for() {
        let service =
            ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).with("type", json!("NodePort")).build();
        assert_eq!(service["spec"]["ports"][0]["name"], "tcp-80");
        assert_eq!(service["spec"]["ports"][0]["targetPort"], 8080);
        assert_eq!(service["spec"]["selector"]["app"], "web");
        assert_eq!((&service["spec"]["type"], &service["metadata"]["name"]), (&json!("NodePort"), &json!("web")));
        assert!(ServiceManifest::new("own", None).build()["spec"]["selector"].is_null());
    }
}
