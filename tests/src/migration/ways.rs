//! Every kind of way to a Service: who asks, and where.

use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::scenario::{ServiceManifest, pod};
use crate::traffic::{Target, Way};
use crate::{Cluster, Place, binary};

/// Who runs behind the Services `web` and `local`: two on each node.
const SERVERS: [&str; 4] = ["web-1", "web-2", "web-3", "web-4"];
/// Where the server on the node itself listens: clear of all other ports.
const NODE_SERVER_PORT: u16 = 9090;
/// Port of every Service, TCP and UDP, and of every server.
const PORT: u16 = 80;
const SERVER_PORT: u16 = 8080;
/// Asks endpoints themselves. It asks no Service: IPVS takes a pod's answer for the one of a Service's connection from the same port.
const DIRECT_CLIENT: &str = "client-direct";

/// Makes the servers, the clients and their Services.
///
/// # Errors
/// When the API server refuses, or the node's own server does not start.
pub(super) fn prepare(cluster: &Cluster) -> Result<()> {
    let servers = SERVERS.iter().enumerate();
    cluster.apply_all(servers.map(|(i, name)| pod(name, i / 2 + 1, "web", &[SERVER_PORT], &[SERVER_PORT])))?;
    cluster.apply(pod("self", 1, "self", &[SERVER_PORT], &[SERVER_PORT]))?;
    let clients = [("client-1", 1), ("client-2", 2), (DIRECT_CLIENT, 2)];
    cluster.apply_all(clients.map(|(name, node)| pod(name, node, "client", &[], &[])))?;
    let service = |name, app| {
        let service = ServiceManifest::new(name, app).with("ipFamilyPolicy", json!("RequireDualStack"));
        service.port("TCP", PORT, SERVER_PORT).port("UDP", PORT, SERVER_PORT)
    };
    let local = json!("Local");
    cluster.apply(service("web", Some("web")).with("type", json!("NodePort")).build())?;
    let node_port = service("local", Some("web")).with("type", json!("NodePort"));
    cluster.apply(node_port.with("externalTrafficPolicy", local).build())?;
    cluster.apply(service("self", Some("self")).build())?;
    cluster.apply(service("node", None).build())?;
    let node = cluster.topology().node(1)?;
    cluster.apply_all(node.addresses().map(node_slice))?;
    // It ends with the lab.
    let mut echo = std::process::Command::new(binary("trama-lab")?);
    let port = NODE_SERVER_PORT.to_string();
    node.place().spawn(echo.args(["echo", "--name", "node-1", "--tcp", &port, "--udp", &port]).stdin(Stdio::null()))?;
    Ok(())
}

/// The node's own address as an endpoint, as the API server is one on a control plane's node.
fn node_slice(address: IpAddr) -> Value {
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    let port = |protocol: &str| json!({ "name": crate::scenario::port_name(protocol, PORT), "protocol": protocol, "port": NODE_SERVER_PORT });
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("node-{}", family.to_lowercase()), "namespace": "default",
            "labels": {
                "kubernetes.io/service-name": "node",
                "endpointslice.kubernetes.io/managed-by": "trama-lab",
            },
        },
        "addressType": family,
        "ports": [port("TCP"), port("UDP")],
        "endpoints": [{ "addresses": [address.to_string()], "conditions": { "ready": true } }],
    })
}

/// All ways, those of a kind together. Programs of a cluster run inside of its nodes' cgroups; a pod outside of them is there for
/// what only the packet path does.
///
/// # Errors
/// When a Service or a pod is missing.
pub(super) fn ways(cluster: &Cluster) -> Result<Vec<Way>> {
    let topology = cluster.topology();
    let mut ways = Vec::new();
    for (kind, service, own) in [
        ("outside -> NodePort", "web", [&SERVERS[..], &SERVERS[..]]),
        ("outside -> NodePort, Local", "local", [&SERVERS[..2], &SERVERS[2..]]),
    ] {
        for (number, servers) in [1, 2].into_iter().zip(own) {
            let addresses = topology.node(number)?.addresses();
            let targets = targets(addresses, |protocol| cluster.node_port(service, protocol, PORT))?;
            ways.push(Way { kind, name: format!("node-{number}"), place: topology.client(), targets, servers });
        }
    }
    let inside = |service: &str| targets(cluster.cluster_ips(service)?, |_| Ok(PORT));
    let in_pod = |name: &str| cluster.place_in_pod(&format!("default/{name}"));
    let [one, two] = ["client-1", "client-2"].map(in_pod);
    let places = [one?, two?];
    let packets = places.each_ref().map(Place::outside_cgroup);
    let nodes = [topology.node(1)?.place(), topology.node(2)?.place()];
    for (kind, places) in [("pod", places), ("pod, no socket LB", packets.clone()), ("node", nodes)] {
        for (number, place) in (1..).zip(places) {
            let (name, targets) = (format!("node-{number}"), inside("web")?);
            ways.push(Way { kind, name, place, targets, servers: &SERVERS });
        }
    }
    let (kind, name) = ("pod -> itself", "self".to_owned());
    ways.push(Way { kind, name, place: in_pod("self")?, targets: inside("self")?, servers: &["self"] });
    let [place, _] = packets;
    let (kind, name) = ("pod -> its node, no socket LB", "node-1".to_owned());
    ways.push(Way { kind, name, place, targets: inside("node")?, servers: &["node-1"] });
    // What is slow here too is the machine's fault, and no proxy's.
    let addresses = cluster.pod_addresses("default/web-1").context("web-1 does not run")?;
    let (kind, name) = ("pod -> pod, no Service", "node-2".to_owned());
    let (place, targets) = (in_pod(DIRECT_CLIENT)?.outside_cgroup(), targets(addresses, |_| Ok(SERVER_PORT))?);
    ways.push(Way { kind, name, place, targets, servers: &["web-1"] });
    Ok(ways)
}

/// TCP and UDP at each of the addresses.
fn targets(addresses: impl IntoIterator<Item = IpAddr>, port: impl Fn(&str) -> Result<u16>) -> Result<Vec<Target>> {
    let (tcp, udp) = (port("TCP")?, port("UDP")?);
    let both = |ip| [(false, tcp), (true, udp)].map(|(udp, port)| Target { udp, address: SocketAddr::new(ip, port) });
    Ok(addresses.into_iter().flat_map(both).collect())
}
