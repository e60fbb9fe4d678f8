//! What is kept of the API objects: the fields that a decision needs, parsed and validated, and nothing else.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Balancing, IpFamily, Protocol};

/// Namespace and name of a Service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One entry of `spec.ports`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSpec {
    /// Name; empty where the Service has one unnamed port.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port on the virtual addresses, never 0.
    pub port: u16,
    /// NodePort; `None` where none is allocated.
    pub node_port: Option<u16>,
}

/// A Service that this node has to express. ExternalName, headless and foreign (`service-proxy-name`) Services never
/// become one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceObject {
    /// Its name.
    pub key: ServiceKey,
    /// `metadata.creationTimestamp` in Unix seconds; the greatest number where there is none, which makes it the youngest.
    pub created_seconds: i64,
    /// At most one ClusterIP per family.
    pub cluster_ips: Vec<IpAddr>,
    /// Its ports; a later port of the same name and protocol replaces the earlier.
    pub ports: Vec<PortSpec>,
    /// `spec.externalIPs`, both families.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` of ipMode VIP, both families.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`, both families, host bits cleared.
    pub source_ranges: Vec<IpNet>,
    /// ClientIP affinity timeout in seconds, 1 to 86400.
    pub affinity_seconds: Option<u32>,
    /// externalTrafficPolicy Local on an externally accessible Service.
    pub external_local: bool,
    /// internalTrafficPolicy Local.
    pub internal_local: bool,
    /// `spec.healthCheckNodePort` of a LoadBalancer with externalTrafficPolicy Local.
    pub health_check_node_port: Option<u16>,
    /// How its endpoints are chosen, where its annotations say anything about it; few do.
    pub balancing: Option<Box<Balancing>>,
}

impl ServiceObject {
    /// The ClusterIP of `family`.
    pub fn cluster_ip(&self, family: IpFamily) -> Option<IpAddr> {
        self.cluster_ips.iter().copied().find(|address| IpFamily::of(*address) == family)
    }
}

/// One entry of an EndpointSlice's `ports` that has a name and a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlicePort {
    /// Name, may be empty.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Target port, never 0.
    pub port: u16,
}

/// One usable address of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Its first address, of the slice's family; the others are never used.
    pub address: IpAddr,
    /// Whether `nodeName` is this node.
    pub local: bool,
    /// `conditions.ready`, true when absent.
    pub ready: bool,
    /// `conditions.serving`, true when absent.
    pub serving: bool,
    /// `conditions.terminating`, false when absent.
    pub terminating: bool,
    /// Whether `hints.forNodes` names any node.
    pub has_node_hints: bool,
    /// Whether `hints.forNodes` names this node.
    pub hinted_for_node: bool,
    /// `hints.forZones`; `None` where it is empty. Shared between endpoints with the same hints, by a
    /// pointer of one word: there are hundreds of thousands of endpoints.
    pub zone_hints: Option<Arc<Vec<Arc<str>>>>,
}

/// An EndpointSlice of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceObject {
    /// Name of the slice, in the namespace of its Service.
    pub name: Arc<str>,
    /// The Service that its label names.
    pub service: ServiceKey,
    /// Family of all its addresses.
    pub family: IpFamily,
    /// Its ports.
    pub ports: Box<[SlicePort]>,
    /// Its usable endpoints.
    pub endpoints: Box<[SliceEndpoint]>,
    /// Weight of its endpoints where its annotation gives one, 0 to [`WEIGHT_MAX`](super::WEIGHT_MAX).
    pub weight: Option<u8>,
    /// How many endpoints were left out because their address may never be a target.
    pub rejected: u32,
}
