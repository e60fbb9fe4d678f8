//! Who answers at an address that several ServicePorts name: exactly one of them, the same on every node.

use std::collections::HashMap;
use std::net::IpAddr;

use super::{Frontend, FrontendAddress, FrontendKind, IpFamily, Protocol, ServicePortName};

/// A place on which only one ServicePort can listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place {
    /// `None` is the NodePort wildcard.
    address: Option<IpAddr>,
    family: IpFamily,
    protocol: Protocol,
    port: u16,
}

impl Place {
    pub(super) fn of(name: &ServicePortName, frontend: &Frontend) -> Self {
        let address = match frontend.address {
            FrontendAddress::Ip(address) => Some(address),
            FrontendAddress::NodePort => None,
        };
        Self { address, family: name.family, protocol: name.protocol, port: frontend.port }
    }
}

/// A ClusterIP cannot be taken by an external IP that anybody may write into a Service; among equals the first name wins.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    rank: u8,
    name: ServicePortName,
}

impl Claim {
    fn new(name: &ServicePortName, kind: FrontendKind) -> Self {
        let rank = match kind {
            FrontendKind::ClusterIp => 0,
            FrontendKind::NodePort => 1,
            FrontendKind::LoadBalancerIp => 2,
            FrontendKind::ExternalIp => 3,
        };
        Self { rank, name: name.clone() }
    }
}

#[derive(Debug)]
struct Claims {
    owner: Claim,
    /// Nearly always empty, and an empty vector allocates nothing.
    waiting: Vec<Claim>,
}

/// All claims of all ServicePorts. Holds one entry for every frontend of the cluster.
#[derive(Debug, Default)]
pub(super) struct ClaimTable {
    places: HashMap<Place, Claims>,
}

impl ClaimTable {
    /// Puts in a claim. Returns the ServicePort that lost the place by it.
    pub(super) fn claim(
        &mut self,
        place: Place,
        name: &ServicePortName,
        kind: FrontendKind,
    ) -> Option<ServicePortName> {
        let claim = Claim::new(name, kind);
        let Some(claims) = self.places.get_mut(&place) else {
            self.places.insert(place, Claims { owner: claim, waiting: Vec::new() });
            return None;
        };
        if claim < claims.owner {
            let loser = std::mem::replace(&mut claims.owner, claim);
            claims.waiting.push(loser.clone());
            return Some(loser.name);
        }
        claims.waiting.push(claim);
        None
    }

    /// Takes the claim of `name` back. Returns the ServicePort that has the place now, if that is a new one.
    pub(super) fn release(&mut self, place: Place, name: &ServicePortName) -> Option<ServicePortName> {
        let claims = self.places.get_mut(&place)?;
        if claims.owner.name != *name {
            claims.waiting.retain(|claim| claim.name != *name);
            return None;
        }
        let Some(heir) = claims.waiting.iter().min().cloned() else {
            self.places.remove(&place);
            return None;
        };
        claims.waiting.retain(|claim| *claim != heir);
        claims.owner = heir.clone();
        Some(heir.name)
    }

    pub(super) fn owns(&self, place: Place, name: &ServicePortName) -> bool {
        self.places.get(&place).is_some_and(|claims| claims.owner.name == *name)
    }
}
