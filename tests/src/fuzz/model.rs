//! What a packet must meet: `model::answer` for one that opens a flow, and a memory of flows for all others.
//!
//! Nothing here knows how the programs work. Where they may choose, the model learns from what they did, and holds them to it.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use trama_proxy::dataplane::ebpf::Hook;
use trama_proxy::model::{
    Answer, Frontend, FrontendAddress, Packet as Question, ServicePort, ServicePortName, ServiceSnapshot, answer,
};

use super::bed::{Link, is_own};
use super::direct::Course;
use super::read::{FIN, Outline, RST, Tuple, has_ports, opens};
use super::tunnel::overhead;
use crate::packet::UDP;

/// Where a packet crosses an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Crossing {
    pub(crate) hook: Hook,
    pub(crate) link: Link,
}

impl Crossing {
    pub(crate) fn ingress(self) -> bool {
        self.hook != Hook::Egress
    }
}

/// An endpoint of a ServicePort, and which of those that were there under this address.
pub(super) type Backend = (ServicePortName, SocketAddr, u64);

/// What is known of a tuple.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) out: Tuple,
    /// The endpoint's direction.
    pub(crate) reply: bool,
    /// Conntrack sees the answers too.
    pub(crate) stack: bool,
    /// How the client's packets come or go.
    pub(crate) course: Course,
    pub(crate) flow: usize,
    closing: bool,
    backend: Backend,
}

impl Entry {
    /// Its packets leave in a tunnel, and nobody here sees the answers.
    pub(crate) fn is_direct(&self) -> bool {
        !self.reply && self.course == Course::Out
    }

    /// Bytes that a tunnel adds to its packets.
    pub(crate) fn overhead(&self, gue: bool) -> usize {
        if self.is_direct() { overhead(usize::from(self.out.source.is_ipv6()), gue) } else { 0 }
    }
}

/// A place where a new flow may go.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) destination: SocketAddr,
    /// The source that the endpoint sees.
    pub(crate) source: IpAddr,
    pub(crate) masquerade: bool,
    /// The endpoint is on another node.
    pub(crate) remote: bool,
    /// There is no address to masquerade with.
    pub(crate) lost: bool,
    pub(crate) stack: bool,
    pub(crate) course: Course,
    pub(super) backend: Backend,
}

/// What a packet must meet.
#[derive(Debug, Clone)]
pub(crate) enum Meaning {
    /// It goes on as it came.
    Untouched,
    Drop,
    /// ICMP port unreachable.
    Refuse,
    Known(Entry),
    New(Vec<Candidate>),
    /// It goes to one of those that a tunnel leads to; where there are others, it may also go on as it came.
    Rejoin(Vec<Candidate>),
    /// What is known does not say.
    Unclear,
}

/// A flow, for those who make packets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flow {
    pub(crate) key: Tuple,
    pub(crate) out: Tuple,
    /// How its first packet came.
    pub(crate) crossing: Crossing,
    pub(crate) course: Course,
}

/// The memory.
#[derive(Default)]
pub(crate) struct Model {
    pub(crate) snapshot: ServiceSnapshot,
    /// Every endpoint that has flows or may get some.
    pub(super) endpoints: HashMap<(ServicePortName, SocketAddr), u64>,
    incarnations: u64,
    pub(crate) entries: HashMap<Tuple, Entry>,
    pub(crate) flows: Vec<Flow>,
    /// Flows that have lost one of their entries to another, as the tuples were used again.
    murky: HashSet<usize>,
    /// Ends of flows of which only the kernel knows where they lead.
    blurred: HashSet<(SocketAddr, u8)>,
    /// Endpoints that such a flow may lead to, and the source that they see.
    reached: HashSet<(SocketAddr, IpAddr, u8)>,
    /// `None`: only the kernel knows.
    pub(super) affinity: HashMap<(ServicePortName, IpAddr), Option<(SocketAddr, u64)>>,
}

impl Model {
    /// From here on this is what holds.
    pub(crate) fn set(&mut self, snapshot: &ServiceSnapshot) {
        let mut now = HashMap::new();
        for service in snapshot.services.values() {
            let name = &service.name;
            for endpoint in service.cluster_endpoints.iter().chain(&service.local_endpoints) {
                let place = (name.clone(), endpoint.address());
                let incarnation = self.endpoints.get(&place).copied().unwrap_or_else(|| {
                    self.incarnations += 1;
                    self.incarnations
                });
                now.insert(place, incarnation);
            }
            for address in service.kept_endpoints.iter().chain(&service.draining_endpoints) {
                let place = (name.clone(), *address);
                if let Some(incarnation) = self.endpoints.get(&place) {
                    now.entry(place).or_insert(*incarnation);
                }
            }
        }
        self.endpoints = now;
        self.snapshot = snapshot.clone();
    }

    fn is_alive(&self, backend: &Backend) -> bool {
        let (name, address, incarnation) = backend;
        self.endpoints.get(&(name.clone(), *address)).is_some_and(|now| now == incarnation)
    }

    /// What a packet with ports must meet.
    pub(crate) fn segment(&mut self, crossing: Crossing, tuple: Tuple, flags: u8) -> Meaning {
        if let Some(entry) = self.entries.get(&tuple) {
            if self.may_be_lost(tuple, entry) {
                return Meaning::Unclear;
            }
            let starts = opens(tuple.protocol, flags);
            let taken_over = (tuple.protocol != UDP && entry.closing) || !self.is_alive(&entry.backend);
            if entry.reply || !starts || !taken_over {
                return Meaning::Known(entry.clone());
            }
        }
        if self.is_blurred(tuple) {
            return Meaning::Unclear;
        }
        if !opens(tuple.protocol, flags) {
            return self.rejoining(crossing, tuple, flags);
        }
        self.opening(crossing, tuple)
    }

    pub(super) fn is_blurred(&self, tuple: Tuple) -> bool {
        let (source, destination, protocol) = (tuple.source, tuple.destination, tuple.protocol);
        [source, destination].iter().any(|end| self.blurred.contains(&(*end, protocol)))
            || self.reached.contains(&(source, destination.ip(), protocol))
            || self.reached.contains(&(destination, source.ip(), protocol))
    }

    /// Whether the tuple may be another flow's by now, or nobody's: one that nobody has seen may have taken the answers of one that was
    /// closed or whose endpoint is gone. Without its answers' entry the client's own may count for nothing.
    pub(super) fn may_be_lost(&self, tuple: Tuple, entry: &Entry) -> bool {
        if entry.is_direct() {
            return self.murky.contains(&entry.flow);
        }
        let answers = if entry.reply { tuple } else { entry.out.reversed() };
        let may_be_taken = || self.is_blurred(answers) && (entry.closing || !self.is_alive(&entry.backend));
        self.murky.contains(&entry.flow) || may_be_taken()
    }

    /// From now on only the kernel knows.
    pub(crate) fn blur(&mut self, tuple: Tuple) {
        self.blurred.insert((tuple.source, tuple.protocol));
        if let Some(entry) = self.entries.get(&tuple).filter(|entry| !entry.reply) {
            // It may take the tuple of its answers back from who has that by now.
            let holder = self.entries.get(&entry.out.reversed()).map(|other| other.flow);
            self.murky.extend(holder.into_iter().chain([entry.flow]));
        }
        let Some((service, _)) = self.served(tuple) else { return };
        let name = service.name.clone();
        let all =
            service.cluster_endpoints.iter().chain(&service.local_endpoints).map(trama_proxy::model::Endpoint::address);
        let ends: Vec<SocketAddr> = all.collect();
        let sources = [Some(tuple.source.ip()), self.masquerade_address(tuple.source.ip())];
        for source in sources.into_iter().flatten() {
            self.reached.extend(ends.iter().map(|end| (*end, source, tuple.protocol)));
        }
        self.affinity.insert((name, tuple.source.ip()), None);
    }

    /// Who listens at the destination.
    pub(super) fn served(&self, tuple: Tuple) -> Option<(&ServicePort, &Frontend)> {
        self.served_at(tuple, |address| self.snapshot.node.node_port_addresses.contains(&address))
    }

    /// The same, where NodePorts are those of all addresses for which `has_node_ports` holds.
    pub(super) fn served_at(
        &self,
        tuple: Tuple,
        has_node_ports: impl Fn(IpAddr) -> bool,
    ) -> Option<(&ServicePort, &Frontend)> {
        let all = self.snapshot.services.values().filter(|service| service.name.protocol as u8 == tuple.protocol);
        let all = all.flat_map(|service| service.frontends.iter().map(move |frontend| (&**service, frontend)));
        all.filter(|(service, frontend)| {
            let here = match frontend.address {
                FrontendAddress::Ip(ip) => ip == tuple.destination.ip(),
                FrontendAddress::NodePort => {
                    has_node_ports(tuple.destination.ip())
                        && (service.name.family as usize == usize::from(tuple.destination.is_ipv6()))
                }
            };
            here && frontend.port == tuple.destination.port()
        })
        .min_by_key(|(_, frontend)| frontend.address)
    }

    /// Whether it is a frontend's or one of the node's own; XDP may leave what goes elsewhere to tc.
    pub(crate) fn is_present(&self, address: IpAddr) -> bool {
        let services = self.snapshot.services.values();
        let mut frontends = services.flat_map(|service| service.frontends.iter().map(|frontend| frontend.address));
        self.snapshot.node.node_addresses.contains(&address)
            || frontends.any(|frontend| frontend == FrontendAddress::Ip(address))
    }

    pub(super) fn opening(&mut self, crossing: Crossing, tuple: Tuple) -> Meaning {
        let (source, egress) = (tuple.source.ip(), !crossing.ingress());
        let Some((service, _)) = self.served(tuple) else {
            return match self.unserved(crossing, source, tuple.destination.ip()) {
                Some(meaning) => meaning,
                None => self.foreign(crossing, tuple),
            };
        };
        if egress && crossing.link != Link::Lo && !is_own(source) {
            return Meaning::Untouched;
        }
        if egress && !is_own(source) {
            return Meaning::Unclear;
        }
        if !egress && self.is_impossible(source) {
            return Meaning::Drop;
        }
        let input = (!egress).then_some(crossing.link.name());
        let protocol = service.name.protocol;
        match answer(&self.snapshot, &Question { protocol, source, destination: tuple.destination, input }) {
            Answer::Pass => Meaning::Untouched,
            Answer::Drop => Meaning::Drop,
            Answer::Reject => Meaning::Refuse,
            Answer::Forward { endpoints, masquerade, direct } => {
                let name = service.name.clone();
                let all = endpoints.iter().filter_map(|endpoint| {
                    let address = endpoint.address();
                    let hairpin = address.ip() == source;
                    let asked = masquerade && !hairpin && !is_own(address.ip());
                    let masquerade = hairpin || (asked && !direct);
                    let course = if asked && direct && !endpoint.local { Course::Out } else { Course::Plain };
                    let from_node = masquerade || course == Course::Out;
                    let node = self.masquerade_address(source);
                    let incarnation = self.endpoints.get(&(name.clone(), address))?;
                    Some(Candidate {
                        destination: address,
                        source: if from_node { node.unwrap_or(source) } else { source },
                        masquerade,
                        remote: !endpoint.local,
                        lost: from_node && node.is_none(),
                        stack: false,
                        course,
                        backend: (name.clone(), address, *incarnation),
                    })
                });
                Meaning::New(self.held(service, source, all.collect()))
            }
        }
    }

    fn masquerade_address(&self, source: IpAddr) -> Option<IpAddr> {
        match source {
            IpAddr::V4(_) => self.snapshot.node.masquerade_v4.map(IpAddr::V4),
            IpAddr::V6(_) => self.snapshot.node.masquerade_v6.map(IpAddr::V6),
        }
    }

    /// With affinity the endpoint that the client had last, where that is one of them.
    fn held(&self, service: &ServicePort, source: IpAddr, candidates: Vec<Candidate>) -> Vec<Candidate> {
        let held = service.affinity_seconds.and_then(|_| *self.affinity.get(&(service.name.clone(), source))?);
        let Some((address, incarnation)) = held else { return candidates };
        let is_held = |candidate: &&Candidate| candidate.backend.1 == address && candidate.backend.2 == incarnation;
        match candidates.iter().find(is_held) {
            Some(one) => vec![one.clone()],
            None => candidates,
        }
    }

    /// Sources that nobody can have.
    pub(super) fn is_impossible(&self, source: IpAddr) -> bool {
        let in_service_network = self.snapshot.cluster_ips.contains_key(&source)
            || self.snapshot.node.service_cidrs.iter().any(|net| net.contains(&source));
        is_nobody(source) || in_service_network || is_own(source)
    }

    /// What meets a packet to an address where nobody listens; `None` if it is nothing of ours.
    pub(crate) fn unserved(&self, crossing: Crossing, source: IpAddr, destination: IpAddr) -> Option<Meaning> {
        let meaning = if is_own(destination) {
            None
        } else if self.snapshot.cluster_ips.contains_key(&destination) {
            Some(Meaning::Refuse)
        } else {
            let inside = self.snapshot.node.service_cidrs.iter().any(|net| net.contains(&destination));
            inside.then_some(Meaning::Drop)
        };
        let on_its_way = !crossing.ingress() && crossing.link != Link::Lo && !is_own(source);
        meaning.map(|meaning| if on_its_way { Meaning::Untouched } else { meaning })
    }

    /// A new flow that is nothing of ours must not meet the answers of one that is.
    fn foreign(&mut self, crossing: Crossing, tuple: Tuple) -> Meaning {
        let Some(taken) = self.entries.get(&tuple.reversed()).filter(|entry| entry.reply) else {
            return Meaning::Untouched;
        };
        if self.murky.contains(&taken.flow) || crossing.hook == Hook::Frame {
            return if crossing.hook == Hook::Frame { Meaning::Untouched } else { Meaning::Unclear };
        }
        if taken.closing || !self.is_alive(&taken.backend) {
            self.murky.insert(taken.flow);
            return Meaning::Untouched;
        }
        Meaning::New(vec![Candidate {
            destination: tuple.destination,
            source: tuple.source.ip(),
            masquerade: false,
            remote: false,
            lost: false,
            stack: !crossing.ingress(),
            course: Course::Plain,
            backend: taken.backend.clone(),
        }])
    }

    /// Whether a new flow may have this source port.
    pub(crate) fn check_port(&self, key: Tuple, out: Tuple, candidate: &Candidate) -> Result<(), String> {
        if candidate.course == Course::Out {
            return Ok(());
        }
        let (own, port) = (key.source.port(), out.source.port());
        let in_range = (1024..=29_999).contains(&port);
        let holder = |out: Tuple| self.entries.get(&out.reversed());
        let clear = |out: Tuple| {
            holder(out).is_none_or(|entry| {
                entry.closing
                    || self.murky.contains(&entry.flow)
                    || entry.out == key.reversed()
                    || !self.is_alive(&entry.backend)
            })
        };
        if !clear(out) {
            return Err(format!("the answers of {out:?} belong to another open flow: {:?}", holder(out)));
        }
        let kept = Tuple { source: SocketAddr::new(out.source.ip(), own), ..out };
        let may_keep =
            !candidate.masquerade || ((1024..=29_999).contains(&own) && !self.is_reserved(key.protocol, own));
        let must_keep = may_keep && holder(kept).is_none() && !self.is_blurred(kept.reversed());
        if must_keep && port != own {
            return Err(format!("source port {own} is free, and became {port}"));
        }
        if port != own && !in_range {
            return Err(format!("source port {port} is outside of 1024-29999"));
        }
        if candidate.masquerade && self.is_reserved(key.protocol, port) {
            return Err(format!("source port {port} is a tunnel's or a NodePort"));
        }
        Ok(())
    }

    /// NodePorts, and tunnels by convention.
    fn is_reserved(&self, protocol: u8, port: u16) -> bool {
        const TUNNELS: [u16; 10] = [1701, 2152, 4500, 4789, 4790, 6080, 6081, 6635, 8472, 51_820];
        (protocol == UDP && TUNNELS.contains(&port)) || (30_000..=32_767).contains(&port)
    }

    /// A flow has begun.
    pub(crate) fn open(&mut self, crossing: Crossing, key: Tuple, out: Tuple, candidate: &Candidate) {
        let flow = self.flows.len();
        let (name, address, incarnation) = candidate.backend.clone();
        let remembers = self.served(key).is_some_and(|(service, _)| service.affinity_seconds.is_some());
        if !candidate.stack && candidate.course != Course::In && remembers {
            self.affinity.insert((name, key.source.ip()), Some((address, incarnation)));
        }
        let backend = candidate.backend.clone();
        let course = candidate.course;
        let entry =
            |out, reply, stack| Entry { out, reply, stack, course, flow, closing: false, backend: backend.clone() };
        let answers = entry(key.reversed(), true, candidate.stack);
        let answers = (course != Course::Out).then(|| self.entries.insert(out.reversed(), answers));
        let replaced = [answers.flatten(), self.entries.insert(key, entry(out, false, false))];
        self.murky.extend(replaced.into_iter().flatten().map(|entry| entry.flow));
        self.flows.push(Flow { key, out, crossing, course });
    }

    /// What the flags of a packet of a flow do to it.
    pub(crate) fn note(&mut self, tuple: Tuple, flags: u8) {
        if tuple.protocol == UDP || flags & (FIN | RST) == 0 || !has_ports(tuple.protocol) {
            return;
        }
        let Some(entry) = self.entries.get_mut(&tuple) else { return };
        entry.closing = true;
        if entry.is_direct() {
            return;
        }
        let (flow, twin) = (entry.flow, entry.out.reversed());
        match self.entries.get_mut(&twin) {
            Some(other) if other.flow == flow => {
                other.closing |= flags & RST != 0;
            }
            Some(other) => {
                let of_other = other.flow;
                self.murky.extend([flow, of_other]);
            }
            None => {
                self.murky.insert(flow);
            }
        }
    }

    /// Whether only the kernel knows what becomes of this flow's packets.
    pub(crate) fn is_unclear(&self, flow: &Flow) -> bool {
        let entry = self.entries.get(&flow.key);
        entry.is_none_or(|entry| self.murky.contains(&entry.flow)) || self.is_blurred(flow.key)
    }

    /// As [`Model::segment`], of an ICMP error whose quoted packet had this tuple.
    pub(crate) fn quoted(&self, quoted: Tuple) -> Option<Result<&Entry, ()>> {
        let entry = self.entries.get(&quoted.reversed());
        match entry {
            Some(entry) if self.may_be_lost(quoted.reversed(), entry) => Some(Err(())),
            Some(entry) => Some(Ok(entry)),
            None if self.is_blurred(quoted) => Some(Err(())),
            None => None,
        }
    }

    /// As [`Model::segment`], of a later fragment whose first one had this tuple.
    pub(crate) fn piece(&self, tuple: Tuple) -> Meaning {
        match self.entries.get(&tuple) {
            Some(entry) if self.may_be_lost(tuple, entry) => Meaning::Unclear,
            Some(entry) => Meaning::Known(entry.clone()),
            None if self.is_blurred(tuple) => Meaning::Unclear,
            None => Meaning::Untouched,
        }
    }

    /// As [`Model::segment`], of a packet without ports.
    pub(crate) fn portless(&self, crossing: Crossing, outline: &Outline) -> Meaning {
        self.unserved(crossing, outline.source, outline.destination).unwrap_or(Meaning::Untouched)
    }
}

/// Addresses that no packet can come from.
pub(super) fn is_nobody(source: IpAddr) -> bool {
    match source {
        IpAddr::V4(ip) => ip.is_loopback() || ip.octets()[0] == 0 || ip.octets()[0] >= 224,
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unspecified() || ip.is_multicast(),
    }
}

#[cfg(test)]
mod tests;
