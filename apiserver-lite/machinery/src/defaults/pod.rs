//! Defaults of Pods: policies, containers, probes and volumes.

use serde_json::{Map, Value};

use super::{each, fill, fill_number, fill_text, within, within_made};

type Object = Map<String, Value>;

/// File mode 0644, for files that volumes project.
const FILE_MODE: i64 = 0o644;

pub(super) fn apply(pod: &mut Object) {
    within_made(pod, "spec", |spec| {
        let host_network = spec.get("hostNetwork").and_then(Value::as_bool) == Some(true);
        fill(spec, "enableServiceLinks", true);
        fill_text(spec, "restartPolicy", "Always");
        fill_text(spec, "dnsPolicy", "ClusterFirst");
        fill_text(spec, "schedulerName", "default-scheduler");
        fill(spec, "terminationGracePeriodSeconds", 30);
        fill(spec, "securityContext", Object::new());
        for list in ["initContainers", "containers", "ephemeralContainers"] {
            each(spec, list, |it| container(it, host_network));
        }
        each(spec, "volumes", volume);
    });
    within_made(pod, "status", |status| fill_text(status, "phase", "Pending"));
}

fn container(container: &mut Object, host_network: bool) {
    fill_text(container, "terminationMessagePath", "/dev/termination-log");
    fill_text(container, "terminationMessagePolicy", "File");
    let image = container.get("image").and_then(Value::as_str).unwrap_or_default();
    let policy = if is_latest(image) { "Always" } else { "IfNotPresent" };
    fill_text(container, "imagePullPolicy", policy);
    within_made(container, "resources", requests);
    each(container, "ports", |port| {
        fill_text(port, "protocol", "TCP");
        if let (true, Some(number)) = (host_network, port.get("containerPort").and_then(Value::as_i64)) {
            fill_number(port, "hostPort", number);
        }
    });
    each(container, "env", |variable| {
        within(variable, "valueFrom", |source| within(source, "fieldRef", field_reference));
    });
    for kind in ["livenessProbe", "readinessProbe", "startupProbe"] {
        within(container, kind, probe);
    }
    within(container, "lifecycle", |lifecycle| {
        within(lifecycle, "postStart", handler);
        within(lifecycle, "preStop", handler);
    });
}

/// An image without a digest whose tag is `latest` or absent; the tag follows the last colon after the last slash.
fn is_latest(image: &str) -> bool {
    let name = image.rsplit('/').next().unwrap_or_default();
    !name.contains('@') && name.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

/// A limit without a request is also the request.
fn requests(resources: &mut Object) {
    let Some(Value::Object(limits)) = resources.get("limits").cloned() else { return };
    if limits.is_empty() {
        return;
    }
    within_made(resources, "requests", |requests| {
        for (name, quantity) in limits {
            fill(requests, &name, quantity);
        }
    });
}

fn probe(probe: &mut Object) {
    fill_number(probe, "timeoutSeconds", 1);
    fill_number(probe, "periodSeconds", 10);
    fill_number(probe, "successThreshold", 1);
    fill_number(probe, "failureThreshold", 3);
    handler(probe);
    within(probe, "grpc", |grpc| fill(grpc, "service", ""));
}

fn handler(handler: &mut Object) {
    within(handler, "httpGet", |get| {
        fill_text(get, "path", "/");
        fill_text(get, "scheme", "HTTP");
    });
}

fn field_reference(reference: &mut Object) {
    fill_text(reference, "apiVersion", "v1");
}

fn volume(volume: &mut Object) {
    if volume.keys().all(|key| key == "name") {
        fill(volume, "emptyDir", Object::new());
    }
    for kind in ["secret", "configMap", "downwardAPI", "projected"] {
        within(volume, kind, |source| fill(source, "defaultMode", FILE_MODE));
    }
    within(volume, "hostPath", |source| fill(source, "type", ""));
    within(volume, "downwardAPI", |source| each(source, "items", |item| within(item, "fieldRef", field_reference)));
    within(volume, "projected", |projected| {
        each(projected, "sources", |source| {
            within(source, "serviceAccountToken", |token| fill(token, "expirationSeconds", 3600));
            within(source, "downwardAPI", |api| each(api, "items", |item| within(item, "fieldRef", field_reference)));
        });
    });
}
