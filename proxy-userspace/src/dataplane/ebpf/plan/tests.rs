//! The plan against a model of the kernel: whatever the order of changes, a reader finds what is desired.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use proptest::prelude::*;
use proxy_common::{EndpointKey, Origin, SLOT_ID_BITS, SLOT_ID_MASK, V4};

use super::*;
use crate::dataplane::ebpf::alloc::QUARANTINE_MS;
use crate::model::{
    Action, Algorithm, EndpointSet, Frontend as ModelFrontend, FrontendAddress, FrontendKind, IpFamily, NameParts,
    OriginRules, Protocol, Rule,
};

const LIMITS: Limits = Limits { frontends: 64, slots: 40_000, backends: 64, source_ranges: 16, endpoints: 64 };

/// Maps as the kernel has them.
struct Kernel {
    frontends: BTreeMap<FrontendKey<V4>, Frontend>,
    slots: Vec<u32>,
    backends: Vec<Backend<V4>>,
    ranges: BTreeSet<Range<V4>>,
    endpoints: BTreeMap<EndpointKey<V4>, u32>,
}

impl Kernel {
    fn new() -> Self {
        Self {
            frontends: BTreeMap::new(),
            slots: vec![0; LIMITS.slots as usize],
            backends: vec![Backend::default(); LIMITS.backends as usize],
            ranges: BTreeSet::new(),
            endpoints: BTreeMap::new(),
        }
    }

    /// Executes a plan write by write; after each one, every frontend must lead to live backends of its own service.
    fn execute(&mut self, mut writes: Writes<V4>) {
        writes.keep_moved();
        for (id, backend) in &writes.backends {
            self.backends[*id as usize] = *backend;
            self.check();
        }
        for (index, id) in &writes.slots {
            assert!(!self.is_read(*index), "slot {index} is in a block that packets read");
            self.slots[*index as usize] = *id;
        }
        self.check();
        self.ranges.extend(&writes.ranges);
        assert!(self.ranges.len() <= LIMITS.source_ranges as usize);
        self.endpoints.extend(writes.endpoints.iter().copied());
        assert!(self.endpoints.len() <= LIMITS.endpoints as usize);
        for (key, value) in &writes.frontends {
            self.frontends.insert(*key, *value);
            self.check();
        }
        for key in &writes.deleted {
            self.frontends.remove(key);
            self.check();
        }
        for range in &writes.ranges_gone {
            assert!(self.ranges.remove(range), "{range:?}");
            self.check();
        }
        for key in &writes.endpoints_gone {
            assert!(self.endpoints.remove(key).is_some(), "{key:?}");
        }
        for (id, backend) in &writes.retired {
            let grows = u32::from(backend.state != BACKEND_DRAINING);
            assert_eq!(backend.generation, self.backends[*id as usize].generation.wrapping_add(grows));
            self.backends[*id as usize] = *backend;
            self.check();
        }
    }

    fn is_read(&self, slot: u32) -> bool {
        self.frontends.values().map(block).any(|(first, length)| (first..first + length).contains(&slot))
    }

    fn check(&self) {
        for (key, value) in &self.frontends {
            self.resolve(value.service_id, value.cluster_first, value.cluster_count, key);
            self.resolve(value.service_id, value.local_first, value.local_count, key);
            let limited = value.flags & FRONTEND_SOURCE_RANGES != 0;
            let known = self.ranges.iter().any(|(_, range)| range.service_id == value.service_id);
            assert!(known || !limited, "{key:?} lets nobody in");
        }
    }

    fn resolve(&self, service_id: u32, first: u32, count: u32, key: &FrontendKey<V4>) -> Vec<SocketAddr> {
        (first..first + count)
            .map(|index| {
                let backend = &self.backends[(self.slots[index as usize] & SLOT_ID_MASK) as usize];
                assert!(backend.service_id == service_id && backend.takes_flows(), "{key:?} slot {index}: {backend:?}");
                SocketAddr::new(backend.address.to_ip(), backend.port.to_host())
            })
            .collect()
    }

    fn found(&self) -> Found<V4> {
        let ids = |first: u32, length: u32| self.slots[first as usize..][..length as usize].to_vec();
        let blocks = self.frontends.values().map(block).map(|(first, length)| ((first, length), ids(first, length)));
        Found {
            frontends: self.frontends.iter().map(|(key, value)| (*key, *value)).collect(),
            backends: (0..).zip(self.backends.clone()).filter(|(_, backend)| *backend != Backend::default()).collect(),
            blocks: blocks.collect(),
            ranges: self.ranges.iter().copied().collect(),
            endpoints: self.endpoints.iter().map(|(key, id)| (*key, *id)).collect(),
        }
    }

    /// What a client of `service` can reach.
    fn assert_serves(&self, service: &ServicePort) {
        for frontend in &service.frontends {
            let key = frontend_key(frontend.address, frontend.port, service.name.protocol).unwrap();
            let value = self.frontends.get(&key).unwrap_or_else(|| panic!("{key:?} is not programmed"));
            let cluster = self.resolve(value.service_id, value.cluster_first, value.cluster_count, &key);
            let local = self.resolve(value.service_id, value.local_first, value.local_count, &key);
            let all = |list: &[Endpoint]| list.iter().map(Endpoint::address).collect::<BTreeSet<_>>();
            let set = |list: &[SocketAddr]| list.iter().copied().collect::<BTreeSet<_>>();
            assert_eq!(set(&cluster), all(&service.cluster_endpoints));
            assert_eq!(set(&local), all(&service.local_endpoints));
            let only_local = &all(&service.local_endpoints) - &all(&service.cluster_endpoints);
            assert_eq!(self.in_state(BACKEND_LOCAL_ONLY, value.service_id), only_local);
            if service.algorithm != Algorithm::Maglev {
                assert_eq!((cluster.len(), local.len()), (set(&cluster).len(), set(&local).len()), "equal weights");
            }
        }
    }

    /// Endpoints of a ServicePort that are in this state.
    fn in_state(&self, state: u8, service_id: u32) -> BTreeSet<SocketAddr> {
        let all = self.backends.iter().filter(|backend| backend.state == state && backend.service_id == service_id);
        all.map(|backend| SocketAddr::new(backend.address.to_ip(), backend.port.to_host())).collect()
    }

    /// Endpoints that keep their flows and get no new ones.
    fn draining(&self) -> BTreeSet<SocketAddr> {
        let draining = self.backends.iter().filter(|backend| backend.state == BACKEND_DRAINING);
        draining.map(|backend| SocketAddr::new(backend.address.to_ip(), backend.port.to_host())).collect()
    }
}

fn endpoint(host: u8, local: bool) -> Endpoint {
    Endpoint::new(SocketAddr::new(IpAddr::from([10, 244, 0, host]), 8080), local)
}

/// Service number `number` with a ClusterIP and an external IP, its endpoints by last byte.
fn service(number: u8, external: u8, cluster: &[u8], local: &[u8]) -> Arc<ServicePort> {
    let rule = Rule { action: Action::Forward(EndpointSet::Cluster), masquerade: false };
    let frontend = |address: [u8; 4], kind| ModelFrontend {
        address: FrontendAddress::Ip(IpAddr::V4(Ipv4Addr::from(address))),
        port: 80,
        kind,
        rules: OriginRules { pod: rule, node: rule, external: rule },
    };
    Arc::new(ServicePort {
        name: ServicePortName::new(NameParts {
            namespace: "default".into(),
            service: format!("s{number}").into(),
            port: "".into(),
            protocol: Protocol::Tcp,
            family: IpFamily::V4,
        }),
        created_seconds: 0,
        frontends: vec![
            frontend([10, 96, 0, number], FrontendKind::ClusterIp),
            frontend([192, 0, 2, external], FrontendKind::ExternalIp),
        ],
        cluster_endpoints: cluster.iter().map(|host| endpoint(*host, local.contains(host))).collect(),
        local_endpoints: local.iter().map(|host| endpoint(*host, true)).collect(),
        kept_endpoints: Vec::new(),
        draining_endpoints: Vec::new(),
        direct_return: false,
        algorithm: Algorithm::Random,
        affinity_seconds: None,
        load_balancer_source_ranges: vec![],
    })
}

struct Bench {
    planner: Planner<V4>,
    ids: RangeAllocator,
    kernel: Kernel,
    now_ms: u64,
}

impl Bench {
    fn new() -> Self {
        Self { planner: Planner::new(LIMITS), ids: RangeAllocator::new(1, 100), kernel: Kernel::new(), now_ms: 0 }
    }

    fn sync(&mut self, changes: &[(&ServicePortName, Option<&Arc<ServicePort>>)]) -> Vec<Result<Planned, Full>> {
        self.now_ms += QUARANTINE_MS;
        let mut writes = Writes::default();
        let results = changes
            .iter()
            .map(|(name, desired)| self.planner.change(name, *desired, &mut self.ids, self.now_ms, &mut writes))
            .collect();
        self.kernel.execute(writes);
        results
    }

    fn set(&mut self, service: &Arc<ServicePort>) -> Result<Planned, Full> {
        self.sync(&[(&service.name, Some(service))]).remove(0)
    }

    /// A new process over the same kernel.
    fn restart(&mut self, desired: &[Arc<ServicePort>]) -> Writes<V4> {
        self.planner = Planner::new(LIMITS);
        self.ids = RangeAllocator::new(1, 100);
        let mut writes = Writes::default();
        let found = self.kernel.found();
        let services = desired.iter().map(Arc::as_ref);
        self.planner.adopt(&found, services, &mut self.ids, self.now_ms, &mut writes);
        for service in desired {
            self.planner
                .change(&service.name, Some(service), &mut self.ids, self.now_ms, &mut writes)
                .expect("there is room");
        }
        writes
    }
}

#[test]
fn one_endpoint_s_change_keeps_the_others_ids() {
    let mut bench = Bench::new();
    bench.set(&service(1, 1, &[1, 2, 3], &[])).unwrap();
    let before = bench.kernel.backends.clone();
    let changed = service(1, 1, &[1, 3, 4], &[]);
    bench.set(&changed).unwrap();
    bench.kernel.assert_serves(&changed);
    let same = before.iter().zip(&bench.kernel.backends).filter(|(a, b)| a == b && a.state == BACKEND_ACTIVE).count();
    assert_eq!(same, 2, "endpoints 1 and 3 stay where flows know them");
}

/// A clock that runs while a plan is made would free ids within it, and a full allocator does so at any time.
#[test]
fn an_id_that_is_given_back_and_taken_in_one_plan_serves_its_new_owner() {
    let mut bench = Bench::new();
    let (first, second) = (service(1, 1, &[1], &[]), service(2, 2, &[2], &[]));
    bench.set(&first).unwrap();
    let mut writes = Writes::default();
    bench.planner.change(&first.name, None, &mut bench.ids, 100, &mut writes).unwrap();
    bench.planner.change(&second.name, Some(&second), &mut bench.ids, 100 + QUARANTINE_MS, &mut writes).unwrap();
    let reused = writes.backends[0].0;
    assert_eq!(reused, writes.retired[0].0, "the test is about this");
    writes.keep_moved();
    assert_eq!(
        (writes.retired.len(), writes.backends[0].1.generation),
        (0, 1),
        "flows of the old owner find out all the same"
    );
}

#[test]
fn what_is_taken_is_told_by_map_whoever_made_it() {
    let mut bench = Bench::new();
    let (first, second) = (service(1, 1, &[1, 2, 3], &[]), service(2, 2, &[4], &[]));
    bench.set(&first).unwrap();
    bench.set(&second).unwrap();
    let used = |bench: &Bench| bench.planner.filled().map(|filled| (filled.map, filled.used, filled.room));
    let one = [("frontends", 2, 64), ("slots", 3, 40_000), ("backends", 3, 64), ("source_ranges", 0, 16)];
    bench.sync(&[(&second.name, None)]);
    assert_eq!(used(&bench)[..4], one, "what is in quarantine is free");
    bench.restart(std::slice::from_ref(&first));
    assert_eq!(used(&bench)[..4], one);
}

#[test]
fn an_unchanged_service_writes_nothing() {
    let mut bench = Bench::new();
    bench.set(&service(1, 1, &[1, 2], &[1])).unwrap();
    assert_eq!(bench.set(&service(1, 1, &[1, 2], &[1])), Ok(Planned::Nothing));
}

#[test]
fn a_local_list_that_is_no_prefix_gets_its_own_block() {
    let mut bench = Bench::new();
    let service = service(1, 1, &[2, 3], &[9]);
    bench.set(&service).unwrap();
    bench.kernel.assert_serves(&service);
}

#[test]
fn a_frontend_that_moves_is_never_missing() {
    let mut bench = Bench::new();
    let (a, b) = (service(1, 7, &[1], &[]), service(2, 2, &[2], &[]));
    bench.sync(&[(&a.name, Some(&a)), (&b.name, Some(&b))]);
    let (a, b) = (service(1, 1, &[1], &[]), service(2, 7, &[2], &[]));
    for order in [[&a, &b], [&b, &a]] {
        bench.sync(&[(&order[0].name, Some(order[0])), (&order[1].name, Some(order[1]))]);
        bench.kernel.assert_serves(&a);
        bench.kernel.assert_serves(&b);
    }
}

#[test]
fn a_service_that_does_not_fit_is_refused_whole_and_the_rest_stays() {
    let mut bench = Bench::new();
    let fits = service(1, 1, &[1, 2], &[]);
    bench.set(&fits).unwrap();
    let hosts: Vec<u8> = (1..=63).collect();
    let large = service(2, 2, &hosts, &[]);
    assert_eq!(bench.set(&large), Err(Full { map: "backends" }));
    bench.kernel.assert_serves(&fits);
    assert_eq!(bench.kernel.frontends.len(), 2);
    let smaller = service(2, 2, &hosts[..40], &[]);
    assert_eq!(bench.set(&smaller), Ok(Planned::Whole));
    bench.kernel.assert_serves(&smaller);
}

#[test]
fn a_restart_over_the_same_state_writes_nothing() {
    let mut bench = Bench::new();
    let desired = [service(1, 1, &[1, 2, 3], &[1]), service(2, 2, &[], &[]), service(3, 3, &[2], &[4])];
    for service in &desired {
        bench.set(service).unwrap();
    }
    let writes = bench.restart(&desired);
    assert_eq!(writes, Writes::default());
}

#[test]
fn a_restart_removes_what_went_meanwhile_and_keeps_ids() {
    let mut bench = Bench::new();
    let (stays, goes) = (service(1, 1, &[1, 2, 3], &[]), service(2, 2, &[4], &[]));
    bench.sync(&[(&stays.name, Some(&stays)), (&goes.name, Some(&goes))]);
    let id = bench.kernel.frontends.values().next().unwrap().service_id;
    let changed = service(1, 1, &[1, 3], &[]);
    let writes = bench.restart(std::slice::from_ref(&changed));
    bench.kernel.execute(writes);
    bench.kernel.assert_serves(&changed);
    assert_eq!(bench.kernel.frontends.len(), 2);
    assert_eq!(bench.kernel.frontends.values().next().unwrap().service_id, id);
    assert_eq!(bench.kernel.backends.iter().filter(|backend| backend.state == BACKEND_ACTIVE).count(), 2);
}

#[test]
fn a_process_that_died_between_two_flips_is_repaired() {
    let mut bench = Bench::new();
    bench.set(&service(1, 1, &[1, 2], &[])).unwrap();
    let mut half = bench.kernel.frontends.clone();
    let changed = service(1, 1, &[2, 3], &[]);
    bench.set(&changed).unwrap();
    // The second frontend still has the old block, whose first backend was not yet retired.
    let (key, old) = half.pop_last().unwrap();
    bench.kernel.frontends.insert(key, old);
    let retired =
        bench.kernel.backends.iter_mut().find(|backend| backend.state != BACKEND_ACTIVE && backend.generation > 0);
    let retired = retired.unwrap();
    *retired = Backend { address: V4::from_ip([10, 244, 0, 1].into()).unwrap(), state: BACKEND_ACTIVE, ..*retired };
    retired.port = Be16::from_host(8080);
    retired.service_id = old.service_id;
    let writes = bench.restart(std::slice::from_ref(&changed));
    bench.kernel.execute(writes);
    bench.kernel.assert_serves(&changed);
    assert_eq!(bench.kernel.backends.iter().filter(|backend| backend.state == BACKEND_ACTIVE).count(), 2);
}

/// A Service whose second frontend is a load-balancer IP for these networks only.
fn guarded(number: u8, networks: &[&str]) -> Arc<ServicePort> {
    let mut service = ServicePort::clone(&service(number, number, &[1], &[]));
    service.frontends[1].kind = FrontendKind::LoadBalancerIp;
    service.load_balancer_source_ranges = networks.iter().map(|network| network.parse().unwrap()).collect();
    Arc::new(service)
}

/// The guarded addresses' last bytes, and the networks let in.
fn guards(kernel: &Kernel) -> (Vec<u8>, Vec<String>) {
    let limited = kernel.frontends.iter().filter(|(_, value)| value.flags & FRONTEND_SOURCE_RANGES != 0);
    let ranges = kernel.ranges.iter().map(|(bits, range)| format!("{}/{}", range.client.to_ip(), bits - 32));
    (limited.map(|(key, _)| key.address.octets()[3]).collect(), ranges.collect())
}

#[test]
fn source_ranges_guard_load_balancer_ips_and_follow_their_service() {
    let mut bench = Bench::new();
    bench.set(&guarded(1, &["10.0.0.0/8", "192.168.7.0/24"])).unwrap();
    assert_eq!(guards(&bench.kernel), (vec![1], vec!["10.0.0.0/8".into(), "192.168.7.0/24".into()]));
    assert_eq!(bench.kernel.frontends.values().filter(|value| value.flags != 0).count(), 1, "the ClusterIP stays open");
    bench.set(&guarded(1, &["192.168.7.0/24", "172.16.0.0/12"])).unwrap();
    assert_eq!(guards(&bench.kernel).1.len(), 2);
    let desired = [guarded(1, &["192.168.7.0/24", "172.16.0.0/12"])];
    assert_eq!(bench.restart(&desired), Writes::default());
    bench.set(&guarded(1, &[])).unwrap();
    assert_eq!(guards(&bench.kernel), (vec![], vec![]));
}

#[test]
fn source_ranges_of_a_service_that_went_are_not_the_next_one_s() {
    let mut bench = Bench::new();
    let (first, second) = (guarded(1, &["10.0.0.0/8"]), guarded(2, &["10.0.0.0/8"]));
    bench.sync(&[(&first.name, Some(&first)), (&second.name, Some(&second))]);
    bench.sync(&[(&first.name, None)]);
    assert_eq!(guards(&bench.kernel), (vec![2], vec!["10.0.0.0/8".into()]));
    let writes = bench.restart(&[]);
    bench.kernel.execute(writes);
    assert_eq!(guards(&bench.kernel), (vec![], vec![]));
}

#[test]
fn too_many_source_ranges_refuse_their_service_and_no_other() {
    let mut bench = Bench::new();
    let few = guarded(1, &["10.0.0.0/8"]);
    bench.set(&few).unwrap();
    let many: Vec<String> = (0..LIMITS.source_ranges).map(|n| format!("10.{n}.0.0/16")).collect();
    let many = guarded(2, &many.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(bench.set(&many), Err(Full { map: "source_ranges" }));
    bench.kernel.assert_serves(&few);
}

/// The same Service with endpoints that drain.
fn draining(service: &ServicePort, hosts: &[u8]) -> Arc<ServicePort> {
    let draining_endpoints = hosts.iter().map(|host| endpoint(*host, false).address()).collect();
    Arc::new(ServicePort { draining_endpoints, ..service.clone() })
}

fn balanced(service: &ServicePort, algorithm: Algorithm) -> Arc<ServicePort> {
    Arc::new(ServicePort { algorithm, ..service.clone() })
}

#[derive(Debug, Clone)]
struct Change {
    number: u8,
    desired: Option<(Vec<u8>, Vec<u8>)>,
    algorithm: Algorithm,
    drains: Vec<u8>,
    restart: bool,
}

fn change() -> impl Strategy<Value = Change> {
    let hosts = || prop::collection::btree_set(1u8..12, 0..6).prop_map(|set| set.into_iter().collect::<Vec<u8>>());
    let desired = prop::option::weighted(0.8, (hosts(), hosts()));
    // Tables are large, and looked through after every write.
    let often = prop::sample::select(vec![Algorithm::Random, Algorithm::LeastConnections]);
    let algorithm = prop_oneof![12 => often, 1 => Just(Algorithm::Maglev)];
    let all = (1u8..5, desired, algorithm, hosts(), prop::bool::weighted(0.1));
    all.prop_map(|(number, desired, algorithm, drains, restart)| Change { number, desired, algorithm, drains, restart })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Any sequence of changes and restarts: after each sync every desired service serves exactly its endpoints, nothing
    /// else is programmed, and at no write in between does a frontend lead astray.
    #[test]
    fn the_kernel_follows_any_sequence(changes in prop::collection::vec(change(), 1..25)) {
        let mut bench = Bench::new();
        let mut desired: BTreeMap<ServicePortName, Arc<ServicePort>> = BTreeMap::new();
        for change in changes {
            let name = service(change.number, change.number, &[], &[]).name.clone();
            match &change.desired {
                Some((cluster, local)) => {
                    let drains: Vec<u8> =
                        change.drains.iter().copied().filter(|host| !cluster.contains(host) && !local.contains(host)).collect();
                    let service = draining(&service(change.number, change.number, cluster, local), &drains);
                    desired.insert(name.clone(), balanced(&service, change.algorithm));
                }
                None => drop(desired.remove(&name)),
            }
            if change.restart {
                let all: Vec<_> = desired.values().cloned().collect();
                let writes = bench.restart(&all);
                bench.kernel.execute(writes);
            } else {
                bench.sync(&[(&name, desired.get(&name))]);
            }
            prop_assert_eq!(bench.kernel.frontends.len(), desired.len() * 2);
            desired.values().for_each(|service| bench.kernel.assert_serves(service));
            let draining: BTreeSet<_> = desired.values().flat_map(|service| service.draining_endpoints.clone()).collect();
            prop_assert!(bench.kernel.draining().is_subset(&draining), "nobody drains who is not asked to");
        }
    }
}

mod balancing;
mod tunnels;
