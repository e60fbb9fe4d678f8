//! The nf_tables side as it always is: tables, sets and maps, hooks. What depends on a Service is elements only.

use node_sys::nftables::{ChainHook, ChainKind, Data, Field, Hook, Set, SetFlags};

use crate::dataplane::elements::{Fields, NUMBER};
use crate::model::IpFamily;

/// Our table in each family.
pub(super) const TABLE: &str = "trama-ipvs";
/// What marks a table as made by this layout: one of another layout is made anew.
pub(super) const MARKER: &[u8] = b"trama-ipvs/3";
/// Clients that stick to an endpoint, in each family. When all places are taken, further clients go to any endpoint each time.
const AFFINITY_MAX: u32 = 65_536;

/// Whose packets a map is about, as [`OriginRules`](crate::model::OriginRules) distinguishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Origin {
    Pod,
    Node,
    External,
}

impl Origin {
    pub(super) const ALL: [Self; 3] = [Self::Pod, Self::Node, Self::External];

    /// The chain that looks up for this origin.
    pub(super) fn chain(self) -> &'static str {
        match self {
            Self::Pod => "from-pod",
            Self::Node => "from-node",
            Self::External => "from-external",
        }
    }
}

/// The sets and maps, a constant number whatever the number of Services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum SetName {
    /// address . protocol . port -> mark.
    Frontends(Origin),
    /// protocol . port -> mark, at every address of [`SetName::NodePortAddresses`].
    NodePorts(Origin),
    /// address . protocol . port of load-balancer IPs that not everybody may use.
    Restricted,
    /// address . protocol . port . range of clients that may use it.
    SourceRanges,
    /// The node's own addresses.
    NodeAddresses,
    /// Addresses that answer NodePorts.
    NodePortAddresses,
    /// All ClusterIPs.
    ClusterIps,
    /// address . the same address, of every local endpoint.
    Hairpin,
    /// client . mark of a ServicePort's list -> mark of an endpoint; added by the packet path.
    Affinity,
    /// mark of a list with affinity -> the chain that remembers its clients.
    Sticky,
    /// mark of a list . endpoint -> mark of the endpoint.
    Targets,
    /// Marks of endpoints that may be used.
    Usable,
}

impl SetName {
    /// All of them.
    pub(super) const ALL: [Self; 16] = [
        Self::Frontends(Origin::Pod),
        Self::Frontends(Origin::Node),
        Self::Frontends(Origin::External),
        Self::NodePorts(Origin::Pod),
        Self::NodePorts(Origin::Node),
        Self::NodePorts(Origin::External),
        Self::Restricted,
        Self::SourceRanges,
        Self::NodeAddresses,
        Self::NodePortAddresses,
        Self::ClusterIps,
        Self::Hairpin,
        Self::Affinity,
        Self::Sticky,
        Self::Targets,
        Self::Usable,
    ];

    /// Its name in the kernel.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Frontends(Origin::Pod) => "frontends-pod",
            Self::Frontends(Origin::Node) => "frontends-node",
            Self::Frontends(Origin::External) => "frontends-external",
            Self::NodePorts(Origin::Pod) => "node-ports-pod",
            Self::NodePorts(Origin::Node) => "node-ports-node",
            Self::NodePorts(Origin::External) => "node-ports-external",
            Self::Restricted => "restricted",
            Self::SourceRanges => "source-ranges",
            Self::NodeAddresses => "node-addresses",
            Self::NodePortAddresses => "node-port-addresses",
            Self::ClusterIps => "cluster-ips",
            Self::Hairpin => "hairpin",
            Self::Affinity => "affinity",
            Self::Sticky => "sticky",
            Self::Targets => "targets",
            Self::Usable => "usable",
        }
    }

    /// Its shape in a table of `family`.
    pub(super) fn definition(self, family: IpFamily) -> Set {
        let fields = Fields::of(family);
        let plain = SetFlags::default();
        let (key, data, flags): (&'static [Field], _, _) = match self {
            Self::Frontends(_) => (fields.frontend, Data::Value(&NUMBER), plain),
            Self::NodePorts(_) => (&NODE_PORT, Data::Value(&NUMBER), plain),
            Self::Restricted => (fields.frontend, Data::None, plain),
            Self::SourceRanges => (fields.client_of_frontend, Data::None, SetFlags::INTERVAL),
            Self::NodeAddresses | Self::NodePortAddresses | Self::ClusterIps => (fields.address, Data::None, plain),
            Self::Hairpin => (fields.pair, Data::None, plain),
            Self::Affinity => (fields.client, Data::Value(&NUMBER), SetFlags::TIMEOUT.and(SetFlags::DYNAMIC)),
            Self::Sticky => (&NUMBER, Data::Verdict, plain),
            Self::Targets => (fields.service_endpoint, Data::Value(&NUMBER), plain),
            Self::Usable => (&NUMBER, Data::None, plain),
        };
        let size = (self == Self::Affinity).then_some(AFFINITY_MAX);
        Set { name: self.name().into(), key, data, flags, size }
    }
}

const NODE_PORT: [Field; 2] = [Field::Protocol, Field::Port];

/// Chains that are jumped to, in the order in which they can be made: a rule leads only to chains that are there.
pub(super) const REGULAR_CHAINS: [&str; 7] =
    ["decide", "unserved", "origin", "learn", "from-pod", "from-node", "from-external"];

/// The chains that hang in hooks. Marks are given after conntrack (-200) and before IPVS takes what this machine sends (-98);
/// IPVS takes what arrives at 99 of input, and what it leaves is looked at behind that. Learning sees the client's own address:
/// it is before source NAT (100). Before anybody's destination NAT (-100) it is settled that a connection of ours has none: while
/// proxies are exchanged another one's rules stand beside, and would send it elsewhere.
///
/// Output looks up the route again, so that a marked packet is one to this machine also when the node makes it: IPVS leaves
/// the route as it is for an endpoint on this machine.
pub(super) const BASE_CHAINS: [(&str, ChainHook); 7] = [
    ("prerouting", hook(ChainKind::Filter, Hook::Prerouting, -150)),
    ("output", hook(ChainKind::Route, Hook::Output, -150)),
    ("nat-prerouting", hook(ChainKind::Nat, Hook::Prerouting, -101)),
    ("nat-output", hook(ChainKind::Nat, Hook::Output, -101)),
    ("input", hook(ChainKind::Filter, Hook::Input, 110)),
    ("postrouting", hook(ChainKind::Filter, Hook::Postrouting, 90)),
    ("nat-postrouting", hook(ChainKind::Nat, Hook::Postrouting, 100)),
];

const fn hook(kind: ChainKind, hook: Hook, priority: i32) -> ChainHook {
    ChainHook { kind, hook, priority }
}

/// The chain that remembers clients for so many seconds.
pub(super) fn sticky_chain(seconds: u32) -> String {
    format!("sticky-{seconds}")
}
