//! From the model's types to the values of the maps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use proxy_common::{
    Address, Backend, Be16, Cidr, Frontend, FrontendKey, INTERFACE_NAMESPACE_SHIFT, INTERFACE_POD, INTERFACE_TUNNELS,
    NODE_CLUSTER_IPS_ANYWHERE, NODE_DIRECT_TABLES, NODE_HAS_CLUSTER_IPS, NODE_LOOPBACK_NODE_PORTS,
    NODE_PODS_BY_INTERFACE, NODE_TUNNELS_ARE_GUE, NodeSettings, POD_CIDRS_MAX, RuleBits, SERVICE_CIDRS_MAX,
    SOURCE_RANGE_ID_BITS, SourceRange, V4, V6,
};

use crate::model::{Action, EndpointSet, FrontendAddress, NodeConfig, OriginRules, PodTraffic, Protocol, Rule};
use crate::node::KUBE_PROXY_IPVS;

/// Lowest source port of masqueraded flows. Together with the maximum it keeps clear of the NodePorts (30000-32767 by
/// default) and of the ports that the kernel gives to the node's own sockets (32768-60999), whose answers must not be
/// mistaken for ours.
pub(super) const SOURCE_PORT_MIN: u16 = 1024;
/// Highest source port of masqueraded flows.
pub(super) const SOURCE_PORT_MAX: u16 = 29999;

/// What the generic code needs of an address beside the kernel's view of it.
pub trait UserAddress: Address + aya::Pod + std::hash::Hash + Ord + std::fmt::Debug {
    /// How the names of the family's maps end.
    const SUFFIX: &'static str;
    /// The address if it is of this family.
    fn from_ip(ip: IpAddr) -> Option<Self>;
    /// The address as the standard library has it.
    fn to_ip(self) -> IpAddr;
    /// The node's masquerade address of this family.
    fn masquerade(node: &NodeConfig) -> Option<Self>;
    /// Whether the family's loopback addresses answer NodePorts.
    fn loopback_node_ports(node: &NodeConfig) -> bool;
    /// The words of a backend in memory, and the index of the one that holds its state.
    fn backend_words(backend: &Backend<Self>) -> (Vec<u32>, usize);
    /// The inverse of [`Self::backend_words`].
    fn backend_from_words(words: &[u32]) -> Option<Backend<Self>>;
}

impl UserAddress for V4 {
    const SUFFIX: &'static str = "V4";

    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(ip) => Some(Self::from_octets(ip.octets())),
            IpAddr::V6(_) => None,
        }
    }

    fn to_ip(self) -> IpAddr {
        IpAddr::from(self.octets())
    }

    fn masquerade(node: &NodeConfig) -> Option<Self> {
        node.masquerade_v4.map(|ip| Self::from_octets(ip.octets()))
    }

    fn loopback_node_ports(node: &NodeConfig) -> bool {
        node.loopback_node_ports_v4
    }

    fn backend_words(backend: &Backend<Self>) -> (Vec<u32>, usize) {
        (vec![backend.address.0, state_word(backend), backend.service_id, backend.generation], 1)
    }

    fn backend_from_words(words: &[u32]) -> Option<Backend<Self>> {
        let &[address, state, service_id, generation] = words else { return None };
        Some(backend(Self(address), state, service_id, generation))
    }
}

impl UserAddress for V6 {
    const SUFFIX: &'static str = "V6";

    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(_) => None,
            IpAddr::V6(ip) => Some(Self::from_octets(ip.octets())),
        }
    }

    fn to_ip(self) -> IpAddr {
        IpAddr::from(self.octets())
    }

    fn masquerade(node: &NodeConfig) -> Option<Self> {
        node.masquerade_v6.map(|ip| Self::from_octets(ip.octets()))
    }

    fn loopback_node_ports(node: &NodeConfig) -> bool {
        node.loopback_node_ports_v6
    }

    fn backend_words(backend: &Backend<Self>) -> (Vec<u32>, usize) {
        let [a, b, c, d] = backend.address.0;
        (vec![a, b, c, d, state_word(backend), backend.service_id, backend.generation], 4)
    }

    fn backend_from_words(words: &[u32]) -> Option<Backend<Self>> {
        let &[a, b, c, d, state, service_id, generation] = words else { return None };
        Some(backend(Self([a, b, c, d]), state, service_id, generation))
    }
}

/// Port, state and locality as the word that they are in memory.
fn state_word<A>(backend: &Backend<A>) -> u32 {
    let port = backend.port.0.to_ne_bytes();
    u32::from_ne_bytes([port[0], port[1], backend.state, backend.local])
}

fn backend<A>(address: A, state: u32, service_id: u32, generation: u32) -> Backend<A> {
    let [port_low, port_high, state, local] = state.to_ne_bytes();
    Backend { address, port: Be16(u16::from_ne_bytes([port_low, port_high])), state, local, service_id, generation }
}

/// Key of a frontend; `None` when the address is of the other family.
pub(super) fn frontend_key<A: UserAddress>(
    address: FrontendAddress,
    port: u16,
    protocol: Protocol,
) -> Option<FrontendKey<A>> {
    let address = match address {
        FrontendAddress::Ip(ip) => A::from_ip(ip)?,
        FrontendAddress::NodePort => A::default(),
    };
    Some(FrontendKey { address, port: Be16::from_host(port), protocol: protocol as u8, padding: 0 })
}

/// Rules of the three origins as the kernel has them; with `direct_return` those from outside get their answers straight where they would be
/// masqueraded.
pub(super) fn rules(rules: &OriginRules, direct_return: bool) -> u32 {
    let external = match direct_return && rules.external.masquerade {
        true => rule(&rules.external).with_direct_return(),
        false => rule(&rules.external),
    };
    Frontend::pack_rules([rule(&rules.pod), rule(&rules.node), external])
}

fn rule(rule: &Rule) -> RuleBits {
    let (action, local) = match rule.action {
        Action::Forward(EndpointSet::Cluster) => (RuleBits::FORWARD, false),
        Action::Forward(EndpointSet::Local) => (RuleBits::FORWARD, true),
        Action::Reject => (RuleBits::REJECT, false),
        Action::Drop => (RuleBits::DROP, false),
    };
    RuleBits::new(action, local, rule.masquerade)
}

/// What the node's facts are made of beside its configuration.
#[derive(Debug, Clone, Copy)]
pub(super) struct Circumstances {
    /// Lowest and highest NodePort that is programmed.
    pub(super) node_ports: (u16, u16),
    /// Cookie of the node's network namespace.
    pub(super) netns_cookie: u64,
    /// Whether a ClusterIP of the family lies outside of the service networks.
    pub(super) cluster_ips_anywhere: bool,
    /// Whether a ServicePort with direct server return has a Maglev table.
    pub(super) direct_tables: bool,
    /// Whether tunnels to other nodes are GUE.
    pub(super) tunnels_are_gue: bool,
    /// As in [`NodeSettings`].
    pub(super) flood_limit: u32,
}

/// The node's facts for one family. Pod networks beyond [`POD_CIDRS_MAX`] were refused with the configuration; of service
/// networks, joined where they adjoin, the first [`SERVICE_CIDRS_MAX`] are kept.
pub(super) fn node_settings<A: UserAddress>(node: &NodeConfig, circumstances: Circumstances) -> NodeSettings<A> {
    let (pod_cidr_count, pod_cidrs) = cidrs::<A, POD_CIDRS_MAX>(node.pod_traffic.networks());
    let (service_cidr_count, service_cidrs) = cidrs::<A, SERVICE_CIDRS_MAX>(&IpNet::aggregate(&node.service_cidrs));
    let by_interface = !matches!(node.pod_traffic, PodTraffic::Source(_));
    let flag = |set, bit| if set { bit } else { 0 };
    let cookie = circumstances.netns_cookie;
    NodeSettings {
        masquerade: A::masquerade(node).unwrap_or_default(),
        source_port_min: SOURCE_PORT_MIN,
        source_port_max: SOURCE_PORT_MAX,
        node_port_min: circumstances.node_ports.0,
        node_port_max: circumstances.node_ports.1,
        flags: flag(by_interface, NODE_PODS_BY_INTERFACE)
            | flag(A::loopback_node_ports(node), NODE_LOOPBACK_NODE_PORTS)
            | flag(circumstances.cluster_ips_anywhere, NODE_CLUSTER_IPS_ANYWHERE)
            | flag(circumstances.direct_tables, NODE_DIRECT_TABLES)
            | flag(circumstances.tunnels_are_gue, NODE_TUNNELS_ARE_GUE)
            | flag(node.interfaces.values().any(|name| **name == *KUBE_PROXY_IPVS), NODE_HAS_CLUSTER_IPS),
        flood_limit: circumstances.flood_limit,
        netns_cookie: [cookie as u32, (cookie >> 32) as u32],
        pod_cidr_count,
        pod_cidrs,
        service_cidr_count,
        service_cidrs,
    }
}

/// The networks of the family, as many as there is room for.
fn cidrs<A: UserAddress, const MAX: usize>(networks: &[IpNet]) -> (u32, [Cidr<A>; MAX]) {
    let mut cidrs = [Cidr::default(); MAX];
    let mut count = 0;
    for (slot, network) in cidrs.iter_mut().zip(networks.iter().filter_map(cidr)) {
        *slot = network;
        count += 1;
    }
    (count, cidrs)
}

/// What the packets of interfaces are, as `INTERFACE_*` bits, and where they come from: `tunnels` are those at which other nodes' tunnels end.
pub(super) fn interface_kinds(node: &NodeConfig, tunnels: impl Fn(u32, &str) -> bool) -> BTreeMap<u32, u32> {
    let pods = pod_interfaces(node);
    let kinds = node.interfaces.iter().map(|(index, name)| {
        let pod = if pods.contains(index) { INTERFACE_POD } else { 0 };
        // A pod's packets are never another node's.
        let tunnel = if pod == 0 && tunnels(*index, name) { INTERFACE_TUNNELS } else { 0 };
        (*index, pod | tunnel | namespace(node, *index))
    });
    kinds.filter(|(_, kinds)| *kinds != 0).collect()
}

/// The part of the value that names the namespace at the other end; the kernel gives numbers from 0 on, to each pod the next one that is free.
fn namespace(node: &NodeConfig, index: u32) -> u32 {
    let number = node.namespaces.get(&index).and_then(|number| number.checked_add(1));
    number
        .filter(|number| *number <= u32::MAX >> INTERFACE_NAMESPACE_SHIFT)
        .map_or(0, |number| number << INTERFACE_NAMESPACE_SHIFT)
}

/// Interfaces that pods' packets come in through, where pods are told so. A packet that comes in through a port of the bridge
/// is seen there first.
fn pod_interfaces(node: &NodeConfig) -> BTreeSet<u32> {
    let is_pods = |index: &u32, name: &str| match &node.pod_traffic {
        PodTraffic::Source(_) => false,
        PodTraffic::Prefix(prefix) => name.starts_with(&**prefix),
        PodTraffic::Bridge(bridge) => {
            let controller = node.ports.get(index).and_then(|controller| node.interfaces.get(controller));
            name == &**bridge || controller == Some(bridge)
        }
    };
    node.interfaces.iter().filter(|(index, name)| is_pods(index, name)).map(|(index, _)| *index).collect()
}

/// Prefix length and key of a client network of a ServicePort; `None` when it is of the other family.
pub(super) fn source_range<A: UserAddress>(service_id: u32, network: &IpNet) -> Option<(u32, SourceRange<A>)> {
    let client = A::from_ip(network.network())?;
    Some((SOURCE_RANGE_ID_BITS + u32::from(network.prefix_len()), SourceRange { service_id, client }))
}

fn cidr<A: UserAddress>(network: &IpNet) -> Option<Cidr<A>> {
    Some(Cidr { network: A::from_ip(network.network())?, mask: A::from_ip(network.netmask())? })
}

/// `settings`, but what nobody serves is refused where `known` has it so.
pub(super) fn with_service_networks_of<A: UserAddress>(
    settings: NodeSettings<A>,
    known: &NodeSettings<A>,
) -> NodeSettings<A> {
    let flags = settings.flags & !NODE_CLUSTER_IPS_ANYWHERE | known.flags & NODE_CLUSTER_IPS_ANYWHERE;
    let (service_cidr_count, service_cidrs) = (known.service_cidr_count, known.service_cidrs);
    NodeSettings { flags, service_cidr_count, service_cidrs, ..settings }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PodTraffic;
    use proxy_common::pod::Pod;

    #[test]
    fn backend_words_are_the_bytes_of_the_value() {
        let v4 = Backend {
            address: V4::from_octets([10, 0, 0, 1]),
            port: Be16::from_host(80),
            state: 1,
            local: 1,
            service_id: 7,
            generation: 9,
        };
        let (words, _) = V4::backend_words(&v4);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(bytes, v4.as_bytes());
        assert_eq!(V4::backend_from_words(&words), Some(v4));
        let v6 = Backend {
            address: V6::from_octets([0xfd; 16]),
            port: v4.port,
            state: 1,
            local: 1,
            service_id: 7,
            generation: 9,
        };
        let (words, _) = V6::backend_words(&v6);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(bytes, v6.as_bytes());
        assert_eq!(V6::backend_from_words(&words), Some(v6));
    }

    const NOWHERE: Circumstances = Circumstances {
        node_ports: (30000, 30001),
        netns_cookie: 0x2_0000_0001,
        cluster_ips_anywhere: false,
        direct_tables: false,
        tunnels_are_gue: false,
        flood_limit: 5,
    };

    #[test]
    fn only_what_would_be_masqueraded_from_outside_is_answered_straight() {
        let masqueraded = Rule { action: Action::Forward(EndpointSet::Cluster), masquerade: true };
        let kept = Rule { masquerade: false, ..masqueraded };
        let bits =
            |rules, direct| super::rules(&rules, direct).to_ne_bytes().map(|byte| RuleBits(byte).direct_return());
        let all = OriginRules { pod: masqueraded, node: masqueraded, external: masqueraded };
        assert_eq!(bits(all, true), [false, false, true, false]);
        assert_eq!(bits(all, false), [false; 4]);
        assert_eq!(bits(OriginRules { external: kept, ..all }, true), [false; 4]);
    }

    #[test]
    fn settings_hold_only_the_family_s_facts() {
        let nets = |list: &[&str]| -> Vec<IpNet> { list.iter().map(|net| net.parse().unwrap()).collect() };
        let node = NodeConfig {
            pod_traffic: PodTraffic::Source(nets(&["10.244.0.0/16", "fd00::/64"])),
            service_cidrs: nets(&["10.96.0.0/17", "10.96.128.0/17", "172.30.0.0/16", "fd00:96::/112"]),
            loopback_node_ports_v4: true,
            masquerade_v4: Some([192, 168, 0, 2].into()),
            ..NodeConfig::default()
        };
        let settings = node_settings::<V4>(&node, NOWHERE);
        assert_eq!(settings.pod_cidr_count, 1);
        assert_eq!(settings.pod_cidrs[0].mask, V4::from_octets([255, 255, 0, 0]));
        assert_eq!(settings.masquerade.to_ip(), IpAddr::from([192, 168, 0, 2]));
        assert_eq!((settings.flags, settings.netns_cookie), (NODE_LOOPBACK_NODE_PORTS, [1, 2]));
        assert_eq!(settings.service_cidr_count, 2, "two halves are one network");
        assert_eq!(settings.service_cidrs[0].mask, V4::from_octets([255, 255, 0, 0]));
        let anywhere = Circumstances { cluster_ips_anywhere: true, ..NOWHERE };
        let settings = node_settings::<V6>(&node, anywhere);
        assert_eq!(settings.masquerade, V6::default());
        assert_eq!((settings.flags, settings.service_cidr_count), (NODE_CLUSTER_IPS_ANYWHERE, 1));
        let direct = Circumstances { direct_tables: true, tunnels_are_gue: true, ..NOWHERE };
        let settings = node_settings::<V6>(&node, direct);
        assert_eq!((settings.flags, settings.flood_limit), (NODE_DIRECT_TABLES | NODE_TUNNELS_ARE_GUE, 5));
    }

    #[test]
    fn pods_interfaces_are_the_bridge_and_its_ports_or_those_of_the_prefix() {
        let interfaces: [(u32, &str); 5] = [(1, "lo"), (2, "eth0"), (3, "cni0"), (4, "veth1"), (5, "veth2")];
        let check = |pod_traffic, expect: &[u32]| {
            let node = NodeConfig {
                pod_traffic,
                interfaces: interfaces.map(|(index, name)| (index, name.into())).into(),
                ports: [(4, 3), (5, 2)].into(),
                ..NodeConfig::default()
            };
            assert_eq!(pod_interfaces(&node), expect.iter().copied().collect());
            let kinds = interface_kinds(&node, |index, _| index == 4);
            assert_eq!(kinds.get(&4), Some(if expect.contains(&4) { &INTERFACE_POD } else { &INTERFACE_TUNNELS }));
            assert_eq!(kinds.get(&2), None);
        };
        check(PodTraffic::Bridge("cni0".into()), &[3, 4]);
        check(PodTraffic::Bridge("cni1".into()), &[]);
        check(PodTraffic::Prefix("veth".into()), &[4, 5]);
        check(PodTraffic::Source(vec![]), &[]);
        let namespaces = [(4, 0), (5, 6), (6, u32::MAX)].into();
        let interfaces = [4, 5, 6].map(|index| (index, "veth".into())).into();
        let node = NodeConfig { namespaces, interfaces, ..NodeConfig::default() };
        assert_eq!(interface_kinds(&node, |_, _| false), [(4, 1 << 8), (5, 7 << 8)].into());
        let node = NodeConfig { pod_traffic: PodTraffic::Prefix("veth".into()), ..NodeConfig::default() };
        assert_eq!(node_settings::<V4>(&node, NOWHERE).flags, NODE_PODS_BY_INTERFACE);
    }
}
