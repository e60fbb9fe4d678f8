//! Names: the two tables, the kernel's hooks that we use, and every chain of ours.

use std::fmt;
use std::net::SocketAddr;

use ring::digest::{Context, SHA256};

use crate::model::{Protocol, ServicePortName};

/// What every chain of ours begins with; nothing else on the node is ever touched.
pub(super) const PREFIX: &str = "TRAMA-";

/// NodePorts that share a chain: the chain's ports begin at a multiple of this.
pub(super) const PORT_BLOCK: u16 = 64;

/// A table of iptables, in the order in which they are written: who is refused must be refused before he finds no translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Refusals, and acceptance of what was translated.
    Filter,
    /// Translation.
    Nat,
}

impl Table {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Filter, Self::Nat];

    /// Its name in commands.
    pub fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
        }
    }
}

/// Names a ServicePort in chain names: the first 64 bits of SHA-256 of its full name. The planner refuses a ServicePort whose id
/// another one has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ServiceId(u64);

impl ServiceId {
    pub(super) fn of(name: &ServicePortName) -> Self {
        Self(digest(name, ""))
    }
}

impl fmt::Display for ServiceId {
    /// 16 letters from a to p, one for each four bits: letters only, so that these names sort behind every other of ours (see
    /// [`Chain`]).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        letters(self.0, f)
    }
}

/// Names the list of clients that stay with one endpoint of one ServicePort (`/proc/net/xt_recent/NAME`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ClientList(u64);

impl ClientList {
    pub(super) fn of(name: &ServicePortName, endpoint: SocketAddr) -> Self {
        Self(digest(name, &endpoint.to_string()))
    }
}

impl fmt::Display for ClientList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        letters(self.0, f)
    }
}

fn letters(number: u64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for byte in number.to_be_bytes() {
        write!(f, "{}{}", char::from(b'a' + (byte >> 4)), char::from(b'a' + (byte & 15)))?;
    }
    Ok(())
}

/// Parts are separated by a byte that no name holds.
fn digest(name: &ServicePortName, more: &str) -> u64 {
    let mut context = Context::new(&SHA256);
    for part in [&*name.namespace, &*name.service, &*name.port, protocol_name(name.protocol), more] {
        context.update(part.as_bytes());
        context.update(&[0]);
    }
    let digest = context.finish();
    digest.as_ref().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The protocol as iptables spells it.
pub(super) fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// One chain of a ServicePort.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Part {
    /// Where its external addresses lead.
    External,
    /// Where its ClusterIP leads.
    Internal,
    /// One of its cluster endpoints.
    Cluster,
    /// One of its local endpoints.
    Local,
}

/// A chain of ours.
///
/// Chains are written in descending order, and each chain stands behind all that lead to it, for two reasons. A rule can only name
/// a chain that exists. And iptables-nft-restore keeps the chains of its input in a list sorted by name, which it searches from the
/// front at every line: with ascending or random names 10,000 Services take it three times as long (1.8.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Chain {
    /// Filter, from OUTPUT.
    Output,
    /// Filter, from FORWARD.
    Forward,
    /// Filter, from INPUT.
    Input,
    /// Nat, from POSTROUTING.
    PostRouting,
    /// Nat, from PREROUTING and OUTPUT; filter, for new connections that nat did not translate.
    Services,
    /// Filter, for new connections that nat did not translate and that leave the node: addresses of Services at which nobody
    /// answers.
    Unserved,
    /// Filter: health check ports are let in.
    Health,
    /// Filter: ClusterIPs, by their last four bits.
    ClusterIps,
    /// Nat and filter: NodePorts, by blocks of ports.
    Ports,
    /// Nat and filter: frontends with an address of their own, by its last four bits.
    Addresses,
    /// Filter: ClusterIPs with these last four bits, by their last eight.
    ClusterIpBranch(u8),
    /// Filter: ClusterIPs with these last eight bits.
    ClusterIpLeaf(u8),
    /// Frontends with these last four bits of their address, by its last eight.
    AddressBranch(u8),
    /// The rules of frontends.
    Leaf(Leaf),
    /// Nat: what a ServicePort does.
    Service(ServiceId, Part),
    /// Nat: a local endpoint that was sent back to itself is masqueraded.
    Hairpin,
    /// Nat: masquerades.
    Masquerade,
    /// Nat: marks for masquerade what is no pod's.
    MarkOutside,
    /// Nat: marks for masquerade.
    Mark,
}

/// Frontends whose rules share a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Leaf {
    /// NodePorts from this one, which is a multiple of [`PORT_BLOCK`].
    Ports(Protocol, u16),
    /// Frontends whose address ends in this byte.
    Address(u8),
}

impl fmt::Display for Chain {
    /// At most 26 characters; the kernel takes 28.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        let fixed = match self {
            Self::Output => "OUTPUT",
            Self::Forward => "FORWARD",
            Self::Input => "INPUT",
            Self::PostRouting => "POSTROUTING",
            Self::Services => "SERVICES",
            Self::Unserved => "UNSERVED",
            Self::Health => "HEALTH",
            Self::ClusterIps => "CIP",
            Self::Ports => "PORT",
            Self::Addresses => "ADDR",
            Self::Hairpin => "HAIRPIN",
            Self::Masquerade => "MASQ",
            Self::MarkOutside => "MARK-OUTSIDE",
            Self::Mark => "MARK",
            Self::ClusterIpBranch(nibble) => return write!(f, "CIP-{nibble:x}"),
            Self::ClusterIpLeaf(byte) => return write!(f, "CIP-{byte:02x}"),
            Self::AddressBranch(nibble) => return write!(f, "ADDR-{nibble:x}"),
            Self::Leaf(Leaf::Address(byte)) => return write!(f, "ADDR-{byte:02x}"),
            Self::Leaf(Leaf::Ports(protocol, first)) => {
                return write!(f, "PORT-{}-{first}", protocol_name(*protocol));
            }
            Self::Service(id, Part::External) => return write!(f, "{id}-EXT"),
            Self::Service(id, Part::Internal) => return write!(f, "{id}-INT"),
            Self::Service(id, Part::Cluster) => return write!(f, "{id}-SVC"),
            Self::Service(id, Part::Local) => return write!(f, "{id}-SVL"),
        };
        f.write_str(fixed)
    }
}

/// The rules in the kernel's own chains that lead to ours: table, the kernel's chain, ours. Each is first in its chain when it is
/// made, so that we decide before another proxy that we replace.
pub(super) const HOOKS: [(Table, &str, Chain); 6] = [
    (Table::Filter, "INPUT", Chain::Input),
    (Table::Filter, "FORWARD", Chain::Forward),
    (Table::Filter, "OUTPUT", Chain::Output),
    (Table::Nat, "PREROUTING", Chain::Services),
    (Table::Nat, "OUTPUT", Chain::Services),
    (Table::Nat, "POSTROUTING", Chain::PostRouting),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{IpFamily, NameParts};

    fn name(service: &str, port: &str) -> ServicePortName {
        let (namespace, service, port) = ("ns".into(), service.into(), port.into());
        ServicePortName::new(NameParts { namespace, service, port, protocol: Protocol::Tcp, family: IpFamily::V4 })
    }

    #[test]
    fn names_are_short_distinct_and_the_same_in_every_process() {
        let id = ServiceId::of(&name("web", "http"));
        let chains = [Part::External, Part::Internal, Part::Cluster, Part::Local].map(|part| Chain::Service(id, part));
        let names: std::collections::BTreeSet<String> = chains.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), 4);
        assert!(names.iter().all(|name| name.len() == 26), "{names:?}");
        assert_eq!(chains[1].to_string(), "TRAMA-jbilifafhkpigjmd-INT");
        assert_ne!(ServiceId::of(&name("we", "bhttp")), id);
        assert_eq!(Chain::Leaf(Leaf::Ports(Protocol::Sctp, 65472)).to_string(), "TRAMA-PORT-sctp-65472");
        assert_eq!(Chain::Leaf(Leaf::Address(5)).to_string(), "TRAMA-ADDR-05");
        assert_eq!(Chain::AddressBranch(5).to_string(), "TRAMA-ADDR-5");
    }

    #[test]
    fn names_of_services_sort_as_their_chains_do() {
        let chain = |service: &str, part| Chain::Service(ServiceId::of(&name(service, "")), part);
        let mut chains = vec![chain("a", Part::Local), chain("b", Part::External), chain("c", Part::Cluster)];
        chains.push(chain("a", Part::Internal));
        chains.sort_unstable();
        assert!(chains.iter().map(ToString::to_string).is_sorted(), "{chains:?}");
        assert!(chain("a", Part::Local).to_string() > Chain::Services.to_string());
    }
}
