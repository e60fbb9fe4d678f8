//! Firewall marks: what nf_tables tells IPVS of a packet.
//!
//! ```text
//! 0111 m0ii iiii iiii 00ii iiii iiii iiii
//! tag  |                                    IPVS compares the whole mark, so a packet carries tag and id only;
//!      masquerade, in maps and in            the connection's mark remembers both and the masquerade bit.
//!      the connection's mark                 Bits 14 and 15 stay clear: kube-proxy's and kubelet's rules test them.
//! ```

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

use crate::model::{EndpointSet, ServicePortName};

/// What our marks have in common.
pub(super) const TAG: u32 = 0x7000_0000;
/// The bits of [`TAG`].
pub(super) const TAG_MASK: u32 = 0xf000_0000;
/// The connection's source becomes the node's.
pub(super) const MASQUERADE: u32 = 0x0800_0000;
/// In maps only: the packet is refused.
pub(super) const REJECT: u32 = TAG | 1;
/// In maps only: the packet is dropped.
pub(super) const DROP: u32 = TAG | 2;
/// Ids below mean something else.
const FIRST_ID: u32 = 16;
/// Bits of an id: room for sixteen million virtual services.
const ID_BITS: u32 = 24;

/// Whom a mark stands for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    /// One list of endpoints of a ServicePort.
    Set(ServicePortName, EndpointSet),
    /// One endpoint of a ServicePort with affinity.
    Endpoint(ServicePortName, SocketAddr),
}

/// Who has which mark. A process that starts gives the same marks again, unless two owners want the same one.
#[derive(Debug, Default)]
pub(super) struct Marks {
    by_owner: HashMap<Owner, u32>,
    used: HashSet<u32>,
}

impl Marks {
    /// The mark of `owner`, a new one if it has none.
    pub(super) fn of(&mut self, owner: &Owner) -> u32 {
        if let Some(mark) = self.by_owner.get(owner) {
            return *mark;
        }
        // Ends: there are more ids than a node can have endpoints.
        let mut id = preferred_id(owner);
        while id < FIRST_ID || !self.used.insert(mark_of(id)) {
            id = (id + 1) % (1 << ID_BITS);
        }
        self.by_owner.insert(owner.clone(), mark_of(id));
        mark_of(id)
    }

    /// Gives back the marks of a ServicePort that is gone, and of its endpoints.
    pub(super) fn release(&mut self, owner: &Owner) {
        if let Some(mark) = self.by_owner.remove(owner) {
            self.used.remove(&mark);
        }
    }
}

fn mark_of(id: u32) -> u32 {
    TAG | (id >> 14) << 16 | (id & 0x3fff)
}

/// FNV-1a of everything in the owner's name: the same in every process.
fn preferred_id(owner: &Owner) -> u32 {
    let text = match owner {
        Owner::Set(name, set) => format!("{name} {set:?}"),
        Owner::Endpoint(name, address) => format!("{name} {address}"),
    };
    let hash = text.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    (hash >> ID_BITS ^ hash) & ((1 << ID_BITS) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{IpFamily, NameParts, Protocol};

    fn owner(number: u16) -> Owner {
        let name = ServicePortName::new(NameParts {
            namespace: "default".into(),
            service: "web".into(),
            port: "".into(),
            protocol: Protocol::Tcp,
            family: IpFamily::V4,
        });
        Owner::Endpoint(name, SocketAddr::from(([10, 0, 0, 1], number)))
    }

    #[test]
    fn marks_are_distinct_stable_and_keep_clear_of_other_bits() {
        let (mut first, mut second) = (Marks::default(), Marks::default());
        let marks: Vec<u32> = (1..=20_000).map(|number| first.of(&owner(number))).collect();
        assert_eq!(marks.iter().collect::<HashSet<_>>().len(), marks.len());
        for mark in &marks {
            assert_eq!((mark & TAG_MASK, mark & (MASQUERADE | 0xc000)), (TAG, 0), "{mark:#x}");
            assert!(![REJECT, DROP].contains(mark));
        }
        assert_eq!(first.of(&owner(1)), marks[0]);
        assert_eq!(second.of(&owner(1)), marks[0]);
        first.release(&owner(1));
        assert_eq!(first.of(&owner(1)), marks[0]);
    }
}
