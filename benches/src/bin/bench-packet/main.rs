//! Nanoseconds per packet: every program path under `BPF_PROG_TEST_RUN`, beside the calibration rows of the same run.
//!
//! Each row of the packet path first sends one packet and compares the result with what it has to be; a row that did not
//! do its work fails the run. The wrapper that restores the packet is part of each row and has a row of its own.
#![forbid(unsafe_code)]
#![expect(
    clippy::indexing_slicing,
    reason = "offsets into frames that the benchmark makes itself: a wrong one ends it at once"
)]

mod bed;
mod frame;
mod programs;
mod report;
mod rows;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

/// Times every path of the packet programs.
#[derive(Debug, Parser)]
#[command(name = "bench-packet")]
struct Options {
    /// Runs of each row; minimum and median are reported.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(5..=101))]
    runs: u32,
    /// Packets of one run.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1_000..=100_000_000))]
    packets: u32,
    /// Only rows whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Where the JSON goes.
    #[arg(long, env = "TRAMA_BENCH_DIR", default_value = "target/bench")]
    output: PathBuf,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench packet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let bed = bed::Bed::new().context("cannot build the network of the benchmark; it needs root")?;
    let results = bed.netns().run(|| rows::measure(options, &bed))??;
    report::print(&results, options);
    let path = report::write(&results, options)?;
    println!("\nwritten to {}", path.display());
    Ok(())
}
