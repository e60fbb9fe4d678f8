//! `metav1.Status`: the one error form of the API, with the codes, reasons and messages that clients match on.

use std::fmt;

use serde_json::{Map, Value, json};

use crate::field::{FieldError, aggregate, quote};
use crate::schema::Resource;

/// A group and a plural (or, for [`Status::invalid`], a kind), printed as `services` or `endpointslices.discovery.k8s.io`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupResource<'a> {
    /// The API group, empty for the core group.
    pub group: &'a str,
    /// The plural or the kind.
    pub resource: &'a str,
}

impl<'a> From<&'a Resource> for GroupResource<'a> {
    fn from(resource: &'a Resource) -> Self {
        Self { group: resource.group, resource: resource.plural }
    }
}

impl fmt::Display for GroupResource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.resource)?;
        if !self.group.is_empty() {
            write!(f, ".{}", self.group)?;
        }
        Ok(())
    }
}

/// One cause in `details.causes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// Machine-readable; serialised as `reason`. May be empty.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Field path; may be empty.
    pub field: String,
}

/// `metav1.StatusDetails`. Empty parts are left out of the document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// Name of the object.
    pub name: String,
    /// API group.
    pub group: String,
    /// Plural of the resource, or its kind.
    pub kind: String,
    /// Uid of the object.
    pub uid: String,
    /// What was wrong.
    pub causes: Vec<Cause>,
    /// When to try again, seconds; also the `Retry-After` header when not 0.
    pub retry_after_seconds: u32,
}

impl Details {
    fn of(resource: GroupResource<'_>, name: &str) -> Box<Self> {
        Box::new(Self {
            name: name.to_owned(),
            group: resource.group.to_owned(),
            kind: resource.resource.to_owned(),
            ..Self::default()
        })
    }

    fn to_value(&self) -> Value {
        let mut map = Map::new();
        let texts = [("name", &self.name), ("group", &self.group), ("kind", &self.kind), ("uid", &self.uid)];
        for (key, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
            map.insert(key.to_owned(), json!(text));
        }
        if !self.causes.is_empty() {
            map.insert("causes".to_owned(), self.causes.iter().map(Cause::to_value).collect());
        }
        if self.retry_after_seconds > 0 {
            map.insert("retryAfterSeconds".to_owned(), json!(self.retry_after_seconds));
        }
        Value::Object(map)
    }
}

impl Cause {
    fn to_value(&self) -> Value {
        let texts = [("reason", &self.reason), ("message", &self.message), ("field", &self.field)];
        let filled = texts.into_iter().filter(|(_, text)| !text.is_empty());
        Value::Object(filled.map(|(key, text)| (key.to_owned(), json!(text))).collect())
    }
}

/// A failure as the API reports it. [`fmt::Display`] prints the message.
///
/// The codes, reasons and message forms follow apimachinery's `api/errors` package of Kubernetes 1.36.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Status {
    /// HTTP status code.
    pub code: u16,
    /// Machine-readable reason such as `NotFound`; may be empty.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// What it was about; boxed to keep `Result`s small.
    pub details: Option<Box<Details>>,
}

impl Status {
    fn new(code: u16, reason: &'static str, message: impl Into<String>, details: Option<Box<Details>>) -> Self {
        Self { code, reason, message: message.into(), details }
    }

    /// The document: `{"kind":"Status","apiVersion":"v1",...}`.
    pub fn to_value(&self) -> Value {
        let mut document = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "code": self.code,
        });
        if let Value::Object(map) = &mut document {
            if !self.reason.is_empty() {
                map.insert("reason".to_owned(), json!(self.reason));
            }
            if let Some(details) = &self.details {
                map.insert("details".to_owned(), details.to_value());
            }
        }
        document
    }

    /// The document of a success, as DELETE answers when the object is gone: `status: Success` and details of the object.
    pub fn success(resource: GroupResource<'_>, name: &str, uid: &str) -> Value {
        let mut details = Details::of(resource, name);
        details.uid = uid.to_owned();
        json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details.to_value(),
        })
    }

    /// Seconds for a `Retry-After` header, when the client should come back.
    pub fn retry_after_seconds(&self) -> Option<u32> {
        self.details.as_ref().map(|details| details.retry_after_seconds).filter(|seconds| *seconds > 0)
    }

    /// 404: the named object does not exist.
    pub fn not_found(resource: GroupResource<'_>, name: &str) -> Self {
        let message = format!("{resource} {} not found", quote(name));
        Self::new(404, "NotFound", message, Some(Details::of(resource, name)))
    }

    /// 404: no such path on this server.
    pub fn path_not_found() -> Self {
        let message = "the server could not find the requested resource";
        Self::new(404, "NotFound", message, Some(Box::default()))
    }

    /// 409: an object of that name exists.
    pub fn already_exists(resource: GroupResource<'_>, name: &str) -> Self {
        let message = format!("{resource} {} already exists", quote(name));
        Self::new(409, "AlreadyExists", message, Some(Details::of(resource, name)))
    }

    /// 409: every generated name was taken.
    pub fn generate_name_conflict(resource: GroupResource<'_>, name: &str, retry_after_seconds: u32) -> Self {
        let message = format!(
            "{resource} {} already exists, the server was not able to generate a unique name for the object",
            quote(name)
        );
        let mut details = Details::of(resource, name);
        details.retry_after_seconds = retry_after_seconds;
        Self::new(409, "AlreadyExists", message, Some(details))
    }

    /// 409: the object changed, or a precondition failed; `cause` says which.
    pub fn conflict(resource: GroupResource<'_>, name: &str, cause: impl fmt::Display) -> Self {
        let message = format!("Operation cannot be fulfilled on {resource} {}: {cause}", quote(name));
        Self::new(409, "Conflict", message, Some(Details::of(resource, name)))
    }

    /// 409 with the text that clients get when their resourceVersion is stale.
    pub fn conflict_modified(resource: GroupResource<'_>, name: &str) -> Self {
        let cause = "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(resource, name, cause)
    }

    /// 422: the object is not valid; `kind` holds group and kind.
    pub fn invalid(kind: GroupResource<'_>, name: &str, errors: &[FieldError]) -> Self {
        let mut message = format!("{kind} {} is invalid", quote(name));
        if !errors.is_empty() {
            message = format!("{message}: {}", aggregate(errors));
        }
        let mut details = Details::of(kind, name);
        details.causes = errors.iter().map(Cause::from).collect();
        Self::new(422, "Invalid", message, Some(details))
    }

    /// 422 for an object of a known resource.
    pub fn invalid_object(resource: &Resource, name: &str, errors: &[FieldError]) -> Self {
        Self::invalid(GroupResource { group: resource.group, resource: resource.kind }, name, errors)
    }

    /// 422: a patch could not be applied to the object it is for.
    pub fn unprocessable() -> Self {
        let message = "the server rejected our request due to an error in our request";
        Self::new(422, "Invalid", message, Some(Box::default()))
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message, None)
    }

    /// 405: the verb (for example `delete`) is not offered for the resource.
    pub fn method_not_allowed(resource: GroupResource<'_>, action: &str) -> Self {
        let message = format!("{action} is not supported on resources of kind {}", quote(&resource.to_string()));
        Self::new(405, "MethodNotAllowed", message, Some(Details::of(resource, "")))
    }

    /// 405 outside of resources.
    pub fn method_not_allowed_here() -> Self {
        let message = "the server does not allow this method on the requested resource";
        Self::new(405, "MethodNotAllowed", message, Some(Box::default()))
    }

    /// 410, reason `Gone`.
    pub fn gone(message: impl Into<String>) -> Self {
        Self::new(410, "Gone", message, None)
    }

    /// 410, reason `Expired`: a resourceVersion or a continue token is too old.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message, None)
    }

    /// 504: the client asked for a revision that this server has not reached; it should retry after 1 s.
    pub fn too_large_resource_version(asked: u64, current: u64) -> Self {
        let mut status = Self::timeout(&format!("Too large resource version: {asked}, current: {current}"), 1);
        if let Some(details) = &mut status.details {
            details.causes = vec![Cause {
                reason: "ResourceVersionTooLarge".to_owned(),
                message: "Too large resource version".to_owned(),
                field: String::new(),
            }];
        }
        status
    }

    /// 504: the work did not finish in time; it may still be done.
    pub fn timeout(message: &str, retry_after_seconds: u32) -> Self {
        let details = Details { retry_after_seconds, ..Details::default() };
        Self::new(504, "Timeout", format!("Timeout: {message}"), Some(Box::new(details)))
    }

    /// 415: the body's content type is not one of `accepted`.
    pub fn unsupported_media_type(accepted: &[&str]) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            accepted.join(", ")
        );
        Self::new(415, "UnsupportedMediaType", message, None)
    }

    /// 406: nothing in the Accept header is one of `accepted`.
    pub fn not_acceptable(accepted: &[&str]) -> Self {
        let message = format!("only the following media types are accepted: {}", accepted.join(", "));
        Self::new(406, "NotAcceptable", message, None)
    }

    /// 413.
    pub fn request_entity_too_large(message: &str) -> Self {
        Self::new(413, "RequestEntityTooLarge", format!("Request entity too large: {message}"), None)
    }

    /// 403 on a resource; `name` may be empty.
    pub fn forbidden(resource: GroupResource<'_>, name: &str, cause: impl fmt::Display) -> Self {
        let message = if name.is_empty() {
            format!("{resource} is forbidden: {cause}")
        } else {
            format!("{resource} {} is forbidden: {cause}", quote(name))
        };
        Self::new(403, "Forbidden", message, Some(Details::of(resource, name)))
    }

    /// 403 outside of resources.
    pub fn forbidden_here(cause: impl fmt::Display) -> Self {
        Self::new(403, "Forbidden", format!("forbidden: {cause}"), Some(Box::default()))
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized", None)
    }

    /// 429: try again after `retry_after_seconds`.
    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Self {
        let details = Details { retry_after_seconds, ..Details::default() };
        Self::new(429, "TooManyRequests", message, Some(Box::new(details)))
    }

    /// 503.
    pub fn service_unavailable(message: impl Into<String>) -> Self {
        Self::new(503, "ServiceUnavailable", message, None)
    }

    /// 500.
    pub fn internal(cause: impl fmt::Display) -> Self {
        let cause = cause.to_string();
        let message = format!("Internal error occurred: {cause}");
        let causes = vec![Cause { reason: String::new(), message: cause, field: String::new() }];
        Self::new(500, "InternalError", message, Some(Box::new(Details { causes, ..Details::default() })))
    }
}

impl From<&FieldError> for Cause {
    fn from(error: &FieldError) -> Self {
        Self { reason: error.kind.cause().to_owned(), message: error.body(), field: error.path.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICES: GroupResource<'static> = GroupResource { group: "", resource: "services" };
    const SLICES: GroupResource<'static> = GroupResource { group: "discovery.k8s.io", resource: "endpointslices" };

    #[test]
    fn not_found_document() {
        assert_eq!(
            Status::not_found(SLICES, "web-1").to_value(),
            json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 404,
                "reason": "NotFound", "message": "endpointslices.discovery.k8s.io \"web-1\" not found",
                "details": {"name": "web-1", "group": "discovery.k8s.io", "kind": "endpointslices"},
            })
        );
    }

    #[test]
    fn messages_codes_and_reasons() {
        let check = |status: Status, code: u16, reason: &str, message: &str| {
            assert_eq!((status.code, status.reason, status.message.as_str()), (code, reason, message));
        };
        check(Status::already_exists(SERVICES, "a"), 409, "AlreadyExists", "services \"a\" already exists");
        check(
            Status::conflict_modified(SERVICES, "a"),
            409,
            "Conflict",
            "Operation cannot be fulfilled on services \"a\": the object has been modified; \
             please apply your changes to the latest version and try again",
        );
        check(
            Status::method_not_allowed(SLICES, "patch"),
            405,
            "MethodNotAllowed",
            "patch is not supported on resources of kind \"endpointslices.discovery.k8s.io\"",
        );
        check(Status::forbidden(SERVICES, "", "no"), 403, "Forbidden", "services is forbidden: no");
        check(Status::internal("boom"), 500, "InternalError", "Internal error occurred: boom");
    }

    #[test]
    fn too_large_resource_version_asks_to_retry() {
        let status = Status::too_large_resource_version(9, 4);
        assert_eq!(status.retry_after_seconds(), Some(1));
        let document = status.to_value();
        assert_eq!(document["code"], 504);
        assert_eq!(document["message"], "Timeout: Too large resource version: 9, current: 4");
        assert_eq!(document["details"]["causes"][0]["reason"], "ResourceVersionTooLarge");
    }

    #[test]
    fn invalid_lists_causes() {
        let errors = [FieldError::invalid("spec.ports[0].port", 0, "must be between 1 and 65535, inclusive")];
        let kind = GroupResource { group: "", resource: "Service" };
        let document = Status::invalid(kind, "web", &errors).to_value();
        assert_eq!(
            document["message"],
            "Service \"web\" is invalid: spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive"
        );
        assert_eq!(
            document["details"]["causes"][0],
            json!({
                "reason": "FieldValueInvalid", "field": "spec.ports[0].port",
                "message": "Invalid value: 0: must be between 1 and 65535, inclusive",
            })
        );
    }
}
