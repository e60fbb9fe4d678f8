//! The documents hold together: every reference leads somewhere, and what clients look for is there.

use super::*;

fn document(path: &str) -> Value {
    serde_json::from_slice(v3_document(path).unwrap()).unwrap()
}

/// Every `$ref` in a document.
fn references(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            found.extend(map.get("$ref").and_then(Value::as_str).map(str::to_owned));
            map.values().for_each(|value| references(value, found));
        }
        Value::Array(items) => items.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

fn check_references(document: &Value) {
    let mut found = Vec::new();
    references(document, &mut found);
    assert!(!found.is_empty());
    for reference in found {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
    }
}

#[test]
fn every_document_of_the_index_exists_and_is_whole() {
    let index: Value = serde_json::from_slice(v3_index()).unwrap();
    let paths = index["paths"].as_object().unwrap();
    assert!(paths.contains_key("api/v1") && paths.contains_key("apis/discovery.k8s.io/v1"));
    for (path, entry) in paths {
        let hash = v3_hash(path).unwrap();
        assert_eq!(entry["serverRelativeURL"], format!("/openapi/v3/{path}?hash={hash}"));
        check_references(&document(path));
    }
    assert!(v3_document("apis/none/v1").is_none());
}

#[test]
fn v2_is_whole() {
    let document: Value = serde_json::from_slice(v2()).unwrap();
    check_references(&document);
    assert_eq!(document["swagger"], "2.0");
    assert!(document["paths"].as_object().unwrap().contains_key("/api/v1/namespaces/{namespace}/services/{name}"));
}

#[test]
fn schemas_carry_what_kubectl_needs() {
    let document = document("api/v1");
    let schema = |name: &str| document["components"]["schemas"][name].clone();
    let service = schema("io.k8s.api.core.v1.Service");
    assert_eq!(service["x-kubernetes-group-version-kind"], json!([{"group": "", "kind": "Service", "version": "v1"}]));
    let ports = schema("io.k8s.api.core.v1.ServiceSpec")["properties"]["ports"].clone();
    assert_eq!(ports["x-kubernetes-patch-strategy"], "merge");
    assert_eq!(ports["x-kubernetes-patch-merge-key"], "port");
    assert_eq!(ports["x-kubernetes-list-map-keys"], json!(["port", "protocol"]));
    assert!(ports["description"].as_str().unwrap().starts_with("The list of ports"));
    let volumes = schema("io.k8s.api.core.v1.PodSpec")["properties"]["volumes"].clone();
    assert_eq!(volumes["x-kubernetes-patch-strategy"], "merge,retainKeys");
}

#[test]
fn operations_name_their_kind_and_options() {
    let document = document("api/v1");
    let patch = &document["paths"]["/api/v1/namespaces/{namespace}/services/{name}"]["patch"];
    assert_eq!(patch["x-kubernetes-action"], "patch");
    assert_eq!(patch["x-kubernetes-group-version-kind"]["kind"], "Service");
    let options: Vec<&str> =
        patch["parameters"].as_array().unwrap().iter().map(|option| option["name"].as_str().unwrap()).collect();
    assert!(options.contains(&"fieldValidation") && options.contains(&"dryRun"));
    let mut ids = Vec::new();
    for item in document["paths"].as_object().unwrap().values() {
        let operations = item.as_object().unwrap().values().filter_map(|operation| operation.get("operationId"));
        ids.extend(operations.map(|id| id.as_str().unwrap().to_owned()));
    }
    let count = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), count, "operation ids must be unique");
}
