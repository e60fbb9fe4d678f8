//! The Endpoints object of a Service: the older form of its EndpointSlices, in the Service's first family only.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort, EndpointSubset, Endpoints, ObjectReference, Pod, Service,
};
use k8s_openapi::api::discovery::v1::EndpointPort as SlicePort;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt as _;

use crate::candidate::{self, Family};

/// Addresses in one Endpoints object, as in kube-controller-manager; what goes beyond is only in the slices.
const ADDRESSES_MAX: usize = 1_000;
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
const MANAGER: &str = "endpoint-controller";
const HEADLESS: &str = "service.kubernetes.io/headless";

/// Ready and unready addresses that share their ports.
#[derive(Default)]
struct Group {
    ports: Vec<SlicePort>,
    ready: Vec<EndpointAddress>,
    unready: Vec<EndpointAddress>,
}

/// The Endpoints that a Service should have.
pub(crate) fn desired(service: &Service, pods: &[Arc<Pod>]) -> Endpoints {
    let family = Family::of_service(service).into_iter().next().unwrap_or(Family::V4);
    let publishes_unready = candidate::publishes_unready(service);
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    let mut left = ADDRESSES_MAX;
    let mut sorted: Vec<&Arc<Pod>> = pods.iter().filter(|pod| !candidate::has_ended(pod)).collect();
    sorted.sort_by_key(|pod| pod.name_any());
    for pod in sorted {
        let terminating = pod.metadata.deletion_timestamp.is_some() && !publishes_unready;
        let Some(ip) = candidate::address(pod, family).filter(|_| !terminating) else { continue };
        let ports = candidate::ports(service, pod);
        if left == 0 || (ports.is_empty() && !candidate::is_headless(service)) {
            continue;
        }
        left -= 1;
        let group = groups.entry(format!("{ports:?}")).or_insert_with(|| Group { ports, ..Group::default() });
        let ready = publishes_unready || candidate::is_ready(pod);
        let list = if ready { &mut group.ready } else { &mut group.unready };
        list.push(address(service, pod, ip));
    }
    let subsets: Vec<EndpointSubset> = groups.into_values().map(subset).collect();
    Endpoints { metadata: metadata(service, left == 0), subsets: (!subsets.is_empty()).then_some(subsets) }
}

/// Whether what exists is what should be.
pub(crate) fn is_same(existing: &Endpoints, desired: &Endpoints) -> bool {
    let subsets = |endpoints: &Endpoints| endpoints.subsets.clone().unwrap_or_default();
    let annotation = |endpoints: &Endpoints| endpoints.annotations().get(OVER_CAPACITY).cloned();
    subsets(existing) == subsets(desired)
        && existing.metadata.labels == desired.metadata.labels
        && annotation(existing) == annotation(desired)
}

fn subset(group: Group) -> EndpointSubset {
    let ports = group.ports.into_iter().map(|port| EndpointPort {
        app_protocol: port.app_protocol,
        name: port.name.filter(|name| !name.is_empty()),
        port: port.port.unwrap_or_default(),
        protocol: port.protocol,
    });
    let some = |list: Vec<EndpointAddress>| (!list.is_empty()).then_some(list);
    EndpointSubset {
        addresses: some(group.ready),
        not_ready_addresses: some(group.unready),
        ports: Some(ports.collect::<Vec<_>>()).filter(|ports| !ports.is_empty()),
    }
}

fn address(service: &Service, pod: &Pod, ip: &str) -> EndpointAddress {
    EndpointAddress {
        ip: ip.to_owned(),
        hostname: candidate::hostname(service, pod),
        node_name: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            namespace: pod.namespace(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..ObjectReference::default()
        }),
    }
}

fn metadata(service: &Service, over_capacity: bool) -> ObjectMeta {
    let mut labels = service.labels().clone();
    labels.remove(HEADLESS);
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    if candidate::is_headless(service) {
        labels.insert(HEADLESS.to_owned(), String::new());
    }
    let annotations = over_capacity.then(|| BTreeMap::from([(OVER_CAPACITY.to_owned(), "truncated".to_owned())]));
    ObjectMeta {
        name: service.metadata.name.clone(),
        namespace: service.namespace(),
        labels: Some(labels),
        annotations,
        ..ObjectMeta::default()
    }
}
