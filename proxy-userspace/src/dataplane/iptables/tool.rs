//! Which iptables programs: there are two kinds, and rules of one kind are invisible to the other.

use std::fmt;
use std::process::Command;
use std::time::Duration;

use super::error::IptablesError;
use super::existing::Existing;
use super::plan::{Plan, Planner};
use super::{process, text};
use crate::model::IpFamily;

/// How long one restore or save may take: ten times what 10,000 Services with 10 endpoints take.
const RUN_LIMIT: Duration = Duration::from_secs(60);
/// How long a restore waits for the lock that all users of iptables-legacy share, in seconds, as kube-proxy does.
const LOCK_WAIT_S: &str = "5";
/// Chains of the kubelet that say which kind this node uses (KEP 3178).
const HINTS: [&str; 2] = [":KUBE-IPTABLES-HINT ", ":KUBE-KUBELET-CANARY "];

/// The two kinds of iptables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Variant {
    /// `iptables-nft`, on top of nf_tables.
    Nft,
    /// `iptables-legacy`, with the kernel interface of its own.
    Legacy,
}

impl Variant {
    /// Both, in the order in which they are asked.
    pub const ALL: [Self; 2] = [Self::Nft, Self::Legacy];

    /// As in the programs' names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The programs of one kind and one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tool {
    pub(super) variant: Variant,
    pub(super) family: IpFamily,
}

impl Tool {
    fn program(self, verb: &str) -> String {
        let family = match self.family {
            IpFamily::V4 => "iptables",
            IpFamily::V6 => "ip6tables",
        };
        format!("{family}-{}-{verb}", self.variant)
    }

    /// What is ours in the kernel.
    pub(super) fn existing(self) -> Result<Existing, IptablesError> {
        let mut existing = Existing::default();
        for table in super::chain::Table::ALL {
            self.save(&["-t", table.name()], |line| existing.line(line))?;
        }
        Ok(existing)
    }

    fn save(self, arguments: &[&str], line: impl FnMut(&str)) -> Result<(), IptablesError> {
        let program = self.program("save");
        let ended = process::run(Command::new(&program).args(arguments), RUN_LIMIT, |_| Ok(()), line)?;
        if ended.status.success() { Ok(()) } else { Err(failure(program, &ended.complaint, |_| None)) }
    }

    /// Writes the plan. Returns the number of rules written.
    pub(super) fn restore(self, plan: &Plan, planner: &Planner) -> Result<usize, IptablesError> {
        let program = self.program("restore");
        let mut rules = 0;
        let mut command = Command::new(&program);
        command.args(["--noflush", "--counters", "-w", LOCK_WAIT_S]);
        let feed = |mut out: &mut dyn std::io::Write| {
            rules = text::write(plan, planner, &mut out)?;
            Ok(())
        };
        let ended = process::run(&mut command, RUN_LIMIT, feed, |_| {})?;
        if ended.status.success() {
            return Ok(rules);
        }
        Err(failure(program, &ended.complaint, |number| text::line(plan, planner, number)))
    }

    /// Whether both tables can be written: installed, permitted, and the kernel has them. Changes nothing.
    pub(super) fn preflight(self) -> Result<(), IptablesError> {
        let program = self.program("restore");
        let mut command = Command::new(&program);
        command.args(["--noflush", "--test", "-w", LOCK_WAIT_S]);
        let feed = |out: &mut dyn std::io::Write| out.write_all(b"*filter\nCOMMIT\n*nat\nCOMMIT\n");
        let ended = process::run(&mut command, RUN_LIMIT, feed, |_| {})?;
        if ended.status.success() { Ok(()) } else { Err(failure(program, &ended.complaint, |_| None)) }
    }
}

#[cfg(test)]
impl Tool {
    /// Gives iptables-restore this text, in the calling thread's network namespace.
    pub(super) fn change_for_test(self, text: &str) {
        let mut command = Command::new(self.program("restore"));
        let feed = |out: &mut dyn std::io::Write| out.write_all(text.as_bytes());
        let ended = process::run(command.arg("--noflush"), RUN_LIMIT, feed, |_| {}).unwrap();
        assert!(ended.status.success(), "{}", ended.complaint);
    }
}

/// The kind that this node uses: what the kubelet says, else where more rules are, else what `iptables` is.
pub(super) fn variant_in_use() -> Result<Variant, IptablesError> {
    let mut most = None;
    let mut installed = Vec::new();
    for variant in Variant::ALL {
        let Some(found) = survey(variant)? else { continue };
        installed.push(variant);
        if found.hinted {
            return Ok(variant);
        }
        if found.rules > most.map_or(0, |(rules, _)| rules) {
            most = Some((found.rules, variant));
        }
    }
    match (most, installed.as_slice()) {
        (Some((_, variant)), _) => Ok(variant),
        (None, [only]) => Ok(*only),
        (None, []) => Err(IptablesError::NoneInstalled),
        (None, _) => Ok(default_variant()),
    }
}

#[derive(Debug, Default)]
struct Survey {
    hinted: bool,
    rules: usize,
}

/// Counts rules of both families; `None` where the programs are not installed. Without `-t` only tables are read that exist, so
/// that no kernel module is loaded by looking.
fn survey(variant: Variant) -> Result<Option<Survey>, IptablesError> {
    let mut survey = Survey::default();
    for family in [IpFamily::V4, IpFamily::V6] {
        let read = Tool { variant, family }.save(&[], |line| {
            survey.hinted |= HINTS.iter().any(|hint| line.starts_with(hint));
            survey.rules += usize::from(line.starts_with("-A "));
        });
        match read {
            Err(IptablesError::Missing { .. }) => return Ok(None),
            // A kernel without one of the kinds, or one of the families, says so when it is asked.
            Err(IptablesError::Failed { .. }) | Ok(()) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(Some(survey))
}

/// `iptables v1.8.9 (nf_tables)`
fn default_variant() -> Variant {
    let mut version = String::new();
    let asked = process::run(
        Command::new("iptables").arg("--version"),
        RUN_LIMIT,
        |_| Ok(()),
        |line| {
            version.push_str(line);
        },
    );
    match asked {
        Ok(_) if version.contains("legacy") => Variant::Legacy,
        _ => Variant::Nft,
    }
}

/// What it said in the end, and the line of its input that it names.
fn failure(program: String, complaint: &str, line: impl Fn(usize) -> Option<String>) -> IptablesError {
    let quoted = line_number(complaint).and_then(line);
    let mut lines = complaint.lines().map(str::trim).filter(|line| !line.is_empty());
    let said = lines.rfind(|line| !line.starts_with("Try `"));
    IptablesError::Failed { program, said: said.unwrap_or("it did not say why").to_owned(), quoted }
}

/// `... line 7: RULE_APPEND failed`, `Error occurred at line: 7`, `... line 7 failed`
fn line_number(complaint: &str) -> Option<usize> {
    let after = complaint.split("line").skip(1);
    let number = |text: &str| -> Option<usize> {
        let digits: String = text.trim_start_matches([':', ' ']).chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    };
    after.filter_map(number).last()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_name_their_line() {
        for (complaint, line) in [
            (
                "iptables-nft-restore v1.8.9 (nf_tables): \nline 7: RULE_APPEND failed (No such file or directory): rule in chain X",
                Some(7),
            ),
            (
                "iptables-restore v1.8.9 (legacy): unknown option \"--x\"\nError occurred at line: 3\nTry `iptables-restore -h' or 'iptables-restore --help' for more information.",
                Some(3),
            ),
            ("iptables-legacy-restore: line 12 failed", Some(12)),
            ("Another app is currently holding the xtables lock; still 4s 0us time ahead", None),
        ] {
            assert_eq!(line_number(complaint), line, "{complaint}");
        }
        let error = failure("iptables-legacy-restore".into(), "iptables-legacy-restore: line 2 failed\n", |n| {
            Some(format!("L{n}"))
        });
        assert_eq!(
            error.to_string(),
            "iptables-legacy-restore failed: iptables-legacy-restore: line 2 failed; the line is: L2"
        );
    }
}
