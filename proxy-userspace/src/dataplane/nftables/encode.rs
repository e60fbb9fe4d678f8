//! Keys and ids that several parts of the plan need.

use std::net::IpAddr;

use crate::dataplane::elements::Words;
use crate::model::{FrontendAddress, IpFamily, Protocol, ServicePortName};

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
