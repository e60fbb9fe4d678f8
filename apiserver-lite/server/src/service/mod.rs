//! Cluster IPs and node ports of Services: taken before a Service is written, given back when the write fails or the Service goes.
//!
//! Each cluster IP is also an IPAddress object, as in every cluster since Kubernetes 1.33. The pools in memory are derived from the
//! store when the server starts; the object is what a second server would see.

mod allocate;
mod families;
mod fields;
mod pool;

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use serde_json::Value;

use pool::{AddressPool, Family, PoolError, PortPool};

/// The pools of the cluster.
#[derive(Debug)]
pub(crate) struct ServiceAllocator {
    pools: Mutex<Pools>,
    /// The families with a range, the default one first.
    families: Vec<Family>,
    ranges: Vec<IpNet>,
}

#[derive(Debug)]
struct Pools {
    addresses: Vec<AddressPool>,
    ports: PortPool,
}

impl ServiceAllocator {
    /// Empty pools. `ranges` holds one range per family, the default family first.
    pub(crate) fn new(ranges: &[IpNet], node_ports: RangeInclusive<u16>) -> Self {
        let addresses: Vec<AddressPool> = ranges.iter().copied().map(AddressPool::new).collect();
        Self {
            families: addresses.iter().map(AddressPool::family).collect(),
            ranges: addresses.iter().map(AddressPool::range).collect(),
            pools: Mutex::new(Pools { addresses, ports: PortPool::new(node_ports) }),
        }
    }

    /// The ranges, the default one first.
    pub(crate) fn ranges(&self) -> &[IpNet] {
        &self.ranges
    }

    /// The first address of the default range, which the Service `kubernetes` has.
    pub(crate) fn kubernetes_ip(&self) -> Option<IpAddr> {
        self.lock().addresses.first().map(AddressPool::first)
    }

    /// Marks what a stored Service has as taken. A collision between stored Services stays as it is.
    pub(crate) fn adopt(&self, service: &Value) {
        let mut pools = self.lock();
        for ip in fields::texts(service, "clusterIPs").iter().filter_map(|ip| ip.parse().ok()) {
            // Taken or outside of today's ranges: nothing to mark.
            let _ = pools.take_ip(ip);
        }
        let health = fields::port(service, "healthCheckNodePort");
        for port in fields::node_ports(service).into_iter().chain(health) {
            let _ = pools.ports.take(port);
        }
    }

    // A panic while the lock is held can't happen: the pools only count.
    fn lock(&self) -> MutexGuard<'_, Pools> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_ip(&self, ip: IpAddr) -> Result<(), PoolError> {
        self.lock().take_ip(ip)
    }

    fn take_next_ip(&self, family: Family) -> Result<IpAddr, PoolError> {
        let mut pools = self.lock();
        let pool = pools.addresses.iter_mut().find(|pool| pool.family() == family).ok_or(PoolError::OtherNetwork)?;
        pool.take_next(fastrand::u128(..))
    }

    fn take_port(&self, port: u16) -> Result<(), PoolError> {
        self.lock().ports.take(port)
    }

    fn take_next_port(&self) -> Result<u16, PoolError> {
        self.lock().ports.take_next(fastrand::u128(..))
    }

    fn release(&self, ips: &[IpAddr], ports: &[u16]) {
        let mut pools = self.lock();
        for ip in ips {
            pools.addresses.iter_mut().for_each(|pool| pool.release(*ip));
        }
        for port in ports {
            pools.ports.release(*port);
        }
    }
}

impl Pools {
    fn take_ip(&mut self, ip: IpAddr) -> Result<(), PoolError> {
        let family = Family::of(ip);
        let pool = self.addresses.iter_mut().find(|pool| pool.family() == family).ok_or(PoolError::OtherNetwork)?;
        pool.take(ip)
    }
}
