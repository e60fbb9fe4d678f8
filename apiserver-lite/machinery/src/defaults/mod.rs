//! Defaulting: what kube-apiserver fills in before it validates.

mod pod;
mod service;

use serde_json::{Map, Value, json};

use crate::meta;
use crate::schema::Resource;

/// Fills in the defaults of a served kind; other kinds stay as they are. Idempotent.
///
/// Left to the server because they need state: `clusterIP(s)`, `ipFamilies`, `ipFamilyPolicy`, node ports, uid and times.
pub fn apply(resource: &Resource, object: &mut Value) {
    let Some(map) = object.as_object_mut() else { return };
    match (resource.group, resource.plural) {
        ("", "pods") => pod::apply(map),
        ("", "services") => service::apply(map),
        ("", "endpoints") => each(map, "subsets", |subset| each(subset, "ports", |port| fill(port, "protocol", "TCP"))),
        ("", "namespaces") => namespace(object),
        ("", "nodes") => node(map),
        ("", "secrets") => secret(map),
        ("discovery.k8s.io", "endpointslices") => each(map, "ports", |port| {
            fill(port, "name", "");
            fill(port, "protocol", "TCP");
        }),
        _ => {}
    }
}

/// Sets `key` when it is absent.
fn fill(map: &mut Map<String, Value>, key: &str, value: impl Into<Value>) {
    if !map.contains_key(key) {
        map.insert(key.to_owned(), value.into());
    }
}

/// Sets `key` when it is absent or the empty text, which Go can't tell apart.
fn fill_text(map: &mut Map<String, Value>, key: &str, value: &str) {
    if map.get(key).and_then(Value::as_str).is_none_or(str::is_empty) {
        map.insert(key.to_owned(), value.into());
    }
}

/// Sets `key` when it is absent or 0, which Go can't tell apart.
fn fill_number(map: &mut Map<String, Value>, key: &str, value: i64) {
    if map.get(key).and_then(Value::as_i64).is_none_or(|number| number == 0) {
        map.insert(key.to_owned(), value.into());
    }
}

/// Changes the object at `key`, when there is one.
fn within(map: &mut Map<String, Value>, key: &str, change: impl FnOnce(&mut Map<String, Value>)) {
    if let Some(Value::Object(inner)) = map.get_mut(key) {
        change(inner);
    }
}

/// Changes the object at `key`, made when it is absent.
fn within_made(map: &mut Map<String, Value>, key: &str, change: impl FnOnce(&mut Map<String, Value>)) {
    fill(map, key, Map::new());
    within(map, key, change);
}

/// Changes every object in the list at `key`.
fn each(map: &mut Map<String, Value>, key: &str, mut change: impl FnMut(&mut Map<String, Value>)) {
    if let Some(Value::Array(items)) = map.get_mut(key) {
        items.iter_mut().filter_map(Value::as_object_mut).for_each(&mut change);
    }
}

fn namespace(object: &mut Value) {
    let name = meta::name(object).to_owned();
    let Some(map) = object.as_object_mut() else { return };
    if !name.is_empty() {
        within_made(map, "metadata", |metadata| {
            within_made(metadata, "labels", |labels| fill(labels, "kubernetes.io/metadata.name", name));
        });
    }
    within_made(map, "spec", |spec| fill(spec, "finalizers", json!(["kubernetes"])));
    within_made(map, "status", |status| fill_text(status, "phase", "Active"));
}

/// Allocatable resources are the capacity unless the node says otherwise.
fn node(map: &mut Map<String, Value>) {
    within(map, "status", |status| {
        let Some(capacity @ Value::Object(_)) = status.get("capacity").cloned() else { return };
        fill(status, "allocatable", capacity);
    });
}

/// `stringData` is write-only: its entries go to `data`, in base64.
fn secret(map: &mut Map<String, Value>) {
    use base64::Engine as _;
    fill_text(map, "type", "Opaque");
    let Some(Value::Object(texts)) = map.remove("stringData") else { return };
    within_made(map, "data", |data| {
        for (key, text) in texts {
            let bytes = text.as_str().unwrap_or_default().as_bytes();
            data.insert(key, base64::engine::general_purpose::STANDARD.encode(bytes).into());
        }
    });
}

#[cfg(test)]
mod tests;
