//! Who answers at a destination: a frontend, or nobody, and what that means.

use super::{Found, Tables};
use crate::{
    Address, Be16, Cidr, FrontendKey, NODE_ADDRESS_LOCAL, NODE_ADDRESS_NODE_PORT, NODE_CLUSTER_IPS_ANYWHERE,
    NODE_HAS_CLUSTER_IPS, NODE_LOOPBACK_NODE_PORTS,
};

/// Finds the frontend of a destination: the exact address first, then the NodePorts of this node's addresses.
///
/// `own_loopback` says that the address is a loopback one of the node itself, where NodePorts may answer too.
#[inline(always)]
pub fn find<T: Tables>(
    tables: &T,
    address: &T::A,
    port: Be16,
    protocol: u8,
    own_loopback: bool,
    found: &mut Found<T::A>,
) -> bool {
    found.key = FrontendKey { address: *address, port, protocol, padding: 0 };
    if tables.may_be_known(address) && tables.frontend(&found.key, &mut found.frontend) {
        return true;
    }
    let Some(settings) = tables.settings() else { return false };
    let host_port = port.to_host();
    if host_port < settings.node_port_min || host_port > settings.node_port_max {
        return false;
    }
    let answers = match own_loopback {
        true => settings.flags & NODE_LOOPBACK_NODE_PORTS != 0,
        false => tables.node_address_flags(address) & NODE_ADDRESS_NODE_PORT != 0,
    };
    if !answers {
        return false;
    }
    found.key.address = T::A::default();
    tables.frontend(&found.key, &mut found.frontend)
}

/// What a destination is that no frontend answers for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unserved {
    /// Nothing of ours.
    Foreign,
    /// A ClusterIP, at a port or protocol that its Service does not have: refused.
    Port,
    /// An address of the service networks that is no Service's: nobody will ever answer.
    Address,
}

/// Looks at a destination that is no frontend. Two comparisons for what lies outside of the service networks. What this node
/// has as an address of its own is left to it: a DNS cache may listen on a ClusterIP.
#[inline(always)]
pub fn unserved<T: Tables>(tables: &T, address: &T::A) -> Unserved {
    let Some(settings) = tables.settings() else { return Unserved::Foreign };
    let inside = in_networks(address, &settings.service_cidrs, settings.service_cidr_count);
    if !inside && settings.flags & NODE_CLUSTER_IPS_ANYWHERE == 0 {
        return Unserved::Foreign;
    }
    let in_use = tables.cluster_ip_in_use(address);
    if !inside && !in_use || tables.node_address_flags(address) & NODE_ADDRESS_LOCAL != 0 {
        return Unserved::Foreign;
    }
    match in_use {
        true if settings.flags & NODE_HAS_CLUSTER_IPS != 0 => Unserved::Foreign,
        true => Unserved::Port,
        false => Unserved::Address,
    }
}

/// Whether one of the first `count` networks contains the address.
#[inline(always)]
pub fn in_networks<A: Address, const MAX: usize>(address: &A, networks: &[Cidr<A>; MAX], count: u32) -> bool {
    for (index, cidr) in networks.iter().enumerate() {
        if index >= count as usize {
            break;
        }
        if address.in_network(&cidr.network, &cidr.mask) {
            return true;
        }
    }
    false
}
