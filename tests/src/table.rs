//! The survey as a table that a person reads.

use std::fmt;
use std::time::Duration;

use crate::Transport;
use crate::survey::{Expected, From, Row};

/// Column titles.
const TITLES: [&str; 7] = ["SERVICE", "ADDRESS", "FROM", "PATH", "ANSWERED BY", "P50", "VERDICT"];

/// Rows under their titles; a Service's name is written once.
pub struct Table<'a>(pub &'a [Row]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = vec![TITLES.map(str::to_owned)];
        let mut previous = "";
        for row in self.0 {
            let mut line = cells(row);
            if row.question.service == previous {
                line[0].clear();
            }
            previous = &row.question.service;
            lines.push(line);
        }
        let mut widths = [0; TITLES.len()];
        for line in &lines {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = cell.chars().count().max(*width);
            }
        }
        for line in &lines {
            let cells: Vec<String> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

fn cells(row: &Row) -> [String; TITLES.len()] {
    let question = &row.question;
    let protocol = if question.transport == Transport::Tcp { "TCP" } else { "UDP" };
    let from = match question.from {
        From::Pod => "pod".to_owned(),
        From::PodPackets => "pod, no socket LB".to_owned(),
        From::Node => "node-1".to_owned(),
        From::Outside(node) => format!("outside, at node-{node}"),
    };
    let verdict = row.fault.as_ref().map_or_else(|| "OK".to_owned(), |fault| format!("FAIL: {fault}"));
    let median = row.tally.median().map(milliseconds).unwrap_or_default();
    [
        question.service.clone(),
        format!("{} {protocol}", question.target),
        from,
        row.path.clone().unwrap_or_else(|| "not counted".to_owned()),
        answered_by(row),
        median,
        verdict,
    ]
}

fn answered_by(row: &Row) -> String {
    let servers = row.tally.answers.iter().map(|(name, count)| format!("{name} {count}"));
    let mut parts: Vec<String> = servers.collect();
    let (refused, silent) = (row.tally.refused(), row.tally.timed_out());
    if refused > 0 {
        parts.push(format!("refused {refused}"));
    }
    if silent > 0 {
        let why = if row.question.expected == Expected::Silence { "silence, no local endpoint" } else { "timed out" };
        parts.push(format!("{why} {silent}"));
    }
    parts.join(", ")
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1000.0)
}
