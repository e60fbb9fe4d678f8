//! Field errors: what is wrong with one field of an object, in the words that `kubectl` users know.

use std::fmt;

use serde_json::Value;

/// Why a field was refused; the name is what clients see in `status.details.causes[].reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ErrorKind {
    /// A referenced value does not exist.
    NotFound,
    /// A required value is missing or empty.
    Required,
    /// A value that must be unique appears twice.
    Duplicate,
    /// A value is malformed or out of bounds.
    Invalid,
    /// A value is not one of the enumerated ones.
    NotSupported,
    /// A value is well formed but not permitted here.
    Forbidden,
    /// A value is too long; the value itself is not repeated in the message.
    TooLong,
    /// A list has too many items.
    TooMany,
    /// The server failed, not the input.
    Internal,
}

impl ErrorKind {
    /// The machine-readable cause type (`metav1.CauseType`).
    pub fn cause(self) -> &'static str {
        match self {
            Self::NotFound => "FieldValueNotFound",
            Self::Required => "FieldValueRequired",
            Self::Duplicate => "FieldValueDuplicate",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::Internal => "InternalError",
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::NotFound => "Not found",
            Self::Required => "Required value",
            Self::Duplicate => "Duplicate value",
            Self::Invalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::Forbidden => "Forbidden",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
            Self::Internal => "Internal error",
        }
    }

    fn shows_value(self) -> bool {
        !matches!(self, Self::Required | Self::Forbidden | Self::TooLong | Self::Internal)
    }
}

/// One refused field. [`fmt::Display`] renders it as `path: Reason: value: detail`, the form of apimachinery's `field.Error`.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    /// Why.
    pub kind: ErrorKind,
    /// Where, for example `spec.ports[0].port`.
    pub path: String,
    /// The offending value; printed only for kinds that show it.
    pub value: Value,
    /// What would be right; may be empty.
    pub detail: String,
}

impl FieldError {
    /// An error of any kind.
    pub fn new(kind: ErrorKind, path: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self { kind, path: path.into(), value: value.into(), detail: detail.into() }
    }

    /// A value is missing.
    pub fn required(path: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::Required, path, "", detail)
    }

    /// A value is malformed.
    pub fn invalid(path: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, path, value, detail)
    }

    /// A value appears twice.
    pub fn duplicate(path: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::new(ErrorKind::Duplicate, path, value, "")
    }

    /// A value is outside its enumeration; `supported` is printed in the order given.
    pub fn not_supported(path: impl Into<String>, value: impl Into<Value>, supported: &[&str]) -> Self {
        let quoted: Vec<String> = supported.iter().map(|value| quote(value)).collect();
        Self::new(ErrorKind::NotSupported, path, value, format!("supported values: {}", quoted.join(", ")))
    }

    /// A value is not permitted here.
    pub fn forbidden(path: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::Forbidden, path, "", detail)
    }

    /// A text is longer than `bytes_max` bytes.
    pub fn too_long(path: impl Into<String>, bytes_max: usize) -> Self {
        Self::new(ErrorKind::TooLong, path, "", format!("may not be more than {bytes_max} bytes"))
    }

    /// A list has more than `items_max` items.
    pub fn too_many(path: impl Into<String>, items: usize, items_max: usize) -> Self {
        Self::new(ErrorKind::TooMany, path, items, format!("must have at most {items_max} items"))
    }

    /// The message without the path: `Invalid value: 0: must be ...`.
    pub fn body(&self) -> String {
        let mut body = self.kind.label().to_owned();
        if self.kind.shows_value() {
            body.push_str(": ");
            match &self.value {
                Value::String(text) => body.push_str(&quote(text)),
                other => body.push_str(&other.to_string()),
            }
        }
        if !self.detail.is_empty() {
            body.push_str(": ");
            body.push_str(&self.detail);
        }
        body
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.body())
    }
}

/// Joins errors the way a Go error aggregate prints: one alone, several (without repetitions) in brackets.
pub fn aggregate(errors: &[FieldError]) -> String {
    let mut texts: Vec<String> = Vec::with_capacity(errors.len());
    for error in errors {
        let text = error.to_string();
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    match texts.as_slice() {
        [one] => one.clone(),
        many => format!("[{}]", many.join(", ")),
    }
}

/// Quotes a text as Go's `%q` does for printable input: double quotes, with backslash escapes.
pub fn quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for character in text.chars() {
        match character {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            control if u32::from(control) < 0x20 || control == '\u{7f}' => {
                quoted.push_str(&format!("\\x{:02x}", u32::from(control)));
            }
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_as_clients_know_it() {
        let port = FieldError::invalid("spec.ports[0].port", 0, "must be between 1 and 65535, inclusive");
        assert_eq!(port.to_string(), "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive");
        let kind = FieldError::not_supported("spec.type", "X", &["ClusterIP", "NodePort"]);
        assert_eq!(
            kind.to_string(),
            "spec.type: Unsupported value: \"X\": supported values: \"ClusterIP\", \"NodePort\""
        );
        assert_eq!(FieldError::required("metadata.name", "").to_string(), "metadata.name: Required value");
        assert_eq!(
            FieldError::forbidden("data", "field is immutable when `immutable` is set").to_string(),
            "data: Forbidden: field is immutable when `immutable` is set"
        );
    }

    #[test]
    fn aggregates_without_repetition() {
        let a = FieldError::required("a", "");
        let b = FieldError::duplicate("b", "x");
        assert_eq!(aggregate(std::slice::from_ref(&a)), "a: Required value");
        assert_eq!(aggregate(&[a.clone(), b, a]), "[a: Required value, b: Duplicate value: \"x\"]");
    }

    #[test]
    fn quotes_control_characters() {
        assert_eq!(quote("a\"\\\n\u{1}"), r#""a\"\\\n\x01""#);
    }
}
