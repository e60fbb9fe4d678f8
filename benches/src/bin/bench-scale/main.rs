//! bench-scale: a large cluster through a live API server into the kernel of one node, one proxy after the other: how long, how
//! much memory, how much CPU.
#![forbid(unsafe_code)]

mod proxies;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use benches::objects::Size;
use clap::Parser;
use serde_json::json;
use trama_lab::{Cluster, ClusterOptions};

use proxies::Proxy;

#[derive(Debug, Parser)]
#[command(name = "bench-scale", about = "Services x endpoints through a live API server into the kernel")]
struct Arguments {
    /// Services, each with one port and one EndpointSlice.
    #[arg(long, default_value_t = 10_000)]
    services: u32,
    /// Endpoints of every Service.
    #[arg(long, default_value_t = 10)]
    endpoints: u32,
    /// Changes of one endpoint, one after the other.
    #[arg(long, default_value_t = 200)]
    changes: u32,
    /// Modes of trama-proxy, separated by commas.
    #[arg(long, value_name = "MODES", value_delimiter = ',', default_value = "ebpf")]
    backend: Vec<String>,
    /// A kube-proxy binary to measure beside it, on the same objects.
    #[arg(long, value_name = "PATH")]
    kube_proxy: Option<PathBuf>,
    /// Modes of that kube-proxy, separated by commas.
    #[arg(long, value_name = "MODES", value_delimiter = ',', default_value = "nftables")]
    kube_proxy_mode: Vec<String>,
    /// Changes that kube-proxy is measured with; it takes a second or more for each.
    #[arg(long, default_value_t = 20)]
    kube_proxy_changes: u32,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-scale: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let size = Size { services: arguments.services, endpoints: arguments.endpoints };
    let total = u64::from(size.services) * u64::from(size.endpoints);
    ensure!(total > 0 && total < 1 << 22, "between 1 and 4 million endpoints, not {total}");
    ensure!(arguments.changes > 0 && arguments.kube_proxy_changes > 0, "at least one change");
    let options = ClusterOptions { nodes: 1, proxies: false, progress: say, ..ClusterOptions::default() };
    let cluster = Cluster::start(&options)?;
    say(&format!("creating {} Services with {} endpoints each", size.services, size.endpoints));
    let start = Instant::now();
    cluster.block_on(size.create_all(&cluster))?;
    let per_second = f64::from(size.services) * 2.0 / start.elapsed().as_secs_f64();
    say(&format!("the API server took {per_second:.0} objects a second"));
    let mut columns = Vec::new();
    // No change comes twice: the second would change nothing.
    let mut changed = 0;
    for (proxy, changes) in proxies(arguments) {
        say(&format!("measuring {} with {changes} changes", proxy.title()));
        columns.push(proxy.measure(&cluster, size, changed..changed + changes)?);
        changed += changes;
    }
    print!("\n{}", report::table(&columns));
    let about = json!({ "services": size.services, "endpoints": size.endpoints, "changes": arguments.changes });
    say(&format!("written to {}", report::write_json(&about, &columns)?.display()));
    Ok(())
}

/// Ours first: the bars of the table are theirs.
fn proxies(arguments: &Arguments) -> Vec<(Proxy, u32)> {
    let ours = arguments.backend.iter().map(|mode| (Proxy::Trama(mode.clone()), arguments.changes));
    let peers = arguments.kube_proxy.iter().flat_map(|program| {
        let of_mode = |mode: &String| Proxy::KubeProxy(program.clone(), mode.clone());
        arguments.kube_proxy_mode.iter().map(move |mode| (of_mode(mode), arguments.kube_proxy_changes))
    });
    ours.chain(peers).collect()
}

fn say(what: &str) {
    println!("bench-scale: {what}");
}
