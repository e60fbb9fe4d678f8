//! The plan as input of `iptables-restore`, written as it is made.

use std::io::{self, Write};

use super::chain::Table;
use super::plan::{HookEdit, Plan, Planner, TablePlan};
use super::rule::Target;

/// Writes the whole input. Each table is one transaction. Returns the number of rules.
///
/// # Errors
/// When `out` does not take it.
pub(super) fn write(plan: &Plan, planner: &Planner, out: &mut impl Write) -> io::Result<usize> {
    let mut rules = 0;
    for (table, part) in &plan.tables {
        rules += write_table(*table, part, planner, out)?;
    }
    Ok(rules)
}

/// `:CHAIN` makes a chain, or empties it. In descending order: [`super::chain::Chain`] says why.
fn write_table(table: Table, plan: &TablePlan, planner: &Planner, out: &mut impl Write) -> io::Result<usize> {
    let mut rules = 0;
    writeln!(out, "*{}", table.name())?;
    for name in plan.delete.iter().rev() {
        writeln!(out, ":{name} - [0:0]")?;
    }
    for chain in plan.write.iter().rev() {
        let name = chain.to_string();
        writeln!(out, ":{name} - [0:0]")?;
        for rule in planner.rules(table, *chain) {
            writeln!(out, "-A {name} {rule}")?;
            rules += 1;
        }
    }
    for edit in &plan.hooks {
        match edit {
            HookEdit::Insert(hook, chain) => writeln!(out, "-I {hook} 1 {}", Target::Jump(*chain))?,
            HookEdit::Delete(hook, rule) => writeln!(out, "-D {hook} {rule}")?,
        }
    }
    for name in plan.delete.iter().rev() {
        writeln!(out, "-X {name}")?;
    }
    writeln!(out, "COMMIT")?;
    Ok(rules)
}

/// Line `number` of the text, counted from 1: for an error that names it. The text is not kept, so it is made once more.
pub(super) fn line(plan: &Plan, planner: &Planner, number: usize) -> Option<String> {
    let mut finder = LineFinder { left: number, found: Vec::new() };
    // It stops at the line by an error of its own.
    let _ = write(plan, planner, &mut finder);
    let text = String::from_utf8_lossy(&finder.found).trim_end().to_owned();
    (!text.is_empty()).then_some(text)
}

struct LineFinder {
    left: usize,
    found: Vec<u8>,
}

impl Write for LineFinder {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if self.left == 1 {
                self.found.push(*byte);
            }
            if *byte == b'\n' {
                self.left = self.left.saturating_sub(1);
            }
        }
        if self.left == 0 { Err(io::ErrorKind::Other.into()) } else { Ok(bytes.len()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
