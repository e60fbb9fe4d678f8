//! trama-proxy: the node's Service proxy.
//!
//! ```text
//! flags, file ─► Config ─► app::run ─► connection, ports, data plane ─► sources ─► runner
//! ```
//! Ends with 0 after SIGTERM or SIGINT, leaving the data path forwarding; with 1 and one sentence when something is wrong, or when
//! the configuration file was changed.
#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{IsTerminal, stderr};
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use tracing::level_filters::LevelFilter;
use tracing::{info, warn};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;
use trama_proxy::config::{Config, Flags, LogSettings, file_changed};
use trama_proxy::inspect::Commands;
use trama_proxy::{app, dataplane};

fn main() -> ExitCode {
    node_sys::share_heap();
    if let Some(commands) = Commands::read(std::env::args_os()) {
        return look(commands);
    }
    let flags = match Flags::read(std::env::args_os()) {
        Ok(flags) => flags,
        Err(problem) => problem.exit(),
    };
    match run(&flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("trama-proxy: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Looks at a node instead of being its proxy.
fn look(commands: Result<Commands, clap::Error>) -> ExitCode {
    let done = match commands {
        Ok(commands) => commands.run(),
        Err(problem) => problem.exit(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("trama-proxy: {error}");
        ExitCode::FAILURE
    })
}

fn run(flags: &Flags) -> Result<(), Box<dyn Error>> {
    let config = Config::load(flags)?;
    start_logging(config.log);
    for warning in &config.warnings {
        warn!("{warning}");
    }
    if let Some(path) = &flags.write_config_to {
        config.effective.write(path)?;
        info!(file = %path.display(), "configuration written");
        return Ok(());
    }
    if flags.is_cleanup() {
        return Ok(dataplane::remove(&config)?);
    }
    if flags.is_init_only() {
        config.conntrack.apply();
        return Ok(());
    }
    app::set_oom_score(config.oom_score_adj);
    // One thread for watches and HTTP, one for the data plane: less memory than a pool, and neither waits for the other.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut changed = None;
        let shutdown = async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                file = file_changed(flags) => changed = Some(file),
            }
        };
        app::run(config, dataplane::open, shutdown).await?;
        match changed {
            Some(file) => {
                Err(format!("configuration file {} was changed; start again to use it", file.display()).into())
            }
            None => Ok(()),
        }
    })
}

/// RUST_LOG (levels by target, as `info,trama_proxy=debug`) goes before what is configured.
fn start_logging(settings: LogSettings) {
    let (all, ours) = match settings.verbosity {
        0..=3 => (LevelFilter::INFO, LevelFilter::INFO),
        4..=5 => (LevelFilter::INFO, LevelFilter::DEBUG),
        _ => (LevelFilter::DEBUG, LevelFilter::TRACE),
    };
    let configured = || Targets::new().with_default(all).with_target("trama_proxy", ours);
    let named = std::env::var("RUST_LOG").ok().and_then(|text| text.parse::<Targets>().ok());
    let registry = tracing_subscriber::registry().with(named.unwrap_or_else(configured));
    let lines = tracing_subscriber::fmt::layer().with_writer(stderr);
    if settings.json {
        registry.with(lines.json()).init();
    } else {
        registry.with(lines.with_ansi(stderr().is_terminal())).init();
    }
}
