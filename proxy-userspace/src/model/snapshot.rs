//! The decided state of the node: what a [`Dataplane`](crate::dataplane::Dataplane) is asked to express.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

/// IPv4 or IPv6. A dual-stack Service is one [`ServicePort`] per family, as kube-proxy runs one proxier per family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// The family of `address`; an IPv4-mapped IPv6 address counts as IPv6.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// Transport protocol of a ServicePort. The discriminant is the IP protocol number (RFC 790, RFC 9260).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// TCP, 6.
    Tcp = 6,
    /// UDP, 17.
    Udp = 17,
    /// SCTP, 132.
    Sctp = 132,
}

/// Names one port of one Service in one family: the unit that is programmed, counted and diffed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePortName {
    /// Namespace of the Service.
    pub namespace: Arc<str>,
    /// Name of the Service.
    pub service: Arc<str>,
    /// Name of the port; empty for the only port of a Service with unnamed ports.
    pub port: Arc<str>,
    /// Protocol of the port.
    pub protocol: Protocol,
    /// Family of its addresses.
    pub family: IpFamily,
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{} {:?}/{:?}", self.namespace, self.service, self.port, self.protocol, self.family)
    }
}

/// Which list of endpoints a packet is sent to (kube-proxy `pkg/proxy/topology.go`, CategorizeEndpoints).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EndpointSet {
    /// [`ServicePort::cluster_endpoints`].
    Cluster,
    /// [`ServicePort::local_endpoints`].
    Local,
}

/// What happens to a new connection at a frontend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Goes to one endpoint of the set. The set is never empty: an empty one is decided as `Reject` or `Drop`.
    Forward(EndpointSet),
    /// Refused: ECONNREFUSED at the socket, ICMP port unreachable for a packet.
    Reject,
    /// Silently dropped.
    Drop,
}

/// Action and source rewriting for one origin of traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rule {
    /// What to do.
    pub action: Action,
    /// Whether the source becomes the node's address. Hairpin (source equals the chosen endpoint) is masqueraded
    /// whatever this says.
    pub masquerade: bool,
}

/// The rule of a frontend for each origin of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OriginRules {
    /// Source inside [`NodeConfig::pod_cidrs`]: a pod of this node or of another.
    pub pod: Rule,
    /// A socket of the node itself.
    pub node: Rule,
    /// Everything else.
    pub external: Rule,
}

/// Where a frontend listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrontendAddress {
    /// One virtual address: ClusterIP, externalIP or load-balancer IP.
    Ip(IpAddr),
    /// Every address in [`NodeConfig::node_port_addresses`] of the ServicePort's family.
    NodePort,
}

/// Why a frontend exists; for counters and explanations, the rules already contain its effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `spec.ports[].nodePort`.
    NodePort,
    /// `spec.externalIPs`.
    ExternalIp,
    /// `status.loadBalancer.ingress[].ip` with ipMode VIP.
    LoadBalancerIp,
}

/// One address and port at which a ServicePort answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frontend {
    /// Where it listens.
    pub address: FrontendAddress,
    /// Port, host byte order, never 0.
    pub port: u16,
    /// Why it exists.
    pub kind: FrontendKind,
    /// What it does, by origin.
    pub rules: OriginRules,
}

/// One endpoint that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// Address and target port. The address is unicast, not loopback, link-local or unspecified, and of the family of its
    /// ServicePort: the tracker rejects others.
    pub address: SocketAddr,
    /// Whether its node is this node.
    pub local: bool,
}

/// One ServicePort in one family, completely decided for this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name.
    pub name: ServicePortName,
    /// Where it listens; sorted by address then port, at most one entry per (address, port).
    pub frontends: Vec<Frontend>,
    /// Targets of `Forward(Cluster)`: locals first, each part sorted by address; no duplicates.
    pub cluster_endpoints: Vec<Endpoint>,
    /// Targets of `Forward(Local)`: sorted by address; not always a subset of the cluster list.
    pub local_endpoints: Vec<Endpoint>,
    /// ClientIP affinity timeout in seconds (1 to 86400); `None` is no affinity.
    pub affinity_seconds: Option<u32>,
    /// Who may use the load-balancer IPs; empty is everybody.
    pub load_balancer_source_ranges: Vec<IpNet>,
    /// `spec.healthCheckNodePort` where it is served; `None` elsewhere.
    pub health_check_node_port: Option<u16>,
}

/// What the decisions need to know of the node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeConfig {
    /// Addresses of this node on which NodePorts answer.
    pub node_port_addresses: BTreeSet<IpAddr>,
    /// All addresses of this node's interfaces, loopback and IPv6 link-local ones excluded: a packet from one of them has
    /// origin node.
    pub node_addresses: BTreeSet<IpAddr>,
    /// Source of masqueraded IPv4 packets; `None` where the node has no IPv4 address.
    pub masquerade_v4: Option<std::net::Ipv4Addr>,
    /// Source of masqueraded IPv6 packets; `None` where the node has no global IPv6 address.
    pub masquerade_v6: Option<std::net::Ipv6Addr>,
    /// What counts as a pod's address (detectLocalMode ClusterCIDR); at most 8 per family.
    pub pod_cidrs: Vec<IpNet>,
    /// Interfaces of this network namespace, by index: where packet programs may hang.
    pub interfaces: BTreeMap<u32, Arc<str>>,
}

/// The immutable desired state of this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServiceSnapshot {
    /// Grows by one with every snapshot of a process.
    pub version: u64,
    /// The node's own facts.
    pub node: Arc<NodeConfig>,
    /// Every ServicePort with at least one frontend.
    pub services: BTreeMap<ServicePortName, Arc<ServicePort>>,
}

/// What changed from one snapshot to the next.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServiceDelta {
    /// Whether [`ServiceSnapshot::node`] differs.
    pub node_changed: bool,
    /// ServicePorts that are new, different or gone, sorted; look each up in the new snapshot.
    pub changed: Vec<ServicePortName>,
}
