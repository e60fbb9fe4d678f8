//! Asks every address of every Service from every kind of client, and judges the answers against the EndpointSlices.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use kube::api::{Api, ListParams};

use crate::tally::Tally;
use crate::{Cluster, Place, Probe, Transport};

/// The Pods that the survey's in-cluster traffic comes from, on node-1: one for each path, so that neither meets the other's flows.
const SOCKET_CLIENT: &str = "default/client";
const PACKET_CLIENT: &str = "default/client-2";
/// Questions per expected endpoint: one of four endpoints is missed by chance once in more than a million rows.
const QUESTIONS_PER_ENDPOINT: usize = 24;
/// A socket program refuses at once.
const REFUSAL_LIMIT: Duration = Duration::from_millis(500);
/// The packet path refuses with an ICMP message. To a client on the same machine it comes back while `connect` still holds its
/// socket; the kernel drops it then (`TcpExtLockDroppedIcmps`), and it is the SYN's first repetition, a second later, that is refused.
const REFUSED_PACKET_LIMIT: Duration = Duration::from_millis(2500);

/// Where a row's client stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// In the pod `client` on node-1, inside the node's cgroup.
    Pod,
    /// In the pod `client-2` on node-1, outside of the node's cgroup.
    PodPackets,
    /// On node-1 itself, inside its cgroup.
    Node,
    /// On the outside client, asking the node of this number.
    Outside(usize),
}

/// What the answers have to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    /// All of these, and no one else.
    Answered(BTreeSet<String>),
    /// A refusal at once: there are no endpoints.
    Refused,
    /// Silence: the node has no endpoint of its own, and may ask no other.
    Silence,
}

/// One question of the survey.
#[derive(Debug, Clone)]
pub struct Question {
    /// `NAMESPACE/NAME` of the Service, without the namespace `default`.
    pub service: String,
    /// Whom the client asks.
    pub target: SocketAddr,
    /// How.
    pub transport: Transport,
    /// From where.
    pub from: From,
    /// What has to come.
    pub expected: Expected,
}

/// A question with its answers.
#[derive(Debug, Clone)]
pub struct Row {
    /// The question.
    pub question: Question,
    /// What the proxies counted meanwhile: `socket`, `packet`, both joined with `+`, or `-`; `None` when one is dead.
    pub path: Option<String>,
    /// Who answered, how often and how fast.
    pub tally: Tally,
    /// Why the answers are wrong; `None` when they are right.
    pub fault: Option<String>,
}

/// The questions for every Service of every namespace, in the order of their names.
///
/// # Errors
/// When the API server does not list.
pub fn questions(cluster: &Cluster) -> Result<Vec<Question>> {
    let (services, slices) = cluster.block_on(async {
        let all = ListParams::default();
        let services = Api::<Service>::all(cluster.client()).list(&all).await.context("cannot list the Services")?;
        let slices = Api::<EndpointSlice>::all(cluster.client()).list(&all).await;
        anyhow::Ok((services.items, slices.context("cannot list the EndpointSlices")?.items))
    })?;
    // The API server's own Service leads to the machine's loopback, which is not the nodes'.
    let services = services.iter().filter(|service| service.name_any() != "kubernetes");
    Ok(services.flat_map(|service| questions_about(cluster, service, &slices)).collect())
}

/// Asks, and judges the answers.
///
/// # Errors
/// When the client cannot be started.
pub fn ask(cluster: &Cluster, question: &Question) -> Result<Row> {
    let place = place_of(cluster, question.from)?;
    let (count, timeout) = match &question.expected {
        Expected::Answered(names) => (names.len() * QUESTIONS_PER_ENDPOINT, Duration::from_secs(2)),
        Expected::Refused if matches!(question.from, From::Pod | From::Node) => (3, REFUSAL_LIMIT),
        Expected::Refused => (3, REFUSED_PACKET_LIMIT),
        Expected::Silence => (1, Duration::from_millis(500)),
    };
    let probe = Probe { target: question.target, transport: transport_for(question), timeout };
    let before = crate::paths::PathCounts::of(cluster);
    let outcomes = place.probe_times(probe, count)?;
    // A proxy that was killed counts nothing, and its node's traffic flows all the same.
    let path = match (before, crate::paths::PathCounts::of(cluster)) {
        (Ok(before), Ok(after)) => Some(after.since(&before)),
        _ => None,
    };
    let tally = Tally::of(&outcomes);
    let fault = judge(question, &tally);
    Ok(Row { path, question: question.clone(), tally, fault })
}

/// The kernel tells only a connected UDP socket that its datagram was refused.
fn transport_for(question: &Question) -> Transport {
    match (question.transport, &question.expected) {
        (Transport::Udp, Expected::Refused) => Transport::UdpConnected,
        (transport, _) => transport,
    }
}

fn judge(question: &Question, tally: &Tally) -> Option<String> {
    match &question.expected {
        Expected::Answered(names) => tally.fault_unless_all_answer(names, question.target),
        Expected::Refused if tally.refused() == tally.asked() => None,
        Expected::Refused => Some("not refused at once".to_owned()),
        Expected::Silence if tally.timed_out() == tally.asked() => None,
        Expected::Silence => Some("not silent".to_owned()),
    }
}

fn place_of(cluster: &Cluster, from: From) -> Result<Place> {
    Ok(match from {
        From::Pod => cluster.place_in_pod(SOCKET_CLIENT)?,
        From::PodPackets => cluster.place_in_pod(PACKET_CLIENT)?.outside_cgroup(),
        From::Node => cluster.topology().node(1)?.place(),
        From::Outside(_) => cluster.topology().client(),
    })
}

fn questions_about(cluster: &Cluster, service: &Service, slices: &[EndpointSlice]) -> Vec<Question> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let mut questions = Vec::new();
    for port in spec.ports.iter().flatten() {
        let transport = if port.protocol.as_deref() == Some("UDP") { Transport::Udp } else { Transport::Tcp };
        let port_name = port.name.as_deref().unwrap_or_default();
        let ask = |ip: IpAddr, number: i32, from: From, local: Option<&str>| {
            let endpoints = endpoints_of(cluster, service, slices, port_name, ip, local);
            let any = !endpoints_of(cluster, service, slices, port_name, ip, None).is_empty();
            let expected = match (endpoints.is_empty(), any) {
                (false, _) => Expected::Answered(endpoints),
                (true, true) => Expected::Silence,
                (true, false) => Expected::Refused,
            };
            let target = SocketAddr::new(ip, u16::try_from(number).unwrap_or_default());
            Question { service: short_name(service), target, transport, from, expected }
        };
        for ip in spec.cluster_ips.iter().flatten().filter_map(|ip| ip.parse().ok()) {
            questions.extend([From::Pod, From::PodPackets, From::Node].map(|from| ask(ip, port.port, from, None)));
        }
        let only_local = spec.external_traffic_policy.as_deref() == Some("Local");
        for (node_port, node) in
            port.node_port.iter().flat_map(|p| cluster.topology().nodes().iter().map(move |n| (p, n)))
        {
            let families = node.addresses().into_iter().filter(|ip| has_family(spec.ip_families.as_deref(), *ip));
            let local = only_local.then(|| node.name());
            questions.extend(families.map(|ip| ask(ip, *node_port, From::Outside(node.number().into()), local)));
        }
    }
    questions
}

/// Names of the pods behind a port for a client of the VIP's family; with `local`, only those on that node.
fn endpoints_of(
    cluster: &Cluster,
    service: &Service,
    slices: &[EndpointSlice],
    port: &str,
    vip: IpAddr,
    local: Option<&str>,
) -> BTreeSet<String> {
    let of_service = slices.iter().filter(|slice| {
        let named = slice.labels().get("kubernetes.io/service-name").is_some_and(|name| *name == service.name_any());
        let family = if vip.is_ipv4() { "IPv4" } else { "IPv6" };
        let has_port = slice.ports.iter().flatten().any(|p| p.name.as_deref().unwrap_or_default() == port);
        named && slice.namespace() == service.namespace() && slice.address_type == family && has_port
    });
    let ready = of_service.flat_map(|slice| slice.endpoints.iter().flatten()).filter(|endpoint| {
        let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true);
        ready && local.is_none_or(|node| endpoint.node_name.as_deref() == Some(node))
    });
    let addresses = ready.filter_map(|endpoint| endpoint.addresses.first()?.parse().ok());
    addresses.map(|ip: IpAddr| cluster.pod_at(ip).unwrap_or_else(|| ip.to_string())).collect()
}

fn has_family(families: Option<&[String]>, ip: IpAddr) -> bool {
    let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
    families.is_some_and(|families| families.iter().any(|named| named == family))
}

fn short_name(service: &Service) -> String {
    match service.namespace().as_deref() {
        None | Some("default") => service.name_any(),
        Some(namespace) => format!("{namespace}/{}", service.name_any()),
    }
}
