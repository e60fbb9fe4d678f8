//! The two faces of an Event: `v1` and `events.k8s.io/v1` name the same fields differently.

use apiserver_machinery::schema::Resource;
use serde_json::{Value, json};

use super::keys::storage_resource;

/// (`v1`, `events.k8s.io/v1`) names of the fields that differ.
const RENAMED: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

/// Whether objects of this resource are stored as another kind.
pub(crate) fn is_converted(resource: &'static Resource) -> bool {
    !std::ptr::eq(storage_resource(resource), resource)
}

/// What a client of `resource` sends, as it is stored.
pub(crate) fn to_storage(resource: &'static Resource, object: Value) -> Value {
    if !is_converted(resource) {
        return object;
    }
    rename(object, "v1", RENAMED.map(|(core, newer)| (newer, core)))
}

/// What is stored, as a client of `resource` sees it.
pub(crate) fn from_storage(resource: &'static Resource, object: Value) -> Value {
    if !is_converted(resource) {
        return object;
    }
    rename(object, "events.k8s.io/v1", RENAMED)
}

fn rename(mut object: Value, api_version: &str, names: [(&str, &str); 7]) -> Value {
    if let Value::Object(fields) = &mut object {
        for (from, to) in names {
            if let Some(value) = fields.remove(from) {
                fields.insert(to.to_owned(), value);
            }
        }
        fields.insert("apiVersion".to_owned(), json!(api_version));
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use apiserver_machinery::schema::registry;

    #[test]
    fn conversion_is_reversible() {
        let newer = registry().resource("events.k8s.io", "v1", "events").unwrap();
        let object = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "note": "n", "regarding": {"name": "p"},
            "reportingController": "c", "type": "Normal"});
        let stored = to_storage(newer, object.clone());
        assert_eq!(stored["message"], "n");
        assert_eq!(stored["involvedObject"]["name"], "p");
        assert_eq!(stored["apiVersion"], "v1");
        assert_eq!(from_storage(newer, stored), object);
    }
}
