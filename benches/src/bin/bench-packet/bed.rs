//! The network that route lookups answer from: one namespace, a way in and a way out, neighbours known.

use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;
use node_sys::{Netns, sysctl};
use trama_cni::{LinkEnd, MacAddress, NetlinkError, NetlinkSession, Route, in_netns};

/// Link-layer address of every neighbour.
const NEIGHBOUR: MacAddress = MacAddress([2, 0, 0, 0, 0, 9]);
const MTU: u32 = 1500;

/// A network namespace with the interfaces `in0` (clients) and `out0` (backends).
pub(crate) struct Bed {
    netns: Netns,
    in_index: u32,
    out_index: u32,
}

impl Bed {
    pub(crate) fn new() -> Result<Self> {
        let netns = Netns::anonymous()?;
        let (in_index, out_index) = in_netns(&netns, async |session| -> Result<(u32, u32), NetlinkError> {
            let clients = ["10.8.0.1/16", "fd00:8::1/64"];
            let in_index = add_side(session, "in0", clients, ["10.8.255.254", "fd00:8::ffff"]).await?;
            let backends = ["10.9.0.1/16", "fd00:9::1/64"];
            let out_index = add_side(session, "out0", backends, ["10.9.255.254", "fd00:9::ffff"]).await?;
            add_routes(session, in_index, ["10.0.0.0/13", "fd00:c::/32"], ["10.8.255.254", "fd00:8::ffff"]).await?;
            add_routes(session, out_index, ["10.244.0.0/16", "fd00:244::/48"], ["10.9.255.254", "fd00:9::ffff"])
                .await?;
            Ok((in_index, out_index))
        })?;
        netns.run(|| -> Result<(), node_sys::SysError> {
            sysctl::write("net/ipv4/ip_forward", "1")?;
            sysctl::write("net/ipv6/conf/all/forwarding", "1")
        })??;
        Ok(Self { netns, in_index, out_index })
    }

    pub(crate) fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Index of the interface on which clients' packets arrive.
    pub(crate) fn in_index(&self) -> u32 {
        self.in_index
    }

    /// Index of the interface to the backends.
    pub(crate) fn out_index(&self) -> u32 {
        self.out_index
    }
}

async fn add_side(
    session: &NetlinkSession,
    name: &str,
    addresses: [&str; 2],
    neighbours: [&str; 2],
) -> Result<u32, NetlinkError> {
    let peer = format!("{name}-peer");
    let end = |name| LinkEnd { name, netns: None, mac: None, mtu: MTU };
    session.add_veth(end(name), end(&peer)).await?;
    for name in [name, &peer] {
        let index = session.link(name).await?;
        session.set_up(index).await?;
    }
    let index = session.link(name).await?;
    for address in addresses {
        session.add_address(index, network(address)).await?;
    }
    for neighbour in neighbours {
        session.add_neighbour(index, network(&format!("{neighbour}/128")).addr(), NEIGHBOUR).await?;
    }
    Ok(index)
}

async fn add_routes(
    session: &NetlinkSession,
    interface: u32,
    to: [&str; 2],
    via: [&str; 2],
) -> Result<(), NetlinkError> {
    for (to, via) in to.into_iter().zip(via) {
        let via = Some(network(&format!("{via}/128")).addr());
        session.set_route(Route { to: network(to), via, interface }).await?;
    }
    Ok(())
}

/// Parses one of the constants above; a length of 128 stands for a single address of either family.
fn network(text: &str) -> IpNet {
    let single = || text.strip_suffix("/128").and_then(|address| address.parse::<IpAddr>().ok()).map(IpNet::from);
    text.parse().ok().or_else(single).unwrap_or_default()
}
