//! Label selectors, as text (`app=web,tier in (a,b)`) and as objects (`matchLabels`, `matchExpressions`).

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::lexer::{Token, tokens};
use crate::field::{FieldError, aggregate, quote};
use crate::meta;
use crate::status::Status;
use crate::validation::names;

/// A parsed label selector: all its requirements must hold. The default selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    nothing: bool,
    requirements: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: Operator,
    values: BTreeSet<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
    Greater,
    Less,
}

impl LabelSelector {
    /// Parses the query parameter `labelSelector`; the empty text selects everything.
    ///
    /// # Errors
    /// 400 with upstream's text.
    pub fn parse(text: &str) -> Result<Self, Status> {
        let tokens = tokens(text);
        let requirements = Parser { rest: &tokens }.requirements().map_err(Status::bad_request)?;
        Ok(Self { nothing: false, requirements })
    }

    /// Reads a `metav1.LabelSelector` object: `None` or null selects nothing, an empty object everything.
    ///
    /// # Errors
    /// 400 for an operator or values that do not fit.
    pub fn from_object(selector: Option<&Value>) -> Result<Self, Status> {
        let Some(selector) = selector.filter(|selector| !selector.is_null()) else {
            return Ok(Self { nothing: true, requirements: Vec::new() });
        };
        let labels = selector.get("matchLabels").and_then(Value::as_object);
        let mut requirements = Vec::new();
        for (key, value) in labels.into_iter().flatten() {
            let values = BTreeSet::from([value.as_str().unwrap_or_default().to_owned()]);
            requirements.push(Requirement::new(key, Operator::In, values).map_err(Status::bad_request)?);
        }
        let expressions = selector.get("matchExpressions").and_then(Value::as_array);
        for expression in expressions.into_iter().flatten() {
            requirements.push(Requirement::from_expression(expression).map_err(Status::bad_request)?);
        }
        Ok(Self { nothing: false, requirements })
    }

    /// Reads a plain map of labels, as in a Service's `spec.selector`: every entry must match. Nothing is validated.
    pub fn from_map(labels: &Map<String, Value>) -> Self {
        let requirement = |(key, value): (&String, &Value)| Requirement {
            key: key.clone(),
            operator: Operator::In,
            values: BTreeSet::from([value.as_str().unwrap_or_default().to_owned()]),
        };
        Self { nothing: false, requirements: labels.iter().map(requirement).collect() }
    }

    /// Whether it selects everything.
    pub fn is_everything(&self) -> bool {
        !self.nothing && self.requirements.is_empty()
    }

    /// Whether it selects this object by its `metadata.labels`.
    pub fn matches(&self, object: &Value) -> bool {
        self.matches_labels(meta::labels(object))
    }

    /// Whether it selects these labels.
    pub fn matches_labels(&self, labels: Option<&Map<String, Value>>) -> bool {
        !self.nothing && self.requirements.iter().all(|requirement| requirement.holds(labels))
    }
}

impl Requirement {
    fn new(key: &str, operator: Operator, values: BTreeSet<String>) -> Result<Self, String> {
        let errors = requirement_errors(key, operator, &values);
        if errors.is_empty() { Ok(Self { key: key.to_owned(), operator, values }) } else { Err(aggregate(&errors)) }
    }

    fn from_expression(expression: &Value) -> Result<Self, String> {
        let operator = match meta::text_at(expression, &["operator"]) {
            "In" => Operator::In,
            "NotIn" => Operator::NotIn,
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            other => return Err(format!("{} is not a valid label selector operator", quote(other))),
        };
        let values = expression.get("values").and_then(Value::as_array).into_iter().flatten();
        let values = values.filter_map(Value::as_str).map(str::to_owned).collect();
        Self::new(meta::text_at(expression, &["key"]), operator, values)
    }

    fn holds(&self, labels: Option<&Map<String, Value>>) -> bool {
        let label = labels.and_then(|labels| labels.get(&self.key)).and_then(Value::as_str);
        match (self.operator, label) {
            (Operator::In, label) => label.is_some_and(|label| self.values.contains(label)),
            (Operator::NotIn, label) => label.is_none_or(|label| !self.values.contains(label)),
            (Operator::Exists, label) => label.is_some(),
            (Operator::DoesNotExist, label) => label.is_none(),
            (Operator::Greater, label) => self.compares(label, |label, bound| label > bound),
            (Operator::Less, label) => self.compares(label, |label, bound| label < bound),
        }
    }

    fn compares(&self, label: Option<&str>, compare: impl Fn(i64, i64) -> bool) -> bool {
        let number = |text: &str| text.parse::<i64>().ok();
        let bound = self.values.first().and_then(|bound| number(bound));
        matches!((label.and_then(number), bound), (Some(label), Some(bound)) if compare(label, bound))
    }
}

fn requirement_errors(key: &str, operator: Operator, values: &BTreeSet<String>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let key_errors = names::qualified_name(key);
    if !key_errors.is_empty() {
        errors.push(FieldError::invalid("key", key, key_errors.join("; ")));
    }
    let shown = || Value::from(values.iter().cloned().collect::<Vec<_>>());
    let is_number = |text: &String| text.parse::<i64>().is_ok();
    match operator {
        Operator::In | Operator::NotIn if values.is_empty() => {
            let rule = "for 'in', 'notin' operators, values set can't be empty";
            errors.push(FieldError::invalid("values", shown(), rule));
        }
        Operator::Exists | Operator::DoesNotExist if !values.is_empty() => {
            let rule = "values set must be empty for exists and does not exist";
            errors.push(FieldError::invalid("values", shown(), rule));
        }
        Operator::Greater | Operator::Less if !values.iter().all(is_number) => {
            let rule = "for 'Gt', 'Lt' operators, the value must be an integer";
            errors.push(FieldError::invalid("values[0]", shown(), rule));
        }
        _ => {}
    }
    for (index, value) in values.iter().enumerate() {
        let value_errors = names::label_value(value);
        if !value_errors.is_empty() {
            let path = format!("values[{index}][{key}]");
            errors.push(FieldError::invalid(path, value.as_str(), value_errors.join("; ")));
        }
    }
    errors
}

struct Parser<'t, 'a> {
    rest: &'t [Token<'a>],
}

impl<'a> Parser<'_, 'a> {
    fn peek(&self) -> Token<'a> {
        self.rest.first().copied().unwrap_or(Token::End)
    }

    fn next(&mut self) -> Token<'a> {
        let token = self.peek();
        self.rest = self.rest.get(1..).unwrap_or_default();
        token
    }

    fn requirements(mut self) -> Result<Vec<Requirement>, String> {
        let mut requirements = Vec::new();
        loop {
            match self.peek() {
                Token::Word(_) | Token::Not => {
                    let requirement = self.requirement();
                    requirements.push(requirement.map_err(|cause| format!("unable to parse requirement: {cause}"))?);
                }
                Token::End => return Ok(requirements),
                other => return Err(expected(other, "!, identifier, or 'end of string'")),
            }
            match self.next() {
                Token::End => return Ok(requirements),
                Token::Comma if matches!(self.peek(), Token::Word(_) | Token::Not) => {}
                Token::Comma => return Err(expected(self.peek(), "identifier after ','")),
                other => return Err(expected(other, "',' or 'end of string'")),
            }
        }
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        let negated = self.peek() == Token::Not;
        if negated {
            self.next();
        }
        let key = match self.next() {
            Token::Word(key) => key,
            other => return Err(expected(other, "identifier")),
        };
        let key_errors = names::qualified_name(key);
        if !key_errors.is_empty() {
            // There is no path to name here; upstream prints the absent one like this.
            return Err(FieldError::invalid("<nil>", key, key_errors.join("; ")).to_string());
        }
        if negated {
            return Requirement::new(key, Operator::DoesNotExist, BTreeSet::new());
        }
        if matches!(self.peek(), Token::End | Token::Comma) {
            return Requirement::new(key, Operator::Exists, BTreeSet::new());
        }
        let (operator, values) = match self.next() {
            Token::Word("in") => (Operator::In, self.values()?),
            Token::Word("notin") => (Operator::NotIn, self.values()?),
            Token::Equals(_) => (Operator::In, self.value()?),
            Token::NotEquals => (Operator::NotIn, self.value()?),
            Token::Greater => (Operator::Greater, self.value()?),
            Token::Less => (Operator::Less, self.value()?),
            other => return Err(expected(other, "in, notin, =, ==, !=, gt, lt")),
        };
        Requirement::new(key, operator, values)
    }

    fn value(&mut self) -> Result<BTreeSet<String>, String> {
        if matches!(self.peek(), Token::End | Token::Comma) {
            return Ok(BTreeSet::from([String::new()]));
        }
        match self.next() {
            Token::Word(value) => Ok(BTreeSet::from([value.to_owned()])),
            other => Err(expected(other, "identifier")),
        }
    }

    /// `(a,b)`; an absent item between commas or brackets is the empty value.
    fn values(&mut self) -> Result<BTreeSet<String>, String> {
        let open = self.next();
        if open != Token::Open {
            return Err(format!("found '{}' expected: '('", open.text()));
        }
        let mut values = BTreeSet::new();
        loop {
            let value = match self.peek() {
                Token::Word(value) => {
                    self.next();
                    value
                }
                Token::Comma | Token::Close => "",
                other => return Err(expected(other, "',', ')' or identifier")),
            };
            values.insert(value.to_owned());
            match self.next() {
                Token::Comma => {}
                Token::Close => return Ok(values),
                other => return Err(expected(other, "',' or ')'")),
            }
        }
    }
}

fn expected(found: Token<'_>, wanted: &str) -> String {
    format!("found '{}', expected: {wanted}", found.text())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::needless_pass_by_value, reason = "tables of cases read better without references to temporaries")]
    use serde_json::json;

    use super::*;

    fn check(selector: &str, labels: Value, wanted: bool) {
        let object = json!({"metadata": {"labels": labels}});
        assert_eq!(LabelSelector::parse(selector).unwrap().matches(&object), wanted, "{selector} on {object}");
    }

    #[test]
    fn texts() {
        let labels = || json!({"app": "web", "tier": "a", "empty": "", "n": "5", "in": "x"});
        for (selector, wanted) in [
            ("", true),
            ("app=web", true),
            (" app == web , tier != b ", true),
            ("app!=web", false),
            ("other!=web", true),
            ("app in (web, db)", true),
            ("app in (db)", false),
            ("tier notin (a,b)", false),
            ("none notin (a)", true),
            ("app", true),
            ("!app", false),
            ("!none,app", true),
            ("empty=", true),
            ("empty in ()", true),
            ("empty in (,a)", true),
            ("app in (web,)", true),
            ("in=x", true),
            ("in in (in,x)", true),
            ("n>4", true),
            ("n<5", false),
            ("app>4", false),
            ("kubernetes.io/cluster-service=true", false),
        ] {
            check(selector, labels(), wanted);
        }
        check("!app", Value::Null, true);
        check("app=web", Value::Null, false);
    }

    #[test]
    fn malformed_texts() {
        let refused = |text: &str| LabelSelector::parse(text).unwrap_err();
        for (text, message) in [
            ("=", "found '=', expected: !, identifier, or 'end of string'"),
            ("a,", "found '', expected: identifier after ','"),
            ("a=b c", "found 'c', expected: ',' or 'end of string'"),
            ("a b", "unable to parse requirement: found 'b', expected: in, notin, =, ==, !=, gt, lt"),
            ("a in b", "unable to parse requirement: found 'b' expected: '('"),
            ("a in (b", "unable to parse requirement: found '', expected: ',' or ')'"),
            ("!=a", "found '!=', expected: !, identifier, or 'end of string'"),
            ("a=(", "unable to parse requirement: found '(', expected: identifier"),
        ] {
            let status = refused(text);
            assert_eq!((status.code, status.message.as_str()), (400, message), "{text}");
        }
        assert!(refused("a/b/c=d").message.starts_with(
            "unable to parse requirement: <nil>: Invalid value: \"a/b/c\": a valid label key must consist of"
        ));
        assert!(refused("a=-").message.starts_with(
            "unable to parse requirement: values[0][a]: Invalid value: \"-\": a valid label must be an empty string"
        ));
    }

    #[test]
    fn objects() {
        let check = |selector: Value, labels: Value, wanted: bool| {
            let object = json!({"metadata": {"labels": labels}});
            assert_eq!(LabelSelector::from_object(Some(&selector)).unwrap().matches(&object), wanted, "{selector}");
        };
        check(json!({}), json!({}), true);
        check(json!(null), json!({}), false);
        check(json!({"matchLabels": {"a": "b"}}), json!({"a": "b", "c": "d"}), true);
        let expression = |operator: &str, values: &[&str]| json!({"matchExpressions": [{"key": "a", "operator": operator, "values": values}]});
        check(expression("In", &["x", "y"]), json!({"a": "y"}), true);
        check(expression("NotIn", &["x"]), json!({}), true);
        check(expression("Exists", &[]), json!({}), false);
        check(expression("DoesNotExist", &[]), json!({}), true);
        for wrong in [expression("In", &[]), expression("Exists", &["x"]), expression("Like", &["x"])] {
            assert_eq!(LabelSelector::from_object(Some(&wrong)).unwrap_err().code, 400, "{wrong}");
        }
        assert!(!LabelSelector::from_object(None).unwrap().is_everything());
    }

    #[test]
    fn plain_maps() {
        let map = json!({"a": "b"});
        let selector = LabelSelector::from_map(map.as_object().unwrap());
        assert!(selector.matches(&json!({"metadata": {"labels": {"a": "b"}}})));
        assert!(!selector.matches(&json!({"metadata": {}})));
    }
}
