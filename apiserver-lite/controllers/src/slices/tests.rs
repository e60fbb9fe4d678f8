//! Plans from pods and existing slices.

use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

use super::*;

fn service(spec: &Value) -> Service {
    serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "ns", "uid": "u", "labels": {"tier": "front"}}, "spec": spec,
    }))
    .unwrap()
}

fn plain() -> Service {
    service(&json!({"selector": {"app": "web"}, "ipFamilies": ["IPv4"], "clusterIP": "10.0.0.1",
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}))
}

fn pod(number: usize, ready: bool) -> Arc<Pod> {
    let (high, low) = (number / 250, number % 250 + 1);
    Arc::new(
        serde_json::from_value(json!({
            "metadata": {"name": format!("p{number:03}"), "namespace": "ns", "uid": format!("uid-{number}"), "labels": {"app": "web"}},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {
                "podIPs": [{"ip": format!("10.1.{high}.{low}")}, {"ip": format!("fd00::{number:x}")}],
                "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
            },
        }))
        .unwrap(),
    )
}

fn plan(service: &Service, pods: &[Arc<Pod>], existing: &[Arc<EndpointSlice>]) -> Plan {
    let node = |name: &str| {
        let node = json!({"metadata": {"name": name, "labels": {ZONE: "z1"}}});
        Some(Arc::new(serde_json::from_value(node).unwrap()))
    };
    Input { service, pods, node: &node, existing, trigger: None }.plan()
}

/// What the server would hold after a plan.
fn apply(plan: Plan, existing: &[Arc<EndpointSlice>]) -> Vec<Arc<EndpointSlice>> {
    let touched = |slice: &EndpointSlice| {
        let same = |other: &EndpointSlice| other.metadata.name == slice.metadata.name;
        plan.update.iter().any(same) || plan.delete.iter().any(|other| same(other))
    };
    let mut after: Vec<Arc<EndpointSlice>> = existing.iter().filter(|slice| !touched(slice)).cloned().collect();
    after.extend(plan.update.iter().cloned().map(Arc::new));
    for (number, mut slice) in plan.create.into_iter().enumerate() {
        slice.metadata.name = Some(format!("web-{}-{number}", after.len()));
        after.push(Arc::new(slice));
    }
    after
}

fn counts(slices: &[Arc<EndpointSlice>]) -> Vec<usize> {
    let mut counts: Vec<usize> = slices.iter().map(|slice| slice.endpoints.as_ref().map_or(0, Vec::len)).collect();
    counts.sort_unstable();
    counts
}

#[test]
fn a_slice_says_whose_it_is_and_what_is_in_it() {
    let plan = plan(&plain(), &[pod(0, true)], &[]);
    let slice = &plan.create[0];
    assert_eq!((slice.address_type.as_str(), slice.metadata.generate_name.as_deref()), ("IPv4", Some("web-")));
    let labels = slice.metadata.labels.as_ref().unwrap();
    assert_eq!(
        (labels[SERVICE_NAME].as_str(), labels[MANAGED_BY].as_str(), labels["tier"].as_str()),
        ("web", MANAGER, "front")
    );
    assert!(!labels.contains_key(HEADLESS));
    let owner = &slice.metadata.owner_references.as_ref().unwrap()[0];
    assert_eq!((owner.kind.as_str(), owner.uid.as_str(), owner.controller), ("Service", "u", Some(true)));
    let port = &slice.ports.as_ref().unwrap()[0];
    assert_eq!((port.name.as_deref(), port.port, port.protocol.as_deref()), (Some("http"), Some(8080), Some("TCP")));
    let endpoint = &slice.endpoints.as_ref().unwrap()[0];
    assert_eq!(
        (endpoint.addresses.as_slice(), endpoint.zone.as_deref()),
        (["10.1.0.1".to_owned()].as_slice(), Some("z1"))
    );
    let wanted = EndpointConditions { ready: Some(true), serving: Some(true), terminating: Some(false) };
    assert_eq!(endpoint.conditions, Some(wanted));
    assert_eq!(endpoint.target_ref.as_ref().unwrap().name.as_deref(), Some("p000"));
}

#[test]
fn slices_hold_a_hundred_and_a_second_plan_is_empty() {
    let pods: Vec<Arc<Pod>> = (0..250).map(|number| pod(number, true)).collect();
    let slices = apply(plan(&plain(), &pods, &[]), &[]);
    assert_eq!(counts(&slices), [50, 100, 100]);
    let again = plan(&plain(), &pods, &slices);
    assert!(again.create.is_empty() && again.update.is_empty() && again.delete.is_empty(), "{again:?}");
}

#[test]
fn one_change_is_one_write() {
    let mut pods: Vec<Arc<Pod>> = (0..250).map(|number| pod(number, true)).collect();
    let slices = apply(plan(&plain(), &pods, &[]), &[]);
    pods[7] = pod(7, false);
    let change = plan(&plain(), &pods, &slices);
    assert_eq!((change.create.len(), change.update.len(), change.delete.len()), (0, 1, 0));
    let slices = apply(change, &slices);
    pods.push(pod(300, true));
    let addition = plan(&plain(), &pods, &slices);
    assert_eq!((addition.create.len(), addition.update.len()), (0, 1), "the slice with room takes it");
    pods.truncate(50);
    let slices = apply(addition, &slices);
    let left = apply(plan(&plain(), &pods, &slices), &slices);
    assert_eq!(counts(&left).iter().sum::<usize>(), 50);
    assert!(!counts(&left).contains(&0), "empty slices go");
}

#[test]
fn no_pods_leave_one_empty_slice() {
    let slices = apply(plan(&plain(), &[pod(0, true)], &[]), &[]);
    let empty = apply(plan(&plain(), &[], &slices), &slices);
    assert_eq!(counts(&empty), [0]);
    let again = plan(&plain(), &[], &empty);
    assert!(again.create.is_empty() && again.update.is_empty() && again.delete.is_empty(), "{again:?}");
    let full = apply(plan(&plain(), &[pod(0, true)], &empty), &empty);
    assert_eq!(counts(&full), [1]);
}

#[test]
fn each_family_has_its_own_slices() {
    let dual = service(&json!({"selector": {"app": "web"}, "ipFamilies": ["IPv4", "IPv6"], "ports": [{"port": 80}]}));
    let slices = apply(plan(&dual, &[pod(1, true)], &[]), &[]);
    let mut found: Vec<(&str, &str)> = slices
        .iter()
        .map(|s| (s.address_type.as_str(), s.endpoints.as_ref().unwrap()[0].addresses[0].as_str()))
        .collect();
    found.sort_unstable();
    assert_eq!(found, [("IPv4", "10.1.0.2"), ("IPv6", "fd00::1")]);
    let single = plan(&plain(), &[pod(1, true)], &slices);
    assert!(single.delete.iter().any(|slice| slice.address_type == "IPv6"), "a lost family loses its slices");
}

#[test]
fn conditions_tell_what_a_pod_does() {
    let conditions = |service: &Service, pod: Arc<Pod>| {
        let plan = plan(service, &[pod], &[]);
        plan.create[0].endpoints.as_ref().unwrap().first().and_then(|endpoint| endpoint.conditions.clone())
    };
    let of = |ready, serving, terminating| {
        Some(EndpointConditions { ready: Some(ready), serving: Some(serving), terminating: Some(terminating) })
    };
    let mut terminating = (*pod(0, true)).clone();
    terminating.metadata.deletion_timestamp = Some(Timestamp::UNIX_EPOCH.into());
    assert_eq!(conditions(&plain(), pod(0, false)), of(false, false, false));
    assert_eq!(conditions(&plain(), Arc::new(terminating.clone())), of(false, true, true));
    let mut publishing = plain();
    publishing.spec.as_mut().unwrap().publish_not_ready_addresses = Some(true);
    assert_eq!(conditions(&publishing, pod(0, false)), of(true, false, false));
    assert_eq!(conditions(&publishing, Arc::new(terminating)), of(true, true, true));
    let mut ended = (*pod(0, true)).clone();
    ended.status.as_mut().unwrap().phase = Some("Succeeded".to_owned());
    assert_eq!(conditions(&plain(), Arc::new(ended)), None);
}

#[test]
fn pods_with_other_ports_have_other_slices() {
    let mut other = (*pod(1, true)).clone();
    other.spec.as_mut().unwrap().containers[0].ports.as_mut().unwrap()[0].container_port = 9090;
    let plan = plan(&plain(), &[pod(0, true), Arc::new(other)], &[]);
    let mut ports: Vec<Option<i32>> = plan.create.iter().map(|slice| slice.ports.as_ref().unwrap()[0].port).collect();
    ports.sort_unstable();
    assert_eq!(ports, [Some(8080), Some(9090)]);
}

#[test]
fn headless_services_are_marked() {
    let headless = service(&json!({"selector": {"app": "web"}, "clusterIP": "None", "ports": [{"port": 80}]}));
    let plan = plan(&headless, &[pod(0, true)], &[]);
    assert_eq!(plan.create[0].metadata.labels.as_ref().unwrap()[HEADLESS], "");
}

#[test]
fn slices_of_others_are_not_ours() {
    let slices = apply(plan(&plain(), &[pod(0, true)], &[]), &[]);
    assert!(is_ours(&slices[0], "web") && !is_ours(&slices[0], "other"));
    let mut foreign = (*slices[0]).clone();
    foreign.metadata.labels.as_mut().unwrap().insert(MANAGED_BY.to_owned(), "someone".to_owned());
    assert!(!is_ours(&foreign, "web"));
}
