//! Addresses that this machine has though no interface of it does: routes of type `local`, each with a protocol number that makes it ours.
//!
//! A socket can go on using such an address as its own, and what is sent to it is delivered here (net/ipv4/devinet.c `__ip_dev_find`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::SysError;
use crate::divert::{DELETE_ROUTE, LOOPBACK_INDEX, NEW_ROUTE, SCOPE_HOST, TYPE_LOCAL};
use crate::netlink::{ACK, CREATE, DUMP, EXCL, Socket, attribute, find};

/// `RTM_GETROUTE` (include/uapi/linux/rtnetlink.h).
const GET_ROUTE: u16 = 26;
/// `RT_TABLE_LOCAL`.
const TABLE_LOCAL: u8 = 255;
/// Ours among the numbers of routing programs (`rtm_protocol`): the letter "t".
const PROTOCOL: u8 = b't';
/// `RTA_DST`, `RTA_OIF`, `RTA_PRIORITY`.
const DESTINATION: u16 = 1;
const INTERFACE: u16 = 4;
const PRIORITY: u16 = 6;
/// Behind the route of an interface that has the address as well, whose priority is 0: the letters "tr".
const OUR_PRIORITY: u32 = 0x7472;
/// Length of `struct rtmsg`.
const ROUTE_BYTES: usize = 12;

/// Gives the calling thread's network namespace this address; that it has it is no error.
///
/// # Errors
/// When the kernel refuses, for instance without `CAP_NET_ADMIN`.
pub fn add(address: IpAddr) -> Result<(), SysError> {
    match request(NEW_ROUTE, ACK | CREATE | EXCL, address) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.map_err(|source| SysError::new("add a local route to", address.to_string(), source)),
    }
}

/// Takes it away again; that it is not there is no error. The address of an interface stays.
///
/// # Errors
/// When the kernel refuses.
pub fn remove(address: IpAddr) -> Result<(), SysError> {
    match request(DELETE_ROUTE, ACK, address) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        result => result.map_err(|source| SysError::new("remove the local route to", address.to_string(), source)),
    }
}

/// All addresses that [`add`] has given to this namespace, by whichever process.
///
/// # Errors
/// When the routes can't be read.
pub fn all() -> Result<Vec<IpAddr>, SysError> {
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        // There may be a million others.
        let body = |buffer: &mut Vec<u8>| {
            buffer.extend_from_slice(&[byte(family), 0, 0, 0, TABLE_LOCAL, PROTOCOL, 0, TYPE_LOCAL, 0, 0, 0, 0]);
        };
        let dumped = Socket::open(libc::NETLINK_ROUTE).and_then(|mut socket| {
            socket.filter_dumps()?;
            socket.ask(GET_ROUTE, DUMP, body, |message| {
                found.extend(parse(message.body));
                Ok(())
            })
        });
        match dumped {
            // A kernel without IPv6.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => {}
            dumped => dumped.map_err(|source| SysError::new("read", "the local routes", source))?,
        }
    }
    Ok(found)
}

fn request(kind: u16, flags: u16, address: IpAddr) -> io::Result<()> {
    let body = |buffer: &mut Vec<u8>| {
        match address {
            IpAddr::V4(address) => put(buffer, libc::AF_INET, &address.octets()),
            IpAddr::V6(address) => put(buffer, libc::AF_INET6, &address.octets()),
        };
    };
    Socket::open(libc::NETLINK_ROUTE)?.ask(kind, flags, body, |_| Ok(()))
}

/// `struct rtmsg` and attributes.
fn put(buffer: &mut Vec<u8>, family: i32, octets: &[u8]) {
    let bits = octets.len() * 8;
    let length = u8::try_from(bits).unwrap_or_default();
    buffer.extend_from_slice(&[byte(family), length, 0, 0, TABLE_LOCAL, PROTOCOL, SCOPE_HOST, TYPE_LOCAL, 0, 0, 0, 0]);
    attribute(buffer, DESTINATION, octets);
    attribute(buffer, INTERFACE, &LOOPBACK_INDEX.to_ne_bytes());
    attribute(buffer, PRIORITY, &OUR_PRIORITY.to_ne_bytes());
}

fn byte(number: i32) -> u8 {
    u8::try_from(number).unwrap_or_default()
}

/// The address of a route, if it is one of ours.
fn parse(body: &[u8]) -> Option<IpAddr> {
    let (header, attributes) = body.split_at_checked(ROUTE_BYTES)?;
    // IPv6 has no scopes.
    header.get(4..8).filter(|kind| matches!(kind, [TABLE_LOCAL, PROTOCOL, _, TYPE_LOCAL]))?;
    let octets = find(attributes, DESTINATION)?;
    let v4 = <[u8; 4]>::try_from(octets).map(|octets| Ipv4Addr::from(octets).into());
    v4.or_else(|_| <[u8; 16]>::try_from(octets).map(|octets| Ipv6Addr::from(octets).into())).ok()
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::Netns;

    #[test]
    fn an_address_comes_and_goes_without_an_interface() {
        let work = || {
            let lo_up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
            assert!(lo_up.unwrap().success());
            let addresses: [IpAddr; 2] = ["10.96.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
            for address in addresses {
                let there = UdpSocket::bind("[::]:0").unwrap();
                let port = there.local_addr().unwrap().port();
                let here = UdpSocket::bind("[::]:0").unwrap();
                assert!(here.send_to(b"x", (address, port)).is_err(), "{address}");
                add(address).unwrap();
                add(address).unwrap();
                here.send_to(b"x", (address, port)).unwrap();
                assert_eq!(there.recv(&mut [0]).unwrap(), 1);
            }
            assert_eq!(all().unwrap(), addresses);
            for address in addresses {
                remove(address).unwrap();
                remove(address).unwrap();
            }
            assert_eq!(all().unwrap(), <[IpAddr; 0]>::default());
        };
        Netns::anonymous().unwrap().run(work).unwrap();
    }
}
