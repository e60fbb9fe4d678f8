//! Which endpoints a ServicePort may use from this node (kube-proxy 1.36 `pkg/proxy/topology.go` and `endpointslicecache.go`).

use std::net::SocketAddr;
use std::sync::Arc;

use super::object::{SliceEndpoint, SliceObject};
use super::{Endpoint, IpFamily, PortSpec};

/// Every distinct endpoint of one ServicePort with its conditions, sorted by address.
pub(super) type Candidates<'a> = Vec<(SocketAddr, &'a SliceEndpoint)>;

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
pub(super) fn gather<'a>(slices: &[&'a SliceObject], port: &PortSpec, family: IpFamily) -> Candidates<'a> {
    let mut all: Candidates<'a> = Vec::new();
    for slice in slices.iter().filter(|slice| slice.family == family) {
        for target in slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol) {
            all.extend(slice.endpoints.iter().map(|e| (SocketAddr::new(e.address, target.port), e)));
        }
    }
    all.sort_by_key(|(address, _)| *address);
    all.dedup_by(|later, kept| {
        let same = later.0 == kept.0;
        if same && !later.1.terminating {
            kept.1 = later.1;
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
        result.cluster = select(candidates, |e| e.ready && mode.admits(e, zone));
        if result.cluster.is_empty() {
            result.cluster = select(candidates, serving_terminating);
        }
        result.cluster.sort_by_key(|e| (!e.local, *e));
        result.any = !result.cluster.is_empty();
    }
    if uses.local {
        result.any |= candidates.iter().any(|(_, e)| e.ready || serving_terminating(e));
        result.local = select(candidates, |e| e.local && e.ready);
        if result.local.is_empty() {
            result.local = select(candidates, |e| e.local && serving_terminating(e));
        }
    }
    result
}

fn serving_terminating(endpoint: &SliceEndpoint) -> bool {
    endpoint.serving && endpoint.terminating
}

fn select(candidates: &Candidates<'_>, wanted: impl Fn(&SliceEndpoint) -> bool) -> Vec<Endpoint> {
    let chosen = candidates.iter().filter(|(_, e)| wanted(e));
    let mut list: Vec<_> = chosen.map(|(address, e)| Endpoint::new(*address, e.local)).collect();
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
        let mut ready = candidates.iter().map(|(_, e)| *e).filter(|e| e.ready).peekable();
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
