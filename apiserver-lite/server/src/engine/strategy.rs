//! What differs between kinds on a write: facts from the strategies of kube-apiserver 1.36 (`pkg/registry/*/*/strategy.go`).

use apiserver_machinery::meta;
use apiserver_machinery::schema::Resource;
use serde_json::{Value, json};

/// Whether `PUT` of an object that does not exist creates it.
pub(crate) fn allows_create_on_update(resource: &Resource) -> bool {
    matches!(
        (resource.group, resource.plural),
        ("", "endpoints" | "events" | "services") | ("coordination.k8s.io", "leases") | ("events.k8s.io", "events")
    )
}

/// Whether an update may leave `resourceVersion` out and overwrite whatever is there.
pub(crate) fn allows_unconditional_update(resource: &Resource) -> bool {
    resource.group != "coordination.k8s.io"
}

/// Whether `DELETE` answers with the object that it removed instead of a Status.
pub(crate) fn returns_deleted_object(resource: &Resource) -> bool {
    resource.group.is_empty() && matches!(resource.plural, "pods" | "services" | "serviceaccounts")
}

fn has_generation(resource: &Resource) -> bool {
    matches!((resource.group, resource.plural), ("", "pods") | ("discovery.k8s.io", "endpointslices"))
}

/// The grace period of a deletion, seconds: `None` where the kind has no graceful deletion.
pub(crate) fn grace_period_seconds(resource: &Resource, object: &Value, requested: Option<i64>) -> Option<i64> {
    if (resource.group, resource.plural) != ("", "pods") {
        return None;
    }
    let unbound = meta::text_at(object, &["spec", "nodeName"]).is_empty();
    let ended = matches!(meta::text_at(object, &["status", "phase"]), "Failed" | "Succeeded");
    if unbound || ended {
        return Some(0);
    }
    let configured = meta::value_at(object, &["spec", "terminationGracePeriodSeconds"]).and_then(Value::as_i64);
    let period = requested.or(configured).unwrap_or(30);
    Some(if period < 0 { 1 } else { period })
}

/// Puts a new object into its first state: server-owned fields reset, `status` as the kind begins.
pub(crate) fn prepare_create(resource: &Resource, object: &mut Value) {
    if has_generation(resource) {
        meta::set(object, "generation", 1);
    } else {
        meta::remove(object, "generation");
    }
    match (resource.group, resource.plural) {
        ("", "pods") => {
            let class = qos_class(object);
            set(object, "status", json!({"phase": "Pending", "qosClass": class}));
        }
        ("", "services") => set(object, "status", json!({"loadBalancer": {}})),
        ("", "namespaces") => {
            set(object, "spec", json!({"finalizers": ["kubernetes"]}));
            set(object, "status", json!({"phase": "Active"}));
        }
        // A kubelet registers its Node together with its status.
        ("", "nodes") => {}
        _ if resource.subresource("status").is_some() => unset(object, "status"),
        _ => {}
    }
}

/// Keeps what an update of the main resource may not change. `old` is what is stored.
pub(crate) fn prepare_update(resource: &Resource, new: &mut Value, old: &Value) {
    if resource.subresource("status").is_some() {
        copy(new, old, "status");
    }
    if (resource.group, resource.plural) == ("", "namespaces") {
        copy(new, old, "spec");
    }
    keep_generation(new, old);
    if has_generation(resource) && differs_beyond_metadata(new, old) {
        meta::set(new, "generation", meta::generation(old) + 1);
    }
}

/// Keeps everything but `status` and metadata: what an update through `/status` is.
pub(crate) fn prepare_status_update(new: &mut Value, old: &Value) {
    keep_all_but(new, old, "status");
}

/// Keeps everything but `spec.finalizers`: what an update through a Namespace's `/finalize` is.
pub(crate) fn prepare_finalize_update(new: &mut Value, old: &Value) {
    keep_all_but(new, old, "spec");
}

fn keep_all_but(new: &mut Value, old: &Value, part: &str) {
    let mut kept = old.clone();
    copy(&mut kept, new, part);
    copy(&mut kept, new, "metadata");
    keep_generation(&mut kept, old);
    for key in ["ownerReferences", "deletionTimestamp"] {
        match old.get("metadata").and_then(|metadata| metadata.get(key)) {
            Some(value) => meta::set(&mut kept, key, value.clone()),
            None => {
                meta::remove(&mut kept, key);
            }
        }
    }
    *new = kept;
}

fn keep_generation(new: &mut Value, old: &Value) {
    match meta::generation(old) {
        0 => {
            meta::remove(new, "generation");
        }
        generation => meta::set(new, "generation", generation),
    }
}

fn differs_beyond_metadata(new: &Value, old: &Value) -> bool {
    let (Some(new), Some(old)) = (new.as_object(), old.as_object()) else { return true };
    let relevant = |key: &str| key != "metadata" && key != "status";
    new.iter().any(|(key, value)| relevant(key) && old.get(key) != Some(value))
        || old.keys().any(|key| relevant(key) && !new.contains_key(key))
}

fn set(object: &mut Value, key: &str, value: Value) {
    if let Value::Object(fields) = object {
        fields.insert(key.to_owned(), value);
    }
}

fn unset(object: &mut Value, key: &str) {
    if let Value::Object(fields) = object {
        fields.remove(key);
    }
}

fn copy(to: &mut Value, from: &Value, key: &str) {
    match from.get(key) {
        Some(value) => set(to, key, value.clone()),
        None => unset(to, key),
    }
}

/// The quality-of-service class that follows from the resources of all containers.
fn qos_class(pod: &Value) -> &'static str {
    let containers =
        |key| meta::value_at(pod, &["spec", key]).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let all: Vec<&Value> = containers("containers").iter().chain(containers("initContainers")).collect();
    let amount =
        |container: &Value, list: &str, name: &str| meta::value_at(container, &["resources", list, name]).cloned();
    let names = ["cpu", "memory"];
    let any = all
        .iter()
        .any(|c| names.iter().any(|n| amount(c, "limits", n).is_some() || amount(c, "requests", n).is_some()));
    if !any {
        return "BestEffort";
    }
    let guaranteed = all.iter().all(|container| {
        names.iter().all(|name| {
            let limit = amount(container, "limits", name);
            let request = amount(container, "requests", name);
            limit.is_some() && (request.is_none() || request == limit)
        })
    });
    if guaranteed { "Guaranteed" } else { "Burstable" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use apiserver_machinery::schema::registry;

    fn resource(plural: &str) -> &'static Resource {
        registry().resource("", "v1", plural).unwrap()
    }

    #[test]
    fn status_update_keeps_spec_and_the_other_way_round() {
        let old = json!({"metadata": {"name": "a", "generation": 3}, "spec": {"x": 1}, "status": {"y": 1}});
        let sent = json!({"metadata": {"name": "a", "labels": {"l": "1"}}, "spec": {"x": 2}, "status": {"y": 2}});
        let mut through_status = sent.clone();
        prepare_status_update(&mut through_status, &old);
        assert_eq!((&through_status["spec"]["x"], &through_status["status"]["y"]), (&json!(1), &json!(2)));
        assert_eq!(through_status["metadata"]["generation"], 3);
        assert_eq!(through_status["metadata"]["labels"]["l"], "1");
        let mut through_main = sent;
        prepare_update(resource("pods"), &mut through_main, &old);
        assert_eq!((&through_main["spec"]["x"], &through_main["status"]["y"]), (&json!(2), &json!(1)));
        assert_eq!(through_main["metadata"]["generation"], 4);
    }

    #[test]
    fn new_objects_begin_in_their_first_state() {
        let mut pod = json!({"metadata": {"generation": 9}, "spec": {}, "status": {"phase": "Running"}});
        prepare_create(resource("pods"), &mut pod);
        assert_eq!(pod["status"], json!({"phase": "Pending", "qosClass": "BestEffort"}));
        assert_eq!(pod["metadata"]["generation"], 1);
        let mut node = json!({"metadata": {}, "status": {"capacity": {}}});
        prepare_create(resource("nodes"), &mut node);
        assert!(node.get("status").is_some());
    }

    #[test]
    fn grace_depends_on_being_bound() {
        let check = |pod: Value, requested, wanted| {
            assert_eq!(grace_period_seconds(resource("pods"), &pod, requested), wanted);
        };
        let bound = json!({"spec": {"nodeName": "n", "terminationGracePeriodSeconds": 5}});
        check(bound.clone(), None, Some(5));
        check(bound.clone(), Some(0), Some(0));
        check(bound, Some(-3), Some(1));
        check(json!({"spec": {}}), None, Some(0));
        check(json!({"spec": {"nodeName": "n"}, "status": {"phase": "Failed"}}), None, Some(0));
        assert_eq!(grace_period_seconds(resource("secrets"), &json!({}), Some(5)), None);
    }

    #[test]
    fn qos_follows_resources() {
        let pod = |resources: Value| json!({"spec": {"containers": [{"resources": resources}]}});
        assert_eq!(qos_class(&pod(json!({}))), "BestEffort");
        assert_eq!(qos_class(&pod(json!({"requests": {"cpu": "1"}}))), "Burstable");
        assert_eq!(qos_class(&pod(json!({"limits": {"cpu": "1", "memory": "1Gi"}}))), "Guaranteed");
    }
}
