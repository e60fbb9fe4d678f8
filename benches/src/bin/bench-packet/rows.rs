//! The rows: their names and times, and how they are taken.

use std::time::Duration;

use anyhow::Result;

use crate::bed::Bed;
use crate::{Options, sockets, traffic};

/// One line of the result.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// What was measured.
    pub(crate) name: String,
    /// Whether it is a calibration row.
    pub(crate) calibration: bool,
    /// Nanoseconds of each run, ascending.
    pub(crate) nanoseconds: Vec<f64>,
    /// Of a row among many services: the name of the same row with one service.
    pub(crate) of_one_service: Option<String>,
}

impl Row {
    pub(crate) fn new(name: &str, calibration: bool, mut nanoseconds: Vec<f64>) -> Self {
        nanoseconds.sort_by(f64::total_cmp);
        Self { name: name.to_owned(), calibration, nanoseconds, of_one_service: None }
    }
}

/// Measures all rows that the options ask for.
pub(crate) fn measure(options: &Options, bed: &Bed) -> Result<Vec<Row>> {
    let mut bench = Bench { options, interface: bed.in_index(), out: bed.out_index(), rows: Vec::new() };
    bed.netns().run(|| -> Result<()> {
        bench.calibrate()?;
        traffic::measure(&mut bench)
    })??;
    // Its sockets have a namespace of their own.
    sockets::measure(&mut bench)?;
    Ok(bench.rows)
}

/// What is measured with, and what was.
pub(crate) struct Bench<'a> {
    pub(crate) options: &'a Options,
    /// Interface of clients.
    pub(crate) interface: u32,
    /// Interface to the backends.
    pub(crate) out: u32,
    pub(crate) rows: Vec<Row>,
}

impl Bench<'_> {
    /// Whether the options ask for a row of this name.
    pub(crate) fn wants(&self, name: &str) -> bool {
        name.contains(&self.options.only)
    }

    /// Runs `time` with a number of repeats and records the nanoseconds of one of its `steps`.
    pub(crate) fn row(
        &mut self,
        name: &str,
        calibration: bool,
        steps: u32,
        mut time: impl FnMut(u32) -> Result<Duration>,
    ) -> Result<()> {
        self.rows_in_turn(&mut [name.to_owned()], calibration, steps, String::clone, |_, repeats| time(repeats))
    }

    /// A row for each of `subjects`, whose runs take turns: the machine's speed changes within minutes, and then for all of them.
    pub(crate) fn rows_in_turn<T>(
        &mut self,
        subjects: &mut [T],
        calibration: bool,
        steps: u32,
        name: impl Fn(&T) -> String,
        mut time: impl FnMut(&mut T, u32) -> Result<Duration>,
    ) -> Result<()> {
        let repeats = (self.options.packets / steps).max(1);
        let wanted = subjects.iter_mut().filter(|subject| self.wants(&name(subject)));
        let mut wanted: Vec<(&mut T, Vec<f64>)> = wanted.map(|subject| (subject, Vec::new())).collect();
        for _ in 0..self.options.runs {
            for (subject, nanoseconds) in &mut wanted {
                eprint!("\r\x1b[K{} ...", name(subject));
                nanoseconds.push(time(subject, repeats)?.as_nanos() as f64 / f64::from(steps));
            }
        }
        eprint!("\r\x1b[K");
        let rows = wanted.into_iter().map(|(subject, times)| Row::new(&name(subject), calibration, times));
        self.rows.extend(rows);
        Ok(())
    }
}
