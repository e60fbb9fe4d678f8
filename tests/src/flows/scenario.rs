//! A scenario: a node, the objects that its proxy sees, and what becomes of new connections.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One scenario of a file.
#[derive(Debug, Clone)]
pub(super) struct Scenario {
    /// Its name; unique in a file by convention.
    pub(super) name: String,
    /// The node.
    pub(super) config: Config,
    /// Service objects, as they are served.
    pub(super) services: Vec<Value>,
    /// EndpointSlice objects, as they are served.
    pub(super) endpoint_slices: Vec<Value>,
    /// The connections; never empty.
    pub(super) flows: Vec<Flow>,
}

impl Scenario {
    /// Whether a flow of it is SCTP.
    pub(super) fn has_sctp(&self) -> bool {
        self.flows.iter().any(|flow| flow.protocol == Protocol::Sctp)
    }
}

/// What the node is and how its proxy is configured.
#[derive(Debug, Clone)]
pub(super) struct Config {
    /// Name of the Node.
    pub(super) node_name: String,
    /// All addresses of the node; never empty.
    pub(super) node_ips: Vec<IpAddr>,
    /// The Node's InternalIPs, at most one a family.
    pub(super) primary_node_ips: Vec<IpAddr>,
    /// How pods are told from others.
    pub(super) detect_local: DetectLocal,
    /// The cluster's ServiceCIDRs.
    pub(super) service_cidrs: Vec<IpNet>,
    /// `nodePortAddresses` as it is configured: networks, or `primary`.
    pub(super) node_port_addresses: Vec<String>,
    /// `masqueradeAll`.
    pub(super) masquerade_all: bool,
    /// The Node's label `topology.kubernetes.io/zone`.
    pub(super) zone: Option<String>,
}

/// `detectLocalMode`. Pods' addresses are inside the networks in every mode; only the first two tell the proxy so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum DetectLocal {
    /// `clusterCIDR`; without networks nobody is detected.
    ClusterCidr(Vec<IpNet>),
    /// `spec.podCIDRs` of the Node.
    NodeCidr(Vec<IpNet>),
    /// Pods hang on a bridge.
    Bridge {
        /// Its name.
        interface: String,
        /// Where pods' addresses are from.
        pods: Vec<IpNet>,
    },
    /// The names of pods' interfaces on the node have a common beginning.
    Prefix {
        /// The beginning.
        prefix: String,
        /// Where pods' addresses are from.
        pods: Vec<IpNet>,
    },
}

impl DetectLocal {
    /// Where pods' addresses are from.
    pub(super) fn pods(&self) -> &[IpNet] {
        match self {
            Self::ClusterCidr(pods) | Self::NodeCidr(pods) | Self::Bridge { pods, .. } | Self::Prefix { pods, .. } => {
                pods
            }
        }
    }
}

/// Transport protocol of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// New connections from one client to one address and port.
#[derive(Debug, Clone)]
pub(super) struct Flow {
    /// Its name; not always unique in its scenario.
    pub(super) name: String,
    /// How the client talks.
    pub(super) protocol: Protocol,
    /// The client's address.
    pub(super) source: IpAddr,
    /// Whom it asks.
    pub(super) target: SocketAddr,
    /// Whether all connections of the client go to one of the backends.
    pub(super) sticky: bool,
    /// What becomes of it.
    pub(super) expect: Verdict,
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} {} -> {})", self.name, self.protocol, self.source, self.target)
    }
}

/// What becomes of a new connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It reaches one of the backends, and over many connections every one of them.
    Dnat {
        /// Address and port of each; never empty.
        backends: BTreeSet<SocketAddr>,
        /// Whether the backend sees one of the node's addresses as its source. A backend that is itself the client sees one always.
        masquerade: bool,
    },
    /// Refused.
    Reject,
    /// Nothing comes back.
    Drop,
    /// It arrives where it was sent, from where it was sent.
    Pass,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reject => f.write_str("REJECT"),
            Self::Drop => f.write_str("DROP"),
            Self::Pass => f.write_str("PASS"),
            Self::Dnat { backends, masquerade } => {
                let backends: Vec<String> = backends.iter().map(SocketAddr::to_string).collect();
                let source = if *masquerade { "masqueraded" } else { "source kept" };
                write!(f, "DNAT to {}, {source}", backends.join(" and "))
            }
        }
    }
}
