//! Wires the process: configuration, connection, ports, data plane, then sources and runner.
//!
//! In this order, so that everything that can be wrong is found before anything is programmed. On the way out the data path
//! is left as it is: traffic goes on.

use std::future::Future;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::admin::{self, HealthRoutes, ListenError, MetricsRoutes};
use crate::config::{Config, Mode};
use crate::connection::{ConnectionError, connect};
use crate::conntrack::{KernelTables, Reconciler, ReconcilerMetrics};
use crate::dataplane::ebpf::pinned_sockets;
use crate::dataplane::{Dataplane, OpenError};
use crate::health::Health;
use crate::metrics::Metrics;
use crate::runner::{self, Parts};
use crate::source::{Event, HostError, Watches, channel, follow_cluster, follow_host};

/// How long a sync that is under way may take to end at shutdown.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(10);

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
    open: impl FnOnce(&Config) -> Result<Box<dyn Dataplane>, OpenError>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), AppError> {
    let (client, api_server) = connect(config.kubeconfig.as_deref()).await?;
    let healthz = match config.healthz_address {
        Some(address) => Some(admin::listen(address, "health checks (healthzBindAddress)").await?),
        None => None,
    };
    let metrics_listener = match config.metrics_address {
        Some(address) => Some(admin::listen(address, "metrics (metricsBindAddress)").await?),
        None => None,
    };
    let (metrics, health) = (Arc::new(Metrics::new()?), Arc::new(Health::new(Timestamp::now())));
    let dataplane = open(&config)?;
    let mode = dataplane.name();
    info!(node = config.node_name, mode, "starting");

    let (events, receiver) = channel();
    let parts = Parts {
        dataplane,
        events: receiver,
        settings: config.node.clone(),
        health: Arc::clone(&health),
        metrics: Arc::clone(&metrics),
        reconciler: Some(start_reconciler(&config, mode, &metrics)?),
        api_server,
    };
    let mut tasks = JoinSet::new();
    if let Some(listener) = healthz {
        tasks.spawn(serve(admin::serve(listener, HealthRoutes { health, metrics: Arc::clone(&metrics) })));
    }
    if let Some(listener) = metrics_listener {
        let routes =
            MetricsRoutes { metrics: Arc::clone(&metrics), events: events.clone(), mode, configz: configz(&config) };
        tasks.spawn(serve(admin::serve(listener, routes)));
    }
    let node_name = Arc::from(config.node_name.as_str());
    let watches = Watches { client, node_name, events: events.clone(), metrics };
    tasks.spawn(serve(follow_cluster(watches)));
    supervise(tasks, parts, events, shutdown).await
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

fn configz(config: &Config) -> String {
    serde_json::json!({ "trama.dev": config.effective }).to_string()
}

#[cfg(test)]
mod tests;
