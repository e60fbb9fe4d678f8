//! The plan's text, applied to a model of the tables, says what the model of Services says.

mod tables;
mod walk;

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::dataplane::iptables::text;
use crate::model::tests::build::{decided, exposed, key, node, policy, service};
use crate::model::{Answer, Desired, HealthCheck, NameParts, Packet, PodTraffic, Protocol, ServiceObject, answer};
use tables::Tables;
use walk::{Fate, fates};

const SETTINGS: Settings =
    Settings { masquerade_bit: 0x4000, localhost_node_ports: true, drop_invalid: true, counts: true };

/// A planner and the tables that its plans were applied to.
struct Kernel {
    planner: Planner,
    tables: Tables,
}

impl Kernel {
    fn new(desired: &mut Desired) -> Self {
        let mut kernel = Self { planner: Planner::new(IpFamily::V4, SETTINGS), tables: Tables::default() };
        let plan = kernel.planner.full(desired.checkout().0, &kernel.tables.existing());
        kernel.tables.apply(&plan, &kernel.planner);
        kernel
    }

    fn follow(&mut self, desired: &mut Desired) -> Plan {
        let (snapshot, delta) = desired.checkout();
        let plan = self.planner.change(snapshot, &delta);
        self.tables.apply(&plan, &self.planner);
        plan
    }
}

/// Compares the tables with the model for packets from every side to every place.
fn assert_same(snapshot: &ServiceSnapshot, tables: &Tables) {
    let sources = ["10.1.1.1", "10.9.9.9", "192.168.0.2", "127.0.0.1", "203.0.113.7", "198.51.100.9"];
    let places =
        ["10.96.0.1", "10.96.1.1", "10.96.0.2", "192.0.2.1", "192.0.2.2", "192.168.0.2", "127.0.0.1", "8.8.8.8"];
    for source in sources {
        for place in places {
            for port in [80, 81, 30080, 30081, 30200] {
                // Others are martians, and dropped as such.
                if place == "127.0.0.1" && source != "127.0.0.1" {
                    continue;
                }
                let (source, destination) = (source.parse().unwrap(), (place.parse::<IpAddr>().unwrap(), port).into());
                let input = (source == "203.0.113.7".parse::<IpAddr>().unwrap()).then_some("cni0");
                let packet = Packet { protocol: Protocol::Tcp, source, destination, input };
                let expect = expected(snapshot, &packet);
                assert_eq!(fates(tables, &snapshot.node, &packet), expect, "{packet:?}");
            }
        }
    }
}

fn expected(snapshot: &ServiceSnapshot, packet: &Packet<'_>) -> BTreeSet<Fate> {
    match answer(snapshot, packet) {
        Answer::Forward { endpoints, masquerade, .. } => endpoints
            .iter()
            .map(|one| Fate::Sent(one.address(), masquerade || (one.local && one.address().ip() == packet.source)))
            .collect(),
        Answer::Reject => [Fate::Reject].into(),
        Answer::Drop => [Fate::Drop].into(),
        Answer::Pass => [Fate::Pass].into(),
    }
}

/// One Service as the property test varies it.
#[derive(Debug, Clone)]
struct Shape {
    exposed: bool,
    external_local: bool,
    internal_local: bool,
    affinity: bool,
    ranges: u8,
    endpoints: Vec<usize>,
    port: u16,
}

const ENDPOINTS: [&str; 6] = ["10.1.1.1 l", "10.1.1.2 l", "10.2.2.2", "10.2.2.3", "10.2.2.4 u", "192.168.0.2 l"];
const NAMES: [(&str, &str); 3] = [("a", "10.96.0.1"), ("b", "10.96.1.1"), ("c", "10.96.0.2")];

impl Shape {
    fn object(&self, index: usize) -> ServiceObject {
        let (name, cluster_ip) = NAMES[index];
        let mut service = if self.exposed { exposed(name) } else { service(name) };
        service.cluster_ips = vec![cluster_ip.parse().unwrap()];
        service.ports[0].port = self.port;
        if self.exposed {
            service.ports[0].node_port = Some([30080, 30081, 30200][index]);
        }
        (service.external_local, service.internal_local) = (self.external_local, self.internal_local);
        service.affinity_seconds = self.affinity.then_some(60);
        service.source_ranges = match self.ranges {
            0 => vec!["198.51.100.0/24".parse().unwrap(), "10.0.0.0/8".parse().unwrap()],
            1 => vec!["192.168.0.0/24".parse().unwrap()],
            _ => Vec::new(),
        };
        service
    }
}

#[derive(Debug, Clone)]
enum Change {
    Service(usize, Option<Shape>),
    Node(u8),
    Health(u16),
}

fn shape() -> impl Strategy<Value = Shape> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let endpoints = proptest::sample::subsequence((0..ENDPOINTS.len()).collect::<Vec<_>>(), 0..=4);
    (flags, 0..4u8, endpoints, prop_oneof![Just(80), Just(81)]).prop_map(
        |((exposed, external_local, internal_local, affinity), ranges, endpoints, port)| Shape {
            exposed,
            external_local,
            internal_local,
            affinity,
            ranges,
            endpoints,
            port,
        },
    )
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let service = (0..NAMES.len(), proptest::option::weighted(0.85, shape()));
    let service = service.prop_map(|(index, shape)| Change::Service(index, shape));
    let one = prop_oneof![8 => service, 1 => (0..4u8).prop_map(Change::Node), 1 => (1..9u16).prop_map(Change::Health)];
    proptest::collection::vec(one, 1..12)
}

/// The node in one of its states; pods are told by networks or by interface, NodePorts answer everywhere or nowhere.
fn node_in_state(state: u8) -> NodeConfig {
    let mut node = node();
    node.loopback_node_ports_v4 = state.is_multiple_of(2);
    node.service_cidrs = vec!["10.96.0.0/12".parse().unwrap()];
    match state {
        1 => node.pod_traffic = PodTraffic::Bridge("cni0".into()),
        2 => node.pod_traffic = PodTraffic::Prefix("cn".into()),
        3 => node.node_port_addresses.clear(),
        _ => {}
    }
    node
}

fn make(desired: &mut Desired, shapes: &mut BTreeMap<usize, Shape>, change: &Change) {
    match change {
        Change::Node(state) => desired.set_node(node_in_state(*state)),
        Change::Health(port) => {
            desired.set_health_checks(&key("a"), &[(IpFamily::V4, HealthCheck { port: *port, local_endpoints: 1 })]);
        }
        Change::Service(index, shape) => {
            match shape {
                Some(shape) => shapes.insert(*index, shape.clone()),
                None => shapes.remove(index),
            };
            let mut left = vec![*index];
            while let Some(index) = left.pop() {
                let ports = shapes.get(&index).map(|shape| {
                    let endpoints: Vec<&str> = shape.endpoints.iter().map(|i| ENDPOINTS[*i]).collect();
                    decided(&shape.object(index), &endpoints, &policy())
                });
                let again = desired.replace(&key(NAMES[index].0), ports.into_iter().collect());
                left.extend(again.iter().filter_map(|key| NAMES.iter().position(|(name, _)| *name == &*key.name)));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn every_sequence_of_changes_ends_in_what_the_model_says(list in changes()) {
        let (mut desired, mut shapes) = (Desired::default(), BTreeMap::new());
        desired.set_node(node_in_state(0));
        let mut kernel = Kernel::new(&mut desired);
        for change in &list {
            make(&mut desired, &mut shapes, change);
            kernel.follow(&mut desired);
            let snapshot = desired.snapshot();
            assert_same(snapshot, &kernel.tables);
            let mut fresh = Planner::new(IpFamily::V4, SETTINGS);
            let mut whole = Tables::default();
            let plan = fresh.full(snapshot, &whole.existing());
            whole.apply(&plan, &fresh);
            prop_assert_eq!(&kernel.tables, &whole);
            prop_assert!(kernel.planner.is_in(&whole.existing()));
            prop_assert!(!kernel.planner.is_in(&Tables::default().existing()));
        }
        // A process that takes over finds everything and changes nothing; what another state left goes.
        let mut heir = Planner::new(IpFamily::V4, SETTINGS);
        let mut taken = kernel.tables.clone();
        let plan = heir.full(desired.snapshot(), &taken.existing());
        prop_assert!(plan.tables.values().all(|table| table.delete.is_empty() && table.hooks.is_empty()));
        taken.apply(&plan, &heir);
        prop_assert_eq!(&taken, &kernel.tables);
        let mut empty = Desired::default();
        let plan = heir.full(empty.checkout().0, &taken.existing());
        taken.apply(&plan, &heir);
        prop_assert_eq!(&taken, &Kernel::new(&mut Desired::default()).tables);
        let removal = Plan::removal(&taken.existing());
        taken.apply(&removal, &heir);
        prop_assert_eq!(taken, Tables::default());
    }
}

fn world(service: &ServiceObject, endpoints: &[&str]) -> Desired {
    let mut desired = Desired::default();
    desired.set_node(node_in_state(0));
    desired.replace(&service.key, vec![decided(service, endpoints, &policy())]);
    desired
}

#[test]
fn one_endpoint_costs_one_chain() {
    let mut desired = world(&service("a"), &["10.2.2.2", "10.2.2.3"]);
    let mut kernel = Kernel::new(&mut desired);
    desired.replace(&key("a"), vec![decided(&service("a"), &["10.2.2.2", "10.2.2.4"], &policy())]);
    let plan = kernel.follow(&mut desired);
    let mut out = Vec::new();
    text::write(&plan, &kernel.planner, &mut out).unwrap();
    let text = String::from_utf8(out).unwrap();
    let expect = "*nat\n:TRAMA-X-INT - [0:0]\n-A TRAMA-X-INT -j TRAMA-MARK-OUTSIDE\n\
        -A TRAMA-X-INT -p tcp -m statistic --mode random --probability 0.5000000000 -j DNAT --to-destination 10.2.2.2:8080\n\
        -A TRAMA-X-INT -p tcp -j DNAT --to-destination 10.2.2.4:8080\nCOMMIT\n";
    let id = ServiceId::of(desired.snapshot().services.keys().next().unwrap());
    assert_eq!(text, expect.replace('X', &id.to_string()));
    assert_eq!(text::line(&plan, &kernel.planner, 5).unwrap(), text.lines().nth(4).unwrap());
    assert_eq!(text::line(&plan, &kernel.planner, 7), None);
}

#[test]
fn nothing_changed_is_nothing_written() {
    let mut desired = world(&exposed("a"), &["10.1.1.1 l"]);
    let mut kernel = Kernel::new(&mut desired);
    let mut other = node_in_state(0);
    other.interfaces.insert(9, "veth9".into());
    desired.set_node(other);
    assert!(kernel.follow(&mut desired).is_empty());
}

#[test]
fn affinity_comes_before_chance_and_ends_with_its_endpoint() {
    let mut object = service("a");
    object.affinity_seconds = Some(300);
    let mut desired = world(&object, &["10.2.2.2", "10.2.2.3"]);
    let kernel = Kernel::new(&mut desired);
    let name = desired.snapshot().services.keys().next().unwrap();
    let rules = kernel.planner.rules(Table::Nat, Chain::Service(ServiceId::of(name), Part::Internal));
    let list = |address: &str| super::super::chain::ClientList::of(name, address.parse().unwrap()).to_string();
    let (first, second) = (list("10.2.2.2:8080"), list("10.2.2.3:8080"));
    let texts: Vec<String> = rules.iter().skip(1).map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            format!(
                "-p tcp -m recent --name {first} --update --seconds 300 --reap --rsource -j DNAT --to-destination 10.2.2.2:8080"
            ),
            format!(
                "-p tcp -m recent --name {second} --update --seconds 300 --reap --rsource -j DNAT --to-destination 10.2.2.3:8080"
            ),
            format!(
                "-p tcp -m statistic --mode random --probability 0.5000000000 -m recent --name {first} --set --rsource -j DNAT --to-destination 10.2.2.2:8080"
            ),
            format!("-p tcp -m recent --name {second} --set --rsource -j DNAT --to-destination 10.2.2.3:8080"),
        ]
    );
}

#[test]
fn a_second_owner_of_a_name_is_refused() {
    let mut desired = world(&service("a"), &["10.2.2.2"]);
    let mut kernel = Kernel::new(&mut desired);
    let port = desired.snapshot().services.values().next().unwrap().clone();
    // As if the digests of both names were the same.
    let id = ServiceId::of(&port.name);
    let mut other = (*port).clone();
    other.name = ServicePortName::new(NameParts { service: "b".into(), ..(*other.name).clone() });
    kernel.planner.services.insert(id, Arc::new(other));
    let mut plan = Plan::default();
    kernel.planner.replace(&port.name, Some(&port), &mut plan);
    assert_eq!((plan.refused.into_iter().collect::<Vec<_>>(), plan.services_changed), (vec![port.name.clone()], 0));
}

#[test]
fn foreign_hooks_of_ours_go_and_doubles_too() {
    let found = |rule: &str| ("PREROUTING".to_owned(), rule.to_owned());
    let edits =
        hook_edits(Table::Nat, &[found("-j TRAMA-SERVICES"), found("-j TRAMA-SERVICES"), found("-m x -j TRAMA-OLD")]);
    let expect = [
        HookEdit::Insert("OUTPUT", Chain::Services),
        HookEdit::Insert("POSTROUTING", Chain::PostRouting),
        HookEdit::Delete("PREROUTING".into(), "-j TRAMA-SERVICES".into()),
        HookEdit::Delete("PREROUTING".into(), "-m x -j TRAMA-OLD".into()),
    ];
    assert_eq!(edits, expect.into());
}
