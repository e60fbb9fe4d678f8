//! Which columns each kind has, and which function fills them.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::duration::age;
use super::{event, network, node, pod};
use crate::meta::{name, text_at};
use crate::schema::Resource;

/// A column.
pub(super) struct Column {
    name: &'static str,
    format: &'static str,
    priority: i32,
}

impl Column {
    pub(super) fn definition(&self) -> Value {
        json!({
            "name": self.name, "type": "string", "format": self.format, "description": "", "priority": self.priority,
        })
    }
}

/// Makes the cells of one object.
type Cells = fn(&Value, Timestamp) -> Vec<Value>;

/// The columns of a kind; `cells` gives one cell for each.
pub(super) struct Layout {
    pub(super) columns: &'static [Column],
    pub(super) cells: Cells,
    pub(super) conditions: fn(&Value) -> Option<Value>,
}

/// The column that names the object.
const NAME: Column = Column { name: "Name", format: "name", priority: 0 };

const fn usual(name: &'static str) -> Column {
    Column { name, format: "", priority: 0 }
}

/// A column of `-o wide`.
const fn wide(name: &'static str) -> Column {
    Column { name, format: "", priority: 1 }
}

const AGE: Column = usual("Age");

const PODS: &[Column] = &[
    NAME,
    usual("Ready"),
    usual("Status"),
    usual("Restarts"),
    AGE,
    wide("IP"),
    wide("Node"),
    wide("Nominated Node"),
    wide("Readiness Gates"),
];
const SERVICES: &[Column] =
    &[NAME, usual("Type"), usual("Cluster-IP"), usual("External-IP"), usual("Port(s)"), AGE, wide("Selector")];
const NODES: &[Column] = &[
    NAME,
    usual("Status"),
    usual("Roles"),
    AGE,
    usual("Version"),
    wide("Internal-IP"),
    wide("External-IP"),
    wide("OS-Image"),
    wide("Kernel-Version"),
    wide("Container-Runtime"),
];
const EVENTS: &[Column] = &[
    usual("Last Seen"),
    usual("Type"),
    usual("Reason"),
    usual("Object"),
    wide("Subobject"),
    wide("Source"),
    usual("Message"),
    wide("First Seen"),
    wide("Count"),
    Column { name: "Name", format: "name", priority: 1 },
];

/// The layout of a resource; name and age for kinds without one of their own.
pub(super) fn of(resource: &Resource) -> Layout {
    let none = |_: &Value| None;
    let (columns, cells): (&'static [Column], Cells) = match (resource.group, resource.plural) {
        ("", "pods") => return Layout { columns: PODS, cells: pod::cells, conditions: pod::conditions },
        ("", "services") => (SERVICES, network::service),
        ("", "nodes") => (NODES, node::cells),
        ("", "events") => (EVENTS, event::cells),
        ("events.k8s.io", "events") => (EVENTS, event::cells_of_own_group),
        ("", "endpoints") => (const { &[NAME, usual("Endpoints"), AGE] }, network::endpoints),
        ("discovery.k8s.io", "endpointslices") => {
            (const { &[NAME, usual("AddressType"), usual("Ports"), usual("Endpoints"), AGE] }, network::endpoint_slice)
        }
        ("", "namespaces") => (const { &[NAME, usual("Status"), AGE] }, namespace),
        ("", "configmaps") => (const { &[NAME, usual("Data"), AGE] }, config_map),
        ("", "secrets") => (const { &[NAME, usual("Type"), usual("Data"), AGE] }, secret),
        ("coordination.k8s.io", "leases") => (const { &[NAME, usual("Holder"), AGE] }, lease),
        ("networking.k8s.io", "servicecidrs") => (const { &[NAME, usual("CIDRs"), AGE] }, network::service_cidr),
        ("networking.k8s.io", "ipaddresses") => (const { &[NAME, usual("ParentRef"), AGE] }, network::ip_address),
        _ => (const { &[NAME, AGE] }, |object, now| vec![name(object).into(), age(object, now)]),
    };
    Layout { columns, cells, conditions: none }
}

fn namespace(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object).into(), text_at(object, &["status", "phase"]).into(), age(object, now)]
}

fn entries(object: &Value, key: &str) -> usize {
    object.get(key).and_then(Value::as_object).map_or(0, serde_json::Map::len)
}

fn config_map(object: &Value, now: Timestamp) -> Vec<Value> {
    let count = entries(object, "data") + entries(object, "binaryData");
    vec![name(object).into(), count.into(), age(object, now)]
}

fn secret(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object).into(), text_at(object, &["type"]).into(), entries(object, "data").into(), age(object, now)]
}

fn lease(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object).into(), text_at(object, &["spec", "holderIdentity"]).into(), age(object, now)]
}
