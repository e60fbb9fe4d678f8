//! From the model's types to the values of the maps.

use std::net::IpAddr;

use ipnet::IpNet;
use proxy_common::{
    Address, Backend, Be16, Cidr, Frontend, FrontendKey, NodeSettings, POD_CIDRS_MAX, RuleBits, V4, V6,
};

use crate::model::{Action, EndpointSet, FrontendAddress, NodeConfig, OriginRules, Protocol, Rule};

/// Lowest source port of masqueraded flows. Together with the maximum it keeps clear of the NodePorts (30000-32767 by
/// default) and of the ports that the kernel gives to the node's own sockets (32768-60999), whose answers must not be
/// mistaken for ours.
pub(super) const SOURCE_PORT_MIN: u16 = 1024;
/// Highest source port of masqueraded flows.
pub(super) const SOURCE_PORT_MAX: u16 = 29999;

/// What the generic code needs of an address beside the kernel's view of it.
pub(super) trait UserAddress: Address + aya::Pod + std::hash::Hash + Ord + std::fmt::Debug {
    /// The address if it is of this family.
    fn from_ip(ip: IpAddr) -> Option<Self>;
    /// The address as the standard library has it.
    fn to_ip(self) -> IpAddr;
    /// The node's masquerade address of this family.
    fn masquerade(node: &NodeConfig) -> Option<Self>;
    /// The words of a backend in memory, and the index of the one that holds its state.
    fn backend_words(backend: &Backend<Self>) -> (Vec<u32>, usize);
    /// The inverse of [`Self::backend_words`].
    fn backend_from_words(words: &[u32]) -> Option<Backend<Self>>;
}

impl UserAddress for V4 {
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

    fn backend_words(backend: &Backend<Self>) -> (Vec<u32>, usize) {
        (vec![backend.address.0, state_word(backend), backend.service_id, backend.generation], 1)
    }

    fn backend_from_words(words: &[u32]) -> Option<Backend<Self>> {
        let &[address, state, service_id, generation] = words else { return None };
        Some(backend(Self(address), state, service_id, generation))
    }
}

impl UserAddress for V6 {
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

    fn backend_words(backend: &Backend<Self>) -> (Vec<u32>, usize) {
        let [a, b, c, d] = backend.address.0;
        (vec![a, b, c, d, state_word(backend), backend.service_id, backend.generation], 4)
    }

    fn backend_from_words(words: &[u32]) -> Option<Backend<Self>> {
        let &[a, b, c, d, state, service_id, generation] = words else { return None };
        Some(backend(Self([a, b, c, d]), state, service_id, generation))
    }
}

/// Port, state and padding as the word that they are in memory.
fn state_word<A>(backend: &Backend<A>) -> u32 {
    let port = backend.port.0.to_ne_bytes();
    u32::from_ne_bytes([port[0], port[1], backend.state, backend.padding])
}

fn backend<A>(address: A, state: u32, service_id: u32, generation: u32) -> Backend<A> {
    let [port_low, port_high, state, padding] = state.to_ne_bytes();
    Backend { address, port: Be16(u16::from_ne_bytes([port_low, port_high])), state, padding, service_id, generation }
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

/// Rules of the three origins as the kernel has them.
pub(super) fn rules(rules: &OriginRules) -> u32 {
    Frontend::pack_rules([rule(&rules.pod), rule(&rules.node), rule(&rules.external)])
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

/// The node's facts for one family. Networks beyond [`POD_CIDRS_MAX`] were refused with the configuration.
pub(super) fn node_settings<A: UserAddress>(node: &NodeConfig, node_ports: (u16, u16)) -> NodeSettings<A> {
    let networks: Vec<Cidr<A>> = node.pod_traffic.networks().iter().filter_map(cidr).take(POD_CIDRS_MAX).collect();
    let mut pod_cidrs = [Cidr::default(); POD_CIDRS_MAX];
    for (slot, network) in pod_cidrs.iter_mut().zip(&networks) {
        *slot = *network;
    }
    NodeSettings {
        masquerade: A::masquerade(node).unwrap_or_default(),
        source_port_min: SOURCE_PORT_MIN,
        source_port_max: SOURCE_PORT_MAX,
        node_port_min: node_ports.0,
        node_port_max: node_ports.1,
        pod_cidr_count: u32::try_from(networks.len()).unwrap_or(0),
        pod_cidrs,
    }
}

fn cidr<A: UserAddress>(network: &IpNet) -> Option<Cidr<A>> {
    Some(Cidr { network: A::from_ip(network.network())?, mask: A::from_ip(network.netmask())? })
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
            padding: 0,
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
            padding: 0,
            service_id: 7,
            generation: 9,
        };
        let (words, _) = V6::backend_words(&v6);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(bytes, v6.as_bytes());
        assert_eq!(V6::backend_from_words(&words), Some(v6));
    }

    #[test]
    fn settings_hold_only_the_family_s_networks() {
        let node = NodeConfig {
            pod_traffic: PodTraffic::Source(vec!["10.244.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()]),
            masquerade_v4: Some([192, 168, 0, 2].into()),
            ..NodeConfig::default()
        };
        let settings = node_settings::<V4>(&node, (30000, 30001));
        assert_eq!(settings.pod_cidr_count, 1);
        assert_eq!(settings.pod_cidrs[0].mask, V4::from_octets([255, 255, 0, 0]));
        assert_eq!(settings.masquerade.to_ip(), IpAddr::from([192, 168, 0, 2]));
        assert_eq!(node_settings::<V6>(&node, (1, 0)).masquerade, V6::default());
    }
}
