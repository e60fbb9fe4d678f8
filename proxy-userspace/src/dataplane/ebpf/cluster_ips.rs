//! Which addresses are some Service's: what the packets ask that reach no frontend.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::encode::UserAddress;
use crate::model::ServiceSnapshot;

/// The ClusterIPs of one family, as the kernel has them.
#[derive(Debug)]
pub(super) struct ClusterIps<A> {
    present: BTreeSet<A>,
    /// Those of them outside of the service networks.
    outside: BTreeSet<A>,
    limit: usize,
}

impl<A: UserAddress> ClusterIps<A> {
    /// What the kernel has, in a map with room for `limit` addresses.
    pub(super) fn new(present: BTreeSet<A>, limit: usize) -> Self {
        Self { present, outside: BTreeSet::new(), limit }
    }

    /// The addresses that the kernel has been given.
    pub(super) fn present(&self) -> &BTreeSet<A> {
        &self.present
    }

    /// Whether any of them lies outside of the service networks, so that the programs must look further than at those.
    pub(super) fn anywhere(&self) -> bool {
        !self.outside.is_empty()
    }

    /// Everything that has to be written to get from what the kernel has to `desired`: addresses, and whether each is in use.
    pub(super) fn replace(&mut self, desired: &ServiceSnapshot) -> Vec<(A, bool)> {
        let wanted = |address: &A| desired.cluster_ips.contains_key(&address.to_ip());
        let gone: Vec<IpAddr> = self.present.iter().filter(|ip| !wanted(ip)).map(|ip| ip.to_ip()).collect();
        self.outside.clear();
        let mut writes = self.change(gone.iter(), desired);
        writes.extend(self.change(desired.cluster_ips.keys(), desired));
        writes
    }

    /// What has to be written for the addresses that changed. Beyond the map's room they are left out: their unknown ports are
    /// then dropped, not refused.
    pub(super) fn change<'a>(
        &mut self,
        changed: impl Iterator<Item = &'a IpAddr>,
        desired: &ServiceSnapshot,
    ) -> Vec<(A, bool)> {
        let mut writes = Vec::new();
        for ip in changed {
            let Some(address) = A::from_ip(*ip) else { continue };
            if !desired.cluster_ips.contains_key(ip) {
                self.outside.remove(&address);
                if self.present.remove(&address) {
                    writes.push((address, false));
                }
            } else if self.present.contains(&address) || self.present.len() < self.limit {
                if !inside(&desired.node.service_cidrs, ip) {
                    self.outside.insert(address);
                }
                if self.present.insert(address) {
                    writes.push((address, true));
                }
            }
        }
        writes
    }
}

fn inside(networks: &[IpNet], address: &IpAddr) -> bool {
    networks.iter().any(|network| network.contains(address))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proxy_common::V4;

    use super::*;
    use crate::model::NodeConfig;

    fn snapshot(addresses: &[&str]) -> ServiceSnapshot {
        let service_cidrs = vec!["10.96.0.0/16".parse().unwrap()];
        ServiceSnapshot {
            node: Arc::new(NodeConfig { service_cidrs, ..NodeConfig::default() }),
            cluster_ips: addresses.iter().map(|address| (address.parse().unwrap(), 1)).collect(),
            ..ServiceSnapshot::default()
        }
    }

    fn v4(address: &str) -> V4 {
        V4::from_ip(address.parse().unwrap()).unwrap()
    }

    #[test]
    fn only_differences_of_the_family_are_written() {
        let mut ips = ClusterIps::new([v4("10.96.0.1"), v4("10.96.0.2")].into(), 10);
        let desired = snapshot(&["10.96.0.2", "10.96.0.3", "fd00:96::1"]);
        assert_eq!(ips.replace(&desired), [(v4("10.96.0.1"), false), (v4("10.96.0.3"), true)]);
        assert_eq!(ips.replace(&desired), []);
        assert!(!ips.anywhere());
    }

    #[test]
    fn an_address_outside_of_the_service_networks_is_noticed_while_it_is_there() {
        let mut ips = ClusterIps::new(BTreeSet::new(), 10);
        let outside: IpAddr = "192.168.7.7".parse().unwrap();
        assert_eq!(ips.change([outside].iter(), &snapshot(&["192.168.7.7"])), [(v4("192.168.7.7"), true)]);
        assert!(ips.anywhere());
        ips.replace(&snapshot(&["192.168.7.7"]));
        assert!(ips.anywhere(), "looked at anew");
        assert_eq!(ips.change([outside].iter(), &snapshot(&[])), [(v4("192.168.7.7"), false)]);
        assert!(!ips.anywhere());
    }

    #[test]
    fn a_full_map_takes_no_more() {
        let mut ips = ClusterIps::new([v4("10.96.0.1")].into(), 2);
        let desired = snapshot(&["10.96.0.1", "10.96.0.2", "10.96.0.3"]);
        assert_eq!(ips.replace(&desired), [(v4("10.96.0.2"), true)]);
    }
}
