//! What a client sends wrong gets the status that kube-apiserver gives, and the server goes on.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failed step fails the test")]

mod common;

use bytes::Bytes;
use common::{Api, Authority, CONFIG_MAPS, PODS, SERVICES, Setup, client_config, config_map, pod, service};
use http::Request;
use http_body_util::Full;
use serde_json::json;

const JSON: (&str, &str) = ("content-type", "application/json");

#[tokio::test]
async fn bodies_that_are_no_objects() {
    let api = Api::start().await;
    let truncated = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"na"#;
    for body in [truncated, "", "[]", "\"x\"", "\u{0}\u{1}"] {
        api.send("POST", CONFIG_MAPS, &[JSON], body.to_owned()).await.refused(400, "BadRequest");
    }
    let wrong_type = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": 7}});
    api.post(CONFIG_MAPS, &wrong_type).await.refused(400, "BadRequest");
    let wrong_port = service("a", json!({"ports": [{"port": "eighty"}]}));
    api.post(SERVICES, &wrong_port).await.refused(400, "BadRequest");
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    api.send("POST", CONFIG_MAPS, &[JSON], deep).await.refused(400, "BadRequest");
    api.post(CONFIG_MAPS, &config_map("still-works")).await.expect(201);
}

#[tokio::test]
async fn a_body_of_ten_megabytes() {
    let api = Api::start().await;
    let mut big = config_map("big");
    big["data"]["k"] = json!("x".repeat(10 << 20));
    let message = api.post(CONFIG_MAPS, &big).await.refused(413, "RequestEntityTooLarge");
    assert!(message.contains("limit is 3145728"), "{message}");
}

#[tokio::test]
async fn kinds_and_paths_that_do_not_exist() {
    let api = Api::start().await;
    for path in [
        "/api/v1/namespaces/default/gadgets",
        "/apis/example.com/v1/things",
        "/api/v2/pods",
        "/nothing",
        "/api/v1/pods/x/y/z",
    ] {
        api.get(path).await.refused(404, "NotFound");
    }
    let other_kind = json!({"apiVersion": "v1", "kind": "Gadget", "metadata": {"name": "a"}});
    api.post(CONFIG_MAPS, &other_kind).await.refused(400, "BadRequest");
    api.post(CONFIG_MAPS, &pod("a")).await.refused(400, "BadRequest");
    let missing = api.get(&format!("{CONFIG_MAPS}/none")).await;
    assert_eq!(missing.refused(404, "NotFound"), "configmaps \"none\" not found");
}

#[tokio::test]
async fn names_and_namespaces_that_do_not_fit() {
    let api = Api::start().await;
    api.post(CONFIG_MAPS, &config_map("twice")).await.expect(201);
    let again = api.post(CONFIG_MAPS, &config_map("twice")).await;
    assert_eq!(again.refused(409, "AlreadyExists"), "configmaps \"twice\" already exists");
    let nowhere = api.post("/api/v1/namespaces/nowhere/configmaps", &config_map("a")).await;
    assert_eq!(nowhere.refused(404, "NotFound"), "namespaces \"nowhere\" not found");
    let mut elsewhere = config_map("a");
    elsewhere["metadata"]["namespace"] = json!("kube-system");
    api.post(CONFIG_MAPS, &elsewhere).await.refused(400, "BadRequest");
    api.put(&format!("{CONFIG_MAPS}/twice"), &config_map("other")).await.refused(400, "BadRequest");
    api.post(CONFIG_MAPS, &config_map("Not_A_Name")).await.refused(422, "Invalid");
    let nameless = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {}});
    api.post(CONFIG_MAPS, &nameless).await.refused(422, "Invalid");
    let mut versioned = config_map("versioned");
    versioned["metadata"]["resourceVersion"] = json!("5");
    let message = api.post(CONFIG_MAPS, &versioned).await.refused(500, "");
    assert_eq!(message, "resourceVersion should not be set on objects to be created");
}

#[tokio::test]
async fn resource_versions_that_are_wrong() {
    let api = Api::start().await;
    let created = api.post(CONFIG_MAPS, &config_map("a")).await.expect(201);
    let path = format!("{CONFIG_MAPS}/a");
    let mut stale = created.clone();
    stale["data"]["k"] = json!("new");
    api.put(&path, &stale).await.expect(200);
    stale["data"]["k"] = json!("newer");
    let message = api.put(&path, &stale).await.refused(409, "Conflict");
    assert!(message.contains("the object has been modified"), "{message}");
    stale["metadata"]["resourceVersion"] = json!("abc");
    api.put(&path, &stale).await.refused(422, "Invalid");
    stale["metadata"]["resourceVersion"] = json!("");
    stale["metadata"]["uid"] = json!("another");
    api.put(&path, &stale).await.refused(409, "Conflict");
    api.get(&format!("{CONFIG_MAPS}?resourceVersion=abc")).await.refused(400, "BadRequest");
    api.get(&format!("{CONFIG_MAPS}?watch=1&resourceVersion=abc")).await.refused(422, "Invalid");
    api.get(&format!("{CONFIG_MAPS}?continue=abc")).await.refused(400, "BadRequest");
    api.get(&format!("{CONFIG_MAPS}?labelSelector=a%20in")).await.refused(400, "BadRequest");
    api.get(&format!("{CONFIG_MAPS}?fieldSelector=data.k=v")).await.refused(400, "BadRequest");
    api.get(&format!("{CONFIG_MAPS}?resourceVersionMatch=Exact")).await.refused(422, "Invalid");
}

#[tokio::test]
async fn forms_that_are_not_spoken() {
    let api = Api::start().await;
    let protobuf = ("content-type", "application/vnd.kubernetes.protobuf");
    api.send("POST", CONFIG_MAPS, &[protobuf], "k8s\0").await.refused(415, "UnsupportedMediaType");
    let apply = [("content-type", "application/apply-patch+yaml")];
    let path = format!("{CONFIG_MAPS}/a");
    let message = api.send("PATCH", &path, &apply, "{}").await.refused(415, "UnsupportedMediaType");
    assert!(message.contains("server-side apply"), "{message}");
    api.send("PATCH", &path, &[JSON], "{}").await.refused(415, "UnsupportedMediaType");
    let only_protobuf = [("accept", "application/vnd.kubernetes.protobuf")];
    api.send("GET", CONFIG_MAPS, &only_protobuf, "").await.refused(406, "NotAcceptable");
    let json_second = [("accept", "application/vnd.kubernetes.protobuf,application/json")];
    assert_eq!(api.send("GET", CONFIG_MAPS, &json_second, "").await.expect(200)["kind"], "ConfigMapList");
    let yaml = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: yaml\n";
    api.send("POST", CONFIG_MAPS, &[("content-type", "application/yaml")], yaml).await.expect(201);
    for (method, path) in [
        ("POST", format!("{CONFIG_MAPS}/a")),
        ("PUT", CONFIG_MAPS.to_owned()),
        ("DELETE", "/api/v1/configmaps".to_owned()),
    ] {
        api.send(method, &path, &[JSON], "{}").await.refused(405, "MethodNotAllowed");
    }
}

#[tokio::test]
async fn unknown_fields_are_refused_or_warned_about() {
    let api = Api::start().await;
    let mut object = config_map("fields");
    object["dataa"] = json!({"k": "v"});
    let strict = api.post(&format!("{CONFIG_MAPS}?fieldValidation=Strict"), &object).await;
    let message = strict.refused(400, "BadRequest");
    assert!(message.contains("unknown field \"dataa\""), "{message}");
    let warned = api.post(CONFIG_MAPS, &object).await;
    assert!(warned.expect(201).get("dataa").is_none());
    let header = warned.headers.get("warning").unwrap().to_str().unwrap();
    assert!(header.starts_with("299 - \"unknown field") && header.contains("dataa"), "{header}");
    let ignored = api.put(&format!("{CONFIG_MAPS}/fields?fieldValidation=Ignore"), &object).await;
    ignored.expect(200);
    assert!(ignored.headers.get("warning").is_none());
    let twice = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"d"},"data":{"a":"1","a":"2"}}"#;
    api.send("POST", &format!("{CONFIG_MAPS}?fieldValidation=Strict"), &[JSON], twice).await.refused(400, "BadRequest");
    api.post(&format!("{CONFIG_MAPS}?dryRun=Maybe"), &config_map("x")).await.refused(422, "Invalid");
}

#[tokio::test]
async fn patches_that_do_not_apply() {
    let api = Api::start().await;
    api.post(CONFIG_MAPS, &config_map("p")).await.expect(201);
    let path = format!("{CONFIG_MAPS}/p");
    api.patch(&path, "json", &json!([{"op": "test", "path": "/data/k", "value": "other"}]))
        .await
        .refused(422, "Invalid");
    api.patch(&path, "json", &json!({"op": "add"})).await.refused(400, "BadRequest");
    api.patch(&path, "merge", &json!({"metadata": {"name": "q"}})).await.refused(400, "BadRequest");
    api.patch(&path, "merge", &json!({"metadata": {"resourceVersion": "1"}})).await.refused(409, "Conflict");
    api.patch(&format!("{CONFIG_MAPS}/none"), "merge", &json!({})).await.refused(404, "NotFound");
}

#[tokio::test]
async fn who_may_ask() {
    let api = Api::start().await;
    let request = |path: &str| Request::builder().uri(path).header("host", "h").body(Full::<Bytes>::default()).unwrap();
    let nobody = client_config(&api.authority, None);
    api.send_as(&nobody, request(CONFIG_MAPS)).await.unwrap().refused(401, "Unauthorized");
    api.send_as(&nobody, request("/metrics")).await.unwrap().refused(401, "Unauthorized");
    for path in ["/healthz", "/livez", "/readyz?verbose", "/version"] {
        assert_eq!(api.send_as(&nobody, request(path)).await.unwrap().code, 200, "{path}");
    }
    let other = client_config(&api.authority, Some(Authority::new().sign("admin", "system:masters")));
    assert!(api.send_as(&other, request("/healthz")).await.is_err(), "a certificate of another authority was believed");
}

#[tokio::test]
async fn too_much_at_once() {
    let mut setup = Setup::default();
    setup.limits.watches_max = 1;
    let api = Api::start_with(setup).await;
    let _first = api.watch(&format!("{CONFIG_MAPS}?watch=1")).await;
    let second = api.get(&format!("{CONFIG_MAPS}?watch=1")).await;
    second.refused(429, "TooManyRequests");
    assert_eq!(second.headers.get("retry-after").unwrap(), "1");
    api.get(PODS).await.expect(200);
}
