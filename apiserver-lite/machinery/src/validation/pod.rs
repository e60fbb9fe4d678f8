//! Pods: containers, volumes and policies; and that a stored Pod's spec hardly changes.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::cursor::{At, Errors};
use super::{names, object_meta};
use crate::field::FieldError;

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];
const RESTART_POLICIES: &[&str] = &["Always", "OnFailure", "Never"];
const DNS_POLICIES: &[&str] = &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
const PULL_POLICIES: &[&str] = &["Always", "IfNotPresent", "Never"];
const UPDATABLE: &str = "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,\
                         `spec.tolerations` (only additions to existing tolerations),\
                         `spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

/// Checks everything but the metadata.
pub(super) fn check(root: &At<'_>, errors: &mut Errors) {
    let spec = root.child("spec");
    let volumes = volumes(&spec.child("volumes"), errors);
    let containers = spec.child("containers");
    if containers.len() == 0 {
        errors.required(&containers, "");
    }
    let mut seen = HashSet::new();
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for at in spec.child(list).items() {
            container(&at, &volumes, errors);
            let name = at.child("name");
            if !name.text().is_empty() && !seen.insert(name.text()) {
                errors.duplicate(&name);
            }
        }
    }
    errors.one_of(&spec.child("restartPolicy"), RESTART_POLICIES);
    errors.one_of(&spec.child("dnsPolicy"), DNS_POLICIES);
    object_meta::labels(&spec.child("nodeSelector"), errors);
    for (key, rule) in [
        ("serviceAccountName", names::dns1123_subdomain as fn(&str) -> Vec<String>),
        ("nodeName", names::dns1123_subdomain),
        ("hostname", names::dns1123_label),
        ("subdomain", names::dns1123_label),
    ] {
        let at = spec.child(key);
        if !at.text().is_empty() {
            errors.complaints(&at, rule(at.text()));
        }
    }
    let deadline = spec.child("activeDeadlineSeconds");
    if deadline.is_set() {
        errors.in_range(&deadline, 1, i64::from(i32::MAX));
    }
}

/// Checks the volumes; gives their names.
fn volumes<'a>(at: &At<'a>, errors: &mut Errors) -> HashSet<&'a str> {
    let mut seen = HashSet::new();
    for volume in at.items() {
        let name = volume.child("name");
        if name.text().is_empty() {
            errors.required(&name, "");
            continue;
        }
        errors.complaints(&name, names::dns1123_label(name.text()));
        if !seen.insert(name.text()) {
            errors.duplicate(&name);
        }
        let sources = volume.entries().filter(|(key, _)| *key != "name").count();
        if sources > 1 {
            errors.forbidden(&volume, "may not specify more than 1 volume type");
        }
    }
    seen
}

fn container(at: &At<'_>, volumes: &HashSet<&str>, errors: &mut Errors) {
    let name = at.child("name");
    if name.text().is_empty() {
        errors.required(&name, "");
    } else {
        errors.complaints(&name, names::dns1123_label(name.text()));
    }
    let image = at.child("image");
    if image.text().is_empty() {
        errors.required(&image, "");
    } else if image.text().trim() != image.text() {
        errors.invalid(&image, "must not have leading or trailing whitespace");
    }
    errors.one_of(&at.child("terminationMessagePolicy"), &["File", "FallbackToLogsOnError"]);
    errors.one_of(&at.child("imagePullPolicy"), PULL_POLICIES);
    container_ports(&at.child("ports"), errors);
    for variable in at.child("env").items() {
        environment(&variable, errors);
    }
    let mut mounted = HashSet::new();
    for mount in at.child("volumeMounts").items() {
        let (name, path) = (mount.child("name"), mount.child("mountPath"));
        if name.text().is_empty() {
            errors.required(&name, "");
        } else if !volumes.contains(name.text()) {
            errors.push(FieldError::new(crate::field::ErrorKind::NotFound, name.path(), name.text(), ""));
        }
        if path.text().is_empty() {
            errors.required(&path, "");
        } else if !mounted.insert(path.text()) {
            errors.invalid(&path, "must be unique");
        }
    }
}

fn container_ports(at: &At<'_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for port in at.items() {
        let name = port.child("name");
        if !name.text().is_empty() {
            let complaints = names::port_name(name.text());
            if complaints.is_empty() && !seen.insert(name.text()) {
                errors.duplicate(&name);
            }
            errors.complaints(&name, complaints);
        }
        let number = port.child("containerPort");
        if number.number() == 0 {
            errors.required(&number, "");
        } else {
            errors.port(&number);
        }
        if port.child("hostPort").number() != 0 {
            errors.port(&port.child("hostPort"));
        }
        errors.one_of(&port.child("protocol"), PROTOCOLS);
    }
}

fn environment(variable: &At<'_>, errors: &mut Errors) {
    let name = variable.child("name");
    if name.text().is_empty() {
        errors.required(&name, "");
    } else {
        errors.complaints(&name, names::env_var_name(name.text()));
    }
    let source = variable.child("valueFrom");
    if source.is_set() && !variable.child("value").text().is_empty() {
        errors.invalid(&source, "may not be specified when `value` is not empty");
    }
    if source.is_set() && source.len() != 1 {
        let rule = if source.len() == 0 {
            "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`"
        } else {
            "may not have more than one field specified at a time"
        };
        errors.invalid(&source, rule);
    }
}

/// Checks the step from `old` to `new`, beside the rules for any Pod.
pub(super) fn update(new: &At<'_>, old: &At<'_>, errors: &mut Errors) {
    let (new, old) = (new.child("spec"), old.child("spec"));
    for list in ["containers", "initContainers"] {
        if new.child(list).len() != old.child(list).len() {
            return errors.forbidden(&new.child(list), "pod updates may not add or remove containers");
        }
    }
    deadline(&new.child("activeDeadlineSeconds"), &old.child("activeDeadlineSeconds"), errors);
    only_added(&new.child("tolerations"), &old.child("tolerations"), errors);
    let (before, after) = (fixed_part(&old, None), fixed_part(&new, Some(&old)));
    if before != after {
        let changed: Vec<&String> = changed_keys(&before, &after);
        let changed: Vec<&str> = changed.into_iter().map(String::as_str).collect();
        let rule = format!("pod updates may not change fields other than {UPDATABLE}\nchanged: {}", changed.join(", "));
        errors.forbidden(&new, rule);
    }
}

fn deadline(new: &At<'_>, old: &At<'_>, errors: &mut Errors) {
    match (new.maybe_number(), old.maybe_number()) {
        (None, Some(_)) => errors.invalid(new, "must not update from a positive integer to nil value"),
        (Some(after), Some(before)) if after > before => {
            errors.invalid(new, "must be less than or equal to previous value");
        }
        _ => {}
    }
}

/// Tolerations may be added; of one that was there only the seconds may change.
fn only_added(new: &At<'_>, old: &At<'_>, errors: &mut Errors) {
    let identity = |toleration: &Value| {
        let mut identity = toleration.clone();
        if let Some(map) = identity.as_object_mut() {
            map.remove("tolerationSeconds");
        }
        identity
    };
    let kept: Vec<Value> = new.items().iter().map(|item| identity(&item.json())).collect();
    if old.items().iter().any(|item| !kept.contains(&identity(&item.json()))) {
        errors.forbidden(new, "existing toleration can not be modified except its tolerationSeconds");
    }
}

/// The spec without what an update may change.
fn fixed_part(spec: &At<'_>, old: Option<&At<'_>>) -> Map<String, Value> {
    let Value::Object(mut map) = spec.json() else { return Map::new() };
    for key in ["activeDeadlineSeconds", "tolerations", "schedulingGates"] {
        map.remove(key);
    }
    for list in ["containers", "initContainers"] {
        let items = map.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten();
        for container in items.filter_map(Value::as_object_mut) {
            container.remove("image");
        }
    }
    let grace = "terminationGracePeriodSeconds";
    let was_negative = old.is_some_and(|old| old.child(grace).number() < 0);
    if let (true, Some(old), 1) = (was_negative, old, spec.child(grace).number()) {
        map.insert(grace.to_owned(), old.child(grace).json());
    }
    map
}

fn changed_keys<'a>(before: &'a Map<String, Value>, after: &'a Map<String, Value>) -> Vec<&'a String> {
    let differs = |key: &&String| before.get(*key) != after.get(*key);
    let mut keys: Vec<&String> = before.keys().chain(after.keys()).filter(differs).collect();
    keys.sort();
    keys.dedup();
    keys
}
