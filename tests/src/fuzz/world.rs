//! Random Services, decided as in a node: from objects to a snapshot, and from one snapshot to the next.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use fastrand::Rng;
use ipnet::IpNet;
use trama_proxy::model::{
    Balancing, Desired, Forwarding, IpFamily, NodeConfig, NodePolicy, PodTraffic, PortSpec, Protocol, ServiceKey,
    ServiceObject, SliceEndpoint, SliceObject, SlicePort, decide,
};

use super::bed::{Link, balancer_ip, cluster_ip, external_ip, local_pod, machine, neighbour, outside, remote_pod};

/// Services of a world at most.
const SERVICES_MAX: u16 = 12;
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
/// A port that no endpoint listens on and no Service has.
pub(crate) const NO_PORT: u16 = 81;

/// The objects of a cluster, and what they come to on this node.
pub(crate) struct World {
    pub(crate) desired: Desired,
    policy: NodePolicy,
    /// Some Services ask for direct server return.
    direct: bool,
    services: Vec<(ServiceObject, Vec<SliceObject>)>,
}

impl World {
    /// A node with its Services. `links` are the indices of the interfaces by [`Link`]; `direct` lets Services ask for direct server return.
    pub(crate) fn new(rng: &mut Rng, links: [u32; 4], direct: bool) -> Self {
        let by_interface = rng.u8(0..4) == 0;
        let mut world = Self {
            desired: Desired::default(),
            policy: NodePolicy {
                zone: Some("z1".into()),
                masquerade_all: rng.u8(0..8) == 0,
                detects_pods_v4: true,
                detects_pods_v6: true,
                primary_v4: v4(machine(11)),
                primary_v6: v6(machine(11)),
                forwarding: if direct { Forwarding::ALL[rng.usize(0..3)] } else { Forwarding::Snat },
            },
            direct,
            services: Vec::new(),
        };
        world.desired.set_node(node(rng, links, by_interface));
        for number in 1..=rng.u16(2..=SERVICES_MAX) {
            world.put(rng, number);
        }
        world
    }

    /// Makes Service `number` anew, or removes it.
    pub(crate) fn change(&mut self, rng: &mut Rng) {
        let number = rng.u16(1..=SERVICES_MAX);
        let at = self.services.iter().position(|(service, _)| service.key == key(number));
        match (at, rng.u8(0..10)) {
            (Some(at), 0) => {
                let (service, _) = self.services.remove(at);
                self.replace(&service.key, Vec::new());
            }
            // Its endpoints alone: what happens most.
            (Some(at), 1..=8) => {
                self.services[at].1 = slices(rng, number, &self.services[at].0);
                self.decide(at);
            }
            _ => self.put(rng, number),
        }
    }

    fn put(&mut self, rng: &mut Rng, number: u16) {
        let service = service(rng, number, self.direct);
        let slices = slices(rng, number, &service);
        self.services.retain(|(other, _)| other.key != service.key);
        self.services.push((service, slices));
        self.decide(self.services.len() - 1);
    }

    fn decide(&mut self, at: usize) {
        let (service, slices) = &self.services[at];
        let ports = decide(service, &slices.iter().collect::<Vec<_>>(), &self.policy);
        self.replace(&service.key.clone(), ports);
    }

    /// Those that gained or lost an address by it are put again.
    fn replace(&mut self, key: &ServiceKey, ports: Vec<trama_proxy::model::ServicePort>) {
        for touched in self.desired.replace(key, ports) {
            if let Some((service, slices)) = self.services.iter().find(|(service, _)| service.key == touched) {
                let ports = decide(service, &slices.iter().collect::<Vec<_>>(), &self.policy);
                self.desired.replace(&touched, ports);
            }
        }
    }
}

fn v4(pair: [IpAddr; 2]) -> Option<std::net::Ipv4Addr> {
    pair.into_iter().find_map(|ip| if let IpAddr::V4(ip) = ip { Some(ip) } else { None })
}

fn v6(pair: [IpAddr; 2]) -> Option<std::net::Ipv6Addr> {
    pair.into_iter().find_map(|ip| if let IpAddr::V6(ip) = ip { Some(ip) } else { None })
}

fn network(pair: [IpAddr; 2], bits: [u8; 2]) -> Vec<IpNet> {
    pair.into_iter().zip(bits).filter_map(|(ip, bits)| IpNet::new(ip, bits).ok()).map(|net| net.trunc()).collect()
}

fn node(rng: &mut Rng, links: [u32; 4], by_interface: bool) -> NodeConfig {
    let own: BTreeSet<IpAddr> = [machine(11), neighbour(11)].concat().into_iter().collect();
    let first: BTreeSet<IpAddr> = machine(11).into_iter().collect();
    NodeConfig {
        node_port_addresses: if rng.bool() { own.clone() } else { first },
        node_addresses: own,
        masquerade_v4: v4(machine(11)),
        masquerade_v6: v6(machine(11)).filter(|_| rng.u8(0..16) != 0),
        pod_traffic: match by_interface {
            true => PodTraffic::Prefix(Link::Pods.name().into()),
            false => PodTraffic::Source(network(local_pod(0), [16, 32])),
        },
        service_cidrs: if rng.u8(0..5) == 0 { Vec::new() } else { network(cluster_ip(0), [16, 112]) },
        uplinks: [links[Link::Eth0 as usize]].into(),
        interfaces: Link::ALL.into_iter().map(|link| (links[link as usize], link.name().into())).collect(),
        ..NodeConfig::default()
    }
}

fn key(number: u16) -> ServiceKey {
    ServiceKey { namespace: "ns".into(), name: format!("s{number}").into() }
}

fn service(rng: &mut Rng, number: u16, direct: bool) -> ServiceObject {
    let families = [&[0, 1][..], &[0, 1], &[0], &[1]][rng.usize(0..4)];
    let exposed = rng.u8(0..3) != 0;
    let protocol = PROTOCOLS[[0, 0, 0, 1, 1, 1, 2][rng.usize(0..7)]];
    let port = |index: u16, protocol| PortSpec {
        name: format!("p{index}").into(),
        protocol,
        port: 80 + 10 * index,
        node_port: exposed.then_some(30_000 + number * 4 + index),
    };
    let mut ports = vec![port(0, protocol)];
    if rng.bool() {
        ports.push(port(1, PROTOCOLS[rng.usize(0..3)]));
    }
    let some = |rng: &mut Rng, ips: [IpAddr; 2]| if exposed && rng.bool() { ips.to_vec() } else { Vec::new() };
    // Another Service may want the same external IP.
    let external = external_ip(rng.u16(1..=SERVICES_MAX));
    ServiceObject {
        key: key(number),
        created_seconds: rng.i64(0..100),
        cluster_ips: families.iter().map(|of| cluster_ip(number)[*of]).collect(),
        ports,
        external_ips: some(rng, external),
        load_balancer_ips: some(rng, balancer_ip(number)),
        source_ranges: if rng.u8(0..3) == 0 { ranges(rng) } else { Vec::new() },
        affinity_seconds: (rng.u8(0..4) == 0).then_some(10_800),
        external_local: exposed && rng.u8(0..3) == 0,
        internal_local: rng.u8(0..5) == 0,
        health_check_node_port: None,
        balancing: balancing(rng, direct).map(Box::new),
    }
}

fn ranges(rng: &mut Rng) -> Vec<IpNet> {
    let near = network(outside(rng.u16(0..256)), [25, 121]);
    let pods = network(local_pod(0), [24, 64]);
    if rng.bool() { near } else { [near, pods].concat() }
}

fn balancing(rng: &mut Rng, direct: bool) -> Option<Balancing> {
    let algorithm = [None, None, Some("random"), Some("maglev"), Some("least-connections")][rng.usize(0..5)];
    let weights = format!("{}={},{}=0", local_pod(2)[0], rng.u8(1..6), remote_pod(3)[0]);
    let weights = (rng.u8(0..4) == 0).then_some(weights.as_str());
    let forwarding = if direct { [None, Some("dsr"), Some("dsr"), Some("hybrid")][rng.usize(0..4)] } else { None };
    Balancing::parse(algorithm, weights, forwarding)
}

fn slices(rng: &mut Rng, number: u16, service: &ServiceObject) -> Vec<SliceObject> {
    [IpFamily::V4, IpFamily::V6].into_iter().map(|family| slice(rng, number, service, family)).collect()
}

fn slice(rng: &mut Rng, number: u16, service: &ServiceObject, family: IpFamily) -> SliceObject {
    let of = usize::from(family == IpFamily::V6);
    let mut endpoints = Vec::new();
    let empty = rng.u8(0..10) == 0;
    for host in 2..=9 {
        if !empty && rng.u8(0..4) == 0 {
            endpoints.push(endpoint(rng, local_pod(host)[of], true));
        }
        if !empty && host < 9 && rng.u8(0..4) == 0 {
            endpoints.push(endpoint(rng, remote_pod(host)[of], false));
        }
    }
    // Pods with hostNetwork, here and there.
    if rng.u8(0..6) == 0 {
        endpoints.push(endpoint(rng, machine(11)[of], true));
    }
    if rng.u8(0..6) == 0 {
        endpoints.push(endpoint(rng, machine(12)[of], false));
    }
    let port = |spec: &PortSpec| SlicePort {
        name: Arc::clone(&spec.name),
        protocol: spec.protocol,
        // Some Services share their endpoints.
        port: 8080 + number % 3,
    };
    SliceObject {
        name: format!("s{number}-{of}").into(),
        service: service.key.clone(),
        family,
        ports: service.ports.iter().map(port).collect(),
        endpoints: endpoints.into(),
        weight: None,
        rejected: 0,
    }
}

fn endpoint(rng: &mut Rng, address: IpAddr, local: bool) -> SliceEndpoint {
    let terminating = rng.u8(0..8) == 0;
    let ready = !terminating && rng.u8(0..8) != 0;
    SliceEndpoint {
        address,
        local,
        ready,
        serving: ready || rng.bool(),
        terminating,
        has_node_hints: false,
        hinted_for_node: false,
        zone_hints: None,
    }
}

/// Every place where something of the snapshot listens, and its protocol.
pub(crate) fn places(desired: &Desired) -> Vec<(SocketAddr, u8)> {
    use trama_proxy::model::FrontendAddress;
    let snapshot = desired.snapshot();
    let mut all = Vec::new();
    for service in snapshot.services.values() {
        for frontend in &service.frontends {
            let addresses: Vec<IpAddr> = match frontend.address {
                FrontendAddress::Ip(ip) => vec![ip],
                FrontendAddress::NodePort => {
                    let of = |ip: &&IpAddr| IpFamily::of(**ip) == service.name.family;
                    snapshot.node.node_addresses.iter().filter(of).copied().collect()
                }
            };
            let at = |ip| (SocketAddr::new(ip, frontend.port), service.name.protocol as u8);
            all.extend(addresses.into_iter().map(at));
        }
    }
    all
}
