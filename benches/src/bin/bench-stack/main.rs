//! bench-stack: live traffic through pods, nodes and a proxy, every proxy beside the others in one run.
//!
//! One cluster with a node for each: the same Services, pods of its own, and rounds in which each has its turn. A connection or
//! datagram that is lost fails the run, after the table.
#![forbid(unsafe_code)]

mod contender;
mod figures;
mod live;
mod load;
mod rounds;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use benches::figures::{kernel, write_json};
use benches::objects::Size;
use clap::builder::PossibleValuesParser;
use clap::{Parser, Subcommand};
use serde_json::json;
use trama_lab::{Cluster, ClusterOptions};

use contender::{Contender, Kind};
use load::Work;
use rounds::{Rounds, Slice};

/// Modes of trama-proxy and of kube-proxy.
const MODES: [&str; 4] = ["ebpf", "nftables", "iptables", "ipvs"];
const KUBE_PROXY_MODES: [&str; 3] = ["nftables", "iptables", "ipvs"];
/// Endpoints of the Services that nobody asks.
const ENDPOINTS: u32 = 10;
/// Most Services: with ten endpoints each, more than every mode has room for without further options.
const SERVICES_MAX: u32 = 16_000;
/// Most nodes of a lab.
const NODES_MAX: usize = 16;

#[derive(Debug, Parser)]
#[command(
    name = "bench-stack",
    about = "Live traffic beside nftables, iptables and no proxy: forwarding, connections, latency, throughput. Needs Linux 6.6",
    args_conflicts_with_subcommands = true
)]
struct Arguments {
    #[command(subcommand)]
    part: Option<Part>,
    /// Modes of trama-proxy, separated by commas.
    #[arg(long, value_name = "MODES", value_delimiter = ',', default_value = "ebpf,nftables,iptables")]
    #[arg(value_parser = PossibleValuesParser::new(MODES))]
    backend: Vec<String>,
    /// A kube-proxy binary to measure beside them.
    #[arg(long, value_name = "PATH")]
    kube_proxy: Option<PathBuf>,
    /// Modes of that kube-proxy, separated by commas.
    #[arg(long, value_name = "MODES", value_delimiter = ',', default_value = "nftables")]
    #[arg(value_parser = PossibleValuesParser::new(KUBE_PROXY_MODES))]
    kube_proxy_mode: Vec<String>,
    /// Numbers of Services in the cluster, ascending and separated by commas; each has its rounds.
    #[arg(long, value_delimiter = ',', default_value = "10,10000")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(SERVICES_MAX)))]
    services: Vec<u32>,
    /// Rounds of each number of Services; minimum, median and maximum are reported.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(3..=100))]
    rounds: u32,
    /// Length of one load, of which a round has a dozen for each proxy.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(50..=10_000))]
    milliseconds: u64,
    /// Forwarded datagrams of each kind in a round.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1_000..=1_000_000))]
    packets: u32,
    /// Threads of the client that counts connections.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    threads: u8,
    /// Where the JSON goes.
    #[arg(long, env = "TRAMA_BENCH_DIR", default_value = "target/bench")]
    output: PathBuf,
}

/// What the benchmark starts itself as, in pods.
#[derive(Debug, Subcommand)]
enum Part {
    /// Serves all kinds of work.
    #[command(hide = true)]
    Serve,
    /// Asks a server for a while, and prints what it reached.
    #[command(hide = true)]
    Load {
        #[arg(long, value_enum)]
        work: Work,
        #[arg(long)]
        target: SocketAddr,
        #[arg(long)]
        threads: usize,
        #[arg(long)]
        milliseconds: u64,
    },
}

fn main() -> ExitCode {
    match dispatch(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench stack: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: &Arguments) -> Result<()> {
    match &arguments.part {
        None => run(arguments),
        Some(Part::Serve) => load::serve(),
        Some(Part::Load { work, target, threads, milliseconds }) => {
            let reached = load::client(*work, *target, *threads, Duration::from_millis(*milliseconds))?;
            println!("{}", serde_json::to_string(&reached)?);
            Ok(())
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let kinds = kinds(arguments)?;
    let nodes = u8::try_from(kinds.len())?;
    let cluster =
        Cluster::start(&ClusterOptions { nodes, proxies: false, progress: say, ..ClusterOptions::default() })?;
    let contenders: Result<Vec<_>> = kinds
        .into_iter()
        .zip(1..)
        .map(|(kind, node)| {
            say(&format!("node-{node}: {}", kind.title()));
            Contender::start(&cluster, kind, node)
        })
        .collect();
    let contenders = contenders?;
    let slice = Slice {
        time: Duration::from_millis(arguments.milliseconds),
        packets: arguments.packets,
        threads: arguments.threads.into(),
    };
    let mut rounds = Rounds::new(&cluster, &contenders, slice)?;
    let mut filled = 0;
    for services in &arguments.services {
        filled = fill(&cluster, &contenders, *services, filled)?;
        contenders.iter().try_for_each(|contender| contender.shorten_memory(&cluster))?;
        (1..=arguments.rounds).try_for_each(|round| rounds.run(*services, round))?;
    }
    print!("\n{}", rounds.figures.table());
    let path = write_json(&arguments.output, "stack", &document(arguments, &rounds))?;
    say(&format!("written to {}", path.display()));
    ensure!(rounds.failures.is_empty(), "traffic was lost:\n{}", rounds.failures.join("\n"));
    Ok(())
}

/// Who takes part, on which node.
fn kinds(arguments: &Arguments) -> Result<Vec<Kind>> {
    let ascending = arguments.services.is_sorted_by(|a, b| a < b);
    ensure!(ascending, "--services counts up: each number makes Services, none takes them away");
    let mut kinds = vec![Kind::Plain];
    kinds.extend(arguments.backend.iter().cloned().map(Kind::Trama));
    if let Some(program) = &arguments.kube_proxy {
        ensure!(program.is_file(), "--kube-proxy: there is no file {}", program.display());
        kinds.extend(arguments.kube_proxy_mode.iter().map(|mode| Kind::KubeProxy(program.clone(), mode.clone())));
    }
    ensure!(kinds.len() <= NODES_MAX, "at most {} proxies at once, not {}", NODES_MAX - 1, kinds.len() - 1);
    let first = kinds.len() as u32 + 1;
    let fewest = arguments.services.first().copied().unwrap_or_default();
    ensure!(fewest >= first, "--services: these proxies need {first} Services for themselves, not {fewest}");
    Ok(kinds)
}

/// Makes Services until there are `services`, and waits until every proxy has programmed them. Returns how many of them nobody asks.
fn fill(cluster: &Cluster, contenders: &[Contender], services: u32, filled: u32) -> Result<u32> {
    // One for each contender, and one for each number of Services, made last: what it answers, everything else does.
    let own = contenders.len() as u32 + 1;
    let size = Size { services: services.saturating_sub(own), endpoints: ENDPOINTS };
    say(&format!("{services} Services with {ENDPOINTS} endpoints each"));
    cluster.block_on(size.create(cluster, filled..size.services))?;
    let last = format!("last-{services}");
    let Some(contender) = contenders.first() else { return Ok(size.services) };
    cluster.apply(contender::service(&last))?;
    cluster.apply(contender::slice(&last, contender.node, contender.server.addresses()[0]))?;
    for contender in contenders {
        contender.wait_for_sync(cluster, &last)?;
        contender.wait_for_sync(cluster, &format!("web-{}", contender.node))?;
    }
    Ok(size.services)
}

fn document(arguments: &Arguments, rounds: &Rounds<'_>) -> serde_json::Value {
    json!({
        "kernel": kernel(),
        "rounds": arguments.rounds,
        "milliseconds": arguments.milliseconds,
        "packets": arguments.packets,
        "threads": arguments.threads,
        "failures": rounds.failures,
        "result": rounds.figures.json(),
    })
}

/// Says what is being done.
fn say(what: &str) {
    println!("bench stack: {what}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds_of(line: &str) -> Result<Vec<String>> {
        let arguments = Arguments::try_parse_from(line.split(' '))?;
        Ok(kinds(&arguments)?.iter().map(Kind::title).collect())
    }

    #[test]
    fn options_are_checked_before_anything_is_made() {
        let default = ["no proxy", "trama ebpf", "trama nftables", "trama iptables"];
        assert_eq!(kinds_of("bench-stack").unwrap(), default);
        for (wrong, says) in [
            ("bench-stack --backend ebfp", "ebfp"),
            ("bench-stack --services 100,10", "counts up"),
            ("bench-stack --services 3", "need 5 Services"),
            ("bench-stack --kube-proxy /no/such/file", "no file /no/such/file"),
            ("bench-stack --threads 0", "0"),
        ] {
            let error = kinds_of(wrong).unwrap_err().to_string();
            assert!(error.contains(says), "{wrong}: {error}");
        }
    }
}
