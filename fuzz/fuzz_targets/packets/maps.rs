//! In place of the programs' `maps`: the two families, without a map.

use std::net::IpAddr;

use proxy_common::{Address, V4, V6};

/// What the parser asks of a family.
pub trait Family {
    /// Its addresses.
    type A: Address;
    /// `AF_INET` or `AF_INET6` of Linux.
    const AF: u8;
}

pub struct Ipv4;

impl Family for Ipv4 {
    type A = V4;
    const AF: u8 = 2;
}

pub struct Ipv6;

impl Family for Ipv6 {
    type A = V6;
    const AF: u8 = 10;
}

/// An address as this process knows it.
pub trait Socket: Address {
    fn ip(&self) -> IpAddr;
}

impl Socket for V4 {
    fn ip(&self) -> IpAddr {
        self.octets().into()
    }
}

impl Socket for V6 {
    fn ip(&self) -> IpAddr {
        self.octets().into()
    }
}
