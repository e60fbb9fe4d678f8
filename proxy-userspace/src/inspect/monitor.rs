//! `trama-proxy monitor`.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use jiff::Timestamp;
use proxy_common::Counter;
use proxy_common::counter::CounterKind;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::client::Names;
use super::{CommandError, Node, Output, print_line};
use crate::dataplane::ebpf::inspect::{Monitor, MonitorOptions, Pinned, Seen, Watched};

/// How often a signal to end is looked for while nothing happens.
const LOOK: Duration = Duration::from_millis(200);

/// New connections, drops and refusals as they happen
#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    node: Node,
    /// Only what concerns this Service
    #[arg(long, value_name = "NAMESPACE/NAME")]
    service: Option<String>,
    /// Only what was dropped, refused, or given back to the kernel
    #[arg(long)]
    drops: bool,
    /// One of how many events, drawn in the kernel before anything else is looked at
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    sample: u32,
    /// End after this many events
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// How to print them
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// Prints events until it is told to end.
pub(super) fn run(options: &Options) -> Result<ExitCode, CommandError> {
    let pinned = Pinned::find(&options.node.bpffs)?;
    let mut names = match &options.service {
        Some(_) => Names::ask(&options.node)?,
        None => Names::ask_if_any(&options.node),
    };
    let stop = stop_at_signals()?;
    let mut monitor = Monitor::start(&pinned, MonitorOptions { drops: options.drops, sample: options.sample })?;
    let mut left = options.count.unwrap_or(u64::MAX);
    if options.output == Output::Table {
        eprintln!("watching; Ctrl-C ends it");
    }
    while left > 0 && !stop.load(Ordering::Relaxed) {
        let Watched::Seen(seen) = monitor.next(Instant::now() + LOOK)? else { continue };
        let service = (seen.service_id != 0).then(|| {
            names.keep_fresh();
            names.name(seen.service_id)
        });
        if !concerns(options.service.as_deref(), service.as_deref()) {
            continue;
        }
        let line = match options.output {
            Output::Table => text(&seen, service.as_deref()),
            Output::Json => json(&seen, service.as_deref()).to_string(),
        };
        if !print_line(&line)? {
            break;
        }
        left -= 1;
    }
    Ok(ExitCode::SUCCESS)
}

/// Set when somebody wants this to end, so that the events are switched off first.
fn stop_at_signals() -> Result<Arc<AtomicBool>, CommandError> {
    let stop = Arc::new(AtomicBool::new(false));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let (mut terminate, mut interrupt) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let told = Arc::clone(&stop);
    let wait = move || {
        runtime.block_on(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        });
        told.store(true, Ordering::Relaxed);
    };
    thread::Builder::new().name("signals".to_owned()).spawn(wait)?;
    Ok(stop)
}

/// Whether an event of ServicePort `service` is asked for: `a/b` asks for every port of Service b in namespace a.
fn concerns(wanted: Option<&str>, service: Option<&str>) -> bool {
    match (wanted, service) {
        (None, _) => true,
        (Some(wanted), Some(service)) => service.strip_prefix(wanted).is_some_and(|rest| rest.starts_with(':')),
        (Some(_), None) => false,
    }
}

/// What happened, in one word.
fn kind(reason: Counter) -> &'static str {
    match reason {
        Counter::PacketReject | Counter::PacketUnserved | Counter::SocketReject | Counter::SocketUnserved => "refuse",
        _ => match reason.kind() {
            CounterKind::Path => "new",
            CounterKind::Drop => "drop",
            CounterKind::Pass => "pass",
            CounterKind::Monitor => "lost",
        },
    }
}

fn time(seen: &Seen) -> Timestamp {
    Timestamp::now().checked_sub(seen.age).unwrap_or_default()
}

fn protocol(number: u8) -> String {
    match number {
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        132 => "SCTP".to_owned(),
        1 | 58 => "ICMP".to_owned(),
        other => format!("protocol {other}"),
    }
}

fn text(seen: &Seen, service: Option<&str>) -> String {
    let source = seen.source.map_or_else(|| "a socket".to_owned(), |source| source.to_string());
    let backend = seen.backend.map_or_else(String::new, |backend| format!(" by {backend}"));
    format!(
        "{:.3} {:<6} {:<7} {} {source} -> {}{backend} {} ({})",
        time(seen),
        kind(seen.reason),
        seen.path,
        protocol(seen.protocol),
        seen.destination,
        service.unwrap_or("-"),
        seen.reason.name(),
    )
}

fn json(seen: &Seen, service: Option<&str>) -> serde_json::Value {
    json!({
        "time": time(seen).to_string(),
        "kind": kind(seen.reason),
        "path": seen.path,
        "protocol": protocol(seen.protocol),
        "source": seen.source.map(|source| source.to_string()),
        "destination": seen.destination.to_string(),
        "backend": seen.backend.map(|backend| backend.to_string()),
        "service": service,
        "reason": seen.reason.name(),
        "interface": seen.interface,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_s_events_are_those_of_its_ports() {
        assert!(concerns(Some("a/b"), Some("a/b:http Tcp/V4")));
        assert!(concerns(Some("a/b"), Some("a/b: Tcp/V4")));
        assert!(!concerns(Some("a/b"), Some("a/bc:http Tcp/V4")));
        assert!(!concerns(Some("a/b"), None));
        assert!(concerns(None, None));
    }

    #[test]
    fn an_event_is_one_line() {
        let seen = Seen {
            age: Duration::ZERO,
            reason: Counter::PolicyDrop,
            path: "ingress",
            protocol: 6,
            source: Some("10.0.0.1:5000".parse().unwrap()),
            destination: "172.18.0.2:30080".parse().unwrap(),
            backend: None,
            service_id: 3,
            interface: 2,
        };
        let line = text(&seen, Some("default/web:http Tcp/V4"));
        let (_, rest) = line.split_once(' ').unwrap();
        assert_eq!(
            rest,
            "drop   ingress TCP 10.0.0.1:5000 -> 172.18.0.2:30080 default/web:http Tcp/V4 (no_local_endpoints)"
        );
        assert_eq!(json(&seen, None)["reason"], "no_local_endpoints");
    }
}
