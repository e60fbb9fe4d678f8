//! The chains that are there whatever Services there are: hooks, marks, masquerade, and the trees that lead to the leaves.
//!
//! An address is found by its last four bits, then by its last eight: with 10,000 ClusterIPs a new connection passes about 40
//! rules, where one long chain would be 5,000. Only branches with something in them exist.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::chain::{Chain, Leaf, PORT_BLOCK, Table};
use super::counts;
use super::rule::{Match, Rule, Target, host};
use super::service::pod_matches;
use crate::model::{IpFamily, NodeConfig};

/// What the configuration and the kernel say, fixed for a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Settings {
    /// The bit of the packet mark that means "masquerade", as a number with one bit set.
    pub(super) masquerade_bit: u32,
    /// Whether 127.0.0.0/8 answers NodePorts.
    pub(super) localhost_node_ports: bool,
    /// Whether forwarded packets that conntrack calls INVALID are dropped: they would reach the endpoint, whose answer the
    /// client does not know (kubernetes/kubernetes#74839). With `nf_conntrack_tcp_be_liberal` there are none.
    pub(super) drop_invalid: bool,
    /// Whether the kernel counts packets for kube-proxy's metrics.
    pub(super) counts: bool,
}

/// All that the frame depends on.
pub(super) struct Frame<'a> {
    pub(super) family: IpFamily,
    pub(super) settings: Settings,
    pub(super) node: &'a NodeConfig,
    /// Leaves in nat that hold something.
    pub(super) dispatch: &'a BTreeSet<Leaf>,
    /// Leaves in filter that hold something.
    pub(super) refusals: &'a BTreeSet<Leaf>,
    /// Last bytes of ClusterIPs.
    pub(super) cluster_ips: &'a BTreeSet<u8>,
    /// Addresses of local endpoints.
    pub(super) hairpins: &'a BTreeSet<IpAddr>,
    /// Ports of health checks.
    pub(super) health_ports: &'a BTreeSet<u16>,
}

/// How the chains of a tree are named.
struct Tree {
    root: Chain,
    branch: fn(u8) -> Chain,
    leaf: fn(u8) -> Chain,
}

const ADDRESSES: Tree =
    Tree { root: Chain::Addresses, branch: Chain::AddressBranch, leaf: |byte| Chain::Leaf(Leaf::Address(byte)) };

const CLUSTER_IPS: Tree = Tree { root: Chain::ClusterIps, branch: Chain::ClusterIpBranch, leaf: Chain::ClusterIpLeaf };

/// Chains with their rules.
pub(super) type Chains = BTreeMap<(Table, Chain), Vec<Rule>>;

impl Frame<'_> {
    /// Every chain but the leaves and those of ServicePorts.
    pub(super) fn chains(&self) -> Chains {
        let mut chains = Chains::new();
        self.filter(&mut chains);
        self.nat(&mut chains);
        for (table, leaves) in [(Table::Nat, self.dispatch), (Table::Filter, self.refusals)] {
            chains.insert((table, Chain::Services), self.services(table));
            chains.insert((table, Chain::Ports), ports(leaves));
            let bytes = leaves.iter().filter_map(|leaf| match leaf {
                Leaf::Address(byte) => Some(*byte),
                Leaf::Ports(..) => None,
            });
            self.tree(&mut chains, table, &ADDRESSES, bytes);
        }
        self.tree(&mut chains, Table::Filter, &CLUSTER_IPS, self.cluster_ips.iter().copied());
        let networks = self.node.service_cidrs.iter().filter(|net| self.is_ours(net));
        let drops = networks.map(|net| Rule::new([Match::Destination(*net)], Target::Drop));
        let unserved = [Rule::new([], Target::Jump(Chain::ClusterIps))].into_iter().chain(drops);
        chains.insert((Table::Filter, Chain::Unserved), unserved.collect());
        chains
    }

    fn is_ours(&self, net: &IpNet) -> bool {
        IpFamily::of(net.addr()) == self.family
    }

    fn nat(&self, chains: &mut Chains) {
        let bit = self.settings.masquerade_bit;
        let masquerade = || Rule::new([], Target::Masquerade);
        let mut add = |chain, rules| chains.insert((Table::Nat, chain), rules);
        let jump = |matches: Vec<Match>, chain| Rule::new(matches, Target::Jump(chain));
        let post =
            vec![jump(vec![Match::Marked(bit)], Chain::Masquerade), jump(vec![Match::State("DNAT")], Chain::Hairpin)];
        add(Chain::PostRouting, post);
        // Without the bit a packet that passes the stack again, in a tunnel, is not masqueraded again.
        add(Chain::Masquerade, vec![Rule::new([], Target::ToggleMark(bit)), masquerade()]);
        let itself = |address: &IpAddr| vec![Match::Source(host(*address)), Match::Destination(host(*address))];
        let hairpins = self.hairpins.iter().map(|address| Rule::new(itself(address), Target::Masquerade));
        add(Chain::Hairpin, hairpins.collect());
        add(Chain::Mark, vec![Rule::new([], Target::SetMark(bit))]);
        let mut outside = vec![Rule::new([Match::SourceLocal], Target::Goto(Chain::Mark))];
        let pods = pod_matches(&self.node.pod_traffic, self.family);
        outside.extend(pods.into_iter().map(|pod| Rule::new([pod], Target::Return)));
        outside.push(jump(vec![], Chain::Mark));
        add(Chain::MarkOutside, outside);
    }

    fn filter(&self, chains: &mut Chains) {
        let mut add = |chain, rules| chains.insert((Table::Filter, chain), rules);
        let refuse = |chain| {
            let untranslated = [Match::State("NEW"), Match::NotState("DNAT")];
            Rule::new(untranslated, Target::Jump(chain))
        };
        let martian = self.martian_rule();
        let input =
            martian.iter().cloned().chain([refuse(Chain::Services), Rule::new([], Target::Jump(Chain::Health))]);
        add(Chain::Input, input.collect());
        let refusals = [refuse(Chain::Services), refuse(Chain::Unserved)];
        let output = martian.iter().cloned().chain(self.loopback_count()).chain(refusals);
        add(Chain::Output, output.collect());
        let mut invalid = vec![Match::State("INVALID")];
        invalid.extend(self.settings.counts.then_some(Match::Count(counts::INVALID)));
        let invalid = Rule::new(invalid, Target::Drop);
        let mut forward: Vec<Rule> = self.settings.drop_invalid.then_some(invalid).into_iter().collect();
        // What was translated goes on even where the policy of FORWARD is to drop.
        forward.push(Rule::new([Match::State("RELATED,ESTABLISHED")], Target::Accept));
        forward.extend([refuse(Chain::Services), refuse(Chain::Unserved)]);
        forward.push(Rule::new([Match::Marked(self.settings.masquerade_bit)], Target::Accept));
        add(Chain::Forward, forward);
        let tcp = |port: &u16| [Match::Ports(crate::model::Protocol::Tcp, *port, *port)];
        add(Chain::Health, self.health_ports.iter().map(|port| Rule::new(tcp(port), Target::Accept)).collect());
    }

    /// route_localnet lets packets for 127.0.0.0/8 in from outside; only answers and what was translated may be such packets
    /// (kubernetes/kubernetes#90259).
    fn martian_rule(&self) -> Option<Rule> {
        let net = loopback(self.family);
        let matches = [Match::Destination(net), Match::NotSource(net), Match::NotState("RELATED,ESTABLISHED,DNAT")];
        (self.family == IpFamily::V4 && self.settings.localhost_node_ports).then(|| Rule::new(matches, Target::Drop))
    }

    /// Counts new connections of the node that were translated on their way to a loopback address: to NodePorts.
    fn loopback_count(&self) -> Option<Rule> {
        let wanted = self.settings.counts && self.settings.localhost_node_ports && self.family == IpFamily::V4;
        let translated = [Match::State("NEW"), Match::State("DNAT"), Match::Source(loopback(self.family))];
        let counted = || translated.into_iter().chain([Match::Count(counts::LOOPBACK)]).collect::<Vec<_>>();
        wanted.then(|| Rule::new(counted(), Target::Continue))
    }

    /// An address of its own goes before the NodePort wildcard.
    fn services(&self, table: Table) -> Vec<Rule> {
        let mut rules = vec![Rule::new([], Target::Jump(Chain::Addresses))];
        let leaves = if table == Table::Nat { self.dispatch } else { self.refusals };
        if leaves.iter().any(|leaf| matches!(leaf, Leaf::Ports(..))) {
            let places = self.node_port_places().into_iter();
            rules.extend(places.map(|matches| Rule::new(matches, Target::Jump(Chain::Ports))));
        }
        rules
    }

    /// Where NodePorts answer. If that is all addresses, the kernel knows them best.
    fn node_port_places(&self) -> Vec<Vec<Match>> {
        let of_family = |set: &BTreeSet<IpAddr>| -> Vec<IpAddr> {
            set.iter().copied().filter(|address| IpFamily::of(*address) == self.family).collect()
        };
        let addresses = of_family(&self.node.node_port_addresses);
        let net = loopback(self.family);
        // IPv6 has no route_localnet: ::1 leads nowhere.
        let on_loopback =
            self.family == IpFamily::V4 && self.settings.localhost_node_ports && self.node.loopback_node_ports_v4;
        if !addresses.is_empty() && addresses == of_family(&self.node.node_addresses) {
            let mut everywhere = vec![Match::DestinationLocal];
            everywhere.extend((!on_loopback).then_some(Match::NotDestination(net)));
            return vec![everywhere];
        }
        let loopback = on_loopback.then(|| vec![Match::SourceLocal, Match::Destination(net)]);
        addresses.into_iter().map(|address| vec![Match::Destination(host(address))]).chain(loopback).collect()
    }

    /// A root, a branch for each last four bits that occur, and in it the leaves.
    fn tree(
        &self,
        chains: &mut Chains,
        table: Table,
        &Tree { root, branch, leaf }: &Tree,
        bytes: impl Iterator<Item = u8>,
    ) {
        let v6 = self.family == IpFamily::V6;
        let goto = |mask, value, chain| Rule::new([Match::DestinationEnd { mask, value, v6 }], Target::Goto(chain));
        let mut branches: BTreeMap<u8, Vec<Rule>> = BTreeMap::new();
        for byte in bytes {
            branches.entry(byte & 15).or_default().push(goto(255, byte, leaf(byte)));
        }
        let at_root = branches.keys().map(|nibble| goto(15, *nibble, branch(*nibble)));
        chains.insert((table, root), at_root.collect());
        chains.extend(branches.into_iter().map(|(nibble, rules)| ((table, branch(nibble)), rules)));
    }
}

fn ports(leaves: &BTreeSet<Leaf>) -> Vec<Rule> {
    let block = |leaf: &Leaf| match leaf {
        Leaf::Ports(protocol, first) => {
            let matches = [Match::Ports(*protocol, *first, first.saturating_add(PORT_BLOCK - 1))];
            Some(Rule::new(matches, Target::Goto(Chain::Leaf(*leaf))))
        }
        Leaf::Address(_) => None,
    };
    leaves.iter().filter_map(block).collect()
}

fn loopback(family: IpFamily) -> IpNet {
    match family {
        IpFamily::V4 => IpNet::V4(ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(127, 0, 0, 0), 8)),
        IpFamily::V6 => host(IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)),
    }
}
