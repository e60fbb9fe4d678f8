//! The tables as they are: names, sets, hooks. What does not depend on any Service.

use node_sys::nftables::{ChainHook, ChainKind, Data, Field, Hook, Set, SetFlags};

use crate::dataplane::elements::{Fields, NUMBER};
use crate::model::IpFamily;

/// Name of our table in each family.
pub(super) const TABLE: &str = "trama";
/// What marks a table as made by this layout: an affinity map of another one is not carried over.
pub(super) const MARKER: &[u8] = b"trama/1";
/// Clients that are stuck to an endpoint, in each family. When all places are taken, further clients are sent to any endpoint
/// at every connection.
pub(super) const AFFINITY_MAX: u32 = 65_536;

/// The sets and maps, a constant number whatever the number of Services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum SetName {
    /// address . protocol . port -> service id . class for pods . class for the node . class for others. The unspecified
    /// address is the NodePort of every address in [`SetName::NodePortAddresses`].
    Frontends,
    /// class -> verdict. Small: as many elements as there are different combinations of action and number of endpoints.
    Classes,
    /// service id . index -> endpoint. Local lists begin at index 2^31.
    Slots,
    /// client . service id -> service id . endpoint, added by the packet path.
    Affinity,
    /// service id . endpoint of every ServicePort with affinity: the endpoints of its cluster list.
    ClusterEndpoints,
    /// The same for its local list.
    LocalEndpoints,
    /// address . protocol . port -> service id, for load-balancer IPs that not everybody may use.
    Restricted,
    /// service id . range of clients that may use its load-balancer IPs.
    SourceRanges,
    /// All ClusterIPs.
    ClusterIps,
    /// The node's own addresses.
    NodeAddresses,
    /// Addresses that answer NodePorts.
    NodePortAddresses,
    /// address . the same address, of every local endpoint.
    Hairpin,
}

impl SetName {
    /// All of them.
    pub(super) const ALL: [Self; 12] = [
        Self::Frontends,
        Self::Classes,
        Self::Slots,
        Self::Affinity,
        Self::ClusterEndpoints,
        Self::LocalEndpoints,
        Self::Restricted,
        Self::SourceRanges,
        Self::ClusterIps,
        Self::NodeAddresses,
        Self::NodePortAddresses,
        Self::Hairpin,
    ];

    /// Its name in the kernel.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Frontends => "frontends",
            Self::Classes => "classes",
            Self::Slots => "slots",
            Self::Affinity => "affinity",
            Self::ClusterEndpoints => "cluster-endpoints",
            Self::LocalEndpoints => "local-endpoints",
            Self::Restricted => "restricted",
            Self::SourceRanges => "source-ranges",
            Self::ClusterIps => "cluster-ips",
            Self::NodeAddresses => "node-addresses",
            Self::NodePortAddresses => "node-port-addresses",
            Self::Hairpin => "hairpin",
        }
    }

    /// Its shape in a table of `family`.
    pub(super) fn definition(self, family: IpFamily) -> Set {
        let fields = Fields::of(family);
        let (key, data, flags) = match self {
            Self::Frontends => (fields.frontend, Data::Value(&FRONTEND_VALUE), SetFlags::default()),
            Self::Classes => (&NUMBER[..], Data::Verdict, SetFlags::default()),
            Self::Slots => (&SLOT[..], Data::Value(fields.endpoint), SetFlags::default()),
            Self::Affinity => {
                let flags = SetFlags::TIMEOUT.and(SetFlags::DYNAMIC);
                (fields.client, Data::Value(fields.service_endpoint), flags)
            }
            Self::ClusterEndpoints | Self::LocalEndpoints => (fields.service_endpoint, Data::None, SetFlags::default()),
            Self::Restricted => (fields.frontend, Data::Value(&NUMBER), SetFlags::default()),
            Self::SourceRanges => (fields.range, Data::None, SetFlags::INTERVAL),
            Self::ClusterIps | Self::NodeAddresses | Self::NodePortAddresses => {
                (fields.address, Data::None, SetFlags::default())
            }
            Self::Hairpin => (fields.pair, Data::None, SetFlags::default()),
        };
        let size = (self == Self::Affinity).then_some(AFFINITY_MAX);
        Set { name: self.name().into(), key, data, flags, size }
    }
}

const SLOT: [Field; 2] = [Field::Number, Field::Number];
const FRONTEND_VALUE: [Field; 4] = [Field::Number; 4];

/// Names of the chains that are always there.
pub(super) mod chain {
    pub(in super::super) const SOURCE_RANGES: &str = "source-ranges";
    pub(in super::super) const ORIGIN: &str = "origin";
    pub(in super::super) const FROM_POD: &str = "from-pod";
    pub(in super::super) const FROM_NODE: &str = "from-node";
    pub(in super::super) const FROM_EXTERNAL: &str = "from-external";
    pub(in super::super) const UNSERVED: &str = "unserved";
    pub(in super::super) const REJECT: &str = "reject";

    /// In the order in which they can be made: a rule leads only to chains that are there.
    pub(in super::super) const REGULAR: [&str; 7] =
        [SOURCE_RANGES, ORIGIN, FROM_POD, FROM_NODE, FROM_EXTERNAL, UNSERVED, REJECT];
}

/// The chains that hang in hooks: name, hook, and whether they hold one of the rules that [`rules`](super::rules) names.
/// Priorities are kube-proxy's (1.36, `pkg/proxy/nftables/proxier.go`): source ranges before destination NAT, because they are
/// about the load-balancer IP; refusals of what no Service serves after it.
pub(super) const BASE_CHAINS: [(&str, ChainHook); 7] = [
    ("filter-prerouting", filter(Hook::Prerouting, -110)),
    ("filter-output-nat", filter(Hook::Output, -110)),
    ("filter-forward", filter(Hook::Forward, 0)),
    ("filter-output", filter(Hook::Output, 0)),
    ("nat-prerouting", nat(Hook::Prerouting, -100)),
    ("nat-output", nat(Hook::Output, -100)),
    ("nat-postrouting", nat(Hook::Postrouting, 100)),
];

const fn filter(hook: Hook, priority: i32) -> ChainHook {
    ChainHook { kind: ChainKind::Filter, hook, priority }
}

const fn nat(hook: Hook, priority: i32) -> ChainHook {
    ChainHook { kind: ChainKind::Nat, hook, priority }
}
