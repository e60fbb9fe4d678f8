//! Rows of Events, in both of their groups.

use jiff::Timestamp;
use serde_json::Value;

use super::duration::since;
use crate::meta::{name, text_at, value_at};

/// Where the two groups keep the same facts.
struct Names {
    object: &'static str,
    message: &'static str,
    first: &'static str,
    last: &'static str,
    count: &'static str,
    source: &'static str,
    controller: &'static str,
}

const CORE: Names = Names {
    object: "involvedObject",
    message: "message",
    first: "firstTimestamp",
    last: "lastTimestamp",
    count: "count",
    source: "source",
    controller: "reportingComponent",
};

const OWN_GROUP: Names = Names {
    object: "regarding",
    message: "note",
    first: "deprecatedFirstTimestamp",
    last: "deprecatedLastTimestamp",
    count: "deprecatedCount",
    source: "deprecatedSource",
    controller: "reportingController",
};

pub(super) fn cells(object: &Value, now: Timestamp) -> Vec<Value> {
    cells_by(&CORE, object, now)
}

pub(super) fn cells_of_own_group(object: &Value, now: Timestamp) -> Vec<Value> {
    cells_by(&OWN_GROUP, object, now)
}

fn cells_by(names: &Names, object: &Value, now: Timestamp) -> Vec<Value> {
    let text = |key: &str| text_at(object, &[key]);
    let first_of = |texts: [&str; 2]| texts.into_iter().find(|text| !text.is_empty()).unwrap_or_default().to_owned();
    let first = since(&first_of([text(names.first), text("eventTime")]), now);
    let (mut last, mut count) = match text(names.last) {
        "" => (first.clone(), 1),
        last => (since(last, now), 1),
    };
    if let Some(times) = object.get(names.count).and_then(Value::as_i64).filter(|times| *times > 0) {
        count = times;
    }
    if let Some(series) = object.get("series").filter(|series| series.is_object()) {
        last = since(text_at(series, &["lastObservedTime"]), now);
        count = series.get("count").and_then(Value::as_i64).unwrap_or_default();
    }
    vec![
        last.into(),
        text("type").into(),
        text("reason").into(),
        target(object, names.object).into(),
        text_at(object, &[names.object, "fieldPath"]).into(),
        source(object, names).into(),
        text(names.message).trim().into(),
        first.into(),
        count.into(),
        name(object).into(),
    ]
}

fn target(object: &Value, key: &str) -> String {
    let kind = text_at(object, &[key, "kind"]).to_lowercase();
    match text_at(object, &[key, "name"]) {
        "" => kind,
        name => format!("{kind}/{name}"),
    }
}

fn source(object: &Value, names: &Names) -> String {
    let either = |key: &str, other: &str| match value_at(object, &[names.source, key]).and_then(Value::as_str) {
        Some(text) if !text.is_empty() => text.to_owned(),
        _ => text_at(object, &[other]).to_owned(),
    };
    let (component, instance) = (either("component", names.controller), either("host", "reportingInstance"));
    if instance.is_empty() { component } else { format!("{component}, {instance}") }
}
