//! Rows of Pods: readiness, one word of status drawn from all containers, restarts.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::duration::{age, since};
use crate::meta::{deletion_timestamp, name, text_at, value_at};

pub(super) fn cells(pod: &Value, now: Timestamp) -> Vec<Value> {
    let summary = Summary::of(pod);
    let text = |path: &[&str]| match text_at(pod, path) {
        "" => "<none>".to_owned(),
        text => text.to_owned(),
    };
    let ip = pod.pointer("/status/podIPs/0/ip").and_then(Value::as_str).unwrap_or("<none>");
    vec![
        name(pod).into(),
        format!("{}/{}", summary.ready, summary.total).into(),
        summary.reason.as_str().into(),
        summary.restarts(now).into(),
        age(pod, now),
        ip.into(),
        text(&["spec", "nodeName"]).into(),
        text(&["status", "nominatedNodeName"]).into(),
        readiness_gates(pod).into(),
    ]
}

/// Finished pods are marked, so that clients can grey them out.
pub(super) fn conditions(pod: &Value) -> Option<Value> {
    let message = match text_at(pod, &["status", "phase"]) {
        "Succeeded" => "every container ended well",
        "Failed" => "a container failed",
        _ => return None,
    };
    let reason = text_at(pod, &["status", "phase"]);
    Some(json!([{"type": "Completed", "status": "True", "reason": reason, "message": message}]))
}

struct Summary {
    ready: usize,
    total: usize,
    reason: String,
    restarts: i64,
    /// When a container last ended before it was restarted; RFC 3339 in UTC sorts as text.
    last_end: String,
}

impl Summary {
    fn of(pod: &Value) -> Self {
        let phase = text_at(pod, &["status", "phase"]);
        let mut summary = Self {
            ready: 0,
            total: items(pod, &["spec", "containers"]).len(),
            reason: phase.to_owned(),
            restarts: 0,
            last_end: String::new(),
        };
        if !text_at(pod, &["status", "reason"]).is_empty() {
            text_at(pod, &["status", "reason"]).clone_into(&mut summary.reason);
        }
        if condition(pod, "PodScheduled").is_some_and(|it| text_at(it, &["reason"]) == "SchedulingGated") {
            "SchedulingGated".clone_into(&mut summary.reason);
        }
        let sidecars = summary.read_init_containers(pod);
        let initialized = condition_is_true(pod, "Initialized");
        if !sidecars.initializing || initialized {
            summary.restarts = sidecars.restarts;
            summary.last_end = sidecars.last_end;
            summary.read_containers(pod);
        }
        summary.read_deletion(pod, phase);
        summary
    }

    fn read_init_containers(&mut self, pod: &Value) -> Sidecars {
        let specs = items(pod, &["spec", "initContainers"]);
        let is_sidecar = |name: &str| {
            let spec = specs.iter().find(|spec| text_at(spec, &["name"]) == name);
            spec.is_some_and(|spec| text_at(spec, &["restartPolicy"]) == "Always")
        };
        self.total += specs.iter().filter(|spec| is_sidecar(text_at(spec, &["name"]))).count();
        let mut sidecars = Sidecars::default();
        for (index, status) in items(pod, &["status", "initContainerStatuses"]).iter().enumerate() {
            self.count_restarts(status);
            let sidecar = is_sidecar(text_at(status, &["name"]));
            if sidecar {
                sidecars.restarts += restart_count(status);
                sidecars.last_end = sidecars.last_end.max(last_end(status).to_owned());
            }
            if exit_code(status) == Some(0) {
                continue;
            }
            if sidecar && flag(status, "started") {
                self.ready += usize::from(flag(status, "ready"));
                continue;
            }
            self.reason = init_reason(status, index, specs.len());
            sidecars.initializing = true;
            break;
        }
        sidecars
    }

    fn read_containers(&mut self, pod: &Value) {
        let mut running = false;
        let mut error = None;
        for status in items(pod, &["status", "containerStatuses"]).iter().rev() {
            self.count_restarts(status);
            let waiting = text_at(status, &["state", "waiting", "reason"]);
            if !waiting.is_empty() {
                waiting.clone_into(&mut self.reason);
            } else if let Some(code) = exit_code(status) {
                self.reason = end_reason(status, code);
                if code != 0 {
                    error = Some(self.reason.clone());
                }
            } else if flag(status, "ready") && value_at(status, &["state", "running"]).is_some() {
                running = true;
                self.ready += 1;
            }
        }
        if self.reason != "Completed" {
            return;
        }
        // One container ended well, but the pod as a whole goes on or failed elsewhere.
        if running && condition_is_true(pod, "Ready") {
            "Running".clone_into(&mut self.reason);
        } else if let Some(error) = error {
            self.reason = error;
        } else if running {
            "NotReady".clone_into(&mut self.reason);
        }
    }

    fn read_deletion(&mut self, pod: &Value, phase: &str) {
        if deletion_timestamp(pod).is_none() {
            return;
        }
        if text_at(pod, &["status", "reason"]) == "NodeLost" {
            "Unknown".clone_into(&mut self.reason);
        } else if !matches!(phase, "Succeeded" | "Failed") {
            "Terminating".clone_into(&mut self.reason);
        }
    }

    fn count_restarts(&mut self, status: &Value) {
        self.restarts += restart_count(status);
        if last_end(status) > self.last_end.as_str() {
            last_end(status).clone_into(&mut self.last_end);
        }
    }

    fn restarts(&self, now: Timestamp) -> String {
        if self.restarts == 0 || self.last_end.is_empty() {
            return self.restarts.to_string();
        }
        format!("{} ({} ago)", self.restarts, since(&self.last_end, now))
    }
}

/// What init containers that keep running have seen.
#[derive(Default)]
struct Sidecars {
    initializing: bool,
    restarts: i64,
    last_end: String,
}

fn init_reason(status: &Value, index: usize, total: usize) -> String {
    if let Some(code) = exit_code(status) {
        return format!("Init:{}", end_reason(status, code));
    }
    match text_at(status, &["state", "waiting", "reason"]) {
        "" | "PodInitializing" => format!("Init:{index}/{total}"),
        reason => format!("Init:{reason}"),
    }
}

fn end_reason(status: &Value, code: i64) -> String {
    let ended = |key: &str| value_at(status, &["state", "terminated", key]);
    let reason = ended("reason").and_then(Value::as_str).unwrap_or_default();
    match ended("signal").and_then(Value::as_i64).unwrap_or_default() {
        _ if !reason.is_empty() => reason.to_owned(),
        0 => format!("ExitCode:{code}"),
        signal => format!("Signal:{signal}"),
    }
}

fn exit_code(status: &Value) -> Option<i64> {
    let ended = value_at(status, &["state", "terminated"])?;
    Some(ended.get("exitCode").and_then(Value::as_i64).unwrap_or_default())
}

fn restart_count(status: &Value) -> i64 {
    status.get("restartCount").and_then(Value::as_i64).unwrap_or_default()
}

fn last_end(status: &Value) -> &str {
    text_at(status, &["lastState", "terminated", "finishedAt"])
}

fn flag(status: &Value, key: &str) -> bool {
    status.get(key).and_then(Value::as_bool) == Some(true)
}

fn condition<'a>(pod: &'a Value, kind: &str) -> Option<&'a Value> {
    items(pod, &["status", "conditions"]).iter().find(|condition| text_at(condition, &["type"]) == kind)
}

fn condition_is_true(pod: &Value, kind: &str) -> bool {
    condition(pod, kind).is_some_and(|condition| text_at(condition, &["status"]) == "True")
}

fn readiness_gates(pod: &Value) -> String {
    let gates = items(pod, &["spec", "readinessGates"]);
    if gates.is_empty() {
        return "<none>".to_owned();
    }
    let open = gates.iter().filter(|gate| condition_is_true(pod, text_at(gate, &["conditionType"]))).count();
    format!("{open}/{}", gates.len())
}

fn items<'a>(object: &'a Value, path: &[&str]) -> &'a [Value] {
    value_at(object, path).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}
