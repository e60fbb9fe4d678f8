//! The rules read as the kernel reads them: whatever changes come in whatever order, every packet meets what the model says.

mod machine;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;

use self::machine::{Fate, Hooks, Machine};
use super::layout::SetName;
use super::plan::Planner;
use super::rules::Rules;
use crate::model::{
    Action, Algorithm, Answer, Endpoint, EndpointSet, Frontend, FrontendAddress, FrontendKind, IpFamily, NameParts,
    NodeConfig, OriginRules, Packet, PodTraffic, Protocol, Rule, ServicePort, ServicePortName, ServiceSnapshot, answer,
    diff,
};

const MARK: u32 = 0x4000;

/// A planner and the table that its plans make.
struct Bench {
    family: IpFamily,
    planner: Planner,
    machine: Machine,
    snapshot: ServiceSnapshot,
}

impl Bench {
    fn new(family: IpFamily) -> Self {
        let rules = Rules::new(family, MARK);
        let mut bench = Self {
            family,
            planner: Planner::new(family, rules),
            machine: Machine::new(family, rules),
            snapshot: ServiceSnapshot::default(),
        };
        bench.planner.everything(&ServiceSnapshot::default());
        bench.commit();
        bench
    }

    fn sync(&mut self, desired: ServiceSnapshot) {
        let delta = diff(&self.snapshot, &desired);
        for name in delta.changed.iter().filter(|name| name.family == self.family) {
            self.planner.change(name, desired.services.get(name));
        }
        self.planner.change_cluster_ips(&desired, delta.cluster_ips.iter().copied());
        if delta.node_changed {
            self.planner.change_node(&desired.node);
        }
        self.snapshot = desired;
        self.commit();
    }

    fn commit(&mut self) -> usize {
        let changes = self.planner.take();
        self.machine.execute(&changes);
        changes.len()
    }

    /// Every packet of the world meets what the model says, and nothing is left of what is gone.
    fn check(&mut self) {
        for packet in packets(self.family) {
            let expected = expectation(&answer(&self.snapshot, &packet), &packet);
            let found = self.machine.fates(&packet, Hooks::Forwarded);
            assert_eq!(found, expected, "{packet:?}");
            if self.snapshot.node.node_addresses.contains(&packet.source) {
                let own = Packet { input: None, ..packet };
                assert_eq!(self.machine.fates(&own, Hooks::Local), expected, "made here: {packet:?}");
            }
        }
        let again = {
            let mut planner = Planner::new(self.family, Rules::new(self.family, MARK));
            planner.everything(&self.snapshot);
            let mut machine = Machine::new(self.family, Rules::new(self.family, MARK));
            machine.execute(&planner.take());
            machine
        };
        for set in SetName::ALL.into_iter().filter(|set| *set != SetName::Classes) {
            assert_eq!(self.machine.len(set), again.len(set), "elements of {}", set.name());
        }
    }
}

/// What the model's answer is for the table.
fn expectation(answer: &Answer, packet: &Packet<'_>) -> BTreeSet<Fate> {
    match answer {
        Answer::Pass => [Fate::Pass].into(),
        Answer::Reject => [Fate::Reject].into(),
        Answer::Drop => [Fate::Drop].into(),
        Answer::Forward { endpoints, masquerade, .. } => {
            let hairpin = |one: &Endpoint| one.local && one.address().ip() == packet.source;
            let fate =
                |one: &Endpoint| Fate::Translated { endpoint: one.address(), masquerade: *masquerade || hairpin(one) };
            endpoints.iter().map(fate).collect()
        }
    }
}

fn ip(family: IpFamily, last: u8) -> IpAddr {
    match family {
        IpFamily::V4 => IpAddr::from([10, 0, 0, last]),
        IpFamily::V6 => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)]),
    }
}

/// Pods have 1 to 9, the node 100 and 101, others 150; Services 200 to 219, and 220 to 229 could be theirs.
fn node(family: IpFamily, number: u8) -> NodeConfig {
    let network = |low: u8, bits_v4: u8| {
        let bits = if family == IpFamily::V4 { bits_v4 } else { 96 + bits_v4 };
        IpNet::new(ip(family, low), bits).unwrap().trunc()
    };
    let own: BTreeSet<IpAddr> =
        [ip(family, 100), ip(family, 101), ip(family, 102)].into_iter().take(1 + usize::from(number) % 3).collect();
    let pod_traffic = match number % 5 {
        0 => PodTraffic::Source(Vec::new()),
        1 => PodTraffic::Bridge("cbr0".into()),
        2 => PodTraffic::Prefix("veth".into()),
        3 => PodTraffic::Source(vec![network(0, 29), network(8, 31)]),
        _ => PodTraffic::Source(vec![network(0, 25)]),
    };
    NodeConfig {
        node_port_addresses: own.iter().copied().take(1 + usize::from(number) % 2).collect(),
        node_addresses: own,
        pod_traffic,
        service_cidrs: if number.is_multiple_of(2) { Vec::new() } else { vec![network(192, 26)] },
        ..NodeConfig::default()
    }
}

/// Every kind of packet of that world.
fn packets(family: IpFamily) -> Vec<Packet<'static>> {
    let mut packets = Vec::new();
    for (protocol, input) in [(Protocol::Tcp, "veth1"), (Protocol::Udp, "cbr0"), (Protocol::Tcp, "eth0")] {
        for source in [1, 2, 8, 100, 101, 150] {
            for destination in [200, 201, 202, 210, 225, 100, 101, 150] {
                for port in [80, 81, 30_080, 30_081] {
                    packets.push(Packet {
                        protocol,
                        source: ip(family, source),
                        destination: SocketAddr::new(ip(family, destination), port),
                        input: Some(input),
                    });
                }
            }
        }
    }
    packets
}

fn name(family: IpFamily, number: u8) -> ServicePortName {
    let protocol = if number % 3 == 2 { Protocol::Udp } else { Protocol::Tcp };
    let service = format!("service-{number}").into();
    ServicePortName::new(NameParts { namespace: "ns".into(), service, port: "".into(), protocol, family })
}

/// What a test says of a ServicePort.
#[derive(Debug, Clone)]
struct Sketch {
    number: u8,
    cluster: BTreeSet<u8>,
    local: BTreeSet<u8>,
    rules: [(u8, bool); 6],
    affinity: bool,
    ranges: Vec<(u8, u8)>,
}

fn rule(choice: (u8, bool), cluster: bool, local: bool) -> Rule {
    let action = match choice.0 % 4 {
        0 | 1 if cluster => Action::Forward(EndpointSet::Cluster),
        2 if local => Action::Forward(EndpointSet::Local),
        3 => Action::Drop,
        _ => Action::Reject,
    };
    Rule { action, masquerade: choice.1 && matches!(action, Action::Forward(_)) }
}

fn service(family: IpFamily, sketch: &Sketch) -> ServicePort {
    let name = name(family, sketch.number);
    let endpoint = |last: &u8| {
        let address = SocketAddr::new(ip(family, *last), 8080 + u16::from(sketch.number));
        Endpoint::new(address, last.is_multiple_of(2))
    };
    let cluster: Vec<_> = sketch.cluster.iter().map(endpoint).collect();
    let local: Vec<_> = sketch.local.iter().map(endpoint).collect();
    let rules = |first: usize| {
        let of = |index: usize| rule(sketch.rules[first + index], !cluster.is_empty(), !local.is_empty());
        OriginRules { pod: of(0), node: of(1), external: of(2) }
    };
    let frontend = |address, port, kind, first| Frontend { address, port, kind, rules: rules(first) };
    let own = 200 + sketch.number;
    let frontends = vec![
        frontend(FrontendAddress::Ip(ip(family, own)), 80, FrontendKind::ClusterIp, 0),
        frontend(FrontendAddress::Ip(ip(family, own + 10)), 80, FrontendKind::LoadBalancerIp, 3),
        // One of the node's own addresses, at the port that another's NodePort has.
        frontend(FrontendAddress::Ip(ip(family, 101)), 30_081 - u16::from(sketch.number), FrontendKind::ExternalIp, 3),
        frontend(FrontendAddress::NodePort, 30_080 + u16::from(sketch.number), FrontendKind::NodePort, 3),
    ];
    let range = |(last, bits): &(u8, u8)| {
        let max = if family == IpFamily::V4 { 32 } else { 128 };
        IpNet::new(ip(family, *last), max - bits % 8).unwrap().trunc()
    };
    ServicePort {
        created_seconds: 0,
        kept_endpoints: Vec::new(),
        draining_endpoints: Vec::new(),
        direct_return: false,
        algorithm: Algorithm::Random,
        name,
        frontends,
        cluster_endpoints: cluster,
        local_endpoints: local,
        affinity_seconds: sketch.affinity.then_some(10_800),
        load_balancer_source_ranges: sketch.ranges.iter().map(range).collect(),
    }
}

fn sketch() -> impl Strategy<Value = Sketch> {
    let endpoints = || prop::collection::btree_set(1..10u8, 0..6);
    let rules = prop::array::uniform6((0..4u8, any::<bool>()));
    let ranges = prop::collection::vec((1..255u8, 0..8u8), 0..3);
    let parts = (0..3u8, endpoints(), endpoints(), rules, any::<bool>(), ranges);
    parts.prop_map(|(number, cluster, local, rules, affinity, ranges)| Sketch {
        number,
        cluster,
        local,
        rules,
        affinity,
        ranges,
    })
}

#[derive(Debug, Clone)]
enum Step {
    Service(Sketch),
    Gone(u8),
    Node(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => sketch().prop_map(Step::Service),
        1 => (0..3u8).prop_map(Step::Gone),
        1 => any::<u8>().prop_map(Step::Node),
    ]
}

/// The snapshot after one more step. ClusterIPs are those of the Services.
fn after(before: &ServiceSnapshot, family: IpFamily, step: &Step) -> ServiceSnapshot {
    let mut snapshot = before.clone();
    match step {
        Step::Service(sketch) => {
            snapshot.services.insert(name(family, sketch.number), Arc::new(service(family, sketch)));
        }
        Step::Gone(number) => drop(snapshot.services.remove(&name(family, *number))),
        Step::Node(number) => snapshot.node = Arc::new(node(family, *number)),
    }
    snapshot.cluster_ips.clear();
    for service in snapshot.services.values() {
        let of_cluster = service.frontends.iter().filter(|frontend| frontend.kind == FrontendKind::ClusterIp);
        for frontend in of_cluster {
            if let FrontendAddress::Ip(address) = frontend.address {
                *snapshot.cluster_ips.entry(address).or_default() += 1;
            }
        }
    }
    snapshot
}

fn follow(family: IpFamily, steps: &[Step]) {
    let mut bench = Bench::new(family);
    bench.sync(after(&ServiceSnapshot::default(), family, &Step::Node(3)));
    for step in steps {
        let next = after(&bench.snapshot, family, step);
        bench.sync(next);
        bench.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Any sequence of changes: after each transaction every packet meets what the model says.
    #[test]
    fn every_packet_meets_what_the_model_says_v4(steps in prop::collection::vec(step(), 1..10)) {
        follow(IpFamily::V4, &steps);
    }

    #[test]
    fn every_packet_meets_what_the_model_says_v6(steps in prop::collection::vec(step(), 1..10)) {
        follow(IpFamily::V6, &steps);
    }
}

/// A Service with endpoints 1 to `count`, to which everybody is forwarded.
fn simple(number: u8, endpoints: impl IntoIterator<Item = u8>, affinity: bool) -> Step {
    let cluster = endpoints.into_iter().collect();
    let rules = [(0, false); 6];
    Step::Service(Sketch { number, cluster, local: BTreeSet::new(), rules, affinity, ranges: Vec::new() })
}

fn one_packet(family: IpFamily) -> Packet<'static> {
    let (source, destination) = (ip(family, 150), SocketAddr::new(ip(family, 200), 80));
    Packet { protocol: Protocol::Tcp, source, destination, input: Some("eth0") }
}

#[test]
fn one_endpoint_more_or_less_costs_what_it_touches_whatever_the_length_of_the_list() {
    let mut bench = Bench::new(IpFamily::V4);
    bench.sync(after(&bench.snapshot.clone(), IpFamily::V4, &simple(0, 1..100, false)));
    let mut cost = |endpoints: Vec<u8>| {
        let desired = after(&bench.snapshot, IpFamily::V4, &simple(0, endpoints, false));
        let changed = bench.planner.change(&name(IpFamily::V4, 0), desired.services.get(&name(IpFamily::V4, 0)));
        assert!(changed);
        bench.snapshot = desired;
        bench.commit()
    };
    let replaced = cost((2..101).collect());
    assert_eq!(
        replaced, 3,
        "a slot, and the hairpin of the endpoint that is local; no frontend, for the length is the same"
    );
    let shorter = cost((2..100).collect());
    // Four frontends deleted and added, the last endpoint moved into the gap (3), a hairpin, two chains and their classes.
    assert_eq!(shorter, 4 * 2 + 3 + 1 + 4);
    let longer = cost((2..101).collect());
    assert_eq!(longer, 4 * 2 + 1 + 1, "the chains for this length are still there");
}

#[test]
fn a_client_stays_with_its_endpoint_until_that_is_gone() {
    for family in [IpFamily::V4, IpFamily::V6] {
        let mut bench = Bench::new(family);
        bench.sync(after(&bench.snapshot.clone(), family, &simple(0, 1..6, true)));
        let packet = one_packet(family);
        let first = bench.machine.fate(&packet, Hooks::Forwarded, 3);
        let Fate::Translated { endpoint, .. } = first else { panic!("{first:?}") };
        assert_eq!(bench.machine.len(SetName::Affinity), 1);
        for choice in 0..5 {
            assert_eq!(bench.machine.fate(&packet, Hooks::Forwarded, choice), first);
        }
        // Another endpoint goes: nothing changes. His own goes: he gets another, and stays there.
        let others = (1..6).filter(|last| ip(family, *last) != endpoint.ip());
        bench.sync(after(
            &bench.snapshot.clone(),
            family,
            &simple(
                0,
                others.clone().take(3).chain([match endpoint.ip() {
                    IpAddr::V4(address) => address.octets()[3],
                    IpAddr::V6(address) => address.octets()[15],
                }]),
                true,
            ),
        ));
        assert_eq!(bench.machine.fate(&packet, Hooks::Forwarded, 0), first);
        bench.sync(after(&bench.snapshot.clone(), family, &simple(0, others, true)));
        let second = bench.machine.fate(&packet, Hooks::Forwarded, 1);
        assert_ne!(second, first);
        assert_eq!(bench.machine.fate(&packet, Hooks::Forwarded, 2), second);
        assert_eq!(bench.machine.len(SetName::Affinity), 1);
    }
}

#[test]
fn a_full_table_of_clients_still_serves() {
    let mut bench = Bench::new(IpFamily::V4);
    bench.sync(after(&bench.snapshot.clone(), IpFamily::V4, &simple(0, 1..3, true)));
    bench.machine.fill_affinity();
    let fates: BTreeSet<_> =
        (0..2).map(|choice| bench.machine.fate(&one_packet(IpFamily::V4), Hooks::Forwarded, choice)).collect();
    assert_eq!(fates.len(), 2, "{fates:?}");
}

#[test]
fn what_a_transaction_took_away_between_two_lookups_leads_to_the_list_as_it_is() {
    let mut bench = Bench::new(IpFamily::V4);
    bench.sync(after(&bench.snapshot.clone(), IpFamily::V4, &simple(0, 1..6, false)));
    let (chain, packet) = (bench.machine.chain_of(&one_packet(IpFamily::V4)), one_packet(IpFamily::V4));
    bench.sync(after(&bench.snapshot.clone(), IpFamily::V4, &simple(0, 1..3, false)));
    for choice in 0..5 {
        let fate = bench.machine.fate_in(&chain, &packet, choice);
        assert!(matches!(fate, Fate::Translated { .. }), "choice {choice} of a list of five that has two: {fate:?}");
    }
    bench.sync(after(&bench.snapshot.clone(), IpFamily::V4, &Step::Gone(0)));
    assert_eq!(bench.machine.fate_in(&chain, &packet, 0), Fate::Drop);
}
