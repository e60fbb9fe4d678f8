//! Field selectors (`metadata.name=a,spec.nodeName!=b`) with the fields that each kind supports.

use serde_json::Value;

use super::fields::{self, Selectable};
use crate::schema::Resource;
use crate::status::Status;

/// A parsed field selector of one resource: all its terms must hold. The default selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector {
    terms: Vec<Term>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Term {
    field: Selectable,
    equal: bool,
    value: String,
}

impl FieldSelector {
    /// Parses the query parameter `fieldSelector`; the empty text selects everything.
    ///
    /// # Errors
    /// 400 for bad syntax and for a field that the resource does not support.
    pub fn parse(resource: &Resource, text: &str) -> Result<Self, Status> {
        let mut terms = Vec::new();
        for part in split_terms(text).into_iter().filter(|part| !part.is_empty()) {
            let (label, equal, value) = split_term(part)
                .ok_or_else(|| Status::bad_request(format!("invalid selector: '{text}'; can't understand '{part}'")))?;
            let value = unescape(value).map_err(Status::bad_request)?;
            let field = fields::of(resource).iter().find(|field| field.label == label);
            let field = field.ok_or_else(|| Status::bad_request(fields::unsupported(resource, label)))?;
            terms.push(Term { field: *field, equal, value });
        }
        Ok(Self { terms })
    }

    /// Whether it selects everything.
    pub fn is_everything(&self) -> bool {
        self.terms.is_empty()
    }

    /// The one value that `field` must have, when the selector says so; lets a list by `metadata.name` become a get.
    pub fn exact(&self, field: &str) -> Option<&str> {
        self.terms.iter().find(|term| term.equal && term.field.label == field).map(|term| term.value.as_str())
    }

    /// Whether it selects this object.
    pub fn matches(&self, object: &Value) -> bool {
        self.terms.iter().all(|term| (term.field.value(object) == term.value) == term.equal)
    }
}

/// Splits at commas that no backslash escapes.
fn split_terms(text: &str) -> Vec<&str> {
    let mut terms = Vec::new();
    let mut start = 0;
    let mut escaped = false;
    for (at, character) in text.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                terms.extend(text.get(start..at));
                start = at + 1;
            }
            _ => {}
        }
    }
    terms.extend(text.get(start..));
    terms
}

fn split_term(part: &str) -> Option<(&str, bool, &str)> {
    let at = part.find(['=', '!'])?;
    let (label, rest) = part.split_at_checked(at)?;
    if let Some(value) = rest.strip_prefix("!=") {
        return Some((label, false, value));
    }
    if let Some(value) = rest.strip_prefix("==").or_else(|| rest.strip_prefix('=')) {
        return Some((label, true, value));
    }
    // A lone `!` belongs to the label; there is no such label.
    None
}

fn unescape(value: &str) -> Result<String, String> {
    let mut text = String::with_capacity(value.len());
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => match characters.next() {
                Some(escaped @ ('\\' | ',' | '=')) => text.push(escaped),
                Some(other) => return Err(format!("invalid field selector: invalid escape sequence: \\{other}")),
                None => return Err("invalid field selector: invalid escape sequence: \\".to_owned()),
            },
            ',' | '=' => return Err(format!("invalid field selector: unescaped character in value: {character}")),
            other => text.push(other),
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::needless_pass_by_value, reason = "tables of cases read better without references to temporaries")]
    use serde_json::json;

    use super::*;
    use crate::schema::registry;

    fn selector(group: &str, plural: &str, text: &str) -> Result<FieldSelector, Status> {
        FieldSelector::parse(registry().resource(group, "v1", plural).unwrap(), text)
    }

    fn check(plural: &str, text: &str, object: Value, wanted: bool) {
        assert_eq!(selector("", plural, text).unwrap().matches(&object), wanted, "{text} on {object}");
    }

    #[test]
    fn values_and_their_defaults() {
        check("pods", "", json!({}), true);
        check("pods", "metadata.name=a", json!({"metadata": {"name": "a"}}), true);
        check("pods", "spec.nodeName=", json!({}), true);
        check("pods", "spec.nodeName!=", json!({"spec": {"nodeName": "n"}}), true);
        check("pods", "spec.hostNetwork=false", json!({}), true);
        check("pods", "spec.hostNetwork==true", json!({"spec": {"hostNetwork": true}}), true);
        check("pods", "status.podIP=1.2.3.4", json!({"status": {"podIPs": [{"ip": "1.2.3.4"}]}}), true);
        check("pods", "status.phase!=Running,status.phase!=Failed", json!({"status": {"phase": "Pending"}}), true);
        check("nodes", "spec.unschedulable=false", json!({}), true);
        check("services", "spec.type=NodePort", json!({"spec": {"type": "ClusterIP"}}), false);
        check("secrets", "type=Opaque", json!({"type": "Opaque"}), true);
        check("namespaces", "status.phase=Active", json!({"status": {"phase": "Active"}}), true);
        check("events", "source=kubelet", json!({"source": {"component": "kubelet"}}), true);
        check("events", "source=x,reason=y", json!({"reportingComponent": "x", "reason": "y"}), true);
        check("configmaps", r"metadata.name=a\,b", json!({"metadata": {"name": "a,b"}}), true);
    }

    #[test]
    fn refusals() {
        let message = |group: &str, plural: &str, text: &str| {
            let status = selector(group, plural, text).unwrap_err();
            assert_eq!(status.code, 400);
            status.message
        };
        assert_eq!(message("", "pods", "spec.foo=1"), "field label not supported: spec.foo");
        assert_eq!(message("", "nodes", "metadata.namespace=a"), "field label not supported: metadata.namespace");
        assert_eq!(
            message("discovery.k8s.io", "endpointslices", "addressType=IPv4"),
            "\"addressType\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\""
        );
        assert_eq!(message("", "pods", "x"), "invalid selector: 'x'; can't understand 'x'");
        assert_eq!(message("", "pods", "!x"), "invalid selector: '!x'; can't understand '!x'");
        assert!(message("", "pods", r"metadata.name=\a").contains("invalid escape sequence"));
    }

    #[test]
    fn exact_values() {
        let selector = selector("", "pods", "metadata.name=a,status.phase!=Failed").unwrap();
        assert_eq!(selector.exact("metadata.name"), Some("a"));
        assert_eq!(selector.exact("status.phase"), None);
    }
}
