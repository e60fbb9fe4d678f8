//! Which endpoints a ServicePort may use from this node (kube-proxy 1.36 `pkg/proxy/topology.go` and `endpointslicecache.go`).

use std::net::SocketAddr;
use std::sync::Arc;

use super::object::{SliceEndpoint, SliceObject};
use super::{Balancing, Endpoint, IpFamily, PortSpec, WEIGHT_DEFAULT};

/// Every distinct endpoint of one ServicePort, sorted by address.
pub(super) type Candidates<'a> = Vec<Candidate<'a>>;

/// One endpoint of one ServicePort.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'a> {
    /// Address and target port.
    pub(super) address: SocketAddr,
    /// Its conditions.
    pub(super) endpoint: &'a SliceEndpoint,
    /// Its weight; 0 takes no new flows.
    weight: u8,
}

impl Candidate<'_> {
    /// An endpoint of weight 0 counts as one that is not ready: the others take its share, in every policy and topology.
    fn ready(&self) -> bool {
        self.endpoint.ready && self.weight > 0
    }
}

fn serving_terminating(candidate: &Candidate<'_>) -> bool {
    candidate.endpoint.serving && candidate.endpoint.terminating && candidate.weight > 0
}

/// Which lists a ServicePort needs at all.
#[derive(Debug, Clone, Copy)]
pub(super) struct PolicyUse {
    /// Some traffic follows policy Cluster.
    pub(super) cluster: bool,
    /// Some traffic follows policy Local.
    pub(super) local: bool,
}

/// The two lists, and whether there is a usable endpoint on any node.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Categorized {
    /// Targets for policy Cluster: locals first.
    pub(super) cluster: Vec<Endpoint>,
    /// Targets for policy Local.
    pub(super) local: Vec<Endpoint>,
    /// False means REJECT, true with an empty list means DROP.
    pub(super) any: bool,
}

/// Joins the slices of a Service for one port. `slices` must come in a stable order (by name): where an address appears
/// several times, a later entry replaces an earlier one unless the later is terminating, because a terminating pod's
/// address may already belong to a new pod.
pub(super) fn gather<'a>(
    slices: &[&'a SliceObject],
    port: &PortSpec,
    family: IpFamily,
    balancing: Option<&Balancing>,
) -> Candidates<'a> {
    let mut all: Candidates<'a> = Vec::new();
    for slice in slices.iter().filter(|slice| slice.family == family) {
        for target in slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol) {
            all.extend(slice.endpoints.iter().map(|endpoint| {
                let asked = balancing.and_then(|balancing| balancing.weight(endpoint.address)).or(slice.weight);
                let address = SocketAddr::new(endpoint.address, target.port);
                Candidate { address, endpoint, weight: asked.unwrap_or(WEIGHT_DEFAULT) }
            }));
        }
    }
    all.sort_by_key(|candidate| candidate.address);
    all.dedup_by(|later, kept| {
        let same = later.address == kept.address;
        if same && !later.endpoint.terminating {
            *kept = *later;
        }
        same
    });
    all
}

/// Splits `candidates` as kube-proxy's CategorizeEndpoints does: ready ones within the topology, else those that are
/// serving while they terminate, separately for each policy.
pub(super) fn categorize(candidates: &Candidates<'_>, uses: PolicyUse, zone: Option<&Arc<str>>) -> Categorized {
    let mut result = Categorized::default();
    if uses.cluster {
        let mode = TopologyMode::from_hints(candidates, zone);
        result.cluster = select(candidates, |c| c.ready() && mode.admits(c.endpoint, zone));
        if result.cluster.is_empty() {
            result.cluster = select(candidates, serving_terminating);
        }
        result.cluster.sort_by_key(|e| (!e.local, *e));
        result.any = !result.cluster.is_empty();
    }
    if uses.local {
        result.any |= candidates.iter().any(|c| c.ready() || serving_terminating(c));
        result.local = select(candidates, |c| c.endpoint.local && c.ready());
        if result.local.is_empty() {
            result.local = select(candidates, |c| c.endpoint.local && serving_terminating(c));
        }
    }
    result
}

fn select(candidates: &Candidates<'_>, wanted: impl Fn(&Candidate<'_>) -> bool) -> Vec<Endpoint> {
    let chosen = candidates.iter().filter(|candidate| wanted(candidate));
    let endpoint = |c: &Candidate<'_>| Endpoint::new(c.address, c.endpoint.local).with_weight(c.weight);
    let mut list: Vec<_> = chosen.map(endpoint).collect();
    list.shrink_to_fit();
    list
}

/// How far hints narrow the ready endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TopologyMode {
    Anywhere,
    SameNode,
    SameZone,
}

impl TopologyMode {
    /// A narrower mode holds only if every ready endpoint carries such a hint and one of them names us: hints that are
    /// being rewritten never leave a node without endpoints.
    fn from_hints(candidates: &Candidates<'_>, zone: Option<&Arc<str>>) -> Self {
        let mut ready = candidates.iter().filter(|c| c.ready()).map(|c| c.endpoint).peekable();
        if ready.peek().is_none() {
            return Self::Anywhere;
        }
        let (mut all_node, mut our_node, mut all_zone, mut our_zone) = (true, false, true, false);
        for endpoint in ready {
            all_node &= endpoint.has_node_hints;
            our_node |= endpoint.hinted_for_node;
            all_zone &= endpoint.zone_hints.is_some();
            our_zone |= hinted_for_zone(endpoint, zone);
        }
        match (all_node && our_node, all_zone && our_zone) {
            (true, _) => Self::SameNode,
            (false, true) => Self::SameZone,
            (false, false) => Self::Anywhere,
        }
    }

    fn admits(self, endpoint: &SliceEndpoint, zone: Option<&Arc<str>>) -> bool {
        match self {
            Self::Anywhere => true,
            Self::SameNode => endpoint.hinted_for_node,
            Self::SameZone => hinted_for_zone(endpoint, zone),
        }
    }
}

fn hinted_for_zone(endpoint: &SliceEndpoint, zone: Option<&Arc<str>>) -> bool {
    match (&endpoint.zone_hints, zone) {
        (Some(hints), Some(zone)) => hints.contains(zone),
        _ => false,
    }
}
