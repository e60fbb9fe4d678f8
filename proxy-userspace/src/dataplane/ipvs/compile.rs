//! From one ServicePort to what it needs of the kernel: virtual services with their endpoints, and elements of sets and maps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use node_sys::ipvs::{Family, ServiceId};

use super::layout::{Origin, SetName};
use super::marks::{DROP, MASQUERADE, Marks, Owner, REJECT};
use crate::dataplane::elements::Words;
use crate::model::{
    Action, Endpoint, EndpointSet, Frontend, FrontendAddress, FrontendKind, IpFamily, NodeConfig, Rule, ServicePort,
    ServicePortName,
};

/// What names an element: family, set, key, and the last key of a range.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) family: IpFamily,
    pub(super) set: SetName,
    pub(super) first: Words,
    pub(super) last: Option<Words>,
}

/// What an element leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Value {
    /// Nothing: a member of a set.
    Member,
    /// A mark.
    Mark(u32),
    /// The chain that remembers clients for so many seconds.
    Sticky(u32),
}

/// What one ServicePort needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Compiled {
    /// Endpoints of every virtual service.
    pub(super) services: BTreeMap<ServiceId, BTreeSet<SocketAddr>>,
    /// Endpoints whose flows stay theirs though they get no new ones.
    pub(super) kept: BTreeSet<SocketAddr>,
    /// Elements. One may be needed by several ServicePorts, with the same value.
    pub(super) elements: BTreeMap<Key, Value>,
    /// Whose marks are among them.
    pub(super) owners: Vec<Owner>,
}

/// Compiles `service`.
pub(super) fn service_port(service: &ServicePort, marks: &mut Marks) -> Compiled {
    let mut compiler = Compiler { service, marks, out: Compiled::default() };
    for frontend in &service.frontends {
        compiler.frontend(frontend);
    }
    compiler.hairpin();
    compiler.out.kept = service.kept_endpoints.iter().copied().collect();
    compiler.out
}

/// The elements that say what the node is.
pub(super) fn node(node: &NodeConfig, cluster_ips: impl Iterator<Item = IpAddr>) -> BTreeMap<Key, Value> {
    let of = |set, addresses: &mut dyn Iterator<Item = IpAddr>| -> Vec<(Key, Value)> {
        addresses.map(|address| (address_key(set, address), Value::Member)).collect()
    };
    let mut elements = of(SetName::NodeAddresses, &mut node.node_addresses.iter().copied());
    elements.extend(of(SetName::NodePortAddresses, &mut node.node_port_addresses.iter().copied()));
    elements.extend(of(SetName::ClusterIps, &mut cluster_ips.into_iter()));
    elements.into_iter().collect()
}

/// The element of an address in a set of addresses.
pub(super) fn address_key(set: SetName, address: IpAddr) -> Key {
    Key { family: IpFamily::of(address), set, first: Words::new().address(address), last: None }
}

struct Compiler<'a> {
    service: &'a ServicePort,
    marks: &'a mut Marks,
    out: Compiled,
}

impl Compiler<'_> {
    fn name(&self) -> &ServicePortName {
        &self.service.name
    }

    fn add(&mut self, set: SetName, first: Words, last: Option<Words>, value: Value) {
        let family = self.name().family;
        self.out.elements.insert(Key { family, set, first, last }, value);
    }

    fn frontend(&mut self, frontend: &Frontend) {
        let rules = frontend.rules;
        for (origin, rule) in [(Origin::Pod, rules.pod), (Origin::Node, rules.node), (Origin::External, rules.external)]
        {
            let mark = self.mark_of_rule(rule);
            let (set, key) = match frontend.address {
                FrontendAddress::Ip(address) => (SetName::Frontends(origin), self.frontend_key(address, frontend.port)),
                FrontendAddress::NodePort => {
                    let key = Words::new().protocol(self.name().protocol).port(frontend.port);
                    (SetName::NodePorts(origin), key)
                }
            };
            self.add(set, key, None, Value::Mark(mark));
        }
        if let (FrontendAddress::Ip(address), FrontendKind::LoadBalancerIp) = (frontend.address, frontend.kind) {
            self.source_ranges(address, frontend.port);
        }
    }

    fn frontend_key(&self, address: IpAddr, port: u16) -> Words {
        Words::new().address(address).protocol(self.name().protocol).port(port)
    }

    fn mark_of_rule(&mut self, rule: Rule) -> u32 {
        match rule.action {
            Action::Reject => REJECT,
            Action::Drop => DROP,
            Action::Forward(set) => self.mark_of_set(set) | if rule.masquerade { MASQUERADE } else { 0 },
        }
    }

    /// The mark of a list of endpoints, whose virtual service is made with its first use.
    fn mark_of_set(&mut self, set: EndpointSet) -> u32 {
        let mark = self.mark(Owner::Set(self.name().clone(), set));
        let id = self.service_id(mark);
        if !self.out.services.contains_key(&id) {
            let endpoints = match set {
                EndpointSet::Cluster => &self.service.cluster_endpoints,
                EndpointSet::Local => &self.service.local_endpoints,
            };
            let endpoints: BTreeSet<SocketAddr> = endpoints.iter().map(Endpoint::address).collect();
            if let Some(seconds) = self.service.affinity_seconds {
                self.sticky(mark, &endpoints, seconds);
            }
            self.out.services.insert(id, endpoints);
        }
        mark
    }

    /// IPVS's own persistence keeps the port of the packet for a service that is known by its mark. So every endpoint has a
    /// virtual service of its own, and nf_tables remembers which one the client was sent to.
    fn sticky(&mut self, mark: u32, endpoints: &BTreeSet<SocketAddr>, seconds: u32) {
        self.add(SetName::Sticky, Words::new().number(mark), None, Value::Sticky(seconds));
        for address in endpoints {
            let own = self.mark(Owner::Endpoint(self.name().clone(), *address));
            let target = Words::new().number(mark).address(address.ip()).port(address.port());
            self.add(SetName::Targets, target, None, Value::Mark(own));
            self.add(SetName::Usable, Words::new().number(own), None, Value::Member);
            let id = self.service_id(own);
            self.out.services.insert(id, [*address].into());
        }
    }

    fn mark(&mut self, owner: Owner) -> u32 {
        let mark = self.marks.of(&owner);
        if !self.out.owners.contains(&owner) {
            self.out.owners.push(owner);
        }
        mark
    }

    fn service_id(&self, mark: u32) -> ServiceId {
        let family = match self.name().family {
            IpFamily::V4 => Family::Ipv4,
            IpFamily::V6 => Family::Ipv6,
        };
        ServiceId { family, mark }
    }

    /// Ranges may overlap in a Service and must not in the kernel. No range of this family leaves nobody.
    fn source_ranges(&mut self, address: IpAddr, port: u16) {
        let ranges = &self.service.load_balancer_source_ranges;
        if ranges.is_empty() {
            return;
        }
        let key = self.frontend_key(address, port);
        self.add(SetName::Restricted, key, None, Value::Member);
        let own: Vec<IpNet> = ranges.iter().copied().filter(|net| net.addr().is_ipv4() == address.is_ipv4()).collect();
        for net in IpNet::aggregate(&own) {
            let (first, last) = (key.address(net.network()), key.address(net.broadcast()));
            self.add(SetName::SourceRanges, first, Some(last), Value::Member);
        }
    }

    fn hairpin(&mut self) {
        let lists = self.service.cluster_endpoints.iter().chain(&self.service.local_endpoints);
        let addresses: BTreeSet<IpAddr> =
            lists.filter(|endpoint| endpoint.local).map(|endpoint| endpoint.address().ip()).collect();
        for address in addresses {
            self.add(SetName::Hairpin, Words::new().address(address).address(address), None, Value::Member);
        }
    }
}
