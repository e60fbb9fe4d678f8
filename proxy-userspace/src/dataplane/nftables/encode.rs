//! Keys and values of the sets and maps, byte by byte as nf_tables keeps them.

use std::net::{IpAddr, SocketAddr};

use crate::model::{FrontendAddress, IpFamily, Protocol, ServicePortName};

/// The longest key: two IPv6 addresses.
const LENGTH_MAX: usize = 32;

/// A key or value of a few fields, each padded to four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Words {
    bytes: [u8; LENGTH_MAX],
    length: usize,
}

impl Words {
    /// Nothing yet.
    pub(super) fn new() -> Self {
        Self { bytes: [0; LENGTH_MAX], length: 0 }
    }

    /// What was put in.
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// Appends an address in network byte order.
    pub(super) fn address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.put(&address.octets()),
            IpAddr::V6(address) => self.put(&address.octets()),
        }
    }

    /// Appends address and port.
    pub(super) fn socket(self, socket: SocketAddr) -> Self {
        self.address(socket.ip()).port(socket.port())
    }

    /// Appends a port in network byte order.
    pub(super) fn port(self, port: u16) -> Self {
        self.put(&port.to_be_bytes())
    }

    /// Appends a protocol's number.
    pub(super) fn protocol(self, protocol: Protocol) -> Self {
        self.put(&[protocol as u8])
    }

    /// Appends a number in host byte order.
    pub(super) fn number(self, number: u32) -> Self {
        self.put(&number.to_ne_bytes())
    }

    fn put(mut self, value: &[u8]) -> Self {
        if let Some(place) = self.bytes.get_mut(self.length..self.length + value.len()) {
            place.copy_from_slice(value);
            self.length += value.len().next_multiple_of(4);
        }
        self
    }
}

/// Key of a frontend: address, protocol, port. NodePorts have the unspecified address, which nobody else can have.
pub(super) fn frontend(family: IpFamily, address: FrontendAddress, protocol: Protocol, port: u16) -> Words {
    let address = match address {
        FrontendAddress::Ip(address) => address,
        FrontendAddress::NodePort => unspecified(family),
    };
    Words::new().address(address).protocol(protocol).port(port)
}

/// 0.0.0.0 or ::.
pub(super) fn unspecified(family: IpFamily) -> IpAddr {
    match family {
        IpFamily::V4 => IpAddr::from([0; 4]),
        IpFamily::V6 => IpAddr::from([0u8; 16]),
    }
}

/// The id that a ServicePort gets if no other has it: the same in every process, so that what clients are stuck to outlives a
/// restart. FNV-1a of its name.
pub(super) fn preferred_id(name: &ServicePortName) -> u32 {
    let protocol = [name.protocol as u8];
    let parts: [&[u8]; 7] =
        [name.namespace.as_bytes(), b"/", name.service.as_bytes(), b":", name.port.as_bytes(), b"/", &protocol];
    parts.into_iter().flatten().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NameParts;

    #[test]
    fn fields_fill_whole_registers() {
        let key = frontend(IpFamily::V4, FrontendAddress::Ip("10.96.0.1".parse().unwrap()), Protocol::Udp, 53);
        assert_eq!(key.bytes(), [10, 96, 0, 1, 17, 0, 0, 0, 0, 53, 0, 0]);
        let key = frontend(IpFamily::V6, FrontendAddress::NodePort, Protocol::Sctp, 0x1234);
        assert_eq!(key.bytes(), [&[0; 16][..], &[132, 0, 0, 0, 0x12, 0x34, 0, 0]].concat());
        let socket = Words::new().number(7).socket("[fd00::1]:80".parse().unwrap());
        assert_eq!(socket.bytes().len(), 4 + 16 + 4);
        assert_eq!(socket.bytes()[..4], 7u32.to_ne_bytes());
    }

    #[test]
    fn ids_depend_on_every_part_of_the_name_and_on_nothing_else() {
        let name = |namespace: &str, service: &str, port: &str, protocol| {
            ServicePortName::new(NameParts {
                namespace: namespace.into(),
                service: service.into(),
                port: port.into(),
                protocol,
                family: IpFamily::V4,
            })
        };
        let ids = [
            name("a", "b", "c", Protocol::Tcp),
            name("a", "b", "", Protocol::Tcp),
            name("a", "bc", "", Protocol::Tcp),
            name("ab", "c", "", Protocol::Tcp),
            name("a", "b", "c", Protocol::Udp),
        ]
        .map(|name| preferred_id(&name));
        let distinct: std::collections::BTreeSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len());
        // Written down: another value would part clients from their endpoints at an update of this program.
        assert_eq!(preferred_id(&name("default", "web", "", Protocol::Tcp)), ID_OF_DEFAULT_WEB);
    }

    const ID_OF_DEFAULT_WEB: u32 = fnv(b"default/web:/\x06");

    const fn fnv(bytes: &[u8]) -> u32 {
        let (mut hash, mut index) = (2_166_136_261u32, 0);
        while index < bytes.len() {
            hash = (hash ^ bytes[index] as u32).wrapping_mul(16_777_619);
            index += 1;
        }
        hash
    }
}
