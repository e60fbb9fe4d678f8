//! The machines of one scenario: the node, its pods, the other node and the outside, each a namespace, from the scenario's addresses.
//!
//! ```text
//!   outside ---- eth0 node eth1 ---- far        outside: clients, and whoever owns a virtual address beyond the proxy
//!                      |                        far: endpoints that are not local
//!                     pods
//! ```
//! `outside` and `far` hold many addresses, and send everything through the node, even what is meant for an address of their own: so
//! every connection of a scenario crosses the node, and its answers too.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use ipnet::IpNet;
use node_sys::{Cgroup, Netns, sysctl};
use trama_cni::{LinkEnd, NetlinkError, NetlinkSession, PodLink, Route, in_netns};

use super::layout::{Layout, Site};
use super::scenario::{Config, DetectLocal, Scenario};
use super::sctp;
use crate::Claim;
use crate::node::{set_node_sysctls, set_quiet_ipv6};
use crate::topology::MTU;

/// Link-local addresses of the ends of an uplink: the neighbour's and the node's.
const NEIGHBOUR_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x77));
const NODE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x78));

/// A neighbour of the node.
struct Neighbour<'a> {
    name: &'static str,
    /// The node's interface towards it.
    interface: &'static str,
    /// Its own address on the link, which the node routes through.
    gateway: Ipv4Addr,
    addresses: Vec<IpAddr>,
    /// What the node sends to it.
    routes: Vec<IpNet>,
    config: &'a Config,
}

/// The namespaces of one scenario; they go with the claim.
#[derive(Debug)]
pub(super) struct World {
    pub(super) claim: Arc<Claim>,
    pub(super) node: Netns,
    pub(super) cgroup: Cgroup,
    pub(super) bpffs: PathBuf,
    pods: BTreeMap<IpAddr, Netns>,
}

impl World {
    pub(super) fn build(id: &str, scenario: &Scenario, layout: &Layout) -> Result<Self> {
        let claim = Arc::new(Claim::take(id)?);
        let node = claim.netns("node")?;
        node.run(set_node_sysctls)??;
        node.run(set_no_icmp_limit)??;
        node.run(set_sctp_retry)??;
        in_netns(&node, async |session| -> Result<(), NetlinkError> {
            let loopback = session.link("lo").await?;
            session.set_up(loopback).await
        })?;
        let (cgroup, bpffs) = (claim.cgroup("node")?, claim.bpffs("node")?);
        let mut world = Self { claim, node, cgroup, bpffs, pods: BTreeMap::new() };
        let everywhere =
            [IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0), IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0)];
        world.connect(&Neighbour {
            name: "outside",
            interface: "eth0",
            gateway: Ipv4Addr::new(169, 254, 77, 1),
            addresses: layout.outside.iter().copied().collect(),
            routes: everywhere.to_vec(),
            config: &scenario.config,
        })?;
        world.connect(&Neighbour {
            name: "far",
            interface: "eth1",
            gateway: Ipv4Addr::new(169, 254, 78, 1),
            addresses: layout.far.iter().copied().collect(),
            routes: layout.far.iter().copied().map(IpNet::from).collect(),
            config: &scenario.config,
        })?;
        world.add_pods(layout, &scenario.config.detect_local)?;
        Ok(world)
    }

    /// Full name of the namespace that stands for the site.
    pub(super) fn netns_name(&self, site: Site) -> Result<String> {
        Ok(match site {
            Site::Node => self.node.label().to_owned(),
            Site::Far => self.claim.netns_name("far"),
            Site::Outside => self.claim.netns_name("outside"),
            Site::Pod(address) => {
                let pod = self.pods.get(&address).with_context(|| format!("no pod has the address {address}"))?;
                pod.label().to_owned()
            }
        })
    }

    fn connect(&self, neighbour: &Neighbour<'_>) -> Result<()> {
        let netns = self.claim.netns(neighbour.name)?;
        netns.run(set_neighbour_sysctls)??;
        netns.run(set_sctp_retry)??;
        in_netns(&self.node, async |session| -> Result<(), NetlinkError> {
            let end = LinkEnd { name: neighbour.interface, netns: None, mac: None, mtu: MTU };
            session.add_veth(end, LinkEnd { name: "eth0", netns: Some(&netns), mac: None, mtu: MTU }).await?;
            neighbour.wire_node(session).await
        })?;
        in_netns(&netns, async |session| neighbour.wire(session).await)?;
        in_netns(&self.node, async |session| neighbour.route(session).await)?;
        Ok(())
    }

    fn add_pods(&mut self, layout: &Layout, detect_local: &DetectLocal) -> Result<()> {
        for (index, address) in layout.pods.iter().enumerate() {
            let pod = self.claim.netns(&format!("pod-{index}"))?;
            pod.run(set_sctp_retry)??;
            let host_interface = match detect_local {
                DetectLocal::Prefix { prefix, .. } => format!("{prefix}{index}"),
                _ => trama_cni::host_interface_name(&format!("p{index}")),
            };
            let link = PodLink {
                node: &self.node,
                pod: &pod,
                host_interface: &host_interface,
                addresses: &[*address],
                mtu: MTU,
            };
            trama_cni::attach(&link)?;
            if let DetectLocal::Bridge { interface, .. } = detect_local {
                self.put_behind_bridge(interface, &host_interface, *address)?;
            }
            self.pods.insert(*address, pod);
        }
        Ok(())
    }

    fn put_behind_bridge(&self, bridge: &str, port: &str, address: IpAddr) -> Result<()> {
        let wired = in_netns(&self.node, async |session| -> Result<(), NetlinkError> {
            let bridge = match session.find_link(bridge).await? {
                Some(bridge) => bridge,
                None => session.add_bridge(bridge).await?,
            };
            let port = session.link(port).await?;
            session.set_bridge(port, bridge).await?;
            session.set_route(Route { to: IpNet::from(address), via: None, interface: bridge }).await
        });
        Ok(wired?)
    }
}

impl Neighbour<'_> {
    /// The node's end. The first uplink carries the node's addresses.
    async fn wire_node(&self, session: &NetlinkSession) -> Result<(), NetlinkError> {
        let interface = session.link(self.interface).await?;
        session.set_up(interface).await?;
        session.add_address(interface, IpNet::new_assert(NODE_V6, 64)).await?;
        if self.interface == "eth0" {
            let primary = self.config.primary_node_ips.iter();
            let others = self.config.node_ips.iter().filter(|address| !self.config.primary_node_ips.contains(address));
            for address in primary.chain(others) {
                session.add_address(interface, IpNet::from(*address)).await?;
            }
        }
        Ok(())
    }

    /// The neighbour's own end: everything that it sends goes to the node.
    async fn wire(&self, session: &NetlinkSession) -> Result<(), NetlinkError> {
        let (loopback, interface) = (session.link("lo").await?, session.link("eth0").await?);
        session.set_up(loopback).await?;
        session.set_up(interface).await?;
        session.add_address(interface, IpNet::new_assert(self.gateway.into(), 32)).await?;
        session.add_address(interface, IpNet::new_assert(NEIGHBOUR_V6, 64)).await?;
        for address in &self.addresses {
            session.add_host_address(loopback, *address).await?;
        }
        if let Some(node) = self.config.primary_node_ips.iter().find(|address| address.is_ipv4()) {
            let to = IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0);
            session.set_route(Route { to, via: Some(*node), interface }).await?;
        }
        let to = IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0);
        session.set_route(Route { to, via: Some(NODE_V6), interface }).await?;
        session.deliver_only_from("eth0").await
    }

    async fn route(&self, session: &NetlinkSession) -> Result<(), NetlinkError> {
        let interface = session.link(self.interface).await?;
        for to in &self.routes {
            let via = Some(if to.addr().is_ipv4() { self.gateway.into() } else { NEIGHBOUR_V6 });
            session.set_route(Route { to: *to, via, interface }).await?;
        }
        Ok(())
    }
}

/// Clients of one scenario are refused more often in a second than Linux would tell them by default (icmp_ratelimit).
fn set_no_icmp_limit() -> Result<()> {
    for (key, value) in [
        ("net/ipv4/icmp_ratelimit", "0"),
        ("net/ipv4/icmp_ratemask", "0"),
        ("net/ipv6/icmp/ratelimit", "0"),
        ("net/ipv6/icmp/ratemask", ""),
    ] {
        sysctl::write(key, value)?;
    }
    Ok(())
}

/// An INIT is sent again after as long as a SYN, not after three seconds: a refusal that meets its busy socket is lost.
fn set_sctp_retry() -> Result<()> {
    if sctp::has_sockets() { Ok(sysctl::write("net/sctp/rto_initial", "1000")?) } else { Ok(()) }
}

/// A host with many addresses, which takes packets from the node even when they come from an address of its own.
fn set_neighbour_sysctls() -> Result<()> {
    set_quiet_ipv6()?;
    for scope in ["all", "default"] {
        for (key, value) in [("rp_filter", "0"), ("accept_local", "1"), ("accept_redirects", "0")] {
            sysctl::write(&format!("net/ipv4/conf/{scope}/{key}"), value)?;
        }
        sysctl::write(&format!("net/ipv6/conf/{scope}/accept_redirects"), "0")?;
    }
    Ok(sysctl::write("net/ipv4/ip_forward", "0")?)
}
