//! Figures beside each other, on the screen and in a file.

use std::path::PathBuf;

use anyhow::Result;
use benches::figures;
use serde_json::{Value, json};

/// One figure of one proxy, with the bar that it has to meet.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) value: f64,
    pub(crate) bar: Option<f64>,
}

/// What one proxy reached.
#[derive(Debug)]
pub(crate) struct Column {
    pub(crate) title: String,
    pub(crate) figures: Vec<Figure>,
}

impl Column {
    fn figure(&self, name: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.name == name)
    }
}

/// One row a figure, one column a proxy; the bars are those of the first column.
pub(crate) fn table(columns: &[Column]) -> String {
    let mut text = format!("{:<44}{:<5}", "", "");
    columns.iter().for_each(|column| text += &format!("{:>22}", column.title));
    text.push('\n');
    let Some(first) = columns.first() else { return text };
    for figure in &first.figures {
        text += &format!("{:<44}{:<5}", figure.name, figure.unit);
        for column in columns {
            let value = column.figure(figure.name).map_or_else(|| "-".to_owned(), |f| format!("{:.3}", f.value));
            text += &format!("{value:>22}");
        }
        match figure.bar {
            Some(bar) if figure.value <= bar => text += &format!("  bar {bar}: met"),
            Some(bar) => text += &format!("  bar {bar}: MISSED"),
            None => {}
        }
        text.push('\n');
    }
    text
}

/// Writes `scale.json` and returns its path.
pub(crate) fn write_json(about: &Value, columns: &[Column]) -> Result<PathBuf> {
    let figure = |f: &Figure| json!({ "name": f.name, "value": f.value, "unit": f.unit, "bar": f.bar });
    let column = |c: &Column| json!({ "proxy": c.title, "figures": c.figures.iter().map(figure).collect::<Vec<_>>() });
    let proxies: Vec<_> = columns.iter().map(column).collect();
    let result = json!({ "about": about, "kernel": figures::kernel(), "proxies": proxies });
    figures::write_json(&figures::folder(), "scale", &result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_meet_or_miss_the_first_columns_bars() {
        let figure = |name, value, bar| Figure { name, unit: "s", value, bar };
        let ours =
            Column { title: "trama".into(), figures: vec![figure("a", 1.0, Some(2.0)), figure("b", 3.0, Some(2.0))] };
        let peer = Column { title: "peer".into(), figures: vec![figure("a", 9.0, None)] };
        let text = table(&[ours, peer]);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[1].contains("1.000") && lines[1].contains("9.000") && lines[1].ends_with("bar 2: met"));
        assert!(lines[2].contains(" -") && lines[2].ends_with("bar 2: MISSED"));
    }
}
