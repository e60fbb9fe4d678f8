//! The kinds with few rules: namespaces, nodes, ConfigMaps, Secrets, Leases, Events, ServiceCIDRs, IPAddresses.

use std::collections::HashSet;
use std::net::IpAddr;

use serde_json::Value;

use super::cursor::{At, Errors};
use super::{address, names, object_meta};
use crate::field::FieldError;

/// Bytes that a ConfigMap or a Secret may hold (1 MiB).
const DATA_BYTES_MAX: usize = 1024 * 1024;

const TAINT_EFFECTS: &[&str] = &["NoSchedule", "PreferNoSchedule", "NoExecute"];

pub(super) fn namespace(root: &At<'_>, errors: &mut Errors) {
    let finalizers = root.at(&["spec", "finalizers"]);
    for item in finalizers.items() {
        object_meta::finalizer(finalizers.path(), item.text(), errors);
        object_meta::known_or_qualified(finalizers.path(), item.text(), errors);
    }
}

pub(super) fn node(root: &At<'_>, old: Option<&At<'_>>, errors: &mut Errors) {
    taints(&root.at(&["spec", "taints"]), errors);
    let cidrs = root.at(&["spec", "podCIDRs"]);
    let prefixes: Vec<_> = cidrs.items().iter().filter_map(|at| address::cidr(at, errors)).collect();
    if !address::one_per_family(prefixes.iter().map(|prefix| prefix.addr().is_ipv4())) {
        errors.invalid(&cidrs, "may specify no more than one CIDR for each IP family");
    }
    let mut seen = Vec::new();
    for item in root.at(&["status", "addresses"]).items() {
        if seen.contains(&item.json()) {
            errors.duplicate(&item);
        }
        seen.push(item.json());
    }
    let Some(old) = old else { return };
    let old_cidrs = old.at(&["spec", "podCIDRs"]);
    if old_cidrs.len() > 0 && old_cidrs.value() != cidrs.value() {
        errors.forbidden(&cidrs, "node updates may not change podCIDR except from \"\" to valid");
    }
    let (provider, old_provider) = (root.at(&["spec", "providerID"]), old.at(&["spec", "providerID"]));
    if !old_provider.text().is_empty() && provider.text() != old_provider.text() {
        errors.forbidden(&provider, "node updates may not change providerID except from \"\" to valid");
    }
}

fn taints(at: &At<'_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for taint in at.items() {
        let (key, value, effect) = (taint.child("key"), taint.child("value"), taint.child("effect"));
        errors.complaints(&key, names::qualified_name(key.text()));
        errors.complaints(&value, names::label_value(value.text()));
        errors.one_of(&effect, TAINT_EFFECTS);
        if !seen.insert((key.text(), effect.text())) {
            let mut error = FieldError::duplicate(taint.path(), taint.json());
            "taints must be unique by key and effect pair".clone_into(&mut error.detail);
            errors.push(error);
        }
    }
}

pub(super) fn config_map(root: &At<'_>, errors: &mut Errors) {
    let (data, binary) = (root.child("data"), root.child("binaryData"));
    let mut bytes = data_keys(&data, errors) + data_keys(&binary, errors);
    for (key, _) in data.entries() {
        if binary.key(key).is_set() {
            let path = format!("{}[{key}]", data.path());
            errors.push(FieldError::invalid(path, key.as_str(), "duplicate of key present in binaryData"));
        }
    }
    // In base64 three bytes take four characters.
    let encoded = binary.entries().map(|(_, value)| value.as_str().map_or(0, str::len)).sum::<usize>();
    bytes -= encoded - encoded / 4 * 3;
    if bytes > DATA_BYTES_MAX {
        errors.push(FieldError::too_long("", DATA_BYTES_MAX));
    }
}

/// Checks the keys of a map of data; gives the bytes of its values as they are written.
fn data_keys(at: &At<'_>, errors: &mut Errors) -> usize {
    let mut bytes = 0;
    for (key, value) in at.entries() {
        for complaint in names::config_map_key(key) {
            errors.push(FieldError::invalid(format!("{}[{key}]", at.path()), key.as_str(), complaint));
        }
        bytes += value.as_str().map_or(0, str::len);
    }
    bytes
}

pub(super) fn secret(root: &At<'_>, errors: &mut Errors) {
    let data = root.child("data");
    if data_keys(&data, errors) / 4 * 3 > DATA_BYTES_MAX {
        errors.push(FieldError::too_long(data.path(), DATA_BYTES_MAX));
    }
    let needs = |key: &str| {
        let at = data.key(key);
        if at.is_set() { None } else { Some(FieldError::required(at.path(), "")) }
    };
    let account = root.at(&["metadata", "annotations"]).key("kubernetes.io/service-account.name");
    let missing: Vec<FieldError> = match root.child("type").text() {
        "kubernetes.io/service-account-token" if account.text().is_empty() => {
            vec![FieldError::required(account.path(), "")]
        }
        "kubernetes.io/dockercfg" => needs(".dockercfg").into_iter().collect(),
        "kubernetes.io/dockerconfigjson" => needs(".dockerconfigjson").into_iter().collect(),
        "kubernetes.io/ssh-auth" => needs("ssh-privatekey").into_iter().collect(),
        "kubernetes.io/tls" => needs("tls.crt").into_iter().chain(needs("tls.key")).collect(),
        "kubernetes.io/basic-auth" => match (needs("username"), needs("password")) {
            (Some(user), Some(password)) => vec![user, password],
            _ => Vec::new(),
        },
        _ => Vec::new(),
    };
    missing.into_iter().for_each(|error| errors.push(error));
}

/// ConfigMaps and Secrets may be sealed: `immutable` then stays, and so do these fields.
pub(super) fn sealed(new: &At<'_>, old: &At<'_>, fields: &[&str], errors: &mut Errors) {
    let rule = "field is immutable when `immutable` is set";
    if !old.child("immutable").flag() {
        return;
    }
    if !new.child("immutable").flag() {
        errors.forbidden(&new.child("immutable"), rule);
    }
    for field in fields {
        if new.child(field).value() != old.child(field).value() {
            errors.forbidden(&new.child(field), rule);
        }
    }
}

pub(super) fn lease(root: &At<'_>, errors: &mut Errors) {
    let spec = root.child("spec");
    let (duration, transitions) = (spec.child("leaseDurationSeconds"), spec.child("leaseTransitions"));
    if duration.maybe_number().is_some_and(|seconds| seconds <= 0) {
        errors.invalid(&duration, "must be greater than 0");
    }
    if transitions.maybe_number().is_some_and(|count| count < 0) {
        errors.invalid(&transitions, "must be greater than or equal to 0");
    }
    let holder = spec.child("preferredHolder");
    if !holder.text().is_empty() && spec.child("strategy").text().is_empty() {
        errors.forbidden(&holder, "may only be specified if `strategy` is defined");
    }
}

/// Where the two groups of Events keep what is checked.
pub(super) struct EventFields {
    object: &'static str,
    controller: &'static str,
    message: &'static str,
    /// Whether the rules of the newer group hold.
    strict: bool,
}

pub(super) const CORE_EVENT: EventFields =
    EventFields { object: "involvedObject", controller: "reportingComponent", message: "message", strict: false };
pub(super) const OWN_GROUP_EVENT: EventFields =
    EventFields { object: "regarding", controller: "reportingController", message: "note", strict: true };

/// Checks a new Event; Events are not checked again on updates beyond their metadata.
pub(super) fn event(root: &At<'_>, fields: &EventFields, errors: &mut Errors) {
    let namespace = root.at(&["metadata", "namespace"]);
    let object_namespace = root.at(&[fields.object, "namespace"]);
    let timed = root.child("eventTime").is_set();
    let home: &[&str] = if timed { &["default", "kube-system"] } else { &["default", ""] };
    let fits = match object_namespace.text() {
        "" => home.contains(&namespace.text()),
        text => timed || text == namespace.text(),
    };
    if !fits {
        errors.push(FieldError::invalid(
            object_namespace.path(),
            object_namespace.text(),
            "does not match event.namespace",
        ));
    }
    if timed {
        timed_event(root, fields, errors);
    }
    if fields.strict {
        if !timed {
            errors.required(&root.child("eventTime"), "");
        }
        let kind = root.child("type").text();
        if !["Normal", "Warning"].contains(&kind) {
            errors.push(FieldError::invalid("type", "", format!("has invalid value: {kind}")));
        }
    }
}

fn timed_event(root: &At<'_>, fields: &EventFields, errors: &mut Errors) {
    let controller = root.child(fields.controller);
    if controller.text().is_empty() {
        errors.required(&controller, "");
    }
    errors.complaints(&controller, names::qualified_name(controller.text()));
    for (key, required, bytes_max) in
        [("reportingInstance", true, 128), ("action", true, 128), ("reason", true, 128), (fields.message, false, 1024)]
    {
        let at = root.child(key);
        if required && at.text().is_empty() {
            errors.required(&at, "");
        }
        if at.text().len() > bytes_max {
            errors.push(FieldError::invalid(at.path(), "", format!("can have at most {bytes_max} characters")));
        }
    }
}

pub(super) fn service_cidr(root: &At<'_>, old: Option<&At<'_>>, errors: &mut Errors) {
    let cidrs = root.at(&["spec", "cidrs"]);
    if let Some(old) = old {
        let (new, old) = (cidrs.texts(), old.at(&["spec", "cidrs"]).texts());
        let extended = old.len() == 1 && new.len() == 2 && new.first() == old.first();
        if new != old && !extended {
            errors.invalid(&cidrs, "field is immutable");
        }
    }
    if cidrs.len() == 0 {
        errors.required(&cidrs, "at least one CIDR required");
    } else if cidrs.len() > 2 {
        errors.invalid(&cidrs, "may only hold up to 2 values");
    }
    let prefixes: Vec<_> = cidrs.items().iter().filter_map(|at| address::canonical_cidr(at, errors)).collect();
    if !address::one_per_family(prefixes.iter().map(|prefix| prefix.addr().is_ipv4())) {
        let rule = "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/96";
        errors.invalid(&cidrs, rule);
    }
}

pub(super) fn ip_address(root: &At<'_>, old: Option<&At<'_>>, errors: &mut Errors) {
    let parent = root.at(&["spec", "parentRef"]);
    if !parent.is_set() {
        return errors.required(&parent, "");
    }
    for key in ["resource", "name"] {
        if parent.child(key).text().is_empty() {
            errors.required(&parent.child(key), "");
        }
    }
    let group = parent.child("group");
    if !group.text().is_empty() {
        errors.complaints(&group, names::dns1123_subdomain(group.text()));
    }
    if let Some(old) = old {
        errors.immutable(&root.child("spec"), &old.child("spec"));
    }
}

/// The name of an IPAddress is the address in canonical form.
pub(super) fn ip_address_name(name: &str) -> Vec<String> {
    match name.parse::<IpAddr>() {
        Ok(address) if address.to_string() == name => Vec::new(),
        Ok(address) => vec![format!("must be in canonical form ({})", Value::from(address.to_string()))],
        Err(_) => vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".to_owned()],
    }
}
