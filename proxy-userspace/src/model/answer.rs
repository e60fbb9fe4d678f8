//! What the model says of one new connection: the meaning of the snapshot's types, as a backend has to express it.
//!
//! Linear in the number of frontends: for explanations and tests, not for packets.

use std::net::{IpAddr, SocketAddr};

use super::{
    Action, Endpoint, EndpointSet, Frontend, FrontendAddress, FrontendKind, IpFamily, NodeConfig, Protocol, Rule,
    ServicePort, ServiceSnapshot,
};

/// The first packet of a connection, as this node sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Its protocol.
    pub protocol: Protocol,
    /// Where it comes from. One of the node's own addresses, or a loopback one, means that the node made it.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: SocketAddr,
    /// The interface through which it came in; `None` where that is not known, or the node made it.
    pub input: Option<&'a str>,
}

/// What becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It goes to one of these, each with the same chance.
    Forward {
        /// The endpoints that may be chosen; never empty.
        endpoints: Vec<Endpoint>,
        /// Whether its source becomes the node's. A hairpin connection (the client is the chosen endpoint) is masqueraded
        /// even where this is false, unless it is the only choice: then this is true.
        masquerade: bool,
        /// Whether it is masqueraded for no endpoint after all but a hairpin connection's, where the backend is eBPF: direct server return. An
        /// endpoint on another node then gets the packet as it is, in a tunnel. Only together with `masquerade`.
        direct: bool,
    },
    /// It is refused.
    Reject,
    /// It is dropped silently.
    Drop,
    /// It is none of ours.
    Pass,
}

/// Decides `packet` by `snapshot`.
pub fn answer(snapshot: &ServiceSnapshot, packet: &Packet<'_>) -> Answer {
    match owner(snapshot, packet) {
        Some((service, frontend)) => at_frontend(&snapshot.node, service, frontend, packet),
        None => at_unserved(snapshot, packet.destination.ip()),
    }
}

/// Who answers at the destination. An address of its own goes before the NodePort wildcard.
fn owner<'s>(snapshot: &'s ServiceSnapshot, packet: &Packet<'_>) -> Option<(&'s ServicePort, &'s Frontend)> {
    let of_protocol = snapshot.services.values().filter(|service| service.name.protocol == packet.protocol);
    let all = of_protocol.flat_map(|service| service.frontends.iter().map(move |frontend| (&**service, frontend)));
    all.filter(|(service, frontend)| answers(&snapshot.node, service, frontend, packet))
        .min_by_key(|(_, frontend)| frontend.address)
}

fn answers(node: &NodeConfig, service: &ServicePort, frontend: &Frontend, packet: &Packet<'_>) -> bool {
    let destination = packet.destination;
    let here = match frontend.address {
        FrontendAddress::Ip(address) => address == destination.ip(),
        FrontendAddress::NodePort => {
            service.name.family == IpFamily::of(destination.ip())
                && (node.node_port_addresses.contains(&destination.ip()) || answers_on_loopback(node, packet))
        }
    };
    here && frontend.port == destination.port()
}

/// Only the node's own sockets reach its loopback addresses.
fn answers_on_loopback(node: &NodeConfig, packet: &Packet<'_>) -> bool {
    let enabled = match packet.destination.ip() {
        IpAddr::V4(_) => node.loopback_node_ports_v4,
        IpAddr::V6(_) => node.loopback_node_ports_v6,
    };
    enabled && packet.destination.ip().is_loopback() && from_node(node, packet.source)
}

fn from_node(node: &NodeConfig, source: IpAddr) -> bool {
    source.is_loopback() || node.node_addresses.contains(&source)
}

fn at_frontend(node: &NodeConfig, service: &ServicePort, frontend: &Frontend, packet: &Packet<'_>) -> Answer {
    if !admitted(service, frontend, packet.source) {
        return Answer::Drop;
    }
    let (rule, external) = rule_for(node, frontend, packet);
    match rule.action {
        Action::Reject => Answer::Reject,
        Action::Drop => Answer::Drop,
        Action::Forward(set) => {
            let direct = external && rule.masquerade && service.direct_return;
            forward(service, set, rule, packet.source, direct)
        }
    }
}

fn admitted(service: &ServicePort, frontend: &Frontend, source: IpAddr) -> bool {
    let ranges = &service.load_balancer_source_ranges;
    frontend.kind != FrontendKind::LoadBalancerIp || ranges.is_empty() || ranges.iter().any(|net| net.contains(&source))
}

/// The rule, and whether it is the one for clients outside of the cluster.
fn rule_for(node: &NodeConfig, frontend: &Frontend, packet: &Packet<'_>) -> (Rule, bool) {
    if from_node(node, packet.source) {
        (frontend.rules.node, false)
    } else if node.pod_traffic.recognises(packet.source, packet.input) {
        (frontend.rules.pod, false)
    } else {
        (frontend.rules.external, true)
    }
}

fn forward(service: &ServicePort, set: EndpointSet, rule: Rule, source: IpAddr, direct: bool) -> Answer {
    let endpoints = match set {
        EndpointSet::Cluster => service.cluster_endpoints.clone(),
        EndpointSet::Local => service.local_endpoints.clone(),
    };
    let hairpin = endpoints.iter().all(|endpoint| endpoint.local && endpoint.address().ip() == source);
    Answer::Forward { masquerade: rule.masquerade || hairpin, endpoints, direct }
}

/// An address that some Service has, at a port that none serves; one that a Service could have; any other.
fn at_unserved(snapshot: &ServiceSnapshot, destination: IpAddr) -> Answer {
    if snapshot.cluster_ips.contains_key(&destination) {
        Answer::Reject
    } else if snapshot.node.service_cidrs.iter().any(|net| net.contains(&destination)) {
        Answer::Drop
    } else {
        Answer::Pass
    }
}
