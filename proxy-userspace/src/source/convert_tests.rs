use serde_json::{Value, json};

use super::*;

fn service(value: Value) -> Option<ServiceObject> {
    Converter::new("node1").service(&serde_json::from_value(value).unwrap())
}

fn slice(value: Value) -> Option<SliceObject> {
    Converter::new("node1").slice(&serde_json::from_value(value).unwrap())
}

#[expect(clippy::needless_pass_by_value, reason = "a literal at every call")]
fn with_spec(spec: Value) -> Option<ServiceObject> {
    service(json!({"metadata": {"name": "a", "namespace": "ns"}, "spec": spec}))
}

fn with_endpoints(address_type: &str, endpoints: &Value) -> Option<SliceObject> {
    slice(json!({
        "metadata": {"name": "a-1", "namespace": "ns", "labels": {"kubernetes.io/service-name": "a"}},
        "addressType": address_type, "endpoints": endpoints, "ports": [{"name": "", "port": 80}],
    }))
}

#[test]
fn services_of_others_are_not_expressed() {
    assert!(with_spec(json!({"clusterIP": "10.0.0.1"})).is_some());
    assert!(with_spec(json!({"clusterIP": "None"})).is_none());
    assert!(with_spec(json!({"clusterIP": ""})).is_none());
    assert!(with_spec(json!({})).is_none());
    assert!(with_spec(json!({"clusterIP": "10.0.0.1", "type": "ExternalName"})).is_none());
    let labels = json!({"service.kubernetes.io/service-proxy-name": ""});
    let metadata = json!({"name": "a", "namespace": "ns", "labels": labels});
    assert!(service(json!({"metadata": metadata, "spec": {"clusterIP": "10.0.0.1"}})).is_none());
}

#[test]
fn one_cluster_ip_per_family() {
    let ips = |spec| with_spec(spec).unwrap().cluster_ips.iter().map(IpAddr::to_string).collect::<Vec<_>>();
    let dual = json!({"clusterIP": "fd00::1", "clusterIPs": ["fd00::1", "10.0.0.1"], "ipFamilies": ["IPv6", "IPv4"]});
    assert_eq!(ips(dual), ["fd00::1", "10.0.0.1"]);
    assert_eq!(ips(json!({"clusterIP": "10.0.0.1"})), ["10.0.0.1"]);
    let crossed = json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "ipFamilies": ["IPv6"]});
    assert!(ips(crossed).is_empty());
}

#[test]
fn bad_addresses_and_ports_of_a_service_are_left_out() {
    let object = service(json!({
        "metadata": {"name": "a", "namespace": "ns"},
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.0.0.1", "externalIPs": ["192.0.2.1", "169.254.1.1", "", "127.0.0.1"],
            "loadBalancerSourceRanges": [" 10.1.2.3/8 ", "rubbish"],
            "ports": [
                {"name": "ok", "port": 80, "nodePort": 30080, "protocol": "UDP"},
                {"name": "zero", "port": 0}, {"name": "big", "port": 70000}, {"name": "odd", "port": 1, "protocol": "GRE"},
            ],
        },
        "status": {"loadBalancer": {"ingress": [
            {"ip": "192.0.2.9", "ipMode": "VIP"}, {"ip": "192.0.2.10", "ipMode": "Proxy"}, {"ip": "0.0.0.0"},
            {"hostname": "example.com"}, {"ip": "2001:db8::9"},
        ]}},
    }))
    .unwrap();
    let text = |list: &[IpAddr]| list.iter().map(IpAddr::to_string).collect::<Vec<_>>();
    assert_eq!(text(&object.external_ips), ["192.0.2.1"]);
    assert_eq!(text(&object.load_balancer_ips), ["192.0.2.9", "2001:db8::9"]);
    assert_eq!(object.source_ranges, ["10.0.0.0/8".parse().unwrap()]);
    let port = PortSpec { name: "ok".into(), protocol: Protocol::Udp, port: 80, node_port: Some(30080) };
    assert_eq!(object.ports, [port]);
}

#[test]
fn affinity_has_a_default_and_bounds() {
    let seconds = |config: Value| {
        with_spec(json!({"clusterIP": "10.0.0.1", "sessionAffinity": "ClientIP", "sessionAffinityConfig": config}))
            .unwrap()
            .affinity_seconds
    };
    assert_eq!(seconds(json!({"clientIP": {"timeoutSeconds": 60}})), Some(60));
    assert_eq!(seconds(json!(null)), Some(10_800));
    assert_eq!(seconds(json!({"clientIP": {"timeoutSeconds": 1_000_000}})), Some(86_400));
    assert_eq!(seconds(json!({"clientIP": {"timeoutSeconds": -1}})), Some(10_800));
    assert_eq!(with_spec(json!({"clusterIP": "10.0.0.1", "sessionAffinity": "None"})).unwrap().affinity_seconds, None);
}

#[test]
fn the_health_check_port_needs_a_load_balancer_with_policy_local() {
    let port = |kind: &str, policy: &str| {
        let spec = json!({"clusterIP": "10.0.0.1", "type": kind, "externalTrafficPolicy": policy, "healthCheckNodePort": 32000});
        with_spec(spec).unwrap().health_check_node_port
    };
    assert_eq!(port("LoadBalancer", "Local"), Some(32000));
    assert_eq!(port("LoadBalancer", "Cluster"), None);
    assert_eq!(port("NodePort", "Local"), None);
}

#[test]
fn policy_local_counts_only_where_outsiders_can_come_in() {
    let local = |spec: Value| with_spec(spec).unwrap().external_local;
    assert!(local(json!({"clusterIP": "10.0.0.1", "type": "NodePort", "externalTrafficPolicy": "Local"})));
    assert!(!local(json!({"clusterIP": "10.0.0.1", "externalTrafficPolicy": "Local"})));
    assert!(local(json!({"clusterIP": "10.0.0.1", "externalTrafficPolicy": "Local", "externalIPs": ["192.0.2.1"]})));
}

#[test]
fn conditions_default_as_the_api_says() {
    let endpoints = json!([
        {"addresses": ["10.0.0.1", "10.0.0.99"], "nodeName": "node1"},
        {"addresses": ["10.0.0.2"], "nodeName": "node2", "conditions": {"ready": false, "serving": false, "terminating": true}},
    ]);
    let slice = with_endpoints("IPv4", &endpoints).unwrap();
    let plain: Vec<_> =
        slice.endpoints.iter().map(|e| (e.address.to_string(), e.local, e.ready, e.serving, e.terminating)).collect();
    assert_eq!(plain, [("10.0.0.1".into(), true, true, true, false), ("10.0.0.2".into(), false, false, false, true)]);
}

#[test]
fn special_addresses_are_left_out_and_counted() {
    let bad = ["127.0.0.1", "169.254.169.254", "0.0.0.0", "239.1.1.1", "2001:db8::1", "nonsense", ""];
    let mut endpoints: Vec<_> = bad.iter().map(|address| json!({"addresses": [address]})).collect();
    endpoints.push(json!({"addresses": []}));
    endpoints.push(json!({"addresses": ["10.0.0.1"]}));
    let slice = with_endpoints("IPv4", &json!(endpoints)).unwrap();
    assert_eq!(slice.endpoints.len(), 1);
    assert_eq!(slice.endpoints[0].address.to_string(), "10.0.0.1");
    assert_eq!(slice.rejected, 8);
}

#[test]
fn slices_without_use_are_ignored() {
    assert!(with_endpoints("FQDN", &json!([{"addresses": ["example.com"]}])).is_none());
    let plain = |labels: Value| {
        slice(
            json!({"metadata": {"name": "a", "namespace": "ns", "labels": labels}, "addressType": "IPv4", "endpoints": []}),
        )
    };
    assert!(plain(json!({"kubernetes.io/service-name": "a"})).is_some());
    assert!(plain(json!({"kubernetes.io/service-name": ""})).is_none());
    assert!(plain(json!({})).is_none());
    assert!(plain(json!({"kubernetes.io/service-name": "a", "service.kubernetes.io/headless": ""})).is_none());
}

#[test]
fn ports_without_name_or_number_are_ignored() {
    let slice = slice(json!({
        "metadata": {"name": "a-1", "namespace": "ns", "labels": {"kubernetes.io/service-name": "a"}},
        "addressType": "IPv4", "endpoints": [],
        "ports": [{"port": 80}, {"name": "zero", "port": 0}, {"name": "none"}, {"name": "", "port": 8080}],
    }))
    .unwrap();
    assert_eq!(*slice.ports, [SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }]);
}

#[test]
fn hints_are_read_and_shared() {
    let hinted = |address: &str| json!({"addresses": [address], "hints": {"forZones": [{"name": "a"}], "forNodes": [{"name": "node1"}]}});
    let slice =
        with_endpoints("IPv4", &json!([hinted("10.0.0.1"), hinted("10.0.0.2"), {"addresses": ["10.0.0.3"]}])).unwrap();
    let [first, second, plain] = &*slice.endpoints else { panic!("{slice:?}") };
    assert!(first.has_node_hints && first.hinted_for_node);
    assert!(Arc::ptr_eq(first.zone_hints.as_ref().unwrap(), second.zone_hints.as_ref().unwrap()));
    assert_eq!((plain.has_node_hints, plain.zone_hints.is_none()), (false, true));
}

#[test]
fn the_node_object_gives_zone_addresses_and_whether_it_leaves() {
    let facts = |value: Value| node_facts(&serde_json::from_value(value).unwrap());
    let node = facts(json!({
        "metadata": {"name": "node1", "labels": {"topology.kubernetes.io/zone": "z1"}},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:10::/64"]},
        "status": {"addresses": [{"type": "Hostname", "address": "node1"}, {"type": "InternalIP", "address": "192.168.0.2"}]},
    }));
    assert_eq!(node.zone.as_deref(), Some("z1"));
    assert_eq!(node.internal_ips, ["192.168.0.2".parse::<IpAddr>().unwrap()]);
    assert_eq!(node.pod_cidrs.len(), 2);
    assert!(!node.leaving);
    assert!(facts(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})).leaving);
    let taints = json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
    assert!(facts(json!({"metadata": {}, "spec": {"taints": taints}})).leaving);
    assert!(!facts(json!({"metadata": {}, "spec": {"unschedulable": true}})).leaving);
}
