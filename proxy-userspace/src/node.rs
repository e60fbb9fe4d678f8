//! What this node is: its addresses, its Node object and the configuration together give [`NodeConfig`] and [`NodePolicy`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::model::{Forwarding, IpFamily, NodeConfig, NodePolicy, PodTraffic};

/// At most this many pod CIDRs per family reach the data plane.
pub const POD_CIDRS_MAX: usize = 8;

/// Where kube-proxy's ipvs mode keeps the addresses of Services (pkg/proxy/ipvs/proxier.go, `defaultDummyDevice`).
pub(crate) const KUBE_PROXY_IPVS: &str = "kube-ipvs0";

/// What is used of the Node object.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeFacts {
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// `status.addresses` of type InternalIP, in order.
    pub internal_ips: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// Whether it is being deleted, or the cluster autoscaler is about to.
    pub leaving: bool,
}

/// One address of an interface in this network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct InterfaceAddress {
    /// The address.
    pub address: IpAddr,
    /// Index of the interface.
    pub interface: u32,
    /// Whether its scope is global.
    pub global: bool,
}

/// What the kernel says of this network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostAddresses {
    /// All addresses, in the kernel's order.
    pub addresses: Vec<InterfaceAddress>,
    /// All interfaces: index and name.
    pub interfaces: BTreeMap<u32, Arc<str>>,
    /// Those of them that are ports, with the index of the bridge (or bond) that they are ports of.
    pub ports: BTreeMap<u32, u32>,
    /// Those whose other end is in another network namespace, with the number that this one has for it.
    pub namespaces: BTreeMap<u32, u32>,
    /// Those that VLAN devices lie on.
    pub vlan_parents: BTreeSet<u32>,
    /// Interfaces of the IPv4 default routes.
    pub default_v4: Vec<u32>,
    /// Interfaces of the IPv6 default routes.
    pub default_v6: Vec<u32>,
}

impl HostAddresses {
    /// The node's own addresses: all but those of Services that kube-proxy's ipvs mode gives it, and takes away again.
    fn own(&self) -> impl Iterator<Item = &InterfaceAddress> {
        let is_foreign = |entry: &&InterfaceAddress| {
            self.interfaces.get(&entry.interface).is_some_and(|name| **name == *KUBE_PROXY_IPVS)
        };
        self.addresses.iter().filter(move |entry| !is_foreign(entry))
    }
}

/// Which addresses answer NodePorts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The Node's primary address of each family.
    Primary,
    /// Addresses inside these networks; a family without any network has all its addresses.
    Networks(Vec<IpNet>),
}

impl NodePortAddresses {
    /// Whether every address of the family answers.
    pub fn matches_all(&self, family: IpFamily) -> bool {
        match self {
            Self::Primary => false,
            Self::Networks(networks) => {
                let mut relevant = networks.iter().filter(|net| IpFamily::of(net.addr()) == family).peekable();
                relevant.peek().is_none() || relevant.any(|net| net.prefix_len() == 0)
            }
        }
    }
}

/// How pods are told from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodDetection {
    /// detectLocalMode ClusterCIDR: these networks, possibly none.
    ClusterCidr(Vec<IpNet>),
    /// detectLocalMode NodeCIDR: `spec.podCIDRs` of this Node.
    NodeCidr,
    /// detectLocalMode BridgeInterface: whatever comes in through this bridge.
    BridgeInterface(Arc<str>),
    /// detectLocalMode InterfaceNamePrefix: whatever comes in through an interface whose name begins so.
    InterfaceNamePrefix(Arc<str>),
}

/// The configured part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSettings {
    /// Which addresses answer NodePorts.
    pub node_port_addresses: NodePortAddresses,
    /// How pods are told from others.
    pub pod_detection: PodDetection,
    /// Masquerade all ClusterIP traffic.
    pub masquerade_all: bool,
    /// Whether 127.0.0.0/8 may answer NodePorts.
    pub localhost_node_ports_v4: bool,
    /// Whether ::1 may answer NodePorts.
    pub localhost_node_ports_v6: bool,
    /// The node's primary address, whatever its Node says.
    pub bind_address: Option<IpAddr>,
    /// How clients outside of the cluster reach endpoints on other nodes where the Service does not say.
    pub forwarding: Forwarding,
}

impl NodeSettings {
    /// The same, where `mode` can express it: kube-proxy's iptables mode knows localhost NodePorts for IPv4 alone, nftables and
    /// IPVS know none.
    pub fn for_mode(&self, mode: &str) -> Self {
        let (v4, v6) = match mode {
            "nftables" | "ipvs" => (false, false),
            "iptables" => (true, false),
            _ => (true, true),
        };
        Self {
            localhost_node_ports_v4: self.localhost_node_ports_v4 && v4,
            localhost_node_ports_v6: self.localhost_node_ports_v6 && v6,
            ..self.clone()
        }
    }
}

/// Joins everything that is known of this node; `service_cidrs` is sorted. Unknown parts (a Node object that does not exist
/// yet) leave gaps that later calls fill.
pub fn describe(
    settings: &NodeSettings,
    host: &HostAddresses,
    facts: Option<&NodeFacts>,
    service_cidrs: &[IpNet],
) -> (NodeConfig, NodePolicy) {
    let addresses = host.own().map(|entry| entry.address);
    let node_addresses: BTreeSet<IpAddr> = addresses.filter(is_node_address).collect();
    let primary = |family| primary(host, settings.bind_address, facts, family);
    let (primary_v4, primary_v6) = (primary(IpFamily::V4).and_then(as_v4), primary(IpFamily::V6).and_then(as_v6));
    let pod_traffic = pod_traffic(&settings.pod_detection, facts);
    let policy = NodePolicy {
        zone: facts.and_then(|facts| facts.zone.clone()),
        masquerade_all: settings.masquerade_all,
        detects_pods_v4: pod_traffic.detects(IpFamily::V4),
        detects_pods_v6: pod_traffic.detects(IpFamily::V6),
        primary_v4,
        primary_v6,
        forwarding: settings.forwarding,
    };
    let answers = |address: &IpAddr| answers_node_ports(&settings.node_port_addresses, *address, &policy);
    let uplinks = uplinks(host, [primary_v4.map(IpAddr::V4), primary_v6.map(IpAddr::V6)]);
    let config = NodeConfig {
        node_port_addresses: node_addresses.iter().copied().filter(answers).collect(),
        node_addresses,
        masquerade_v4: primary_v4,
        masquerade_v6: primary_v6,
        pod_traffic,
        service_cidrs: service_cidrs.to_vec(),
        loopback_node_ports_v4: settings.localhost_node_ports_v4 && answers(&IpAddr::V4(Ipv4Addr::LOCALHOST)),
        loopback_node_ports_v6: settings.localhost_node_ports_v6 && answers(&IpAddr::V6(Ipv6Addr::LOCALHOST)),
        interfaces: host.interfaces.clone(),
        ports: host.ports.clone(),
        namespaces: host.namespaces.clone(),
        vlan_parents: host.vlan_parents.clone(),
        uplinks,
    };
    (config, policy)
}

/// Interfaces that lead to other machines: those with one of the node's own addresses, and those of the default routes.
fn uplinks(host: &HostAddresses, primary: [Option<IpAddr>; 2]) -> BTreeSet<u32> {
    let with_primary = host.own().filter(|entry| primary.contains(&Some(entry.address)));
    let defaults = host.default_v4.iter().chain(&host.default_v6).copied();
    with_primary.map(|entry| entry.interface).chain(defaults).collect()
}

/// IPv6 link-local addresses are left out: each pod's interface brings one, and no Service is reached from or through them.
fn is_node_address(address: &IpAddr) -> bool {
    let link_local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    !(address.is_loopback() || link_local)
}

/// The node's own address of a family: the configured bindAddress, else the Node's InternalIP, each where this machine has it,
/// else the first global address of an interface with a default route, else the first global address. An address that the
/// machine does not have can't be a source.
fn primary(
    host: &HostAddresses,
    bind_address: Option<IpAddr>,
    facts: Option<&NodeFacts>,
    family: IpFamily,
) -> Option<IpAddr> {
    let of_family = |address: &IpAddr| IpFamily::of(*address) == family && !address.is_loopback();
    let ours = || host.own().filter(|entry| of_family(&entry.address));
    let internal = bind_address.iter().chain(facts.into_iter().flat_map(|facts| &facts.internal_ips)).copied();
    let mut internal = internal.filter(|address| ours().any(|entry| entry.address == *address));
    let uplinks = match family {
        IpFamily::V4 => &host.default_v4,
        IpFamily::V6 => &host.default_v6,
    };
    let uplink = || ours().find(|entry| entry.global && uplinks.contains(&entry.interface));
    let any = || ours().find(|entry| entry.global);
    internal.next().or_else(|| uplink().or_else(any).map(|entry| entry.address))
}

fn pod_traffic(detection: &PodDetection, facts: Option<&NodeFacts>) -> PodTraffic {
    let networks = match detection {
        PodDetection::ClusterCidr(networks) => networks.as_slice(),
        PodDetection::NodeCidr => facts.map_or(&[][..], |facts| &facts.pod_cidrs),
        PodDetection::BridgeInterface(name) => return PodTraffic::Bridge(Arc::clone(name)),
        PodDetection::InterfaceNamePrefix(prefix) => return PodTraffic::Prefix(Arc::clone(prefix)),
    };
    let of_family =
        |family| networks.iter().copied().filter(move |net| IpFamily::of(net.addr()) == family).take(POD_CIDRS_MAX);
    PodTraffic::Source(of_family(IpFamily::V4).chain(of_family(IpFamily::V6)).collect())
}

fn answers_node_ports(configured: &NodePortAddresses, address: IpAddr, policy: &NodePolicy) -> bool {
    match configured {
        NodePortAddresses::Primary => {
            policy.primary_v4.map(IpAddr::V4) == Some(address) || policy.primary_v6.map(IpAddr::V6) == Some(address)
        }
        NodePortAddresses::Networks(networks) => {
            let family = IpFamily::of(address);
            let mut relevant = networks.iter().filter(|net| IpFamily::of(net.addr()) == family).peekable();
            relevant.peek().is_none() || relevant.any(|net| net.contains(&address))
        }
    }
}

fn as_v4(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(v4) => Some(v4),
        IpAddr::V6(_) => None,
    }
}

fn as_v6(address: IpAddr) -> Option<Ipv6Addr> {
    match address {
        IpAddr::V6(v6) => Some(v6),
        IpAddr::V4(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(addresses: &[(&str, u32, bool)], default_v4: &[u32]) -> HostAddresses {
        let entry = |(address, interface, global): &(&str, u32, bool)| InterfaceAddress {
            address: address.parse().unwrap(),
            interface: *interface,
            global: *global,
        };
        let addresses = addresses.iter().map(entry).collect();
        HostAddresses { addresses, default_v4: default_v4.to_vec(), ..HostAddresses::default() }
    }

    fn settings(node_port_addresses: NodePortAddresses) -> NodeSettings {
        let pod_detection = PodDetection::ClusterCidr(vec!["10.0.0.0/8".parse().unwrap()]);
        NodeSettings {
            node_port_addresses,
            pod_detection,
            masquerade_all: false,
            forwarding: Forwarding::Snat,
            localhost_node_ports_v4: true,
            localhost_node_ports_v6: true,
            bind_address: None,
        }
    }

    fn set(addresses: &[&str]) -> BTreeSet<IpAddr> {
        addresses.iter().map(|a| a.parse().unwrap()).collect()
    }

    const HOST: &[(&str, u32, bool)] = &[
        ("127.0.0.1", 1, false),
        ("::1", 1, false),
        ("172.18.0.9", 7, true),
        ("192.168.0.2", 2, true),
        ("192.168.0.3", 2, true),
        ("fe80::1", 2, false),
        ("2001:db8::2", 2, true),
    ];

    #[test]
    fn the_source_of_masquerade_is_an_address_of_this_machine() {
        let facts = |ips: &[&str]| NodeFacts {
            internal_ips: ips.iter().map(|a| a.parse().unwrap()).collect(),
            ..NodeFacts::default()
        };
        let host = host(HOST, &[2]);
        let settings = settings(NodePortAddresses::Networks(Vec::new()));
        let v4 =
            |facts: Option<&NodeFacts>| describe(&settings, &host, facts, &[]).0.masquerade_v4.unwrap().to_string();
        assert_eq!(v4(None), "192.168.0.2", "first global address of the uplink");
        assert_eq!(v4(Some(&facts(&["203.0.113.9", "192.168.0.3"]))), "192.168.0.3", "the InternalIP that we have");
        assert_eq!(v4(Some(&facts(&["203.0.113.9"]))), "192.168.0.2", "an InternalIP that we don't have");
        assert_eq!(describe(&settings, &host, None, &[]).0.masquerade_v6.unwrap().to_string(), "2001:db8::2");
        let no_route = HostAddresses { default_v4: Vec::new(), ..host.clone() };
        assert_eq!(describe(&settings, &no_route, None, &[]).0.masquerade_v4.unwrap().to_string(), "172.18.0.9");
        assert_eq!(describe(&settings, &HostAddresses::default(), None, &[]).0.masquerade_v4, None);
    }

    #[test]
    fn addresses_of_services_on_kube_proxys_interface_are_not_the_nodes() {
        let mut host = host(&[("10.96.0.1", 4, true), ("192.168.0.2", 2, true)], &[]);
        host.interfaces = [(2, Arc::from("eth0")), (4, Arc::from("kube-ipvs0"))].into();
        let config = describe(&settings(NodePortAddresses::Networks(Vec::new())), &host, None, &[]).0;
        assert_eq!(config.node_addresses, set(&["192.168.0.2"]));
        assert_eq!(config.node_port_addresses, config.node_addresses);
        assert_eq!(config.masquerade_v4.map(IpAddr::V4), "192.168.0.2".parse().ok());
    }

    #[test]
    fn uplinks_are_the_primary_address_s_interface_and_the_default_routes() {
        let host = host(&[("10.0.0.1", 1, true), ("192.168.0.2", 2, true), ("172.17.0.1", 5, true)], &[3]);
        let bound = NodeSettings {
            bind_address: Some("192.168.0.2".parse().unwrap()),
            ..settings(NodePortAddresses::Networks(Vec::new()))
        };
        assert_eq!(describe(&bound, &host, None, &[]).0.uplinks, [2, 3].into());
    }

    #[test]
    fn node_ports_answer_where_configured() {
        let host = host(HOST, &[2]);
        let all = set(&["172.18.0.9", "192.168.0.2", "192.168.0.3", "2001:db8::2"]);
        let check = |configured: NodePortAddresses, expect: BTreeSet<IpAddr>| {
            let config = describe(&settings(configured), &host, None, &[]).0;
            assert_eq!(config.node_port_addresses, expect);
            assert_eq!(config.node_addresses, all, "neither loopback nor link-local");
        };
        let networks = |list: &[&str]| NodePortAddresses::Networks(list.iter().map(|n| n.parse().unwrap()).collect());
        check(networks(&[]), all.clone());
        check(networks(&["192.168.0.2/32"]), set(&["192.168.0.2", "2001:db8::2"]));
        check(networks(&["192.168.0.0/24", "2001:db8::/64"]), set(&["192.168.0.2", "192.168.0.3", "2001:db8::2"]));
        check(NodePortAddresses::Primary, set(&["192.168.0.2", "2001:db8::2"]));
    }

    #[test]
    fn pod_cidrs_come_from_the_configuration_or_the_node() {
        let facts = NodeFacts { pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()], ..NodeFacts::default() };
        let by_node = NodeSettings { pod_detection: PodDetection::NodeCidr, ..settings(NodePortAddresses::Primary) };
        let (config, policy) = describe(&by_node, &HostAddresses::default(), Some(&facts), &[]);
        assert_eq!(config.pod_traffic.networks(), facts.pod_cidrs);
        assert!(policy.detects_pods_v4 && !policy.detects_pods_v6);
        let (config, policy) = describe(&by_node, &HostAddresses::default(), None, &[]);
        assert!(config.pod_traffic.networks().is_empty() && !policy.detects_pods_v4);
        let many = (0..12).map(|i| format!("10.{i}.0.0/16").parse().unwrap()).collect();
        let many = NodeSettings { pod_detection: PodDetection::ClusterCidr(many), ..by_node };
        let (config, _) = describe(&many, &HostAddresses::default(), None, &[]);
        assert_eq!(config.pod_traffic.networks().len(), POD_CIDRS_MAX);
    }

    #[test]
    fn pods_told_by_interface_are_told_in_both_families() {
        let by_bridge = PodDetection::BridgeInterface("cbr0".into());
        let by_bridge = NodeSettings { pod_detection: by_bridge, ..settings(NodePortAddresses::Primary) };
        let (config, policy) = describe(&by_bridge, &HostAddresses::default(), None, &[]);
        assert_eq!(config.pod_traffic, PodTraffic::Bridge("cbr0".into()));
        assert!(policy.detects_pods_v4 && policy.detects_pods_v6);
    }

    #[test]
    fn loopback_answers_node_ports_where_its_network_is_configured() {
        let loopback = |configured: NodePortAddresses| {
            let config = describe(&settings(configured), &host(HOST, &[2]), None, &[]).0;
            (config.loopback_node_ports_v4, config.loopback_node_ports_v6)
        };
        let networks = |list: &[&str]| NodePortAddresses::Networks(list.iter().map(|n| n.parse().unwrap()).collect());
        assert_eq!(loopback(networks(&[])), (true, true));
        assert_eq!(loopback(networks(&["192.168.0.0/16"])), (false, true));
        assert_eq!(loopback(networks(&["127.0.0.0/8", "2001:db8::/64"])), (true, false));
        assert_eq!(loopback(NodePortAddresses::Primary), (false, false));
    }
}
