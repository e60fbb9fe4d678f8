//! From API objects to the few fields that decisions need; the object is dropped at once.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use tracing::{debug, warn};

use super::address::{is_link_local, parse_endpoint, parse_frontend, parse_ip, parse_net};
use super::intern::Interner;
use crate::model::{
    ANNOTATION_ALGORITHM, ANNOTATION_FORWARDING, ANNOTATION_WEIGHT, ANNOTATION_WEIGHTS, Balancing, IpFamily, PortSpec,
    Protocol, ServiceKey, ServiceObject, SliceEndpoint, SliceObject, SlicePort, WEIGHT_MAX, parse_weight,
};
use crate::node::NodeFacts;

const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
const ANNOTATION_TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Set by the cluster autoscaler before it deletes a node.
const TAINT_TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";
/// Default of `sessionAffinityConfig.clientIP.timeoutSeconds`, and its greatest value.
const AFFINITY_SECONDS: (u32, u32) = (10_800, 86_400);

/// Turns objects of one cluster into compact ones, for one node.
#[derive(Debug)]
pub(super) struct Converter {
    node_name: Arc<str>,
    interner: Interner,
}

impl Converter {
    pub(super) fn new(node_name: &str) -> Self {
        Self { node_name: Arc::from(node_name), interner: Interner::new() }
    }

    /// The names by which a Service is known, even where it is none of ours.
    pub(super) fn service_key(&mut self, service: &Service) -> Option<ServiceKey> {
        let namespace = self.interner.string(service.metadata.namespace.as_deref()?);
        Some(ServiceKey { namespace, name: self.interner.string(service.metadata.name.as_deref()?) })
    }

    /// `None` for a Service that this proxy does not express: headless, ExternalName, or another proxy's.
    pub(super) fn service(&mut self, service: &Service) -> Option<ServiceObject> {
        let key = self.service_key(service)?;
        let spec = service.spec.as_ref()?;
        let foreign = service.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(LABEL_PROXY_NAME));
        let no_address = matches!(spec.cluster_ip.as_deref(), None | Some("" | "None"));
        if foreign || no_address || spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let external_local = external_policy_local(spec);
        let needs_health_check = external_local && spec.type_.as_deref() == Some("LoadBalancer");
        let created = service.metadata.creation_timestamp.as_ref();
        Some(ServiceObject {
            key,
            created_seconds: created.map_or(i64::MAX, |time| time.0.as_second()),
            cluster_ips: exact(cluster_ips(spec).into_iter()),
            ports: exact(spec.ports.iter().flatten().filter_map(|port| self.service_port(port))),
            external_ips: external_ips(spec),
            load_balancer_ips: load_balancer_ips(service),
            source_ranges: source_ranges(spec),
            affinity_seconds: affinity_seconds(spec),
            external_local,
            internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            health_check_node_port: spec.health_check_node_port.and_then(port).filter(|_| needs_health_check),
            balancing: balancing(&service.metadata),
        })
    }

    fn service_port(&mut self, spec: &ServicePort) -> Option<PortSpec> {
        Some(PortSpec {
            name: self.interner.string(spec.name.as_deref().unwrap_or_default()),
            protocol: protocol(spec.protocol.as_deref())?,
            port: port(spec.port)?,
            node_port: spec.node_port.and_then(port),
        })
    }

    /// Namespace and name of a slice.
    pub(super) fn slice_id(&mut self, slice: &EndpointSlice) -> Option<(Arc<str>, Arc<str>)> {
        let namespace = self.interner.string(slice.metadata.namespace.as_deref()?);
        Some((namespace, self.interner.string(slice.metadata.name.as_deref()?)))
    }

    /// `None` for a slice without a Service, of a headless Service, or with neither IPv4 nor IPv6 addresses.
    pub(super) fn slice(&mut self, slice: &EndpointSlice) -> Option<SliceObject> {
        let (namespace, name) = self.slice_id(slice)?;
        let labels = slice.metadata.labels.as_ref()?;
        let service = labels.get(LABEL_SERVICE_NAME).filter(|service| !service.is_empty())?;
        let family = match slice.address_type.as_str() {
            "IPv4" => IpFamily::V4,
            "IPv6" => IpFamily::V6,
            _ => return None,
        };
        if labels.contains_key(LABEL_HEADLESS) {
            return None;
        }
        let service = ServiceKey { namespace, name: self.interner.string(service) };
        let listed = slice.endpoints.as_deref().unwrap_or_default();
        let endpoints: Box<[_]> = listed.iter().filter_map(|endpoint| self.endpoint(endpoint, family)).collect();
        let rejected = u32::try_from(listed.len() - endpoints.len()).unwrap_or(u32::MAX);
        let ports = slice.ports.iter().flatten().filter_map(|port| self.slice_port(port)).collect();
        let weight = weight(&slice.metadata);
        Some(SliceObject { name, service, family, ports, endpoints, weight, rejected })
    }

    /// A port without a name or number ("all ports") is not supported by any kube-proxy either.
    fn slice_port(&mut self, spec: &EndpointPort) -> Option<SlicePort> {
        Some(SlicePort {
            name: self.interner.string(spec.name.as_deref()?),
            protocol: protocol(spec.protocol.as_deref())?,
            port: spec.port.and_then(port)?,
        })
    }

    fn endpoint(&mut self, endpoint: &Endpoint, family: IpFamily) -> Option<SliceEndpoint> {
        let text = endpoint.addresses.first().map_or("", String::as_str);
        let Some(address) = parse_endpoint(text, family) else {
            debug!(address = text, ?family, "endpoint address may never be a target");
            return None;
        };
        let conditions = endpoint.conditions.as_ref();
        let hints = endpoint.hints.as_ref();
        let nodes = hints.and_then(|hints| hints.for_nodes.as_deref()).unwrap_or_default();
        let zones = hints.and_then(|hints| hints.for_zones.as_deref()).unwrap_or_default();
        let zones: Vec<_> = zones.iter().map(|zone| self.interner.string(&zone.name)).collect();
        Some(SliceEndpoint {
            address,
            local: endpoint.node_name.as_deref() == Some(&*self.node_name),
            ready: conditions.and_then(|c| c.ready).unwrap_or(true),
            serving: conditions.and_then(|c| c.serving).unwrap_or(true),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
            has_node_hints: !nodes.is_empty(),
            hinted_for_node: nodes.iter().any(|node| *node.name == *self.node_name),
            zone_hints: (!zones.is_empty()).then(|| self.interner.hints(zones)),
        })
    }
}

/// Collects without room to spare: a large cluster has tens of thousands of such lists, of one element each.
fn exact<T>(elements: impl Iterator<Item = T>) -> Vec<T> {
    let mut list: Vec<T> = elements.collect();
    list.shrink_to_fit();
    list
}

fn annotation<'o>(metadata: &'o ObjectMeta, name: &str) -> Option<&'o str> {
    metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

fn balancing(metadata: &ObjectMeta) -> Option<Box<Balancing>> {
    let [algorithm, weights, forwarding] =
        [ANNOTATION_ALGORITHM, ANNOTATION_WEIGHTS, ANNOTATION_FORWARDING].map(|name| annotation(metadata, name));
    Balancing::parse(algorithm, weights, forwarding).map(Box::new)
}

/// What is no weight is said in the log at every event of the slice: it has no Event, which would be the Service's.
fn weight(metadata: &ObjectMeta) -> Option<u8> {
    let text = annotation(metadata, ANNOTATION_WEIGHT)?;
    let weight = parse_weight(text);
    if weight.is_none() {
        let slice = metadata.name.as_deref().unwrap_or_default();
        warn!(slice, value = text, "annotation {ANNOTATION_WEIGHT} is no number of 0 to {WEIGHT_MAX}, and is ignored");
    }
    weight
}

/// When the pod or Service changed that made the endpoints controller write this slice.
pub(super) fn trigger_time(slice: &EndpointSlice) -> Option<Timestamp> {
    slice.metadata.annotations.as_ref()?.get(ANNOTATION_TRIGGER_TIME)?.parse().ok()
}

/// What is used of the Node object.
pub(super) fn node_facts(node: &Node) -> NodeFacts {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let internal = addresses.filter(|address| address.type_ == "InternalIP");
    let spec = node.spec.as_ref();
    let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let pod_cidrs = spec.map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr));
    let mut pod_cidrs: Vec<IpNet> = pod_cidrs.into_iter().flatten().filter_map(|cidr| parse_net(cidr)).collect();
    pod_cidrs.sort_unstable();
    pod_cidrs.dedup();
    NodeFacts {
        zone: node
            .metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(LABEL_ZONE))
            .map(|zone| Arc::from(zone.as_str())),
        internal_ips: internal.filter_map(|address| parse_ip(&address.address)).collect(),
        pod_cidrs,
        leaving: node.metadata.deletion_timestamp.is_some() || taints.iter().any(|t| t.key == TAINT_TO_BE_DELETED),
    }
}

fn external_policy_local(spec: &ServiceSpec) -> bool {
    let accessible = match spec.type_.as_deref() {
        Some("LoadBalancer" | "NodePort") => true,
        Some("ClusterIP") | None => spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty()),
        Some(_) => false,
    };
    accessible && spec.external_traffic_policy.as_deref() == Some("Local")
}

/// `clusterIPs` goes with `ipFamilies`, entry by entry; without families `clusterIP` alone counts.
fn cluster_ips(spec: &ServiceSpec) -> Vec<IpAddr> {
    let families = spec.ip_families.as_deref().unwrap_or_default();
    if families.is_empty() {
        return spec.cluster_ip.as_deref().and_then(parse_frontend).into_iter().collect();
    }
    let mut found: Vec<IpAddr> = Vec::new();
    for (family, text) in families.iter().zip(spec.cluster_ips.iter().flatten()) {
        let wanted = if family == "IPv6" { IpFamily::V6 } else { IpFamily::V4 };
        let address = parse_frontend(text).filter(|address| IpFamily::of(*address) == wanted);
        found.extend(address.filter(|address| found.iter().all(|a| IpFamily::of(*a) != IpFamily::of(*address))));
    }
    found
}

/// A link-local external IP is refused as the API server's validation does.
fn external_ips(spec: &ServiceSpec) -> Vec<IpAddr> {
    let parsed = spec.external_ips.iter().flatten().filter_map(|text| parse_frontend(text));
    parsed.filter(|address| !is_link_local(*address)).collect()
}

/// ipMode Proxy means that traffic must go out to the load balancer.
fn load_balancer_ips(service: &Service) -> Vec<IpAddr> {
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|load_balancer| load_balancer.ingress.as_deref()).unwrap_or_default();
    let vips = ingress.iter().filter(|ingress| matches!(ingress.ip_mode.as_deref(), None | Some("VIP")));
    vips.filter_map(|ingress| parse_frontend(ingress.ip.as_deref()?)).collect()
}

fn source_ranges(spec: &ServiceSpec) -> Vec<IpNet> {
    spec.load_balancer_source_ranges.iter().flatten().filter_map(|range| parse_net(range)).collect()
}

fn affinity_seconds(spec: &ServiceSpec) -> Option<u32> {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return None;
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let seconds = config.and_then(|client| client.timeout_seconds).and_then(|seconds| u32::try_from(seconds).ok());
    let (default, max) = AFFINITY_SECONDS;
    Some(seconds.unwrap_or(default).clamp(1, max))
}

fn protocol(text: Option<&str>) -> Option<Protocol> {
    match text {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(_) => None,
    }
}

fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port != 0)
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
