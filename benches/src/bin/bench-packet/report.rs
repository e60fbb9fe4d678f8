//! The table that a person reads and the JSON that a program reads.

use std::path::PathBuf;

use anyhow::Result;
use benches::figures;
use serde_json::json;

use crate::Options;
use crate::bars::{PACE_ROW, RATIO_MAX, bar, pace, verdict};
use crate::rows::Row;

/// Prints all rows: minimum and median, the minimum as a multiple of the empty program, and the bar; then what many services cost.
pub(crate) fn print(rows: &[Row], options: &Options) {
    println!("{} runs of {} packets; nanoseconds per packet, step or call\n", options.runs, options.packets);
    println!("{:<80} {:>8} {:>8} {:>9}", "row", "min", "median", "x empty");
    let pace = rows.iter().find(|row| row.name == PACE_ROW).and_then(|row| pace(minimum(row)));
    for row in rows {
        let multiple = empty(rows).map_or_else(String::new, |empty| format!("{:.1}", minimum(row) / empty));
        let bar = bar(&row.name).map_or_else(String::new, |bar| judged(figure(row), bar, pace));
        println!("{:<80} {:>8.1} {:>8.1} {multiple:>9}{bar}", row.name, minimum(row), median(row));
    }
    if rows.iter().any(|row| ratio(row, rows).is_some()) {
        println!("\n{:<80} {:>8}", "as a multiple of the row with one service", "ratio");
    }
    for row in rows {
        if let Some(ratio) = ratio(row, rows) {
            println!("{:<80} {ratio:>8.3}  bar {RATIO_MAX}: {}", row.name, verdict(ratio, RATIO_MAX));
        }
    }
}

/// The bar and whether a figure meets it; and, on a machine of another pace, whether it does so in proportion.
fn judged(figure: f64, bar: f64, pace: Option<f64>) -> String {
    let there = format!("  bar {bar}: {}", verdict(figure, bar));
    let here = |pace: f64| format!(", x {pace:.2} for the empty XDP program here: {}", verdict(figure, bar * pace));
    there + &pace.map_or_else(String::new, here)
}

/// Writes `packet.json` and returns its path.
pub(crate) fn write(rows: &[Row], options: &Options) -> Result<PathBuf> {
    let table: Vec<_> = rows
        .iter()
        .map(|row| {
            json!({
                "name": row.name,
                "calibration": row.calibration,
                "nanoseconds_min": minimum(row),
                "nanoseconds_median": median(row),
                "nanoseconds": row.nanoseconds,
                "bar": bar(&row.name),
                "ratio_to_one_service": ratio(row, rows),
            })
        })
        .collect();
    let document =
        json!({ "packets": options.packets, "runs": options.runs, "kernel": figures::kernel(), "rows": table });
    figures::write_json(&options.output, "packet", &document)
}

/// The row that the others are multiples of: most of them are tc programs.
fn empty(rows: &[Row]) -> Option<f64> {
    rows.iter().find(|row| row.name == "empty tc program").map(minimum)
}

/// What a row is judged by: the minimum where everything is warm, the median where every packet makes something new.
fn figure(row: &Row) -> f64 {
    if row.name.contains("new flow each") { median(row) } else { minimum(row) }
}

/// A row among many services as a multiple of the same with one; `None` for other rows, or where that is not in this run.
fn ratio(row: &Row, rows: &[Row]) -> Option<f64> {
    let one = row.of_one_service.as_ref()?;
    Some(figure(row) / figure(rows.iter().find(|row| row.name == *one)?))
}

fn minimum(row: &Row) -> f64 {
    row.nanoseconds.first().copied().unwrap_or(f64::NAN)
}

fn median(row: &Row) -> f64 {
    row.nanoseconds.get(row.nanoseconds.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slower_machine_is_judged_by_its_pace_too() {
        assert_eq!(judged(90.0, 80.0, None), "  bar 80: MISSED");
        assert_eq!(judged(90.0, 80.0, Some(2.0)), "  bar 80: MISSED, x 2.00 for the empty XDP program here: met");
    }

    #[test]
    fn rows_of_many_services_are_compared_with_one() {
        let many = Row { of_one_service: Some("a".into()), ..Row::new("a, 10 services", false, vec![3.0, 4.0, 2.0]) };
        let new = Row::new("a, new flow each", false, vec![3.0, 9.0, 2.0]);
        let rows = [Row::new("a", false, vec![2.0, 1.0, 9.0]), many];
        assert_eq!((ratio(&rows[0], &rows), ratio(&rows[1], &rows)), (None, Some(2.0)));
        assert_eq!(ratio(&rows[1], &rows[1..]), None, "the other row is not there");
        assert_eq!(figure(&new), 3.0);
    }
}
