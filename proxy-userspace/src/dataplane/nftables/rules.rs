//! The rules, as data: what every packet of a new connection meets. A test reads them as the kernel does.

use std::net::IpAddr;

use ipnet::IpNet;
use node_sys::nftables::{
    Comparison, CtKey, DynsetOperation, Expression, LookupTarget, MetaKey, Register, RejectKind, Verdict,
};

use super::classes::{Class, Pick};
use super::encode::unspecified;
use super::layout::{SetName, chain};
use crate::dataplane::elements::{Words, kernel_family};
use crate::model::{EndpointSet, IpFamily, NodeConfig, PodTraffic};

/// `NF_CT_STATE_BIT(IP_CT_NEW)`.
const STATE_NEW: u32 = 8;
/// `IPS_DST_NAT`.
const STATUS_DESTINATION_NAT: u32 = 0x20;
/// Where the local list's indices begin.
pub(super) const LOCAL_INDEX: u32 = 1 << 31;

/// A rule.
pub(super) type Rule = Vec<Expression>;

/// Where a packet comes from, as [`OriginRules`](crate::model::OriginRules) distinguishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Pod = 1,
    Node = 2,
    External = 3,
}

/// Writes rules for one family.
///
/// Registers, by their number in IPv4 and IPv6: what belongs together lies together, so that what one lookup finds is the key
/// of the next.
///
/// ```text
/// source     id    address     port         key
/// 0          1     2           3            8 to 10      IPv4
/// 0 to 3     4     5 to 8      9            10 to 15     IPv6
/// [------------]                                         key of affinity
///            [---------------------]                     its value, key of the endpoints' sets
///            [-----] id and index: key of slots
///                  [---------------]                     value of slots
///            [--------------] id and three classes: value of frontends
/// ```
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    family: IpFamily,
    masquerade_mark: u32,
}

impl Rules {
    /// `masquerade_mark` is the bit of the packet's mark that asks for masquerade between two hooks.
    pub(super) fn new(family: IpFamily, masquerade_mark: u32) -> Self {
        Self { family, masquerade_mark }
    }

    /// Rules of the chain of this name that depend on nothing.
    pub(super) fn fixed(&self, chain: &str) -> Vec<Rule> {
        match chain {
            "filter-prerouting" | "filter-output-nat" => vec![for_new_connections(chain::SOURCE_RANGES)],
            "filter-forward" | "filter-output" => vec![for_new_connections(chain::UNSERVED)],
            "nat-prerouting" => vec![vec![goto(chain::ORIGIN)]],
            "nat-output" => vec![vec![goto(chain::FROM_NODE)]],
            "nat-postrouting" => self.postrouting(),
            chain::SOURCE_RANGES => vec![self.source_ranges()],
            chain::FROM_POD => self.dispatch(Origin::Pod),
            chain::FROM_NODE => self.dispatch(Origin::Node),
            chain::FROM_EXTERNAL => self.dispatch(Origin::External),
            chain::REJECT => vec![vec![Expression::Reject(match self.family {
                IpFamily::V4 => RejectKind::PortUnreachableV4,
                IpFamily::V6 => RejectKind::PortUnreachableV6,
            })]],
            _ => Vec::new(),
        }
    }

    /// Chain `origin`: who made the packet. The node's own addresses go first: the node may have one inside a pod network.
    pub(super) fn origin(&self, node: &NodeConfig) -> Vec<Rule> {
        let own = vec![self.load_source(Register(0)), member(SetName::NodeAddresses), goto(chain::FROM_NODE)];
        let pods = self.pods(&node.pod_traffic).into_iter().map(|mut rule| {
            rule.push(goto(chain::FROM_POD));
            rule
        });
        let rest = vec![goto(chain::FROM_EXTERNAL)];
        [own].into_iter().chain(pods).chain([rest]).collect()
    }

    fn pods(&self, traffic: &PodTraffic) -> Vec<Rule> {
        match traffic {
            PodTraffic::Source(networks) => {
                let ours = networks.iter().filter(|net| IpFamily::of(net.addr()) == self.family);
                ours.map(|net| self.within(self.load_source(Register(0)), *net)).collect()
            }
            PodTraffic::Bridge(name) => {
                let mut padded = name.as_bytes().to_vec();
                padded.resize(16, 0);
                vec![input_name(padded)]
            }
            PodTraffic::Prefix(prefix) => vec![input_name(prefix.as_bytes().to_vec())],
        }
    }

    /// Chain `unserved`: what no frontend took. A packet to a ClusterIP goes to a port that none serves; one to another address
    /// that a Service could have goes nowhere.
    pub(super) fn unserved(&self, node: &NodeConfig) -> Vec<Rule> {
        let load = || self.load_destination(Register(0));
        let refused = vec![load(), member(SetName::ClusterIps), goto(chain::REJECT)];
        let ours = node.service_cidrs.iter().filter(|net| IpFamily::of(net.addr()) == self.family);
        let dropped = ours.map(|net| {
            let mut rule = self.within(load(), *net);
            rule.push(Expression::Verdict(Verdict::Drop));
            rule
        });
        [refused].into_iter().chain(dropped).collect()
    }

    /// Chains `from-*`: the frontend's class for this origin leads on. An address of its own goes before the NodePort wildcard.
    fn dispatch(&self, origin: Origin) -> Vec<Rule> {
        let class = Register(self.id().0 + origin as u8);
        let lead_on = |mut rule: Rule| {
            rule.push(self.find_frontend());
            rule.push(lookup(SetName::Classes, class, LookupTarget::Verdict));
            rule
        };
        let mut node_port = vec![self.load_destination(Register(0)), member(SetName::NodePortAddresses)];
        node_port.extend(self.load_key(true));
        vec![lead_on(self.load_key(false)), lead_on(node_port)]
    }

    /// Chain `source-ranges`: who is in no range of a load-balancer IP that has some is dropped.
    fn source_ranges(&self) -> Rule {
        let client = Register(self.id().0 + 1);
        let mut rule = self.load_key(false);
        rule.push(lookup(SetName::Restricted, self.key(), LookupTarget::Register(self.id())));
        rule.push(self.load_source(client));
        rule.push(lookup(SetName::SourceRanges, self.id(), LookupTarget::NothingUnless));
        rule.push(Expression::Verdict(Verdict::Drop));
        rule
    }

    /// Who was marked is masqueraded, and the mark does not outlive it; who was sent to himself is masqueraded too.
    fn postrouting(&self) -> Vec<Rule> {
        let (mark, zero) = (self.masquerade_mark, vec![0; 4]);
        let masquerade = Expression::Masquerade { fully_random: true };
        let set = |mask: u32, xor: u32| bitwise(Register(0), Register(1), mask, xor);
        let marked = vec![
            Expression::Meta { key: MetaKey::Mark, to: Register(0) },
            set(mark, 0),
            Expression::Compare { from: Register(1), comparison: Comparison::NotEqual, with: zero.clone() },
            set(!mark, 0),
            Expression::SetMark { from: Register(1) },
            masquerade.clone(),
        ];
        let translated = vec![
            Expression::Ct { key: CtKey::Status, to: Register(0) },
            bitwise(Register(0), Register(0), STATUS_DESTINATION_NAT, 0),
            Expression::Compare { from: Register(0), comparison: Comparison::NotEqual, with: zero },
            self.load_source(Register(0)),
            self.load_destination(Register(self.address_words())),
            member(SetName::Hairpin),
            masquerade,
        ];
        vec![marked, translated]
    }

    /// The verdict of a class in map `classes`.
    pub(super) fn verdict(class: &Class, chain: String) -> Verdict {
        match class {
            Class::Reject => Verdict::Goto(chain::REJECT.into()),
            Class::Drop => Verdict::Drop,
            Class::Pick(_) => Verdict::Goto(chain.into()),
        }
    }

    /// A chain that sends a connection to one of the endpoints of the list.
    ///
    /// A transaction may come between two lookups of one packet, and what was read first is then older than the rest. The last
    /// rules are for that: the first endpoint of the list as it is now, and if there is none the packet is dropped and sent
    /// again by its client.
    pub(super) fn pick(&self, pick: &Pick) -> Vec<Rule> {
        let mut rules = Vec::new();
        if pick.masquerade {
            rules.push(vec![
                Expression::Meta { key: MetaKey::Mark, to: Register(0) },
                bitwise(Register(0), Register(0), !self.masquerade_mark, self.masquerade_mark),
                Expression::SetMark { from: Register(0) },
            ]);
        }
        if let Some(seconds) = pick.affinity_seconds {
            rules.extend(self.affinity(pick, u64::from(seconds) * 1000));
        }
        let offset = match pick.set {
            EndpointSet::Cluster => 0,
            EndpointSet::Local => LOCAL_INDEX,
        };
        let first = constant(&Words::new().number(offset), self.address());
        rules.push(self.choose(pick, random(pick.count, offset, self.address())));
        rules.push(self.choose(pick, first));
        for rule in rules.iter_mut().rev().take(2) {
            rule.push(self.translate());
        }
        rules.push(vec![Expression::Verdict(Verdict::Drop)]);
        rules
    }

    /// Rules that keep a client at its endpoint: go there if it still serves; else forget it, choose, remember and go there.
    /// Two connections at once may both choose; what was remembered first is where both go.
    fn affinity(&self, pick: &Pick, timeout_ms: u64) -> [Rule; 4] {
        let (set, offset) = match pick.set {
            EndpointSet::Cluster => (SetName::ClusterEndpoints, 0),
            EndpointSet::Local => (SetName::LocalEndpoints, LOCAL_INDEX),
        };
        let change = |operation, timeout_ms| Expression::Dynset {
            set: SetName::Affinity.name().into(),
            operation,
            key: self.client(),
            data: Some(self.id()),
            timeout_ms,
        };
        let (source, remembered) = (self.load_source(Register(0)), LookupTarget::Register(self.id()));
        let mut stay = self.load_id(pick);
        stay.extend([
            source.clone(),
            lookup(SetName::Affinity, self.client(), remembered),
            lookup(set, self.id(), LookupTarget::Nothing),
            change(DynsetOperation::Update, Some(timeout_ms)),
            self.translate(),
        ]);
        let mut forget = self.load_id(pick);
        // The kernel wants data even to delete; it is not looked at.
        forget.extend([
            source.clone(),
            constant(&Words::new().address(unspecified(self.family)), self.address()),
            constant(&Words::new().port(0), self.port()),
            change(DynsetOperation::Delete, None),
        ]);
        let mut remember = self.choose(pick, random(pick.count, offset, self.address()));
        remember.extend([source, change(DynsetOperation::Add, Some(timeout_ms))]);
        [stay.clone(), forget, remember, stay]
    }

    /// Loads id, then an endpoint by the index that `index` loads.
    fn choose(&self, pick: &Pick, index: Expression) -> Rule {
        let mut rule = self.load_id(pick);
        rule.extend([index, lookup(SetName::Slots, self.id(), LookupTarget::Register(self.address()))]);
        rule
    }

    fn translate(&self) -> Expression {
        Expression::DestinationNat { family: kernel_family(self.family), address: self.address(), port: self.port() }
    }

    fn load_id(&self, pick: &Pick) -> Rule {
        let mut rule = self.load_key(pick.node_port);
        rule.push(self.find_frontend());
        rule
    }

    fn find_frontend(&self) -> Expression {
        lookup(SetName::Frontends, self.key(), LookupTarget::Register(self.id()))
    }

    /// Loads the key of the packet's frontend, or of the NodePort wildcard.
    fn load_key(&self, node_port: bool) -> Rule {
        let key = self.key();
        let behind = |words: u8| Register(key.0 + self.address_words() + words);
        let address = if node_port {
            constant(&Words::new().address(unspecified(self.family)), key)
        } else {
            self.load_destination(key)
        };
        vec![
            address,
            Expression::Meta { key: MetaKey::Protocol, to: behind(0) },
            Expression::destination_port(behind(1)),
        ]
    }

    fn load_source(&self, to: Register) -> Expression {
        Expression::source_address(kernel_family(self.family), to)
    }

    fn load_destination(&self, to: Register) -> Expression {
        Expression::destination_address(kernel_family(self.family), to)
    }

    /// Goes on if the address that `load` brings into register 0 is inside `net`.
    fn within(&self, load: Expression, net: IpNet) -> Rule {
        let bytes = |address: IpAddr| Words::new().address(address).bytes().to_vec();
        let mask = bytes(net.netmask());
        let xor = vec![0; mask.len()];
        vec![
            load,
            Expression::Bitwise { from: Register(0), to: Register(0), mask, xor },
            Expression::Compare { from: Register(0), comparison: Comparison::Equal, with: bytes(net.network()) },
        ]
    }

    fn address_words(&self) -> u8 {
        match self.family {
            IpFamily::V4 => 1,
            IpFamily::V6 => 4,
        }
    }

    fn client(&self) -> Register {
        Register(0)
    }

    fn id(&self) -> Register {
        Register(self.address_words())
    }

    fn address(&self) -> Register {
        Register(self.address_words() + 1)
    }

    fn port(&self) -> Register {
        Register(2 * self.address_words() + 1)
    }

    fn key(&self) -> Register {
        match self.family {
            IpFamily::V4 => Register(8),
            IpFamily::V6 => Register(10),
        }
    }
}

fn for_new_connections(chain: &'static str) -> Rule {
    vec![
        Expression::Ct { key: CtKey::State, to: Register(0) },
        bitwise(Register(0), Register(0), STATE_NEW, 0),
        Expression::Compare { from: Register(0), comparison: Comparison::NotEqual, with: vec![0; 4] },
        Expression::Verdict(Verdict::Jump(chain.into())),
    ]
}

fn goto(chain: &'static str) -> Expression {
    Expression::Verdict(Verdict::Goto(chain.into()))
}

/// Goes on if what register 0 holds is in the set.
fn member(set: SetName) -> Expression {
    lookup(set, Register(0), LookupTarget::Nothing)
}

fn lookup(set: SetName, key: Register, target: LookupTarget) -> Expression {
    Expression::Lookup { set: set.name().into(), key, target }
}

fn constant(value: &Words, to: Register) -> Expression {
    Expression::Constant { value: value.bytes().to_vec(), to }
}

fn random(modulus: u32, offset: u32, to: Register) -> Expression {
    Expression::Random { modulus, offset, to }
}

fn bitwise(from: Register, to: Register, mask: u32, xor: u32) -> Expression {
    Expression::Bitwise { from, to, mask: mask.to_ne_bytes().to_vec(), xor: xor.to_ne_bytes().to_vec() }
}

fn input_name(name: Vec<u8>) -> Rule {
    vec![
        Expression::Meta { key: MetaKey::InputInterfaceName, to: Register(0) },
        Expression::Compare { from: Register(0), comparison: Comparison::Equal, with: name },
    ]
}
