//! Which UDP flows may live: what is served where, and by whom.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::Changes;
use crate::model::{Endpoint, Frontend, FrontendAddress, IpFamily, NodeConfig, ServicePort, ServicePortName};

/// More places than this are not looked for one by one.
const PLACES_MAX: usize = 8;
/// Vanished places that are remembered until the next pass; flows to others end by their own timeout.
const GONE_MAX: usize = 65_536;

/// A UDP flow, as the kernel remembers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// What the client named.
    pub destination: SocketAddr,
    /// Who answers; the same where nobody translated.
    pub endpoint: SocketAddr,
}

/// Where a frontend listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// One address and port.
    Address(SocketAddr),
    /// A NodePort.
    NodePort(IpFamily, u16),
}

impl Place {
    /// Where this frontend of the ServicePort listens.
    pub(super) fn of(service: &ServicePort, frontend: &Frontend) -> Self {
        match frontend.address {
            FrontendAddress::Ip(address) => Self::Address(SocketAddr::new(address, frontend.port)),
            FrontendAddress::NodePort => Self::NodePort(service.name.family, frontend.port),
        }
    }

    /// Whose family's flows it concerns.
    pub fn family(&self) -> IpFamily {
        match self {
            Self::Address(address) => IpFamily::of(address.ip()),
            Self::NodePort(family, _) => *family,
        }
    }
}

/// What a pass has to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Every UDP flow.
    Everything,
    /// Flows to these places; few.
    Places(Vec<Place>),
}

/// One UDP ServicePort.
#[derive(Debug)]
struct Served {
    places: Vec<Place>,
    /// Who may answer: whoever gets new flows, and whoever keeps those that it has.
    endpoints: HashSet<SocketAddr>,
}

impl Served {
    fn new(service: &ServicePort) -> Self {
        let chosen = service.cluster_endpoints.iter().chain(&service.local_endpoints).map(Endpoint::address);
        Self {
            places: service.frontends.iter().map(|frontend| Place::of(service, frontend)).collect(),
            endpoints: chosen.chain(service.kept_endpoints.iter().copied()).collect(),
        }
    }
}

/// Every UDP ServicePort by where it listens.
#[derive(Debug, Default)]
pub struct FlowIndex {
    node: Arc<NodeConfig>,
    services: BTreeMap<ServicePortName, Arc<Served>>,
    places: HashMap<Place, Arc<Served>>,
    /// Places that nobody has any more, with who answered there.
    gone: HashMap<Place, Vec<Arc<Served>>>,
}

impl FlowIndex {
    /// Whether a flow leads to who must not have it any more: its destination is served, but not by this endpoint (by nobody,
    /// or the flow is older than the Service and was never translated); or its destination was served until now, by this one.
    pub fn is_stale(&self, flow: &Flow) -> bool {
        let candidates = [Some(Place::Address(flow.destination)), self.node_port(flow.destination)];
        // An address of its own goes before the NodePort.
        let mut candidates = candidates.into_iter().flatten();
        candidates.find_map(|place| self.judge(place, &flow.endpoint)).unwrap_or(false)
    }

    /// `None` where nobody listens or listened.
    fn judge(&self, place: Place, endpoint: &SocketAddr) -> Option<bool> {
        if let Some(served) = self.places.get(&place) {
            return Some(!served.endpoints.contains(endpoint));
        }
        let gone = self.gone.get(&place)?;
        Some(gone.iter().any(|served| served.endpoints.contains(endpoint)))
    }

    /// The NodePort that this destination would be: other machines' ports are none of ours.
    fn node_port(&self, destination: SocketAddr) -> Option<Place> {
        let address = destination.ip();
        let loopback = match address {
            IpAddr::V4(_) => self.node.loopback_node_ports_v4,
            IpAddr::V6(_) => self.node.loopback_node_ports_v6,
        };
        let ours = self.node.node_port_addresses.contains(&address) || (loopback && address.is_loopback());
        ours.then(|| Place::NodePort(IpFamily::of(address), destination.port()))
    }

    /// Takes in what has changed and says what there is to look at; `everything` asks for all of it.
    pub(super) fn take_in(&mut self, changes: Changes, everything: bool) -> Scope {
        if let Some(node) = changes.node {
            self.node = node;
        }
        let mut touched = Vec::new();
        if changes.full {
            let unnamed = |name: &&ServicePortName| !changes.services.contains_key(*name);
            let gone: Vec<_> = self.services.keys().filter(unnamed).cloned().collect();
            gone.iter().for_each(|name| self.replace(name, None, &mut touched));
        }
        for (name, service) in &changes.services {
            self.replace(name, service.as_deref(), &mut touched);
        }
        // A place may have changed hands: it is gone only if nobody took it.
        self.gone.retain(|place, _| !self.places.contains_key(place));
        touched.sort_unstable();
        touched.dedup();
        if everything || changes.full || touched.len() > PLACES_MAX {
            Scope::Everything
        } else {
            Scope::Places(touched)
        }
    }

    fn replace(&mut self, name: &ServicePortName, service: Option<&ServicePort>, touched: &mut Vec<Place>) {
        if let Some(old) = self.services.remove(name) {
            for place in &old.places {
                touched.push(*place);
                // Another may have taken it earlier in this very round.
                if self.places.get(place).is_some_and(|owner| Arc::ptr_eq(owner, &old)) {
                    self.places.remove(place);
                }
                if self.gone.len() < GONE_MAX {
                    self.gone.entry(*place).or_default().push(Arc::clone(&old));
                }
            }
        }
        let Some(service) = service else { return };
        let served = Arc::new(Served::new(service));
        for place in &served.places {
            touched.push(*place);
            self.places.insert(*place, Arc::clone(&served));
        }
        self.services.insert(name.clone(), served);
    }

    /// After a pass: what was gone has been looked for.
    pub(super) fn forget_gone(&mut self) {
        self.gone = HashMap::new();
    }
}
