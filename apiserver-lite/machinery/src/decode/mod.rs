//! From a request body to a checked JSON object, with the errors and warnings that kube-apiserver gives.

mod check;
mod identity;
mod parse;
mod scalar;

use serde_json::{Map, Value};

use crate::field::{FieldError, quote};
use crate::schema::{Resource, TypeId};
use crate::status::{GroupResource, Status};

/// What happens to unknown and duplicate fields (the query parameter `fieldValidation`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FieldValidation {
    /// They are dropped silently.
    Ignore,
    /// They are dropped; each gives a warning. The default of the API.
    #[default]
    Warn,
    /// They are refused.
    Strict,
}

impl FieldValidation {
    /// Reads the query parameter; empty means the default. `options_kind` is the kind named in the error: `CreateOptions`,
    /// `UpdateOptions` or `PatchOptions`.
    ///
    /// # Errors
    /// 422 for any other word.
    pub fn parse(text: &str, options_kind: &str) -> Result<Self, Status> {
        match text {
            "" | "Warn" => Ok(Self::Warn),
            "Ignore" => Ok(Self::Ignore),
            "Strict" => Ok(Self::Strict),
            other => {
                let error = FieldError::not_supported("fieldValidation", other, &["Ignore", "Strict", "Warn"]);
                let kind = GroupResource { group: "meta.k8s.io", resource: options_kind };
                Err(Status::invalid(kind, "", &[error]))
            }
        }
    }
}

/// How a body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `application/json`.
    Json,
    /// `application/yaml`.
    Yaml,
}

/// A decoded body.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// The object: unknown fields and nulls dropped, types checked, `apiVersion` and `kind` present.
    pub object: Value,
    /// Texts for `Warning` headers (code 299), in order; only with [`FieldValidation::Warn`].
    pub warnings: Vec<String>,
}

/// Decodes the body of a create or update of `resource`: `apiVersion` and `kind` are filled in when absent and must match
/// when present.
///
/// # Errors
/// 400 for text that is no JSON or YAML, another kind or version, a value of a wrong type, and (strict) unknown or duplicate
/// fields.
pub fn object(
    body: &[u8],
    format: Format,
    resource: &Resource,
    validation: FieldValidation,
) -> Result<Decoded, Status> {
    let parsed = parse::parse(body, format).map_err(|cause| unreadable(&cause, resource.kind, body))?;
    let Value::Object(entries) = parsed.value else {
        let cause = "json: cannot unmarshal a value that is no object";
        return Err(unreadable(cause, resource.kind, body));
    };
    let found = identity::Identity::of(&entries, resource);
    identity::check(&found, resource)?;
    let refuse = |cause: &str| Status::bad_request(found.refusal(resource, cause));
    let (object, findings) =
        checked(Value::Object(entries), resource.ty, &parsed.duplicates).map_err(|c| refuse(&c))?;
    let warnings = judge(findings, validation).map_err(|cause| refuse(&cause))?;
    Ok(Decoded { object: identity::filled(object, &found), warnings })
}

/// Checks and prunes an object that is JSON already: the outcome of a patch. `apiVersion` and `kind` must be those of `resource`.
///
/// # Errors
/// 400 for another kind or version; 422 with the field `patch`, as for every patch, for wrong types and (strict) unknown fields.
pub fn value(object: Value, resource: &Resource, validation: FieldValidation) -> Result<Decoded, Status> {
    let empty = Map::new();
    let found = identity::Identity::of(object.as_object().unwrap_or(&empty), resource);
    identity::check(&found, resource)?;
    let text = object.to_string();
    let refuse = |cause: String| {
        let error = FieldError::invalid("patch", text.as_str(), cause);
        Status::invalid(GroupResource { group: "", resource: "" }, "", &[error])
    };
    let (object, findings) = checked(object, resource.ty, &[]).map_err(refuse)?;
    let warnings = judge(findings, validation).map_err(refuse)?;
    Ok(Decoded { object: identity::filled(object, &found), warnings })
}

/// Decodes a body of any named type, for example (`meta.v1`, `DeleteOptions`); `apiVersion` and `kind` are optional and not
/// compared. An empty body gives an empty object.
///
/// # Errors
/// 400 for text that is no JSON or YAML, a value of a wrong type, and (strict) unknown or duplicate fields.
pub fn typed(body: &[u8], format: Format, ty: TypeId, validation: FieldValidation) -> Result<Decoded, Status> {
    if body.is_empty() {
        return Ok(Decoded { object: Value::Object(Map::new()), warnings: Vec::new() });
    }
    let parsed = parse::parse(body, format).map_err(|cause| {
        Status::bad_request(format!("couldn't get version/kind; json parse error: {cause} ({})", summary(body)))
    })?;
    let (object, findings) = checked(parsed.value, Some(ty), &parsed.duplicates).map_err(Status::bad_request)?;
    let warnings = judge(findings, validation).map_err(Status::bad_request)?;
    Ok(Decoded { object, warnings })
}

/// Decodes a patch document (any JSON), unchecked; duplicate fields are judged here, because the patch is where they can be.
///
/// # Errors
/// 400 for text that is no JSON or YAML, and (strict) for duplicate fields.
pub fn patch(body: &[u8], format: Format, validation: FieldValidation) -> Result<Decoded, Status> {
    let parsed =
        parse::parse(body, format).map_err(|cause| Status::bad_request(format!("error decoding patch: {cause}")))?;
    let findings = duplicate_findings(&parsed.duplicates);
    let warnings = judge(findings, validation).map_err(Status::bad_request)?;
    Ok(Decoded { object: parsed.value, warnings })
}

fn checked(value: Value, ty: Option<TypeId>, duplicates: &[String]) -> Result<(Value, Vec<String>), String> {
    let mut findings = duplicate_findings(duplicates);
    let Some(ty) = ty else { return Ok((value, findings)) };
    let checked = check::check(value, ty)?;
    findings.extend(checked.unknown);
    Ok((checked.value, findings))
}

fn duplicate_findings(duplicates: &[String]) -> Vec<String> {
    duplicates.iter().map(|path| format!("duplicate field {}", quote(path))).collect()
}

/// Turns findings into warnings or, when strict, into one error.
fn judge(findings: Vec<String>, validation: FieldValidation) -> Result<Vec<String>, String> {
    match validation {
        FieldValidation::Ignore => Ok(Vec::new()),
        FieldValidation::Warn => Ok(findings),
        FieldValidation::Strict if findings.is_empty() => Ok(findings),
        FieldValidation::Strict => Err(format!("strict decoding error: {}", findings.join(", "))),
    }
}

fn unreadable(cause: &str, kind: &str, body: &[u8]) -> Status {
    Status::bad_request(format!(
        "the object provided is unrecognized (must be of type {kind}): \
         couldn't get version/kind; json parse error: {cause} ({})",
        summary(body)
    ))
}

/// The first 30 bytes of a body: as they are when they look like JSON, else in hexadecimal.
fn summary(body: &[u8]) -> String {
    const SHOWN_BYTES_MAX: usize = 30;
    let shown = body.get(..SHOWN_BYTES_MAX).unwrap_or(body);
    let more = if shown.len() < body.len() { " ..." } else { "" };
    match shown.first() {
        None => "<empty>".to_owned(),
        Some(b'{') => format!("{}{more}", String::from_utf8_lossy(shown)),
        Some(_) => {
            let digits: String = shown.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{digits}{more}")
        }
    }
}

#[cfg(test)]
mod tests;
