//! What becomes of a packet that may open a flow: from its tuple to a backend and the source that the backend sees.
//!
//! ```text
//!  tuple ─► find (frontend) ─► origin ─► source ranges ─► rule ─► select (backend) ─► masquerade ─► Outcome::Forward
//!             └► unserved ─► Outcome::{Refuse, Drop, Foreign}    └► Outcome::{Refuse, Drop}
//! ```
//! The kernel's programs run this over their maps, user space over the pinned ones and over plain ones in tests: one
//! definition for the packet and for its explanation. What is looked up comes through [`Tables`], so nothing here does IO.
//!
//! Results are written where the caller says: returned by value they would be copied on the 512 bytes of a BPF stack.

mod find;
mod select;

pub use self::find::{Unserved, find, in_networks, unserved};
use self::select::take_left;
pub use self::select::{Client, select};

use crate::{
    Address, Backend, Counter, FLOW_ANSWERED, FLOW_TUNNEL, FRONTEND_SOURCE_RANGES, FlowKey, Frontend, FrontendKey,
    NODE_ADDRESS_LOCAL, NODE_PODS_BY_INTERFACE, NodeSettings, Origin, RuleBits, SourceRange,
};

/// Index of `lo` in every network namespace (`LOOPBACK_IFINDEX` of include/net/flow.h).
pub const LOOPBACK_INTERFACE: u32 = 1;

/// What a decision asks for. An implementation answers from one family's maps.
pub trait Tables {
    /// Addresses of the family.
    type A: Address;
    /// Who holds an affinity.
    type Client<'a>: Client
    where
        Self: 'a;

    /// Whether `address` may be a frontend's, a ClusterIP or one of the node's: `false` where it certainly is none, which saves the lookup.
    #[inline(always)]
    fn may_be_known(&self, _address: &Self::A) -> bool {
        true
    }
    /// Copies the frontend of `key` to `into`, one version of it whole; `false` when there is none.
    fn frontend(&self, key: &FrontendKey<Self::A>, into: &mut Frontend) -> bool;
    /// The node's facts; `None` before there are any.
    fn settings(&self) -> Option<&NodeSettings<Self::A>>;
    /// The backend id in a slot; `None` beyond the map.
    fn slot(&self, index: u32) -> Option<u32>;
    /// Copies backend `id` to `into`; `false` beyond the map.
    fn backend(&self, id: u32, into: &mut Backend<Self::A>) -> bool;
    /// Copies backend `id` to `into` if it still is the one that the generation names and keeps its flows.
    fn live(&self, id: u32, generation: u32, into: &mut Backend<Self::A>) -> bool;
    /// Flows that are open to backend `id`, where its ServicePort has them counted; 0 elsewhere.
    #[inline(always)]
    fn open_flows(&self, _id: u32) -> u32 {
        0
    }
    /// `NODE_ADDRESS_*` bits of an address; 0 for one that is not this node's.
    fn node_address_flags(&self, address: &Self::A) -> u32;
    /// Whether the address is some Service's ClusterIP.
    fn cluster_ip_in_use(&self, address: &Self::A) -> bool;
    /// Whether one of the ServicePort's networks contains the client.
    fn source_range(&self, client: &SourceRange<Self::A>) -> bool;
    /// Whether what arrives through the interface of this index is a pod's.
    fn is_pod_interface(&self, index: u32) -> bool;
    /// Id and generation of the backend that a socket has just chosen behind this frontend and left to its packet, once.
    #[inline(always)]
    fn left_by_socket(&self, _key: &FrontendKey<Self::A>) -> Option<(u32, u32)> {
        None
    }
    /// The affinity of the packets from `source`.
    fn client<'a>(&'a self, source: &Self::A) -> Self::Client<'a>;
    /// Any 32 bits.
    fn random(&self) -> u32;
    /// Seconds of the clock that affinities are measured by.
    fn now_seconds(&self) -> u32;
    /// Called at each step with what it found. Nothing in the kernel; an explanation collects them.
    #[inline(always)]
    fn note(&self, _step: Step) {}
}

/// What a step of the decision found; for explanations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// The connection comes from here, for this reason.
    From(Origin, Evidence),
    /// The packet leaves the node and is not the node's own: it was looked at on its way in.
    OnItsWay,
    /// The ServicePort's source ranges were asked, and let the client in or not.
    SourceRanges(bool),
    /// The frontend's rule for the origin.
    Rule(RuleBits),
    /// No frontend answers, and this is what the address is.
    Unserved(Unserved),
    /// The client's affinity was asked, and named a backend that still takes flows or not.
    Affinity(bool),
    /// Whose address the backend sees.
    Masquerade(Masquerade),
}

/// By what an origin was told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Evidence {
    /// It leaves the node over `lo`, or from one of the node's addresses.
    OwnAddress,
    /// The interface that it came in through is pods', or is not.
    Interface,
    /// Its source is in a network of pods, or is not.
    Network,
}

/// Whether the source becomes the node's, and why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Masquerade {
    /// The rule does not ask for it.
    No,
    /// The rule asks for it, but the endpoint is on an address of this node: the kernel drops what arrives from its own address, and
    /// kube-proxy does not masquerade what is delivered locally.
    NoOwnEndpoint,
    /// The rule asks for it.
    Rule,
    /// The rule asks for it, and for direct server return: the answer finds the client without this node, or the endpoint is on it.
    NoDirectReturn,
    /// The client is the endpoint: it would answer itself directly.
    Hairpin,
}

/// How a packet crosses an interface, seen from the node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Crossing {
    /// Index of the interface.
    pub interface: u32,
    /// Out of the node; else into it.
    pub egress: bool,
}

/// A frontend and the key under which it was found.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct Found<A> {
    /// The key, to read the frontend again.
    pub key: FrontendKey<A>,
    /// A copy: one consistent view for the whole decision.
    pub frontend: Frontend,
}

/// A backend and its id.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct Chosen<A> {
    /// Index into `backends`.
    pub id: u32,
    /// A copy of the entry.
    pub backend: Backend<A>,
}

/// Where the source of a new flow comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Source<A> {
    /// Its address.
    pub address: A,
    /// Whether it is the node's, so that the port must come from the node's range.
    pub masquerade: bool,
    /// That range, host byte order.
    pub ports: (u16, u16),
    /// ServicePort that the flow is counted for; 0 for none.
    pub service_id: u32,
    /// Of the client's entry: [`DIRECT`], where the source is that of the tunnel to the endpoint's node; else 0.
    pub flags: u8,
    /// Of the answer's entry: [`FLOW_TUNNEL`], or [`FLOW_STACK`](crate::FLOW_STACK) where answers are the kernel's to deal with once translated;
    /// else 0.
    pub reply_flags: u8,
}

/// The flags of a flow whose packets go to the endpoint's node in a tunnel. Nobody here sees answers, so they count as given.
pub const DIRECT: u8 = FLOW_TUNNEL | FLOW_ANSWERED;

impl<A> Source<A> {
    /// Whether the packets go to the endpoint's node in a tunnel.
    #[inline(always)]
    pub const fn is_direct(&self) -> bool {
        self.flags & FLOW_TUNNEL != 0
    }
}

/// What becomes of a packet that may open a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome<A> {
    /// It opens a flow to the chosen backend, from this source.
    Forward(Source<A>),
    /// It is refused with ICMP, for the reason counted.
    Refuse(Counter),
    /// It is dropped, for the reason counted.
    Drop(Counter),
    /// It is for a Service, but not to be looked at here.
    Pass,
    /// It goes to nothing of ours.
    Foreign,
}

/// Decides a packet that may open a flow, and belongs to none. `ports` says that its protocol has some, as all that Services know.
///
/// With [`Outcome::Forward`] the frontend is in `found` and the backend in `chosen`; with any other what is there means nothing.
#[inline(always)]
pub fn new_flow<T: Tables>(
    tables: &T,
    crossing: Crossing,
    key: &FlowKey<T::A>,
    ports: bool,
    found: &mut Found<T::A>,
    chosen: &mut Chosen<T::A>,
) -> Outcome<T::A> {
    if ports && find(tables, &key.destination, key.destination_port, key.protocol, false, found) {
        return open(tables, crossing, key, found, chosen);
    }
    // Nothing that an earlier packet left is taken for this one's.
    found.frontend.service_id = 0;
    let unserved = unserved(tables, &key.destination);
    tables.note(Step::Unserved(unserved));
    match unserved {
        Unserved::Foreign => Outcome::Foreign,
        _ if crossing.egress && !is_from_node(tables, crossing, &key.source) => Outcome::Pass,
        Unserved::Address => Outcome::Drop(Counter::Unallocated),
        Unserved::Port => Outcome::Refuse(Counter::PacketUnserved),
    }
}

/// A new flow to one of our frontends.
#[inline(always)]
fn open<T: Tables>(
    tables: &T,
    crossing: Crossing,
    key: &FlowKey<T::A>,
    found: &mut Found<T::A>,
    chosen: &mut Chosen<T::A>,
) -> Outcome<T::A> {
    let source = &key.source;
    let Some(settings) = tables.settings() else { return Outcome::Pass };
    let Some(origin) = origin(tables, crossing, source, settings) else { return Outcome::Pass };
    if !crossing.egress
        && let Some(reason) = impossible_source(tables, source)
    {
        return Outcome::Drop(reason);
    }
    if found.frontend.flags & FRONTEND_SOURCE_RANGES != 0 {
        let client = SourceRange { service_id: found.frontend.service_id, client: *source };
        let let_in = tables.source_range(&client);
        tables.note(Step::SourceRanges(let_in));
        if !let_in {
            return Outcome::Drop(Counter::SourceRange);
        }
    }
    let rule = found.frontend.rule(origin);
    tables.note(Step::Rule(rule));
    match rule.action() {
        RuleBits::FORWARD => {}
        RuleBits::REJECT => return Outcome::Refuse(Counter::PacketReject),
        _ => return Outcome::Drop(Counter::PolicyDrop),
    }
    let is_left = !crossing.egress && take_left(tables, found, rule, chosen);
    if !is_left && !select(tables, found, rule, Some(key), &tables.client(source), chosen) {
        return Outcome::Drop(Counter::StaleBackend);
    }
    let masquerade = masquerade(tables, source, &chosen.backend.address, rule);
    tables.note(Step::Masquerade(masquerade));
    let flags = match masquerade {
        // Elsewhere the source is the client's already: the node of an endpoint here takes the answer.
        Masquerade::NoDirectReturn if chosen.backend.local == 0 && !crossing.egress => DIRECT,
        _ => 0,
    };
    let masquerade = matches!(masquerade, Masquerade::Rule | Masquerade::Hairpin);
    let own_source = masquerade || flags != 0;
    if own_source && settings.masquerade == T::A::default() {
        return Outcome::Drop(Counter::NoMasqueradeAddress);
    }
    Outcome::Forward(Source {
        address: if own_source { settings.masquerade } else { *source },
        masquerade,
        ports: (settings.source_port_min, settings.source_port_max),
        service_id: found.frontend.service_id,
        flags,
        reply_flags: 0,
    })
}

/// Why no packet to a Service can come in from there. The kernel drops martians, but behind the hook, where they would be ours already,
/// and what claims to be from the node would be answered to one of the node's own sockets. A ClusterIP is nobody's address, except where
/// the node has it itself. Addresses of load balancers and external IPs may well be sources: they are machines outside.
#[inline(always)]
pub fn impossible_source<T: Tables>(tables: &T, source: &T::A) -> Option<Counter> {
    if source.is_never_a_source() || unserved(tables, source) != Unserved::Foreign {
        return Some(Counter::ImpossibleSource);
    }
    if is_own(tables, source) { Some(Counter::NodeSource) } else { None }
}

/// Whether the endpoint sees the node instead of the client.
#[inline(always)]
fn masquerade<T: Tables>(tables: &T, source: &T::A, backend: &T::A, rule: RuleBits) -> Masquerade {
    if source == backend {
        return Masquerade::Hairpin;
    }
    if !rule.masquerade() {
        return Masquerade::No;
    }
    if is_own(tables, backend) {
        return Masquerade::NoOwnEndpoint;
    }
    if rule.direct_return() { Masquerade::NoDirectReturn } else { Masquerade::Rule }
}

/// Where the packet comes from. `None` on the way out for what only passes through: it was looked at on its way in.
#[inline(always)]
fn origin<T: Tables>(tables: &T, crossing: Crossing, source: &T::A, settings: &NodeSettings<T::A>) -> Option<Origin> {
    if crossing.egress {
        let own = is_from_node(tables, crossing, source);
        tables.note(if own { Step::From(Origin::Node, Evidence::OwnAddress) } else { Step::OnItsWay });
        return if own { Some(Origin::Node) } else { None };
    }
    let (pod, evidence) = match settings.flags & NODE_PODS_BY_INTERFACE != 0 {
        true => (tables.is_pod_interface(crossing.interface), Evidence::Interface),
        false => (in_networks(source, &settings.pod_cidrs, settings.pod_cidr_count), Evidence::Network),
    };
    let origin = if pod { Origin::Pod } else { Origin::External };
    tables.note(Step::From(origin, evidence));
    Some(origin)
}

/// Whether a packet on its way out is the node's own. On `lo` all are, also from an address that only a route makes the node's.
#[inline(always)]
fn is_from_node<T: Tables>(tables: &T, crossing: Crossing, source: &T::A) -> bool {
    crossing.interface == LOOPBACK_INTERFACE || is_own(tables, source)
}

/// Whether an address is this node's.
#[inline(always)]
pub fn is_own<T: Tables>(tables: &T, address: &T::A) -> bool {
    tables.may_be_known(address) && tables.node_address_flags(address) & NODE_ADDRESS_LOCAL != 0
}
