//! Sets and maps of nf_tables as the backends that use them have them: keys and values byte by byte, and of which fields they are.

use std::net::{IpAddr, SocketAddr};

use node_sys::nftables::{Family, Field, Nftables};

use crate::model::{IpFamily, Protocol};

/// The longest key: an IPv6 frontend and a client.
const LENGTH_MAX: usize = 40;

/// Whether there is a table of this name in either family.
pub(super) fn has_table(name: &str) -> bool {
    let has = |family| Nftables::open().and_then(|mut kernel| kernel.table(kernel_family(family), name));
    [IpFamily::V4, IpFamily::V6].into_iter().any(|family| has(family).is_ok_and(|table| table.is_some()))
}

/// A key or value of a few fields, each padded to four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Words {
    bytes: [u8; LENGTH_MAX],
    length: u8,
}

impl Words {
    /// Nothing yet.
    pub(super) fn new() -> Self {
        Self { bytes: [0; LENGTH_MAX], length: 0 }
    }

    /// Bytes as they were read; of more than 40, the first 40.
    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        Self::new().put(bytes.get(..LENGTH_MAX).unwrap_or(bytes))
    }

    /// What was put in.
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.length)).unwrap_or_default()
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
        let start = usize::from(self.length);
        if let Some(place) = self.bytes.get_mut(start..start + value.len()) {
            place.copy_from_slice(value);
            self.length = u8::try_from(start + value.len().next_multiple_of(4)).unwrap_or(u8::MAX);
        }
        self
    }
}

/// A number alone.
pub(super) const NUMBER: [Field; 1] = [Field::Number];

/// Keys and values that hold addresses.
pub(super) struct Fields {
    pub(super) address: &'static [Field],
    pub(super) pair: &'static [Field],
    pub(super) frontend: &'static [Field],
    pub(super) client_of_frontend: &'static [Field],
    pub(super) endpoint: &'static [Field],
    pub(super) service_endpoint: &'static [Field],
    pub(super) client: &'static [Field],
    pub(super) range: &'static [Field],
}

impl Fields {
    /// Those of a table of `family`.
    pub(super) fn of(family: IpFamily) -> &'static Self {
        match family {
            IpFamily::V4 => &Self {
                address: &[Field::Ipv4],
                pair: &[Field::Ipv4, Field::Ipv4],
                frontend: &[Field::Ipv4, Field::Protocol, Field::Port],
                client_of_frontend: &[Field::Ipv4, Field::Protocol, Field::Port, Field::Ipv4],
                endpoint: &[Field::Ipv4, Field::Port],
                service_endpoint: &[Field::Number, Field::Ipv4, Field::Port],
                client: &[Field::Ipv4, Field::Number],
                range: &[Field::Number, Field::Ipv4],
            },
            IpFamily::V6 => &Self {
                address: &[Field::Ipv6],
                pair: &[Field::Ipv6, Field::Ipv6],
                frontend: &[Field::Ipv6, Field::Protocol, Field::Port],
                client_of_frontend: &[Field::Ipv6, Field::Protocol, Field::Port, Field::Ipv6],
                endpoint: &[Field::Ipv6, Field::Port],
                service_endpoint: &[Field::Number, Field::Ipv6, Field::Port],
                client: &[Field::Ipv6, Field::Number],
                range: &[Field::Number, Field::Ipv6],
            },
        }
    }
}

/// The family of a table in the kernel's words.
pub(super) fn kernel_family(family: IpFamily) -> Family {
    match family {
        IpFamily::V4 => Family::Ipv4,
        IpFamily::V6 => Family::Ipv6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_fill_whole_registers() {
        let key = Words::new().address("10.96.0.1".parse().unwrap()).protocol(Protocol::Udp).port(53);
        assert_eq!(key.bytes(), [10, 96, 0, 1, 17, 0, 0, 0, 0, 53, 0, 0]);
        let key = Words::new().address("::".parse().unwrap()).protocol(Protocol::Sctp).port(0x1234);
        assert_eq!(key.bytes(), [&[0; 16][..], &[132, 0, 0, 0, 0x12, 0x34, 0, 0]].concat());
        let socket = Words::new().number(7).socket("[fd00::1]:80".parse().unwrap());
        assert_eq!(socket.bytes().len(), 4 + 16 + 4);
        assert_eq!(socket.bytes()[..4], 7u32.to_ne_bytes());
    }

    #[test]
    fn what_was_read_is_what_was_written() {
        let key = Words::new().number(7).address("fd00::1".parse().unwrap());
        assert_eq!(Words::from_bytes(key.bytes()), key);
    }
}
