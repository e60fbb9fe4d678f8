//! A node: a namespace with an uplink, a cgroup subtree, a BPF file system and the addresses of its pods.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use node_sys::{Cgroup, Netns, sysctl};
use trama_cni::{LinkEnd, NetlinkError, NetlinkSession, Route, in_netns};

use crate::topology::{MTU, SWITCH_ADDRESSES, UPLINK_PREFIXES};
use crate::{Claim, Place};

/// Pods per node: `.1` stands for the node, `.255` for nothing.
const POD_HOSTS: std::ops::RangeInclusive<u8> = 2..=254;

/// The pod address ranges of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodCidrs {
    /// A /24 of 10.244.0.0/16.
    pub v4: Ipv4Net,
    /// A /64 of fd00:10:244::/56.
    pub v6: Ipv6Net,
}

impl PodCidrs {
    /// The ranges of node `number`, counted from 1.
    fn of_node(number: u8) -> Self {
        let v4 = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, number, 0), 24);
        let v6 = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x244, number.into(), 0, 0, 0, 0), 64);
        Self { v4, v6 }
    }

    fn addresses(&self, host: u8) -> [IpAddr; 2] {
        let [a, b, c, _] = self.v4.addr().octets();
        let v6 = u128::from(self.v6.addr()) | u128::from(host);
        [Ipv4Addr::new(a, b, c, host).into(), Ipv6Addr::from(v6).into()]
    }
}

/// A node of a [`Topology`](crate::Topology).
#[derive(Debug)]
pub struct Node {
    pub(crate) claim: Arc<Claim>,
    pub(crate) netns: Arc<Netns>,
    name: String,
    number: u8,
    cgroup: Cgroup,
    bpffs: PathBuf,
    pod_cidrs: PodCidrs,
    pod_hosts: Mutex<BTreeSet<u8>>,
}

impl Node {
    pub(crate) fn create(claim: &Arc<Claim>, switch: &Netns, number: u8) -> Result<Self> {
        let name = format!("node-{number}");
        let node = Self {
            claim: Arc::clone(claim),
            netns: Arc::new(claim.netns(&name)?),
            cgroup: claim.cgroup(&name)?,
            bpffs: claim.bpffs(&name)?,
            pod_cidrs: PodCidrs::of_node(number),
            pod_hosts: Mutex::default(),
            name,
            number,
        };
        node.netns.run(set_node_sysctls)??;
        connect_to_switch(switch, &node.netns, &node.name, node.addresses())?;
        Ok(node)
    }

    /// Name of the Node object: `node-1`, `node-2`, ...
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number, counted from 1.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The root of the node's cgroup subtree: socket programs attach here.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The node's own BPF file system.
    pub fn bpffs(&self) -> &PathBuf {
        &self.bpffs
    }

    /// The node's addresses on the switch: IPv4, IPv6.
    pub fn addresses(&self) -> [IpAddr; 2] {
        node_addresses(self.number)
    }

    /// The pod ranges of this node.
    pub fn pod_cidrs(&self) -> PodCidrs {
        self.pod_cidrs
    }

    /// A client on the node itself, inside its cgroup, as a daemon of the node would be.
    pub fn place(&self) -> Place {
        Place { claim: Arc::clone(&self.claim), netns: Arc::clone(&self.netns), cgroup: Some(self.cgroup.clone()) }
    }

    /// Takes the lowest free pair of pod addresses.
    pub(crate) fn take_pod_host(&self) -> Result<(u8, [IpAddr; 2])> {
        let mut used = self.pod_hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let free = POD_HOSTS.into_iter().find(|host| !used.contains(host));
        let host = free.with_context(|| format!("{} has no pod address left", self.name))?;
        used.insert(host);
        Ok((host, self.pod_cidrs.addresses(host)))
    }

    pub(crate) fn return_pod_host(&self, host: u8) {
        self.pod_hosts.lock().unwrap_or_else(PoisonError::into_inner).remove(&host);
    }

    /// Routes to the pods of `others`, as a cloud's router or a routing daemon would give.
    pub(crate) fn route_to(&self, others: &[(PodCidrs, [IpAddr; 2])]) -> Result<()> {
        let work = async |session: &NetlinkSession| -> Result<(), NetlinkError> {
            let interface = session.link("eth0").await?;
            for (cidrs, [v4, v6]) in others {
                session.set_route(Route { to: IpNet::V4(cidrs.v4), via: Some(*v4), interface }).await?;
                session.set_route(Route { to: IpNet::V6(cidrs.v6), via: Some(*v6), interface }).await?;
            }
            Ok(())
        };
        Ok(in_netns(&self.netns, work)?)
    }
}

/// `172.18.0.(10+N)` and `fd00:172:18::(10+N)`, N written in decimal in the first and in hexadecimal in the second.
pub(crate) fn node_addresses(number: u8) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 0x10 + u16::from(number));
    [Ipv4Addr::new(172, 18, 0, 10 + number).into(), v6.into()]
}

/// A veth pair from `eth0` in `inner` to a port of the switch, addresses and default routes through the switch.
pub(crate) fn connect_to_switch(switch: &Netns, inner: &Netns, port: &str, addresses: [IpAddr; 2]) -> Result<()> {
    in_netns(switch, async |session| -> Result<(), NetlinkError> {
        let end = LinkEnd { name: port, netns: None, mac: None, mtu: MTU };
        session.add_veth(end, LinkEnd { name: "eth0", netns: Some(inner), mac: None, mtu: MTU }).await?;
        let (bridge, port) = (session.link("br0").await?, session.link(port).await?);
        session.set_bridge(port, bridge).await?;
        session.set_up(port).await
    })?;
    in_netns(inner, async |session| -> Result<(), NetlinkError> {
        let (loopback, interface) = (session.link("lo").await?, session.link("eth0").await?);
        session.set_up(loopback).await?;
        session.set_up(interface).await?;
        for ((address, prefix), gateway) in addresses.into_iter().zip(UPLINK_PREFIXES).zip(SWITCH_ADDRESSES) {
            session.add_address(interface, IpNet::new_assert(address, prefix)).await?;
            let to = IpNet::new_assert(unspecified(address), 0);
            session.set_route(Route { to, via: Some(gateway), interface }).await?;
        }
        Ok(())
    })?;
    Ok(())
}

fn unspecified(address: IpAddr) -> IpAddr {
    if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// No duplicate address detection and no router advertisements in a namespace of ours: addresses are usable at once.
pub(crate) fn set_quiet_ipv6() -> Result<()> {
    for scope in ["all", "default"] {
        for (key, value) in [("accept_dad", "0"), ("accept_ra", "0"), ("dad_transmits", "0")] {
            sysctl::write(&format!("net/ipv6/conf/{scope}/{key}"), value)?;
        }
    }
    Ok(())
}

/// What a Debian 12 node has: forwarding for its pods, and loose reverse path filtering (systemd's default).
pub(crate) fn set_node_sysctls() -> Result<()> {
    set_quiet_ipv6()?;
    for (key, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv4/conf/all/rp_filter", "2"),
        ("net/ipv4/conf/default/rp_filter", "2"),
    ] {
        sysctl::write(key, value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_follow_the_number() {
        let cidrs = PodCidrs::of_node(2);
        assert_eq!((cidrs.v4.to_string(), cidrs.v6.to_string()), ("10.244.2.0/24".into(), "fd00:10:244:2::/64".into()));
        let expected: [IpAddr; 2] = ["10.244.2.7".parse().unwrap(), "fd00:10:244:2::7".parse().unwrap()];
        assert_eq!(cidrs.addresses(7), expected);
        let expected: [IpAddr; 2] = ["172.18.0.11".parse().unwrap(), "fd00:172:18::11".parse().unwrap()];
        assert_eq!(node_addresses(1), expected);
    }
}
