//! `metadata` of every kind: names, labels, annotations, owners, finalizers.

use serde_json::Value;

use super::cursor::{At, Errors};
use super::names;
use crate::field::FieldError;

/// Bytes that all annotations of an object may have together (apimachinery's limit).
const ANNOTATIONS_BYTES_MAX: usize = 256 * 1024;

/// How a kind's names look.
pub(super) type NameRule = fn(&str) -> Vec<String>;

/// Checks the metadata of a new object; `namespaced` says what its kind is.
pub(super) fn create(root: &At<'_>, namespaced: bool, rule: NameRule, errors: &mut Errors) {
    let metadata = root.child("metadata");
    let base = metadata.child("generateName");
    if !base.text().is_empty() {
        errors.complaints(&base, rule(&names::completed_base(base.text())));
    }
    let name = metadata.child("name");
    if name.text().is_empty() {
        errors.required(&name, "name or generateName is required");
    } else {
        errors.complaints(&name, rule(name.text()));
    }
    common(&metadata, namespaced, errors);
}

fn common(metadata: &At<'_>, namespaced: bool, errors: &mut Errors) {
    namespace(&metadata.child("namespace"), namespaced, errors);
    if metadata.child("generation").number() < 0 {
        errors.invalid(&metadata.child("generation"), "must be greater than or equal to 0");
    }
    labels(&metadata.child("labels"), errors);
    annotations(&metadata.child("annotations"), errors);
    owner_references(&metadata.child("ownerReferences"), errors);
    finalizers(&metadata.child("finalizers"), errors);
}

fn namespace(at: &At<'_>, namespaced: bool, errors: &mut Errors) {
    match (namespaced, at.text().is_empty()) {
        (true, true) => errors.required(at, ""),
        (true, false) => errors.complaints(at, names::dns1123_label(at.text())),
        (false, false) => errors.forbidden(at, "not allowed on this type"),
        (false, true) => {}
    }
}

/// Checks a map of labels; also used for selectors.
pub(super) fn labels(at: &At<'_>, errors: &mut Errors) {
    for (key, value) in at.entries() {
        for complaint in names::qualified_name(key) {
            errors.push(FieldError::invalid(at.path(), key.as_str(), complaint));
        }
        for complaint in names::label_value(value.as_str().unwrap_or_default()) {
            errors.push(FieldError::invalid(at.path(), value.clone(), complaint));
        }
    }
}

fn annotations(at: &At<'_>, errors: &mut Errors) {
    let mut bytes = 0;
    for (key, value) in at.entries() {
        // The case of a key does not matter here.
        for complaint in names::qualified_name(&key.to_lowercase()) {
            errors.push(FieldError::invalid(at.path(), key.as_str(), complaint));
        }
        bytes += key.len() + value.as_str().map_or(0, str::len);
    }
    if bytes > ANNOTATIONS_BYTES_MAX {
        errors.push(FieldError::too_long(at.path(), ANNOTATIONS_BYTES_MAX));
    }
}

fn owner_references(at: &At<'_>, errors: &mut Errors) {
    let mut controller: Option<String> = None;
    for owner in at.items() {
        for (key, rule) in [
            ("apiVersion", "version must not be empty"),
            ("kind", "must not be empty"),
            ("name", "must not be empty"),
            ("uid", "must not be empty"),
        ] {
            let field = owner.child(key);
            if field.text().is_empty() {
                errors.push(FieldError::invalid(field.path(), "", rule));
            }
        }
        if (owner.child("apiVersion").text(), owner.child("kind").text()) == ("v1", "Event") {
            errors.invalid(&owner, "/v1, Kind=Event is disallowed from being an owner");
        }
        if owner.child("controller").flag() {
            let this = format!("{}/{}", owner.child("kind").text(), owner.child("name").text());
            match &controller {
                Some(first) => errors.invalid(
                    at,
                    format!(
                        "Only one reference can have Controller set to true. \
                         Found \"true\" in references for {first} and {this}"
                    ),
                ),
                None => controller = Some(this),
            }
        }
    }
}

fn finalizers(at: &At<'_>, errors: &mut Errors) {
    let (mut orphan, mut foreground) = (false, false);
    for item in at.items() {
        finalizer(at.path(), item.text(), errors);
        orphan |= item.text() == "orphan";
        foreground |= item.text() == "foregroundDeletion";
    }
    if orphan && foreground {
        errors.invalid(at, "finalizer orphan and foregroundDeletion cannot be both set");
    }
    for item in at.items() {
        known_or_qualified(item.path(), item.text(), errors);
    }
}

/// Checks one finalizer's form.
pub(super) fn finalizer(path: &str, text: &str, errors: &mut Errors) {
    for complaint in names::qualified_name(text) {
        errors.push(FieldError::invalid(path, text, complaint));
    }
}

/// A finalizer without a domain must be one that Kubernetes itself knows.
pub(super) fn known_or_qualified(path: &str, text: &str, errors: &mut Errors) {
    if !text.contains('/') && !["kubernetes", "orphan", "foregroundDeletion"].contains(&text) {
        let rule = "name is neither a standard finalizer name nor is it fully qualified";
        errors.push(FieldError::invalid(path, text, rule));
    }
}

/// Checks what may change in metadata. An absent resourceVersion, uid or time means "as it was": the server fills those in.
pub(super) fn update(new: &At<'_>, old: &At<'_>, namespaced: bool, errors: &mut Errors) {
    let (new, old) = (new.child("metadata"), old.child("metadata"));
    if old.child("deletionTimestamp").is_set() {
        no_new_finalizers(&new.child("finalizers"), &old.child("finalizers"), errors);
    }
    if new.child("generation").number() < old.child("generation").number() && new.child("generation").is_set() {
        errors.invalid(&new.child("generation"), "must not be decremented");
    }
    errors.immutable(&new.child("name"), &old.child("name"));
    for key in ["namespace", "uid", "creationTimestamp"] {
        if new.child(key).is_set() {
            errors.immutable(&new.child(key), &old.child(key));
        }
    }
    common(&new, namespaced, errors);
}

fn no_new_finalizers(new: &At<'_>, old: &At<'_>, errors: &mut Errors) {
    let known = old.texts();
    let added: Vec<Value> = new.texts().into_iter().filter(|text| !known.contains(text)).map(Value::from).collect();
    if !added.is_empty() {
        let added: Vec<String> = added.iter().map(Value::to_string).collect();
        let rule = "no new finalizers can be added if the object is being deleted, found new finalizers";
        errors.forbidden(new, format!("{rule} []string{{{}}}", added.join(", ")));
    }
}
