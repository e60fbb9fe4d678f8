//! The four watches: Services, EndpointSlices, ServiceCIDRs, and this node's own Node.

use std::fmt::Debug;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff, Event as WatchEvent, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::convert::{Converter, node_facts, trigger_time};
use super::freshness::{Freshness, Verdict, confirm_empty};
use super::service_cidrs::ServiceCidrs;
use super::{Event, Update};
use crate::metrics::Metrics;
use crate::tracker::{ListKind, ObjectEvent};

/// Objects per list request. A page is held whole before its objects become small: 500 EndpointSlices of 10 endpoints are 5 MB.
const PAGE_SIZE: u32 = 100;
/// The longest pause between attempts.
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// What the watches need.
#[derive(Clone)]
pub struct Watches {
    /// The API server.
    pub client: Client,
    /// Name of this node.
    pub node_name: Arc<str>,
    /// Where the events go.
    pub events: mpsc::Sender<Event>,
    /// Where errors are counted.
    pub metrics: Arc<Metrics>,
}

/// Follows the cluster until nobody listens any more. Errors are logged and counted, and the watch is tried again with a
/// growing pause (0.8 s to 30 s, with jitter); it never gives up.
pub async fn follow_cluster(watches: Watches) {
    let converter = Arc::new(Mutex::new(Converter::new(&watches.node_name)));
    let services = watches.services(Arc::clone(&converter));
    let slices = watches.slices(converter);
    futures::join!(services, slices, watches.node(), watches.service_cidrs());
}

type SharedConverter = Arc<Mutex<Converter>>;

/// What a watch event means to us: the update and, for an EndpointSlice, its trigger time.
type Converted = Option<(Update, Option<Timestamp>)>;

impl Watches {
    fn services(&self, converter: SharedConverter) -> impl Future<Output = ()> {
        let config = config().labels("!service.kubernetes.io/service-proxy-name").fields("spec.clusterIP!=None");
        self.follow("services", config, move |event: WatchEvent<Service>| {
            let mut converter = converter.lock().unwrap_or_else(PoisonError::into_inner);
            let object = match event {
                WatchEvent::Init => ObjectEvent::ListStarted(ListKind::Services),
                WatchEvent::InitDone => ObjectEvent::ListDone(ListKind::Services),
                WatchEvent::Delete(service) => ObjectEvent::ServiceDeleted(converter.service_key(&service)?),
                WatchEvent::Apply(service) | WatchEvent::InitApply(service) => match converter.service(&service) {
                    Some(object) => ObjectEvent::ServiceApplied(object),
                    None => ObjectEvent::ServiceDeleted(converter.service_key(&service)?),
                },
            };
            Some((Update::Object(object), None))
        })
    }

    fn slices(&self, converter: SharedConverter) -> impl Future<Output = ()> {
        let config = config().labels("!service.kubernetes.io/headless");
        self.follow("endpointslices", config, move |event: WatchEvent<EndpointSlice>| {
            let mut converter = converter.lock().unwrap_or_else(PoisonError::into_inner);
            let mut trigger = None;
            let object = match event {
                WatchEvent::Init => ObjectEvent::ListStarted(ListKind::Slices),
                WatchEvent::InitDone => ObjectEvent::ListDone(ListKind::Slices),
                WatchEvent::Delete(slice) => slice_deleted(&mut converter, &slice)?,
                WatchEvent::Apply(slice) | WatchEvent::InitApply(slice) => {
                    trigger = trigger_time(&slice);
                    match converter.slice(&slice) {
                        Some(object) => ObjectEvent::SliceApplied(object),
                        None => slice_deleted(&mut converter, &slice)?,
                    }
                }
            };
            Some((Update::Object(object), trigger))
        })
    }

    /// A deleted Node keeps its last facts: the machine is still there, and so are its pods.
    fn node(&self) -> impl Future<Output = ()> {
        let config = config().fields(&format!("metadata.name={}", self.node_name));
        let name = Arc::clone(&self.node_name);
        self.follow("nodes", config, move |event: WatchEvent<Node>| match event {
            WatchEvent::InitDone => Some((Update::NodeListed, None)),
            WatchEvent::Apply(node) | WatchEvent::InitApply(node) if node.metadata.name.as_deref() == Some(&*name) => {
                Some((Update::Node(node_facts(&node)), None))
            }
            _ => None,
        })
    }

    /// Waited for by nobody: without them, as with a server before Kubernetes 1.33, unallocated addresses are not dropped.
    fn service_cidrs(&self) -> impl Future<Output = ()> {
        let mut known = ServiceCidrs::default();
        self.follow("servicecidrs", config(), move |event: WatchEvent<ServiceCIDR>| {
            Some((Update::ServiceCidrs(known.handle(event)?), None))
        })
    }

    fn follow<K>(
        &self,
        resource: &'static str,
        config: watcher::Config,
        mut convert: impl FnMut(WatchEvent<K>) -> Converted,
    ) -> impl Future<Output = ()>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        let api: Api<K> = Api::all(self.client.clone());
        let (events, metrics) = (self.events.clone(), Arc::clone(&self.metrics));
        async move {
            let (mut backoff, mut freshness) = (DefaultBackoff::default(), Freshness::default());
            loop {
                let mut stream = pin!(watcher(api.clone(), config.clone()));
                while let Some(item) = stream.next().await {
                    let received = Instant::now();
                    let event = match item {
                        Ok(event) => event,
                        Err(error) => {
                            report(resource, &error, &metrics);
                            tokio::time::sleep(backoff.next().unwrap_or(BACKOFF_MAX)).await;
                            if must_list_again(&error) {
                                break;
                            }
                            continue;
                        }
                    };
                    match freshness.judge(&event) {
                        Verdict::News => {}
                        Verdict::Late => {
                            metrics.watch_error(resource, "late");
                            continue;
                        }
                        Verdict::Vanished if confirm_empty(&api, &config, freshness.newest()).await => {
                            freshness.believe_empty();
                        }
                        Verdict::Vanished => {
                            warn!(
                                resource,
                                "the API server lists nothing at an old resourceVersion, keeping the last state"
                            );
                            metrics.watch_error(resource, "empty");
                            tokio::time::sleep(backoff.next().unwrap_or(BACKOFF_MAX)).await;
                            break;
                        }
                    }
                    match event {
                        // A list may succeed where no watch does; then everything would be listed again and again.
                        WatchEvent::Init | WatchEvent::InitApply(_) => {}
                        WatchEvent::InitDone => info!(resource, "list complete"),
                        WatchEvent::Apply(_) | WatchEvent::Delete(_) => backoff.reset(),
                    }
                    let Some((update, trigger)) = convert(event) else { continue };
                    if events.send(Event { received, trigger, update }).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

/// A server that has forgotten our resourceVersion, or never had it (it was restored from a backup), may say so with an error
/// instead of an event; the watcher would ask with the same resourceVersion for ever.
fn must_list_again(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) | watcher::Error::WatchError(status) => {
            status.code == 410 || status.message.to_lowercase().contains("resource version")
        }
        _ => false,
    }
}

fn slice_deleted(converter: &mut Converter, slice: &EndpointSlice) -> Option<ObjectEvent> {
    let (namespace, name) = converter.slice_id(slice)?;
    Some(ObjectEvent::SliceDeleted { namespace, name })
}

fn config() -> watcher::Config {
    watcher::Config::default().page_size(PAGE_SIZE)
}

/// Says once what is wrong; the pause between attempts bounds how often.
fn report(resource: &'static str, error: &watcher::Error, metrics: &Metrics) {
    let reason = match status_code(error) {
        Some(401) => "unauthorized",
        Some(403) => "forbidden",
        Some(404) => "absent",
        Some(410) => "expired",
        _ => "other",
    };
    metrics.watch_error(resource, reason);
    match reason {
        "unauthorized" => {
            warn!(resource, "the API server does not accept our credentials (401): check the user in the kubeconfig");
        }
        "forbidden" => warn!(resource, "the API server forbids it (403): this user needs list and watch on {resource}"),
        "absent" => debug!(resource, "the API server does not serve it (404), asking again later"),
        "expired" => debug!(resource, "the watch is too old (410), listing again"),
        _ => warn!(resource, %error, "cannot follow the API server, keeping the last state and trying again"),
    }
}

fn status_code(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status.code),
        _ => None,
    }
}
