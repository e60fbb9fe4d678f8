//! trama-proxy: the node's Service proxy.
//!
//! ```text
//! flags, file ─► Config ─► app::run ─► connection, ports, data plane ─► sources ─► runner
//! ```
//! Ends with 0 after SIGTERM or SIGINT, leaving the data path forwarding; with 1 and one sentence when something is wrong.
#![forbid(unsafe_code)]

use std::io::{IsTerminal, stderr};
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use trama_proxy::config::{Config, Flags};
use trama_proxy::{app, dataplane};

fn main() -> ExitCode {
    let flags = Flags::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr).with_ansi(stderr().is_terminal()).init();
    match run(&flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("trama-proxy: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> Result<(), Box<dyn std::error::Error>> {
    let config = Config::load(flags)?;
    if flags.cleanup {
        return Ok(dataplane::remove(&config)?);
    }
    // One thread for watches and HTTP, one for the data plane: less memory than a pool, and neither waits for the other.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let shutdown = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        Ok(app::run(config, dataplane::open, shutdown).await?)
    })
}
