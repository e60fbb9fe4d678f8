//! What a packet meets in the tables: read from their text, not from the planner's data.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::tables::{Tables, target};
use crate::dataplane::iptables::chain::{Table, protocol_name};
use crate::model::{NodeConfig, Packet};

/// What becomes of the first packet of a connection.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fate {
    /// Sent to an endpoint; whether the source becomes the node's.
    Sent(SocketAddr, bool),
    Reject,
    Drop,
    Pass,
}

/// Every fate that chance may bring.
pub(super) fn fates(tables: &Tables, node: &NodeConfig, packet: &Packet<'_>) -> BTreeSet<Fate> {
    let mut fates = BTreeSet::new();
    // The rule by chance that is hit is the first, the second, and so on, until there are no more.
    for hit in 0..100 {
        let mut walk = Walk { tables, node, packet, translated: None, mark: 0, left: hit, hit: false };
        fates.insert(walk.fate());
        if !walk.hit {
            break;
        }
    }
    fates
}

struct Walk<'a> {
    tables: &'a Tables,
    node: &'a NodeConfig,
    packet: &'a Packet<'a>,
    translated: Option<SocketAddr>,
    mark: u32,
    /// Rules by chance to be missed before one is hit.
    left: usize,
    hit: bool,
}

/// What a chain ended with.
enum End {
    Fell,
    Verdict(String),
}

impl Walk<'_> {
    fn fate(&mut self) -> Fate {
        let local = self.is_local(self.packet.source);
        let hook = if local { "OUTPUT" } else { "PREROUTING" };
        if let End::Verdict(rule) = self.chain(Table::Nat, hook) {
            let to = rule.split(' ').skip_while(|word| *word != "--to-destination").nth(1);
            self.translated = Some(to.unwrap_or_else(|| panic!("not a translation: {rule}")).parse().unwrap());
        }
        let to_node = self.is_local(self.destination().ip());
        let hook = if local {
            "OUTPUT"
        } else if to_node {
            "INPUT"
        } else {
            "FORWARD"
        };
        match self.chain(Table::Filter, hook) {
            End::Verdict(rule) if rule.ends_with("-j DROP") => return Fate::Drop,
            End::Verdict(rule) if rule.ends_with("-j REJECT") => return Fate::Reject,
            _ => {}
        }
        let masquerade =
            matches!(self.chain(Table::Nat, "POSTROUTING"), End::Verdict(rule) if rule.contains("MASQUERADE"));
        assert!(masquerade || self.mark == 0);
        self.translated.map_or(Fate::Pass, |to| Fate::Sent(to, masquerade))
    }

    fn chain(&mut self, table: Table, name: &str) -> End {
        let rules = self.tables.0[&table].get(name).unwrap_or_else(|| panic!("no chain {name}"));
        for rule in rules {
            if !self.matches(rule) {
                continue;
            }
            // A rule without one only counts.
            let Some(target) = target(rule) else { continue };
            match target {
                "RETURN" => return End::Fell,
                "ACCEPT" | "DROP" | "REJECT" | "DNAT" | "MASQUERADE" => return End::Verdict(rule.clone()),
                "MARK" => self.set_mark(rule),
                _ => match self.chain(table, target) {
                    End::Fell if rule.contains("-g ") => return End::Fell,
                    End::Fell => {}
                    verdict => return verdict,
                },
            }
        }
        End::Fell
    }

    fn set_mark(&mut self, rule: &str) {
        let number = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
        match rule.rsplit(' ').take(2).collect::<Vec<_>>()[..] {
            [bit, "--or-mark"] => self.mark |= number(bit),
            [bit, "--xor-mark"] => self.mark ^= number(bit),
            _ => panic!("{rule}"),
        }
    }

    fn matches(&mut self, rule: &str) -> bool {
        let mut words = rule.split(' ');
        let mut negated = false;
        while let Some(word) = words.next() {
            let mut next = || words.next().unwrap();
            let holds = match word {
                "!" => {
                    negated = true;
                    continue;
                }
                "-j" | "-g" => return true,
                "-m" | "--name" | "--mode" | "--seconds" | "--comment" | "--nfacct-name" => {
                    next();
                    continue;
                }
                "--rsource" | "--reap" | "--set" => continue,
                // No client is on a list yet.
                "--update" => false,
                "--probability" => {
                    next();
                    let hits = self.left == 0 && !self.hit;
                    self.hit |= hits;
                    self.left = self.left.saturating_sub(1);
                    hits
                }
                "-s" => inside(next(), self.packet.source),
                "-d" => inside(next(), self.destination().ip()),
                "-i" => self.comes_in(next()),
                "-p" => next() == protocol_name(self.packet.protocol),
                "--dport" => {
                    let range = next();
                    let (first, last) = range.split_once(':').unwrap_or((range, range));
                    let port = self.destination().port();
                    (first.parse().unwrap()..=last.parse().unwrap()).contains(&port)
                }
                "--src-type" => next() == "LOCAL" && self.is_local(self.packet.source),
                "--dst-type" => next() == "LOCAL" && self.is_local(self.destination().ip()),
                "--ctstate" => next().split(',').any(|state| self.state(state)),
                "--mark" => {
                    let bit = next().split('/').next().unwrap().trim_start_matches("0x");
                    self.mark & u32::from_str_radix(bit, 16).unwrap() != 0
                }
                _ => panic!("{word} in {rule}"),
            };
            if holds == std::mem::take(&mut negated) {
                return false;
            }
        }
        assert!(rule.contains("--nfacct-name"), "no target: {rule}");
        true
    }

    fn state(&self, state: &str) -> bool {
        state == "NEW" || (state == "DNAT" && self.translated.is_some())
    }

    fn comes_in(&self, name: &str) -> bool {
        match (self.packet.input, name.strip_suffix('+')) {
            (Some(input), Some(prefix)) => input.starts_with(prefix),
            (input, None) => input == Some(name),
            (None, _) => false,
        }
    }

    fn destination(&self) -> SocketAddr {
        self.translated.unwrap_or(self.packet.destination)
    }

    fn is_local(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.node.node_addresses.contains(&address)
    }
}

/// `10.0.0.0/8`, `10.0.0.1`, `0.0.0.5/0.0.0.255`
fn inside(pattern: &str, address: IpAddr) -> bool {
    if let Ok(net) = pattern.parse::<IpNet>() {
        return net.contains(&address);
    }
    let (value, mask) = pattern.split_once('/').unwrap_or((pattern, "255.255.255.255"));
    match (value.parse().unwrap(), mask.parse().unwrap(), address) {
        (IpAddr::V4(value), IpAddr::V4(mask), IpAddr::V4(address)) => {
            address.to_bits() & mask.to_bits() == value.to_bits()
        }
        (IpAddr::V6(value), IpAddr::V6(mask), IpAddr::V6(address)) => {
            address.to_bits() & mask.to_bits() == value.to_bits()
        }
        _ => false,
    }
}
