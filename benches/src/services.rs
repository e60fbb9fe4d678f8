//! Services as the packet path finds them in its maps.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use aya::maps::{HashMap, MapData};
use proxy_common::{
    ABSENT_WORDS, Address, BACKEND_ACTIVE, Backend, Be16, Cidr, FRONTEND_MAGLEV, Frontend, FrontendKey, NodeSettings,
    POD_CIDRS_MAX, RuleBits, SERVICE_CIDRS_MAX, V4, V6, fill_absent,
};

use crate::programs::Programs;

/// Endpoints of a service, where nothing else is said.
pub const ENDPOINTS: u32 = 10;
/// Port of every endpoint.
pub const ENDPOINT_PORT: u16 = 8080;
/// Places of a Maglev table of ten endpoints, as trama-proxy makes it.
const TABLE_SIZE: u32 = 16_381;
/// IANA's number of TCP.
pub const TCP: u8 = 6;
/// IANA's number of UDP.
pub const UDP: u8 = 17;

/// Services of one kind, one behind the other.
#[derive(Debug, Clone, Copy)]
pub struct Services {
    /// Where the first one listens; the others have the addresses behind it.
    pub frontend: SocketAddr,
    /// IANA's number of the protocol.
    pub protocol: u8,
    /// How many there are.
    pub count: u32,
    /// Endpoints of each.
    pub endpoints: u32,
    /// The address before that of the first endpoint, of the frontend's family; the others have those behind it.
    pub backends: IpAddr,
    /// Whether endpoints see the node as the source.
    pub masquerade: bool,
    /// Whether they see the client all the same, by direct server return.
    pub direct_return: bool,
    /// Whether their endpoints are chosen by a Maglev table.
    pub maglev: bool,
    /// As in [`NodeSettings`].
    pub flood_limit: u32,
    /// Whether the node knows the networks of pods and Services, 10.244.0.0/16 and 10.96.0.0/12.
    pub networks: bool,
}

impl Services {
    /// `count` TCP services of ten endpoints each in 10.244.0.0/16 or fd00:244::/48.
    pub fn tcp(frontend: SocketAddr, count: u32) -> Self {
        let backends = match frontend {
            SocketAddr::V4(_) => IpAddr::from([10, 244, 0, 0]),
            SocketAddr::V6(_) => IpAddr::from([0xfd00, 0x244, 0, 0, 0, 0, 0, 0]),
        };
        Self {
            frontend,
            protocol: TCP,
            count,
            endpoints: ENDPOINTS,
            backends,
            masquerade: false,
            direct_return: false,
            maglev: false,
            flood_limit: 0,
            networks: false,
        }
    }

    /// Slots of each.
    fn slots(&self) -> u32 {
        if self.maglev { TABLE_SIZE } else { self.endpoints }
    }

    /// Endpoints of all of them.
    pub fn endpoints_in_all(&self) -> u32 {
        self.count.saturating_mul(self.endpoints)
    }

    /// Whether `address` is an endpoint of the first service.
    pub fn is_backend(&self, address: IpAddr) -> bool {
        (1..=self.endpoints).any(|number| nth_address(self.backends, number) == address)
    }
}

impl Programs {
    /// Writes services, their endpoints and the node's facts.
    ///
    /// # Errors
    /// When a map takes no more.
    pub fn program_services(&mut self, services: &Services) -> Result<()> {
        let (own_v4, own_v6) = (V4::from_octets([10, 9, 0, 1]), v6([0xfd00, 9, 0, 0, 0, 0, 0, 1].into()));
        match services.frontend {
            SocketAddr::V4(_) => self.program_family("V4", services, v4, own_v4)?,
            SocketAddr::V6(_) => self.program_family("V6", services, v6, own_v6)?,
        }
        let (mut node_v4, mut node_v6) = (settings(own_v4), settings(own_v6));
        (node_v4.flood_limit, node_v6.flood_limit) = (services.flood_limit, services.flood_limit);
        if services.networks {
            node_v4.pod_cidr_count = 1;
            node_v4.pod_cidrs[0] =
                Cidr { network: V4::from_octets([10, 244, 0, 0]), mask: V4::from_octets([255, 255, 0, 0]) };
            node_v4.service_cidr_count = 1;
            node_v4.service_cidrs[0] =
                Cidr { network: V4::from_octets([10, 96, 0, 0]), mask: V4::from_octets([255, 240, 0, 0]) };
        }
        self.array::<NodeSettings<V4>>("NODE_V4")?.set(0, node_v4, 0)?;
        Ok(self.array::<NodeSettings<V6>>("NODE_V6")?.set(0, node_v6, 0)?)
    }

    fn program_family<A>(&mut self, suffix: &str, services: &Services, address: fn(IpAddr) -> A, own: A) -> Result<()>
    where
        A: Address,
        FrontendKey<A>: aya::Pod,
        Backend<A>: aya::Pod,
    {
        let mut backends = self.array::<Backend<A>>(&format!("BACKENDS_{suffix}"))?;
        for number in 0..services.endpoints_in_all() {
            backends.set(number, backend(services, number, address), 0)?;
        }
        let mut slots = self.array::<u32>(&format!("SLOTS_{suffix}"))?;
        for number in 0..services.count * services.slots() {
            // A table has its endpoints in another order, which costs the same.
            let (service, slot) = (number / services.slots(), number % services.slots());
            slots.set(number, service * services.endpoints + slot % services.endpoints, 0)?;
        }
        let mut frontends = self.hash::<FrontendKey<A>, Frontend>(&format!("FRONTENDS_{suffix}"))?;
        for index in 0..services.count {
            let address = address(nth_address(services.frontend.ip(), index));
            let port = Be16::from_host(services.frontend.port());
            let key = FrontendKey { address, port, protocol: services.protocol, padding: 0 };
            frontends.insert(key, frontend(services, index), 0)?;
        }
        let present: Vec<A> =
            (0..services.count).map(|index| address(nth_address(services.frontend.ip(), index))).collect();
        let mut words = vec![0; ABSENT_WORDS as usize];
        fill_absent(present.iter().chain([&own]), &mut words);
        let mut absent = self.array::<u64>(&format!("ABSENT_{suffix}"))?;
        for (index, bits) in (0..).zip(words) {
            absent.set(index, bits, 0)?;
        }
        Ok(())
    }

    fn hash<K: aya::Pod, V: aya::Pod>(&mut self, name: &str) -> Result<HashMap<&mut MapData, K, V>> {
        Ok(self.ebpf.map_mut(name).with_context(|| format!("no map {name}"))?.try_into()?)
    }
}

fn backend<A>(services: &Services, number: u32, address: fn(IpAddr) -> A) -> Backend<A> {
    Backend {
        address: address(nth_address(services.backends, number + 1)),
        port: Be16::from_host(ENDPOINT_PORT),
        state: BACKEND_ACTIVE,
        local: 0,
        service_id: number / services.endpoints + 1,
        generation: 0,
    }
}

fn frontend(services: &Services, index: u32) -> Frontend {
    let rule = RuleBits::new(RuleBits::FORWARD, false, services.masquerade);
    let rule = if services.direct_return { rule.with_direct_return() } else { rule };
    Frontend {
        service_id: index + 1,
        cluster_first: index * services.slots(),
        cluster_count: services.slots(),
        flags: if services.maglev { FRONTEND_MAGLEV } else { 0 },
        rules: Frontend::pack_rules([rule; 3]),
        ..Frontend::default()
    }
}

/// The address `number` behind `first`.
fn nth_address(first: IpAddr, number: u32) -> IpAddr {
    match first {
        IpAddr::V4(ip) => IpAddr::V4((u32::from(ip).wrapping_add(number)).into()),
        IpAddr::V6(ip) => IpAddr::V6((u128::from(ip).wrapping_add(number.into())).into()),
    }
}

fn v4(address: IpAddr) -> V4 {
    match address {
        IpAddr::V4(ip) => V4::from_octets(ip.octets()),
        IpAddr::V6(_) => V4::default(),
    }
}

fn v6(address: IpAddr) -> V6 {
    match address {
        IpAddr::V6(ip) => V6::from_octets(ip.octets()),
        IpAddr::V4(ip) => V6::from_octets(ip.to_ipv6_mapped().octets()),
    }
}

fn settings<A: Copy + Default>(masquerade: A) -> NodeSettings<A>
where
    Cidr<A>: Default + Copy,
{
    NodeSettings {
        masquerade,
        source_port_min: 1024,
        source_port_max: 29999,
        node_port_min: 30000,
        node_port_max: 32767,
        flags: 0,
        flood_limit: 0,
        netns_cookie: [0; 2],
        pod_cidr_count: 0,
        pod_cidrs: [Default::default(); POD_CIDRS_MAX],
        service_cidr_count: 0,
        service_cidrs: [Default::default(); SERVICE_CIDRS_MAX],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_and_endpoints_follow_each_other() {
        let services = Services::tcp("10.96.0.1:80".parse().unwrap(), 3);
        assert_eq!(nth_address(services.frontend.ip(), 2), IpAddr::from([10, 96, 0, 3]));
        assert!(services.is_backend([10, 244, 0, 1].into()) && services.is_backend([10, 244, 0, 10].into()));
        assert!(!services.is_backend([10, 244, 0, 0].into()) && !services.is_backend([10, 244, 0, 11].into()));
        assert_eq!((backend(&services, 10, v4).service_id, frontend(&services, 1).cluster_first), (2, 10));
    }
}
