//! The kernel's decision over what is planned, against the model's: any packet meets in the maps what the snapshot says.

use std::cell::Cell;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use proptest::prelude::*;
use proxy_common::decide::{Chosen, Client, Crossing, Found, LOOPBACK_INTERFACE, Outcome, Tables, new_flow};
use proxy_common::{
    Affinity, Backend, Be16, FlowKey, Frontend, FrontendKey, NODE_ADDRESS_LOCAL, NODE_ADDRESS_NODE_PORT, NodeSettings,
    SourceRange, V4,
};

use super::*;
use crate::dataplane::ebpf::encode::{Circumstances, node_settings};
use crate::model::{
    Action, Algorithm, Answer, EndpointSet, Frontend as ModelFrontend, FrontendAddress, FrontendKind, IpFamily,
    NameParts, NodeConfig, OriginRules, Packet, PodTraffic, Protocol, Rule, ServiceSnapshot, answer,
};

const LIMITS: Limits = Limits { frontends: 256, slots: 1024, backends: 256, source_ranges: 64, endpoints: 256 };
const NODE: [u8; 4] = [192, 168, 0, 2];
const ETH0: u32 = 2;
/// A port that no Service has.
const OTHER_PORT: u16 = 81;

/// The maps as plain tables.
struct Plain {
    frontends: HashMap<FrontendKey<V4>, Frontend>,
    slots: HashMap<u32, u32>,
    backends: HashMap<u32, Backend<V4>>,
    ranges: Vec<Range<V4>>,
    cluster_ips: BTreeSet<IpAddr>,
    node: NodeConfig,
    settings: NodeSettings<V4>,
    random: Cell<u32>,
}

/// Who holds no affinity.
struct Nobody;

impl Client for Nobody {
    fn recall(&self, _service_id: u32) -> Option<&Affinity> {
        None
    }

    fn remember(&self, _service_id: u32, _affinity: &Affinity) {}
}

impl Tables for Plain {
    type A = V4;
    type Client<'a> = Nobody;

    fn frontend(&self, key: &FrontendKey<V4>, into: &mut Frontend) -> bool {
        self.frontends.get(key).inspect(|found| *into = **found).is_some()
    }

    fn settings(&self) -> Option<&NodeSettings<V4>> {
        Some(&self.settings)
    }

    fn slot(&self, index: u32) -> Option<u32> {
        self.slots.get(&index).copied()
    }

    fn backend(&self, id: u32, into: &mut Backend<V4>) -> bool {
        self.backends.get(&id).inspect(|found| *into = **found).is_some()
    }

    fn live(&self, id: u32, generation: u32, into: &mut Backend<V4>) -> bool {
        self.backend(id, into) && into.generation == generation && into.takes_flows()
    }

    fn node_address_flags(&self, address: &V4) -> u32 {
        let ip = address.to_ip();
        let local = if self.node.node_addresses.contains(&ip) { NODE_ADDRESS_LOCAL } else { 0 };
        let node_port = if self.node.node_port_addresses.contains(&ip) { NODE_ADDRESS_NODE_PORT } else { 0 };
        local | node_port
    }

    fn cluster_ip_in_use(&self, address: &V4) -> bool {
        self.cluster_ips.contains(&address.to_ip())
    }

    fn source_range(&self, client: &SourceRange<V4>) -> bool {
        let inside = |(bits, range): &Range<V4>| {
            let network = ipnet::IpNet::new(range.client.to_ip(), (bits - 32) as u8).unwrap();
            range.service_id == client.service_id && network.contains(&client.client.to_ip())
        };
        self.ranges.iter().any(inside)
    }

    fn is_pod_interface(&self, _index: u32) -> bool {
        false
    }

    fn client(&self, _source: &V4) -> Nobody {
        Nobody
    }

    fn random(&self) -> u32 {
        self.random.get()
    }

    fn now_seconds(&self) -> u32 {
        0
    }
}

impl Plain {
    /// What is planned for a snapshot.
    fn of(snapshot: &ServiceSnapshot) -> Self {
        let mut planner = Planner::<V4>::new(LIMITS);
        let (mut ids, mut writes) = (RangeAllocator::new(1, 100), Writes::default());
        for (name, service) in &snapshot.services {
            planner.change(name, Some(service), &mut ids, 0, &mut writes).expect("there is room");
        }
        let circumstances = Circumstances {
            node_ports: (30000, 32767),
            netns_cookie: 1,
            cluster_ips_anywhere: false,
            direct_tables: false,
            tunnels_are_gue: false,
            flood_limit: 0,
        };
        Self {
            frontends: writes.frontends.into_iter().collect(),
            slots: writes.slots.into_iter().collect(),
            backends: writes.backends.into_iter().collect(),
            ranges: writes.ranges,
            cluster_ips: snapshot.cluster_ips.keys().copied().collect(),
            node: (*snapshot.node).clone(),
            settings: node_settings(&snapshot.node, circumstances),
            random: Cell::new(0),
        }
    }

    /// What becomes of a TCP packet: every fate that some random number gives.
    fn fates(&self, source: [u8; 4], destination: SocketAddr) -> BTreeSet<Fate> {
        let egress = self.node.node_addresses.contains(&IpAddr::from(source));
        let own = self.node.node_addresses.contains(&destination.ip());
        let interface = if egress && own { LOOPBACK_INTERFACE } else { ETH0 };
        let key = FlowKey {
            source: V4::from_octets(source),
            destination: V4::from_ip(destination.ip()).unwrap(),
            source_port: Be16::from_host(40000),
            destination_port: Be16::from_host(destination.port()),
            protocol: 6,
            padding: [0; 3],
        };
        let fate = |random| {
            self.random.set(random);
            let (mut found, mut chosen) = (Found::default(), Chosen::default());
            match new_flow(self, Crossing { interface, egress }, &key, true, &mut found, &mut chosen) {
                Outcome::Forward(source) => {
                    let backend = SocketAddr::new(chosen.backend.address.to_ip(), chosen.backend.port.to_host());
                    let own_source = source.masquerade || source.is_direct() || egress;
                    assert_eq!(source.address.to_ip() == IpAddr::from(NODE), own_source);
                    Fate::Forward(backend, source.masquerade, source.is_direct())
                }
                Outcome::Refuse(_) => Fate::Refuse,
                Outcome::Drop(_) => Fate::Drop,
                Outcome::Pass | Outcome::Foreign => Fate::Pass,
            }
        };
        (0..64).map(|step| fate((step << 26) | step)).collect()
    }
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// To an endpoint, whether masqueraded, and whether in a tunnel.
    Forward(SocketAddr, bool, bool),
    Refuse,
    Drop,
    Pass,
}

/// What the model says, put as the kernel does it: a hairpin is masqueraded for its endpoint alone, and an endpoint on the node's own
/// address never. With direct server return nobody else is, and an endpoint elsewhere gets the packet in a tunnel.
fn modelled(snapshot: &ServiceSnapshot, source: [u8; 4], destination: SocketAddr) -> BTreeSet<Fate> {
    let source = IpAddr::from(source);
    match answer(snapshot, &Packet { protocol: Protocol::Tcp, source, destination, input: None }) {
        Answer::Forward { endpoints, direct, .. } => {
            let fate = |endpoint: &Endpoint| {
                let address = endpoint.address();
                let frontend = owner(snapshot, destination).expect("it forwards");
                let rules = frontend.rules;
                let rule = match () {
                    () if snapshot.node.node_addresses.contains(&source) => rules.node,
                    () if snapshot.node.pod_traffic.recognises(source, None) => rules.pod,
                    () => rules.external,
                };
                let own = snapshot.node.node_addresses.contains(&address.ip());
                let (hairpin, asked) = (address.ip() == source, rule.masquerade && !own);
                let tunnelled = direct && asked && !hairpin && !endpoint.local;
                Fate::Forward(address, hairpin || (asked && !direct), tunnelled)
            };
            endpoints.iter().map(fate).collect()
        }
        Answer::Reject => BTreeSet::from([Fate::Refuse]),
        Answer::Drop => BTreeSet::from([Fate::Drop]),
        // An address of the node's own is left to it.
        Answer::Pass => BTreeSet::from([Fate::Pass]),
    }
}

fn owner(snapshot: &ServiceSnapshot, destination: SocketAddr) -> Option<&ModelFrontend> {
    let all = snapshot.services.values().flat_map(|service| &service.frontends);
    let here = all.filter(|frontend| {
        let address = match frontend.address {
            FrontendAddress::Ip(ip) => ip == destination.ip(),
            FrontendAddress::NodePort => snapshot.node.node_port_addresses.contains(&destination.ip()),
        };
        address && frontend.port == destination.port()
    });
    here.min_by_key(|frontend| frontend.address)
}

/// A Service with a ClusterIP, a NodePort and a load-balancer IP.
#[derive(Debug, Clone)]
struct Made {
    cluster: BTreeSet<u8>,
    local: BTreeSet<u8>,
    rules: [(u8, bool); 3],
    guarded: bool,
    direct: bool,
}

fn made() -> impl Strategy<Value = Made> {
    let hosts = || prop::collection::btree_set(1_u8..10, 0..5);
    let rules = prop::array::uniform3((0_u8..4, any::<bool>()));
    (hosts(), hosts(), rules, any::<[bool; 2]>()).prop_map(|(cluster, local, rules, [guarded, direct])| Made {
        cluster,
        local,
        rules,
        guarded,
        direct,
    })
}

fn endpoint(host: u8, local: bool) -> Endpoint {
    // Host 9 is on the node's own address, as a pod with hostNetwork.
    let ip = if host == 9 { IpAddr::from(NODE) } else { IpAddr::from([10, 244, 0, host]) };
    Endpoint::new(SocketAddr::new(ip, 8080), local)
}

fn service(number: u8, made: &Made) -> Arc<ServicePort> {
    let rule = |(action, masquerade): (u8, bool)| {
        // Never to an empty set: the model decides that as a refusal or a drop.
        let action = match action {
            0 if !made.cluster.is_empty() => Action::Forward(EndpointSet::Cluster),
            1 if !made.local.is_empty() => Action::Forward(EndpointSet::Local),
            2 => Action::Drop,
            _ => Action::Reject,
        };
        Rule { action, masquerade }
    };
    let [pod, node, external] = made.rules.map(rule);
    let frontend =
        |address, port, kind| ModelFrontend { address, port, kind, rules: OriginRules { pod, node, external } };
    let ip = |octets: [u8; 4]| FrontendAddress::Ip(IpAddr::from(octets));
    Arc::new(ServicePort {
        name: ServicePortName::new(NameParts {
            namespace: "ns".into(),
            service: format!("s{number}").into(),
            port: "".into(),
            protocol: Protocol::Tcp,
            family: IpFamily::V4,
        }),
        created_seconds: 0,
        frontends: vec![
            frontend(ip([10, 96, 0, number]), 80, FrontendKind::ClusterIp),
            frontend(ip([192, 0, 2, number]), 80, FrontendKind::LoadBalancerIp),
            frontend(FrontendAddress::NodePort, 30000 + u16::from(number), FrontendKind::NodePort),
        ],
        cluster_endpoints: made.cluster.iter().map(|host| endpoint(*host, made.local.contains(host))).collect(),
        local_endpoints: made.local.iter().map(|host| endpoint(*host, true)).collect(),
        kept_endpoints: Vec::new(),
        draining_endpoints: Vec::new(),
        direct_return: made.direct,
        algorithm: Algorithm::Random,
        affinity_seconds: None,
        load_balancer_source_ranges: if made.guarded { vec!["10.0.0.0/8".parse().unwrap()] } else { Vec::new() },
    })
}

fn snapshot(services: &[Made]) -> ServiceSnapshot {
    let own: BTreeSet<IpAddr> = [IpAddr::from(NODE)].into();
    let node = NodeConfig {
        node_port_addresses: own.clone(),
        node_addresses: own,
        masquerade_v4: Some(NODE.into()),
        pod_traffic: PodTraffic::Source(vec!["10.244.0.0/16".parse().unwrap()]),
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
        ..NodeConfig::default()
    };
    let services: Vec<_> = (1..).zip(services).map(|(number, made)| service(number, made)).collect();
    ServiceSnapshot {
        node: Arc::new(node),
        cluster_ips: (1..=services.len() as u8).map(|number| (IpAddr::from([10, 96, 0, number]), 1)).collect(),
        services: services.into_iter().map(|service| (service.name.clone(), service)).collect(),
        ..ServiceSnapshot::default()
    }
}

fn destinations(services: u8) -> Vec<SocketAddr> {
    let of = |octets: [u8; 4], port| SocketAddr::new(IpAddr::from(octets), port);
    (1..=services + 1)
        .flat_map(|number| {
            let node_port = 30000 + u16::from(number);
            let ips = [[10, 96, 0, number], [192, 0, 2, number]];
            let at_ips = ips.into_iter().flat_map(move |ip| [of(ip, 80), of(ip, OTHER_PORT)]);
            at_ips.chain([of(NODE, node_port), of([192, 168, 0, 3], node_port)])
        })
        .collect()
}

proptest! {
    /// Pods, the node, an endpoint itself and the outside, to every address of every Service and to what is none.
    #[test]
    fn a_packet_meets_in_the_maps_what_the_model_says(services in prop::collection::vec(made(), 1..4)) {
        let snapshot = snapshot(&services);
        let plain = Plain::of(&snapshot);
        for source in [[10, 244, 0, 1], [10, 244, 0, 200], NODE, [203, 0, 113, 7], [10, 1, 1, 1]] {
            for destination in destinations(services.len() as u8) {
                let (fates, expected) = (plain.fates(source, destination), modelled(&snapshot, source, destination));
                prop_assert_eq!(fates, expected, "{:?} to {}", source, destination);
            }
        }
    }
}
