//! Exchanges kube-proxy for trama-proxy and back on nodes with living traffic, and counts what is lost.
//!
//! One node after the other: the old process ends, the new one starts and writes its rules, and the old one's `--cleanup` removes
//! what it left. Until then both proxies' rules stand side by side.

mod traffic;

use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::scenario::{ServiceManifest, pod};
use crate::{Cluster, ClusterOptions, Transport, wait_for};
use traffic::{Record, Traffic, Way};

/// Connections kept on each way.
const KEPT: usize = 8;
/// Traffic before the first exchange and after the last.
const MARGIN: Duration = Duration::from_secs(2);
/// How long a proxy may take until it has programmed the kernel.
const SYNC_LIMIT: Duration = Duration::from_secs(60);
/// When a proxy, kube-proxy or ours, wrote the kernel last.
const LAST_SYNC: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";
/// Who runs behind the Service: two on each node.
const SERVERS: [&str; 4] = ["web-1", "web-2", "web-3", "web-4"];

/// A proxy in a mode.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Proxy<'a> {
    /// kube-proxy's binary; `None` is ours.
    program: Option<&'a Path>,
    mode: &'a str,
}

impl Proxy<'_> {
    fn title(&self) -> String {
        format!("{} {}", if self.program.is_some() { "kube-proxy" } else { "trama" }, self.mode)
    }

    fn command(&self, cluster: &Cluster, node: usize) -> Result<std::process::Command> {
        match self.program {
            Some(program) => cluster.kube_proxy_command(node, program, self.mode),
            None => cluster.proxy_command(node, &["--proxy-mode", self.mode]),
        }
    }

    /// Starts it in the place of what runs, and waits until it has programmed the kernel.
    fn start(&self, cluster: &Cluster, node: usize) -> Result<()> {
        cluster.start_other_proxy(node, &mut self.command(cluster, node)?)?;
        wait_for(&format!("the first sync of {}", self.title()), SYNC_LIMIT, || {
            let Ok(samples) = cluster.metrics(node) else { return Ok(None) };
            let synced = samples.iter().filter(|(name, _)| name.starts_with(LAST_SYNC) && !name.contains("IPv6"));
            Ok(synced.into_iter().any(|(_, at)| *at > 0.0).then_some(()))
        })
    }

    fn clean(&self, cluster: &Cluster, node: usize) -> Result<()> {
        let mut command = self.command(cluster, node)?;
        let status = cluster.topology().node(node)?.place().spawn(command.arg("--cleanup"))?.wait()?;
        ensure!(status.success(), "{} --cleanup ended with {status}", self.title());
        Ok(())
    }
}

/// Exchanges each of `theirs` for each of `ours` and back; prints a line for every exchange.
///
/// # Errors
/// When a proxy does not start, or does not program the kernel.
pub fn run(kube_proxy: &Path, theirs: &[String], ours: &[String]) -> Result<ExitCode> {
    println!(
        "{:<42} {:>5} {:>5} {:>7} {:>7} {:>5} {:>8}",
        "EXCHANGE", "KEPT", "LOST", "NEW", "FAILED", "SLOW", "NEW/S"
    );
    let mut clean = true;
    for their in theirs {
        for our in ours {
            let theirs = Proxy { program: Some(kube_proxy), mode: their };
            let ours = Proxy { program: None, mode: our };
            clean &= exchange_both_ways(&theirs, &ours)?;
        }
    }
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn exchange_both_ways(theirs: &Proxy<'_>, ours: &Proxy<'_>) -> Result<bool> {
    let cluster = Cluster::start(&ClusterOptions { proxies: false, ..ClusterOptions::default() })?;
    let servers = SERVERS.iter().enumerate().map(|(index, name)| pod(name, index / 2 + 1, "web", &[8080], &[]));
    cluster.apply_all(servers)?;
    cluster.apply_all([pod("client", 1, "client", &[], &[]), pod("client-2", 2, "client", &[], &[])])?;
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).with("type", json!("NodePort"));
    cluster.apply(service.build())?;
    (1..=2).try_for_each(|node| theirs.start(&cluster, node))?;
    let ways = ways(&cluster)?;
    for way in &ways {
        cluster.wait_for_answers(&way.place, way.target, Transport::Tcp, &SERVERS)?;
    }
    let there = exchange(&cluster, &ways, theirs, ours)?;
    let back = exchange(&cluster, &ways, ours, theirs)?;
    Ok(there && back)
}

/// From outside through both nodes, from a pod on each node on the packet path, and from one on the socket path.
fn ways(cluster: &Cluster) -> Result<Vec<Way>> {
    let ip = *cluster.cluster_ips("web")?.first().context("a Service without an address")?;
    let port = cluster.node_port("web", "TCP", 80)?;
    let mut ways = Vec::new();
    for number in [1, 2] {
        let [address, _] = cluster.topology().node(number)?.addresses();
        let name = format!("outside to node-{number}");
        ways.push(Way { name, place: cluster.topology().client(), target: (address, port).into() });
    }
    let pods = ["client", "client-2"].map(|pod| cluster.place_in_pod(&format!("default/{pod}")));
    for place in pods {
        let place = place?;
        let target = (ip, 80).into();
        ways.push(Way { name: "pod, no socket LB".to_owned(), place: place.outside_cgroup(), target });
        ways.push(Way { name: "pod".to_owned(), place, target });
    }
    Ok(ways)
}

fn exchange(cluster: &Cluster, ways: &[Way], from: &Proxy<'_>, to: &Proxy<'_>) -> Result<bool> {
    let traffic = Traffic::start(ways, KEPT)?;
    thread::sleep(MARGIN);
    for node in [1, 2] {
        to.start(cluster, node)?;
        from.clean(cluster, node)?;
    }
    thread::sleep(MARGIN);
    let record = traffic.stop();
    print_record(&format!("{} -> {}", from.title(), to.title()), &record);
    Ok(record.lost.is_empty() && record.failed.is_empty())
}

fn print_record(title: &str, record: &Record) {
    let rate = record.asked as f64 / record.lasted.as_secs_f64();
    let (lost, failed, slow) = (record.lost.len(), record.failed.len(), record.slow.len());
    println!("{title:<42} {:>5} {lost:>5} {:>7} {failed:>7} {slow:>5} {rate:>8.0}", record.kept, record.asked);
    for (what, list) in [("lost", &record.lost), ("failed", &record.failed), ("slow", &record.slow)] {
        list.iter().take(3).for_each(|one| println!("  {what}: {one}"));
    }
}
