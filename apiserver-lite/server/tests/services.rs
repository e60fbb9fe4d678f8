//! Cluster IPs and node ports over the API: given out, honoured, refused and given back.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failed step fails the test")]

mod common;

use std::collections::HashSet;
use std::sync::Arc;

use common::{Api, SERVICES, Setup, service};
use serde_json::{Value, json};

const ADDRESSES: &str = "/apis/networking.k8s.io/v1/ipaddresses";

async fn addresses(api: &Api) -> Vec<String> {
    let list = api.get(ADDRESSES).await.expect(200);
    list["items"].as_array().unwrap().iter().map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

fn path(name: &str) -> String {
    format!("{SERVICES}/{name}")
}

#[tokio::test]
async fn families() {
    let api = Api::start().await;
    let check = async |name: &str, spec: Value, families: Value, ips: usize| {
        let created = api.post(SERVICES, &service(name, spec)).await.expect(201);
        assert_eq!(created["spec"]["ipFamilies"], families, "{created}");
        let given = created["spec"]["clusterIPs"].as_array().unwrap();
        assert_eq!(given.len(), ips, "{created}");
        assert_eq!(created["spec"]["clusterIP"], given[0]);
    };
    check("single", json!({}), json!(["IPv4"]), 1).await;
    check("prefer", json!({"ipFamilyPolicy": "PreferDualStack"}), json!(["IPv4", "IPv6"]), 2).await;
    check("six", json!({"ipFamilies": ["IPv6"]}), json!(["IPv6"]), 1).await;
    check(
        "require",
        json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6", "IPv4"]}),
        json!(["IPv6", "IPv4"]),
        2,
    )
    .await;
    check("headless", json!({"clusterIP": "None", "selector": {"a": "b"}}), json!(["IPv4"]), 1).await;
    let external = json!({"type": "ExternalName", "externalName": "example.com"});
    let created = api.post(SERVICES, &service("external", external)).await.expect(201);
    assert!(created["spec"].get("clusterIP").is_none(), "{created}");
    // One for `kubernetes`, and none for the last two.
    assert_eq!(addresses(&api).await.len(), 1 + 1 + 2 + 1 + 2);
}

#[tokio::test]
async fn single_stack_clusters_refuse_two_families() {
    let api = Api::start_with(Setup { ranges: vec!["10.0.0.0/24"], ..Setup::default() }).await;
    let message =
        api.post(SERVICES, &service("a", json!({"ipFamilyPolicy": "RequireDualStack"}))).await.refused(422, "Invalid");
    assert!(message.contains("not configured for dual-stack"), "{message}");
    let preferred = api.post(SERVICES, &service("b", json!({"ipFamilyPolicy": "PreferDualStack"}))).await.expect(201);
    assert_eq!(preferred["spec"]["clusterIPs"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn requested_values_are_honoured_or_refused() {
    let api = Api::start().await;
    let wanted = json!({"type": "NodePort", "clusterIP": "10.96.7.7", "ports": [{"port": 80, "nodePort": 30080}]});
    let created = api.post(SERVICES, &service("a", wanted.clone())).await.expect(201);
    assert_eq!(
        (&created["spec"]["clusterIP"], &created["spec"]["ports"][0]["nodePort"]),
        (&json!("10.96.7.7"), &json!(30080))
    );
    let message = api.post(SERVICES, &service("b", json!({"clusterIP": "10.96.7.7"}))).await.refused(422, "Invalid");
    assert!(
        message.contains("spec.clusterIPs: Invalid value") && message.contains("provided IP is already allocated"),
        "{message}"
    );
    let outside = api.post(SERVICES, &service("b", json!({"clusterIP": "172.16.0.1"}))).await.refused(422, "Invalid");
    assert!(outside.contains("failed to allocate IP 172.16.0.1"), "{outside}");
    let port = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]});
    let message = api.post(SERVICES, &service("b", port)).await.refused(422, "Invalid");
    assert!(
        message.contains("spec.ports[0].nodePort") && message.contains("provided port is already allocated"),
        "{message}"
    );
    let outside = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 80}]});
    let message = api.post(SERVICES, &service("b", outside)).await.refused(422, "Invalid");
    assert!(message.contains("The range of valid ports is 30000-32767"), "{message}");
    // What was refused took nothing: the address of a refused port is free again.
    assert_eq!(addresses(&api).await.len(), 2);
}

#[tokio::test]
async fn deletion_and_new_types_give_back() {
    let api = Api::start().await;
    let wanted = json!({"type": "NodePort", "clusterIP": "10.96.7.7", "ports": [{"port": 80, "nodePort": 30080}]});
    let mut created = api.post(SERVICES, &service("a", wanted.clone())).await.expect(201);
    created["spec"]["type"] = json!("ClusterIP");
    let changed = api.put(&path("a"), &created).await.expect(200);
    assert!(changed["spec"]["ports"][0].get("nodePort").is_none(), "{changed}");
    let port = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]});
    api.post(SERVICES, &service("b", port)).await.expect(201);
    let named = json!({"spec": {"type": "ExternalName", "externalName": "example.com"}});
    let external = api.patch(&path("a"), "merge", &named).await.expect(200);
    assert!(external["spec"].get("clusterIP").is_none(), "{external}");
    assert!(!addresses(&api).await.contains(&"10.96.7.7".to_owned()));
    api.delete(&path("b"), json!(null)).await.expect(200);
    api.post(SERVICES, &service("c", wanted)).await.expect(201);
}

#[tokio::test]
async fn an_update_keeps_what_was_given_out() {
    let api = Api::start().await;
    let created = api.post(SERVICES, &service("a", json!({"type": "NodePort"}))).await.expect(201);
    let mut sent = service("a", json!({"type": "NodePort", "ports": [{"port": 81}]}));
    let updated = api.put(&path("a"), &sent).await.expect(200);
    assert_eq!(updated["spec"]["clusterIP"], created["spec"]["clusterIP"]);
    assert_eq!(updated["spec"]["ports"][0]["nodePort"], created["spec"]["ports"][0]["nodePort"]);
    sent["spec"]["clusterIP"] = json!("10.96.9.9");
    api.put(&path("a"), &sent).await.refused(422, "Invalid");
    let both =
        api.patch(&path("a"), "merge", &json!({"spec": {"ipFamilyPolicy": "PreferDualStack"}})).await.expect(200);
    assert_eq!(both["spec"]["clusterIPs"].as_array().unwrap().len(), 2);
    let one = api.patch(&path("a"), "merge", &json!({"spec": {"ipFamilyPolicy": "SingleStack"}})).await.expect(200);
    assert_eq!(one["spec"]["clusterIPs"], json!([created["spec"]["clusterIP"]]));
    assert_eq!(addresses(&api).await.len(), 2);
}

#[tokio::test]
async fn load_balancers_get_a_health_check_port() {
    let api = Api::start().await;
    let spec = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"});
    let created = api.post(SERVICES, &service("lb", spec)).await.expect(201);
    let port = created["spec"]["healthCheckNodePort"].as_u64().unwrap();
    assert!((30000..=32767).contains(&port));
    let taken = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": port}]});
    api.post(SERVICES, &service("a", taken.clone())).await.refused(422, "Invalid");
    let cluster = json!({"spec": {"externalTrafficPolicy": "Cluster"}});
    let changed = api.patch(&path("lb"), "merge", &cluster).await.expect(200);
    assert!(changed["spec"].get("healthCheckNodePort").is_none(), "{changed}");
    api.post(SERVICES, &service("a", taken)).await.expect(201);
}

#[tokio::test]
async fn ports_of_two_protocols_share_a_node_port() {
    let api = Api::start().await;
    let ports = json!([{"name": "u", "port": 53, "protocol": "UDP"}, {"name": "t", "port": 53, "protocol": "TCP"}]);
    let created = api.post(SERVICES, &service("dns", json!({"type": "NodePort", "ports": ports}))).await.expect(201);
    assert_eq!(created["spec"]["ports"][0]["nodePort"], created["spec"]["ports"][1]["nodePort"]);
}

#[tokio::test]
async fn no_address_is_given_out_twice() {
    let api = Arc::new(Api::start_with(Setup { ranges: vec!["10.0.0.0/27"], ..Setup::default() }).await);
    let creations: Vec<_> = (0..40)
        .map(|n| {
            let api = Arc::clone(&api);
            tokio::spawn(async move { api.post(SERVICES, &service(&format!("s{n}"), json!({}))).await })
        })
        .collect();
    let (mut given, mut full) = (HashSet::new(), 0);
    for creation in creations {
        let answer = creation.await.unwrap();
        if answer.code == 201 {
            let ip = answer.json()["spec"]["clusterIP"].as_str().unwrap().to_owned();
            assert!(given.insert(ip.clone()), "{ip} was given out twice");
        } else {
            answer.refused(500, "InternalError");
            full += 1;
        }
    }
    // 30 usable addresses, one of which belongs to `kubernetes`.
    assert_eq!((given.len(), full), (29, 11));
    api.delete(&path("none"), json!(null)).await.refused(404, "NotFound");
    assert_eq!(addresses(&api).await.len(), 30);
}
