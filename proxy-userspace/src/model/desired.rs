//! The desired state while it changes: each Service is replaced alone, so a change costs what it touches.

use std::collections::btree_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::ops::Bound;
use std::sync::Arc;

use super::claims::{ClaimTable, Grounds, Place};
use super::{
    Action, FrontendAddress, FrontendKind, HealthCheck, HealthCheckName, IpFamily, NameParts, NodeConfig, Protocol,
    ServiceDelta, ServiceKey, ServicePort, ServicePortName, ServiceSnapshot,
};

/// The snapshot under construction and what has changed in it since the last [`Desired::checkout`].
#[derive(Debug, Default)]
pub struct Desired {
    snapshot: ServiceSnapshot,
    claims: ClaimTable,
    /// Places that a ServicePort claims and another has; absent for nearly all.
    lost: HashMap<ServicePortName, Vec<(Place, Grounds)>>,
    changed: BTreeSet<ServicePortName>,
    changed_cluster_ips: BTreeSet<IpAddr>,
    health_checks_changed: bool,
    node_changed: bool,
    no_local: NoLocalEndpoints,
}

/// ServicePorts that drop traffic because policy Local finds no endpoint here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NoLocalEndpoints {
    /// By internalTrafficPolicy: `[IPv4, IPv6]`.
    pub internal: [usize; 2],
    /// By externalTrafficPolicy: `[IPv4, IPv6]`.
    pub external: [usize; 2],
}

impl Desired {
    /// The state as it is now.
    pub fn snapshot(&self) -> &ServiceSnapshot {
        &self.snapshot
    }

    /// Whether anything changed since the last checkout.
    pub fn is_changed(&self) -> bool {
        self.node_changed || self.health_checks_changed || !self.changed.is_empty()
    }

    /// How many frontends are not expressed because another ServicePort answers there.
    pub fn conflicts(&self) -> usize {
        self.lost.values().map(Vec::len).sum()
    }

    /// ServicePorts that drop for want of a local endpoint.
    pub fn no_local_endpoints(&self) -> NoLocalEndpoints {
        self.no_local
    }

    /// Keeps the address of the API server for the Service `default/kubernetes`: what answers there answers this very process. If
    /// that Service loses its last endpoint, it keeps it. To be called before anything is put in.
    pub fn reserve_for_api_server(&mut self, address: SocketAddr) {
        self.claims.reserve_for_api_server(address);
    }

    /// Ends a round: the next snapshot version, and what is different in it.
    pub fn checkout(&mut self) -> (&ServiceSnapshot, ServiceDelta) {
        self.snapshot.version += 1;
        let delta = ServiceDelta {
            node_changed: std::mem::take(&mut self.node_changed),
            changed: std::mem::take(&mut self.changed).into_iter().collect(),
            cluster_ips: std::mem::take(&mut self.changed_cluster_ips).into_iter().collect(),
            health_checks_changed: std::mem::take(&mut self.health_checks_changed),
        };
        (&self.snapshot, delta)
    }

    /// Makes `checks` all that load balancers are told of Service `key`.
    pub fn set_health_checks(&mut self, key: &ServiceKey, checks: &[(IpFamily, HealthCheck)]) {
        for family in [IpFamily::V4, IpFamily::V6] {
            let name = HealthCheckName { service: key.clone(), family };
            let new = checks.iter().find(|(of, _)| *of == family).map(|(_, check)| *check);
            let old = self.snapshot.health_checks.get(&name).copied();
            if old == new {
                continue;
            }
            self.health_checks_changed = true;
            match new {
                Some(check) => self.snapshot.health_checks.insert(name, check),
                None => self.snapshot.health_checks.remove(&name),
            };
        }
    }

    /// Replaces the node's facts.
    pub fn set_node(&mut self, node: NodeConfig) {
        if *self.snapshot.node != node {
            self.snapshot.node = Arc::new(node);
            self.node_changed = true;
        }
    }

    /// Makes `ports` all that Service `key` has. Returns the other Services that gained or lost an address by it: their ports
    /// must be replaced too, with what they already were. That ends, because such a replacement moves no claim.
    pub fn replace(&mut self, key: &ServiceKey, ports: Vec<ServicePort>) -> Vec<ServiceKey> {
        let ports: Vec<_> = ports.into_iter().map(|port| self.keep_way_to_api_server(port)).collect();
        let names = self.names_of(key);
        let before = self.claims_of(&names);
        let after: BTreeSet<_> = ports.iter().flat_map(claims_in).collect();
        let mut touched = BTreeSet::new();
        for (name, place, _) in before.difference(&after) {
            touched.extend(self.claims.release(*place, name));
        }
        for (name, place, grounds) in after.difference(&before) {
            touched.extend(self.claims.claim(*place, name, *grounds));
        }
        let mut stale: BTreeSet<_> = names.into_iter().collect();
        for port in ports {
            stale.remove(&port.name);
            self.put(port);
        }
        for name in stale {
            self.lost.remove(&name);
            self.remove(&name);
        }
        touched.retain(|name| !belongs_to(name, key));
        let keys = touched
            .into_iter()
            .map(|n| ServiceKey { namespace: Arc::clone(&n.namespace), name: Arc::clone(&n.service) });
        keys.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// What this process reaches the API server through keeps its last endpoints: a server that stops takes itself out of
    /// `default/kubernetes`, and without a way to the next one nobody would tell us its address.
    fn keep_way_to_api_server(&self, port: ServicePort) -> ServicePort {
        match self.snapshot.services.get(&port.name) {
            Some(old) if port.cluster_endpoints.is_empty() && self.claims.leads_to_api_server(&port) => ServicePort {
                frontends: old.frontends.clone(),
                cluster_endpoints: old.cluster_endpoints.clone(),
                local_endpoints: old.local_endpoints.clone(),
                ..port
            },
            _ => port,
        }
    }

    /// Every ServicePort of a Service that is expressed or waits for a place.
    fn names_of(&self, key: &ServiceKey) -> Vec<ServicePortName> {
        let first = first_name(key);
        let from_here = self.snapshot.services.range((Bound::Included(&first), Bound::Unbounded));
        let mut names: Vec<_> = from_here.map(|(n, _)| n).take_while(|n| belongs_to(n, key)).cloned().collect();
        if !self.lost.is_empty() {
            names.extend(self.lost.keys().filter(|n| belongs_to(n, key)).cloned());
            names.sort_unstable();
            names.dedup();
        }
        names
    }

    fn claims_of(&self, names: &[ServicePortName]) -> BTreeSet<(ServicePortName, Place, Grounds)> {
        let mut claims = BTreeSet::new();
        for name in names {
            claims.extend(self.snapshot.services.get(name).into_iter().flat_map(|port| claims_in(port)));
            let lost = self.lost.get(name).into_iter().flatten();
            claims.extend(lost.map(|(place, grounds)| (name.clone(), *place, *grounds)));
        }
        claims
    }

    /// Stores what `port` owns of its frontends.
    fn put(&mut self, mut port: ServicePort) {
        let name = port.name.clone();
        let mut lost = Vec::new();
        let (claims, created_seconds) = (&self.claims, port.created_seconds);
        port.frontends.retain(|frontend| {
            let place = Place::of(&name, frontend);
            let owned = claims.owns(place, &name);
            if !owned {
                lost.push((place, Grounds { kind: frontend.kind, created_seconds }));
            }
            owned
        });
        match lost.is_empty() {
            true => self.lost.remove(&name),
            false => self.lost.insert(name.clone(), lost),
        };
        if port.frontends.is_empty() {
            self.remove(&name);
        } else if self.snapshot.services.get(&name).is_none_or(|old| **old != port) {
            self.no_local.add(&port);
            self.add_cluster_ips(&port);
            let old = self.snapshot.services.insert(name.clone(), Arc::new(port));
            if let Some(old) = old {
                self.no_local.subtract(&old);
                self.remove_cluster_ips(&old);
            }
            self.changed.insert(name);
        }
    }

    fn remove(&mut self, name: &ServicePortName) {
        if let Some(old) = self.snapshot.services.remove(name) {
            self.no_local.subtract(&old);
            self.remove_cluster_ips(&old);
            self.changed.insert(name.clone());
        }
    }

    fn add_cluster_ips(&mut self, port: &ServicePort) {
        for address in cluster_ips(port) {
            let count = self.snapshot.cluster_ips.entry(address).or_insert(0);
            *count += 1;
            if *count == 1 {
                self.toggle_cluster_ip(address);
            }
        }
    }

    fn remove_cluster_ips(&mut self, port: &ServicePort) {
        for address in cluster_ips(port) {
            if let Entry::Occupied(mut count) = self.snapshot.cluster_ips.entry(address) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                    self.toggle_cluster_ip(address);
                }
            }
        }
    }

    /// An address that comes and goes within one round has not changed.
    fn toggle_cluster_ip(&mut self, address: IpAddr) {
        if !self.changed_cluster_ips.remove(&address) {
            self.changed_cluster_ips.insert(address);
        }
    }
}

impl NoLocalEndpoints {
    fn add(&mut self, port: &ServicePort) {
        let (family, internal, external) = Self::drops(port);
        if let (Some(i), Some(e)) = (self.internal.get_mut(family), self.external.get_mut(family)) {
            *i += usize::from(internal);
            *e += usize::from(external);
        }
    }

    fn subtract(&mut self, port: &ServicePort) {
        let (family, internal, external) = Self::drops(port);
        if let (Some(i), Some(e)) = (self.internal.get_mut(family), self.external.get_mut(family)) {
            *i -= usize::from(internal);
            *e -= usize::from(external);
        }
    }

    fn drops(port: &ServicePort) -> (usize, bool, bool) {
        let family = match port.name.family {
            IpFamily::V4 => 0,
            IpFamily::V6 => 1,
        };
        let (mut internal, mut external) = (false, false);
        for frontend in port.frontends.iter().filter(|f| f.rules.external.action == Action::Drop) {
            match frontend.kind {
                FrontendKind::ClusterIp => internal = true,
                FrontendKind::NodePort | FrontendKind::ExternalIp | FrontendKind::LoadBalancerIp => external = true,
            }
        }
        (family, internal, external)
    }
}

fn cluster_ips(port: &ServicePort) -> impl Iterator<Item = IpAddr> {
    port.frontends.iter().filter_map(|frontend| match (frontend.kind, frontend.address) {
        (FrontendKind::ClusterIp, FrontendAddress::Ip(address)) => Some(address),
        _ => None,
    })
}

fn claims_in(port: &ServicePort) -> impl Iterator<Item = (ServicePortName, Place, Grounds)> {
    let grounds = |kind| Grounds { kind, created_seconds: port.created_seconds };
    port.frontends.iter().map(move |f| (port.name.clone(), Place::of(&port.name, f), grounds(f.kind)))
}

fn belongs_to(name: &ServicePortName, key: &ServiceKey) -> bool {
    name.service == key.name && name.namespace == key.namespace
}

/// Sorts before every ServicePort of the Service.
fn first_name(key: &ServiceKey) -> ServicePortName {
    let (namespace, service) = (Arc::clone(&key.namespace), Arc::clone(&key.name));
    let port = Arc::from("");
    ServicePortName::new(NameParts { namespace, service, port, protocol: Protocol::Tcp, family: IpFamily::V4 })
}
