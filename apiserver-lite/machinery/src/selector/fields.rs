//! Which fields each kind can be selected by, and their values when the object does not say.

use serde_json::Value;

use crate::meta::text_at;
use crate::schema::Resource;

/// A selectable field: the label in the selector, how to read it, and (for `events.k8s.io`) under which other label it is known.
#[derive(Clone, Copy, Debug)]
pub(super) struct Selectable {
    pub(super) label: &'static str,
    read: Read,
}

#[derive(Clone, Copy, Debug)]
enum Read {
    /// A text field, empty when absent.
    Text(&'static [&'static str]),
    /// A boolean, false when absent.
    Flag(&'static [&'static str]),
    /// The first of these texts that is not empty.
    First(&'static [&'static [&'static str]]),
    /// The first pod address.
    PodIp,
}

impl PartialEq for Selectable {
    fn eq(&self, other: &Self) -> bool {
        self.label == other.label
    }
}

impl Eq for Selectable {}

impl Selectable {
    const fn text(label: &'static str, path: &'static [&'static str]) -> Self {
        Self { label, read: Read::Text(path) }
    }

    /// The value that a selector compares.
    pub(super) fn value<'a>(&self, object: &'a Value) -> &'a str {
        match self.read {
            Read::Text(path) => text_at(object, path),
            Read::Flag(path) => match crate::meta::value_at(object, path) {
                Some(Value::Bool(true)) => "true",
                _ => "false",
            },
            Read::First(paths) => {
                paths.iter().map(|path| text_at(object, path)).find(|text| !text.is_empty()).unwrap_or_default()
            }
            Read::PodIp => pod_ip(object),
        }
    }
}

fn pod_ip(object: &Value) -> &str {
    let first = object.pointer("/status/podIPs/0/ip").and_then(Value::as_str);
    first.unwrap_or_else(|| text_at(object, &["status", "podIP"]))
}

const NAME: Selectable = Selectable::text("metadata.name", &["metadata", "name"]);
const NAMESPACE: Selectable = Selectable::text("metadata.namespace", &["metadata", "namespace"]);

const ANY: &[Selectable] = &[NAME, NAMESPACE];

const PODS: &[Selectable] = &[
    NAME,
    NAMESPACE,
    Selectable::text("spec.nodeName", &["spec", "nodeName"]),
    Selectable::text("spec.restartPolicy", &["spec", "restartPolicy"]),
    Selectable::text("spec.schedulerName", &["spec", "schedulerName"]),
    Selectable::text("spec.serviceAccountName", &["spec", "serviceAccountName"]),
    Selectable { label: "spec.hostNetwork", read: Read::Flag(&["spec", "hostNetwork"]) },
    Selectable::text("status.phase", &["status", "phase"]),
    Selectable { label: "status.podIP", read: Read::PodIp },
    Selectable { label: "status.podIPs", read: Read::PodIp },
    Selectable::text("status.nominatedNodeName", &["status", "nominatedNodeName"]),
];

const NODES: &[Selectable] =
    &[NAME, Selectable { label: "spec.unschedulable", read: Read::Flag(&["spec", "unschedulable"]) }];

const SERVICES: &[Selectable] = &[
    NAME,
    NAMESPACE,
    Selectable::text("spec.clusterIP", &["spec", "clusterIP"]),
    Selectable::text("spec.type", &["spec", "type"]),
];

const NAMESPACES: &[Selectable] = &[NAME, Selectable::text("status.phase", &["status", "phase"])];

const SECRETS: &[Selectable] = &[NAME, NAMESPACE, Selectable::text("type", &["type"])];

const EVENTS: &[Selectable] = &[
    NAME,
    NAMESPACE,
    Selectable::text("involvedObject.kind", &["involvedObject", "kind"]),
    Selectable::text("involvedObject.namespace", &["involvedObject", "namespace"]),
    Selectable::text("involvedObject.name", &["involvedObject", "name"]),
    Selectable::text("involvedObject.uid", &["involvedObject", "uid"]),
    Selectable::text("involvedObject.apiVersion", &["involvedObject", "apiVersion"]),
    Selectable::text("involvedObject.resourceVersion", &["involvedObject", "resourceVersion"]),
    Selectable::text("involvedObject.fieldPath", &["involvedObject", "fieldPath"]),
    Selectable::text("reason", &["reason"]),
    Selectable::text("reportingComponent", &["reportingComponent"]),
    Selectable { label: "source", read: Read::First(&[&["source", "component"], &["reportingComponent"]]) },
    Selectable::text("type", &["type"]),
];

const EVENTS_IN_OWN_GROUP: &[Selectable] = &[
    NAME,
    NAMESPACE,
    Selectable::text("regarding.kind", &["regarding", "kind"]),
    Selectable::text("regarding.namespace", &["regarding", "namespace"]),
    Selectable::text("regarding.name", &["regarding", "name"]),
    Selectable::text("regarding.uid", &["regarding", "uid"]),
    Selectable::text("regarding.apiVersion", &["regarding", "apiVersion"]),
    Selectable::text("regarding.resourceVersion", &["regarding", "resourceVersion"]),
    Selectable::text("regarding.fieldPath", &["regarding", "fieldPath"]),
    Selectable::text("reason", &["reason"]),
    Selectable::text("reportingController", &["reportingController"]),
    Selectable::text("type", &["type"]),
];

/// The selectable fields of a resource.
pub(super) fn of(resource: &Resource) -> &'static [Selectable] {
    match (resource.group, resource.plural) {
        ("", "pods") => PODS,
        ("", "nodes") => NODES,
        ("", "services") => SERVICES,
        ("", "namespaces") => NAMESPACES,
        ("", "secrets") => SECRETS,
        ("", "events") => EVENTS,
        ("events.k8s.io", "events") => EVENTS_IN_OWN_GROUP,
        _ => ANY,
    }
}

/// The text that refuses another label.
pub(super) fn unsupported(resource: &Resource, label: &str) -> String {
    if std::ptr::eq(of(resource), ANY) {
        let label = crate::field::quote(label);
        return format!("{label} is not a known field selector: only \"metadata.name\", \"metadata.namespace\"");
    }
    format!("field label not supported: {label}")
}
