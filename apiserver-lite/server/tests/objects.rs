//! The life of an object through the API: create, update, patch, delete.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failed step fails the test")]

mod common;

use common::{Api, CONFIG_MAPS, PODS, Setup, config_map, pod};
use serde_json::json;

#[tokio::test]
async fn create_stamps_what_the_server_owns() {
    let api = Api::start().await;
    let mut sent = config_map("a");
    sent["metadata"]["uid"] = json!("mine");
    let created = api.post(CONFIG_MAPS, &sent).await.expect(201);
    let metadata = &created["metadata"];
    assert_eq!(metadata["namespace"], "default");
    assert_ne!(metadata["uid"], "mine");
    assert_eq!(metadata["creationTimestamp"].as_str().unwrap().len(), 20);
    assert_eq!(metadata["resourceVersion"], api.revision().await.to_string());
    assert_eq!(api.get(&format!("{CONFIG_MAPS}/a")).await.expect(200), created);
}

#[tokio::test]
async fn generated_names_differ() {
    let api = Api::start().await;
    let sent = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "web-"}});
    let first = api.post(CONFIG_MAPS, &sent).await.expect(201);
    let second = api.post(CONFIG_MAPS, &sent).await.expect(201);
    assert!(first["metadata"]["name"].as_str().unwrap().starts_with("web-"));
    assert_ne!(first["metadata"]["name"], second["metadata"]["name"]);
}

#[tokio::test]
async fn dry_run_changes_nothing() {
    let api = Api::start().await;
    let before = api.revision().await;
    let created = api.post(&format!("{CONFIG_MAPS}?dryRun=All"), &config_map("dry")).await.expect(201);
    assert!(created["metadata"]["uid"].is_string());
    api.get(&format!("{CONFIG_MAPS}/dry")).await.refused(404, "NotFound");
    let ports = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30100}]});
    for _ in 0..2 {
        api.post(&format!("{}?dryRun=All", common::SERVICES), &common::service("s", ports.clone())).await.expect(201);
    }
    assert_eq!(api.revision().await, before);
    api.post(CONFIG_MAPS, &config_map("real")).await.expect(201);
    api.delete(&format!("{CONFIG_MAPS}/real?dryRun=All"), json!(null)).await.expect(200);
    api.delete(&format!("{CONFIG_MAPS}/real"), json!({"dryRun": ["All"]})).await.expect(200);
    api.get(&format!("{CONFIG_MAPS}/real")).await.expect(200);
}

#[tokio::test]
async fn an_update_without_change_writes_nothing() {
    let api = Api::start().await;
    let created = api.post(CONFIG_MAPS, &config_map("a")).await.expect(201);
    let again = api.put(&format!("{CONFIG_MAPS}/a"), &created).await.expect(200);
    assert_eq!(again["metadata"]["resourceVersion"], created["metadata"]["resourceVersion"]);
    let mut unconditional = config_map("a");
    unconditional["data"]["k"] = json!("2");
    let updated = api.put(&format!("{CONFIG_MAPS}/a"), &unconditional).await.expect(200);
    assert_ne!(updated["metadata"]["resourceVersion"], created["metadata"]["resourceVersion"]);
    assert_eq!(updated["metadata"]["uid"], created["metadata"]["uid"]);
}

#[tokio::test]
async fn put_creates_only_where_the_kind_allows_it() {
    let api = Api::start().await;
    api.put(&format!("{CONFIG_MAPS}/new"), &config_map("new")).await.refused(404, "NotFound");
    let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l"}, "spec": {}});
    let leases = "/apis/coordination.k8s.io/v1/namespaces/default/leases";
    let created = api.put(&format!("{leases}/l"), &lease).await.expect(201);
    api.put(&format!("{leases}/l"), &lease).await.refused(422, "Invalid");
    api.put(&format!("{leases}/l"), &created).await.expect(200);
}

#[tokio::test]
async fn spec_and_status_change_separately() {
    let api = Api::start().await;
    let mut created = api.post(PODS, &pod("p")).await.expect(201);
    assert_eq!((&created["status"]["phase"], &created["metadata"]["generation"]), (&json!("Pending"), &json!(1)));
    created["status"]["phase"] = json!("Running");
    created["metadata"]["labels"]["new"] = json!("1");
    let main = api.put(&format!("{PODS}/p"), &created).await.expect(200);
    assert_eq!((&main["status"]["phase"], &main["metadata"]["labels"]["new"]), (&json!("Pending"), &json!("1")));
    let status = json!({"status": {"phase": "Running", "podIP": "10.0.0.1"}, "spec": {"nodeName": "x"}});
    let patched = api.patch(&format!("{PODS}/p/status"), "merge", &status).await.expect(200);
    assert_eq!(patched["status"]["phase"], "Running");
    assert!(patched["spec"].get("nodeName").is_none());
}

#[tokio::test]
async fn three_forms_of_patch() {
    let api = Api::start().await;
    api.post(PODS, &pod("p")).await.expect(201);
    let path = format!("{PODS}/p");
    let strategic = json!({"spec": {"containers": [{"name": "c", "image": "j"}]}});
    let patched = api.patch(&path, "strategic-merge", &strategic).await.expect(200);
    assert_eq!(patched["spec"]["containers"][0]["image"], "j");
    assert_eq!(patched["metadata"]["generation"], 2);
    let merged = api.patch(&path, "merge", &json!({"metadata": {"labels": {"app": null, "b": "2"}}})).await.expect(200);
    assert_eq!(merged["metadata"]["labels"], json!({"b": "2"}));
    let operations = json!([{"op": "test", "path": "/metadata/labels/b", "value": "2"}, {"op": "replace", "path": "/metadata/labels/b", "value": "3"}]);
    assert_eq!(api.patch(&path, "json", &operations).await.expect(200)["metadata"]["labels"]["b"], "3");
}

#[tokio::test]
async fn concurrent_patches_are_all_applied() {
    let api = std::sync::Arc::new(Api::start().await);
    api.post(CONFIG_MAPS, &config_map("many")).await.expect(201);
    let patches: Vec<_> = (0..6)
        .map(|n| {
            let api = std::sync::Arc::clone(&api);
            let change = json!({"data": {format!("key{n}"): "x"}});
            tokio::spawn(async move { api.patch(&format!("{CONFIG_MAPS}/many"), "merge", &change).await.code })
        })
        .collect();
    for patch in patches {
        assert_eq!(patch.await.unwrap(), 200);
    }
    let object = api.get(&format!("{CONFIG_MAPS}/many")).await.expect(200);
    assert_eq!(object["data"].as_object().unwrap().len(), 7);
}

#[tokio::test]
async fn a_bound_pod_goes_gracefully() {
    let api = Api::start().await;
    let mut bound = pod("p");
    bound["spec"]["nodeName"] = json!("n1");
    let created = api.post(PODS, &bound).await.expect(201);
    let path = format!("{PODS}/p");
    let wrong = json!({"preconditions": {"uid": "other"}});
    api.delete(&path, wrong).await.refused(409, "Conflict");
    let marked = api.delete(&path, json!({"propagationPolicy": "Background"})).await.expect(200);
    assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 30);
    assert!(marked["metadata"]["deletionTimestamp"].is_string());
    api.get(&path).await.expect(200);
    let gone = api
        .delete(&path, json!({"gracePeriodSeconds": 0, "preconditions": {"uid": created["metadata"]["uid"]}}))
        .await
        .expect(200);
    assert_eq!(gone["kind"], "Pod");
    api.get(&path).await.refused(404, "NotFound");
    api.post(PODS, &pod("unbound")).await.expect(201);
    api.delete(&format!("{PODS}/unbound"), json!(null)).await.expect(200);
    api.get(&format!("{PODS}/unbound")).await.refused(404, "NotFound");
    api.delete(&format!("{PODS}/unbound"), json!({"propagationPolicy": "Sideways"})).await.refused(422, "Invalid");
}

#[tokio::test]
async fn finalizers_hold_until_they_are_taken_off() {
    let api = Api::start().await;
    let mut held = config_map("held");
    held["metadata"]["finalizers"] = json!(["example.com/wait"]);
    api.post(CONFIG_MAPS, &held).await.expect(201);
    let path = format!("{CONFIG_MAPS}/held");
    let marked = api.delete(&path, json!(null)).await.expect(200);
    assert!(marked["metadata"]["deletionTimestamp"].is_string());
    api.get(&path).await.expect(200);
    api.patch(&path, "merge", &json!({"metadata": {"finalizers": null}})).await.expect(200);
    api.get(&path).await.refused(404, "NotFound");
}

#[tokio::test]
async fn deletion_answers_with_status_and_collections_go_by_selector() {
    let api = Api::start().await;
    for name in ["a", "b", "c"] {
        let mut object = config_map(name);
        object["metadata"]["labels"] = json!({"keep": (name == "c").to_string()});
        api.post(CONFIG_MAPS, &object).await.expect(201);
    }
    let status = api.delete(&format!("{CONFIG_MAPS}/a"), json!(null)).await.expect(200);
    assert_eq!(
        (&status["kind"], &status["status"], &status["details"]["name"]),
        (&json!("Status"), &json!("Success"), &json!("a"))
    );
    api.delete(&format!("{CONFIG_MAPS}?labelSelector=keep%3Dfalse"), json!(null)).await.expect(200);
    let left = api.get(CONFIG_MAPS).await.expect(200);
    assert_eq!(left["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn namespaces_end_in_two_steps() {
    let api = Api::start().await;
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "t"}});
    api.post("/api/v1/namespaces", &namespace).await.expect(201);
    let inside = "/api/v1/namespaces/t/configmaps";
    api.post(inside, &config_map("a")).await.expect(201);
    let marked = api.delete("/api/v1/namespaces/t", json!(null)).await.expect(200);
    assert_eq!(marked["status"]["phase"], "Terminating");
    let refused = api.post(inside, &config_map("b")).await;
    let message = refused.refused(403, "Forbidden");
    assert!(message.contains("because it is being terminated"), "{message}");
    assert_eq!(refused.json()["details"]["causes"][0]["reason"], "NamespaceTerminating");
    let mut finalized = api.get("/api/v1/namespaces/t").await.expect(200);
    finalized["spec"]["finalizers"] = json!([]);
    api.put("/api/v1/namespaces/t/finalize", &finalized).await.expect(200);
    api.get("/api/v1/namespaces/t").await.refused(404, "NotFound");
    api.delete("/api/v1/namespaces/default", json!(null)).await.refused(403, "Forbidden");
}

#[tokio::test]
async fn a_cluster_begins_with_what_clients_expect() {
    let api = Api::start().await;
    for namespace in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        let found = api.get(&format!("/api/v1/namespaces/{namespace}")).await.expect(200);
        assert_eq!(
            (&found["status"]["phase"], &found["metadata"]["labels"]["kubernetes.io/metadata.name"]),
            (&json!("Active"), &json!(namespace))
        );
        api.get(&format!("/api/v1/namespaces/{namespace}/serviceaccounts/default")).await.expect(200);
    }
    let service = api.get("/api/v1/namespaces/default/services/kubernetes").await.expect(200);
    assert_eq!(service["spec"]["clusterIPs"], json!(["10.96.0.1"]));
    let endpoints = api.get("/api/v1/namespaces/default/endpoints/kubernetes").await.expect(200);
    assert_eq!(endpoints["subsets"][0]["addresses"][0]["ip"], "192.0.2.10");
    let slice = api.get("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes").await.expect(200);
    assert_eq!(slice["ports"][0]["port"], 6443);
    let ranges = api.get("/apis/networking.k8s.io/v1/servicecidrs/kubernetes").await.expect(200);
    assert_eq!(
        (&ranges["spec"]["cidrs"][1], &ranges["status"]["conditions"][0]["status"]),
        (&json!("fd00:10:96::/112"), &json!("True"))
    );
}

#[tokio::test]
async fn a_second_server_takes_the_store_over() {
    let first = Api::start().await;
    let created = first.post(common::SERVICES, &common::service("s", json!({"type": "NodePort"}))).await.expect(201);
    let store = std::sync::Arc::clone(&first.store);
    first.stop().await;
    let second = Api::start_with(Setup { store, ..Setup::default() }).await;
    let taken = json!({"clusterIP": created["spec"]["clusterIP"]});
    let message = second.post(common::SERVICES, &common::service("t", taken)).await.refused(422, "Invalid");
    assert!(message.contains("provided IP is already allocated"), "{message}");
    let port = json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": created["spec"]["ports"][0]["nodePort"]}]});
    let message = second.post(common::SERVICES, &common::service("t", port)).await.refused(422, "Invalid");
    assert!(message.contains("provided port is already allocated"), "{message}");
}
