//! The rules, as data: how a packet gets its mark, and what becomes of it afterwards.

use std::net::IpAddr;

use ipnet::IpNet;
use node_sys::nftables::{
    Comparison, CtKey, DynsetOperation, Expression, FibAddress, LookupTarget, MetaKey, Register, RejectKind, Verdict,
};

use super::layout::{Origin, SetName};
use super::marks::{DROP, MASQUERADE, REJECT, TAG, TAG_MASK};
use crate::dataplane::elements::{Words, kernel_family};
use crate::model::{IpFamily, NodeConfig, PodTraffic};

/// `NF_CT_STATE_BIT(IP_CT_NEW)`.
const STATE_NEW: u32 = 8;
/// `IP_CT_DIR_REPLY`.
const DIRECTION_REPLY: u8 = 1;
/// The loopback interface is the first of every namespace.
const LOOPBACK_INDEX: u32 = 1;
/// `RTN_LOCAL`.
const TYPE_LOCAL: u32 = 2;
/// What is looked up goes here, behind the longest key.
const FOUND: Register = Register(12);
/// Where numbers are compared.
const NUMBER: Register = Register(0);
const SCRATCH: Register = Register(1);

/// A rule.
pub(super) type Rule = Vec<Expression>;

/// Writes rules for one family.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules(pub(super) IpFamily);

impl Rules {
    /// The rules of a chain that is always there.
    pub(super) fn of_chain(self, chain: &str, node: &NodeConfig) -> Vec<Rule> {
        match chain {
            "prerouting" => {
                let from_itself = [load(MetaKey::InputInterface, NUMBER), equal(NUMBER, LOOPBACK_INDEX), end()].into();
                [vec![from_itself], known(remembered_mark()), vec![vec![goto("origin")]]].concat()
            }
            "output" => {
                // What IPVS has translated passes here too, and is routed again: its mark would bring it back.
                let translated = [tagged(), set_mark(0), vec![end()]].concat();
                [vec![translated], known(remembered_mark()), vec![vec![goto(Origin::Node.chain())]]].concat()
            }
            "input" => self.input(),
            "postrouting" => behind_ipvs().into(),
            "nat-prerouting" | "nat-output" => vec![self.stay()],
            "nat-postrouting" => self.source_nat().into(),
            "origin" => self.origin(&node.pod_traffic),
            "decide" => self.decide(),
            "unserved" => self.unserved(&node.service_cidrs),
            "learn" => learn().into(),
            _ => Origin::ALL
                .into_iter()
                .find(|origin| origin.chain() == chain)
                .map(|origin| self.frontends(origin))
                .unwrap_or_default(),
        }
    }

    /// Whose packet it is. The node's own addresses go first: the node may have one inside a pod network.
    fn origin(self, pods: &PodTraffic) -> Vec<Rule> {
        let own =
            vec![self.source(Register(0)), member(SetName::NodeAddresses, Register(0)), goto(Origin::Node.chain())];
        let pods = self.pods(pods).into_iter().map(|mut rule| {
            rule.push(goto(Origin::Pod.chain()));
            rule
        });
        [own].into_iter().chain(pods).chain([vec![goto(Origin::External.chain())]]).collect()
    }

    fn pods(self, pods: &PodTraffic) -> Vec<Rule> {
        match pods {
            PodTraffic::Source(networks) => {
                self.own(networks).map(|net| within(self.source(Register(0)), net)).collect()
            }
            PodTraffic::Bridge(name) => vec![input_name(name, true)],
            PodTraffic::Prefix(prefix) => vec![input_name(prefix, false)],
        }
    }

    /// An address of its own goes before the NodePorts.
    fn frontends(self, origin: Origin) -> Vec<Rule> {
        let take = |mut rule: Rule, set, key| {
            rule.extend([lookup(set, key, FOUND), Expression::SetMark { from: FOUND }, goto("decide")]);
            rule
        };
        let own = take(self.frontend_key(), SetName::Frontends(origin), Register(0));
        let mut node_port = vec![self.destination(Register(0)), member(SetName::NodePortAddresses, Register(0))];
        node_port.extend([load(MetaKey::Protocol, Register(0)), Expression::destination_port(Register(1))]);
        let node_port = take(node_port, SetName::NodePorts(origin), Register(0));
        vec![own, node_port, vec![goto("unserved")]]
    }

    /// A packet at a frontend: refused, dropped, or given the mark of an endpoint list, or that of the endpoint to which its
    /// client sticks.
    fn decide(self) -> Vec<Rule> {
        let words = self.words();
        let mut restricted = self.frontend_key();
        restricted.push(member(SetName::Restricted, Register(0)));
        restricted.push(self.source(Register(words + 2)));
        restricted.push(Expression::Lookup {
            set: SetName::SourceRanges.name().into(),
            key: Register(0),
            target: LookupTarget::NothingUnless,
        });
        restricted.push(Expression::Verdict(Verdict::Drop));
        let reject = vec![load(MetaKey::Mark, NUMBER), equal(NUMBER, REJECT), self.reject()];
        let drop = vec![load(MetaKey::Mark, NUMBER), equal(NUMBER, DROP), Expression::Verdict(Verdict::Drop)];
        let remember = vec![
            load(MetaKey::Mark, NUMBER),
            Expression::SetConnectionMark { from: NUMBER },
            masked(NUMBER, NUMBER, !MASQUERADE),
            Expression::SetMark { from: NUMBER },
        ];
        let stuck = || {
            vec![
                self.source(Register(0)),
                load(MetaKey::Mark, Register(words)),
                lookup(SetName::Affinity, Register(0), FOUND),
            ]
        };
        let mut stick = stuck();
        stick.extend([member(SetName::Usable, FOUND), Expression::SetMark { from: FOUND }, end()]);
        // To an endpoint that is gone.
        let mut forget = stuck();
        forget.push(Expression::Dynset {
            set: SetName::Affinity.name().into(),
            operation: DynsetOperation::Delete,
            key: Register(0),
            data: Some(FOUND),
            timeout_ms: None,
        });
        vec![restricted, reject, drop, remember, stick, forget]
    }

    /// A ClusterIP at a port that nobody serves is refused; an address that no Service has is dropped.
    fn unserved(self, service_cidrs: &[IpNet]) -> Vec<Rule> {
        let refused = vec![self.destination(Register(0)), member(SetName::ClusterIps, Register(0)), self.reject()];
        let dropped = self.own(service_cidrs).map(|net| {
            let mut rule = within(self.destination(Register(0)), net);
            rule.push(Expression::Verdict(Verdict::Drop));
            rule
        });
        [refused].into_iter().chain(dropped).collect()
    }

    /// What IPVS left, having no service for it, goes to no socket of this machine.
    fn input(self) -> Vec<Rule> {
        let mut left = tagged();
        left.extend([
            Expression::FibType { address: FibAddress::Destination, to: SCRATCH },
            Expression::Compare { from: SCRATCH, comparison: Comparison::NotEqual, with: number(TYPE_LOCAL) },
            self.reject(),
        ]);
        [vec![left], behind_ipvs().into()].concat()
    }

    /// Sees the first packet of a connection: its destination stays, whatever rules of others come behind. IPVS redirects it.
    fn stay(self) -> Rule {
        let (address, port) = (Register(0), Register(self.words()));
        let mut rule = tagged();
        rule.extend([self.destination(address), Expression::destination_port(port)]);
        rule.push(Expression::DestinationNat { family: kernel_family(self.0), address, port });
        rule
    }

    /// Sees the first packet of a connection, with the endpoint as its destination.
    fn source_nat(self) -> [Rule; 2] {
        let masquerade = Expression::Masquerade { fully_random: true };
        let asked = vec![
            connection(CtKey::Mark, NUMBER),
            masked(NUMBER, NUMBER, TAG_MASK | MASQUERADE),
            equal(NUMBER, TAG | MASQUERADE),
            masquerade.clone(),
        ];
        let mut hairpin = connection_is_ours();
        hairpin.extend([self.source(Register(0)), self.destination(Register(self.words()))]);
        hairpin.extend([member(SetName::Hairpin, Register(0)), masquerade]);
        [asked, hairpin]
    }

    /// Remembers to which endpoint IPVS sent the client. The key of the one map lies before that of the other: client, mark,
    /// endpoint.
    pub(super) fn stick_for(self, seconds: u32) -> Rule {
        let words = self.words();
        vec![
            self.source(Register(0)),
            load(MetaKey::Mark, Register(words)),
            self.destination(Register(words + 1)),
            Expression::destination_port(Register(2 * words + 1)),
            lookup(SetName::Targets, Register(words), FOUND),
            Expression::Dynset {
                set: SetName::Affinity.name().into(),
                operation: DynsetOperation::Update,
                key: Register(0),
                data: Some(FOUND),
                timeout_ms: Some(u64::from(seconds) * 1000),
            },
        ]
    }

    fn frontend_key(self) -> Rule {
        let words = self.words();
        vec![
            self.destination(Register(0)),
            load(MetaKey::Protocol, Register(words)),
            Expression::destination_port(Register(words + 1)),
        ]
    }

    /// Registers that an address fills.
    fn words(self) -> u8 {
        match self.0 {
            IpFamily::V4 => 1,
            IpFamily::V6 => 4,
        }
    }

    fn source(self, to: Register) -> Expression {
        Expression::source_address(kernel_family(self.0), to)
    }

    fn destination(self, to: Register) -> Expression {
        Expression::destination_address(kernel_family(self.0), to)
    }

    fn reject(self) -> Expression {
        Expression::Reject(match self.0 {
            IpFamily::V4 => RejectKind::PortUnreachableV4,
            IpFamily::V6 => RejectKind::PortUnreachableV6,
        })
    }

    fn own(self, networks: &[IpNet]) -> impl Iterator<Item = IpNet> {
        networks.iter().copied().filter(move |net| IpFamily::of(net.addr()) == self.0)
    }
}

/// Ends the evaluation for what is no new connection: answers; connections of ours, after what `ours` does to their packets;
/// connections of others.
fn known(ours: Rule) -> Vec<Rule> {
    let answer = vec![
        connection(CtKey::Direction, NUMBER),
        Expression::Compare { from: NUMBER, comparison: Comparison::Equal, with: vec![DIRECTION_REPLY] },
        end(),
    ];
    let ours = [connection_is_ours(), ours, vec![end()]].concat();
    let old = vec![connection(CtKey::State, NUMBER), masked(NUMBER, NUMBER, STATE_NEW), equal(NUMBER, 0), end()];
    vec![answer, ours, old]
}

/// The mark of the connection, without what is not for IPVS.
fn remembered_mark() -> Rule {
    vec![connection(CtKey::Mark, NUMBER), masked(NUMBER, NUMBER, !MASQUERADE), Expression::SetMark { from: NUMBER }]
}

fn set_mark(mark: u32) -> Rule {
    vec![Expression::Constant { value: number(mark), to: NUMBER }, Expression::SetMark { from: NUMBER }]
}

/// Learns where IPVS sent a new connection, and takes the mark away: it means nothing to what comes behind.
fn behind_ipvs() -> [Rule; 2] {
    let mut new = connection_is_ours();
    new.extend([connection(CtKey::State, NUMBER), masked(NUMBER, NUMBER, STATE_NEW), equal(NUMBER, STATE_NEW)]);
    new.push(Expression::Verdict(Verdict::Jump("learn".into())));
    [new, [tagged(), set_mark(0)].concat()]
}

/// The mark goes back to the packet for a moment: nft(8) cannot list a concatenation with a masked value.
fn learn() -> [Rule; 2] {
    let sticky = Expression::Lookup { set: SetName::Sticky.name().into(), key: NUMBER, target: LookupTarget::Verdict };
    [remembered_mark(), vec![load(MetaKey::Mark, NUMBER), sticky]]
}

fn connection_is_ours() -> Rule {
    vec![connection(CtKey::Mark, NUMBER), masked(NUMBER, NUMBER, TAG_MASK), equal(NUMBER, TAG)]
}

fn tagged() -> Rule {
    vec![load(MetaKey::Mark, NUMBER), masked(NUMBER, NUMBER, TAG_MASK), equal(NUMBER, TAG)]
}

fn load(key: MetaKey, to: Register) -> Expression {
    Expression::Meta { key, to }
}

fn connection(key: CtKey, to: Register) -> Expression {
    Expression::Ct { key, to }
}

fn number(value: u32) -> Vec<u8> {
    value.to_ne_bytes().to_vec()
}

fn equal(from: Register, with: u32) -> Expression {
    Expression::Compare { from, comparison: Comparison::Equal, with: number(with) }
}

fn masked(from: Register, to: Register, mask: u32) -> Expression {
    Expression::Bitwise { from, to, mask: number(mask), xor: number(0) }
}

fn member(set: SetName, key: Register) -> Expression {
    Expression::Lookup { set: set.name().into(), key, target: LookupTarget::Nothing }
}

fn lookup(set: SetName, key: Register, to: Register) -> Expression {
    Expression::Lookup { set: set.name().into(), key, target: LookupTarget::Register(to) }
}

fn goto(chain: &'static str) -> Expression {
    Expression::Verdict(Verdict::Goto(chain.into()))
}

fn end() -> Expression {
    Expression::Verdict(Verdict::Return)
}

/// `address` loads into the first register.
fn within(address: Expression, net: IpNet) -> Rule {
    let bytes = |address: IpAddr| Words::new().address(address).bytes().to_vec();
    let mask = bytes(net.netmask());
    let xor = vec![0; mask.len()];
    vec![
        address,
        Expression::Bitwise { from: Register(0), to: Register(0), mask, xor },
        Expression::Compare { from: Register(0), comparison: Comparison::Equal, with: bytes(net.network()) },
    ]
}

/// Through the interface of this name, or of a name that begins so.
fn input_name(name: &str, whole: bool) -> Rule {
    let mut with = name.as_bytes().to_vec();
    if whole {
        with.resize(16, 0);
    }
    vec![
        load(MetaKey::InputInterfaceName, Register(0)),
        Expression::Compare { from: Register(0), comparison: Comparison::Equal, with },
    ]
}
