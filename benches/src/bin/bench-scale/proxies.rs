//! The proxies that are measured, and what each says of itself.
//!
//! Every time is taken by the proxy itself and read from its `/metrics`, so when this program looks does not matter, as long as its looking
//! takes no time from what it measures: it looks when a change should be done.

use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use benches::figures::percentile;
use benches::objects::Size;
use trama_lab::metrics::Samples;
use trama_lab::{Cluster, wait_for};

use crate::report::{Column, Figure};

/// How long the first sync may take before this program gives up.
const SYNC_LIMIT: Duration = Duration::from_secs(900);
/// How long one change may take before this program gives up.
const CHANGE_LIMIT: Duration = Duration::from_secs(60);
/// Between a change's answer and the first look: a scrape among ten thousand Services keeps two CPUs busy for milliseconds.
const LOOK_AFTER: Duration = Duration::from_millis(20);
/// Quiet time after the last change, before the steady figures are read.
const STEADY_AFTER: Duration = Duration::from_secs(2);
/// When kube-proxy and trama-proxy wrote the kernel last.
const LAST_SYNC: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";

/// Which proxy.
#[derive(Debug, Clone)]
pub(crate) enum Proxy {
    /// trama-proxy in this mode.
    Trama(String),
    /// A kube-proxy binary in this mode.
    KubeProxy(PathBuf, String),
}

/// What a backend has to reach at 10,000 Services of 10 endpoints.
struct Bars {
    programmed_s: f64,
    change_p99_ms: f64,
    peak_mb: f64,
}

impl Proxy {
    pub(crate) fn title(&self) -> String {
        match self {
            Self::Trama(mode) => format!("trama {mode}"),
            Self::KubeProxy(_, mode) => format!("kube-proxy {mode}"),
        }
    }

    fn bars(&self, size: Size) -> Option<Bars> {
        let Self::Trama(mode) = self else { return None };
        let (programmed_s, change_p99_ms, peak_mb) = match mode.as_str() {
            "ebpf" => (1.0, 5.0, 45.0),
            "nftables" => (3.0, 20.0, 60.0),
            "iptables" => (9.0, 2000.0, 120.0),
            _ => return None,
        };
        let named = size.services == 10_000 && size.endpoints == 10;
        named.then_some(Bars { programmed_s, change_p99_ms, peak_mb })
    }

    fn start(&self, cluster: &Cluster) -> Result<()> {
        match self {
            Self::Trama(mode) => cluster.start_proxy_with(1, &["--proxy-mode", mode]),
            Self::KubeProxy(program, mode) => {
                cluster.start_other_proxy(1, &mut cluster.kube_proxy_command(1, program, mode)?)
            }
        }
    }

    /// Takes away what it left, so that the next one starts on a clean node.
    fn clean(&self, cluster: &Cluster) -> Result<()> {
        cluster.kill_proxy(1)?;
        let mut cleanup = match self {
            Self::Trama(mode) => cluster.proxy_command(1, &["--proxy-mode", mode, "--cleanup"])?,
            Self::KubeProxy(program, _) => {
                let mut command = Command::new(program);
                command.arg("--cleanup");
                command
            }
        };
        let status = cluster.topology().node(1)?.place().spawn(&mut cleanup)?.wait()?;
        ensure!(status.success(), "{} --cleanup ended with {status}", self.title());
        Ok(())
    }

    /// Starts it, measures with the changes of these numbers, and takes it away again.
    pub(crate) fn measure(&self, cluster: &Cluster, size: Size, changes: Range<u32>) -> Result<Column> {
        self.start(cluster)?;
        let mut figures = self.first_sync(cluster, size)?;
        let changes = changes.map(|number| change(cluster, size, number)).collect::<Result<Vec<_>>>()?;
        figures.extend(self.change_figures(&changes, size));
        std::thread::sleep(STEADY_AFTER);
        figures.extend(self.process_figures(cluster, size)?);
        self.clean(cluster)?;
        Ok(Column { title: self.title(), figures })
    }

    fn first_sync(&self, cluster: &Cluster, size: Size) -> Result<Vec<Figure>> {
        let samples = wait_for("the first sync", SYNC_LIMIT, || {
            // It does not answer before it has started.
            let Ok(samples) = cluster.metrics(1) else { return Ok(None) };
            Ok(self.is_programmed(&samples, size)?.then_some(samples))
        })?;
        let started = sample(&samples, "process_start_time_seconds")?;
        let after_lists = match self {
            Self::Trama(_) => {
                let listed = sample(&samples, "trama_lists_complete_timestamp_seconds")?;
                sample(&samples, "trama_first_sync_timestamp_seconds")? - listed
            }
            Self::KubeProxy(..) => full_syncs(&samples),
        };
        let bar = self.bars(size).map(|bars| bars.programmed_s);
        let figure = |name, value, bar| Figure { name, unit: "s", value, bar };
        Ok(vec![
            figure("programmed after the lists' end", after_lists, bar),
            figure("programmed after the start", last_sync(&samples)? - started, None),
            figure("CPU until programmed", sample(&samples, "process_cpu_seconds_total")?, None),
        ])
    }

    /// kube-proxy does not say what it has programmed; its first full sync has everything, because it waits for both lists.
    fn is_programmed(&self, samples: &Samples, size: Size) -> Result<bool> {
        match self {
            Self::Trama(_) => {
                if samples.get("trama_first_sync_timestamp_seconds").is_none_or(|at| *at == 0.0) {
                    return Ok(false);
                }
                let programmed = sample(samples, "trama_service_ports")?;
                ensure!(programmed >= f64::from(size.services), "only {programmed} ServicePorts were programmed");
                Ok(true)
            }
            // The moment of the sync is told before how long it took.
            Self::KubeProxy(..) => Ok(last_sync(samples).is_ok_and(|at| at > 0.0) && full_syncs(samples) > 0.0),
        }
    }

    fn change_figures(&self, changes: &[Change], size: Size) -> Vec<Figure> {
        let sorted = |time: fn(&Change) -> f64| {
            let mut times: Vec<f64> = changes.iter().map(time).collect();
            times.sort_by(f64::total_cmp);
            times
        };
        let (synced, answered) = (sorted(|change| change.synced_ms), sorted(|change| change.answered_ms));
        let idle = sorted(|change| change.idle_ms);
        let bar = self.bars(size).map(|bars| bars.change_p99_ms);
        let figure = |name, sorted: &[f64], hundredths, bar| Figure {
            name,
            unit: "ms",
            value: percentile(sorted, hundredths),
            bar,
        };
        vec![
            figure("one change, request to kernel, p50", &synced, 50, None),
            figure("one change, request to kernel, p99", &synced, 99, bar),
            figure("  request to the API server's answer, p50", &answered, 50, None),
            figure("  request to the API server's answer, p99", &answered, 99, None),
            figure("  a request that changes nothing, p50", &idle, 50, None),
            figure("  a request that changes nothing, p99", &idle, 99, None),
        ]
    }

    fn process_figures(&self, cluster: &Cluster, size: Size) -> Result<Vec<Figure>> {
        let pid = cluster.proxy_pid(1)?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the proxy is gone")?;
        let bar = self.bars(size).map(|bars| bars.peak_mb);
        let cpu = sample(&cluster.metrics(1)?, "process_cpu_seconds_total")?;
        Ok(vec![
            Figure { name: "resident memory, steady", unit: "MB", value: memory_mb(&status, "VmRSS:")?, bar: None },
            Figure { name: "resident memory, peak", unit: "MB", value: memory_mb(&status, "VmHWM:")?, bar },
            Figure { name: "CPU in all", unit: "s", value: cpu, bar: None },
        ])
    }
}

/// How long one change took, in milliseconds from the request to the API server.
struct Change {
    /// For a request before it that changes nothing, `GET /version`: the machine alone.
    idle_ms: f64,
    /// Until the API server had answered: no proxy's work, but the machine's and the API server's.
    answered_ms: f64,
    /// Until the proxy had written the kernel.
    synced_ms: f64,
}

fn change(cluster: &Cluster, size: Size, number: u32) -> Result<Change> {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let asked = now();
    cluster.block_on(async { Ok::<_, anyhow::Error>(cluster.client().apiserver_version().await?) })?;
    let sent = now();
    cluster.block_on(size.change(cluster, number))?;
    let answered_ms = (now() - sent) * 1000.0;
    std::thread::sleep(LOOK_AFTER);
    let synced = wait_for("the change's programming", CHANGE_LIMIT, || {
        let synced = last_sync(&cluster.metrics(1)?)?;
        Ok((synced > sent).then_some(synced))
    })?;
    Ok(Change { idle_ms: (sent - asked) * 1000.0, answered_ms, synced_ms: (synced - sent) * 1000.0 })
}

/// Seconds that kube-proxy's full syncs took.
fn full_syncs(samples: &Samples) -> f64 {
    sum_over(samples, "kubeproxy_sync_full_proxy_rules_duration_seconds_sum")
}

fn last_sync(samples: &Samples) -> Result<f64> {
    let of_v4 = format!("{LAST_SYNC}{{ip_family=\"IPv4\"}}");
    let found = samples.get(&of_v4).or_else(|| samples.get(LAST_SYNC));
    found.copied().with_context(|| format!("the proxy has no metric {LAST_SYNC}"))
}

/// IPv4 only: a sum over both families would count the idle one too.
fn sum_over(samples: &Samples, name: &str) -> f64 {
    let of_name = samples.iter().filter(|(key, _)| key.starts_with(name) && !key.contains("IPv6"));
    of_name.map(|(_, value)| value).sum()
}

fn sample(samples: &Samples, name: &str) -> Result<f64> {
    samples.get(name).copied().with_context(|| format!("the proxy has no metric {name}"))
}

/// A line of `/proc/PID/status`, which counts in KiB.
fn memory_mb(status: &str, name: &str) -> Result<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|kib| kib.trim().parse::<f64>().ok());
    match kib {
        Some(kib) => Ok(kib * 1024.0 / 1e6),
        None => bail!("/proc/PID/status has no {name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_megabytes() {
        let status = "Name:\ta\nVmHWM:\t   50000 kB\nVmRSS:\t 1 kB\n";
        assert!((memory_mb(status, "VmHWM:").unwrap() - 51.2).abs() < 1e-9);
        assert!(memory_mb(status, "VmSwap:").is_err());
    }

    #[test]
    fn bars_are_for_the_named_size_only() {
        let ebpf = Proxy::Trama("ebpf".into());
        assert!(ebpf.bars(Size { services: 10_000, endpoints: 10 }).is_some());
        assert!(ebpf.bars(Size { services: 10, endpoints: 10 }).is_none());
    }
}
