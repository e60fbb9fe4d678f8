//! Controllers that talk to any Kubernetes API server: EndpointSlices and Endpoints of Services with a selector, the end of namespaces,
//! and the ServiceAccount `default` of each namespace.
//!
//! ```text
//! API --watch--> informer -> cache -> router (whom does this concern?) -> work queue -> sync: plan (pure) -> writes --> API
//! ```
//!
//! Invariants
//! - Controllers are clients: they know no store, and work as well against another API server.
//! - Slices of another manager (`endpointslice.kubernetes.io/managed-by`) are never touched.
//! - A key is worked on by one worker at a time, after all caches were filled once; a failure is tried again, later each time.
//! - Nothing waits for a fixed period: a change is acted on when it arrives.
//!
//! Start reading at [`start`]; what slices a Service gets is in `slices.rs`.
#![forbid(unsafe_code)]

mod cache;
mod candidate;
mod endpoints;
mod informer;
mod namespaces;
mod queue;
mod services;
mod slices;

use std::fmt::Display;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Namespace;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Api, Client, Config, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::JoinSet;

use cache::{Cache, Key};
use informer::{Handler, follow};
use namespaces::{NamespaceController, NamespaceError, NamespaceRouter};
use queue::WorkQueue;
use services::{Known, Router, ServiceController};

/// Services that are worked on at once.
const SERVICE_WORKERS: usize = 8;
/// Namespaces that are worked on at once.
const NAMESPACE_WORKERS: usize = 2;

/// Why the controllers can't start.
#[derive(Debug, thiserror::Error)]
pub enum ControllersError {
    /// The kubeconfig is unusable.
    #[error("the controllers' kubeconfig can't be used")]
    Kubeconfig(#[from] KubeconfigError),
    /// No client can be made from it.
    #[error("the controllers' client can't be made")]
    Client(#[from] kube::Error),
}

/// Starts the controllers as the user of a kubeconfig (YAML text) and returns a future that runs them until `stop` resolves. The server need
/// not answer yet.
///
/// # Errors
/// [`ControllersError`] for a kubeconfig that can't be used.
pub async fn start(
    kubeconfig: &str,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<impl Future<Output = ()> + Send + 'static, ControllersError> {
    let kubeconfig = Kubeconfig::from_yaml(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    Ok(run(client, stop))
}

/// Runs all controllers until `stop` resolves.
pub async fn run(client: Client, stop: impl Future<Output = ()>) {
    let mut tasks = JoinSet::new();
    run_services(&client, &mut tasks);
    run_namespaces(&client, &mut tasks);
    tokio::select! {
        () = stop => {}
        // A task only ends when it panics; the others go on, and the log says which.
        () = async { while tasks.join_next().await.is_some() {} } => {}
    }
    // Dropping the set ends the tasks: each write is one request, so none is left half done.
}

fn run_services(client: &Client, tasks: &mut JoinSet<()>) {
    let known = Arc::new(Known::default());
    let queue = Arc::new(WorkQueue::new());
    let router = Router { known: Arc::clone(&known), queue: Arc::clone(&queue) };
    let mut synced = Vec::new();
    let mut informers = Informers { client, tasks, synced: &mut synced };
    informers.follow(&known.services, router.clone());
    informers.follow(&known.pods, router.clone());
    informers.follow(&known.nodes, router.clone());
    informers.follow(&known.slices, router.clone());
    informers.follow(&known.endpoints, router);
    let controller = Arc::new(ServiceController::new(client.clone(), known));
    for _ in 0..SERVICE_WORKERS {
        let (controller, queue, synced) = (Arc::clone(&controller), Arc::clone(&queue), synced.clone());
        tasks.spawn(work(queue, synced, controller));
    }
}

fn run_namespaces(client: &Client, tasks: &mut JoinSet<()>) {
    let namespaces = Arc::new(Cache::<Namespace>::default());
    let queue = Arc::new(WorkQueue::new());
    let router = NamespaceRouter { namespaces: Arc::clone(&namespaces), queue: Arc::clone(&queue) };
    let mut synced = Vec::new();
    Informers { client, tasks, synced: &mut synced }.follow(&namespaces, router);
    let controller = Arc::new(NamespaceController { client: client.clone(), namespaces });
    for _ in 0..NAMESPACE_WORKERS {
        let (controller, queue, synced) = (Arc::clone(&controller), Arc::clone(&queue), synced.clone());
        tasks.spawn(work(queue, synced, controller));
    }
}

/// Starts informers and remembers when each is complete.
struct Informers<'a> {
    client: &'a Client,
    tasks: &'a mut JoinSet<()>,
    synced: &'a mut Vec<watch::Receiver<bool>>,
}

impl Informers<'_> {
    fn follow<K>(&mut self, cache: &Arc<Cache<K>>, handler: impl Handler<K>)
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
    {
        let (sender, receiver) = watch::channel(false);
        self.synced.push(receiver);
        self.tasks.spawn(follow(Api::all(self.client.clone()), Arc::clone(cache), handler, sender));
    }
}

/// Brings the cluster to what one object asks for.
trait Reconcile: Send + Sync + 'static {
    /// Why it has to be tried again.
    type Error: Display + Send;

    /// Works on one key.
    fn sync(&self, key: &Key) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

impl Reconcile for ServiceController {
    type Error = kube::Error;

    async fn sync(&self, key: &Key) -> Result<(), kube::Error> {
        self.reconcile(key).await
    }
}

impl Reconcile for NamespaceController {
    type Error = NamespaceError;

    async fn sync(&self, key: &Key) -> Result<(), NamespaceError> {
        self.reconcile(key).await
    }
}

/// One worker: waits for complete caches, then works on key after key.
async fn work<R: Reconcile>(queue: Arc<WorkQueue<Key>>, synced: Vec<watch::Receiver<bool>>, controller: Arc<R>) {
    for mut synced in synced {
        // The sender is gone only when the process ends.
        if synced.wait_for(|synced| *synced).await.is_err() {
            return;
        }
    }
    loop {
        let key = queue.next().await;
        match controller.sync(&key).await {
            Ok(()) => queue.done(&key),
            Err(error) => {
                tracing::debug!(namespace = %key.namespace, name = %key.name, %error, "will be tried again");
                queue.retry(key);
            }
        }
    }
}
