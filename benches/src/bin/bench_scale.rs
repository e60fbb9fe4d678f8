//! bench-scale: a large cluster through a live API server into the maps of one trama-proxy: how long, how much memory, how much CPU.
//!
//! Every time is taken by trama-proxy itself and read from its `/metrics`, so how often this program looks does not matter.
#![forbid(unsafe_code)]

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use trama_lab::metrics::Samples;
use trama_lab::{Cluster, ClusterOptions, wait_for};

/// Requests to the API server at once while the objects are made.
const REQUESTS_AT_ONCE: usize = 16;
/// How long the first sync may take before this program gives up.
const SYNC_LIMIT: Duration = Duration::from_secs(300);
/// How long one change may take before this program gives up.
const CHANGE_LIMIT: Duration = Duration::from_secs(10);
/// Quiet time after the last change, before the steady figures are read.
const STEADY_AFTER: Duration = Duration::from_secs(2);
/// First endpoint address: the rest follow one by one, outside of every range that the lab uses.
const FIRST_ENDPOINT: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 1);

/// From one changed Service to the next: a prime, so that all come before one comes again.
const STRIDE: u32 = 7919;

#[derive(Debug, Parser)]
#[command(name = "bench-scale", about = "Services x endpoints through a live API server into the maps")]
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
}

/// A figure of the result, with the bar that it has to meet.
struct Figure {
    name: &'static str,
    value: f64,
    unit: &'static str,
    bar: Option<f64>,
}

/// Times of one change in milliseconds.
struct Change {
    /// From the request to the API server until its answer.
    request_to_answer: f64,
    /// From the request to the API server until trama-proxy has written the maps.
    request_to_programmed: f64,
    /// The part of it inside trama-proxy: from the receipt of the event.
    event_to_programmed: f64,
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
    let total = u64::from(arguments.services) * u64::from(arguments.endpoints);
    ensure!(total > 0 && total < 1 << 22, "between 1 and 4 million endpoints, not {total}");
    ensure!(arguments.changes > 0, "at least one change");
    let options = ClusterOptions { nodes: 1, proxies: false, progress: say, ..ClusterOptions::default() };
    let cluster = Cluster::start(&options)?;
    say(&format!("creating {} Services with {} endpoints each", arguments.services, arguments.endpoints));
    let start = Instant::now();
    cluster.block_on(create_all(&cluster, arguments))?;
    let created_s = start.elapsed().as_secs_f64();
    say("starting trama-proxy");
    let mut figures = first_sync(&cluster, arguments)?;
    figures.push(Figure {
        name: "objects created by the API server",
        value: f64::from(arguments.services) * 2.0 / created_s,
        unit: "1/s",
        bar: None,
    });
    say(&format!("changing one endpoint {} times", arguments.changes));
    let changes = (0..arguments.changes).map(|number| change_one(&cluster, arguments, number));
    figures.extend(change_figures(&changes.collect::<Result<Vec<_>>>()?));
    std::thread::sleep(STEADY_AFTER);
    figures.extend(process_figures(&cluster.metrics(1)?)?);
    print!("\n{}", table(&figures));
    write_json(arguments, &figures)
}

fn say(what: &str) {
    println!("bench-scale: {what}");
}

async fn create_all(cluster: &Cluster, arguments: &Arguments) -> Result<()> {
    let services: Api<Service> = Api::namespaced(cluster.client(), "default");
    let slices: Api<EndpointSlice> = Api::namespaced(cluster.client(), "default");
    let numbers = futures::stream::iter(0..arguments.services).map(Ok::<u32, anyhow::Error>);
    let create = async |number: u32| {
        let service = serde_json::from_value(service(number))?;
        let slice = serde_json::from_value(slice(arguments, number, 0))?;
        services.create(&PostParams::default(), &service).await.context("cannot create a Service")?;
        slices.create(&PostParams::default(), &slice).await.context("cannot create an EndpointSlice")?;
        Ok(())
    };
    numbers.try_for_each_concurrent(REQUESTS_AT_ONCE, create).await
}

fn service(number: u32) -> Value {
    json!({
        "metadata": { "name": format!("svc-{number}") },
        "spec": { "ports": [{ "name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080 }] },
    })
}

/// The slice of a Service; with `shift` its last endpoint moves to another address.
fn slice(arguments: &Arguments, number: u32, shift: u32) -> Value {
    let first = u32::from(FIRST_ENDPOINT) + number * arguments.endpoints;
    let endpoints: Vec<Value> = (0..arguments.endpoints)
        .map(|index| {
            let moved = if index + 1 == arguments.endpoints { shift << 22 } else { 0 };
            let address = Ipv4Addr::from(first + index + moved);
            json!({ "addresses": [address.to_string()], "conditions": { "ready": true } })
        })
        .collect();
    json!({
        "metadata": {
            "name": format!("svc-{number}-1"),
            "labels": {
                "kubernetes.io/service-name": format!("svc-{number}"),
                "endpointslice.kubernetes.io/managed-by": "bench-scale",
            },
        },
        "addressType": "IPv4",
        "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        "endpoints": endpoints,
    })
}

fn first_sync(cluster: &Cluster, arguments: &Arguments) -> Result<Vec<Figure>> {
    cluster.start_proxy(1)?;
    let samples = wait_for("the first sync", SYNC_LIMIT, || {
        // It does not answer before it has started.
        let Ok(samples) = cluster.metrics(1) else { return Ok(None) };
        Ok((sample(&samples, "trama_first_sync_timestamp_seconds").unwrap_or_default() > 0.0).then_some(samples))
    })?;
    let programmed = sample(&samples, "trama_service_ports")?;
    ensure!(programmed >= f64::from(arguments.services), "only {programmed} ServicePorts were programmed");
    let synced = sample(&samples, "trama_first_sync_timestamp_seconds")?;
    let listed = sample(&samples, "trama_lists_complete_timestamp_seconds")?;
    let started = sample(&samples, "process_start_time_seconds")?;
    Ok(vec![
        Figure { name: "programmed after the lists' end", value: synced - listed, unit: "s", bar: Some(3.0) },
        Figure { name: "programmed after the start", value: synced - started, unit: "s", bar: None },
        Figure {
            name: "entries written by the first sync",
            value: sample(&samples, "trama_kernel_writes_total")?,
            unit: "",
            bar: None,
        },
        Figure {
            name: "CPU until programmed",
            value: sample(&samples, "process_cpu_seconds_total")?,
            unit: "s",
            bar: None,
        },
    ])
}

/// Moves one endpoint of one Service, and waits until trama-proxy says that it wrote the maps.
fn change_one(cluster: &Cluster, arguments: &Arguments, number: u32) -> Result<Change> {
    let before = cluster.metrics(1)?;
    let counted = |samples: &Samples| sample(samples, "trama_event_to_programmed_seconds_count");
    let written = |samples: &Samples| sample(samples, "trama_kernel_writes_total");
    // Spread over the Services; a Service that comes again moves its endpoint once more.
    let stride = if arguments.services.is_multiple_of(STRIDE) { 1 } else { STRIDE };
    let index = number.wrapping_mul(stride) % arguments.services;
    let moved = slice(arguments, index, 1 + number / arguments.services % 2);
    let api: Api<EndpointSlice> = Api::namespaced(cluster.client(), "default");
    let name = format!("svc-{index}-1");
    let sent = unix_time_s();
    cluster
        .block_on(api.patch(&name, &PatchParams::default(), &Patch::Merge(moved)))
        .context("cannot change a slice")?;
    let answered = unix_time_s();
    let after = wait_for("the change's programming", CHANGE_LIMIT, || {
        let samples = cluster.metrics(1)?;
        Ok((counted(&samples)? > counted(&before)? && written(&samples)? > written(&before)?).then_some(samples))
    })?;
    let synced = sample(&after, "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"}")?;
    let sum = |samples: &Samples| sample(samples, "trama_event_to_programmed_seconds_sum");
    let events = counted(&after)? - counted(&before)?;
    Ok(Change {
        request_to_answer: (answered - sent) * 1000.0,
        request_to_programmed: (synced - sent) * 1000.0,
        event_to_programmed: (sum(&after)? - sum(&before)?) / events * 1000.0,
    })
}

fn unix_time_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn change_figures(changes: &[Change]) -> Vec<Figure> {
    let column = |of: fn(&Change) -> f64| {
        let mut values: Vec<f64> = changes.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let answer = column(|change| change.request_to_answer);
    let request = column(|change| change.request_to_programmed);
    let event = column(|change| change.event_to_programmed);
    let figure =
        |name, values: &[f64], hundredths, bar| Figure { name, value: percentile(values, hundredths), unit: "ms", bar };
    vec![
        figure("one change, request to map write, p50", &request, 50, None),
        figure("one change, request to map write, p99", &request, 99, Some(20.0)),
        figure("one change, the API server's answer, p50", &answer, 50, None),
        figure("one change, the API server's answer, p99", &answer, 99, None),
        figure("one change, event to map write, p50", &event, 50, None),
        figure("one change, event to map write, p99", &event, 99, None),
    ]
}

/// Nearest rank: a measured value, never one in between.
fn percentile(sorted: &[f64], hundredths: usize) -> f64 {
    let rank = (sorted.len() * hundredths).div_ceil(100).saturating_sub(1);
    sorted.get(rank).copied().unwrap_or(f64::NAN)
}

fn process_figures(samples: &Samples) -> Result<Vec<Figure>> {
    let megabytes = |name| Ok::<f64, anyhow::Error>(sample(samples, name)? / 1e6);
    Ok(vec![
        Figure {
            name: "resident memory, steady",
            value: megabytes("process_resident_memory_bytes")?,
            unit: "MB",
            bar: Some(80.0),
        },
        Figure {
            name: "resident memory, peak",
            value: megabytes("trama_process_resident_memory_peak_bytes")?,
            unit: "MB",
            bar: None,
        },
        Figure { name: "CPU in all", value: sample(samples, "process_cpu_seconds_total")?, unit: "s", bar: None },
    ])
}

fn sample(samples: &Samples, name: &str) -> Result<f64> {
    samples.get(name).copied().with_context(|| format!("trama-proxy has no metric {name}"))
}

fn table(figures: &[Figure]) -> String {
    let line = |figure: &Figure| {
        let verdict = match figure.bar {
            Some(bar) if figure.value <= bar => format!("  bar {bar} {}: met", figure.unit),
            Some(bar) => format!("  bar {bar} {}: MISSED", figure.unit),
            None => String::new(),
        };
        format!("{:<40} {:>12.3} {:<4}{verdict}\n", figure.name, figure.value, figure.unit)
    };
    figures.iter().map(line).collect()
}

fn write_json(arguments: &Arguments, figures: &[Figure]) -> Result<()> {
    let folder = std::env::var_os("TRAMA_BENCH_DIR").map_or_else(|| PathBuf::from("target/bench"), PathBuf::from);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let values = figures.iter().map(|f| json!({ "name": f.name, "value": f.value, "unit": f.unit, "bar": f.bar }));
    let result = json!({
        "services": arguments.services, "endpoints": arguments.endpoints, "changes": arguments.changes,
        "kernel": kernel.trim(), "figures": values.collect::<Vec<_>>(),
    });
    let path = folder.join("scale.json");
    fs::write(&path, format!("{result:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    say(&format!("written to {}", path.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!((percentile(&values, 50), percentile(&values, 99)), (100.0, 198.0));
        assert_eq!(percentile(&[3.0], 99), 3.0);
        assert!(percentile(&[], 50).is_nan());
    }

    #[test]
    fn a_shift_moves_one_endpoint_only() {
        let arguments = Arguments { services: 10, endpoints: 3, changes: 1 };
        let addresses = |shift| {
            let slice = slice(&arguments, 2, shift);
            let endpoints = slice["endpoints"].as_array().unwrap().clone();
            endpoints.iter().map(|e| e["addresses"][0].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(addresses(0), ["10.128.0.7", "10.128.0.8", "10.128.0.9"]);
        assert_eq!(addresses(1), ["10.128.0.7", "10.128.0.8", "10.192.0.9"]);
    }
}
