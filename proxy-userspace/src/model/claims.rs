//! Who answers at an address that several ServicePorts name: exactly one of them, the same on every node.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use super::{Frontend, FrontendAddress, FrontendKind, IpFamily, Protocol, ServicePort, ServicePortName};

/// TCP NodePorts that would take the node away from those who run it: sshd's and the kubelet's. The API server hands them out
/// only where `--service-node-port-range` was widened to them.
const NODE_PORTS_OF_THE_NODE: [u16; 2] = [22, 10250];

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

    /// Whether the node itself answers there and no Service may.
    fn is_the_nodes(&self) -> bool {
        self.address.is_none() && self.protocol == Protocol::Tcp && NODE_PORTS_OF_THE_NODE.contains(&self.port)
    }

    fn is_at(&self, address: SocketAddr) -> bool {
        self.protocol == Protocol::Tcp && self.address == Some(address.ip()) && self.port == address.port()
    }
}

/// What a claim rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Grounds {
    /// Why the frontend exists.
    pub(super) kind: FrontendKind,
    /// When its Service was created.
    pub(super) created_seconds: i64,
}

/// A ClusterIP cannot be taken by an external IP that anybody may write into a Service; among equals the older Service wins, so
/// that nobody takes what another has, and then the first name. All of it is in the objects: a restart changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    rank: u8,
    created_seconds: i64,
    name: ServicePortName,
}

impl Claim {
    fn new(name: &ServicePortName, grounds: Grounds) -> Self {
        let rank = match grounds.kind {
            FrontendKind::ClusterIp => 0,
            FrontendKind::NodePort => 1,
            FrontendKind::LoadBalancerIp => 2,
            FrontendKind::ExternalIp => 3,
        };
        Self { rank, created_seconds: grounds.created_seconds, name: name.clone() }
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
    api_server: Option<SocketAddr>,
}

impl ClaimTable {
    /// Puts in a claim. Returns the ServicePort that lost the place by it.
    pub(super) fn claim(&mut self, place: Place, name: &ServicePortName, grounds: Grounds) -> Option<ServicePortName> {
        let claim = Claim::new(name, grounds);
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

    pub(super) fn reserve_for_api_server(&mut self, address: SocketAddr) {
        self.api_server = Some(address);
    }

    /// Whether this process reaches the API server through a frontend of `port`.
    pub(super) fn leads_to_api_server(&self, port: &ServicePort) -> bool {
        let at_frontend =
            |address| port.frontends.iter().any(|frontend| Place::of(&port.name, frontend).is_at(address));
        is_kubernetes(&port.name) && self.api_server.is_some_and(at_frontend)
    }

    pub(super) fn owns(&self, place: Place, name: &ServicePortName) -> bool {
        let takes_api_server = !is_kubernetes(name) && self.api_server.is_some_and(|address| place.is_at(address));
        if takes_api_server || place.is_the_nodes() {
            return false;
        }
        self.places.get(&place).is_some_and(|claims| claims.owner.name == *name)
    }
}

/// The Service by which clients inside the cluster reach the API server.
fn is_kubernetes(name: &ServicePortName) -> bool {
    *name.namespace == *"default" && *name.service == *"kubernetes"
}
