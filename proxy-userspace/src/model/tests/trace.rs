//! What a packet meets in a snapshot: the meaning of the model's types, written a second time.

use std::net::{IpAddr, SocketAddr};

use crate::model::{
    Action, EndpointSet, Frontend, FrontendAddress, FrontendKind, Protocol, ServicePort, ServiceSnapshot,
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// To one of these; whether the source becomes the node's.
    Dnat(Vec<String>, bool),
    Reject,
    Drop,
    Pass,
}

fn answers(snapshot: &ServiceSnapshot, frontend: &Frontend, dst: SocketAddr) -> bool {
    let here = match frontend.address {
        FrontendAddress::Ip(address) => address == dst.ip(),
        FrontendAddress::NodePort => snapshot.node.node_port_addresses.contains(&dst.ip()),
    };
    here && frontend.port == dst.port()
}

fn admitted(service: &ServicePort, frontend: &Frontend, src: IpAddr) -> bool {
    let ranges = &service.load_balancer_source_ranges;
    frontend.kind != FrontendKind::LoadBalancerIp || ranges.is_empty() || ranges.iter().any(|net| net.contains(&src))
}

/// The verdict for the first packet of a connection.
pub(crate) fn trace(snapshot: &ServiceSnapshot, protocol: Protocol, src: IpAddr, dst: SocketAddr) -> Verdict {
    let of_protocol = snapshot.services.values().filter(|service| service.name.protocol == protocol);
    let all = of_protocol.flat_map(|service| service.frontends.iter().map(move |frontend| (service, frontend)));
    let mut hits: Vec<_> = all.filter(|(_, frontend)| answers(snapshot, frontend, dst)).collect();
    // An address of its own goes before the NodePort wildcard.
    hits.sort_by_key(|(_, frontend)| frontend.address);
    let Some((service, frontend)) = hits.first() else { return Verdict::Pass };
    if !admitted(service, frontend, src) {
        return Verdict::Drop;
    }
    let node = &snapshot.node;
    let rule = if node.node_addresses.contains(&src) {
        frontend.rules.node
    } else if node.pod_cidrs.iter().any(|net| net.contains(&src)) {
        frontend.rules.pod
    } else {
        frontend.rules.external
    };
    match rule.action {
        Action::Reject => Verdict::Reject,
        Action::Drop => Verdict::Drop,
        Action::Forward(set) => {
            let list = match set {
                EndpointSet::Cluster => &service.cluster_endpoints,
                EndpointSet::Local => &service.local_endpoints,
            };
            assert!(!list.is_empty(), "{}: forwards to nobody", service.name);
            let hairpin = list.len() == 1 && list[0].address.ip() == src && list[0].local;
            Verdict::Dnat(list.iter().map(|e| e.address.to_string()).collect(), rule.masquerade || hairpin)
        }
    }
}

/// [`trace`] of a TCP packet with addresses as text.
pub(crate) fn tcp(snapshot: &ServiceSnapshot, src: &str, dst: &str) -> Verdict {
    trace(snapshot, Protocol::Tcp, src.parse().unwrap(), dst.parse().unwrap())
}

/// A verdict that forwards.
pub(crate) fn to(backends: &[&str], masquerade: bool) -> Verdict {
    Verdict::Dnat(backends.iter().map(ToString::to_string).collect(), masquerade)
}
