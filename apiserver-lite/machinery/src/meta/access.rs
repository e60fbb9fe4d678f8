//! Reading and writing `metadata` of an object; a field of a surprising type reads as absent.

use serde_json::{Map, Value};

/// Follows object keys from `object`; `None` when one is absent or something on the way is not an object.
pub fn value_at<'a>(object: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(object, |value, key| value.get(key))
}

/// The text at `path`, or the empty text.
pub fn text_at<'a>(object: &'a Value, path: &[&str]) -> &'a str {
    value_at(object, path).and_then(Value::as_str).unwrap_or_default()
}

/// `metadata`, if it is an object.
pub fn metadata(object: &Value) -> Option<&Map<String, Value>> {
    object.get("metadata").and_then(Value::as_object)
}

/// `metadata`, made when it is absent; `None` only when `object` is no JSON object.
pub fn metadata_mut(object: &mut Value) -> Option<&mut Map<String, Value>> {
    let entry = object.as_object_mut()?.entry("metadata").or_insert(Value::Null);
    if !entry.is_object() {
        *entry = Value::Object(Map::new());
    }
    entry.as_object_mut()
}

/// Sets `metadata.<key>`; does nothing when `object` is no JSON object.
pub fn set(object: &mut Value, key: &str, value: impl Into<Value>) {
    if let Some(metadata) = metadata_mut(object) {
        metadata.insert(key.to_owned(), value.into());
    }
}

/// Removes `metadata.<key>` and gives back what was there.
pub fn remove(object: &mut Value, key: &str) -> Option<Value> {
    object.get_mut("metadata")?.as_object_mut()?.remove(key)
}

/// `metadata.name`, or the empty text.
pub fn name(object: &Value) -> &str {
    text_at(object, &["metadata", "name"])
}

/// `metadata.generateName`, or the empty text.
pub fn generate_name_base(object: &Value) -> &str {
    text_at(object, &["metadata", "generateName"])
}

/// `metadata.namespace`, or the empty text.
pub fn namespace(object: &Value) -> &str {
    text_at(object, &["metadata", "namespace"])
}

/// `metadata.uid`, or the empty text.
pub fn uid(object: &Value) -> &str {
    text_at(object, &["metadata", "uid"])
}

/// `metadata.resourceVersion`, or the empty text.
pub fn resource_version(object: &Value) -> &str {
    text_at(object, &["metadata", "resourceVersion"])
}

/// `metadata.creationTimestamp`, or the empty text.
pub fn creation_timestamp(object: &Value) -> &str {
    text_at(object, &["metadata", "creationTimestamp"])
}

/// `metadata.deletionTimestamp`, present once deletion was asked for.
pub fn deletion_timestamp(object: &Value) -> Option<&str> {
    value_at(object, &["metadata", "deletionTimestamp"])?.as_str()
}

/// `metadata.deletionGracePeriodSeconds`.
pub fn deletion_grace_period_seconds(object: &Value) -> Option<i64> {
    value_at(object, &["metadata", "deletionGracePeriodSeconds"])?.as_i64()
}

/// `metadata.generation`, 0 when absent.
pub fn generation(object: &Value) -> i64 {
    value_at(object, &["metadata", "generation"]).and_then(Value::as_i64).unwrap_or_default()
}

/// `metadata.labels`.
pub fn labels(object: &Value) -> Option<&Map<String, Value>> {
    value_at(object, &["metadata", "labels"])?.as_object()
}

/// One label.
pub fn label<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    labels(object)?.get(key)?.as_str()
}

/// `metadata.annotations`.
pub fn annotations(object: &Value) -> Option<&Map<String, Value>> {
    value_at(object, &["metadata", "annotations"])?.as_object()
}

/// One annotation.
pub fn annotation<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    annotations(object)?.get(key)?.as_str()
}

/// `metadata.finalizers`, in order.
pub fn finalizers(object: &Value) -> impl Iterator<Item = &str> {
    array_at(object, "finalizers").iter().filter_map(Value::as_str)
}

/// `metadata.ownerReferences`, in order.
pub fn owner_references(object: &Value) -> &[Value] {
    array_at(object, "ownerReferences")
}

/// Whether `object` names the owner with this uid as its controller.
pub fn is_controller_of(owner_uid: &str, object: &Value) -> bool {
    owner_references(object).iter().any(|reference| {
        reference.get("controller").and_then(Value::as_bool) == Some(true) && text_at(reference, &["uid"]) == owner_uid
    })
}

fn array_at<'a>(object: &'a Value, key: &str) -> &'a [Value] {
    value_at(object, &["metadata", key]).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn absent_and_surprising_read_as_absent() {
        let object = json!({"metadata": {"name": 7, "labels": ["x"], "finalizers": "f"}});
        assert_eq!(name(&object), "");
        assert!(labels(&object).is_none());
        assert_eq!(finalizers(&object).count(), 0);
        assert_eq!(generation(&json!({})), 0);
    }

    #[test]
    fn set_makes_metadata() {
        let mut object = json!({"metadata": null});
        set(&mut object, "uid", "u1");
        assert_eq!(uid(&object), "u1");
        assert_eq!(remove(&mut object, "uid"), Some(json!("u1")));
        assert_eq!(remove(&mut object, "uid"), None);
    }

    #[test]
    fn controller_is_found_by_uid() {
        let object = json!({"metadata": {"ownerReferences": [{"uid": "a"}, {"uid": "b", "controller": true}]}});
        assert!(is_controller_of("b", &object));
        assert!(!is_controller_of("a", &object));
    }
}
