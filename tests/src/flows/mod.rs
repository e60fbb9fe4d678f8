//! The flow oracle: scenarios of Services, endpoints and connections, with kube-proxy's answers, asked of the model and of real kernels.
//!
//! ```text
//!   file ──► Scenario ──► model:    ScenarioApi ──► the proxy's watches, tracker and decisions ──► answers
//!                    └──► backends: World (namespaces) + ScenarioApi + trama-proxy ──► real connections from two stands
//!                                                            both ──► judge ──► failures, exceptions, a sum
//! ```

mod api;
mod ask;
mod exceptions;
mod file;
mod judge;
mod layout;
mod model;
mod proxy;
mod real;
mod report;
mod scenario;
mod sctp;
mod serve;
mod stand;
mod wire;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use tokio::runtime::Runtime;

pub use proxy::Backend;
pub use stand::run as stand;

use report::Report;
use scenario::Scenario;

/// Scenarios that run at once: each mostly waits, for a proxy to start and for silence.
const WORKERS: usize = 4;

/// What to run.
#[derive(Debug, Clone, clap::Args)]
pub struct FlowsOptions {
    /// Files of scenarios, one a line.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// What decides: model, ebpf, nftables, iptables, ipvs, or all that this kernel has.
    #[arg(long, default_value = "all")]
    backend: String,
    /// Runs the scenarios of this name only; `*` at the end stands for anything.
    #[arg(long)]
    scenario: Option<String>,
    /// Goes on after a scenario that could not be brought up; else the backend's other flows count as failed at once.
    #[arg(long)]
    keep_going: bool,
    /// List of known differences.
    #[arg(long)]
    exceptions: Option<PathBuf>,
    /// Runs this kube-proxy in place of trama-proxy: for the expectations themselves. Exceptions do not count then.
    #[arg(long)]
    kube_proxy: Option<PathBuf>,
}

/// Runs the files and prints each failure, each exception, and last `N passed, N failed`.
///
/// # Errors
/// When a file is wrong, or nothing would be run.
pub fn run(options: &FlowsOptions) -> Result<ExitCode> {
    let scenarios = read(options)?;
    let exceptions = match &options.exceptions {
        Some(path) if options.kube_proxy.is_none() => exceptions::read(path)?,
        _ => Vec::new(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start a tokio runtime")?;
    let mut report = Report::new(exceptions);
    let backends = backends(&options.backend)?;
    if backends.iter().any(|backend| *backend != Backend::Model) && scenarios.iter().any(Scenario::has_sctp) {
        let way =
            if sctp::has_sockets() { "sockets" } else { "packets made by hand, as this kernel has no SCTP sockets" };
        println!("note: SCTP is tried with {way}");
    }
    for backend in backends {
        run_backend(options, backend, &scenarios, &runtime, &mut report);
    }
    runtime.shutdown_background();
    Ok(if report.finish() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn read(options: &FlowsOptions) -> Result<Vec<Scenario>> {
    let mut scenarios = Vec::new();
    for path in &options.files {
        let file = file::read(path)?;
        file.notes.iter().for_each(|note| println!("note: {note}"));
        scenarios.extend(file.scenarios);
    }
    if let Some(pattern) = &options.scenario {
        scenarios.retain(|scenario| match pattern.strip_suffix('*') {
            Some(beginning) => scenario.name.starts_with(beginning),
            None => scenario.name == *pattern,
        });
        ensure!(!scenarios.is_empty(), "no scenario is named {pattern}");
    }
    Ok(scenarios)
}

fn backends(name: &str) -> Result<Vec<Backend>> {
    if name == "all" {
        let (here, missing): (Vec<_>, Vec<_>) =
            Backend::ALL.into_iter().partition(|backend| backend.is_in_this_kernel());
        missing.iter().for_each(|backend| println!("note: this kernel has no {backend}, which is not run"));
        return Ok(here);
    }
    let named = |name: &str| Backend::ALL.into_iter().find(|backend| backend.name() == name);
    let chosen: Option<Vec<Backend>> = name.split(',').map(named).collect();
    match chosen {
        Some(backends) => Ok(backends),
        None => bail!("--backend {name}: model, ebpf, nftables, iptables, ipvs or all"),
    }
}

fn run_backend(
    options: &FlowsOptions,
    backend: Backend,
    scenarios: &[Scenario],
    runtime: &Runtime,
    report: &mut Report,
) {
    let (next, broken) = (AtomicUsize::new(0), AtomicBool::new(false));
    let report = Mutex::new(report);
    let work = || {
        let _inside = runtime.enter();
        while let Some(scenario) = scenarios.get(next.fetch_add(1, Ordering::Relaxed)) {
            let result = if broken.load(Ordering::Relaxed) {
                Err(anyhow::anyhow!("not run, because another scenario could not be brought up"))
            } else {
                run_scenario(options, backend, scenario)
            };
            if result.is_err() && !options.keep_going {
                broken.store(true, Ordering::Relaxed);
            }
            report.lock().unwrap_or_else(PoisonError::into_inner).add(backend, scenario, result);
        }
    };
    thread::scope(|scope| (0..WORKERS).for_each(|_| drop(scope.spawn(work))));
}

fn run_scenario(options: &FlowsOptions, backend: Backend, scenario: &Scenario) -> Result<Vec<Option<String>>> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    if backend == Backend::Model {
        return model::run(scenario);
    }
    let id = format!("f{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    real::run(&id, scenario, backend, options.kube_proxy.as_deref())
}
