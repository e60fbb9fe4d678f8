//! Good objects pass; each broken one is refused for the right reason at the right place.
#![expect(clippy::needless_pass_by_value, reason = "tables of cases read better without references to temporaries")]

use serde_json::json;

use super::*;
use crate::defaults;
use crate::schema::registry;

fn resource(group: &str, plural: &str) -> &'static Resource {
    registry().resource(group, "v1", plural).unwrap()
}

/// An object of a kind with good metadata, defaulted.
fn object(resource: &Resource, mut body: Value) -> Value {
    let name = if resource.plural == "ipaddresses" { "10.0.0.1" } else { "x" };
    if body.pointer("/metadata/name").is_none() && body.pointer("/metadata/generateName").is_none() {
        crate::meta::set(&mut body, "name", name);
    }
    if resource.namespaced && body.pointer("/metadata/namespace").is_none() {
        crate::meta::set(&mut body, "namespace", "default");
    }
    defaults::apply(resource, &mut body);
    body
}

fn rendered(errors: &[FieldError]) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

fn create(group: &str, plural: &str, body: Value, wanted: &[&str]) {
    let resource = resource(group, plural);
    let object = object(resource, body);
    assert_eq!(rendered(&validate_create(resource, &object)), wanted, "{object}");
}

fn service(spec: Value, wanted: &[&str]) {
    create("", "services", json!({"spec": spec}), wanted);
}

fn update(group: &str, plural: &str, old: Value, new: Value, wanted: &[&str]) {
    let resource = resource(group, plural);
    let (old, new) = (object(resource, old), object(resource, new));
    assert_eq!(rendered(&validate_update(resource, &new, &old)), wanted, "{new}");
}

#[test]
fn good_objects_pass() {
    service(json!({"ports": [{"port": 80}]}), &[]);
    service(json!({"clusterIP": "None"}), &[]);
    service(json!({"type": "ExternalName", "externalName": "a.b."}), &[]);
    service(
        json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "loadBalancerSourceRanges": ["10.0.0.0/8"],
               "ports": [{"name": "a", "port": 80, "nodePort": 30000}, {"name": "b", "port": 80, "protocol": "UDP", "nodePort": 30000}]}),
        &[],
    );
    create(
        "discovery.k8s.io",
        "endpointslices",
        json!({"addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}]}),
        &[],
    );
    create("", "endpoints", json!({"subsets": [{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 1}]}]}), &[]);
    create("", "pods", json!({"spec": {"containers": [{"name": "c", "image": "i"}]}}), &[]);
    for plural in ["configmaps", "secrets", "serviceaccounts", "events", "namespaces", "nodes"] {
        create("", plural, json!({}), &[]);
    }
    create("coordination.k8s.io", "leases", json!({"spec": {"leaseDurationSeconds": 1}}), &[]);
    create("networking.k8s.io", "servicecidrs", json!({"spec": {"cidrs": ["10.0.0.0/16", "fd00::/112"]}}), &[]);
    let parent = json!({"spec": {"parentRef": {"resource": "services", "name": "a", "namespace": "b"}}});
    create("networking.k8s.io", "ipaddresses", parent, &[]);
}

#[test]
fn service_ports() {
    service(json!({}), &["spec.ports: Required value"]);
    service(
        json!({"ports": [{"port": 0, "targetPort": 1}]}),
        &["spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive"],
    );
    service(
        json!({"ports": [{"port": 80, "targetPort": 70000}]}),
        &["spec.ports[0].targetPort: Invalid value: 70000: must be between 1 and 65535, inclusive"],
    );
    service(
        json!({"ports": [{"port": 80, "targetPort": "a--b"}]}),
        &["spec.ports[0].targetPort: Invalid value: \"a--b\": must not contain consecutive hyphens"],
    );
    service(
        json!({"ports": [{"port": 80}, {"port": 81, "name": "a"}, {"port": 82, "name": "a"}]}),
        &["spec.ports[0].name: Required value", "spec.ports[2].name: Duplicate value: \"a\""],
    );
    service(
        json!({"ports": [{"port": 80, "protocol": "tcp"}]}),
        &["spec.ports[0].protocol: Unsupported value: \"tcp\": supported values: \"SCTP\", \"TCP\", \"UDP\""],
    );
    service(
        json!({"ports": [{"port": 80, "name": "a"}, {"port": 80, "name": "b"}]}),
        &["spec.ports[1]: Duplicate value: {\"port\":80,\"protocol\":\"TCP\"}"],
    );
    service(
        json!({"ports": [{"port": 80, "nodePort": 30000}]}),
        &["spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'"],
    );
    service(
        json!({"type": "NodePort", "ports": [{"port": 80, "name": "a", "nodePort": 30000}, {"port": 81, "name": "b", "nodePort": 30000}]}),
        &["spec.ports[1].nodePort: Duplicate value: 30000"],
    );
}

#[test]
fn service_types_and_policies() {
    let ports = json!([{"port": 80}]);
    service(
        json!({"type": "Magic", "ports": ports}),
        &[
            "spec.type: Unsupported value: \"Magic\": supported values: \"ClusterIP\", \"ExternalName\", \"LoadBalancer\", \"NodePort\"",
        ],
    );
    service(
        json!({"type": "NodePort", "clusterIP": "None", "clusterIPs": ["None"], "ports": ports}),
        &["spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for NodePort services"],
    );
    service(json!({"type": "ExternalName"}), &["spec.externalName: Required value"]);
    service(
        json!({"externalTrafficPolicy": "Local", "ports": ports}),
        &["spec.externalTrafficPolicy: Invalid value: \"Local\": may only be set for externally-accessible services"],
    );
    service(
        json!({"internalTrafficPolicy": "Some", "ports": ports}),
        &["spec.internalTrafficPolicy: Unsupported value: \"Some\": supported values: \"Cluster\", \"Local\""],
    );
    service(
        json!({"healthCheckNodePort": 1, "ports": ports}),
        &["spec.healthCheckNodePort: Invalid value: 1: may only be set when `type` is 'LoadBalancer' and \
           `externalTrafficPolicy` is 'Local'"],
    );
    service(
        json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}, "ports": ports}),
        &[
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 0: must be greater than 0 and less than 86400",
        ],
    );
    service(
        json!({"loadBalancerSourceRanges": ["10.0.0.1/8"], "ports": ports}),
        &[
            "spec.loadBalancerSourceRanges: Forbidden: may only be used when `type` is 'LoadBalancer'",
            "spec.loadBalancerSourceRanges[0]: Invalid value: \"10.0.0.1/8\": must not have bits set beyond the prefix length",
        ],
    );
}

#[test]
fn service_addresses() {
    let ports = json!([{"port": 80}]);
    service(
        json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.2"], "ports": ports}),
        &["spec.clusterIPs: Invalid value: [\"10.0.0.2\"]: first value must match `clusterIP`"],
    );
    service(
        json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "10.0.0.2"], "ports": ports}),
        &[
            "spec.clusterIPs: Invalid value: [\"10.0.0.1\",\"10.0.0.2\"]: may specify no more than one IP for each IP family",
        ],
    );
    service(
        json!({"clusterIP": "x", "clusterIPs": ["x"], "ports": ports}),
        &["spec.clusterIPs[0]: Invalid value: \"x\": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"],
    );
    service(
        json!({"clusterIP": "fd00::1", "clusterIPs": ["fd00::1"], "ipFamilies": ["IPv4"], "ports": ports}),
        &["spec.clusterIPs[0]: Invalid value: \"fd00::1\": expected an IPv4 value as indicated by `ipFamilies[0]`"],
    );
    service(
        json!({"ipFamilies": ["IPv4", "IPv4"], "ipFamilyPolicy": "Dual", "ports": ports}),
        &[
            "spec.ipFamilies[1]: Duplicate value: \"IPv4\"",
            "spec.ipFamilyPolicy: Unsupported value: \"Dual\": supported values: \"PreferDualStack\", \"RequireDualStack\", \"SingleStack\"",
        ],
    );
    service(
        json!({"externalIPs": ["127.0.0.1", "010.0.0.1"], "ports": ports}),
        &[
            "spec.externalIPs[0]: Invalid value: \"127.0.0.1\": may not be in the loopback range (127.0.0.0/8, ::1/128)",
            "spec.externalIPs[1]: Invalid value: \"010.0.0.1\": must not have leading 0s",
        ],
    );
}

#[test]
fn service_updates() {
    let with = |spec: Value| {
        let mut spec = spec;
        spec["ports"] = json!([{"port": 80}]);
        json!({"spec": spec})
    };
    let check = |old: Value, new: Value, wanted: &[&str]| update("", "services", with(old), with(new), wanted);
    let single = json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"});
    let dual = json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "PreferDualStack"});
    check(single.clone(), single.clone(), &[]);
    check(single.clone(), dual.clone(), &[]);
    check(dual.clone(), single.clone(), &[]);
    let mut stuck = single.clone();
    stuck["ipFamilyPolicy"] = json!("PreferDualStack");
    check(
        dual,
        stuck,
        &[
            "spec.ipFamilyPolicy: Invalid value: \"PreferDualStack\": must be set to 'SingleStack' when releasing the secondary clusterIP",
            "spec.ipFamilyPolicy: Invalid value: \"PreferDualStack\": must be set to 'SingleStack' when releasing the secondary ipFamily",
        ],
    );
    let moved = json!({"clusterIP": "10.0.0.9", "clusterIPs": ["10.0.0.9"], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"});
    check(single.clone(), moved, &["spec.clusterIPs[0]: Invalid value: [\"10.0.0.9\"]: may not change once set"]);
    check(
        single,
        json!({"ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"}),
        &["spec.clusterIPs[0]: Invalid value: null: primary clusterIP can not be unset"],
    );
}

#[test]
fn endpoint_slices() {
    let slice = |kind: &str, address: &str, wanted: &[&str]| {
        let body = json!({"addressType": kind, "endpoints": [{"addresses": [address]}]});
        create("discovery.k8s.io", "endpointslices", body, wanted);
    };
    let place = "endpoints[0].addresses[0]: Invalid value";
    let check =
        |kind: &str, address: &str, rule: &str| slice(kind, address, &[&format!("{place}: \"{address}\": {rule}")]);
    check("IPv4", "0.0.0.0", "may not be unspecified (0.0.0.0)");
    check("IPv4", "127.1.2.3", "may not be in the loopback range (127.0.0.0/8, ::1/128)");
    check("IPv4", "169.254.0.1", "may not be in the link-local range (169.254.0.0/16, fe80::/10)");
    check("IPv4", "224.0.0.1", "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)");
    check("IPv6", "::", "may not be unspecified (::)");
    check("IPv6", "::1", "may not be in the loopback range (127.0.0.0/8, ::1/128)");
    check("IPv6", "fe80::1", "may not be in the link-local range (169.254.0.0/16, fe80::/10)");
    check("IPv6", "ff02::1", "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)");
    check("IPv6", "FD00::1", "must be in canonical form (\"fd00::1\")");
    check("IPv6", "::ffff:1.2.3.4", "must not be an IPv4-mapped IPv6 address");
    check("IPv4", "1.2.3", "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
    slice("IPv4", "fd00::1", &["endpoints[0].addresses: Invalid value: \"fd00::1\": must be an IPv4 address"]);
    slice("IPv6", "10.0.0.1", &["endpoints[0].addresses: Invalid value: \"10.0.0.1\": must be an IPv6 address"]);
    check("FQDN", "localhost", "should be a domain with at least two segments separated by dots");
    slice("FQDN", "a.b.", &[]);
    slice("IPX", "1", &["addressType: Unsupported value: \"IPX\": supported values: \"FQDN\", \"IPv4\", \"IPv6\""]);
}

#[test]
fn endpoint_slice_limits_and_ports() {
    let check = |body: Value, wanted: &[&str]| create("discovery.k8s.io", "endpointslices", body, wanted);
    let endpoints = vec![json!({"addresses": ["10.0.0.1"]}); 1001];
    check(
        json!({"addressType": "IPv4", "endpoints": endpoints}),
        &["endpoints: Too many: 1001: must have at most 1000 items"],
    );
    check(
        json!({"addressType": "IPv4", "endpoints": [{"addresses": []}]}),
        &["endpoints[0].addresses: Required value: must contain at least 1 address"],
    );
    check(
        json!({"addressType": "IPv4", "ports": [{"port": 1}, {"port": 2}]}),
        &["ports[1].name: Duplicate value: \"\""],
    );
    update(
        "discovery.k8s.io",
        "endpointslices",
        json!({"addressType": "IPv4"}),
        json!({"addressType": "IPv6"}),
        &["addressType: Invalid value: \"IPv6\": field is immutable"],
    );
}

#[test]
fn plain_endpoints() {
    create(
        "",
        "endpoints",
        json!({"subsets": [{}]}),
        &["subsets[0]: Required value: must specify `addresses` or `notReadyAddresses`"],
    );
    create(
        "",
        "endpoints",
        json!({"subsets": [{"addresses": [{"ip": "127.0.0.1"}], "ports": [{"port": 0}]}]}),
        &[
            "subsets[0].addresses[0].ip: Invalid value: \"127.0.0.1\": may not be in the loopback range (127.0.0.0/8, ::1/128)",
            "subsets[0].ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
        ],
    );
}

#[test]
fn pods() {
    let check = |spec: Value, wanted: &[&str]| create("", "pods", json!({"spec": spec}), wanted);
    check(json!({}), &["spec.containers: Required value"]);
    check(
        json!({"containers": [{"ports": [{}], "env": [{}], "volumeMounts": [{"name": "v"}]}]}),
        &[
            "spec.containers[0].name: Required value",
            "spec.containers[0].image: Required value",
            "spec.containers[0].ports[0].containerPort: Required value",
            "spec.containers[0].env[0].name: Required value",
            "spec.containers[0].volumeMounts[0].name: Not found: \"v\"",
            "spec.containers[0].volumeMounts[0].mountPath: Required value",
        ],
    );
    check(
        json!({"restartPolicy": "No", "containers": [{"name": "a", "image": "i"}, {"name": "a", "image": "i"}]}),
        &[
            "spec.containers[1].name: Duplicate value: \"a\"",
            "spec.restartPolicy: Unsupported value: \"No\": supported values: \"Always\", \"OnFailure\", \"Never\"",
        ],
    );
}

#[test]
fn pod_updates() {
    let pod = |image: &str, grace: i64, tolerations: Value| {
        json!({"spec": {"containers": [{"name": "a", "image": image, "imagePullPolicy": "Never"}],
                        "terminationGracePeriodSeconds": grace, "tolerations": tolerations}})
    };
    let old = || pod("i:1", 30, json!([{"key": "a"}]));
    update("", "pods", old(), pod("i:2", 30, json!([{"key": "a", "tolerationSeconds": 3}, {"key": "b"}])), &[]);
    update(
        "",
        "pods",
        old(),
        pod("i:1", 30, json!([])),
        &["spec.tolerations: Forbidden: existing toleration can not be modified except its tolerationSeconds"],
    );
    let resource = resource("", "pods");
    let errors =
        validate_update(resource, &object(resource, pod("i:1", 5, json!([{"key": "a"}]))), &object(resource, old()));
    assert!(
        rendered(&errors)[0]
            .starts_with("spec: Forbidden: pod updates may not change fields other than `spec.containers")
    );
    assert!(rendered(&errors)[0].ends_with("changed: terminationGracePeriodSeconds"));
    update(
        "",
        "pods",
        old(),
        json!({"spec": {"containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}]}}),
        &["spec.containers: Forbidden: pod updates may not add or remove containers"],
    );
}

#[test]
fn metadata() {
    let check = |metadata: Value, wanted: &[&str]| {
        create("", "configmaps", json!({"metadata": metadata}), wanted);
    };
    let subdomain = |text: &str| names::dns1123_subdomain(text).remove(0);
    check(json!({"name": "A"}), &[&format!("metadata.name: Invalid value: \"A\": {}", subdomain("A"))]);
    check(json!({"generateName": "a-"}), &["metadata.name: Required value: name or generateName is required"]);
    check(
        json!({"name": "a", "labels": {"a/b/c": "x"}}),
        &[&format!("metadata.labels: Invalid value: \"a/b/c\": {}", names::qualified_name("a/b/c")[0])],
    );
    check(
        json!({"name": "a", "annotations": {"k": "v".repeat(256 * 1024)}}),
        &["metadata.annotations: Too long: may not be more than 262144 bytes"],
    );
    check(
        json!({"name": "a", "finalizers": ["mine"]}),
        &[
            "metadata.finalizers[0]: Invalid value: \"mine\": name is neither a standard finalizer name nor is it fully qualified",
        ],
    );
    check(
        json!({"name": "a", "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p"}]}),
        &["metadata.ownerReferences[0].uid: Invalid value: \"\": must not be empty"],
    );
    create(
        "",
        "nodes",
        json!({"metadata": {"namespace": "a"}}),
        &["metadata.namespace: Forbidden: not allowed on this type"],
    );
    create(
        "",
        "services",
        json!({"metadata": {"name": "a.b"}, "spec": {"ports": [{"port": 1}]}}),
        &["metadata.name: Invalid value: \"a.b\": must not contain dots"],
    );
}

#[test]
fn metadata_updates() {
    let check = |old: Value, new: Value, wanted: &[&str]| {
        update("", "configmaps", json!({"metadata": old}), json!({"metadata": new}), wanted);
    };
    check(json!({"uid": "a"}), json!({}), &[]);
    check(json!({"uid": "a"}), json!({"uid": "b"}), &["metadata.uid: Invalid value: \"b\": field is immutable"]);
    check(json!({"name": "a"}), json!({"name": "b"}), &["metadata.name: Invalid value: \"b\": field is immutable"]);
    check(
        json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["a.b/c"]}),
        json!({"finalizers": ["a.b/d"]}),
        &["metadata.finalizers: Forbidden: no new finalizers can be added if the object is being deleted, \
           found new finalizers []string{\"a.b/d\"}"],
    );
}

#[test]
fn sealed_data() {
    let old = json!({"immutable": true, "data": {"a": "1"}});
    update("", "configmaps", old.clone(), old.clone(), &[]);
    update(
        "",
        "configmaps",
        old,
        json!({"data": {"a": "2"}}),
        &[
            "immutable: Forbidden: field is immutable when `immutable` is set",
            "data: Forbidden: field is immutable when `immutable` is set",
        ],
    );
    update(
        "",
        "secrets",
        json!({"type": "a"}),
        json!({"type": "b"}),
        &["type: Invalid value: \"b\": field is immutable"],
    );
}

#[test]
fn data_and_secrets() {
    create(
        "",
        "configmaps",
        json!({"data": {"a": "x".repeat(1024 * 1024 + 1)}}),
        &[": Too long: may not be more than 1048576 bytes"],
    );
    create(
        "",
        "configmaps",
        json!({"data": {"a": ""}, "binaryData": {"a": ""}}),
        &["data[a]: Invalid value: \"a\": duplicate of key present in binaryData"],
    );
    create(
        "",
        "secrets",
        json!({"type": "kubernetes.io/tls"}),
        &["data[tls.crt]: Required value", "data[tls.key]: Required value"],
    );
}

#[test]
fn other_kinds() {
    create(
        "",
        "nodes",
        json!({"spec": {"taints": [{"key": "a", "effect": "Go"}]}}),
        &[
            "spec.taints[0].effect: Unsupported value: \"Go\": supported values: \"NoSchedule\", \"PreferNoSchedule\", \"NoExecute\"",
        ],
    );
    create(
        "coordination.k8s.io",
        "leases",
        json!({"spec": {"leaseDurationSeconds": 0}}),
        &["spec.leaseDurationSeconds: Invalid value: 0: must be greater than 0"],
    );
    create(
        "",
        "events",
        json!({"metadata": {"namespace": "a"}, "involvedObject": {"namespace": "b"}}),
        &["involvedObject.namespace: Invalid value: \"b\": does not match event.namespace"],
    );
    create(
        "networking.k8s.io",
        "servicecidrs",
        json!({"spec": {"cidrs": ["10.0.0.0/16", "10.1.0.0/16"]}}),
        &[
            "spec.cidrs: Invalid value: [\"10.0.0.0/16\",\"10.1.0.0/16\"]: may specify no more than one IP for each IP family, \
           i.e 192.168.0.0/24 and 2001:db8::/96",
        ],
    );
    create("networking.k8s.io", "ipaddresses", json!({}), &["spec.parentRef: Required value"]);
}

#[test]
fn status_updates() {
    let resource = resource("", "services");
    let with = |ip: &str| object(resource, json!({"status": {"loadBalancer": {"ingress": [{"ip": ip}]}}}));
    assert!(validate_status_update(resource, &with("1.2.3.4"), &with("")).is_empty());
    assert_eq!(
        rendered(&validate_status_update(resource, &with("x"), &with(""))),
        [
            "status.loadBalancer.ingress[0].ip: Invalid value: \"x\": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
        ]
    );
}
