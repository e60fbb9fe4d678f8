//! Tables of patches, and properties that hold for any object.
#![expect(clippy::needless_pass_by_value, reason = "tables of cases read better without references to temporaries")]

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::schema::{TypeId, registry};
use crate::status::Status;

fn ty(kind: &str) -> TypeId {
    registry().type_by_name("core.v1", kind).unwrap()
}

fn strategic(kind: &str, original: Value, patch: Value) -> Result<Value, Status> {
    strategic_merge_patch(&original, &patch, ty(kind))
}

/// Applies a patch to the spec of a pod.
fn pod(original: Value, patch: Value) -> Value {
    strategic("Pod", json!({"spec": original}), json!({"spec": patch})).unwrap()["spec"].take()
}

/// Applies a patch to a whole service.
fn service(original: Value, patch: Value) -> Value {
    strategic("Service", original, patch).unwrap()
}

#[test]
fn lists_merge_by_their_key() {
    assert_eq!(
        pod(
            json!({"containers": [{"name": "a", "image": "x", "env": [{"name": "E", "value": "1"}]}, {"name": "b"}]}),
            json!({"containers": [{"name": "a", "image": "y", "env": [{"name": "F", "value": "2"}]}, {"name": "c"}]}),
        ),
        json!({"containers": [
            {"name": "a", "image": "y", "env": [{"name": "F", "value": "2"}, {"name": "E", "value": "1"}]},
            {"name": "c"}, {"name": "b"},
        ]})
    );
}

#[test]
fn service_ports_merge_by_port() {
    assert_eq!(
        service(
            json!({"spec": {"ports": [{"port": 80, "name": "http", "nodePort": 30000}, {"port": 53, "protocol": "UDP"}]}}),
            json!({"spec": {"ports": [{"port": 80, "targetPort": 8080}]}}),
        ),
        json!({"spec": {"ports": [
            {"port": 80, "name": "http", "nodePort": 30000, "targetPort": 8080}, {"port": 53, "protocol": "UDP"},
        ]}})
    );
}

#[test]
fn nulls_delete_and_maps_merge() {
    assert_eq!(
        service(
            json!({"metadata": {"labels": {"a": "1", "b": "2"}}, "spec": {"selector": {"x": "y"}, "type": "ClusterIP"}}),
            json!({"metadata": {"labels": {"a": null, "c": "3"}}, "spec": {"selector": null, "clusterIP": null}}),
        ),
        json!({"metadata": {"labels": {"b": "2", "c": "3"}}, "spec": {"type": "ClusterIP"}})
    );
}

#[test]
fn atomic_lists_are_replaced() {
    assert_eq!(
        service(
            json!({"spec": {"externalIPs": ["1.2.3.4", "1.2.3.5"]}}),
            json!({"spec": {"externalIPs": ["1.2.3.6"]}})
        ),
        json!({"spec": {"externalIPs": ["1.2.3.6"]}})
    );
}

#[test]
fn patch_directives() {
    let ports = json!({"spec": {"ports": [{"port": 80}, {"port": 81}]}});
    assert_eq!(
        service(ports.clone(), json!({"spec": {"ports": [{"$patch": "delete", "port": 80}, {"port": 82}]}})),
        json!({"spec": {"ports": [{"port": 82}, {"port": 81}]}})
    );
    assert_eq!(
        service(ports.clone(), json!({"spec": {"ports": [{"$patch": "replace"}, {"port": 90}]}})),
        json!({"spec": {"ports": [{"port": 90}]}})
    );
    assert_eq!(
        service(ports.clone(), json!({"spec": {"$patch": "replace", "type": "NodePort"}})),
        json!({"spec": {"type": "NodePort"}})
    );
    assert_eq!(service(ports.clone(), json!({"spec": {"$patch": "delete"}})), json!({"spec": {}}));
    assert_eq!(service(ports, json!({"$patch": "delete"})), json!({}));
}

#[test]
fn directives_never_stay_in_added_values() {
    assert_eq!(
        service(json!({}), json!({"spec": {"ports": [{"$patch": "delete", "port": 80}, {"port": 81, "name": null}]}})),
        json!({"spec": {"ports": [{"port": 81}]}})
    );
    assert_eq!(service(json!({}), json!({"spec": {"$patch": "replace", "type": "x"}})), json!({}));
}

#[test]
fn primitive_lists_merge_and_delete() {
    let original = json!({"metadata": {"finalizers": ["a", "b", "c"]}});
    assert_eq!(
        service(original.clone(), json!({"metadata": {"finalizers": ["d", "b"]}})),
        json!({"metadata": {"finalizers": ["d", "a", "b", "c"]}})
    );
    assert_eq!(
        service(
            original,
            json!({"metadata": {
                "$deleteFromPrimitiveList/finalizers": ["b"],
                "$setElementOrder/finalizers": ["e", "a"],
                "finalizers": ["e"],
            }})
        ),
        json!({"metadata": {"finalizers": ["e", "a", "c"]}})
    );
}

#[test]
fn set_element_order_without_changes_reorders() {
    assert_eq!(
        pod(
            json!({"containers": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}),
            json!({"$setElementOrder/containers": [{"name": "c"}, {"name": "a"}]}),
        ),
        json!({"containers": [{"name": "b"}, {"name": "c"}, {"name": "a"}]})
    );
}

#[test]
fn set_element_order_as_kubectl_sends_it() {
    assert_eq!(
        pod(
            json!({"containers": [{"name": "c", "image": "old", "resources": {}}]}),
            json!({"$setElementOrder/containers": [{"name": "c"}], "containers": [{"name": "c", "image": "new"}]}),
        ),
        json!({"containers": [{"name": "c", "image": "new", "resources": {}}]})
    );
    assert_eq!(
        service(
            json!({"spec": {"ports": [{"port": 80, "nodePort": 30001}, {"port": 81}]}}),
            json!({"spec": {
                "$setElementOrder/ports": [{"port": 82}, {"port": 80}],
                "ports": [{"port": 82}, {"$patch": "delete", "port": 81}],
            }}),
        ),
        json!({"spec": {"ports": [{"port": 82}, {"port": 80, "nodePort": 30001}]}})
    );
}

#[test]
fn retain_keys_drops_the_rest() {
    assert_eq!(
        pod(
            json!({"volumes": [{"name": "v", "emptyDir": {}}]}),
            json!({"volumes": [{"$retainKeys": ["name", "configMap"], "name": "v", "configMap": {"name": "c"}}]}),
        ),
        json!({"volumes": [{"name": "v", "configMap": {"name": "c"}}]})
    );
}

#[test]
fn malformed_patches_are_refused() {
    let original =
        json!({"spec": {"ports": [{"port": 80}], "externalIPs": ["1.1.1.1"]}, "metadata": {"finalizers": ["a"]}});
    for patch in [
        json!([]),
        json!({"spec": {"$patch": "explode"}}),
        json!({"spec": {"$patch": 1}}),
        json!({"spec": {"ports": [{"name": "no key"}]}}),
        json!({"spec": {"ports": [{"$patch": "delete"}]}}),
        json!({"spec": {"ports": [{"$patch": "merge", "port": 1}]}}),
        json!({"spec": {"ports": [[1]]}}),
        json!({"spec": {"ports": ["text"]}}),
        json!({"spec": {"$retainKeys": ["type"], "externalName": "x"}}),
        json!({"spec": {"$retainKeys": "type"}}),
        json!({"spec": {"$setElementOrder/ports": "x"}}),
        json!({"spec": {"$setElementOrder/ports": [{"port": 81}], "ports": [{"port": 80}]}}),
        json!({"metadata": {"$deleteFromPrimitiveList/finalizers": "a"}}),
    ] {
        let status = strategic("Service", original.clone(), patch.clone()).unwrap_err();
        assert!(matches!(status.code, 400 | 422), "{patch} gave {status:?}");
    }
}

#[test]
fn json_patches() {
    let original = json!({"a": {"b": [1, 2]}});
    let patch = json!([
        {"op": "test", "path": "/a/b/0", "value": 1},
        {"op": "add", "path": "/a/b/-", "value": 3},
        {"op": "remove", "path": "/a/b/0"},
        {"op": "copy", "from": "/a/b", "path": "/c"},
        {"op": "replace", "path": "/a", "value": null},
    ]);
    assert_eq!(json_patch(&original, &patch).unwrap(), json!({"a": null, "c": [2, 3]}));
    let code = |patch: Value| json_patch(&original, &patch).unwrap_err().code;
    assert_eq!(code(json!([{"op": "test", "path": "/a/b/0", "value": 9}])), 422);
    assert_eq!(code(json!([{"op": "remove", "path": "/zz"}])), 422);
    assert_eq!(code(json!([{"op": "explode", "path": "/a"}])), 400);
    assert_eq!(code(json!({"a": 1})), 400);
    let many = vec![json!({"op": "test", "path": "/a/b/0", "value": 1}); JSON_PATCH_OPERATIONS_MAX + 1];
    assert_eq!(code(Value::Array(many)), 413);
}

#[test]
fn json_patch_copies_are_bounded() {
    // Each copy doubles the list; unbounded, sixty of them would fill any memory.
    let doubling = vec![json!({"op": "copy", "from": "/a", "path": "/a/-"}); 60];
    let outcome = json_patch(&json!({"a": ["y"]}), &Value::Array(doubling));
    assert_eq!(outcome.err().map(|status| status.code), Some(422));
}

#[test]
fn merge_patches_as_in_the_rfc() {
    for (original, patch, outcome) in [
        (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
        (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
        (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
        (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
        (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
        (json!(["a"]), json!({"b": 1}), json!({"b": 1})),
        (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
    ] {
        assert_eq!(merge_patch(&original, &patch), outcome);
    }
}

/// JSON without nulls, as stored objects are.
fn stored() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        "[a-c]{0,2}".prop_map(Value::from)
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-d]", inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn stored_object() -> impl Strategy<Value = Value> {
    prop::collection::btree_map("[a-d]", stored(), 0..4).prop_map(|map| Value::Object(map.into_iter().collect()))
}

fn ports() -> impl Strategy<Value = Value> {
    prop::collection::btree_map(1..9u16, "[a-c]", 0..5)
        .prop_map(|ports| ports.into_iter().map(|(port, name)| json!({"port": port, "name": name})).collect())
}

proptest! {
    #[test]
    fn an_object_patched_with_itself_stays(object in stored_object()) {
        prop_assert_eq!(merge_patch(&object, &object), object.clone());
        // Unknown fields have no schema: a strategic patch then behaves as a merge patch.
        prop_assert_eq!(strategic("Service", object.clone(), object.clone()).unwrap(), object);
    }

    #[test]
    fn without_schema_strategic_equals_merge(object in stored_object(), patch in stored_object()) {
        prop_assert_eq!(strategic("Service", object.clone(), patch.clone()).unwrap(), merge_patch(&object, &patch));
    }

    #[test]
    fn merging_lists_is_idempotent_and_complete(old in ports(), new in ports()) {
        let original = json!({"spec": {"ports": old}});
        let patch = json!({"spec": {"ports": new}});
        let once = service(original, patch.clone());
        prop_assert_eq!(service(once.clone(), patch.clone()), once.clone());
        let merged = once["spec"]["ports"].as_array().unwrap();
        for port in patch["spec"]["ports"].as_array().unwrap() {
            prop_assert!(merged.contains(port));
        }
    }

    #[test]
    fn any_patch_gives_an_outcome_or_a_client_error(object in stored_object(), patch in stored()) {
        if let Err(status) = strategic("Pod", object, patch) {
            prop_assert!((400..500).contains(&status.code));
        }
    }
}
