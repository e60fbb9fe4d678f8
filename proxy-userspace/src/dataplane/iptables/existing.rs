//! What `iptables-save` says of our chains; every other line is read over.

use std::collections::{BTreeMap, BTreeSet};

use super::chain::{PREFIX, Table};

/// Ours in one table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ExistingTable {
    /// Our chains.
    pub(super) chains: BTreeSet<String>,
    /// Rules in other chains that lead to ours: the chain, the rest of the rule.
    pub(super) hooks: Vec<(String, String)>,
    /// Rules in our chains.
    pub(super) rules: usize,
}

/// Ours in every table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Existing {
    tables: BTreeMap<Table, ExistingTable>,
    /// Whether our chains keep strangers away from 127.0.0.0/8.
    pub(super) guards_loopback: bool,
    /// Whether the kubelet's or kube-proxy's chain does.
    pub(super) others_guard_loopback: bool,
    current: Option<Table>,
}

impl Existing {
    /// Takes in the next line.
    pub(super) fn line(&mut self, line: &str) {
        if let Some(name) = line.strip_prefix('*') {
            self.current = Table::ALL.into_iter().find(|table| table.name() == name.trim());
        }
        let Some(table) = self.current else { return };
        let table = self.tables.entry(table).or_default();
        if let Some(chain) = line.strip_prefix(':') {
            let name = chain.split(' ').next().unwrap_or_default();
            self.others_guard_loopback |= name == "KUBE-FIREWALL";
            if name.starts_with(PREFIX) {
                table.chains.insert(name.to_owned());
            }
        } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rule| rule.split_once(' ')) {
            if chain.starts_with(PREFIX) {
                table.rules += 1;
                self.guards_loopback |= rule.contains("-d 127.0.0.0/8 ") && rule.ends_with("-j DROP");
            } else if leads_to_ours(rule) {
                table.hooks.push((chain.to_owned(), rule.to_owned()));
            }
        }
    }

    /// By table.
    pub(super) fn tables(&self) -> impl Iterator<Item = (Table, &ExistingTable)> {
        self.tables.iter().map(|(table, found)| (*table, found))
    }

    /// Whether nothing is ours.
    pub(super) fn is_empty(&self) -> bool {
        self.tables.values().all(|table| table.chains.is_empty() && table.hooks.is_empty())
    }

    /// One table, empty where it was not seen.
    pub(super) fn table(&self, table: Table) -> ExistingTable {
        self.tables.get(&table).cloned().unwrap_or_default()
    }
}

fn leads_to_ours(rule: &str) -> bool {
    let words: Vec<&str> = rule.split(' ').collect();
    words.windows(2).any(|pair| matches!(pair, ["-j" | "-g", target] if target.starts_with(PREFIX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_is_told_from_others() {
        let text = "# Generated\n*mangle\n:TRAMA-NO - [0:0]\nCOMMIT\n*nat\n:PREROUTING ACCEPT [0:0]\n:TRAMA-A - [0:0]\n:KUBE-SERVICES - [0:0]\n\
            -A PREROUTING -j KUBE-SERVICES\n-A PREROUTING -m comment --comment \"a b\" -j TRAMA-A\n-A TRAMA-A -j RETURN\nCOMMIT\n";
        let mut existing = Existing::default();
        text.lines().for_each(|line| existing.line(line));
        let nat = existing.table(Table::Nat);
        assert_eq!(nat.chains, ["TRAMA-A".to_owned()].into());
        assert_eq!(nat.hooks, [("PREROUTING".into(), "-m comment --comment \"a b\" -j TRAMA-A".into())]);
        assert_eq!((nat.rules, existing.tables().count()), (1, 1));
        assert!(!existing.is_empty() && Existing::default().is_empty());
    }
}
