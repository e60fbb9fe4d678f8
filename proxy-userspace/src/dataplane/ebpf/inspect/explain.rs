//! One packet's decision, step by step: by the shared code over the pinned maps, and by the kernel's program itself.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use proxy_common::decide::{Chosen, Crossing, Evidence, Found, Masquerade, Outcome, Step, Tables, Unserved, new_flow};
use proxy_common::flow_table::FlowEdit;
use proxy_common::pod::Pod;
use proxy_common::{
    AffinityKey, Backend, Be16, Counter, FRONTEND_LEAST_CONNECTIONS, FRONTEND_MAGLEV, Flow, FlowKey, Frontend,
    FrontendKey, NodeSettings, Origin, RuleBits, SLOT_ID_MASK, SourceRange, V4, V6,
};

use super::super::encode::UserAddress;
use super::tables::{Asked, PinnedTables};
use super::trial::{self, Fate, Trial, monotonic_ns};
use super::{InspectError, Pinned};
use crate::model::Protocol;

/// Slots of one frontend that are gone through; a block has more only with more endpoints than that.
const CANDIDATES_MAX: u32 = 131_072;
/// Endpoints that are written out.
const WRITTEN_MAX: usize = 16;

/// The first packet of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes; of the source's family.
    pub destination: SocketAddr,
    /// Its protocol.
    pub protocol: Protocol,
    /// The interface that it crosses, and whether on its way out.
    pub crossing: Crossing,
}

/// What becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// The steps, one line each.
    pub steps: Vec<String>,
    /// What the decision comes to.
    pub decision: String,
    /// What the kernel's program did.
    pub kernel: String,
    /// Whether they agree.
    pub agreement: Agreement,
}

/// Whether the kernel did what the decision says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agreement {
    /// It did.
    Agree,
    /// It did something else.
    Differ,
}

impl Pinned {
    /// Decides a packet, explains it, and lets the kernel's program decide it too. `names` has the ServicePorts by id.
    ///
    /// The packet is counted like any other. The flow that it opens is removed again, and an affinity is put back.
    ///
    /// # Errors
    /// When a map can't be read or the program can't be run.
    pub fn explain(&self, question: &Question, names: &BTreeMap<u32, String>) -> Result<Explanation, InspectError> {
        match question.source {
            IpAddr::V4(_) => explain::<V4>(self, question, names),
            IpAddr::V6(_) => explain::<V6>(self, question, names),
        }
    }

    /// Whether an address is one of this node's.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn is_own(&self, address: IpAddr) -> Result<bool, InspectError> {
        let own = match address {
            IpAddr::V4(_) => V4::from_ip(address).map(|own| is_own::<V4>(self, &own)),
            IpAddr::V6(_) => V6::from_ip(address).map(|own| is_own::<V6>(self, &own)),
        };
        Ok(address.is_loopback() || own.transpose()?.unwrap_or(false))
    }
}

fn is_own<A: UserAddress>(pinned: &Pinned, address: &A) -> Result<bool, InspectError>
where
    FrontendKey<A>: aya::Pod,
    NodeSettings<A>: aya::Pod,
    Backend<A>: aya::Pod,
    SourceRange<A>: aya::Pod,
    AffinityKey<A>: aya::Pod,
{
    let tables = PinnedTables::open(pinned, 0)?;
    let own = proxy_common::decide::is_own(&tables, address);
    tables.check()?;
    Ok(own)
}

fn explain<A: UserAddress>(
    pinned: &Pinned,
    question: &Question,
    names: &BTreeMap<u32, String>,
) -> Result<Explanation, InspectError>
where
    FrontendKey<A>: aya::Pod,
    NodeSettings<A>: aya::Pod,
    Backend<A>: aya::Pod,
    SourceRange<A>: aya::Pod,
    AffinityKey<A>: aya::Pod,
    FlowKey<A>: Pod,
    Flow<A>: Pod,
    FlowEdit<A>: Pod,
{
    let tables = PinnedTables::<A>::open(pinned, (monotonic_ns() / 1_000_000_000) as u32)?;
    let mut key = FlowKey {
        source: A::from_ip(question.source).unwrap_or_default(),
        destination: A::from_ip(question.destination.ip()).unwrap_or_default(),
        source_port: Be16(0),
        destination_port: Be16::from_host(question.destination.port()),
        protocol: question.protocol as u8,
        padding: [0; 3],
    };
    key.source_port = trial::free_port(pinned, &key)?;
    let decision = Decision::make(&tables, question.crossing, &key);
    tables.check()?;
    let service_id = decision.found.frontend.service_id;
    let client = AffinityKey { client: key.source, service_id };
    let affinity = (decision.found.frontend.affinity_seconds != 0 && matches!(decision.outcome, Outcome::Forward(_)))
        .then(|| (client, tables.affinity(key.source, service_id)));
    let trial = trial::run(pinned, question.crossing, &key, affinity)?;
    let agreement = if decision.agrees(&trial) { Agreement::Agree } else { Agreement::Differ };
    let writer = Writer { names, tables: &tables, key: &key };
    Ok(Explanation {
        steps: writer.steps(&decision, question),
        decision: writer.outcome(&decision),
        kernel: writer.trial(&trial),
        agreement,
    })
}

/// What the shared code says, for every choice that it could make.
struct Decision<A> {
    outcome: Outcome<A>,
    asked: Vec<Asked<A>>,
    found: Found<A>,
    /// Every backend that may be chosen, with the source that it would see. Empty where nothing is forwarded.
    fates: BTreeSet<(A, Be16, A)>,
    /// Why they would see it, each reason once.
    masquerades: Vec<Masquerade>,
}

impl<A: UserAddress> Decision<A> {
    fn make(tables: &PinnedTables<A>, crossing: Crossing, key: &FlowKey<A>) -> Self
    where
        FrontendKey<A>: aya::Pod,
        NodeSettings<A>: aya::Pod,
        Backend<A>: aya::Pod,
        SourceRange<A>: aya::Pod,
        AffinityKey<A>: aya::Pod,
    {
        let decide = |random: u32| {
            tables.begin(random);
            let (mut found, mut chosen) = (Found::default(), Chosen::default());
            // No loopback address is ever translated in a packet: the program leaves it before it decides.
            let outcome = match crossing.egress && key.source.is_loopback() {
                true => Outcome::Pass,
                false => new_flow(tables, crossing, key, true, &mut found, &mut chosen),
            };
            (outcome, found, chosen)
        };
        let (outcome, found, _) = decide(0);
        let asked = tables.asked();
        let (mut fates, mut masquerades) = (BTreeSet::new(), Vec::new());
        for random in randoms(&found.frontend, &asked) {
            let (outcome, _, chosen) = decide(random);
            if let Outcome::Forward(source) = outcome {
                fates.insert((chosen.backend.address, chosen.backend.port, source.address));
            }
            for asked in tables.asked() {
                match asked {
                    Asked::Step(Step::Masquerade(why)) if !masquerades.contains(&why) => masquerades.push(why),
                    _ => {}
                }
            }
        }
        Self { outcome, asked, found, fates, masquerades }
    }

    /// Whether the kernel's program did one of the things that it may do, and counted it as it should.
    fn agrees(&self, trial: &Trial<A>) -> bool {
        let counted = |reason: &Counter| trial.counted.contains(reason);
        match (&self.outcome, trial.fate) {
            (Outcome::Forward(_), Fate::Forward { source, backend, port }) => {
                self.fates.contains(&(backend, port, source))
            }
            (Outcome::Refuse(reason), Fate::Refuse) | (Outcome::Drop(reason), Fate::Drop) => counted(reason),
            (Outcome::Pass | Outcome::Foreign, Fate::Pass) => true,
            _ => false,
        }
    }
}

/// A random number for each slot of the block that the rule chose.
fn randoms<A>(frontend: &Frontend, asked: &[Asked<A>]) -> Vec<u32> {
    let local = asked.iter().any(|asked| matches!(asked, Asked::Step(Step::Rule(rule)) if rule.local()));
    let (_, count) = frontend.block(local);
    // There the packet itself is the number.
    if frontend.flags & FRONTEND_MAGLEV != 0 {
        return vec![0];
    }
    let spread = |slot: u32| ((u64::from(slot) << 32).div_ceil(u64::from(count.max(1)))) as u32;
    (0..count.clamp(1, CANDIDATES_MAX)).map(spread).collect()
}

/// Puts it into words.
struct Writer<'a, A: UserAddress>
where
    FrontendKey<A>: aya::Pod,
    NodeSettings<A>: aya::Pod,
    Backend<A>: aya::Pod,
    SourceRange<A>: aya::Pod,
    AffinityKey<A>: aya::Pod,
{
    names: &'a BTreeMap<u32, String>,
    tables: &'a PinnedTables<A>,
    key: &'a FlowKey<A>,
}

impl<A: UserAddress> Writer<'_, A>
where
    FrontendKey<A>: aya::Pod,
    NodeSettings<A>: aya::Pod,
    Backend<A>: aya::Pod,
    SourceRange<A>: aya::Pod,
    AffinityKey<A>: aya::Pod,
{
    fn steps(&self, decision: &Decision<A>, question: &Question) -> Vec<String> {
        let way = if question.crossing.egress { "leaves the node" } else { "enters the node" };
        let interface = question.crossing.interface;
        let name = nix::net::if_::if_indextoname(interface).map(|name| name.to_string_lossy().into_owned());
        let name = name.unwrap_or_else(|_| format!("interface {interface}"));
        let (source, destination) = (question.source, question.destination);
        let mut lines = vec![format!("packet      {source} to {destination} {:?}, {way} at {name}", question.protocol)];
        lines.extend(decision.asked.iter().filter_map(|asked| match asked {
            Asked::Frontend(key, found) => Some(self.lookup(key, found.as_ref())),
            Asked::Step(step) => self.step(step, &decision.found.frontend),
        }));
        if matches!(decision.outcome, Outcome::Forward(_)) {
            let local =
                decision.asked.iter().any(|asked| matches!(asked, Asked::Step(Step::Rule(rule)) if rule.local()));
            lines.push(self.candidates(&decision.found.frontend, local));
            let some = if decision.masquerades.len() > 1 { "some, " } else { "" };
            lines
                .extend(decision.masquerades.iter().map(|why| format!("masquerade  {some}{}", masquerade_words(*why))));
        }
        lines
    }

    fn service(&self, id: u32) -> String {
        self.names.get(&id).cloned().unwrap_or_else(|| format!("ServicePort {id}"))
    }

    fn lookup(&self, key: &FrontendKey<A>, found: Option<&Frontend>) -> String {
        let port = key.port.to_host();
        let place = match key.address == A::default() {
            true => format!("NodePort {port}"),
            false => SocketAddr::new(key.address.to_ip(), port).to_string(),
        };
        match found {
            Some(frontend) => format!("frontend    {place} is {}", self.service(frontend.service_id)),
            None => format!("frontend    {place} is nobody's"),
        }
    }

    fn step(&self, step: &Step, frontend: &Frontend) -> Option<String> {
        Some(match step {
            Step::From(origin, evidence) => format!("origin      {}", origin_words(*origin, *evidence)),
            Step::OnItsWay => "origin      passes through: it was decided on its way in".to_owned(),
            Step::SourceRanges(true) => "ranges      the client is in one of loadBalancerSourceRanges".to_owned(),
            Step::SourceRanges(false) => "ranges      the client is in none of loadBalancerSourceRanges".to_owned(),
            Step::Rule(rule) => format!("rule        {}", rule_words(*rule, frontend)),
            Step::Unserved(what) => format!("unserved    {}", unserved_words(*what)),
            Step::Affinity(held) => {
                let held =
                    if *held { "the client has a backend that still takes connections" } else { "the client has none" };
                format!("affinity    ClientIP, {} s: {held}", frontend.affinity_seconds)
            }
            // Said of all candidates, not of the one that was tried first.
            Step::Masquerade(_) => return None,
        })
    }

    fn candidates(&self, frontend: &Frontend, local: bool) -> String {
        let (first, count) = frontend.block(local);
        let (mut all, mut seen): (Vec<String>, BTreeSet<u32>) = (Vec::new(), BTreeSet::new());
        for slot in first..first.saturating_add(count.min(CANDIDATES_MAX)) {
            let mut backend = Backend::default();
            // Weighted endpoints have many slots.
            let Some(id) = self.tables.slot(slot).map(|slot| slot & SLOT_ID_MASK).filter(|id| seen.insert(*id)) else {
                continue;
            };
            if self.tables.backend(id, &mut backend) && backend.takes_flows() {
                all.push(SocketAddr::new(backend.address.to_ip(), backend.port.to_host()).to_string());
            }
        }
        let rest = all.len().saturating_sub(WRITTEN_MAX);
        let written: Vec<String> = all.into_iter().take(WRITTEN_MAX).collect();
        let rest = if rest > 0 { format!(" and {rest} more") } else { String::new() };
        format!("endpoints   {}{rest}", written.join(", "))
    }

    fn outcome(&self, decision: &Decision<A>) -> String {
        match decision.outcome {
            Outcome::Forward(_) => {
                let sources: BTreeSet<A> = decision.fates.iter().map(|(_, _, source)| *source).collect();
                let sources: Vec<String> = sources.into_iter().map(|source| self.source_words(source)).collect();
                format!("forward to one of {}, {}", decision.fates.len(), sources.join(" or "))
            }
            Outcome::Refuse(reason) => format!("refuse ({})", reason.name()),
            Outcome::Drop(reason) => format!("drop ({})", reason.name()),
            Outcome::Pass | Outcome::Foreign => "pass: not for trama-proxy to touch".to_owned(),
        }
    }

    fn trial(&self, trial: &Trial<A>) -> String {
        match trial.fate {
            Fate::Forward { source, backend, port } => {
                let backend = SocketAddr::new(backend.to_ip(), port.to_host());
                format!("forward to {backend}, {}", self.source_words(source))
            }
            Fate::Refuse => format!("refuse{}", drops(trial)),
            Fate::Drop => format!("drop{}", drops(trial)),
            Fate::Pass => "pass".to_owned(),
        }
    }

    fn source_words(&self, source: A) -> String {
        match source == self.key.source {
            true => "source kept".to_owned(),
            false => format!("source becomes {}", source.to_ip()),
        }
    }
}

fn drops<A>(trial: &Trial<A>) -> String {
    let is_drop = |counter: &&Counter| counter.kind() == proxy_common::counter::CounterKind::Drop;
    let names: Vec<&str> = trial.counted.iter().filter(is_drop).map(|counter| counter.name()).collect();
    if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) }
}

fn origin_words(origin: Origin, evidence: Evidence) -> &'static str {
    match (origin, evidence) {
        (Origin::Node, _) => "node: it leaves from one of the node's addresses, or over lo",
        (Origin::Pod, Evidence::Interface) => "pod: it came in through an interface of pods",
        (Origin::Pod, _) => "pod: its source is in a pod network",
        (Origin::External, Evidence::Interface) => "external: it came in through no interface of pods",
        (Origin::External, _) => "external: its source is in no pod network and not the node's",
    }
}

fn rule_words(rule: RuleBits, frontend: &Frontend) -> String {
    let policy = if rule.local() { "Local" } else { "Cluster" };
    let masquerade = if rule.masquerade() { ", masquerade" } else { "" };
    match rule.action() {
        RuleBits::FORWARD => {
            let choice = match frontend.flags {
                flags if flags & FRONTEND_MAGLEV != 0 => "by the flow's hash (Maglev)",
                flags if flags & FRONTEND_LEAST_CONNECTIONS != 0 => "the less loaded of two at random",
                _ => "at random",
            };
            format!("policy {policy}: an endpoint {choice}{masquerade}")
        }
        RuleBits::REJECT => "refuse: the Service has no endpoints".to_owned(),
        _ => "drop: policy Local, and no endpoint on this node".to_owned(),
    }
}

fn unserved_words(what: Unserved) -> &'static str {
    match what {
        Unserved::Foreign => "the destination is no Service's, nor in a service network",
        Unserved::Port => "the address is a Service's, which does not have this port",
        Unserved::Address => "the address is in a service network and no Service's",
    }
}

fn masquerade_words(why: Masquerade) -> &'static str {
    match why {
        Masquerade::No => "no: the rule does not ask for it",
        Masquerade::NoOwnEndpoint => "no: the endpoint is on an address of this node",
        Masquerade::NoDirectReturn => "no: the endpoint answers the client itself, or is on this node",
        Masquerade::Rule => "yes: the rule asks for it",
        Masquerade::Hairpin => "yes: the client is the endpoint, which would answer itself",
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::decide::Source;

    use super::*;

    const CLIENT: V4 = V4::from_octets([10, 0, 0, 1]);
    const ENDPOINT: V4 = V4::from_octets([10, 244, 0, 1]);

    fn decision(outcome: Outcome<V4>) -> Decision<V4> {
        let fates = BTreeSet::from([(ENDPOINT, Be16::from_host(8080), CLIENT)]);
        Decision { outcome, asked: Vec::new(), found: Found::default(), fates, masquerades: Vec::new() }
    }

    fn did(fate: Fate<V4>, counted: &[Counter]) -> Trial<V4> {
        Trial { fate, counted: counted.to_vec() }
    }

    #[test]
    fn a_kernel_that_does_something_else_is_found_out() {
        let source =
            Source { address: CLIENT, masquerade: false, ports: (1, 2), service_id: 1, flags: 0, reply_flags: 0 };
        let forward = decision(Outcome::Forward(source));
        let (backend, port) = (ENDPOINT, Be16::from_host(8080));
        assert!(forward.agrees(&did(Fate::Forward { source: CLIENT, backend, port }, &[])));
        assert!(!forward.agrees(&did(Fate::Forward { source: ENDPOINT, backend, port }, &[])), "another source");
        assert!(!forward.agrees(&did(Fate::Forward { source: CLIENT, backend: CLIENT, port }, &[])), "another backend");
        assert!(!forward.agrees(&did(Fate::Pass, &[])));
        let refuse = decision(Outcome::Refuse(Counter::PacketReject));
        assert!(refuse.agrees(&did(Fate::Refuse, &[Counter::PacketReject])));
        assert!(!refuse.agrees(&did(Fate::Refuse, &[Counter::PacketUnserved])), "for another reason");
        assert!(!refuse.agrees(&did(Fate::Drop, &[Counter::PacketReject])));
        assert!(decision(Outcome::Foreign).agrees(&did(Fate::Pass, &[])));
        assert!(!decision(Outcome::Foreign).agrees(&did(Fate::Drop, &[])));
    }

    #[test]
    fn every_slot_of_a_block_is_drawn_once() {
        let frontend = Frontend { cluster_count: 7, ..Frontend::default() };
        let slots: Vec<u32> =
            randoms::<V4>(&frontend, &[]).into_iter().map(|random| proxy_common::select::pick(random, 7)).collect();
        assert_eq!(slots, [0, 1, 2, 3, 4, 5, 6]);
    }
}
