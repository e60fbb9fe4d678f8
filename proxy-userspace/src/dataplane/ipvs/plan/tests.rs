//! The plan against the model: whatever the order of changes, what the kernel holds says of every packet what the model says.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;

use super::*;
use crate::dataplane::elements::Words;
use crate::dataplane::ipvs::layout::Origin;
use crate::dataplane::ipvs::marks::{DROP, MASQUERADE, REJECT};
use crate::model::{
    Action, Algorithm, Answer, Endpoint, EndpointSet, Frontend, FrontendAddress, FrontendKind, NameParts, NodeConfig,
    OriginRules, Packet, PodTraffic, Rule, ServicePort, answer, diff,
};

/// What the kernel would hold.
#[derive(Default)]
struct Kernel {
    elements: BTreeMap<Key, Value>,
    held: BTreeMap<ServiceId, Held>,
}

impl Kernel {
    fn write(&mut self, elements: &Elements) {
        for key in &elements.delete {
            assert!(self.elements.remove(key).is_some(), "{key:?} is not there to be deleted");
        }
        for (key, value) in &elements.add {
            assert!(self.elements.insert(key.clone(), *value).is_none(), "{key:?} is there already");
        }
    }

    /// Every command must be one that IPVS takes.
    fn run(&mut self, commands: &[Command]) {
        for command in commands {
            let has = |id: &ServiceId| self.held.get(id);
            let server = |id, address| has(id).and_then(|held| held.servers.get(address));
            let valid = match command {
                Command::AddService(id, _) => has(id).is_none_or(|held| held.scheduler.is_empty()),
                Command::SetScheduler(id, _) | Command::DeleteService(id) => has(id).is_some(),
                Command::DeleteServiceAt(_) => false,
                Command::AddServer(id, address, _) => has(id).is_some() && server(id, address).is_none(),
                Command::SetWeight(id, address, _) | Command::DeleteServer(id, address) => {
                    server(id, address).is_some()
                }
            };
            assert!(valid, "{command:?}");
            note(&mut self.held, *command);
        }
    }

    /// Reads the maps as the rules do.
    fn answer(&self, node: &NodeConfig, packet: &Packet<'_>) -> Answer {
        let family = IpFamily::of(packet.destination.ip());
        let (to, port) = (packet.destination.ip(), packet.destination.port());
        let find = |set, first: &Words| self.elements.get(&Key { family, set, first: *first, last: None }).copied();
        let member = |set, address| find(set, &Words::new().address(address)).is_some();
        let origin = match packet.source {
            source if member(SetName::NodeAddresses, source) => Origin::Node,
            source if node.pod_traffic.recognises(source, packet.input) => Origin::Pod,
            _ => Origin::External,
        };
        let frontend = Words::new().address(to).protocol(packet.protocol).port(port);
        let node_port = Words::new().protocol(packet.protocol).port(port);
        let at_node = || member(SetName::NodePortAddresses, to).then(|| find(SetName::NodePorts(origin), &node_port));
        let Some(value) = find(SetName::Frontends(origin), &frontend).or_else(|| at_node().flatten()) else {
            return match node.service_cidrs.iter().any(|net| net.contains(&to)) {
                _ if member(SetName::ClusterIps, to) => Answer::Reject,
                true => Answer::Drop,
                false => Answer::Pass,
            };
        };
        let client = frontend.address(packet.source);
        let admitted = self.elements.keys().any(|key| {
            let ranges = (key.family, key.set) == (family, SetName::SourceRanges);
            ranges && key.first <= client && key.last.as_ref().is_some_and(|last| client <= *last)
        });
        if find(SetName::Restricted, &frontend).is_some() && !admitted {
            return Answer::Drop;
        }
        match value {
            Value::Mark(REJECT) => Answer::Reject,
            Value::Mark(DROP) => Answer::Drop,
            Value::Mark(mark) => self.forward(family, mark, packet.source),
            other => panic!("{other:?}"),
        }
    }

    fn forward(&self, family: IpFamily, mark: u32, source: IpAddr) -> Answer {
        let kernel_family = match family {
            IpFamily::V4 => node_sys::ipvs::Family::Ipv4,
            IpFamily::V6 => node_sys::ipvs::Family::Ipv6,
        };
        let id = ServiceId { family: kernel_family, mark: mark & !MASQUERADE };
        let servers = self.held[&id].servers.iter().filter(|(_, weight)| **weight > 0);
        let hairpin = |address: IpAddr| {
            let pair = Words::new().address(address).address(address);
            self.elements.contains_key(&Key { family, set: SetName::Hairpin, first: pair, last: None })
        };
        let endpoints: Vec<Endpoint> =
            servers.map(|(address, _)| Endpoint::new(*address, hairpin(address.ip()))).collect();
        let only_itself = endpoints.iter().all(|endpoint| endpoint.local && endpoint.address().ip() == source);
        Answer::Forward { masquerade: mark & MASQUERADE != 0 || only_itself, endpoints, direct: false }
    }

    /// A client that sticks is sent to an endpoint of its own virtual service, which has that one only.
    fn check_affinity(&self) {
        for (key, value) in self.elements.iter().filter(|(key, _)| key.set == SetName::Targets) {
            let Value::Mark(mark) = value else { panic!("{value:?}") };
            let usable = Key { set: SetName::Usable, first: Words::new().number(*mark), ..key.clone() };
            assert!(self.elements.contains_key(&usable), "{mark:#x}");
            let servers = self.held.iter().find(|(id, _)| id.mark == *mark).map(|(_, held)| &held.servers).unwrap();
            assert_eq!(servers.values().filter(|weight| **weight > 0).count(), 1, "{mark:#x}");
        }
    }
}

fn sorted(answer: Answer) -> Answer {
    match answer {
        Answer::Forward { mut endpoints, masquerade, direct } => {
            endpoints.sort();
            Answer::Forward { endpoints, masquerade, direct }
        }
        other => other,
    }
}

fn node() -> Arc<NodeConfig> {
    let addresses: BTreeSet<IpAddr> =
        ["172.18.0.11", "172.19.0.11", "fd00:172::11"].map(|ip| ip.parse().unwrap()).into();
    Arc::new(NodeConfig {
        node_port_addresses: addresses.iter().copied().filter(|ip| *ip != IpAddr::from([172, 19, 0, 11])).collect(),
        node_addresses: addresses,
        pod_traffic: PodTraffic::Source(vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/64".parse().unwrap()]),
        service_cidrs: vec!["10.96.0.0/24".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        ..NodeConfig::default()
    })
}

const SOURCES: [&str; 7] =
    ["10.244.1.2", "10.244.2.2", "172.18.0.11", "172.18.0.200", "fd00:244::2", "fd00:172::11", "fd00:172::200"];
const DESTINATIONS: [&str; 8] =
    ["10.96.0.1", "10.96.0.2", "203.0.113.1", "172.18.0.11", "172.19.0.11", "fd00:96::1", "fd00:96::2", "fd00:172::11"];
const PORTS: [u16; 3] = [80, 30080, 30081];

fn check(kernel: &Kernel, snapshot: &ServiceSnapshot) {
    kernel.check_affinity();
    for (source, to) in SOURCES.iter().flat_map(|source| DESTINATIONS.map(|to| (source, to))) {
        let (source, to): (IpAddr, IpAddr) = (source.parse().unwrap(), to.parse().unwrap());
        if source.is_ipv4() != to.is_ipv4() {
            continue;
        }
        for (port, protocol) in PORTS.iter().flat_map(|port| [(port, Protocol::Tcp), (port, Protocol::Udp)]) {
            let packet = Packet { protocol, source, destination: SocketAddr::new(to, *port), input: None };
            let wanted = sorted(answer(snapshot, &packet));
            assert_eq!(sorted(kernel.answer(&snapshot.node, &packet)), wanted, "{packet:?}");
        }
    }
}

fn arbitrary_rule() -> impl Strategy<Value = Rule> {
    let action = prop_oneof![
        3 => Just(Action::Forward(EndpointSet::Cluster)),
        2 => Just(Action::Forward(EndpointSet::Local)),
        1 => Just(Action::Reject),
        1 => Just(Action::Drop),
    ];
    (action, any::<bool>()).prop_map(|(action, masquerade)| Rule { action, masquerade })
}

fn arbitrary_service(index: u8) -> impl Strategy<Value = Option<ServicePort>> {
    let rules = (arbitrary_rule(), arbitrary_rule(), arbitrary_rule()).prop_map(|(pod, node, external)| OriginRules {
        pod,
        node,
        external,
    });
    let ranges =
        proptest::sample::subsequence(vec!["172.18.0.0/24", "172.18.0.128/25", "10.244.1.0/24", "fd00::/16"], 0..=3);
    let endpoints = proptest::collection::btree_set((1..5u8, any::<bool>()), 1..4);
    let affinity = proptest::option::of(prop_oneof![Just(10u32), Just(10_800)]);
    (any::<bool>(), proptest::collection::vec(rules, 3), endpoints, ranges, affinity, any::<bool>()).prop_map(
        move |(exists, rules, endpoints, ranges, affinity_seconds, v6)| {
            exists.then(|| service(index, &rules, &endpoints, &ranges, affinity_seconds, v6 && index == 2))
        },
    )
}

fn service(
    index: u8,
    rules: &[OriginRules],
    endpoints: &BTreeSet<(u8, bool)>,
    ranges: &[&str],
    affinity_seconds: Option<u32>,
    v6: bool,
) -> ServicePort {
    let at = |prefix4: [u8; 3], prefix6: u16, last: u8| -> IpAddr {
        let [a, b, c] = prefix4;
        if v6 { IpAddr::from([0xfd00, prefix6, 0, 0, 0, 0, 0, u16::from(last)]) } else { IpAddr::from([a, b, c, last]) }
    };
    let frontend = |address, port, kind, rules: usize| Frontend { address, port, kind, rules: rules_at(rules) };
    fn rules_at(_: usize) -> OriginRules {
        let rule = Rule { action: Action::Reject, masquerade: false };
        OriginRules { pod: rule, node: rule, external: rule }
    }
    let mut frontends = vec![
        frontend(FrontendAddress::Ip(at([10, 96, 0], 0x96, index)), 80, FrontendKind::ClusterIp, 0),
        frontend(FrontendAddress::NodePort, 30079 + u16::from(index), FrontendKind::NodePort, 1),
    ];
    if index == 1 && !v6 {
        frontends.push(frontend(FrontendAddress::Ip([203, 0, 113, 1].into()), 80, FrontendKind::LoadBalancerIp, 2));
    }
    for (frontend, rules) in frontends.iter_mut().zip(rules) {
        frontend.rules = *rules;
    }
    let list: BTreeSet<Endpoint> = endpoints
        .iter()
        .map(|(last, _)| Endpoint::new(SocketAddr::new(at([10, 244, 1], 0x244, *last), 8080), *last < 3))
        .collect();
    let name = ServicePortName::new(NameParts {
        namespace: "default".into(),
        service: format!("s{index}").into(),
        port: "".into(),
        protocol: if index == 2 { Protocol::Udp } else { Protocol::Tcp },
        family: if v6 { IpFamily::V6 } else { IpFamily::V4 },
    });
    let ranges: Vec<IpNet> = ranges.iter().map(|net| net.parse().unwrap()).collect();
    ServicePort {
        name,
        created_seconds: 0,
        kept_endpoints: Vec::new(),
        draining_endpoints: Vec::new(),
        direct_return: false,
        algorithm: Algorithm::Random,
        frontends,
        cluster_endpoints: list.iter().copied().collect(),
        local_endpoints: list.iter().copied().take(1).collect(),
        affinity_seconds,
        load_balancer_source_ranges: ranges,
    }
}

fn snapshot(services: &[Option<ServicePort>]) -> ServiceSnapshot {
    let services: Vec<&ServicePort> = services.iter().flatten().collect();
    let cluster_ips =
        services.iter().flat_map(|service| &service.frontends).filter_map(|frontend| match frontend.address {
            FrontendAddress::Ip(ip) if frontend.kind == FrontendKind::ClusterIp => Some((ip, 1)),
            _ => None,
        });
    ServiceSnapshot {
        node: node(),
        cluster_ips: cluster_ips.collect(),
        services: services.iter().map(|service| (service.name.clone(), Arc::new((*service).clone()))).collect(),
        ..ServiceSnapshot::default()
    }
}

fn lead(planner: &Planner, kernel: &mut Kernel, ids: impl IntoIterator<Item = ServiceId>) -> Commands {
    let mut commands = Commands::default();
    for id in ids {
        let wanted = planner.service(id);
        commands.lead(id, kernel.held.get(&id), wanted, Scheduler::RoundRobin);
        if let Some(wanted) = wanted {
            kernel.held.entry(id).or_default().abrupt = !wanted.graceful;
        }
    }
    commands
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_kernel_says_what_the_model_says(
        rounds in proptest::collection::vec((arbitrary_service(1), arbitrary_service(2)), 1..6),
    ) {
        let (mut planner, mut kernel) = (Planner::default(), Kernel::default());
        let mut before = ServiceSnapshot { node: node(), ..ServiceSnapshot::default() };
        planner.rebuild(&before);
        for family in [IpFamily::V4, IpFamily::V6] {
            kernel.write(&planner.elements_since(planner.everything(family, BTreeMap::new())));
        }
        for (first, second) in rounds {
            let after = snapshot(&[first, second]);
            let touched = planner.change(&after, &diff(&before, &after));
            let commands = lead(&planner, &mut kernel, touched.services);
            kernel.run(&commands.before);
            kernel.write(&planner.elements_since(touched.elements));
            kernel.run(&commands.after);
            check(&kernel, &after);
            before = after;
        }
        // Another process finds everything as it would make it.
        let mut another = Planner::default();
        another.rebuild(&before);
        for family in [IpFamily::V4, IpFamily::V6] {
            let there = kernel.elements.iter().filter(|(key, _)| key.family == family);
            let there = there.map(|(key, value)| (key.clone(), *value)).collect();
            prop_assert_eq!(another.elements_since(another.everything(family, there)), Elements::default());
        }
        let ids: Vec<ServiceId> = kernel.held.keys().copied().collect();
        prop_assert!(lead(&another, &mut kernel, ids).before.is_empty());
    }
}

#[test]
fn a_server_of_tcp_drains_and_one_of_udp_goes_at_once() {
    let id = ServiceId { family: node_sys::ipvs::Family::Ipv4, mark: 0x7000_0100 };
    let address: SocketAddr = "10.244.1.2:8080".parse().unwrap();
    for (graceful, expected) in
        [(true, Command::SetWeight(id, address, 0)), (false, Command::DeleteServer(id, address))]
    {
        let held = Held { scheduler: "rr".into(), servers: [(address, 1)].into(), abrupt: !graceful };
        let mut commands = Commands::default();
        let wanted = Virtual { endpoints: BTreeSet::new(), kept: BTreeSet::new(), graceful };
        commands.lead(id, Some(&held), Some(&wanted), Scheduler::RoundRobin);
        assert_eq!(commands, Commands { before: Vec::new(), after: vec![expected] });
        let mut commands = Commands::default();
        let kept = Virtual { kept: [address].into(), ..wanted };
        commands.lead(id, Some(&held), Some(&kept), Scheduler::RoundRobin);
        assert_eq!(commands.after, [Command::SetWeight(id, address, 0)], "its flows stay");
        // And comes back.
        let held = Held { servers: [(address, 0)].into(), ..held };
        let mut commands = Commands::default();
        let wanted = Virtual { endpoints: [address].into(), kept: BTreeSet::new(), graceful };
        commands.lead(id, Some(&held), Some(&wanted), Scheduler::LeastConnections);
        let before = vec![Command::SetScheduler(id, Scheduler::LeastConnections), Command::SetWeight(id, address, 1)];
        assert_eq!(commands, Commands { before, after: Vec::new() });
    }
}
