//! Wires the process: configuration, connection, kernel parameters, ports, data plane, then sources and runner.
//!
//! In this order, so that everything that can be wrong is found before anything is programmed. On the way out the data path
//! is left as it is: traffic goes on.

use std::fs;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::admin::{HealthRoutes, ListenError, MetricsRoutes, Port};
use crate::config::{Config, Mode};
use crate::connection::{ConnectionError, connect};
use crate::conntrack::{KernelTables, Reconciler, ReconcilerMetrics, redirected};
use crate::dataplane::ebpf::pinned_sockets;
use crate::dataplane::{OpenError, Opened, remove_others};
use crate::events::{self, Events, Notice, Writer};
use crate::health::services::Wanted;
use crate::health::{Health, services};
use crate::metrics::{Metrics, Slis};
use crate::model::ServiceSnapshot;
use crate::runner::{self, Parts, TakeOver};
use crate::source::{Event, HostError, Watches, channel, follow_cluster, follow_host};

/// How long a sync that is under way may take to end at shutdown.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(10);
/// How long the last Event of a process that can't start may take.
const LAST_EVENT_WAIT: Duration = Duration::from_secs(5);

/// Why the process ends with a failure.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// See [`ConnectionError`].
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// See [`ListenError`].
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// See [`OpenError`].
    #[error(transparent)]
    Dataplane(#[from] OpenError),
    /// See [`HostError`].
    #[error(transparent)]
    Host(#[from] HostError),
    /// A metric has no place; a bug.
    #[error("cannot set up the metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// No thread.
    #[error("cannot start the data plane thread: {0}")]
    Thread(#[source] std::io::Error),
    /// The runner is gone though nobody stopped it; a bug.
    #[error("the data plane thread has ended")]
    RunnerGone,
}

/// Runs until `shutdown`. `open` makes the data plane, after everything else is known to be right.
///
/// # Errors
/// [`AppError`], one sentence; before the data plane is opened nothing has been touched.
pub async fn run(
    config: Config,
    open: impl FnOnce(&Config) -> Result<Opened, OpenError>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), AppError> {
    let metrics = Arc::new(Metrics::new()?);
    let (client, api_server) = connect(&config.api, Arc::clone(&metrics)).await?;
    let (notices, writer) = events::channel(&config.node_name, Arc::clone(&metrics));
    config.conntrack.apply();
    let (healthz, metrics_port) = match open_ports(&config, &notices) {
        Ok(ports) => ports,
        Err(error) => {
            drop(notices);
            // Said where it can be; that it can't is no other error.
            let _ = tokio::time::timeout(LAST_EVENT_WAIT, writer.run(client)).await;
            return Err(error.into());
        }
    };
    let health = Arc::new(Health::new(Timestamp::now(), config.sync.period.saturating_mul(2)));
    let Opened { dataplane, why } = open(&config)?;
    let mode = dataplane.name();
    metrics.set_mode(mode)?;
    info!(node = config.node_name, mode, "starting");

    let (events, receiver) = channel();
    let (health_checks, wanted) = watch::channel(Wanted::default());
    let parts = Parts {
        dataplane,
        why,
        events: receiver,
        settings: config.node.for_mode(mode),
        health: Arc::clone(&health),
        metrics: Arc::clone(&metrics),
        reconciler: Some(start_reconciler(&config, mode, &metrics)?),
        take_over: Some(take_over(mode, config.ebpf.bpffs.clone())),
        api_server,
        periods: config.sync,
        notices: notices.clone(),
        health_checks,
    };
    let mut tasks = JoinSet::new();
    if let Some(port) = healthz {
        let routes = HealthRoutes { health: Arc::clone(&health), metrics: Arc::clone(&metrics) };
        tasks.spawn(forever(port.serve(routes)));
    }
    if let Some(port) = metrics_port {
        let configz = config.effective.configz().to_string();
        let routes = MetricsRoutes {
            metrics: Arc::clone(&metrics),
            events: events.clone(),
            mode,
            configz,
            last: Mutex::default(),
            slis: Slis::default(),
        };
        tasks.spawn(forever(port.serve(routes)));
    }
    tasks.spawn(forever(services::serve(wanted, health, notices.clone())));
    tell(&mut tasks, writer, client.clone(), &notices);
    let node_name = Arc::from(config.node_name.as_str());
    let watches = Watches { client, node_name, events: events.clone(), metrics };
    tasks.spawn(serve(follow_cluster(watches)));
    supervise(tasks, parts, events, shutdown).await
}

fn take_over(mode: &'static str, bpffs: PathBuf) -> TakeOver {
    // With IPVS, what is there may be our own.
    let connections = if mode == Mode::Ipvs.name() { redirected::go_on } else { redirected::take_over };
    Box::new(move |snapshot: &ServiceSnapshot| {
        connections(snapshot);
        remove_others(mode, &bpffs);
    })
}

/// Takes the ports of `/healthz` and `/metrics`. One that is taken is tried again later, or ends the process if so configured.
fn open_ports(config: &Config, notices: &Events) -> Result<(Option<Port>, Option<Port>), ListenError> {
    let open = |address: Option<_>, purpose, notice: fn(String) -> Notice| {
        let port = address.map(|address| Port::open(address, purpose, config.bind_hard_fail)).transpose();
        port.inspect_err(|error| notices.notify(notice(error.to_string())))
    };
    let healthz = open(config.healthz_address, "health checks (healthzBindAddress)", Notice::HealthzFailed)?;
    let metrics = open(config.metrics_address, "metrics (metricsBindAddress)", Notice::MetricsFailed)?;
    Ok((healthz, metrics))
}

/// Starts writing Events, the first of which is that this process has started.
fn tell(tasks: &mut JoinSet<Result<(), AppError>>, writer: Writer, client: kube::Client, notices: &Events) {
    notices.notify(Notice::Starting);
    tasks.spawn(forever(writer.run(client)));
}

/// Makes this process likelier, or less likely, to be killed when memory runs out. A process may lower its score only with
/// CAP_SYS_RESOURCE; without it nothing else is lost, so that is no error.
pub fn set_oom_score(score: i32) {
    const PATH: &str = "/proc/self/oom_score_adj";
    let now = fs::read_to_string(PATH).ok().and_then(|text| text.trim().parse().ok());
    if now != Some(score)
        && let Err(error) = fs::write(PATH, score.to_string())
    {
        info!(score, %error, "oom_score_adj stays as it is");
    }
}

/// Starts the runner and waits for the end, whoever brings it.
async fn supervise(
    mut tasks: JoinSet<Result<(), AppError>>,
    parts: Parts,
    events: mpsc::Sender<Event>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), AppError> {
    tasks.spawn(async move { Ok(follow_host(events).await?) });
    let mut runner = start_runner(parts)?;
    let result = tokio::select! {
        () = shutdown => Ok(()),
        Some(ended) = tasks.join_next() => ended.unwrap_or(Err(AppError::RunnerGone)),
        _ = &mut runner => return Err(AppError::RunnerGone),
    };
    // Without senders the runner ends after the sync that it is at.
    tasks.shutdown().await;
    if tokio::time::timeout(SHUTDOWN_WAIT, runner).await.is_err() {
        warn!("ending while a sync is still under way");
    }
    info!("stopped; traffic goes on as programmed");
    result
}

/// Stale conntrack entries are a former proxy's where the data plane itself makes none.
fn start_reconciler(config: &Config, mode: &str, metrics: &Metrics) -> Result<Reconciler, AppError> {
    let sockets = (mode == Mode::Ebpf.name()).then(|| pinned_sockets(&config.ebpf));
    let sockets = sockets.transpose().unwrap_or_else(|error| {
        warn!(%error, "UDP sockets connected to endpoints that go will not be ended");
        None
    });
    let mut tables = KernelTables::new(sockets, ReconcilerMetrics::new(metrics.registry())?);
    Reconciler::start(Box::new(move |index, scope| tables.clean(index, scope))).map_err(AppError::Thread)
}

/// For a task whose end means nothing: the others go on, and the end of the runner is noticed there.
async fn forever(task: impl Future<Output = ()>) -> Result<(), AppError> {
    task.await;
    std::future::pending().await
}

async fn serve(task: impl Future<Output = ()>) -> Result<(), AppError> {
    task.await;
    Ok(())
}

/// The runner's own thread: a sync blocks, and the watches and health checks must not wait for it. The receiver resolves when
/// it has ended.
fn start_runner(parts: Parts) -> Result<oneshot::Receiver<()>, AppError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(AppError::Thread)?;
    let (ended, end) = oneshot::channel();
    let body = move || {
        drop(runtime.block_on(runner::run(parts)));
        // Nobody may be waiting any more.
        let _ = ended.send(());
    };
    thread::Builder::new().name("dataplane".to_owned()).spawn(body).map_err(AppError::Thread)?;
    Ok(end)
}

#[cfg(test)]
mod tests;
