//! From one Service and its EndpointSlices to the ServicePorts that this node expresses (kube-proxy 1.36 `pkg/proxy/serviceport.go`
//! and the chains of `nftables/proxier.go`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use super::endpoint::{Candidate, Candidates, Categorized, PolicyUse, categorize, gather};
use super::object::{PortSpec, ServiceObject, SliceObject};
use super::{
    Action, Algorithm, Endpoint, EndpointSet, Forwarding, Frontend, FrontendAddress, FrontendKind, HealthCheck,
    IpFamily, NameParts, OriginRules, Protocol, Rule, ServicePort, ServicePortName,
};

/// What a decision depends on besides the Service. When it changes, every Service is decided again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodePolicy {
    /// Label `topology.kubernetes.io/zone` of the Node.
    pub zone: Option<Arc<str>>,
    /// Masquerade all ClusterIP traffic.
    pub masquerade_all: bool,
    /// Whether IPv4 pods can be told from others.
    pub detects_pods_v4: bool,
    /// The same for IPv6.
    pub detects_pods_v6: bool,
    /// The Node's own IPv4 address: where a source range admits it, the load-balancer IPs are admitted too.
    pub primary_v4: Option<Ipv4Addr>,
    /// The same for IPv6.
    pub primary_v6: Option<Ipv6Addr>,
    /// How clients outside of the cluster reach endpoints on other nodes where the Service does not say.
    pub forwarding: Forwarding,
}

impl NodePolicy {
    fn detects_pods(&self, family: IpFamily) -> bool {
        match family {
            IpFamily::V4 => self.detects_pods_v4,
            IpFamily::V6 => self.detects_pods_v6,
        }
    }

    fn primary(&self, family: IpFamily) -> Option<IpAddr> {
        match family {
            IpFamily::V4 => self.primary_v4.map(IpAddr::V4),
            IpFamily::V6 => self.primary_v6.map(IpAddr::V6),
        }
    }
}

/// Decides every ServicePort of `service`, sorted by name. `slices` are its EndpointSlices, by name. A family without a
/// ClusterIP has no ServicePorts, as in kube-proxy; nor has one whose ClusterIP is the node's own address, which would refuse
/// every other port of the node.
pub fn decide(service: &ServiceObject, slices: &[&SliceObject], policy: &NodePolicy) -> Vec<ServicePort> {
    let mut decided = BTreeMap::new();
    for family in [IpFamily::V4, IpFamily::V6] {
        let cluster_ip = service.cluster_ip(family).filter(|address| policy.primary(family) != Some(*address));
        let Some(cluster_ip) = cluster_ip else { continue };
        for port in &service.ports {
            let ours = PortInFamily::new(service, port, family, cluster_ip);
            let one = ours.decide(slices, policy);
            decided.insert(one.name.clone(), one);
        }
    }
    decided.into_values().collect()
}

/// What a load balancer is told of `service`, for each family in which it has a ClusterIP; nothing for a Service that needs
/// no check. Every local ready address that takes new flows counts once, whatever its ports.
pub fn health_checks(service: &ServiceObject, slices: &[&SliceObject]) -> Vec<(IpFamily, HealthCheck)> {
    let Some(port) = service.health_check_node_port else { return Vec::new() };
    let families = [IpFamily::V4, IpFamily::V6].into_iter().filter(|family| service.cluster_ip(*family).is_some());
    let check = |family| {
        let of_family = slices.iter().filter(|slice| slice.family == family && !slice.ports.is_empty());
        let drained = |slice: &SliceObject, address| {
            let asked = service.balancing.as_ref().and_then(|balancing| balancing.weight(address));
            asked.or(slice.weight) == Some(0)
        };
        let ready = of_family.flat_map(|slice| {
            slice.endpoints.iter().filter(|e| e.local && e.ready && !drained(slice, e.address)).map(|e| e.address)
        });
        let local: BTreeSet<_> = ready.collect();
        (family, HealthCheck { port, local_endpoints: u32::try_from(local.len()).unwrap_or(u32::MAX) })
    };
    families.map(check).collect()
}

/// One port of one Service as one family sees it.
struct PortInFamily<'s> {
    service: &'s ServiceObject,
    port: &'s PortSpec,
    family: IpFamily,
    cluster_ip: IpAddr,
    external_ips: Vec<IpAddr>,
    load_balancer_ips: Vec<IpAddr>,
}

impl<'s> PortInFamily<'s> {
    fn new(service: &'s ServiceObject, port: &'s PortSpec, family: IpFamily, cluster_ip: IpAddr) -> Self {
        let of_family = |list: &[IpAddr]| list.iter().copied().filter(|a| IpFamily::of(*a) == family).collect();
        let external_ips = of_family(&service.external_ips);
        let load_balancer_ips = of_family(&service.load_balancer_ips);
        Self { service, port, family, cluster_ip, external_ips, load_balancer_ips }
    }

    fn externally_accessible(&self) -> bool {
        self.port.node_port.is_some() || !self.external_ips.is_empty() || !self.load_balancer_ips.is_empty()
    }

    /// Policy Cluster is used even with externalTrafficPolicy Local: pods and the node reach an external address through
    /// every endpoint, as if they had gone out and come back.
    fn policy_use(&self) -> PolicyUse {
        let accessible = self.externally_accessible();
        PolicyUse {
            cluster: !self.service.internal_local || accessible,
            local: self.service.internal_local || (self.service.external_local && accessible),
        }
    }

    fn decide(&self, slices: &[&SliceObject], policy: &NodePolicy) -> ServicePort {
        let candidates = gather(slices, self.port, self.family, self.service.balancing.as_deref());
        let endpoints = categorize(&candidates, self.policy_use(), policy.zone.as_ref());
        let frontends = self.frontends(&endpoints, policy);
        ServicePort {
            name: self.name(),
            created_seconds: self.service.created_seconds,
            frontends,
            kept_endpoints: self.kept_endpoints(&candidates, &endpoints),
            draining_endpoints: self.draining_endpoints(&candidates, &endpoints),
            direct_return: self.direct_return(policy),
            algorithm: self.service.balancing.as_ref().map_or(Algorithm::Random, |balancing| balancing.algorithm),
            cluster_endpoints: endpoints.cluster,
            local_endpoints: endpoints.local,
            affinity_seconds: self.service.affinity_seconds,
            load_balancer_source_ranges: self.source_ranges(policy),
        }
    }

    /// Only where a client's packet may cross nodes: a ClusterIP is the cluster's own, and with policy Local nothing crosses.
    fn direct_return(&self, policy: &NodePolicy) -> bool {
        let asked = self.service.balancing.as_ref().and_then(|balancing| balancing.forwarding);
        let forwarding = asked.unwrap_or(policy.forwarding);
        self.externally_accessible() && !self.service.external_local && forwarding.is_direct(self.port.protocol)
    }

    /// Who keeps the UDP flows that it has. Other protocols end their connections themselves.
    fn kept_endpoints(&self, candidates: &Candidates<'_>, endpoints: &Categorized) -> Vec<SocketAddr> {
        if self.port.protocol != Protocol::Udp {
            return Vec::new();
        }
        not_chosen(candidates, endpoints, |candidate| candidate.endpoint.serving)
    }

    /// Who keeps the connections that it has: nobody but the connection's ends says when it is over.
    fn draining_endpoints(&self, candidates: &Candidates<'_>, endpoints: &Categorized) -> Vec<SocketAddr> {
        if self.port.protocol == Protocol::Udp {
            return Vec::new();
        }
        not_chosen(candidates, endpoints, |_| true)
    }

    fn name(&self) -> ServicePortName {
        let (namespace, service) = (Arc::clone(&self.service.key.namespace), Arc::clone(&self.service.key.name));
        let (port, protocol): (_, Protocol) = (Arc::clone(&self.port.name), self.port.protocol);
        ServicePortName::new(NameParts { namespace, service, port, protocol, family: self.family })
    }

    /// An address that appears in several roles keeps the last of this order, as the entries of kube-proxy's maps do.
    fn frontends(&self, endpoints: &Categorized, policy: &NodePolicy) -> Vec<Frontend> {
        let internal = self.internal_rules(endpoints, policy);
        let external = self.external_rules(endpoints, policy);
        let mut by_place = BTreeMap::new();
        let mut add = |address, port, kind, rules| {
            by_place.insert((address, port), Frontend { address, port, kind, rules });
        };
        let port = self.port.port;
        add(FrontendAddress::Ip(self.cluster_ip), port, FrontendKind::ClusterIp, internal);
        for address in &self.external_ips {
            add(FrontendAddress::Ip(*address), port, FrontendKind::ExternalIp, external);
        }
        for address in &self.load_balancer_ips {
            add(FrontendAddress::Ip(*address), port, FrontendKind::LoadBalancerIp, external);
        }
        if let Some(node_port) = self.port.node_port {
            add(FrontendAddress::NodePort, node_port, FrontendKind::NodePort, external);
        }
        by_place.into_values().collect()
    }

    /// ClusterIP: who is not a pod is masqueraded, because the answer has to come back through this node; without pod
    /// CIDRs nobody can be told apart and nobody is.
    fn internal_rules(&self, endpoints: &Categorized, policy: &NodePolicy) -> OriginRules {
        let set = if self.service.internal_local { EndpointSet::Local } else { EndpointSet::Cluster };
        let action = action(endpoints, set);
        let outside = policy.masquerade_all || policy.detects_pods(self.family);
        OriginRules {
            pod: rule(action, policy.masquerade_all),
            node: rule(action, outside),
            external: rule(action, outside),
        }
    }

    /// External addresses. With policy Cluster everything may cross nodes and is masqueraded. With policy Local the client's
    /// address is kept; pods and the node itself take the short cut to every endpoint, and only the node's own packets need
    /// masquerade (their source may be the very address they go to).
    fn external_rules(&self, endpoints: &Categorized, policy: &NodePolicy) -> OriginRules {
        let cluster = action(endpoints, EndpointSet::Cluster);
        if !self.service.external_local {
            let all = rule(cluster, true);
            return OriginRules { pod: all, node: all, external: all };
        }
        let external = rule(action(endpoints, EndpointSet::Local), false);
        let pod = if policy.detects_pods(self.family) { rule(cluster, false) } else { external };
        OriginRules { pod, node: rule(cluster, true), external }
    }

    /// Empty means everybody: no range of this family, or one that holds every address.
    fn source_ranges(&self, policy: &NodePolicy) -> Vec<IpNet> {
        let ranges = self.service.source_ranges.iter().copied();
        let mut ranges: Vec<IpNet> = ranges.filter(|net| IpFamily::of(net.addr()) == self.family).collect();
        if self.load_balancer_ips.is_empty() || ranges.iter().any(|net| net.prefix_len() == 0) {
            return Vec::new();
        }
        let node_admitted =
            policy.primary(self.family).is_some_and(|node| ranges.iter().any(|net| net.contains(&node)));
        if node_admitted {
            // A load-balancer IP may be an address of this node, and then it is the source of the node's own packets to it.
            ranges.extend(self.load_balancer_ips.iter().map(|address| IpNet::from(*address)));
        }
        ranges.sort_unstable();
        ranges.dedup();
        ranges
    }
}

/// The addresses of `candidates` that are in neither list.
fn not_chosen(
    candidates: &Candidates<'_>,
    endpoints: &Categorized,
    wanted: impl Fn(&Candidate<'_>) -> bool,
) -> Vec<SocketAddr> {
    if endpoints.cluster.len() == candidates.len() {
        return Vec::new();
    }
    let chosen: BTreeSet<_> = endpoints.cluster.iter().chain(&endpoints.local).map(Endpoint::address).collect();
    let others = candidates.iter().filter(|candidate| !chosen.contains(&candidate.address) && wanted(candidate));
    others.map(|candidate| candidate.address).collect()
}

/// REJECT where no node has an endpoint, DROP where only this policy has none here.
fn action(endpoints: &Categorized, set: EndpointSet) -> Action {
    let list = match set {
        EndpointSet::Cluster => &endpoints.cluster,
        EndpointSet::Local => &endpoints.local,
    };
    match (endpoints.any, list.is_empty()) {
        (false, _) => Action::Reject,
        (true, true) => Action::Drop,
        (true, false) => Action::Forward(set),
    }
}

/// Masquerade means something only for what is forwarded.
fn rule(action: Action, masquerade: bool) -> Rule {
    Rule { action, masquerade: masquerade && matches!(action, Action::Forward(_)) }
}
