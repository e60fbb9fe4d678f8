//! What `iptables-restore --noflush` makes of a text, as strict as the real one.

use std::collections::BTreeMap;

use crate::dataplane::iptables::chain::{PREFIX, Table};
use crate::dataplane::iptables::existing::Existing;
use crate::dataplane::iptables::plan::{Plan, Planner};
use crate::dataplane::iptables::text;

/// Chains and their rules, by table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tables(pub(super) BTreeMap<Table, BTreeMap<String, Vec<String>>>);

impl Default for Tables {
    fn default() -> Self {
        let chains = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), Vec::new())).collect();
        Self(BTreeMap::from([
            (Table::Filter, chains(&["INPUT", "FORWARD", "OUTPUT"])),
            (Table::Nat, chains(&["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"])),
        ]))
    }
}

impl Tables {
    /// Applies the plan's text, line by line.
    pub(super) fn apply(&mut self, plan: &Plan, planner: &Planner) {
        let mut out = Vec::new();
        text::write(plan, planner, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let mut table = None;
        for line in text.lines() {
            let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
            match (verb, &mut table) {
                ("*nat", _) => table = Some(Table::Nat),
                ("*filter", _) => table = Some(Table::Filter),
                ("COMMIT", current) => *current = None,
                (_, Some(table)) => edit(self.0.get_mut(table).unwrap(), verb, rest),
                _ => panic!("outside of a table: {line}"),
            }
        }
    }

    /// What `iptables-save` would print.
    pub(super) fn existing(&self) -> Existing {
        let mut existing = Existing::default();
        for (table, chains) in &self.0 {
            existing.line(&format!("*{}", table.name()));
            chains.keys().for_each(|name| existing.line(&format!(":{name} - [0:0]")));
            for (name, rules) in chains {
                rules.iter().for_each(|rule| existing.line(&format!("-A {name} {rule}")));
            }
        }
        existing
    }
}

fn edit(chains: &mut BTreeMap<String, Vec<String>>, verb: &str, rest: &str) {
    if let Some(name) = verb.strip_prefix(':') {
        assert!(name.starts_with(PREFIX) && name.len() <= 28, "{name}");
        chains.insert(name.to_owned(), Vec::new());
        return;
    }
    let (name, rule) = rest.split_once(' ').unwrap_or((rest, ""));
    if let Some(target) = target(rule).filter(|target| target.starts_with(PREFIX)) {
        assert!(chains.contains_key(target), "no chain {target} yet: {rule}");
    }
    let used = chains.values().flatten().any(|rule| target(rule) == Some(name));
    let chain = chains.get_mut(name).unwrap_or_else(|| panic!("no chain {name}"));
    match verb {
        "-A" => chain.push(rule.to_owned()),
        "-I" => chain.insert(0, rule.strip_prefix("1 ").unwrap().to_owned()),
        "-D" => {
            let index = chain.iter().position(|one| one == rule).unwrap_or_else(|| panic!("no rule {rule}"));
            chain.remove(index);
        }
        "-X" => {
            assert!(chain.is_empty() && !used, "{name} is in use");
            chains.remove(name);
        }
        _ => panic!("not a command: {verb}"),
    }
}

pub(super) fn target(rule: &str) -> Option<&str> {
    let words: Vec<&str> = rule.split(' ').collect();
    let index = words.iter().position(|word| matches!(*word, "-j" | "-g"))?;
    words.get(index + 1).copied()
}
