//! Which endpoints of this node the tunnels of other nodes may lead to.

use proxy_common::EndpointKey;

use super::{Full, Placed, Planner, UserAddress, Writes, endpoints};
use crate::model::{Action, EndpointSet, FrontendKind, ServicePort};

impl<A: UserAddress> Planner<A> {
    /// Every entry of `endpoints`.
    pub(in crate::dataplane::ebpf) fn tunnel_endpoints(&self) -> impl Iterator<Item = (EndpointKey<A>, u32)> {
        self.services.values().flat_map(|service| {
            endpoint_keys(&service.endpoints, service.service_id).zip(service.endpoints.iter().map(|(_, id)| *id))
        })
    }

    /// Whether a Maglev table finds the endpoints of some ServicePort with direct server return.
    pub(in crate::dataplane::ebpf) fn has_direct_tables(&self) -> bool {
        self.direct_tables > 0
    }

    /// Those of the ServicePort itself, if any, count twice, as with the source ranges.
    pub(super) fn check_endpoint_room(&self, desired: &ServicePort) -> Result<(), Full> {
        if !crosses_nodes(desired) {
            return Ok(());
        }
        let new = endpoints::<A>(desired).iter().filter(|(_, _, local, _)| *local == 1).count();
        let fits = self.endpoints + new <= self.limits.endpoints as usize;
        if fits { Ok(()) } else { Err(Full { map: "endpoints" }) }
    }

    /// Plans the entries of a ServicePort, draining endpoints included: before the frontends flip the new ones are there, and after that the
    /// old ones go. Whether direct server return is asked for does not matter: another node may know that it is before this one does, or not
    /// yet know that it is not any more.
    pub(super) fn change_endpoints(
        &mut self,
        desired: &ServicePort,
        backends: &[Placed<A>],
        known: &[(A, u32)],
        service_id: u32,
        writes: &mut Writes<A>,
    ) -> Vec<(A, u32)> {
        let local = backends.iter().filter(|placed| placed.local == 1 && crosses_nodes(desired));
        let mut entries: Vec<(A, u32)> = local.map(|placed| (placed.address, placed.id)).collect();
        // Two ports of a ServicePort at one address: a tunnel does not say which, so the lower one is it.
        entries.dedup_by_key(|(address, _)| *address);
        let new = entries.iter().filter(|entry| !known.contains(entry));
        writes.endpoints.extend(new.map(|(address, id)| (EndpointKey { address: *address, service_id }, *id)));
        let gone: Vec<(A, u32)> = known.iter().filter(|(old, _)| find(&entries, *old).is_none()).copied().collect();
        writes.endpoints_gone.extend(endpoint_keys(&gone, service_id));
        self.endpoints = (self.endpoints + entries.len()).saturating_sub(known.len());
        entries
    }
}

fn find<A: UserAddress>(entries: &[(A, u32)], address: A) -> Option<u32> {
    entries
        .binary_search_by_key(&address, |(address, _)| *address)
        .ok()
        .and_then(|at| entries.get(at))
        .map(|(_, id)| *id)
}

/// The keys of a ServicePort's entries.
pub(super) fn endpoint_keys<A: Copy>(entries: &[(A, u32)], service_id: u32) -> impl Iterator<Item = EndpointKey<A>> {
    entries.iter().map(move |(address, _)| EndpointKey { address: *address, service_id })
}

/// Whether a client outside may be sent to an endpoint on another node, and would be masqueraded.
fn crosses_nodes(service: &ServicePort) -> bool {
    service.frontends.iter().any(|frontend| {
        let external = &frontend.rules.external;
        let crosses = external.masquerade && external.action == Action::Forward(EndpointSet::Cluster);
        frontend.kind != FrontendKind::ClusterIp && crosses
    })
}
