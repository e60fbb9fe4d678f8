//! An API server that errs, and objects that nobody should have written: what is programmed stays right.

use super::api::Resource::{Services, Slices};
use super::*;

/// An object at a resourceVersion.
fn at(version: u64, mut object: Value) -> Value {
    object["metadata"]["resourceVersion"] = json!(version.to_string());
    object
}

/// Two Services with one endpoint each, at version 100.
async fn versioned() -> FakeApi {
    let api = api(0).await;
    api.set(Services, (0..2).map(|index| at(100, service(index))).collect());
    api.set(Slices, (0..2).map(|index| at(100, slice(index, "10.1.0.1"))).collect());
    api
}

fn lists(api: &FakeApi, resource: Resource) -> usize {
    api.requests(resource).iter().filter(|query| !query.contains("watch=true")).count()
}

#[tokio::test]
async fn a_server_that_has_lost_its_state_flushes_nothing() {
    let api = versioned().await;
    let process = Process::start(&api);
    process.until("the first state", |state| endpoint_count(state, "10.1.0.1") == 2).await;
    // Restored from an old backup, or not ready yet: everything is gone, at a lower resourceVersion.
    for resource in [Services, Slices] {
        api.set(resource, Vec::new());
    }
    let before = lists(&api, Services);
    api.set_version(40);
    api.expire(Services).await;
    api.expire(Slices).await;
    // A list, its confirmation, and then both once more after a pause.
    wait("lists that are not believed", || lists(&api, Services) >= before + 4).await;
    assert_eq!(process.services(), ["s0", "s1"]);
    assert_eq!(endpoint_count(&process.recorder.lock(), "10.1.0.1"), 2);
    // Some objects come back: what is listed then is the truth.
    api.set(Services, vec![at(41, service(1))]);
    wait("the list that is believed", || process.services() == ["s1"]).await;
    process.stop().await;
}

#[tokio::test]
async fn an_empty_list_beyond_everything_seen_is_believed() {
    let api = versioned().await;
    let process = Process::start(&api);
    process.until("the first state", |state| endpoint_count(state, "10.1.0.1") == 2).await;
    api.set(Slices, Vec::new());
    api.set_version(5000);
    api.expire(Slices).await;
    process.until("no endpoints", |state| endpoint_count(state, "10.1.0.1") == 0).await;
    assert_eq!(process.services(), ["s0", "s1"], "the Services are still listed");
    process.stop().await;
}

#[tokio::test]
async fn late_and_repeated_events_change_nothing() {
    let api = versioned().await;
    let process = Process::start(&api);
    process.until("the first state", |state| endpoint_count(state, "10.1.0.1") == 2).await;
    api.event_at(Slices, "MODIFIED", slice(0, "10.1.0.2"), 107).await;
    api.event_at(Slices, "MODIFIED", slice(0, "10.1.0.9"), 103).await;
    api.event_at(Slices, "MODIFIED", slice(0, "10.1.0.2"), 107).await;
    api.event_at(Services, "DELETED", service(1), 110).await;
    api.event_at(Services, "MODIFIED", service(1), 109).await;
    api.event_at(Services, "ADDED", service(1), 100).await;
    // The events of one watch come one after the other: when these two are seen, so are the ones before.
    api.event_at(Services, "ADDED", service(7), 111).await;
    api.event_at(Slices, "ADDED", slice(7, "10.1.0.7"), 111).await;
    process.until("the last events", |state| endpoint_count(state, "10.1.0.7") == 1).await;
    assert_eq!(process.services(), ["s0", "s7"]);
    let recorder = process.stop().await;
    let state = recorder.lock();
    assert_eq!((endpoint_count(&state, "10.1.0.2"), endpoint_count(&state, "10.1.0.9")), (1, 0));
}

#[tokio::test]
async fn a_storm_of_expired_watches_is_answered_with_pauses() {
    let api = versioned().await;
    let process = Process::start(&api);
    process.until("the first state", |state| endpoint_count(state, "10.1.0.1") == 2).await;
    let before = lists(&api, Slices);
    api.set_gone(true);
    let start = Instant::now();
    api.expire(Slices).await;
    wait("four more lists", || lists(&api, Slices) >= before + 4).await;
    // Pauses of at least 0.8, 1.6 and 3.2 s: a server in trouble is not asked for everything without end.
    assert!(start.elapsed() > Duration::from_secs(5), "{:?}", start.elapsed());
    api.set(Slices, (0..2).map(|index| at(200, slice(index, "10.1.0.2"))).collect());
    // Listed before the storm ends: a watch that begins behind an older list would not be told of it.
    let seen = lists(&api, Slices);
    wait("a list of the news", || lists(&api, Slices) > seen).await;
    api.set_gone(false);
    process.until("the news after the storm", |state| endpoint_count(state, "10.1.0.2") == 2).await;
    assert_eq!(process.recorder.lock().full_syncs, 1);
    process.stop().await;
}

#[tokio::test]
async fn hostile_slices_harm_nobody_else() {
    let bad = |name: &str, content: Value| {
        let mut object = json!({
            "metadata": {"name": name, "namespace": "ns", "labels": {"kubernetes.io/service-name": "s0"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 8080}],
        });
        for (field, value) in content.as_object().unwrap() {
            object[field] = value.clone();
        }
        object
    };
    let endpoints = |addresses: &[&str]| {
        let endpoints: Vec<_> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
        json!({ "endpoints": endpoints })
    };
    let api = api(3).await;
    let many: Vec<String> = (0..10_000).map(|i| format!("10.2.{}.{}", i / 200, i % 200 + 1)).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let mut slices = vec![
        slice(0, "10.1.0.1"),
        slice(1, "10.1.0.1"),
        bad("special", endpoints(&["127.0.0.1", "169.254.169.254", "0.0.0.0", "::ffff:127.0.0.1", "255.255.255.255"])),
        bad("v6-in-v4", endpoints(&["fd00::1", "::1", "not an address", ""])),
        bad("no-addresses", json!({"endpoints": [{"addresses": []}, {}]})),
        bad("no-port", json!({"endpoints": [{"addresses": ["10.1.0.8"]}], "ports": [{"name": ""}, {"port": 1}]})),
        bad("port-0", json!({"endpoints": [{"addresses": ["10.1.0.8"]}], "ports": [{"name": "", "port": 0}]})),
        bad("port-big", json!({"endpoints": [{"addresses": ["10.1.0.8"]}], "ports": [{"name": "", "port": 70000}]})),
        bad("nothing", json!({})),
        bad("fqdn", json!({"addressType": "FQDN", "endpoints": [{"addresses": ["example.com"]}]})),
        bad("odd-family", json!({"addressType": "IPX", "endpoints": [{"addresses": ["10.1.0.8"]}]})),
        bad("again", endpoints(&["10.1.0.1", "10.1.0.1"])),
        bad("ready-null", json!({"endpoints": [{"addresses": ["10.1.0.5"], "conditions": {"ready": null}}]})),
        slice(2, "10.3.0.1"),
    ];
    let mut large = slice(2, "10.3.0.1");
    large["metadata"]["name"] = json!("s2-large");
    large["endpoints"] = endpoints(&many)["endpoints"].clone();
    slices.push(large);
    api.set(Slices, slices);
    let process = Process::start(&api);
    process.until("the first sync", |state| state.full_syncs == 1).await;
    let recorder = process.stop().await;
    let state = recorder.lock();
    let of = |name: &str| {
        let service = state.programmed.services.values().find(|service| *service.name.service == *name).unwrap();
        service.cluster_endpoints.iter().map(|endpoint| endpoint.address().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(of("s0"), ["10.1.0.1:8080", "10.1.0.5:8080"]);
    assert_eq!(of("s1"), ["10.1.0.1:8080"]);
    assert_eq!(of("s2").len(), 10_001);
}

#[tokio::test]
async fn one_bad_service_among_five_thousand_is_left_out_alone() {
    const COUNT: usize = 5000;
    let api = api(COUNT).await;
    let mut services: Vec<Value> = (0..COUNT).map(service).collect();
    services[1234]["spec"] = json!({
        "clusterIP": "10.96.0.0/33", "ports": [{"port": -1}, {"port": 70000, "nodePort": 99999, "protocol": "GRE"}],
        "externalIPs": ["", "999.1.1.1"], "loadBalancerSourceRanges": ["0.0.0.0/33"], "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": -5}}, "type": "Unheard",
    });
    services[4321]["spec"] = json!({"clusterIP": "10.96.99.99", "ports": []});
    api.set(Services, services);
    let process = Process::start(&api);
    process.until("everything else", |state| state.programmed.services.len() == COUNT - 2).await;
    api.event(Slices, "MODIFIED", slice(7, "10.1.0.2")).await;
    process.until("a change", |state| endpoint_count(state, "10.1.0.2") == 1).await;
    process.stop().await;
}
