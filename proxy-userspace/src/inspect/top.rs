//! `trama-proxy top`.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;

use super::client::Names;
use super::{CommandError, Node, print_line};
use crate::dataplane::ebpf::inspect::{Pinned, Reading, ServiceReading};

/// Clears a terminal and goes to its first line (ECMA-48, ED and CUP).
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Services by packets and new connections a second
#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    node: Node,
    /// Print one table and end
    #[arg(long)]
    once: bool,
    /// Seconds from one reading to the next
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Rows of the table
    #[arg(long, value_name = "N", default_value_t = 20)]
    rows: usize,
}

/// What one ServicePort did from one reading to the next.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    name: String,
    packets_per_second: f64,
    bytes_per_second: f64,
    connections_per_second: f64,
    total: ServiceReading,
}

/// Prints a table for each interval.
pub(super) fn run(options: &Options) -> Result<ExitCode, CommandError> {
    // Anew each time: maps that have grown are in another place.
    let read = || Pinned::find(&options.node.bpffs)?.read_services();
    let mut names = Names::ask_if_any(&options.node);
    let mut before = (Instant::now(), read()?);
    loop {
        thread::sleep(Duration::from_secs(options.interval));
        let now = (Instant::now(), read()?);
        names.keep_fresh();
        let rows = rows(&before.1, &now.1, now.0 - before.0, |id| names.name(id));
        let clear = if options.once { "" } else { CLEAR };
        let goes_on = print_line(&format!("{clear}{}", table(&rows, options.rows)))?;
        if options.once || !goes_on {
            return Ok(ExitCode::SUCCESS);
        }
        before = now;
    }
}

/// The busiest first; what did nothing stands behind by what it did in all.
fn rows(before: &Reading, now: &Reading, elapsed: Duration, name: impl Fn(u32) -> String) -> Vec<Row> {
    let seconds = elapsed.as_secs_f64().max(f64::EPSILON);
    let mut rows: Vec<Row> = now
        .iter()
        .map(|(id, total)| {
            let old = before.get(id).copied().unwrap_or_default();
            // An id that went to another ServicePort begins again.
            let rate = |now: u64, old: u64| now.checked_sub(old).unwrap_or(now) as f64 / seconds;
            Row {
                name: name(*id),
                packets_per_second: rate(total.packets, old.packets),
                bytes_per_second: rate(total.bytes, old.bytes),
                connections_per_second: rate(total.connections, old.connections),
                total: *total,
            }
        })
        .collect();
    let busy = |row: &Row| (row.packets_per_second, row.connections_per_second, row.total.packets as f64);
    rows.sort_by(|a, b| busy(b).partial_cmp(&busy(a)).unwrap_or(std::cmp::Ordering::Equal).then(a.name.cmp(&b.name)));
    rows
}

fn table(rows: &[Row], most: usize) -> String {
    let width = rows.iter().take(most).map(|row| row.name.len()).max().unwrap_or(0).max("SERVICEPORT".len());
    let mut lines = vec![format!(
        "{:<width$} {:>11} {:>11} {:>11} {:>12} {:>12}",
        "SERVICEPORT", "PACKETS/S", "BYTES/S", "NEW/S", "PACKETS", "CONNECTIONS"
    )];
    lines.extend(rows.iter().take(most).map(|row| {
        format!(
            "{:<width$} {:>11.1} {:>11.0} {:>11.1} {:>12} {:>12}",
            row.name,
            row.packets_per_second,
            row.bytes_per_second,
            row.connections_per_second,
            row.total.packets,
            row.total.connections
        )
    }));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(packets: u64, connections: u64) -> ServiceReading {
        ServiceReading { packets, bytes: packets * 100, connections }
    }

    #[test]
    fn the_busiest_comes_first_and_an_id_with_a_new_owner_begins_again() {
        let before = Reading::from([(1, reading(100, 10)), (2, reading(50, 5)), (3, reading(900, 90))]);
        let now = Reading::from([(1, reading(140, 12)), (2, reading(150, 6)), (3, reading(20, 1)), (4, reading(0, 7))]);
        let rows = rows(&before, &now, Duration::from_secs(2), |id| format!("s{id}"));
        let seen: Vec<_> =
            rows.iter().map(|row| (row.name.as_str(), row.packets_per_second, row.connections_per_second)).collect();
        assert_eq!(seen, [("s2", 50.0, 0.5), ("s1", 20.0, 1.0), ("s3", 10.0, 0.5), ("s4", 0.0, 3.5)]);
        let text = table(&rows, 2);
        assert_eq!(text.lines().count(), 3);
        assert!(text.lines().nth(1).unwrap().starts_with("s2 "), "{text}");
    }
}
