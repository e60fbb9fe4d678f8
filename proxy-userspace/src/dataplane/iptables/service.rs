//! What one ServicePort becomes: its own chains, the rules that lead to them, and the refusals of what does not get there.

use super::chain::{Chain, ClientList, Leaf, PORT_BLOCK, Part, ServiceId};
use super::rule::{Match, Rule, Target, host};
use crate::model::{
    Action, EndpointSet, Frontend, FrontendAddress, FrontendKind, IpFamily, OriginRules, PodTraffic, ServicePort,
};

/// A ServicePort, and what its rules need to know of the node.
pub(super) struct Expression<'p> {
    pub(super) id: ServiceId,
    pub(super) port: &'p ServicePort,
    pub(super) pods: &'p PodTraffic,
}

impl Expression<'_> {
    /// Its chains in nat.
    ///
    /// Nearly every ServicePort has one: marks for masquerade, then one rule an endpoint. Where a second way in needs the same
    /// endpoints, or origins differ in where they go, the endpoints have a chain of their own.
    pub(super) fn chains(&self) -> Vec<(Part, Vec<Rule>)> {
        let entries: Vec<(Part, OriginRules)> =
            [Part::External, Part::Internal].into_iter().filter_map(|part| Some((part, self.entry(part)?))).collect();
        if let [(part, rules)] = entries.as_slice()
            && let Some(set) = the_only_set(rules)
            && let Some(marks) = common_marks(rules)
        {
            return vec![(*part, marks.into_iter().chain(self.endpoints(set)).collect())];
        }
        let mut chains: Vec<_> = entries.iter().map(|(part, rules)| (*part, self.by_origin(rules))).collect();
        for (part, set) in [(Part::Cluster, EndpointSet::Cluster), (Part::Local, EndpointSet::Local)] {
            if entries.iter().any(|(_, rules)| forwards_to(rules, set)) {
                chains.push((part, self.endpoints(set)));
            }
        }
        chains
    }

    /// The rules of one way in, if anything goes on from there. All frontends of a way have the same: the model decides once
    /// for the ClusterIP and once for all external addresses.
    fn entry(&self, part: Part) -> Option<OriginRules> {
        let frontend = self.port.frontends.iter().find(|frontend| way_in(frontend) == part)?;
        forwards(&frontend.rules).then_some(frontend.rules)
    }

    fn by_origin(&self, rules: &OriginRules) -> Vec<Rule> {
        let forward = |set| Target::Goto(Chain::Service(self.id, part_of(set)));
        if let (Some(set), Some(mut marks)) = (the_only_set(rules), common_marks(rules)) {
            marks.push(Rule::new([], forward(set)));
            return marks;
        }
        let pods = pod_matches(self.pods, self.port.name.family).into_iter().map(|one| (vec![one], rules.pod));
        let origins =
            [(vec![Match::SourceLocal], rules.node)].into_iter().chain(pods).chain([(vec![], rules.external)]);
        let mut chain = Vec::new();
        for (matches, rule) in origins {
            if rule.masquerade {
                chain.push(Rule::new(matches.clone(), Target::Jump(Chain::Mark)));
            }
            chain.push(match rule.action {
                Action::Forward(set) => Rule::new(matches, forward(set)),
                Action::Reject | Action::Drop => Rule::new(matches, Target::Return),
            });
        }
        chain
    }

    /// Affinity first: a client that is on an endpoint's list goes there. Then each endpoint with the same chance.
    fn endpoints(&self, set: EndpointSet) -> Vec<Rule> {
        let endpoints = match set {
            EndpointSet::Cluster => &self.port.cluster_endpoints,
            EndpointSet::Local => &self.port.local_endpoints,
        };
        let protocol = Match::Protocol(self.port.name.protocol);
        let list = |address| ClientList::of(&self.port.name, address);
        let mut rules = Vec::with_capacity(endpoints.len());
        for endpoint in endpoints.iter().filter(|_| self.port.affinity_seconds.is_some()) {
            let listed = Match::Listed(list(endpoint.address()), self.port.affinity_seconds.unwrap_or_default());
            rules.push(Rule::new([protocol.clone(), listed], Target::Dnat(endpoint.address())));
        }
        for (index, endpoint) in endpoints.iter().enumerate() {
            let mut matches = vec![protocol.clone()];
            let left = endpoints.len() - index;
            matches.extend((left > 1).then_some(Match::OnceIn(left)));
            matches.extend(self.port.affinity_seconds.map(|_| Match::List(list(endpoint.address()))));
            rules.push(Rule::new(matches, Target::Dnat(endpoint.address())));
        }
        rules
    }

    /// The rules in nat that lead from its frontends to its chains, each with the leaf that holds it.
    ///
    /// Whoever is outside of a load-balancer IP's source ranges finds no rule here, and one that drops in [`Self::refusals`].
    pub(super) fn dispatch(&self) -> Vec<(Leaf, Rule)> {
        let mut rules = Vec::new();
        for frontend in self.port.frontends.iter().filter(|frontend| forwards(&frontend.rules)) {
            let target = Target::Goto(Chain::Service(self.id, way_in(frontend)));
            for source in self.admitted(frontend) {
                rules.push((leaf_of(self.port, frontend), Rule::new(self.matches(frontend, source), target)));
            }
        }
        rules
    }

    /// The rules in filter for what nat did not translate. That is all whose rule does not forward: so the origin needs no
    /// second look, because where one origin is rejected all are, and where one is dropped no other is rejected.
    pub(super) fn refusals(&self) -> Vec<(Leaf, Rule)> {
        let mut rules = Vec::new();
        for frontend in &self.port.frontends {
            let leaf = leaf_of(self.port, frontend);
            let mut push = |source, target| rules.push((leaf, Rule::new(self.matches(frontend, source), target)));
            let has_ranges = !self.ranges(frontend).is_empty();
            match refusal(&frontend.rules) {
                Some(Target::Reject) => {
                    self.admitted(frontend).into_iter().for_each(|source| push(source, Target::Reject));
                    if has_ranges {
                        push(None, Target::Drop);
                    }
                }
                Some(target) => push(None, target),
                None if has_ranges => push(None, Target::Drop),
                None => {}
            }
        }
        rules
    }

    fn ranges(&self, frontend: &Frontend) -> &[ipnet::IpNet] {
        match frontend.kind {
            FrontendKind::LoadBalancerIp => &self.port.load_balancer_source_ranges,
            _ => &[],
        }
    }

    /// One condition for each source range; none is everybody.
    fn admitted(&self, frontend: &Frontend) -> Vec<Option<Match>> {
        let ranges = self.ranges(frontend);
        if ranges.is_empty() { vec![None] } else { ranges.iter().map(|net| Some(Match::Source(*net))).collect() }
    }

    fn matches(&self, frontend: &Frontend, source: Option<Match>) -> Vec<Match> {
        let mut matches = Vec::with_capacity(4);
        if let FrontendAddress::Ip(address) = frontend.address {
            matches.push(Match::Destination(host(address)));
        }
        matches.extend(source);
        let name = &self.port.name;
        matches.push(Match::Ports(name.protocol, frontend.port, frontend.port));
        matches.push(Match::Comment(format!("{}/{}:{}", name.namespace, name.service, name.port)));
        matches
    }
}

/// Conditions that are each true for a part of the pods' traffic.
pub(super) fn pod_matches(pods: &PodTraffic, family: IpFamily) -> Vec<Match> {
    match pods {
        PodTraffic::Source(networks) => {
            networks.iter().filter(|net| IpFamily::of(net.addr()) == family).map(|net| Match::Source(*net)).collect()
        }
        PodTraffic::Bridge(name) => vec![Match::Input { name: name.clone(), prefix: false }],
        PodTraffic::Prefix(name) => vec![Match::Input { name: name.clone(), prefix: true }],
    }
}

/// Marks for masquerade where all origins go the same way: `None` where that can't be said in one rule.
fn common_marks(rules: &OriginRules) -> Option<Vec<Rule>> {
    let mark = |chain| Some(vec![Rule::new([], Target::Jump(chain))]);
    match (rules.pod.masquerade, rules.node.masquerade, rules.external.masquerade) {
        (false, false, false) => Some(Vec::new()),
        (true, true, true) => mark(Chain::Mark),
        (false, true, true) => mark(Chain::MarkOutside),
        _ => None,
    }
}

/// The set that every origin goes to.
fn the_only_set(rules: &OriginRules) -> Option<EndpointSet> {
    match rules.pod.action {
        Action::Forward(set) if rules.node.action == rules.pod.action && rules.external.action == rules.pod.action => {
            Some(set)
        }
        _ => None,
    }
}

fn all(rules: &OriginRules) -> [Action; 3] {
    [rules.pod.action, rules.node.action, rules.external.action]
}

fn forwards(rules: &OriginRules) -> bool {
    all(rules).iter().any(|action| matches!(action, Action::Forward(_)))
}

fn forwards_to(rules: &OriginRules, set: EndpointSet) -> bool {
    all(rules).contains(&Action::Forward(set))
}

fn refusal(rules: &OriginRules) -> Option<Target> {
    let all = all(rules);
    if all.contains(&Action::Reject) {
        Some(Target::Reject)
    } else {
        all.contains(&Action::Drop).then_some(Target::Drop)
    }
}

fn part_of(set: EndpointSet) -> Part {
    match set {
        EndpointSet::Cluster => Part::Cluster,
        EndpointSet::Local => Part::Local,
    }
}

fn way_in(frontend: &Frontend) -> Part {
    match frontend.kind {
        FrontendKind::ClusterIp => Part::Internal,
        FrontendKind::NodePort | FrontendKind::ExternalIp | FrontendKind::LoadBalancerIp => Part::External,
    }
}

fn leaf_of(port: &ServicePort, frontend: &Frontend) -> Leaf {
    match frontend.address {
        FrontendAddress::Ip(address) => Leaf::Address(last_byte(address)),
        FrontendAddress::NodePort => Leaf::Ports(port.name.protocol, frontend.port / PORT_BLOCK * PORT_BLOCK),
    }
}

/// The last eight bits: ClusterIPs are given out over a wide range, and differ there.
pub(super) fn last_byte(address: std::net::IpAddr) -> u8 {
    let [.., last] = match address {
        std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        std::net::IpAddr::V6(v6) => v6.octets(),
    };
    last
}
