//! Events on the API (events.k8s.io/v1), for who asks `kubectl describe` why something does not work.
//!
//! Whoever has something to say never waits: notices go into a short queue, and what finds it full is dropped and counted. One
//! task writes them, at most 25 at once and then one in ten seconds; what comes more often is dropped and counted too. Repetitions
//! of a notice become one Event with a count.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tracing::{debug, warn};

use crate::metrics::Metrics;
use crate::model::{ServiceKey, ServicePortName};

/// Name of the component in `reportingController`.
const CONTROLLER: &str = "trama-proxy";
/// Notices that wait to be written.
const QUEUE_MAX: usize = 64;
/// Events that may be written at once.
const BURST: u32 = 25;
/// One more may be written after this long.
const REFILL: Duration = Duration::from_secs(10);
/// How often an Event is tried while the API server does not answer, and how long between.
const TRIES_MAX: u32 = 12;
const RETRY: Duration = Duration::from_secs(10);
/// The longest note that the API accepts, in bytes.
const NOTE_MAX: usize = 1024;

/// Something that an operator should see at the object that it concerns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// This proxy has started; at the Node, as kube-proxy says it.
    Starting,
    /// The kernel has no room for a ServicePort; at the Service.
    Refused(ServicePortName),
    /// An annotation of a Service says what nobody understands; at the Service.
    InvalidAnnotation {
        /// The Service.
        service: ServiceKey,
        /// Which, its value, and what is allowed.
        problem: String,
    },
    /// The kernel has no room for the Maglev table of a ServicePort, whose endpoints are chosen at random; at the Service.
    NoTable(ServicePortName),
    /// The health check of a Service cannot listen; at the Service, as kube-proxy says it.
    HealthCheckFailed {
        /// The Service.
        service: ServiceKey,
        /// `spec.healthCheckNodePort`.
        port: u16,
        /// Why.
        problem: String,
    },
    /// `/healthz` cannot be served, and the process ends for it; at the Node.
    HealthzFailed(String),
    /// `/metrics` cannot be served, and the process ends for it; at the Node.
    MetricsFailed(String),
}

/// Takes notices from anywhere; cheap to clone.
#[derive(Debug, Clone)]
pub struct Events {
    queue: mpsc::Sender<Notice>,
    metrics: Arc<Metrics>,
}

/// Writes them: see [`Writer::run`].
#[derive(Debug)]
pub struct Writer {
    queue: mpsc::Receiver<Notice>,
    metrics: Arc<Metrics>,
    node_name: Arc<str>,
}

/// The two ends of a queue of notices of the node `node_name`.
pub fn channel(node_name: &str, metrics: Arc<Metrics>) -> (Events, Writer) {
    let (sender, receiver) = mpsc::channel(QUEUE_MAX);
    let writer = Writer { queue: receiver, metrics: Arc::clone(&metrics), node_name: Arc::from(node_name) };
    (Events { queue: sender, metrics }, writer)
}

impl Events {
    /// Hands in a notice, or drops it where too many wait already.
    pub fn notify(&self, notice: Notice) {
        if self.queue.try_send(notice).is_err() {
            self.metrics.event_dropped();
        }
    }
}

impl Writer {
    /// The next notice that waits, for tests of who hands them in.
    #[cfg(test)]
    pub(crate) fn try_next(&mut self) -> Option<Notice> {
        self.queue.try_recv().ok()
    }

    /// Writes notices until nobody can hand in any more. An Event that can't be written is dropped and counted: nothing but
    /// Events depends on them.
    pub async fn run(mut self, client: Client) {
        let reporter = Reporter { controller: CONTROLLER.to_owned(), instance: Some(self.node_name.to_string()) };
        let recorder = Recorder::new(client, reporter);
        let mut budget = Budget::new(Instant::now());
        while let Some(notice) = self.queue.recv().await {
            if !budget.take(Instant::now()) || !self.write(&recorder, &notice).await {
                self.metrics.event_dropped();
            }
        }
    }

    async fn write(&self, recorder: &Recorder, notice: &Notice) -> bool {
        let (event, regarding) = (event(notice, &self.node_name), regarding(notice, &self.node_name));
        for attempt in 1..=TRIES_MAX {
            match recorder.publish(&event, &regarding).await {
                Ok(()) => return true,
                Err(kube::Error::Api(status)) => {
                    warn!(reason = event.reason, error = %status, "the API server does not take an Event");
                    return false;
                }
                Err(error) => debug!(reason = event.reason, %error, attempt, "cannot write an Event"),
            }
            tokio::time::sleep(RETRY).await;
        }
        false
    }
}

fn event(notice: &Notice, node: &str) -> Event {
    let warning =
        |reason: &str, action: &str, note: String| (EventType::Warning, reason.to_owned(), action.to_owned(), note);
    let (type_, reason, action, note) = match notice {
        Notice::Starting => (EventType::Normal, "Starting".to_owned(), "StartKubeProxy".to_owned(), String::new()),
        Notice::Refused(name) => {
            let note = format!(
                "node {node} has no room in its kernel for ServicePort {name}; see --max-services and --max-endpoints"
            );
            warning("ServicePortRefused", "SyncProxyRules", note)
        }
        Notice::InvalidAnnotation { problem, .. } => {
            warning("InvalidAnnotation", "SyncProxyRules", format!("node {node}: {problem}"))
        }
        Notice::NoTable(name) => {
            let note = format!(
                "node {node} has no room in its kernel for the Maglev table of ServicePort {name} and chooses at random; \
                 see --max-endpoints"
            );
            warning("NoMaglevTable", "SyncProxyRules", note)
        }
        Notice::HealthCheckFailed { service, port, problem } => {
            let (namespace, name) = (&service.namespace, &service.name);
            let note =
                format!("node {node} failed to start healthcheck \"{namespace}/{name}\" on port {port}: {problem}");
            warning("FailedToStartServiceHealthcheck", "Listen", note)
        }
        Notice::HealthzFailed(problem) => warning("FailedToStartProxierHealthcheck", "StartKubeProxy", problem.clone()),
        Notice::MetricsFailed(problem) => warning("FailedToStartMetricServer", "StartKubeProxy", problem.clone()),
    };
    let note = Some(shortened(note)).filter(|note| !note.is_empty());
    Event { type_, reason, note, action, secondary: None }
}

fn shortened(mut note: String) -> String {
    note.truncate(note.floor_char_boundary(NOTE_MAX));
    note
}

/// The object that the Event is shown at. The API server looks it up by kind and name; the uid is not known.
fn regarding(notice: &Notice, node: &str) -> ObjectReference {
    let of = |kind: &str, namespace: Option<&str>, name: &str| ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some(kind.to_owned()),
        namespace: namespace.map(str::to_owned),
        name: Some(name.to_owned()),
        ..ObjectReference::default()
    };
    match notice {
        Notice::Refused(port) | Notice::NoTable(port) => of("Service", Some(&port.namespace), &port.service),
        Notice::HealthCheckFailed { service, .. } | Notice::InvalidAnnotation { service, .. } => {
            of("Service", Some(&service.namespace), &service.name)
        }
        Notice::Starting | Notice::HealthzFailed(_) | Notice::MetricsFailed(_) => of("Node", None, node),
    }
}

/// How many Events may be written.
#[derive(Debug)]
struct Budget {
    left: u32,
    refilled: Instant,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self { left: BURST, refilled: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        while self.left < BURST && now.duration_since(self.refilled) >= REFILL {
            self.left += 1;
            self.refilled += REFILL;
        }
        if self.left == BURST {
            self.refilled = now;
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> ServiceKey {
        ServiceKey { namespace: "shop".into(), name: "web".into() }
    }

    #[test]
    fn a_burst_is_written_and_then_one_in_ten_seconds() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let count = |budget: &mut Budget, seconds| {
            let now = start + Duration::from_secs(seconds);
            (0..100).filter(|_| budget.take(now)).count()
        };
        assert_eq!(count(&mut budget, 0), 25);
        assert_eq!(count(&mut budget, 9), 0);
        assert_eq!(count(&mut budget, 10), 1);
        assert_eq!(count(&mut budget, 35), 2);
        assert_eq!(count(&mut budget, 40), 1, "the rest of the former pause counts");
        assert_eq!(count(&mut budget, 100_000), 25, "no more than a burst is saved up");
    }

    #[test]
    fn a_health_check_that_fails_is_said_at_the_service_in_kube_proxys_words() {
        let notice =
            Notice::HealthCheckFailed { service: key(), port: 30900, problem: "Address already in use".into() };
        let event = event(&notice, "node-1");
        assert_eq!(event.reason, "FailedToStartServiceHealthcheck");
        let note = "node node-1 failed to start healthcheck \"shop/web\" on port 30900: Address already in use";
        assert_eq!(event.note.as_deref(), Some(note));
        let regarding = regarding(&notice, "node-1");
        let parts = (regarding.kind.as_deref(), regarding.namespace.as_deref(), regarding.name.as_deref());
        assert_eq!(parts, (Some("Service"), Some("shop"), Some("web")));
    }

    #[test]
    fn an_annotation_that_is_not_understood_is_said_at_the_service() {
        let notice = Notice::InvalidAnnotation { service: key(), problem: "lb-algorithm: \"x\" is wrong".into() };
        let event = event(&notice, "node-1");
        assert_eq!((event.reason.as_str(), event.type_), ("InvalidAnnotation", EventType::Warning));
        assert_eq!(event.note.as_deref(), Some("node node-1: lb-algorithm: \"x\" is wrong"));
        assert_eq!(regarding(&notice, "node-1").name.as_deref(), Some("web"));
    }

    #[test]
    fn the_birth_cry_is_the_nodes() {
        let (event, node) = (event(&Notice::Starting, "node-1"), regarding(&Notice::Starting, "node-1"));
        assert_eq!((event.reason.as_str(), event.action.as_str(), event.note), ("Starting", "StartKubeProxy", None));
        assert_eq!((node.kind.as_deref(), node.namespace, node.name.as_deref()), (Some("Node"), None, Some("node-1")));
    }

    #[test]
    fn a_note_is_never_longer_than_the_api_takes() {
        assert_eq!(shortened("é".repeat(600)).len(), 1024);
        assert_eq!(shortened("é".repeat(100)).len(), 200);
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let metrics = Arc::new(Metrics::new().unwrap());
        let (events, _writer) = channel("node-1", Arc::clone(&metrics));
        for _ in 0..QUEUE_MAX + 3 {
            events.notify(Notice::Starting);
        }
        let text = metrics.render(&Vec::new()).unwrap();
        assert!(text.lines().any(|line| line == "trama_events_dropped_total 3"), "{text}");
    }
}
