//! Nanoseconds per packet: every program path under `BPF_PROG_TEST_RUN`, beside the calibration rows of the same run; and nanoseconds
//! per call of real sockets.
//!
//! Each row of the packet path first sends one packet and compares the result with what it has to be; a row that did not
//! do its work fails the run. The wrapper that restores the packet is part of each row and has a row of its own.
#![forbid(unsafe_code)]
mod bars;
mod bed;
mod calibration;
mod report;
mod rows;
mod socket_client;
mod sockets;
mod traffic;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
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
    /// What the benchmark starts itself with, in its own cgroup: does what its input says with sockets.
    #[arg(long, hide = true)]
    socket_client: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let ended = if options.socket_client { socket_client::serve() } else { run(&options) };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench packet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let bed = bed::Bed::new().context("cannot build the network of the benchmark; it needs root")?;
    let results = rows::measure(options, &bed)?;
    ensure!(!results.is_empty(), "no row's name contains {:?}; names are those that a run prints", options.only);
    report::print(&results, options);
    let path = report::write(&results, options)?;
    println!("\nwritten to {}", path.display());
    Ok(())
}
