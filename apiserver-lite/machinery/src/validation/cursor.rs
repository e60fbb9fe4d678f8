//! A place in an object: the value there, and its path for error messages.

use serde_json::{Map, Value};

use crate::field::FieldError;

/// A value, maybe absent, with the path that leads to it.
#[derive(Clone, Debug)]
pub(super) struct At<'a> {
    value: Option<&'a Value>,
    path: String,
}

impl<'a> At<'a> {
    /// The top of an object.
    pub(super) fn root(object: &'a Value) -> Self {
        Self { value: Some(object), path: String::new() }
    }

    /// The path, for example `spec.ports[0].port`.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// A field.
    pub(super) fn child(&self, key: &str) -> Self {
        let path = if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) };
        Self { value: self.value.and_then(|value| value.get(key)).filter(|value| !value.is_null()), path }
    }

    /// A field of a field, and so on.
    pub(super) fn at(&self, keys: &[&str]) -> Self {
        keys.iter().fold(self.clone(), |at, key| at.child(key))
    }

    /// The entry of a map, printed as `path[key]`.
    pub(super) fn key(&self, key: &str) -> Self {
        Self { value: self.value.and_then(|value| value.get(key)), path: format!("{}[{key}]", self.path) }
    }

    /// The elements of a list; none when it is absent.
    pub(super) fn items(&self) -> Vec<Self> {
        let items = self.value.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let item = |(index, value)| Self { value: Some(value), path: format!("{}[{index}]", self.path) };
        items.iter().enumerate().map(item).collect()
    }

    /// The entries of a map; none when it is absent.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
        self.value.and_then(Value::as_object).into_iter().flat_map(Map::iter)
    }

    /// How many elements or entries there are.
    pub(super) fn len(&self) -> usize {
        match self.value {
            Some(Value::Array(items)) => items.len(),
            Some(Value::Object(entries)) => entries.len(),
            _ => 0,
        }
    }

    /// The value, if any.
    pub(super) fn value(&self) -> Option<&'a Value> {
        self.value
    }

    /// A copy of the value; null when absent.
    pub(super) fn json(&self) -> Value {
        self.value.cloned().unwrap_or_default()
    }

    /// Whether there is a value.
    pub(super) fn is_set(&self) -> bool {
        self.value.is_some()
    }

    /// The text; empty when absent.
    pub(super) fn text(&self) -> &'a str {
        self.value.and_then(Value::as_str).unwrap_or_default()
    }

    /// The text, when there is a value.
    pub(super) fn maybe_text(&self) -> Option<&'a str> {
        self.value.and_then(Value::as_str)
    }

    /// The number; 0 when absent.
    pub(super) fn number(&self) -> i64 {
        self.maybe_number().unwrap_or_default()
    }

    /// The number, when there is one.
    pub(super) fn maybe_number(&self) -> Option<i64> {
        self.value.and_then(Value::as_i64)
    }

    /// The boolean; false when absent.
    pub(super) fn flag(&self) -> bool {
        self.value.and_then(Value::as_bool).unwrap_or_default()
    }

    /// The texts of a list.
    pub(super) fn texts(&self) -> Vec<&'a str> {
        self.items().iter().map(Self::text).collect()
    }
}

/// Collects errors.
#[derive(Debug, Default)]
pub(super) struct Errors(pub(super) Vec<FieldError>);

impl Errors {
    /// One error.
    pub(super) fn push(&mut self, error: FieldError) {
        self.0.push(error);
    }

    /// The value is malformed.
    pub(super) fn invalid(&mut self, at: &At<'_>, detail: impl Into<String>) {
        self.push(FieldError::invalid(at.path(), at.json(), detail));
    }

    /// One error per complaint about the value.
    pub(super) fn complaints(&mut self, at: &At<'_>, complaints: Vec<String>) {
        for complaint in complaints {
            self.invalid(at, complaint);
        }
    }

    /// A value must be there.
    pub(super) fn required(&mut self, at: &At<'_>, detail: impl Into<String>) {
        self.push(FieldError::required(at.path(), detail));
    }

    /// The value is not permitted here.
    pub(super) fn forbidden(&mut self, at: &At<'_>, detail: impl Into<String>) {
        self.push(FieldError::forbidden(at.path(), detail));
    }

    /// The value appears twice.
    pub(super) fn duplicate(&mut self, at: &At<'_>) {
        self.push(FieldError::duplicate(at.path(), at.json()));
    }

    /// The text must be there and one of these, which are printed in this order.
    pub(super) fn one_of(&mut self, at: &At<'_>, supported: &[&str]) {
        if at.text().is_empty() {
            self.required(at, "");
        } else {
            self.one_of_if_set(at, supported);
        }
    }

    /// The text must be one of these if it is there.
    pub(super) fn one_of_if_set(&mut self, at: &At<'_>, supported: &[&str]) {
        if at.maybe_text().is_some_and(|text| !supported.contains(&text)) {
            self.push(FieldError::not_supported(at.path(), at.json(), supported));
        }
    }

    /// The number must be a port.
    pub(super) fn port(&mut self, at: &At<'_>) {
        self.in_range(at, 1, 65_535);
    }

    /// The number must lie within these bounds.
    pub(super) fn in_range(&mut self, at: &At<'_>, low: i64, high: i64) {
        if !(low..=high).contains(&at.number()) {
            let error = super::names::range_error(low, high);
            self.push(FieldError::invalid(at.path(), at.number(), error));
        }
    }

    /// A list may not be longer than this; gives whether it is not.
    pub(super) fn at_most(&mut self, at: &At<'_>, items_max: usize) -> bool {
        let fits = at.len() <= items_max;
        if !fits {
            self.push(FieldError::too_many(at.path(), at.len(), items_max));
        }
        fits
    }

    /// The values must be equal.
    pub(super) fn immutable(&mut self, new: &At<'_>, old: &At<'_>) {
        if new.value() != old.value() {
            self.invalid(new, "field is immutable");
        }
    }
}
