//! The decided state of the node: what a [`Dataplane`](crate::dataplane::Dataplane) is asked to express.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Algorithm, ServiceKey, WEIGHT_DEFAULT};

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

/// Names one port of one Service in one family: the unit that is programmed, counted and diffed. Shared, because many tables of a
/// large cluster hold the same name; compared, ordered and hashed by its parts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePortName(Arc<NameParts>);

impl ServicePortName {
    /// The name of these parts.
    pub fn new(parts: NameParts) -> Self {
        Self(Arc::new(parts))
    }
}

impl Deref for ServicePortName {
    type Target = NameParts;

    fn deref(&self) -> &NameParts {
        &self.0
    }
}

/// The parts of a [`ServicePortName`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NameParts {
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
    /// What [`NodeConfig::pod_traffic`] recognises: a pod of this node or of another.
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
    /// Unicast, not loopback, link-local or unspecified, and of the family of its ServicePort: the tracker rejects others.
    ip: IpAddr,
    port: u16,
    /// Whether its node is this node.
    pub local: bool,
    /// Its share of new flows against those of the others, 1 to [`WEIGHT_MAX`](super::WEIGHT_MAX). nftables, iptables and IPVS give
    /// all the same.
    pub weight: u8,
}

impl Endpoint {
    /// The endpoint at this address and target port, of the default weight.
    pub fn new(address: SocketAddr, local: bool) -> Self {
        Self { ip: address.ip(), port: address.port(), local, weight: WEIGHT_DEFAULT }
    }

    /// The same with another weight.
    #[must_use]
    pub fn with_weight(self, weight: u8) -> Self {
        Self { weight, ..self }
    }

    /// Address and target port. The address is unicast, not loopback, link-local or unspecified, and of the family of its
    /// ServicePort. Kept as its parts: a `SocketAddr` has room for an IPv6 scope, and there are hundreds of thousands of endpoints.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }
}

/// One ServicePort in one family, completely decided for this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name.
    pub name: ServicePortName,
    /// When its Service was created, in Unix seconds: the older one answers where two claim one address.
    pub created_seconds: i64,
    /// Where it listens; sorted by address then port, at most one entry per (address, port).
    pub frontends: Vec<Frontend>,
    /// Targets of `Forward(Cluster)`: locals first, each part sorted by address; no duplicates.
    pub cluster_endpoints: Vec<Endpoint>,
    /// Targets of `Forward(Local)`: sorted by address; not always a subset of the cluster list.
    pub local_endpoints: Vec<Endpoint>,
    /// UDP only: endpoints that serve and get no new flows (terminating, of weight 0, or hinted for elsewhere), sorted. Flows that
    /// they have stay theirs, as an established TCP connection does (kube-proxy 1.36 `pkg/proxy/conntrack/cleanup.go`).
    pub kept_endpoints: Vec<SocketAddr>,
    /// TCP and SCTP: endpoints that are there and get no new flows (unready, terminating, of weight 0, or hinted for elsewhere), sorted.
    /// Connections to them are theirs until they end; one that is in none of these lists is gone.
    pub draining_endpoints: Vec<SocketAddr>,
    /// Whether clients outside of the cluster get their answers straight from the endpoint's node, where the rule would masquerade them: direct
    /// server return. eBPF's; the others masquerade.
    pub direct_return: bool,
    /// How one of several endpoints is chosen. nftables, iptables and IPVS choose at random.
    pub algorithm: Algorithm,
    /// ClientIP affinity timeout in seconds (1 to 86400); `None` is no affinity.
    pub affinity_seconds: Option<u32>,
    /// Who may use the load-balancer IPs; empty is everybody.
    pub load_balancer_source_ranges: Vec<IpNet>,
}

/// How packets of pods are told from others (detectLocalMode, kube-proxy 1.36 `pkg/proxy/util/localdetector.go`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodTraffic {
    /// ClusterCIDR and NodeCIDR: the source address is inside one of these networks, at most 8 per family. In a family
    /// without a network nobody is known to be a pod.
    Source(Vec<IpNet>),
    /// BridgeInterface: the packet comes in through the bridge of this name.
    Bridge(Arc<str>),
    /// InterfaceNamePrefix: the packet comes in through an interface whose name begins so.
    Prefix(Arc<str>),
}

impl Default for PodTraffic {
    fn default() -> Self {
        Self::Source(Vec::new())
    }
}

impl PodTraffic {
    /// The networks of pods; empty where pods are told by interface.
    pub fn networks(&self) -> &[IpNet] {
        match self {
            Self::Source(networks) => networks,
            Self::Bridge(_) | Self::Prefix(_) => &[],
        }
    }

    /// Whether pods of `family` can be told from others at all.
    pub fn detects(&self, family: IpFamily) -> bool {
        match self {
            Self::Source(networks) => networks.iter().any(|net| IpFamily::of(net.addr()) == family),
            Self::Bridge(_) | Self::Prefix(_) => true,
        }
    }

    /// Whether a packet with this source that came in through interface `input` is a pod's.
    pub fn recognises(&self, source: IpAddr, input: Option<&str>) -> bool {
        match self {
            Self::Source(networks) => networks.iter().any(|net| net.contains(&source)),
            Self::Bridge(name) => input == Some(name),
            Self::Prefix(prefix) => input.is_some_and(|input| input.starts_with(&**prefix)),
        }
    }
}

/// Names the health check of a Service in one family.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HealthCheckName {
    /// The Service.
    pub service: ServiceKey,
    /// Whose endpoints count, and on whose addresses the check answers.
    pub family: IpFamily,
}

/// What a load balancer is told that asks whether this node has endpoints (kube-proxy 1.36
/// `pkg/proxy/healthcheck/service_health.go`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthCheck {
    /// `spec.healthCheckNodePort`.
    pub port: u16,
    /// Distinct addresses of local ready endpoints. Terminating ones do not count, so that a node drains while it still serves.
    pub local_endpoints: u32,
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
    /// How pods are told from others.
    pub pod_traffic: PodTraffic,
    /// Where ClusterIPs are allocated from, sorted (kind ServiceCIDR): a new connection to an address in here that is nobody's
    /// ClusterIP is dropped.
    pub service_cidrs: Vec<IpNet>,
    /// Whether 127.0.0.0/8 answers NodePorts, for the node's own sockets.
    pub loopback_node_ports_v4: bool,
    /// Whether ::1 answers NodePorts, for the node's own sockets.
    pub loopback_node_ports_v6: bool,
    /// Interfaces of this network namespace, by index: where packet programs may hang.
    pub interfaces: BTreeMap<u32, Arc<str>>,
    /// Those of them that are ports, with the index of the bridge (or bond) that they are ports of.
    pub ports: BTreeMap<u32, u32>,
    /// Those of them whose other end is in another network namespace, with the number that this one has for it.
    pub namespaces: BTreeMap<u32, u32>,
    /// Those of them that VLAN devices lie on.
    pub vlan_parents: BTreeSet<u32>,
    /// Those of them that lead to other machines: the interface of the node's own address, and those of default routes.
    pub uplinks: BTreeSet<u32>,
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
    /// Every ClusterIP in use, and how many ServicePorts of [`Self::services`] have it: a port of it that none of them serves
    /// is refused.
    pub cluster_ips: BTreeMap<IpAddr, u32>,
    /// What load balancers are told, for Services of type LoadBalancer with externalTrafficPolicy Local.
    pub health_checks: BTreeMap<HealthCheckName, HealthCheck>,
}

/// What changed from one snapshot to the next.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServiceDelta {
    /// Whether [`ServiceSnapshot::node`] differs.
    pub node_changed: bool,
    /// ServicePorts that are new, different or gone, sorted; look each up in the new snapshot.
    pub changed: Vec<ServicePortName>,
    /// ClusterIPs that came or went, sorted; [`ServiceSnapshot::cluster_ips`] says which.
    pub cluster_ips: Vec<IpAddr>,
    /// Whether [`ServiceSnapshot::health_checks`] differs.
    pub health_checks_changed: bool,
}
