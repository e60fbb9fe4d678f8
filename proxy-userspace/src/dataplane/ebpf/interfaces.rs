//! What of the node's interfaces and addresses the programs are told, and which interfaces carry them.

use std::collections::BTreeMap;

use proxy_common::{NODE_ADDRESS_LOCAL, NODE_ADDRESS_NODE_PORT, NodeAddress};

use super::EbpfConfig;
use super::attach::LOOPBACK;
use super::encode::{UserAddress, interface_kinds};
use crate::model::NodeConfig;

/// What the packets of the node's interfaces are; other nodes' tunnels end at the node's uplinks where nothing else is configured.
pub(super) fn kinds_of_interfaces(config: &EbpfConfig, node: &NodeConfig) -> BTreeMap<u32, u32> {
    let named = &config.tunnel_interfaces;
    interface_kinds(node, |index, name| match named.is_empty() {
        true => node.uplinks.contains(&index),
        false => is_named(named, name),
    })
}

/// The node's addresses of one family, and what each is.
pub(super) fn addresses<A: UserAddress>(node: &NodeConfig) -> Vec<(A, NodeAddress)> {
    let all = node.node_addresses.union(&node.node_port_addresses);
    all.filter_map(|ip| {
        let local = if node.node_addresses.contains(ip) { NODE_ADDRESS_LOCAL } else { 0 };
        let node_port = if node.node_port_addresses.contains(ip) { NODE_ADDRESS_NODE_PORT } else { 0 };
        Some((A::from_ip(*ip)?, NodeAddress { flags: local | node_port }))
    })
    .collect()
}

/// Whether an interface is one of the configured ones. `lo` always is: what is for the node itself goes over it.
pub(super) fn carries_programs(patterns: &[String], interface: &str) -> bool {
    interface == LOOPBACK || patterns.is_empty() || is_named(patterns, interface)
}

/// Whether one of the patterns is the interface's name, or a prefix of it with `*` behind.
pub(super) fn is_named(patterns: &[String], interface: &str) -> bool {
    patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(prefix) => interface.starts_with(prefix),
        None => interface == pattern,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_match_by_name_and_prefix() {
        let patterns = ["eth0".to_owned(), "veth*".to_owned()];
        assert!(carries_programs(&patterns, "eth0"));
        assert!(carries_programs(&patterns, "veth12"));
        assert!(!carries_programs(&patterns, "eth01"));
        assert!(carries_programs(&[], "anything"));
        assert!(carries_programs(&patterns, "lo"));
    }
}
