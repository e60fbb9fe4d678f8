//! Validation of served kinds, with upstream's field paths and message forms.

mod address;
mod cursor;
mod endpoints;
pub mod names;
mod object_meta;
mod pod;
mod service;
mod service_update;
mod small;

use serde_json::Value;

use cursor::{At, Errors};

use crate::field::FieldError;
use crate::schema::Resource;

/// Everything wrong with a new object after defaulting; empty when it may be stored. Names must have been generated, and on the kinds
/// that have them addresses and ports may have been allocated or not.
pub fn validate_create(resource: &Resource, object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    let root = At::root(object);
    object_meta::create(&root, resource.namespaced, name_rule(resource), &mut errors);
    content(resource, &root, None, &mut errors);
    errors.0
}

/// Everything wrong with replacing `old` by `new`; both are whole and defaulted.
pub fn validate_update(resource: &Resource, new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    let (new, old) = (At::root(new), At::root(old));
    object_meta::update(&new, &old, resource.namespaced, &mut errors);
    match (resource.group, resource.plural) {
        ("", "services") => service_update::check(&new, &old, &mut errors),
        ("", "pods") => pod::update(&new, &old, &mut errors),
        ("", "configmaps") => small::sealed(&new, &old, &["data", "binaryData"], &mut errors),
        ("", "secrets") => {
            errors.immutable(&new.child("type"), &old.child("type"));
            small::sealed(&new, &old, &["data"], &mut errors);
        }
        _ => {}
    }
    content(resource, &new, Some(&old), &mut errors);
    errors.0
}

/// Everything wrong with replacing `old` by `new` through `/status`; the caller has kept everything but `status` from `old`.
pub fn validate_status_update(resource: &Resource, new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    let (new, old) = (At::root(new), At::root(old));
    object_meta::update(&new, &old, resource.namespaced, &mut errors);
    if (resource.group, resource.plural) == ("", "services") {
        for ingress in new.at(&["status", "loadBalancer", "ingress"]).items() {
            let ip = ingress.child("ip");
            if !ip.text().is_empty() {
                address::ip(&ip, &mut errors);
            }
        }
    }
    errors.0
}

/// The rules that hold for any state of an object, beside its metadata.
fn content(resource: &Resource, root: &At<'_>, old: Option<&At<'_>>, errors: &mut Errors) {
    match (resource.group, resource.plural) {
        ("", "services") => service::check(root, old, errors),
        ("", "endpoints") => endpoints::endpoints(root, old, errors),
        ("", "pods") => pod::check(root, errors),
        ("", "namespaces") => small::namespace(root, errors),
        ("", "nodes") => small::node(root, old, errors),
        ("", "configmaps") => small::config_map(root, errors),
        ("", "secrets") => small::secret(root, errors),
        ("", "events") if old.is_none() => small::event(root, &small::CORE_EVENT, errors),
        ("events.k8s.io", "events") if old.is_none() => small::event(root, &small::OWN_GROUP_EVENT, errors),
        ("discovery.k8s.io", "endpointslices") => endpoints::slice(root, old, errors),
        ("coordination.k8s.io", "leases") => small::lease(root, errors),
        ("networking.k8s.io", "servicecidrs") => small::service_cidr(root, old, errors),
        ("networking.k8s.io", "ipaddresses") => small::ip_address(root, old, errors),
        _ => {}
    }
}

fn name_rule(resource: &Resource) -> object_meta::NameRule {
    match (resource.group, resource.plural) {
        ("", "namespaces" | "services") => names::dns1123_label,
        ("networking.k8s.io", "ipaddresses") => small::ip_address_name,
        _ => names::dns1123_subdomain,
    }
}

#[cfg(test)]
mod tests;
