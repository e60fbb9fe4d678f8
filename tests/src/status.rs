//! What a kubelet writes about nodes and pods, as far as kubectl and the EndpointSlice controller read it.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod as ApiPod;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::Node;

/// The ports that the pod's containers declare: TCP, UDP. The echo server listens on all of them.
pub(crate) fn container_ports(pod: &ApiPod) -> (Vec<u16>, Vec<u16>) {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    let (mut tcp, mut udp) = (Vec::new(), Vec::new());
    for port in ports {
        let Ok(number) = u16::try_from(port.container_port) else { continue };
        match port.protocol.as_deref() {
            Some("UDP") => udp.push(number),
            None | Some("TCP") => tcp.push(number),
            // The lab's echo server speaks nothing else.
            Some(_) => {}
        }
    }
    (tcp, udp)
}

/// The Node object as it is created.
pub(crate) fn node_manifest(node: &Node) -> Value {
    let cidrs = node.pod_cidrs();
    json!({
        "metadata": { "name": node.name(), "labels": { "kubernetes.io/hostname": node.name(), "kubernetes.io/os": "linux" } },
        "spec": { "podCIDR": cidrs.v4.to_string(), "podCIDRs": [cidrs.v4.to_string(), cidrs.v6.to_string()] },
    })
}

/// The Node's status: ready, and where it is.
pub(crate) fn node_status(node: &Node) -> Value {
    let kernel = node_sys::sysctl::read("kernel/osrelease").unwrap_or_default();
    let addresses = node.addresses().map(|ip| json!({ "type": "InternalIP", "address": ip.to_string() }));
    let [v4, v6] = addresses;
    json!({
        "addresses": [v4, v6, { "type": "Hostname", "address": node.name() }],
        "conditions": [condition("Ready", "LabNodeReady")],
        "nodeInfo": {
            "architecture": "amd64", "operatingSystem": "linux", "osImage": "network namespace", "kernelVersion": kernel,
            "containerRuntimeVersion": "trama-lab://0", "kubeletVersion": "trama-lab", "kubeProxyVersion": "",
            "machineID": node.name(), "systemUUID": node.name(), "bootID": node.name(),
        },
    })
}

/// The status of a Pod whose echo server answers.
pub(crate) fn running_status(node: &Node, pod: &ApiPod, addresses: [IpAddr; 2]) -> Value {
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let ips = |addresses: [IpAddr; 2]| addresses.map(|ip| json!({ "ip": ip.to_string() }));
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers).map(|container| {
        json!({
            "name": container.name, "image": container.image, "imageID": "", "ready": true, "started": true,
            "restartCount": 0, "state": { "running": { "startedAt": now } },
        })
    });
    let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map(|kind| condition(kind, ""));
    let [node_ip, _] = node.addresses();
    let [pod_ip, _] = addresses;
    json!({
        "phase": "Running",
        "startTime": now,
        "hostIP": node_ip.to_string(), "hostIPs": ips(node.addresses()),
        "podIP": pod_ip.to_string(), "podIPs": ips(addresses),
        "conditions": conditions,
        "containerStatuses": containers.collect::<Vec<_>>(),
    })
}

fn condition(kind: &str, reason: &str) -> Value {
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    json!({ "type": kind, "status": "True", "reason": reason, "lastTransitionTime": now })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declared_ports_are_served() {
        let pod: ApiPod = serde_json::from_value(json!({ "spec": { "containers": [
            { "name": "a", "ports": [{ "containerPort": 80 }, { "containerPort": 53, "protocol": "UDP" }] },
            { "name": "b", "ports": [{ "containerPort": 443, "protocol": "TCP" }, { "containerPort": 9, "protocol": "SCTP" }] },
        ] } }))
        .unwrap();
        assert_eq!(container_ports(&pod), (vec![80, 443], vec![53]));
        assert_eq!(container_ports(&ApiPod::default()), (vec![], vec![]));
    }
}
