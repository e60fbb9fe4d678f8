//! Where packets meet the programs: a network namespace with the links and routes of a node, and programs that nothing else reaches.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use node_sys::{Netns, NetnsGuard};
use trama_cni::{LinkEnd, MacAddress, NetlinkSession, Route, in_netns};
use trama_proxy::dataplane::SyncScope;
use trama_proxy::dataplane::ebpf::{AttachMode, Detached, EbpfConfig, FlowTimeouts, FrameMode, Hook, Passage};
use trama_proxy::model::ServiceSnapshot;

use crate::node::set_node_sysctls;

/// An interface of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Link {
    Lo,
    /// To the other node and, through a gateway, to everybody.
    Eth0,
    /// To one client more.
    Eth1,
    /// To all pods of the node.
    Pods,
}

impl Link {
    pub(crate) const ALL: [Self; 4] = [Self::Lo, Self::Eth0, Self::Eth1, Self::Pods];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Lo => "lo",
            Self::Eth0 => "eth0",
            Self::Eth1 => "eth1",
            Self::Pods => "pods",
        }
    }

    /// Largest packet in bytes.
    pub(crate) const fn mtu(self) -> u32 {
        match self {
            Self::Lo => 65_536,
            Self::Eth0 | Self::Eth1 => 1500,
            Self::Pods => 1400,
        }
    }

    pub(crate) const fn mac(self) -> [u8; 6] {
        [2, 0, 0, 0, 0, 0x10 + self as u8]
    }
}

/// Index of a family in the tables below.
pub(crate) fn family(ip: IpAddr) -> usize {
    usize::from(ip.is_ipv6())
}

/// An address of each family: the first with the last octet, the other with the last group.
fn pair(v4: [u8; 3], v6: [u16; 7], host: u16) -> [IpAddr; 2] {
    let [a, b, c] = v4;
    let [d, e, f, g, h, i, j] = v6;
    [Ipv4Addr::new(a, b, c, host as u8).into(), Ipv6Addr::new(d, e, f, g, h, i, j, host).into()]
}

/// A pod of this node. Number 9 has no link-layer address.
pub(crate) fn local_pod(host: u16) -> [IpAddr; 2] {
    pair([10, 244, 1], [0xfd00, 0x244, 1, 0, 0, 0, 0], host)
}

/// A pod of the other node.
pub(crate) fn remote_pod(host: u16) -> [IpAddr; 2] {
    pair([10, 244, 2], [0xfd00, 0x244, 2, 0, 0, 0, 0], host)
}

/// The network of `eth0`: 1 is the gateway, 11 this node, 12 the other one.
pub(crate) fn machine(host: u16) -> [IpAddr; 2] {
    pair([172, 18, 0], [0xfd00, 0x18, 0, 0, 0, 0, 0], host)
}

/// The network of `eth1`: 11 is this node, 100 a client.
pub(crate) fn neighbour(host: u16) -> [IpAddr; 2] {
    pair([172, 19, 0], [0xfd00, 0x19, 0, 0, 0, 0, 0], host)
}

/// Somebody behind the gateway.
pub(crate) fn outside(host: u16) -> [IpAddr; 2] {
    pair([198, 51, 100], [0xfd00, 0xc1, 0, 0, 0, 0, 0], host)
}

/// An address of the service networks.
pub(crate) fn cluster_ip(host: u16) -> [IpAddr; 2] {
    pair([10, 96, 0], [0xfd00, 0x96, 0, 0, 0, 0, 0], host)
}

/// An external IP.
pub(crate) fn external_ip(host: u16) -> [IpAddr; 2] {
    pair([203, 0, 113], [0xfd00, 0xee, 0, 0, 0, 0, 0], host)
}

/// A load balancer's IP.
pub(crate) fn balancer_ip(host: u16) -> [IpAddr; 2] {
    pair([192, 0, 2], [0xfd00, 0x1b, 0, 0, 0, 0, 0], host)
}

/// Whether an address is this node's.
pub(crate) fn is_own(ip: IpAddr) -> bool {
    ip == machine(11)[family(ip)] || ip == neighbour(11)[family(ip)]
}

/// Whether an address is that of a pod of this node, or its own.
pub(crate) fn is_local(ip: IpAddr) -> bool {
    is_own(ip) || inside(ip, local_pod(0))
}

/// Where a packet to an address leaves the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Nowhere: it is the node's.
    Own,
    /// Through a link to a next hop of this link-layer address, if that is known.
    Out(Link, Option<[u8; 6]>),
}

/// The link-layer address of a next hop.
fn mac_of(ip: IpAddr) -> [u8; 6] {
    let last = match ip {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(ip) => ip.octets()[15],
    };
    [2, 1, family(ip) as u8, 0, 0, last]
}

fn inside(ip: IpAddr, network: [IpAddr; 2]) -> bool {
    let prefix = if ip.is_ipv4() { 24 } else { 64 };
    IpNet::new(network[family(ip)], prefix).is_ok_and(|net| net.contains(&ip))
}

/// The node's routes, as [`Bed::new`] makes them.
pub(crate) fn way(to: IpAddr) -> Way {
    let of = family(to);
    let known = |known: bool| known.then(|| mac_of(to));
    if is_own(to) {
        Way::Own
    } else if inside(to, local_pod(0)) {
        Way::Out(Link::Pods, known((2..9).any(|host| to == local_pod(host)[of])))
    } else if inside(to, remote_pod(0)) {
        Way::Out(Link::Eth0, Some(mac_of(machine(12)[of])))
    } else if inside(to, machine(0)) {
        Way::Out(Link::Eth0, known([1, 12].iter().any(|host| to == machine(*host)[of])))
    } else if inside(to, neighbour(0)) {
        Way::Out(Link::Eth1, known(to == neighbour(100)[of]))
    } else {
        Way::Out(Link::Eth0, Some(mac_of(machine(1)[of])))
    }
}

/// The programs, in their own network namespace, in which the calling thread stays until this is dropped.
pub(crate) struct Bed {
    pub(crate) kernel: Detached,
    /// Whether tunnels to other nodes are GUE.
    pub(crate) gue: bool,
    links: [u32; 4],
    _inside: NetnsGuard,
    _netns: Netns,
}

impl Bed {
    /// Room for `flows` flows of a family. The thread is tied to a processor: fragments and packets to the node itself are.
    pub(crate) fn new(flows: u32) -> Result<Self> {
        stay_on_this_cpu()?;
        let netns = Netns::anonymous()?;
        let inside = netns.enter()?;
        set_node_sysctls()?;
        let links = in_netns(&netns, async |session| lay(session).await)?;
        let config = EbpfConfig {
            cgroup: PathBuf::new(),
            bpffs: PathBuf::new(),
            interfaces: Vec::new(),
            attach_mode: AttachMode::Auto,
            xdp_interfaces: Vec::new(),
            xdp_mode: FrameMode::Native,
            tunnels_are_gue: false,
            tunnel_interfaces: Vec::new(),
            max_services: 1024,
            // Room for Maglev tables of all Services, and for those that replace them.
            max_endpoints: 65_536,
            max_flows: flows,
            flow_timeouts: FlowTimeouts::default(),
        };
        let mut kernel = Detached::load(&config).context("cannot load the programs")?;
        for link in [Link::Eth0, Link::Eth1] {
            kernel.add_device(links[link as usize])?;
        }
        Ok(Self { kernel, gue: false, links, _inside: inside, _netns: netns })
    }

    /// Forgets every packet, and every Service with its endpoints: a whole sync would find in the maps what drains.
    pub(crate) fn clear(&mut self) -> Result<()> {
        self.kernel.sync(&ServiceSnapshot::default(), SyncScope::Full)?;
        Ok(self.kernel.forget_packets()?)
    }

    /// From the next whole sync on tunnels to other nodes are GUE, or IPIP.
    pub(crate) fn set_tunnels(&mut self, gue: bool) {
        self.gue = gue;
        self.kernel.set_tunnels(gue);
    }

    /// Index of a link.
    pub(crate) fn index(&self, link: Link) -> u32 {
        self.links[link as usize]
    }

    /// Runs the program of a hook.
    pub(crate) fn pass(&self, hook: Hook, link: Link, mark: u32, frame: &[u8]) -> Result<Passage> {
        let passed = self.kernel.pass(hook, self.index(link), mark, frame);
        passed.with_context(|| format!("cannot run {hook:?} at {} on {} bytes", link.name(), frame.len()))
    }
}

fn stay_on_this_cpu() -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(sched_getcpu()?)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).context("cannot stay on one processor")
}

async fn lay(session: &NetlinkSession) -> Result<[u32; 4]> {
    let mut links = [1; 4];
    session.set_up(1).await?;
    for link in [Link::Eth0, Link::Eth1, Link::Pods] {
        links[link as usize] = veth(session, link).await?;
    }
    let [_, eth0, eth1, pods] = links;
    for of in [0, 1] {
        let bits = [24, 64][of];
        let net = |ip: [IpAddr; 2]| IpNet::new(ip[of], bits);
        session.add_address(eth0, net(machine(11))?).await?;
        session.add_address(eth1, net(neighbour(11))?).await?;
        let default = IpNet::new([IpAddr::from([0; 4]), IpAddr::from([0_u16; 8])][of], 0)?;
        let routes = [
            Route { to: default, via: Some(machine(1)[of]), interface: eth0 },
            Route { to: net(remote_pod(0))?, via: Some(machine(12)[of]), interface: eth0 },
            Route { to: net(local_pod(0))?, via: None, interface: pods },
        ];
        for route in routes {
            session.set_route(route).await?;
        }
        let near = [(eth0, machine(1)), (eth0, machine(12)), (eth1, neighbour(100))];
        for (interface, ip) in near.into_iter().chain((2..9).map(|host| (pods, local_pod(host)))) {
            session.add_neighbour(interface, ip[of], MacAddress(mac_of(ip[of]))).await?;
        }
    }
    Ok(links)
}

async fn veth(session: &NetlinkSession, link: Link) -> Result<u32> {
    let peer = format!("{}-peer", link.name());
    let end = |name, mac| LinkEnd { name, netns: None, mac, mtu: link.mtu() };
    session.add_veth(end(link.name(), Some(MacAddress(link.mac()))), end(&peer, None)).await?;
    let (ours, theirs) = (session.link(link.name()).await?, session.link(&peer).await?);
    for index in [ours, theirs] {
        session.set_up(index).await?;
    }
    if ours == 0 {
        bail!("{} has no index", link.name());
    }
    Ok(ours)
}
