//! The Services of a scenario, on the node of [`Bed`].

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail};
use trama_proxy::dataplane::SyncScope;
use trama_proxy::model::{
    Desired, IpFamily, NodeConfig, NodePolicy, PodTraffic, PortSpec, Protocol, ServiceKey, ServiceObject,
    SliceEndpoint, SliceObject, SlicePort, decide,
};

use crate::fuzz::{Bed, local_pod, machine, neighbour};

/// What the node expresses.
#[derive(Default)]
pub(super) struct Services {
    desired: Desired,
}

impl Services {
    /// Writes it to the maps.
    pub(super) fn sync(&mut self, bed: &mut Bed) -> Result<()> {
        self.desired.set_node(node()?);
        let (snapshot, _) = self.desired.checkout();
        Ok(bed.kernel.sync(snapshot, SyncScope::Full)?)
    }

    /// `NAME PROTOCOL ADDRESS:PORT [WORDS] [to ENDPOINT...]`: a Service, in place of the one of that name.
    pub(super) fn add(&mut self, text: &str) -> Result<()> {
        let (text, endpoints) = text.split_once(" to ").unwrap_or((text, ""));
        let words: Vec<&str> = text.split_whitespace().collect();
        let [name, protocol, place, options @ ..] = &words[..] else {
            bail!("NAME PROTOCOL ADDRESS:PORT [WORDS] [to ENDPOINT...]")
        };
        let endpoints: Vec<SocketAddr> = endpoints.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let service = service(name, protocol, place.parse()?, options)?;
        let slice = slice(&service, &endpoints);
        let policy = NodePolicy { detects_pods_v4: true, detects_pods_v6: true, ..NodePolicy::default() };
        self.desired.replace(&service.key, decide(&service, &[&slice], &policy));
        Ok(())
    }

    /// The Service of this name is no more.
    pub(super) fn remove(&mut self, name: &str) -> Result<()> {
        self.desired.replace(&key(name), Vec::new());
        Ok(())
    }
}

fn key(name: &str) -> ServiceKey {
    ServiceKey { namespace: "ns".into(), name: name.into() }
}

fn node() -> Result<NodeConfig> {
    let v4 = |ips: [IpAddr; 2]| ips.into_iter().find_map(|ip| if let IpAddr::V4(ip) = ip { Some(ip) } else { None });
    let v6 = |ips: [IpAddr; 2]| ips.into_iter().find_map(|ip| if let IpAddr::V6(ip) = ip { Some(ip) } else { None });
    Ok(NodeConfig {
        node_port_addresses: machine(11).into(),
        node_addresses: [machine(11), neighbour(11)].concat().into_iter().collect(),
        masquerade_v4: v4(machine(11)),
        masquerade_v6: v6(machine(11)),
        pod_traffic: PodTraffic::Source(vec!["10.244.0.0/16".parse()?, "fd00:244::/32".parse()?]),
        service_cidrs: vec!["10.96.0.0/16".parse()?, "fd00:96::/112".parse()?],
        ..NodeConfig::default()
    })
}

fn service(name: &str, protocol: &str, place: SocketAddr, options: &[&str]) -> Result<ServiceObject> {
    let value = |name: &str| options.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let ips = |name: &str| {
        value(name).into_iter().flat_map(|list| list.split(',')).map(str::parse).collect::<Result<Vec<IpAddr>, _>>()
    };
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => bail!("{protocol} is no protocol of Services"),
    };
    let known = ["nodeport=", "external=", "lb=", "ranges="];
    let flags = ["affinity", "external-local", "internal-local"];
    if let Some(word) =
        options.iter().find(|word| !flags.contains(word) && !known.iter().any(|name| word.starts_with(name)))
    {
        bail!("{word} is unknown");
    }
    Ok(ServiceObject {
        key: key(name),
        created_seconds: 0,
        cluster_ips: vec![place.ip()],
        ports: vec![PortSpec {
            name: "".into(),
            protocol,
            port: place.port(),
            node_port: value("nodeport").map(str::parse).transpose().context("nodeport")?,
        }],
        external_ips: ips("external")?,
        load_balancer_ips: ips("lb")?,
        source_ranges: value("ranges").into_iter().map(str::parse).collect::<Result<_, _>>()?,
        affinity_seconds: options.contains(&"affinity").then_some(10_800),
        external_local: options.contains(&"external-local"),
        internal_local: options.contains(&"internal-local"),
        health_check_node_port: None,
        balancing: None,
    })
}

/// An endpoint is on this node if its address is one of this node's pods, or the node's.
fn slice(service: &ServiceObject, endpoints: &[SocketAddr]) -> SliceObject {
    let family = if service.cluster_ips.iter().any(IpAddr::is_ipv6) { IpFamily::V6 } else { IpFamily::V4 };
    let of = usize::from(family == IpFamily::V6);
    let here = |ip: IpAddr| ip == machine(11)[of] || (2..=9).any(|host| ip == local_pod(host)[of]);
    let endpoint = |address: &SocketAddr| SliceEndpoint {
        address: address.ip(),
        local: here(address.ip()),
        ready: true,
        serving: true,
        terminating: false,
        has_node_hints: false,
        hinted_for_node: false,
        zone_hints: None,
    };
    let port = |spec: &PortSpec| SlicePort {
        name: spec.name.clone(),
        protocol: spec.protocol,
        port: endpoints.first().map_or(spec.port, SocketAddr::port),
    };
    SliceObject {
        name: "one".into(),
        service: service.key.clone(),
        family,
        ports: service.ports.iter().map(port).collect(),
        endpoints: endpoints.iter().map(endpoint).collect(),
        weight: None,
        rejected: 0,
    }
}
