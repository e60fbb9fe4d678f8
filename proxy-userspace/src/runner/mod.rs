//! Brings events to the kernel: tracker, model and data plane on one thread of their own.
//!
//! Nothing is programmed before both lists are complete. After that a change is programmed at once when the runner is idle, and
//! gathered for a few milliseconds when changes come in quick succession. A failed sync is repeated in full, with a
//! growing pause; every hour everything is compared with the kernel once more, and every few seconds the data plane looks whether
//! somebody else has changed what it programmed.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use crate::config::{Mode, SyncPeriods};
use crate::conntrack::Reconciler;
use crate::dataplane::{Dataplane, SyncReport, SyncScope};
use crate::events::{Events, Notice};
use crate::health::Health;
use crate::health::services::Wanted;
use crate::metrics::{Metrics, SyncDone};
use crate::model::{Desired, ServiceDelta, ServiceKey, ServicePortName, ServiceSnapshot};
use crate::node::{HostAddresses, NodeFacts, NodeSettings, describe};
use crate::source::{Event, Update};
use crate::tracker::{ObjectEvent, Tracker};

mod pace;
mod refused;
#[cfg(test)]
mod tests;
mod told;

use pace::Pace;
use refused::Refused;
use told::{Synced, Told};

/// How long the first sync waits for the Node object after both lists are complete: without it the zone and the node's own
/// addresses are unknown, but a missing Node must not keep Services from working.
const NODE_WAIT: Duration = Duration::from_secs(5);
/// Changes whose latency is remembered until they are programmed; beyond that they are programmed but not measured.
const MEASURED_MAX: usize = 16_384;
/// The mode that knows more than one way to choose an endpoint.
const EBPF: &str = Mode::Ebpf.name();
/// How often room is made at once for what a sync refused, each time for twice as much; what remains waits for the next audit.
const GROWTHS_MAX: usize = 4;
/// At most this many events are taken in before a sync, so that a stream without end cannot hold it off.
const BATCH_MAX: usize = 2048;

/// What is done once, with what the first sync programmed.
pub type TakeOver = Box<dyn FnOnce(&ServiceSnapshot) + Send>;

/// What the runner is given.
pub struct Parts {
    /// Where Services are programmed.
    pub dataplane: Box<dyn Dataplane>,
    /// Why there.
    pub why: String,
    /// Where events come from.
    pub events: mpsc::Receiver<Event>,
    /// The configured part of the node.
    pub settings: NodeSettings,
    /// Told what waits and what is done.
    pub health: std::sync::Arc<Health>,
    /// Told what happened.
    pub metrics: std::sync::Arc<Metrics>,
    /// Told what is programmed, to end the flows that it left behind; `None` leaves them.
    pub reconciler: Option<Reconciler>,
    /// Called with what the first sync programmed: connections of a proxy before us may need help to outlive it, and what it left may have to go.
    pub take_over: Option<TakeOver>,
    /// Address of the API server where it is known: no Service may take it.
    pub api_server: Option<SocketAddr>,
    /// When to program.
    pub periods: SyncPeriods,
    /// Told what an operator should see at a Service.
    pub notices: Events,
    /// Told what health checks of Services to serve.
    pub health_checks: watch::Sender<Wanted>,
}

/// Runs until every sender of events is gone, then returns the data plane as it is: forwarding goes on.
pub async fn run(parts: Parts) -> Box<dyn Dataplane> {
    let mut runner = Runner::new(parts);
    while runner.round().await {}
    runner.parts.dataplane
}

/// The stages of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// At least one list is not complete.
    Listing,
    /// Both are; the Node or the host's addresses are still unknown.
    WaitingForNode { since: Instant },
    /// The first sync may happen, or has.
    Running,
}

struct Runner {
    parts: Parts,
    tracker: Tracker,
    desired: Desired,
    host: Option<HostAddresses>,
    facts: Option<NodeFacts>,
    service_cidrs: Vec<IpNet>,
    node_listed: bool,
    stage: Stage,
    pace: Pace,
    /// When the changes that wait were received.
    received: Vec<Instant>,
    /// When the changes behind them happened.
    triggers: Vec<Timestamp>,
    refused: Refused,
    started: Timestamp,
    told: Told,
}

impl Runner {
    fn new(parts: Parts) -> Self {
        let mut desired = Desired::default();
        if let Some(address) = parts.api_server {
            desired.reserve_for_api_server(address);
        }
        Self {
            pace: Pace::new(parts.periods),
            parts,
            tracker: Tracker::default(),
            desired,
            host: None,
            facts: None,
            service_cidrs: Vec::new(),
            node_listed: false,
            stage: Stage::Listing,
            received: Vec::new(),
            triggers: Vec::new(),
            refused: Refused::default(),
            started: Timestamp::now(),
            told: Told::default(),
        }
    }

    /// Waits for something to do and does it. Returns whether there may be more.
    async fn round(&mut self) -> bool {
        if !self.gather().await {
            return false;
        }
        self.advance_stage();
        if self.stage == Stage::Running {
            self.program();
        }
        true
    }

    /// Takes in events: waits for the first, then takes what is there, then as long as the pace asks to wait for more.
    async fn gather(&mut self) -> bool {
        let mut taken = 0;
        loop {
            let wake = if taken == 0 { self.wake_at() } else { self.pace.gather_until(Instant::now()) };
            let event = match wake {
                Some(deadline) => match tokio::time::timeout_at(deadline.into(), self.parts.events.recv()).await {
                    Ok(event) => event,
                    Err(_) => return true,
                },
                None => match self.parts.events.try_recv() {
                    Err(mpsc::error::TryRecvError::Empty) if taken > 0 => return true,
                    Ok(event) => Some(event),
                    Err(_) => self.parts.events.recv().await,
                },
            };
            let Some(event) = event else { return false };
            self.handle(event);
            taken += 1;
            if taken >= BATCH_MAX {
                return true;
            }
        }
    }

    /// When to wake without an event: for a retry, an audit, or because the wait for the Node is over.
    fn wake_at(&self) -> Option<Instant> {
        match self.stage {
            Stage::Listing => None,
            Stage::WaitingForNode { since } => Some(since + NODE_WAIT),
            Stage::Running => {
                let retry = self.refused.retry_at().into_iter();
                retry.chain([self.pace.wake_at()]).min()
            }
        }
    }

    fn handle(&mut self, event: Event) {
        let Event { received, trigger, update } = event;
        let changed = match update {
            Update::Object(object) => self.handle_object(object),
            Update::Node(facts) => {
                self.parts.health.node_seen(facts.leaving);
                self.facts = Some(facts);
                self.describe_node()
            }
            Update::NodeListed => {
                self.node_listed = true;
                false
            }
            Update::ServiceCidrs(service_cidrs) => {
                self.service_cidrs = service_cidrs;
                self.describe_node()
            }
            Update::Host(host) => {
                self.host = Some(host);
                self.describe_node()
            }
            Update::Scrape(reply) => {
                // Whoever asked may have gone meanwhile.
                let _ = reply.send(self.parts.dataplane.scrape());
                false
            }
            Update::ReadNumbered(ids, endpoints_max, reply) => {
                let _ = reply.send(self.parts.dataplane.numbered(&ids, endpoints_max));
                false
            }
            Update::ReadStatus(reply) => {
                let _ = reply.send(self.status());
                false
            }
            Update::ReadServices(reply) => {
                let _ = reply.send(self.parts.dataplane.service_names());
                false
            }
        };
        if changed && self.stage == Stage::Running {
            self.measure(received, trigger);
        }
    }

    fn handle_object(&mut self, object: ObjectEvent) -> bool {
        let count: fn(&Metrics) = match object {
            ObjectEvent::ServiceApplied(_) | ObjectEvent::ServiceDeleted(_) => Metrics::service_change,
            ObjectEvent::SliceApplied(_) | ObjectEvent::SliceDeleted { .. } => Metrics::endpoint_change,
            ObjectEvent::ListStarted(_) | ObjectEvent::ListDone(_) => |_| (),
        };
        let (problem, asks) = (problem_of(&object), balanced(&object));
        let changed = self.tracker.handle(object);
        if changed {
            if let Some((service, problem)) = problem {
                warn!(%service, problem, "annotation not understood");
                self.parts.notices.notify(Notice::InvalidAnnotation { service, problem });
            }
            if let Some(service) = asks.filter(|_| self.parts.dataplane.name() != EBPF) {
                let mode = self.parts.dataplane.name();
                warn!(%service, mode, "this mode has no lb-algorithm and no weight but 0: endpoints are chosen as it does without");
            }
            count(&self.parts.metrics);
        }
        changed
    }

    /// Returns whether anything follows from what is known of the node now.
    fn describe_node(&mut self) -> bool {
        let Some(host) = &self.host else { return false };
        let (config, policy) = describe(&self.parts.settings, host, self.facts.as_ref(), &self.service_cidrs);
        self.tracker.set_policy(policy);
        self.desired.set_node(config);
        self.tracker.pending() > 0 || self.desired.is_changed()
    }

    fn measure(&mut self, received: Instant, trigger: Option<Timestamp>) {
        if self.received.is_empty() {
            self.parts.health.queued(Timestamp::now());
            self.parts.metrics.sync_queued();
        }
        if self.received.len() < MEASURED_MAX {
            self.received.push(received);
            // What happened before we started was not ours to program.
            self.triggers.extend(trigger.filter(|trigger| *trigger > self.started));
        }
    }

    fn advance_stage(&mut self) {
        if self.stage == Stage::Listing && self.tracker.is_complete() {
            info!(services = self.tracker.pending(), "both lists are complete");
            self.parts.metrics.lists_complete();
            self.parts.health.queued(Timestamp::now());
            self.stage = Stage::WaitingForNode { since: Instant::now() };
        }
        if let Stage::WaitingForNode { since } = self.stage {
            let known = self.node_listed && self.host.is_some();
            let patient = since.elapsed() < NODE_WAIT;
            if !known && !patient {
                warn!(
                    node_listed = self.node_listed,
                    host_known = self.host.is_some(),
                    "programming without knowing the node"
                );
            }
            if known || !patient {
                self.stage = Stage::Running;
            }
        }
    }

    /// Decides what is marked and hands it to the data plane, if there is anything to do now.
    fn program(&mut self) {
        self.tracker.checkout(&mut self.desired);
        let now = Instant::now();
        if self.pace.is_full_due(now) || self.is_refused_due(now) {
            self.sync(true);
        } else if self.pace.is_retrying() {
            // The retry will take the changes along; until then they wait.
        } else if self.pace.is_audit_due(now) && (!self.audit(now) || self.parts.dataplane.grow()) {
            self.sync(true);
        } else if self.desired.is_changed() {
            self.sync(false);
        } else if !self.received.is_empty() {
            self.settle();
        }
    }

    /// Once more in full where the data plane finds room for what it refused.
    fn sync(&mut self, full: bool) {
        let mut newly = self.sync_once(full);
        for _ in 0..GROWTHS_MAX {
            if self.refused.count() == 0 || !self.parts.dataplane.grow() {
                break;
            }
            newly.extend(self.sync_once(true));
        }
        self.tell_refused(newly);
    }

    /// Whether the kernel holds what was programmed. What cannot be told is taken for yes: the next sync will say.
    fn audit(&mut self, now: Instant) -> bool {
        self.pace.audited(now);
        self.parts.metrics.audit();
        self.told.audited = Some(now);
        match self.parts.dataplane.audit() {
            Ok(true) => true,
            Ok(false) => {
                warn!("somebody changed what was programmed, everything will be written again");
                self.parts.metrics.repair();
                self.told.repairs += 1;
                false
            }
            Err(error) => {
                warn!(%error, "cannot look at what is programmed");
                true
            }
        }
    }

    /// A failed sync has its own, shorter pauses.
    fn is_refused_due(&self, now: Instant) -> bool {
        !self.pace.is_retrying() && self.refused.retry_at().is_some_and(|at| now >= at)
    }

    /// Returns what was refused for want of room and was not before.
    fn sync_once(&mut self, full: bool) -> Vec<ServicePortName> {
        let (snapshot, delta) = self.desired.checkout();
        let (version, services) = (snapshot.version, snapshot.services.len());
        let scope = if full { SyncScope::Full } else { SyncScope::Changed(&delta) };
        let start = Instant::now();
        let result = self.parts.dataplane.sync(snapshot, scope);
        let end = Instant::now();
        match result {
            Ok(report) => {
                if let Some(reconciler) = &self.parts.reconciler {
                    reconciler.synced(snapshot, scope);
                }
                if let Some(take_over) = self.parts.take_over.take() {
                    take_over(snapshot);
                }
                let duration = end - start;
                self.pace.succeeded(end, duration, full);
                let newly = self.refused.synced(end, scope, &report.refused);
                let (kernel_writes, refused) = (report.kernel_writes, self.refused.count());
                self.told.synced = Some(Synced { at: end, duration, full, kernel_writes });
                self.parts.metrics.sync_done(SyncDone { duration, full, kernel_writes, refused, services, version });
                Self::log(&report, full, duration, services);
                for name in report.without_table {
                    self.parts.notices.notify(Notice::NoTable(name));
                }
                self.serve_health_checks(&delta, full);
                self.settle();
                newly
            }
            Err(error) => {
                let pause = self.pace.failed(end);
                self.parts.metrics.sync_failed();
                error!(%error, version, retry_after = ?pause, "sync failed, everything will be written again");
                Vec::new()
            }
        }
    }

    fn log(report: &SyncReport, full: bool, duration: Duration, services: usize) {
        if full {
            info!(services, writes = report.kernel_writes, ?duration, "synced everything");
        } else {
            tracing::debug!(
                changed = report.services_changed,
                writes = report.kernel_writes,
                ?duration,
                "synced changes"
            );
        }
    }

    /// Says once of each ServicePort that there is no room for it; nothing of those that there is room for by now.
    fn tell_refused(&self, mut newly: Vec<ServicePortName>) {
        newly.retain(|name| self.refused.holds(name));
        if let Some(example) = newly.first() {
            let count = self.refused.count();
            warn!(count, %example, "ServicePorts refused for want of room in the kernel, trying again later");
        }
        for name in newly {
            self.parts.notices.notify(Notice::Refused(name));
        }
    }

    /// Only once traffic that a load balancer sends because of it can be served.
    fn serve_health_checks(&self, delta: &ServiceDelta, full: bool) {
        if full || delta.health_checks_changed || delta.node_changed {
            let snapshot = self.desired.snapshot();
            let configured = &self.parts.settings.node_port_addresses;
            let wanted = Wanted::new(&snapshot.health_checks, configured, &snapshot.node);
            self.parts.health_checks.send_if_modified(|known| {
                let differs = *known != wanted;
                *known = wanted;
                differs
            });
        }
    }

    /// What was received is in the kernel, or made no difference to it.
    fn settle(&mut self) {
        for received in self.received.drain(..) {
            self.parts.metrics.programmed(received.elapsed());
        }
        let now = SystemTime::now();
        for trigger in self.triggers.drain(..) {
            let after = now.duration_since(SystemTime::from(trigger)).unwrap_or_default();
            self.parts.metrics.network_programmed(after);
        }
        self.received.shrink_to(64);
        self.parts.metrics.nothing_pending();
        let (no_local, conflicts) = (self.desired.no_local_endpoints(), self.desired.conflicts());
        self.parts.metrics.model(no_local, conflicts, self.tracker.rejected_endpoints());
        self.parts.health.updated(Timestamp::now());
    }
}

/// The Service of this event, if it says how its endpoints are to be chosen.
fn balanced(object: &ObjectEvent) -> Option<ServiceKey> {
    let ObjectEvent::ServiceApplied(service) = object else { return None };
    service.balancing.as_ref().map(|_| service.key.clone())
}

/// The Service of this event and what is wrong with its annotations, if anything is.
fn problem_of(object: &ObjectEvent) -> Option<(ServiceKey, String)> {
    let ObjectEvent::ServiceApplied(service) = object else { return None };
    let problem = service.balancing.as_ref()?.problem.clone()?;
    Some((service.key.clone(), problem))
}
