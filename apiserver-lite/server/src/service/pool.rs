//! Pools of cluster IPs and node ports: which are taken, which one is next, with the answers of kube-apiserver's allocators.
//!
//! Both pools keep a lower band free for requested values as long as the upper band has room, so that a fixed address in a manifest
//! seldom collides with one that was given out (`ipallocator`, `portallocator`).

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::IpNet;

/// An IP family as Services spell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        match text {
            "IPv4" => Some(Self::V4),
            "IPv6" => Some(Self::V6),
            _ => None,
        }
    }

    pub(crate) fn other(self) -> Self {
        match self {
            Self::V4 => Self::V6,
            Self::V6 => Self::V4,
        }
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a value could not be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PoolError {
    #[error("range is full")]
    Full,
    #[error("provided IP is already allocated")]
    IpTaken,
    #[error("provided port is already allocated")]
    PortTaken,
    #[error("the provided network does not match the current range")]
    OtherNetwork,
    #[error("the provided IP ({ip}) is not in the valid range. The range of valid IPs is {range}")]
    IpOutside { ip: IpAddr, range: IpNet },
    #[error("provided port is not in the valid range. The range of valid ports is {}-{}", .range.start(), .range.end())]
    PortOutside { range: RangeInclusive<u16> },
}

/// Which numbers of a range are taken.
#[derive(Debug)]
struct Numbers {
    first: u128,
    last: u128,
    /// Where the band begins from which numbers are given out first.
    upper: u128,
    taken: HashSet<u128>,
}

impl Numbers {
    fn new(first: u128, last: u128, offset: u128) -> Self {
        Self { first, last, upper: first.saturating_add(offset).min(last), taken: HashSet::new() }
    }

    fn take_next(&mut self, random: u128) -> Option<u128> {
        let upper = self.upper..=self.last;
        let lower = self.first..=self.upper.saturating_sub(1);
        let number = free_in(&self.taken, &upper, random).or_else(|| free_in(&self.taken, &lower, random))?;
        self.taken.insert(number);
        Some(number)
    }
}

/// The first free number of a band, from a random place onward and around.
fn free_in(taken: &HashSet<u128>, band: &RangeInclusive<u128>, random: u128) -> Option<u128> {
    let size = band.end().checked_sub(*band.start())?.checked_add(1)?;
    // More numbers than are taken need not be looked at, which bounds the walk in a huge IPv6 range.
    let walk_max = size.min(taken.len() as u128 + 1);
    (0..walk_max).map(|step| band.start() + (random % size + step) % size).find(|number| !taken.contains(number))
}

/// The cluster IPs of one family.
#[derive(Debug)]
pub(crate) struct AddressPool {
    range: IpNet,
    numbers: Numbers,
}

impl AddressPool {
    pub(crate) fn new(range: IpNet) -> Self {
        let range = range.trunc();
        let (network, broadcast) = (number_of(range.network()), number_of(range.broadcast()));
        // The network address is never given out, nor is the last one of an IPv4 range.
        let last = if range.addr().is_ipv4() { broadcast.saturating_sub(1) } else { broadcast };
        let first = network.saturating_add(1).min(last);
        let size = broadcast - network;
        let offset = if size < 16 { 0 } else { (size / 16).clamp(16, 256) };
        Self { range, numbers: Numbers::new(first, last, offset) }
    }

    pub(crate) fn family(&self) -> Family {
        Family::of(self.range.addr())
    }

    pub(crate) fn range(&self) -> IpNet {
        self.range
    }

    /// The first address, which belongs to the Service `kubernetes`.
    pub(crate) fn first(&self) -> IpAddr {
        self.address_of(self.numbers.first)
    }

    /// Takes a requested address.
    pub(crate) fn take(&mut self, ip: IpAddr) -> Result<(), PoolError> {
        if !self.range.contains(&ip) {
            return Err(PoolError::OtherNetwork);
        }
        let number = number_of(ip);
        if number < self.numbers.first || number > self.numbers.last {
            return Err(PoolError::IpOutside { ip, range: self.range });
        }
        if self.numbers.taken.insert(number) { Ok(()) } else { Err(PoolError::IpTaken) }
    }

    /// Takes any free address.
    pub(crate) fn take_next(&mut self, random: u128) -> Result<IpAddr, PoolError> {
        let number = self.numbers.take_next(random).ok_or(PoolError::Full)?;
        Ok(self.address_of(number))
    }

    pub(crate) fn release(&mut self, ip: IpAddr) {
        if Family::of(ip) == self.family() {
            self.numbers.taken.remove(&number_of(ip));
        }
    }

    fn address_of(&self, number: u128) -> IpAddr {
        match self.family() {
            Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(u32::try_from(number).unwrap_or_default())),
            Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(number)),
        }
    }
}

fn number_of(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

/// The node ports of the cluster.
#[derive(Debug)]
pub(crate) struct PortPool {
    range: RangeInclusive<u16>,
    numbers: Numbers,
}

impl PortPool {
    pub(crate) fn new(range: RangeInclusive<u16>) -> Self {
        let (first, last) = (u128::from(*range.start()), u128::from(*range.end()));
        let size = last.saturating_sub(first) + 1;
        let offset = if size <= 16 { 0 } else { (size / 32).clamp(16, 128) };
        Self { range, numbers: Numbers::new(first, last, offset) }
    }

    /// Takes a requested port.
    pub(crate) fn take(&mut self, port: u16) -> Result<(), PoolError> {
        if !self.range.contains(&port) {
            return Err(PoolError::PortOutside { range: self.range.clone() });
        }
        if self.numbers.taken.insert(u128::from(port)) { Ok(()) } else { Err(PoolError::PortTaken) }
    }

    /// Takes any free port.
    pub(crate) fn take_next(&mut self, random: u128) -> Result<u16, PoolError> {
        let number = self.numbers.take_next(random).ok_or(PoolError::Full)?;
        u16::try_from(number).map_err(|_| PoolError::Full)
    }

    pub(crate) fn release(&mut self, port: u16) {
        self.numbers.taken.remove(&u128::from(port));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(range: &str) -> AddressPool {
        AddressPool::new(range.parse().unwrap())
    }

    #[test]
    fn gives_out_every_address_once() {
        let mut pool = pool("10.0.0.0/29");
        let mut seen: Vec<IpAddr> = (0..6).map(|n| pool.take_next(n * 7).unwrap()).collect();
        assert_eq!(pool.take_next(3), Err(PoolError::Full));
        seen.sort();
        let wanted: Vec<IpAddr> = (1..=6).map(|n| IpAddr::from([10, 0, 0, n])).collect();
        assert_eq!(seen, wanted);
        pool.release(IpAddr::from([10, 0, 0, 3]));
        assert_eq!(pool.take_next(99), Ok(IpAddr::from([10, 0, 0, 3])));
    }

    #[test]
    fn requested_addresses_are_checked() {
        let mut pool = pool("10.96.0.0/16");
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        pool.take(ip("10.96.0.10")).unwrap();
        assert_eq!(pool.take(ip("10.96.0.10")), Err(PoolError::IpTaken));
        assert_eq!(pool.take(ip("10.97.0.1")), Err(PoolError::OtherNetwork));
        assert!(matches!(pool.take(ip("10.96.0.0")), Err(PoolError::IpOutside { .. })));
        assert!(matches!(pool.take(ip("10.96.255.255")), Err(PoolError::IpOutside { .. })));
        assert_eq!(pool.first(), ip("10.96.0.1"));
    }

    #[test]
    fn upper_band_goes_first() {
        let mut pool = pool("10.96.0.0/24");
        for random in 0..200 {
            let IpAddr::V4(ip) = pool.take_next(random).unwrap() else { panic!("family") };
            assert!(ip.octets()[3] > 16, "{ip}");
        }
        let mut six = AddressPool::new("fd00:10:96::/112".parse().unwrap());
        assert!(six.range().contains(&six.take_next(u128::MAX).unwrap()));
        assert_eq!(six.first(), "fd00:10:96::1".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn ports_are_taken_once() {
        let mut ports = PortPool::new(30000..=30003);
        ports.take(30001).unwrap();
        assert_eq!(ports.take(30001), Err(PoolError::PortTaken));
        let outside = ports.take(80).unwrap_err();
        assert_eq!(
            outside.to_string(),
            "provided port is not in the valid range. The range of valid ports is 30000-30003"
        );
        for random in 0..3 {
            ports.take_next(random).unwrap();
        }
        assert_eq!(ports.take_next(0), Err(PoolError::Full));
    }
}
