//! Exchanges kube-proxy for trama-proxy and back on nodes with living traffic, and counts what is lost.
//!
//! One node after the other: the old process ends, the new one starts and writes its rules, and the old one's `--cleanup` removes
//! what it left. Until then both proxies' rules stand side by side.

mod ways;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

use self::ways::{prepare, ways};
use crate::traffic::{Event, Load, Record, Traffic, Way, now};
use crate::{Cluster, ClusterOptions, patient, wait_for};

/// Traffic before the first exchange and after the last.
const MARGIN: Duration = Duration::from_secs(2);
/// How long a proxy may take until it has programmed the kernel.
const SYNC_LIMIT: Duration = Duration::from_secs(60);
/// From one question on a kept flow to the next.
const KEPT_PAUSE: Duration = Duration::from_millis(50);
/// When a proxy, kube-proxy or ours, wrote the kernel last.
const LAST_SYNC: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";
/// Events of a kind that are printed.
const EVENTS_SHOWN: usize = 5;

/// Which proxies are exchanged, and under what traffic.
#[derive(Debug, Clone, Args)]
pub struct MigrationOptions {
    /// The kube-proxy binary.
    #[arg(long)]
    kube_proxy: PathBuf,
    /// Its modes, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "iptables,nftables")]
    kube_proxy_mode: Vec<String>,
    /// Modes of trama-proxy, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "ebpf,nftables,iptables")]
    mode: Vec<String>,
    /// How often every pair is exchanged, there and back.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Flows kept at each address of each kind, by TCP and by UDP.
    #[arg(long, default_value_t = 3)]
    kept: usize,
    /// From one new flow at an address to the next, in milliseconds.
    #[arg(long, default_value_t = 40)]
    pause_ms: u64,
}

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

    /// Whether it does not answer everywhere itself: kube-proxy's ipvs mode (1.36, seen on Linux 6.1) masquerades IPv6 with a ClusterIP,
    /// and does not answer UDP over IPv6 at an endpoint that is the node itself.
    fn is_ipvs_of_kube_proxy(&self) -> bool {
        self.program.is_some() && self.mode == "ipvs"
    }

    fn command(&self, cluster: &Cluster, node: usize) -> Result<std::process::Command> {
        match self.program {
            Some(program) => cluster.kube_proxy_command(node, program, self.mode),
            None => cluster.proxy_command(node, &["--proxy-mode", self.mode]),
        }
    }

    /// Starts it in the place of what runs, and waits until it has programmed both families.
    fn start(&self, cluster: &Cluster, node: usize) -> Result<()> {
        cluster.start_other_proxy(node, &mut self.command(cluster, node)?)?;
        wait_for(&format!("the first sync of {}", self.title()), SYNC_LIMIT, || {
            let Ok(samples) = cluster.metrics(node) else { return Ok(None) };
            let synced = |family: &str| {
                samples.iter().any(|(name, at)| name.starts_with(LAST_SYNC) && name.contains(family) && *at > 0.0)
            };
            Ok((synced("IPv4") && synced("IPv6")).then_some(()))
        })
    }

    /// Removes what it left, now that `next` is there.
    fn clean(&self, cluster: &Cluster, node: usize, next: &Proxy<'_>) -> Result<()> {
        if self.is_ipvs_of_kube_proxy() && next.mode == self.mode {
            // It flushes all of IPVS, ours included.
            return Ok(());
        }
        let mut command = self.command(cluster, node)?;
        // Its log would stand between the rows.
        command.arg("--cleanup").env("RUST_LOG", "warn");
        let status = cluster.topology().node(node)?.place().spawn(&mut command)?.wait()?;
        // kube-proxy's ipvs mode does its work and ends with an error (1.36, seen on Linux 6.1).
        ensure!(status.success() || self.is_ipvs_of_kube_proxy(), "{} --cleanup ended with {status}", self.title());
        Ok(())
    }
}

/// Exchanges each of kube-proxy's modes for each of ours and back; prints a row for every exchange and kind of traffic.
///
/// # Errors
/// When a proxy does not start, or does not program the kernel.
pub fn run(options: &MigrationOptions) -> Result<ExitCode> {
    let columns = format!("{:>6} {:>5} {:>7} {:>7} {:>5}", "KEPT", "LOST", "NEW", "FAILED", "SLOW");
    println!("{:<36} |{:^35}|{:^35}", "", "TCP", "UDP");
    println!("{:<36} | {columns} | {columns}", "EXCHANGE");
    let (mut clean, mut exchanges) = (0, 0);
    for _ in 0..options.rounds {
        for their in &options.kube_proxy_mode {
            for our in &options.mode {
                let theirs = Proxy { program: Some(&options.kube_proxy), mode: their };
                let ours = Proxy { program: None, mode: our };
                clean += exchange_both_ways(&theirs, &ours, options)?;
                exchanges += 2;
            }
        }
    }
    println!("{clean} of {exchanges} exchanges without a loss");
    Ok(if clean == exchanges { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Returns how many of the two lost nothing.
fn exchange_both_ways(theirs: &Proxy<'_>, ours: &Proxy<'_>, options: &MigrationOptions) -> Result<usize> {
    let cluster = Cluster::start(&ClusterOptions { proxies: false, ..ClusterOptions::default() })?;
    prepare(&cluster)?;
    (1..=2).try_for_each(|node| theirs.start(&cluster, node))?;
    let mut ways = ways(&cluster)?;
    if theirs.is_ipvs_of_kube_proxy() {
        ways.retain(|way| is_answered(way, &cluster, theirs));
    } else {
        ways.iter().try_for_each(|way| way.wait_for_answers(&cluster))?;
    }
    let pause = Duration::from_millis(options.pause_ms);
    let load = Load { kept: options.kept, kept_pause: KEPT_PAUSE, pause, reset: false };
    let there = exchange(&cluster, &ways, load, theirs, ours)?;
    let back = exchange(&cluster, &ways, load, ours, theirs)?;
    Ok(usize::from(there) + usize::from(back))
}

/// Names the ways that are left out.
fn is_answered(way: &Way, cluster: &Cluster, by: &Proxy<'_>) -> bool {
    match way.wait_for_answers(cluster) {
        Ok(()) => true,
        Err(error) => {
            println!("  left out, {} does not answer: {}, {error:#}", by.title(), way.kind);
            false
        }
    }
}

/// Whether nothing was lost.
fn exchange(cluster: &Cluster, ways: &[Way], load: Load, from: &Proxy<'_>, to: &Proxy<'_>) -> Result<bool> {
    let traffic = Traffic::start(ways, load)?;
    let began = traffic.began;
    let mut steps = Vec::new();
    thread::sleep(patient(MARGIN));
    for node in [1, 2] {
        steps.push((now(), format!("node-{node} starts the new one")));
        to.start(cluster, node)?;
        steps.push((now(), format!("node-{node} cleans up")));
        from.clean(cluster, node, to)?;
        steps.push((now(), format!("node-{node} is done")));
    }
    thread::sleep(patient(MARGIN));
    let records = traffic.stop()?;
    println!("{} -> {}", from.title(), to.title());
    records.iter().for_each(|record| print_record(record, began, &steps));
    Ok(records.iter().all(Record::is_clean))
}

fn print_record(record: &Record, began: Duration, steps: &[(Duration, String)]) {
    let [tcp, udp] = [&record.tcp, &record.udp].map(|report| {
        let (kept, lost, asked) = (report.kept, report.lost, report.asked);
        format!("{kept:>6} {lost:>5} {asked:>7} {:>7} {:>5}", report.failed, report.slow)
    });
    println!("  {:<34} | {tcp} | {udp}", record.kind);
    // What was slow comes last: on a slow machine there is much of it.
    let (slow, broken): (Vec<_>, Vec<_>) = record.events().partition(|(_, event, _)| *event == Event::Slow);
    for (at, event, text) in broken.into_iter().chain(slow).take(EVENTS_SHOWN) {
        let step = steps.iter().rev().find(|(then, _)| then <= at);
        let step = step.map_or_else(String::new, |(then, what)| {
            format!(", {:.2} s after {what}", at.saturating_sub(*then).as_secs_f32())
        });
        println!("    {event:?} at {:.2} s{step}: {text}", at.saturating_sub(began).as_secs_f32());
    }
}
