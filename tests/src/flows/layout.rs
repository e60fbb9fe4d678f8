//! Who stands where: every address of a scenario gets one place, and every address that may be reached a server. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde_json::Value;

use super::scenario::{Protocol, Scenario, Verdict};

/// Where an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Site {
    /// The node itself.
    Node,
    /// A pod of the node, in a namespace of its own.
    Pod(IpAddr),
    /// Behind the other node: endpoints that are not local.
    Far,
    /// Outside of the cluster: clients, and whoever would answer at a virtual address if the proxy left it alone.
    Outside,
}

/// A server: it answers who it is and whom it saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Server {
    pub(super) site: Site,
    pub(super) protocol: Protocol,
    pub(super) address: SocketAddr,
}

/// The places of a scenario.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Layout {
    /// Local pods, by address.
    pub(super) pods: BTreeSet<IpAddr>,
    /// Addresses behind the other node.
    pub(super) far: BTreeSet<IpAddr>,
    /// Addresses outside.
    pub(super) outside: BTreeSet<IpAddr>,
    pub(super) servers: BTreeSet<Server>,
}

impl Layout {
    pub(super) fn of(scenario: &Scenario) -> Self {
        let places = Places::of(scenario);
        let mut layout = Self::default();
        for (address, ports) in &places.endpoints {
            for (protocol, port) in ports {
                layout.serve(&places, *protocol, SocketAddr::new(*address, *port));
            }
        }
        for flow in &scenario.flows {
            layout.place(flow.source, places.site_of(flow.source));
            // Whoever would answer if the packet arrived unchanged: it tells PASS from everything else.
            layout.serve(&places, flow.protocol, flow.target);
            if let Verdict::Dnat { backends, .. } = &flow.expect {
                backends.iter().for_each(|backend| layout.serve(&places, flow.protocol, *backend));
            }
        }
        layout
    }

    fn serve(&mut self, places: &Places<'_>, protocol: Protocol, address: SocketAddr) {
        let site = places.site_of(address.ip());
        self.place(address.ip(), site);
        self.servers.insert(Server { site, protocol, address });
    }

    fn place(&mut self, address: IpAddr, site: Site) {
        match site {
            Site::Node => false,
            Site::Pod(_) => self.pods.insert(address),
            Site::Far => self.far.insert(address),
            Site::Outside => self.outside.insert(address),
        };
    }

    pub(super) fn site_of(scenario: &Scenario, address: IpAddr) -> Site {
        Places::of(scenario).site_of(address)
    }
}

/// What decides about places.
struct Places<'a> {
    scenario: &'a Scenario,
    /// Every address in a slice, with what its ports say.
    endpoints: BTreeMap<IpAddr, BTreeSet<(Protocol, u16)>>,
    /// Those of them that are on this node.
    local: BTreeSet<IpAddr>,
}

impl<'a> Places<'a> {
    fn of(scenario: &'a Scenario) -> Self {
        let mut places = Self { scenario, endpoints: BTreeMap::new(), local: BTreeSet::new() };
        for slice in &scenario.endpoint_slices {
            let ports = list(slice, "ports").filter_map(slice_port);
            let ports: BTreeSet<_> = ports.collect();
            for endpoint in list(slice, "endpoints") {
                let Some(address) = endpoint_address(endpoint) else { continue };
                places.endpoints.entry(address).or_default().extend(&ports);
                if endpoint.get("nodeName").and_then(Value::as_str) == Some(&scenario.config.node_name) {
                    places.local.insert(address);
                }
            }
        }
        places
    }

    fn site_of(&self, address: IpAddr) -> Site {
        let config = &self.scenario.config;
        if address.is_loopback() || config.node_ips.contains(&address) {
            return Site::Node;
        }
        if self.local.contains(&address) {
            return Site::Pod(address);
        }
        if self.endpoints.contains_key(&address) {
            return Site::Far;
        }
        let is_client = self.scenario.flows.iter().any(|flow| flow.source == address);
        let is_pod = config.detect_local.pods().iter().any(|network| network.contains(&address));
        if is_client && is_pod { Site::Pod(address) } else { Site::Outside }
    }
}

fn list<'a>(object: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> {
    object.get(field).and_then(Value::as_array).into_iter().flatten()
}

fn slice_port(port: &Value) -> Option<(Protocol, u16)> {
    let protocol = match port.get("protocol").and_then(Value::as_str) {
        None | Some("TCP") => Protocol::Tcp,
        Some("UDP") => Protocol::Udp,
        Some("SCTP") => Protocol::Sctp,
        Some(_) => return None,
    };
    let number = port.get("port").and_then(Value::as_u64)?;
    Some((protocol, u16::try_from(number).ok().filter(|number| *number != 0)?))
}

/// The first address, as proxies use it; `None` for names, and for addresses that no machine of a lab can have.
fn endpoint_address(endpoint: &Value) -> Option<IpAddr> {
    let text = endpoint.get("addresses")?.as_array()?.first()?.as_str()?;
    let address = text.parse().ok().or_else(|| padded(text).map(IpAddr::V4))?;
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    (!link_local && !address.is_multicast() && !address.is_unspecified()).then_some(address)
}

/// Old objects write octets with leading zeros, which are decimal all the same.
fn padded(text: &str) -> Option<Ipv4Addr> {
    let octets: Option<Vec<u8>> = text.split('.').map(|part| part.parse().ok()).collect();
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(octets?).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::scenario::{Config, DetectLocal, Flow};
    use serde_json::json;

    fn scenario() -> Scenario {
        let flow = |source: &str, target: &str| Flow {
            name: "f".into(),
            protocol: Protocol::Tcp,
            source: source.parse().unwrap(),
            target: target.parse().unwrap(),
            sticky: false,
            expect: Verdict::Reject,
        };
        let endpoint = |address: &str, node: &str| json!({ "addresses": [address], "nodeName": node });
        Scenario {
            name: "s".into(),
            config: Config {
                node_name: "me".into(),
                node_ips: vec!["192.168.0.2".parse().unwrap()],
                primary_node_ips: Vec::new(),
                detect_local: DetectLocal::ClusterCidr(vec!["10.0.0.0/8".parse().unwrap()]),
                service_cidrs: Vec::new(),
                node_port_addresses: Vec::new(),
                masquerade_all: false,
                zone: None,
            },
            services: Vec::new(),
            endpoint_slices: vec![json!({
                "endpoints": [endpoint("10.180.00.001", "me"), endpoint("10.180.1.1", "other"), endpoint("web.example", "me")],
                "ports": [{ "port": 80 }, { "port": 53, "protocol": "UDP" }, { "name": "all" }],
            })],
            flows: vec![
                flow("10.0.0.2", "10.20.30.40:80"),
                flow("203.0.113.2", "192.168.0.2:3001"),
                flow("1.2.3.4", "1.2.3.4:80"),
                flow("127.0.0.1", "127.0.0.1:3001"),
            ],
        }
    }

    #[test]
    fn every_address_has_its_place() {
        let scenario = scenario();
        let site = |address: &str| Layout::site_of(&scenario, address.parse().unwrap());
        let pod = |address: &str| Site::Pod(address.parse().unwrap());
        assert_eq!(site("192.168.0.2"), Site::Node);
        assert_eq!(site("127.0.0.1"), Site::Node);
        assert_eq!(site("10.180.0.1"), pod("10.180.0.1"));
        assert_eq!(site("10.180.1.1"), Site::Far);
        assert_eq!(site("10.0.0.2"), pod("10.0.0.2"));
        assert_eq!(site("10.20.30.40"), Site::Outside, "in the pods' network, but nobody's client: a virtual address");
        assert_eq!(site("203.0.113.2"), Site::Outside);
    }

    #[test]
    fn whatever_may_be_reached_has_a_server() {
        let layout = Layout::of(&scenario());
        let has = |site, protocol, address: &str| {
            layout.servers.contains(&Server { site, protocol, address: address.parse().unwrap() })
        };
        assert!(has(Site::Pod("10.180.0.1".parse().unwrap()), Protocol::Udp, "10.180.0.1:53"));
        assert!(has(Site::Far, Protocol::Tcp, "10.180.1.1:80"));
        assert!(has(Site::Outside, Protocol::Tcp, "1.2.3.4:80") && has(Site::Node, Protocol::Tcp, "192.168.0.2:3001"));
        assert_eq!(layout.servers.len(), 8);
        assert_eq!((layout.pods.len(), layout.far.len(), layout.outside.len()), (2, 1, 3));
    }
}
