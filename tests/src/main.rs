//! trama-lab: the programs of the lab. `echo` runs in every pod, `probe` is a client in a chosen cgroup.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};
use trama_lab::flows::FlowsOptions;
use trama_lab::fuzz::FuzzOptions;
use trama_lab::migration::MigrationOptions;
use trama_lab::packets::PacketsOptions;
use trama_lab::traffic::TrafficOptions;
use trama_lab::verifier::VerifierOptions;
use trama_lab::{EchoServer, Probe, Topology, Transport, flows, fuzz, migration, packets, up, verifier};

#[derive(Debug, Parser)]
#[command(name = "trama-lab", about = "Clusters in network namespaces")]
struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Brings up a cluster, applies the examples, sends traffic and shows who answered; stays until Ctrl-C.
    Up {
        /// Ends after the table, with a status that says whether every row is right.
        #[arg(long)]
        once: bool,
        /// Folder of the manifests to apply.
        #[arg(long)]
        examples: PathBuf,
    },
    /// Answers every TCP line and UDP datagram with its name, the client's address and its own.
    Echo {
        #[arg(long)]
        name: String,
        #[arg(long, value_delimiter = ',')]
        tcp: Vec<u16>,
        #[arg(long, value_delimiter = ',')]
        udp: Vec<u16>,
    },
    /// Runs files of flows, and prints what differs from what they expect.
    Flows(FlowsOptions),
    /// Runs random packets through the programs, and prints what differs from the model.
    Fuzz(FuzzOptions),
    /// Runs files of single packets through the programs, and prints what differs from what they expect.
    Packets(PacketsOptions),
    /// Counts what the kernel's verifier walks for each program, and compares with budgets.
    Verifier(VerifierOptions),
    /// Serves and asks for `flows`: requests on standard input, answers on standard output.
    #[command(hide = true)]
    Stand,
    /// Builds an empty lab with one node, prints a line when it stands, and keeps it until a signal comes.
    Hold {
        #[arg(long)]
        id: String,
    },
    /// Asks an echo server and prints each outcome as a line of JSON.
    Probe {
        #[arg(long)]
        target: SocketAddr,
        #[arg(long, value_enum)]
        transport: Transport,
        #[arg(long, default_value_t = 1)]
        count: usize,
        #[arg(long, default_value_t = 2000)]
        timeout_ms: u64,
    },
    /// Exchanges kube-proxy for trama-proxy and back while traffic goes on, and counts what is lost.
    Migration(MigrationOptions),
    /// Keeps flows and opens new ones until its input ends, and prints what became of them.
    #[command(hide = true)]
    Traffic(TrafficOptions),
    /// Connects two sockets that have one place in the map of connected sockets, and prints whom they take themselves to be connected to.
    #[command(hide = true)]
    Twins {
        #[arg(long)]
        target: SocketAddr,
        #[arg(long)]
        other: SocketAddr,
        #[arg(long, value_enum)]
        transport: Transport,
        #[arg(long)]
        places: u64,
    },
    /// Keeps one connected UDP socket and asks once for every line of its input.
    Converse {
        #[arg(long)]
        target: SocketAddr,
        #[arg(long)]
        timeout_ms: u64,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("trama-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Up { once, examples } => return up::up(&examples, once),
        Verb::Migration(options) => return migration::run(&options),
        Verb::Traffic(options) => trama_lab::traffic::traffic(&options)?,
        Verb::Flows(options) => return flows::run(&options),
        Verb::Fuzz(options) => return fuzz::run(&options),
        Verb::Packets(options) => return packets::run(&options),
        Verb::Verifier(options) => return verifier::run(&options),
        Verb::Stand => flows::stand()?,
        Verb::Echo { name, tcp, udp } => EchoServer::start(&name, &tcp, &udp)?.wait(),
        Verb::Hold { id } => {
            let _lab = Topology::with_id(&id, 1)?;
            println!("ready");
            loop {
                std::thread::park();
            }
        }
        Verb::Converse { target, timeout_ms } => trama_lab::converse(target, Duration::from_millis(timeout_ms))?,
        Verb::Twins { target, other, transport, places } => trama_lab::twins::twins(target, other, transport, places)?,
        Verb::Probe { target, transport, count, timeout_ms } => {
            let probe = Probe { target, transport, timeout: Duration::from_millis(timeout_ms) };
            for outcome in probe.ask_times(count) {
                println!("{}", serde_json::to_string(&outcome)?);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
