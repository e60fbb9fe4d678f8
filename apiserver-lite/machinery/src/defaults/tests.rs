//! Defaults of each kind, and that applying them twice changes nothing.
#![expect(clippy::needless_pass_by_value, reason = "tables of cases read better without references to temporaries")]

use serde_json::json;

use super::*;
use crate::schema::registry;

fn check(group: &str, plural: &str, object: Value, wanted: Value) {
    let resource = registry().resource(group, "v1", plural).unwrap();
    let mut defaulted = object;
    apply(resource, &mut defaulted);
    assert_eq!(defaulted, wanted);
    apply(resource, &mut defaulted);
    assert_eq!(defaulted, wanted, "not idempotent");
}

#[test]
fn cluster_ip_service() {
    check(
        "",
        "services",
        json!({"spec": {"ports": [{"port": 80}, {"port": 53, "protocol": "UDP", "targetPort": "dns", "nodePort": 0}]}}),
        json!({
            "spec": {
                "type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                "ports": [
                    {"port": 80, "protocol": "TCP", "targetPort": 80},
                    {"port": 53, "protocol": "UDP", "targetPort": "dns"},
                ],
            },
            "status": {"loadBalancer": {}},
        }),
    );
}

#[test]
fn other_service_types() {
    check(
        "",
        "services",
        json!({"spec": {"type": "NodePort", "sessionAffinity": "ClientIP"}}),
        json!({
            "spec": {
                "type": "NodePort", "sessionAffinity": "ClientIP", "internalTrafficPolicy": "Cluster",
                "externalTrafficPolicy": "Cluster", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}},
            },
            "status": {"loadBalancer": {}},
        }),
    );
    check(
        "",
        "services",
        json!({"spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "sessionAffinityConfig": {"clientIP": {}}}}),
        json!({
            "spec": {
                "type": "LoadBalancer", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                "externalTrafficPolicy": "Local", "allocateLoadBalancerNodePorts": true,
            },
            "status": {"loadBalancer": {}},
        }),
    );
    check(
        "",
        "services",
        json!({"spec": {"type": "ExternalName", "externalName": "x.org"}}),
        json!({
            "spec": {"type": "ExternalName", "externalName": "x.org", "sessionAffinity": "None"},
            "status": {"loadBalancer": {}},
        }),
    );
    check(
        "",
        "services",
        json!({"spec": {"externalIPs": ["1.2.3.4"]}}),
        json!({
            "spec": {
                "type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                "externalTrafficPolicy": "Cluster", "externalIPs": ["1.2.3.4"],
            },
            "status": {"loadBalancer": {}},
        }),
    );
}

#[test]
fn pods() {
    check(
        "",
        "pods",
        json!({"spec": {
            "hostNetwork": true,
            "containers": [{
                "name": "c", "image": "r:5000/a/b", "ports": [{"containerPort": 80}],
                "resources": {"limits": {"cpu": "1"}},
                "readinessProbe": {"httpGet": {"port": 80}},
                "env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
            }],
            "volumes": [{"name": "v"}, {"name": "s", "secret": {"secretName": "x"}}],
        }}),
        json!({
            "spec": {
                "hostNetwork": true, "enableServiceLinks": true, "restartPolicy": "Always", "dnsPolicy": "ClusterFirst",
                "schedulerName": "default-scheduler", "terminationGracePeriodSeconds": 30, "securityContext": {},
                "containers": [{
                    "name": "c", "image": "r:5000/a/b", "imagePullPolicy": "Always",
                    "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                    "ports": [{"containerPort": 80, "hostPort": 80, "protocol": "TCP"}],
                    "resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "1"}},
                    "readinessProbe": {
                        "httpGet": {"port": 80, "path": "/", "scheme": "HTTP"},
                        "timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3,
                    },
                    "env": [{"name": "A", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}}}],
                }],
                "volumes": [{"name": "v", "emptyDir": {}}, {"name": "s", "secret": {"secretName": "x", "defaultMode": 420}}],
            },
            "status": {"phase": "Pending"},
        }),
    );
}

#[test]
fn pull_policies() {
    let resource = registry().resource("", "v1", "pods").unwrap();
    for (image, wanted) in [
        ("a", "Always"),
        ("a:latest", "Always"),
        ("a:1", "IfNotPresent"),
        ("r:5000/a", "Always"),
        ("r:5000/a:1", "IfNotPresent"),
        ("a@sha256:00", "IfNotPresent"),
    ] {
        let mut pod = json!({"spec": {"containers": [{"image": image}]}});
        apply(resource, &mut pod);
        assert_eq!(pod["spec"]["containers"][0]["imagePullPolicy"], wanted, "{image}");
    }
}

#[test]
fn small_kinds() {
    check(
        "",
        "namespaces",
        json!({"metadata": {"name": "a"}}),
        json!({
            "metadata": {"name": "a", "labels": {"kubernetes.io/metadata.name": "a"}},
            "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"},
        }),
    );
    check(
        "",
        "secrets",
        json!({"data": {"a": "eA=="}, "stringData": {"b": "hello"}}),
        json!({"type": "Opaque", "data": {"a": "eA==", "b": "aGVsbG8="}}),
    );
    check(
        "",
        "nodes",
        json!({"status": {"capacity": {"cpu": "2"}}}),
        json!({"status": {"capacity": {"cpu": "2"}, "allocatable": {"cpu": "2"}}}),
    );
    check(
        "",
        "endpoints",
        json!({"subsets": [{"ports": [{"port": 1}]}]}),
        json!({"subsets": [{"ports": [{"port": 1, "protocol": "TCP"}]}]}),
    );
    check(
        "discovery.k8s.io",
        "endpointslices",
        json!({"ports": [{"port": 1}, {"name": "a", "protocol": "UDP"}]}),
        json!({"ports": [{"port": 1, "name": "", "protocol": "TCP"}, {"name": "a", "protocol": "UDP"}]}),
    );
    check("", "configmaps", json!({"data": {"a": "b"}}), json!({"data": {"a": "b"}}));
}
