//! Rows as `kubectl get` shows them.
#![expect(clippy::needless_pass_by_value, reason = "tables of cases read better without references to temporaries")]

use serde_json::json;

use super::*;
use crate::schema::registry;

const NOW: &str = "2026-01-02T00:00:00Z";

fn table(group: &str, plural: &str, object: &Value, include: IncludeObject) -> Value {
    let resource = registry().resource(group, "v1", plural).unwrap();
    render(resource, [object], &json!({"resourceVersion": "7"}), include, NOW.parse().unwrap())
}

/// The cells of an object that was made 5 minutes ago.
fn check(group: &str, plural: &str, object: Value, wanted: Value) {
    let mut object = object;
    crate::meta::set(&mut object, "name", "x");
    crate::meta::set(&mut object, "creationTimestamp", "2026-01-01T23:55:00Z");
    let table = table(group, plural, &object, IncludeObject::None);
    assert_eq!(table["rows"][0]["cells"], wanted);
    let columns = table["columnDefinitions"].as_array().unwrap().len();
    assert_eq!(columns, wanted.as_array().unwrap().len(), "{plural}: one cell per column");
}

#[test]
fn services() {
    check(
        "",
        "services",
        json!({"spec": {
            "type": "NodePort", "clusterIPs": ["10.0.0.1", "fd00::1"], "selector": {"app": "web", "tier": "a"},
            "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}, {"port": 53, "protocol": "UDP"}],
        }}),
        json!(["x", "NodePort", "10.0.0.1", "<none>", "80:30080/TCP,53/UDP", "5m", "app=web,tier=a"]),
    );
    check(
        "",
        "services",
        json!({"spec": {"type": "LoadBalancer", "clusterIPs": ["None"], "externalIPs": ["9.9.9.9"]},
               "status": {"loadBalancer": {"ingress": [{"hostname": "b"}, {"ip": "1.1.1.1"}]}}}),
        json!(["x", "LoadBalancer", "None", "1.1.1.1,b,9.9.9.9", "<none>", "5m", "<none>"]),
    );
    check(
        "",
        "services",
        json!({"spec": {"type": "LoadBalancer"}}),
        json!(["x", "LoadBalancer", "<none>", "<pending>", "<none>", "5m", "<none>"]),
    );
    check(
        "",
        "services",
        json!({"spec": {"type": "ExternalName", "externalName": "e.org"}}),
        json!(["x", "ExternalName", "<none>", "e.org", "<none>", "5m", "<none>"]),
    );
}

#[test]
fn endpoints() {
    let ips = |count: usize| (1..=count).map(|n| json!({"ip": format!("10.0.0.{n}")})).collect::<Vec<_>>();
    check("", "endpoints", json!({}), json!(["x", "<none>", "5m"]));
    check(
        "",
        "endpoints",
        json!({"subsets": [{"addresses": ips(2), "ports": [{"port": 80}, {"port": 81}]}, {"addresses": [{"ip": "fd00::1"}]}]}),
        json!(["x", "10.0.0.1:80,10.0.0.2:80,10.0.0.1:81 + 2 more...", "5m"]),
    );
    check(
        "",
        "endpoints",
        json!({"subsets": [{"addresses": [{"ip": "fd00::1"}], "ports": [{"port": 80}]}]}),
        json!(["x", "[fd00::1]:80", "5m"]),
    );
}

#[test]
fn endpoint_slices() {
    check(
        "discovery.k8s.io",
        "endpointslices",
        json!({"addressType": "IPv4", "ports": [{"port": 80}, {"name": "n"}, {}],
               "endpoints": [{"addresses": ["1.1.1.1"]}, {"addresses": ["1.1.1.2"]}, {"addresses": ["1.1.1.3"]}, {"addresses": ["1.1.1.4"]}]}),
        json!(["x", "IPv4", "80,n,*", "1.1.1.1,1.1.1.2,1.1.1.3 + 1 more...", "5m"]),
    );
    check(
        "discovery.k8s.io",
        "endpointslices",
        json!({"addressType": "IPv6"}),
        json!(["x", "IPv6", "<unset>", "<unset>", "5m"]),
    );
}

#[test]
fn pods() {
    check(
        "",
        "pods",
        json!({
            "spec": {"containers": [{"name": "a"}, {"name": "b"}], "nodeName": "n1", "readinessGates": [{"conditionType": "g"}]},
            "status": {
                "phase": "Running", "podIPs": [{"ip": "10.1.1.1"}],
                "conditions": [{"type": "g", "status": "True"}],
                "containerStatuses": [
                    {"name": "a", "ready": true, "state": {"running": {}}, "restartCount": 2,
                     "lastState": {"terminated": {"finishedAt": "2026-01-01T23:59:00Z"}}},
                    {"name": "b", "state": {"waiting": {"reason": "CrashLoopBackOff"}}},
                ],
            },
        }),
        json!(["x", "1/2", "CrashLoopBackOff", "2 (60s ago)", "5m", "10.1.1.1", "n1", "<none>", "1/1"]),
    );
}

#[test]
fn pod_status_words() {
    let status = |pod: Value| {
        let table = table("", "pods", &pod, IncludeObject::None);
        table["rows"][0]["cells"][2].as_str().unwrap().to_owned()
    };
    let ended = |code: i64, reason: &str| json!({"state": {"terminated": {"exitCode": code, "reason": reason}}});
    assert_eq!(status(json!({"status": {"phase": "Pending"}})), "Pending");
    assert_eq!(status(json!({"status": {"phase": "Failed", "reason": "Evicted"}})), "Evicted");
    assert_eq!(status(json!({"metadata": {"deletionTimestamp": NOW}, "status": {"phase": "Running"}})), "Terminating");
    assert_eq!(
        status(json!({"status": {"phase": "Pending", "initContainerStatuses": [ended(1, "")]}})),
        "Init:ExitCode:1"
    );
    assert_eq!(
        status(json!({
            "spec": {"initContainers": [{"name": "i"}, {"name": "j"}]},
            "status": {"phase": "Pending", "initContainerStatuses": [ended(0, "Completed"), {"name": "j"}]},
        })),
        "Init:1/2"
    );
    let running = json!({"ready": true, "state": {"running": {}}});
    assert_eq!(
        status(json!({"status": {
            "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [ended(0, "Completed"), running],
        }})),
        "Running"
    );
    assert_eq!(status(json!({"status": {"containerStatuses": [ended(0, "Completed"), ended(2, "Error")]}})), "Error");
}

#[test]
fn nodes() {
    check(
        "",
        "nodes",
        json!({
            "metadata": {"labels": {"node-role.kubernetes.io/worker": "", "kubernetes.io/role": "edge"}},
            "spec": {"unschedulable": true},
            "status": {
                "conditions": [{"type": "Ready", "status": "True"}], "addresses": [{"type": "InternalIP", "address": "1.1.1.1"}],
                "nodeInfo": {"kubeletVersion": "v1.36.0", "kernelVersion": "6.1", "architecture": "amd64"},
            },
        }),
        json!([
            "x",
            "Ready,SchedulingDisabled",
            "edge,worker",
            "5m",
            "v1.36.0",
            "1.1.1.1",
            "<none>",
            "<unknown>",
            "6.1 (amd64)",
            "<unknown>"
        ]),
    );
    check(
        "",
        "nodes",
        json!({}),
        json!(["x", "Unknown", "<none>", "5m", "", "<none>", "<none>", "<unknown>", "<unknown>", "<unknown>"]),
    );
}

#[test]
fn events() {
    check(
        "",
        "events",
        json!({
            "type": "Warning", "reason": "Full", "message": " no room\n", "involvedObject": {"kind": "Service", "name": "web"},
            "source": {"component": "proxy", "host": "n1"}, "lastTimestamp": "2026-01-01T23:59:50Z",
            "firstTimestamp": "2026-01-01T23:50:00Z", "count": 3,
        }),
        json!(["10s", "Warning", "Full", "service/web", "", "proxy, n1", "no room", "10m", 3, "x"]),
    );
    check(
        "events.k8s.io",
        "events",
        json!({
            "type": "Normal", "reason": "Made", "note": "made", "regarding": {"kind": "Pod", "name": "p"},
            "reportingController": "c", "eventTime": "2026-01-01T23:59:00.000000Z",
        }),
        json!(["60s", "Normal", "Made", "pod/p", "", "c", "made", "60s", 1, "x"]),
    );
}

#[test]
fn small_kinds() {
    check("", "namespaces", json!({"status": {"phase": "Active"}}), json!(["x", "Active", "5m"]));
    check("", "configmaps", json!({"data": {"a": "", "b": ""}, "binaryData": {"c": ""}}), json!(["x", 3, "5m"]));
    check("", "secrets", json!({"type": "Opaque", "data": {"a": ""}}), json!(["x", "Opaque", 1, "5m"]));
    check("", "serviceaccounts", json!({}), json!(["x", "5m"]));
    check("coordination.k8s.io", "leases", json!({"spec": {"holderIdentity": "me"}}), json!(["x", "me", "5m"]));
    check("networking.k8s.io", "servicecidrs", json!({"spec": {"cidrs": ["a", "b"]}}), json!(["x", "a,b", "5m"]));
    check(
        "networking.k8s.io",
        "ipaddresses",
        json!({"spec": {"parentRef": {"resource": "services", "namespace": "default", "name": "web"}}}),
        json!(["x", "services/default/web", "5m"]),
    );
}

#[test]
fn rows_carry_what_was_asked_for() {
    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": "b"}});
    let carried = |include| table("", "configmaps", &object, include)["rows"][0]["object"].clone();
    assert_eq!(
        carried(IncludeObject::Metadata),
        json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": {"name": "x"}})
    );
    assert_eq!(carried(IncludeObject::Object), object);
    assert_eq!(carried(IncludeObject::None), Value::Null);
    assert_eq!(IncludeObject::parse("Nope").unwrap_err().code, 400);
    let table = table("", "configmaps", &object, IncludeObject::None);
    assert_eq!((&table["kind"], &table["metadata"]), (&json!("Table"), &json!({"resourceVersion": "7"})));
    assert_eq!(table["rows"][0]["cells"][2], "<unknown>");
}
