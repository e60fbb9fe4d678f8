//! What was measured: one row a figure, one column a contender, and in each cell a value a round.

use serde_json::{Value, json};

/// How many services the bar of short connections is about.
const BAR_SERVICES: &str = "10 Services";
/// New connections with eBPF, as a multiple of those with iptables.
const CONNECTIONS_MIN: f64 = 1.0;
/// Throughput to a Service, as a multiple of that to the pod.
const THROUGHPUT_MIN: f64 = 0.97;
/// Columns that bars are about.
const EBPF: &str = "trama ebpf";
const IPTABLES: &str = "trama iptables";
/// How the names of the figures begin that bars are about.
pub(crate) const CONNECTIONS: &str = "short connections";
pub(crate) const THROUGHPUT: &str = "throughput to the Service / to the pod";

/// A figure by contender.
struct Row {
    name: String,
    unit: &'static str,
    /// By column, the values of the rounds in ascending order.
    cells: Vec<Vec<f64>>,
}

/// All figures, in the order in which they came first.
pub(crate) struct Figures {
    columns: Vec<String>,
    rows: Vec<Row>,
}

impl Figures {
    pub(crate) fn new(columns: Vec<String>) -> Self {
        Self { columns, rows: Vec::new() }
    }

    /// Adds one round's value of a column.
    pub(crate) fn add(&mut self, name: &str, unit: &'static str, column: usize, value: f64) {
        let at = self.rows.iter().position(|row| row.name == name).unwrap_or(self.rows.len());
        if at == self.rows.len() {
            self.rows.push(Row { name: name.to_owned(), unit, cells: vec![Vec::new(); self.columns.len()] });
        }
        if let Some(cell) = self.rows.get_mut(at).and_then(|row| row.cells.get_mut(column)) {
            cell.push(value);
            cell.sort_by(f64::total_cmp);
        }
    }

    /// For each figure the medians and, below, minima and maxima; then the bars.
    pub(crate) fn table(&self) -> String {
        let mut text = format!("{:<76}", "median (minimum - maximum)");
        self.columns.iter().for_each(|column| text += &format!("{column:>30}"));
        for row in &self.rows {
            text += &format!("\n{:<76}", format!("{}, {}", row.name, row.unit));
            row.cells.iter().for_each(|cell| text += &format!("{:>30}", shown(cell)));
        }
        for bar in self.bars() {
            text += &format!("\n{}: {:.3}, bar {}: {}", bar.what, bar.value, bar.least, bar.verdict());
        }
        text + "\n"
    }

    /// Every figure with all of its values, and the bars.
    pub(crate) fn json(&self) -> Value {
        let cell = |(column, values): (&String, &Vec<f64>)| json!({ "proxy": column, "median": median(values), "min": values.first(), "max": values.last(), "values": values });
        let row = |row: &Row| {
            let filled = self.columns.iter().zip(&row.cells).filter(|(_, values)| !values.is_empty());
            json!({ "name": row.name, "unit": row.unit, "proxies": filled.map(cell).collect::<Vec<_>>() })
        };
        let bar =
            |bar: &Bar| json!({ "name": bar.what, "value": bar.value, "least": bar.least, "verdict": bar.verdict() });
        let bars = self.bars();
        json!({ "figures": self.rows.iter().map(row).collect::<Vec<_>>(), "bars": bars.iter().map(bar).collect::<Vec<_>>() })
    }

    fn bars(&self) -> Vec<Bar> {
        let connections =
            self.rows.iter().filter(|row| row.name.starts_with(CONNECTIONS) && row.name.ends_with(BAR_SERVICES));
        let connections = connections.filter_map(|row| {
            let value = self.median_of(row, EBPF)? / self.median_of(row, IPTABLES)?;
            Some(Bar { what: format!("{}: {EBPF} / {IPTABLES}", row.name), value, least: CONNECTIONS_MIN })
        });
        let throughput = self.rows.iter().filter(|row| row.name.starts_with(THROUGHPUT)).filter_map(|row| {
            let what = format!("{}: {EBPF}", row.name);
            Some(Bar { what, value: self.median_of(row, EBPF)?, least: THROUGHPUT_MIN })
        });
        connections.chain(throughput).collect()
    }

    fn median_of(&self, row: &Row, column: &str) -> Option<f64> {
        let index = self.columns.iter().position(|title| title == column)?;
        median(row.cells.get(index)?)
    }
}

/// A ratio that has to be this at least.
struct Bar {
    what: String,
    value: f64,
    least: f64,
}

impl Bar {
    fn verdict(&self) -> &'static str {
        if self.value >= self.least { "met" } else { "MISSED" }
    }
}

/// The middle one of ascending values, the upper one of two.
fn median(sorted: &[f64]) -> Option<f64> {
    sorted.get(sorted.len() / 2).copied()
}

fn shown(values: &[f64]) -> String {
    match (median(values), values.first(), values.last()) {
        (Some(median), Some(least), Some(most)) => {
            let decimals = if median < 10.0 { 3 } else { 0 };
            format!("{median:.decimals$} ({least:.decimals$} - {most:.decimals$})")
        }
        _ => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures() -> Figures {
        let mut figures = Figures::new(vec!["no proxy".into(), EBPF.into(), IPTABLES.into()]);
        for (column, values) in [(1, [3.0, 1.0, 2.0]), (2, [4.0, 4.0, 4.0])] {
            values.iter().for_each(|value| figures.add("short connections, pod, 10 Services", "1/s", column, *value));
        }
        figures.add("short connections, pod, 100 Services", "1/s", 1, 1.0);
        figures.add(THROUGHPUT, "ratio", 1, 0.98);
        figures
    }

    #[test]
    fn bars_compare_medians() {
        let bars = figures().bars();
        let found: Vec<_> = bars.iter().map(|bar| (bar.value, bar.verdict())).collect();
        assert_eq!(found, [(0.5, "MISSED"), (0.98, "met")]);
    }

    #[test]
    fn an_empty_cell_is_shown_as_one() {
        let text = figures().table();
        assert!(text.contains(" - ") && text.contains("2.000 (1.000 - 3.000)"), "{text}");
        let json = figures().json();
        assert_eq!(json["figures"][0]["proxies"].as_array().unwrap().len(), 2);
        assert_eq!(json["figures"][0]["proxies"][0]["median"], 2.0);
    }
}
