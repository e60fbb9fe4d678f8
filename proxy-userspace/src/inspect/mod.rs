//! The commands that look at a node: `status`, `explain`, `monitor` and `top`.
//!
//! They ask the running process over HTTP for what only it knows (names, the last sync) and read the rest from the pinned maps, so
//! that they say something when no process runs too.

mod client;
mod explain;
mod monitor;
mod status;
mod top;

use std::ffi::OsString;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::dataplane::ebpf::inspect::InspectError;

/// Names of the commands: what a command line begins with that is for this module.
const NAMES: [&str; 4] = ["status", "explain", "monitor", "top"];

/// Why a command can't say anything.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The kernel's state can't be read.
    #[error(transparent)]
    Inspect(#[from] InspectError),
    /// Neither a process nor pins.
    #[error("no trama-proxy answers at {address} ({reason}), and {pins}")]
    Nobody {
        /// Where it was asked.
        address: SocketAddr,
        /// Why it does not answer.
        reason: io::Error,
        /// Why the pins tell nothing.
        pins: InspectError,
    },
    /// Names are wanted that only a process knows.
    #[error("names of Services are known to a running trama-proxy only, and none answers at {address}: {reason}")]
    NoNames {
        /// Where it was asked.
        address: SocketAddr,
        /// Why it does not answer.
        reason: io::Error,
    },
    /// The packet can't be sent by anybody.
    #[error("{0}")]
    Question(String),
    /// The route lookup failed.
    #[error("cannot find the interface of {address}: {reason}; name one with --interface")]
    Route {
        /// Whose.
        address: std::net::IpAddr,
        /// The kernel's answer.
        reason: String,
    },
    /// The output can't be written.
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
    /// The output has no JSON; a bug.
    #[error("cannot write JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// Looks at a running trama-proxy, or at what one left in the kernel.
#[derive(Debug, Parser)]
#[command(name = "trama-proxy", version)]
pub struct Commands {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Mode and why, counts, how full the maps are, the last sync and audit, what hangs where
    Status(StatusOptions),
    /// What becomes of a packet and why, step by step, and whether the kernel's program does the same
    Explain(explain::Options),
    /// New connections, drops and refusals as they happen
    Monitor(monitor::Options),
    /// Services by packets and new connections a second
    Top(top::Options),
}

/// Where to look.
#[derive(Debug, Clone, Args)]
pub(crate) struct Node {
    /// Mount point of the BPF file system
    #[arg(long, value_name = "PATH", default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,
    /// Where the running trama-proxy serves /metrics
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:10249")]
    metrics_bind_address: SocketAddr,
}

#[derive(Debug, Args)]
struct StatusOptions {
    #[command(flatten)]
    node: Node,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs; one value a line where there is no end.
    Json,
}

impl Commands {
    /// Reads a command line that begins with one of the commands; `None` for any other, which is the daemon's.
    ///
    /// # Errors
    /// What is wrong with it, or the text of `--help`.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Option<Result<Self, clap::Error>> {
        let arguments: Vec<OsString> = arguments.into_iter().collect();
        let first = arguments.get(1)?;
        NAMES.iter().any(|name| first == name).then(|| Self::try_parse_from(arguments))
    }

    /// Does it. The exit status is a failure where `explain` finds that the kernel does something else than it should.
    ///
    /// # Errors
    /// [`CommandError`], one sentence.
    pub fn run(&self) -> Result<ExitCode, CommandError> {
        match &self.command {
            Command::Status(options) => status::run(&options.node, options.output),
            Command::Explain(options) => explain::run(options),
            Command::Monitor(options) => monitor::run(options),
            Command::Top(options) => top::run(options),
        }
    }
}

/// Prints one line; `false` when nobody reads any more.
fn print_line(line: &str) -> Result<bool, CommandError> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        other => Ok(other.map(|()| true)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Option<Result<Commands, clap::Error>> {
        Commands::read(line.split(' ').map(OsString::from))
    }

    #[test]
    fn a_daemon_s_command_line_is_left_to_it() {
        assert!(read("trama-proxy").is_none());
        assert!(read("trama-proxy --kubeconfig status").is_none());
        assert!(read("trama-proxy status").unwrap().is_ok());
        assert!(read("trama-proxy explain 10.0.0.1 10.96.0.1:80/TCP --output json").unwrap().is_ok());
        assert!(read("trama-proxy monitor --service a/b --drops --sample 10").unwrap().is_ok());
        assert!(read("trama-proxy top --once").unwrap().is_ok());
        assert!(read("trama-proxy top --sideways").unwrap().is_err());
    }
}
