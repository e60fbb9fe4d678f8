//! Builders for the objects of one scenario.

use std::sync::Arc;

use crate::model::{
    Desired, NodeConfig, NodePolicy, PodTraffic, PortSpec, Protocol, ServiceKey, ServiceObject, ServicePort,
    SliceEndpoint, SliceObject, SlicePort, decide,
};

pub(crate) fn key(name: &str) -> ServiceKey {
    ServiceKey { namespace: "ns".into(), name: name.into() }
}

/// A TCP Service on port 80 with ClusterIP 10.96.0.1.
pub(crate) fn service(name: &str) -> ServiceObject {
    ServiceObject {
        key: key(name),
        created_seconds: 0,
        cluster_ips: vec!["10.96.0.1".parse().unwrap()],
        ports: vec![PortSpec { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None }],
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

/// Reachable in every way: NodePort 30080, external IP 192.0.2.1, load-balancer IP 192.0.2.2.
pub(crate) fn exposed(name: &str) -> ServiceObject {
    let mut service = service(name);
    service.ports[0].node_port = Some(30080);
    service.external_ips = vec!["192.0.2.1".parse().unwrap()];
    service.load_balancer_ips = vec!["192.0.2.2".parse().unwrap()];
    service
}

/// A ready endpoint; letters after the address change that: `l`ocal, `u`nready, `t`erminating, `s` not serving.
pub(crate) fn endpoint(text: &str) -> SliceEndpoint {
    let (address, flags) = text.split_once(' ').unwrap_or((text, ""));
    let terminating = flags.contains('t');
    SliceEndpoint {
        address: address.parse().unwrap(),
        local: flags.contains('l'),
        ready: !flags.contains('u') && !terminating,
        serving: !flags.contains('s') && (!flags.contains('u') || terminating),
        terminating,
        has_node_hints: false,
        hinted_for_node: false,
        zone_hints: None,
    }
}

pub(crate) fn zones(list: &[&str]) -> Option<Arc<Vec<Arc<str>>>> {
    (!list.is_empty()).then(|| Arc::new(list.iter().map(|zone| Arc::from(*zone)).collect()))
}

/// A slice of `service` whose endpoints listen on port 8080.
pub(crate) fn slice(name: &str, service: &str, endpoints: Vec<SliceEndpoint>) -> SliceObject {
    let family = endpoints.first().map_or(crate::model::IpFamily::V4, |e| crate::model::IpFamily::of(e.address));
    SliceObject {
        name: name.into(),
        service: key(service),
        family,
        ports: [SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }].into(),
        endpoints: endpoints.into(),
        weight: None,
        rejected: 0,
    }
}

/// Node 192.168.0.2, pods in 10.0.0.0/8, zone `z1`.
pub(crate) fn policy() -> NodePolicy {
    NodePolicy {
        zone: Some("z1".into()),
        detects_pods_v4: true,
        primary_v4: Some("192.168.0.2".parse().unwrap()),
        ..NodePolicy::default()
    }
}

pub(crate) fn node() -> NodeConfig {
    let addresses: std::collections::BTreeSet<_> = ["192.168.0.2".parse().unwrap()].into();
    NodeConfig {
        node_port_addresses: addresses.clone(),
        node_addresses: addresses,
        masquerade_v4: Some("192.168.0.2".parse().unwrap()),
        pod_traffic: PodTraffic::Source(vec!["10.0.0.0/8".parse().unwrap()]),
        ..NodeConfig::default()
    }
}

/// The only ServicePort of `service` with these endpoints in one slice.
pub(crate) fn decided(service: &ServiceObject, endpoints: &[&str], policy: &NodePolicy) -> ServicePort {
    let slice = slice("one", &service.key.name, endpoints.iter().map(|text| endpoint(text)).collect());
    let mut ports = decide(service, &[&slice], policy);
    assert_eq!(ports.len(), 1);
    ports.remove(0)
}

/// A snapshot with this one Service.
pub(crate) fn world(service: &ServiceObject, endpoints: &[&str], policy: &NodePolicy) -> Desired {
    let mut desired = Desired::default();
    desired.set_node(node());
    desired.replace(&service.key, vec![decided(service, endpoints, policy)]);
    desired
}
