//! The machines of a lab: a switch, nodes with an uplink to it, and a client that belongs to no node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use node_sys::{Netns, sysctl};
use trama_cni::{NetlinkError, Route, in_netns};

use crate::node::{connect_to_switch, set_quiet_ipv6};
use crate::{Claim, Node, Place, Pod};

/// Largest packet on every link, in bytes.
pub(crate) const MTU: u32 = 1500;
/// Prefix lengths of the switch's network: 172.18.0.0/24 and fd00:172:18::/64.
pub(crate) const UPLINK_PREFIXES: [u8; 2] = [24, 64];
/// The switch's own addresses, everyone's default gateway. It forwards nothing: what is sent there has left the cluster.
pub(crate) const SWITCH_ADDRESSES: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(172, 18, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 1))];
/// The outside client's addresses.
pub const CLIENT_ADDRESSES: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(172, 18, 0, 200)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 0x200))];
/// Nodes in one lab.
const NODES_MAX: u8 = 16;

/// A switch, nodes and a client, each a namespace. Dropping it removes all of them and every pod.
#[derive(Debug)]
pub struct Topology {
    claim: Arc<Claim>,
    nodes: Vec<Arc<Node>>,
    client: Arc<Netns>,
    switch: Netns,
}

impl Topology {
    /// Builds a lab with an id of its own: any number of them run side by side.
    ///
    /// # Errors
    /// When the caller is not root, or the kernel refuses a part; nothing is left then.
    pub fn new(nodes: u8) -> Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let id = format!("t{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self::with_id(&id, nodes)
    }

    /// Builds the lab `id` (lower-case letters and digits), of which there is one at a time.
    ///
    /// # Errors
    /// As [`Topology::new`], and when a living process has a lab of this id.
    pub fn with_id(id: &str, nodes: u8) -> Result<Self> {
        ensure!((1..=NODES_MAX).contains(&nodes), "a lab has 1 to {NODES_MAX} nodes, not {nodes}");
        let claim = Arc::new(Claim::take(id)?);
        let switch = create_switch(&claim)?;
        let client = Arc::new(claim.netns("client")?);
        client.run(set_quiet_ipv6)??;
        connect_to_switch(&switch, &client, "client", CLIENT_ADDRESSES)?;
        let nodes: Result<Vec<_>> =
            (1..=nodes).map(|number| Ok(Arc::new(Node::create(&claim, &switch, number)?))).collect();
        let topology = Self { claim, nodes: nodes?, client, switch };
        topology.route_pods()?;
        Ok(topology)
    }

    /// The claim on the lab's names, for processes and files of the lab's own.
    pub fn claim(&self) -> &Arc<Claim> {
        &self.claim
    }

    /// All nodes, `node-1` first.
    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    /// The node `node-NUMBER`.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, number: usize) -> Result<&Arc<Node>> {
        let node = number.checked_sub(1).and_then(|index| self.nodes.get(index));
        node.with_context(|| format!("the lab has no node-{number}"))
    }

    /// Makes a pod on `node-NUMBER`; its lifetime is the caller's.
    ///
    /// # Errors
    /// As [`Pod::create`].
    pub fn add_pod(&self, node: usize, name: &str) -> Result<Pod> {
        Pod::create(self.node(node)?, name)
    }

    /// The client outside of the cluster: on the nodes' network, on no node, in no node's cgroup.
    pub fn client(&self) -> Place {
        Place { claim: Arc::clone(&self.claim), netns: Arc::clone(&self.client), cgroup: None }
    }

    /// Sends the outside client's packets to `to` through `node-NUMBER`, as a router outside does for external and load-balancer IPs.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn route_client_through(&self, to: IpNet, node: usize) -> Result<()> {
        let [v4, v6] = self.node(node)?.addresses();
        let via = Some(if to.addr().is_ipv4() { v4 } else { v6 });
        let route = in_netns(&self.client, async |session| -> Result<(), NetlinkError> {
            let interface = session.link("eth0").await?;
            session.set_route(Route { to, via, interface }).await
        });
        Ok(route?)
    }

    /// The namespaces of the switch, and of everyone with an uplink to it.
    pub(crate) fn switch_and_machines(&self) -> (&Netns, Vec<Arc<Netns>>) {
        let machines = self.nodes.iter().map(|node| node.place().netns).chain([Arc::clone(&self.client)]);
        (&self.switch, machines.collect())
    }

    fn route_pods(&self) -> Result<()> {
        for node in &self.nodes {
            let others = self.nodes.iter().filter(|other| other.name() != node.name());
            let routes: Vec<_> = others.map(|other| (other.pod_cidrs(), other.addresses())).collect();
            node.route_to(&routes)?;
        }
        Ok(())
    }
}

fn create_switch(claim: &Claim) -> Result<Netns> {
    let switch = claim.netns("switch")?;
    switch.run(|| -> Result<()> {
        set_quiet_ipv6()?;
        // A child namespace takes the machine's own value, which may be 1.
        Ok(sysctl::write("net/ipv4/ip_forward", "0")?)
    })??;
    in_netns(&switch, async |session| -> Result<(), NetlinkError> {
        let loopback = session.link("lo").await?;
        session.set_up(loopback).await?;
        let bridge = session.add_bridge("br0").await?;
        for (address, prefix) in SWITCH_ADDRESSES.into_iter().zip(UPLINK_PREFIXES) {
            session.add_address(bridge, IpNet::new_assert(address, prefix)).await?;
        }
        Ok(())
    })?;
    Ok(switch)
}
