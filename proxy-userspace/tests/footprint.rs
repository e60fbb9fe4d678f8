//! 10,000 Services of 10 endpoints: what the joined and decided state costs. A process of its own, because it looks at RSS.

use std::net::{IpAddr, Ipv4Addr};

use trama_proxy::model::{
    Desired, IpFamily, NodePolicy, PortSpec, Protocol, ServiceKey, ServiceObject, SliceEndpoint, SliceObject, SlicePort,
};
use trama_proxy::tracker::{ListKind, ObjectEvent, Tracker};

const SERVICES: u32 = 10_000;
const ENDPOINTS: u32 = 10;
/// Of the 80 MB that the whole process may have, half is for the kernel's side, the runtime and TLS.
const GROWTH_MAX_KB: u64 = 40_000;

fn resident_kb() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn key(index: u32) -> ServiceKey {
    ServiceKey { namespace: format!("namespace-{}", index % 50).into(), name: format!("service-{index}").into() }
}

fn address(network: u8, index: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from((u32::from(network) << 24) + index + 1))
}

fn service(index: u32) -> ServiceObject {
    ServiceObject {
        key: key(index),
        created_seconds: 0,
        cluster_ips: vec![address(11, index)],
        ports: vec![PortSpec { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port: None }],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        affinity_seconds: None,
        external_local: false,
        internal_local: false,
        health_check_node_port: None,
        balancing: None,
    }
}

fn slice(index: u32, round: u32) -> SliceObject {
    let endpoint = |i| SliceEndpoint {
        address: address(10, index * ENDPOINTS + i + round),
        local: i == 0,
        ready: true,
        serving: true,
        terminating: false,
        has_node_hints: false,
        hinted_for_node: false,
        zone_hints: None,
    };
    SliceObject {
        name: format!("service-{index}-abcde").into(),
        service: key(index),
        family: IpFamily::V4,
        ports: [SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }].into(),
        endpoints: (0..ENDPOINTS).map(endpoint).collect(),
        weight: None,
        rejected: 0,
    }
}

#[test]
fn ten_thousand_services_stay_small_and_do_not_grow_with_churn() {
    let before = resident_kb().expect("/proc/self/status has VmRSS");
    let growth = || resident_kb().expect("it still has").saturating_sub(before);
    let (mut tracker, mut desired) = (Tracker::default(), Desired::default());
    tracker.set_policy(NodePolicy::default());
    for kind in [ListKind::Services, ListKind::Slices] {
        tracker.handle(ObjectEvent::ListStarted(kind));
    }
    for index in 0..SERVICES {
        tracker.handle(ObjectEvent::ServiceApplied(service(index)));
        tracker.handle(ObjectEvent::SliceApplied(slice(index, 0)));
    }
    for kind in [ListKind::Services, ListKind::Slices] {
        tracker.handle(ObjectEvent::ListDone(kind));
    }
    tracker.checkout(&mut desired);
    assert_eq!(desired.checkout().1.changed.len(), SERVICES as usize);
    let loaded = growth();
    assert!(loaded < GROWTH_MAX_KB, "{loaded} kB");
    for round in 1..=3 {
        for index in 0..SERVICES {
            tracker.handle(ObjectEvent::SliceApplied(slice(index, round)));
        }
        tracker.checkout(&mut desired);
        assert_eq!(desired.checkout().1.changed.len(), SERVICES as usize);
    }
    let churned = growth();
    assert!(churned < GROWTH_MAX_KB, "{churned} kB after churn");
    println!("loaded {loaded} kB, after churn {churned} kB");
    assert_eq!(desired.snapshot().services.len(), SERVICES as usize);
}
