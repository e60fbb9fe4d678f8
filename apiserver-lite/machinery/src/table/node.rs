//! Rows of Nodes.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;

use super::duration::age;
use crate::meta::{labels, name, text_at, value_at};

const ROLE_PREFIX: &str = "node-role.kubernetes.io/";
const ROLE_LABEL: &str = "kubernetes.io/role";

pub(super) fn cells(object: &Value, now: Timestamp) -> Vec<Value> {
    let info = |key: &str| text_at(object, &["status", "nodeInfo", key]);
    let known = |text: &str| if text.is_empty() { "<unknown>".to_owned() } else { text.to_owned() };
    let mut kernel = known(info("kernelVersion"));
    if !info("architecture").is_empty() {
        kernel = format!("{kernel} ({})", info("architecture"));
    }
    vec![
        name(object).into(),
        status(object).into(),
        roles(object).into(),
        age(object, now),
        info("kubeletVersion").into(),
        address(object, "InternalIP").into(),
        address(object, "ExternalIP").into(),
        known(info("osImage")).into(),
        kernel.into(),
        known(info("containerRuntimeVersion")).into(),
    ]
}

fn status(object: &Value) -> String {
    let conditions = value_at(object, &["status", "conditions"]).and_then(Value::as_array);
    let ready = conditions.into_iter().flatten().find(|condition| text_at(condition, &["type"]) == "Ready");
    let ready = match ready.map(|condition| text_at(condition, &["status"])) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    };
    let unschedulable = value_at(object, &["spec", "unschedulable"]).and_then(Value::as_bool) == Some(true);
    if unschedulable { format!("{ready},SchedulingDisabled") } else { ready.to_owned() }
}

fn roles(object: &Value) -> String {
    let mut roles = BTreeSet::new();
    for (key, value) in labels(object).into_iter().flatten() {
        match key.strip_prefix(ROLE_PREFIX) {
            Some(role) => roles.insert(role),
            None if key == ROLE_LABEL => roles.insert(value.as_str().unwrap_or_default()),
            None => false,
        };
    }
    roles.remove("");
    let roles: Vec<&str> = roles.into_iter().collect();
    if roles.is_empty() { "<none>".to_owned() } else { roles.join(",") }
}

fn address<'a>(object: &'a Value, kind: &str) -> &'a str {
    let addresses = value_at(object, &["status", "addresses"]).and_then(Value::as_array);
    let mut addresses = addresses.into_iter().flatten();
    let found = addresses.find(|address| text_at(address, &["type"]) == kind);
    found.map_or("<none>", |address| text_at(address, &["address"]))
}
