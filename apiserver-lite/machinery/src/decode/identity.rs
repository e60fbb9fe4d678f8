//! `apiVersion` and `kind` of a body, against what the path asks for.

use serde_json::{Map, Value};

use crate::field::quote;
use crate::schema::{Resource, registry};
use crate::status::Status;

/// What a body says it is, completed from the resource where it says nothing.
pub(super) struct Identity {
    group: String,
    version: String,
    kind: String,
}

impl Identity {
    /// Reads a body; values that are no text count as absent here and fail the type check later.
    pub(super) fn of(entries: &Map<String, Value>, resource: &Resource) -> Self {
        let text = |key: &str| entries.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
        let (group, version) = match text("apiVersion") {
            None => (resource.group, resource.version),
            Some(api_version) => api_version.split_once('/').unwrap_or(("", api_version)),
        };
        let kind = text("kind").unwrap_or(resource.kind);
        Self { group: group.to_owned(), version: version.to_owned(), kind: kind.to_owned() }
    }

    /// `Pod in version "v1" cannot be handled as a Service: <cause>`.
    pub(super) fn refusal(&self, resource: &Resource, cause: &str) -> String {
        let version = quote(&self.version);
        format!("{} in version {version} cannot be handled as a {}: {cause}", self.kind, resource.kind)
    }

    fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }
}

/// Refuses a body of another kind or version.
///
/// # Errors
/// 400.
pub(super) fn check(found: &Identity, resource: &Resource) -> Result<(), Status> {
    if (found.group.as_str(), found.version.as_str(), found.kind.as_str())
        == (resource.group, resource.version, resource.kind)
    {
        return Ok(());
    }
    let Some(other) = registry().resource_by_kind(&found.group, &found.version, &found.kind) else {
        let (kind, version) = (quote(&found.kind), quote(&found.api_version()));
        let cause = format!("no kind {kind} is registered for version {version}");
        return Err(Status::bad_request(found.refusal(resource, &cause)));
    };
    if other.kind == resource.kind {
        return Err(Status::bad_request(format!(
            "the API version in the data ({}) does not match the expected API version ({})",
            found.api_version(),
            resource.api_version()
        )));
    }
    let cause = format!(
        "converting ({}.{}) to ({}.{}): unknown conversion",
        other.version, other.kind, resource.version, resource.kind
    );
    Err(Status::bad_request(found.refusal(resource, &cause)))
}

/// The object with `apiVersion` and `kind`.
pub(super) fn filled(mut object: Value, found: &Identity) -> Value {
    if let Some(entries) = object.as_object_mut() {
        entries.insert("apiVersion".to_owned(), found.api_version().into());
        entries.insert("kind".to_owned(), found.kind.as_str().into());
    }
    object
}
