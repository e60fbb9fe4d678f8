//! The table that a person reads and the JSON that a program reads.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;

use crate::Options;
use crate::rows::Row;

/// Prints all rows: minimum and median, and the minimum as a multiple of the empty program.
pub(crate) fn print(rows: &[Row], options: &Options) {
    println!("{} runs of {} packets; nanoseconds per packet or step\n", options.runs, options.packets);
    println!("{:<62} {:>8} {:>8} {:>9}", "row", "min", "median", "x empty");
    for row in rows {
        let multiple = empty(rows).map_or_else(String::new, |empty| format!("{:.1}", minimum(row) / empty));
        println!("{:<62} {:>8.1} {:>8.1} {:>9}", row.name, minimum(row), median(row), multiple);
    }
}

/// Writes `packet.json` and returns its path.
pub(crate) fn write(rows: &[Row], options: &Options) -> Result<PathBuf> {
    let path = options.output.join("packet.json");
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            json!({
                "name": row.name,
                "calibration": row.calibration,
                "nanoseconds_min": minimum(row),
                "nanoseconds_median": median(row),
                "nanoseconds": row.nanoseconds,
            })
        })
        .collect();
    let document = json!({ "packets": options.packets, "runs": options.runs, "kernel": kernel(), "rows": rows });
    fs::create_dir_all(&options.output).with_context(|| format!("cannot create {}", options.output.display()))?;
    let text = serde_json::to_string_pretty(&document)?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn kernel() -> String {
    node_sys::sysctl::read("kernel/osrelease").unwrap_or_default()
}

/// The row that the others are multiples of: all of them are tc programs.
fn empty(rows: &[Row]) -> Option<f64> {
    rows.iter().find(|row| row.name == "empty tc program").map(minimum)
}

fn minimum(row: &Row) -> f64 {
    row.nanoseconds.first().copied().unwrap_or(f64::NAN)
}

fn median(row: &Row) -> f64 {
    row.nanoseconds.get(row.nanoseconds.len() / 2).copied().unwrap_or(f64::NAN)
}
