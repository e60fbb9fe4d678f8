//! How packets from outside reach an endpoint on another node.

use super::Protocol;

/// Annotation of a Service: how clients outside of the cluster reach its endpoints on other nodes, `snat`, `dsr` or `hybrid`.
pub const ANNOTATION_FORWARDING: &str = "service.trama.dev/forwarding";

/// What a node does with a client's packet whose endpoint is on another one, where the Service lets it cross nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Forwarding {
    /// The source becomes the node's address, and the answer comes back through the node.
    #[default]
    Snat,
    /// The packet goes to the endpoint's node as it is, in a tunnel, and the answer goes from there to the client: direct server return.
    Dsr,
    /// [`Self::Dsr`] for TCP, [`Self::Snat`] for all others.
    Hybrid,
}

impl Forwarding {
    /// Every way.
    pub const ALL: [Self; 3] = [Self::Snat, Self::Dsr, Self::Hybrid];

    /// Its name in [`ANNOTATION_FORWARDING`] and in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Snat => "snat",
            Self::Dsr => "dsr",
            Self::Hybrid => "hybrid",
        }
    }

    /// The way of this name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|forwarding| forwarding.name() == text)
    }

    /// Whether answers of a protocol go straight to the client.
    pub const fn is_direct(self, protocol: Protocol) -> bool {
        match self {
            Self::Snat => false,
            Self::Dsr => true,
            Self::Hybrid => matches!(protocol, Protocol::Tcp),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_is_read_by_its_name_and_hybrid_is_tcp_s() {
        for forwarding in Forwarding::ALL {
            assert_eq!(Forwarding::parse(forwarding.name()), Some(forwarding));
        }
        assert_eq!(Forwarding::parse("DSR"), None);
        let direct = |forwarding: Forwarding| {
            [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(|protocol| forwarding.is_direct(protocol))
        };
        assert_eq!(direct(Forwarding::Snat), [false; 3]);
        assert_eq!(direct(Forwarding::Dsr), [true; 3]);
        assert_eq!(direct(Forwarding::Hybrid), [true, false, false]);
    }
}
