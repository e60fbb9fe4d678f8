use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;
use crate::dataplane::fake::{Recorded, Recorder};
use crate::model::tests::build;
use crate::node::{InterfaceAddress, NodePortAddresses, PodDetection};
use crate::source::channel;
use crate::tracker::ListKind;

const DEADLINE: Duration = Duration::from_secs(10);

struct Harness {
    recorder: Recorder,
    events: mpsc::Sender<Event>,
    health: Arc<Health>,
    metrics: Arc<Metrics>,
    task: JoinHandle<Box<dyn Dataplane>>,
}

impl Harness {
    fn start() -> Self {
        let recorder = Recorder::default();
        let (events, receiver) = channel();
        let health = Arc::new(Health::new(Timestamp::now()));
        let metrics = Arc::new(Metrics::new().unwrap());
        let settings = NodeSettings {
            node_port_addresses: NodePortAddresses::Networks(Vec::new()),
            pod_detection: PodDetection::ClusterCidr(Vec::new()),
            masquerade_all: false,
        };
        let parts = Parts {
            dataplane: Box::new(recorder.dataplane()),
            events: receiver,
            settings,
            health: Arc::clone(&health),
            metrics: Arc::clone(&metrics),
            reconciler: None,
            api_server: None,
        };
        Self { recorder, events, health, metrics, task: tokio::spawn(run(parts)) }
    }

    /// Both lists complete with one Service, the Node and the host known.
    async fn running() -> Self {
        let harness = Self::start();
        harness.node().await;
        harness.list(ListKind::Slices, Vec::new()).await;
        harness.list(ListKind::Services, vec![ObjectEvent::ServiceApplied(build::exposed("a"))]).await;
        harness.until("the first sync", |state| state.full_syncs == 1).await;
        harness
    }

    async fn send(&self, update: Update) {
        self.events.send(Event::now(update)).await.unwrap();
    }

    async fn object(&self, event: ObjectEvent) {
        self.send(Update::Object(event)).await;
    }

    async fn list(&self, kind: ListKind, objects: Vec<ObjectEvent>) {
        let all = [ObjectEvent::ListStarted(kind)].into_iter().chain(objects).chain([ObjectEvent::ListDone(kind)]);
        for event in all {
            self.object(event).await;
        }
    }

    async fn node(&self) {
        let address = InterfaceAddress { address: "192.168.0.2".parse().unwrap(), interface: 2, global: true };
        let host = HostAddresses { addresses: vec![address], ..HostAddresses::default() };
        self.send(Update::Host(host)).await;
        self.send(Update::Node(NodeFacts::default())).await;
        self.send(Update::NodeListed).await;
    }

    /// Returns when the runner has handled everything sent before.
    async fn flush(&self) -> crate::dataplane::Counters {
        let (reply, counters) = oneshot::channel();
        self.send(Update::ReadCounters(reply)).await;
        tokio::time::timeout(DEADLINE, counters).await.expect("the runner answers").unwrap()
    }

    async fn until(&self, what: &str, done: impl Fn(&Recorded) -> bool) {
        let wait = async {
            while !done(&self.recorder.lock()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.unwrap_or_else(|_| panic!("{what}: {:?}", self.recorder.lock()));
    }

    /// Full and partial ones.
    fn syncs(&self) -> (usize, usize) {
        let state = self.recorder.lock();
        (state.full_syncs, state.partial_syncs)
    }

    fn metric(&self, line: &str) -> bool {
        self.metrics.render(&Vec::new()).unwrap().lines().any(|l| l == line)
    }
}

fn endpoints(list: &[&str]) -> ObjectEvent {
    ObjectEvent::SliceApplied(build::slice("a-1", "a", list.iter().map(|e| build::endpoint(e)).collect()))
}

#[tokio::test]
async fn nothing_is_programmed_before_both_lists_and_the_node_are_known() {
    let harness = Harness::start();
    harness.list(ListKind::Services, vec![ObjectEvent::ServiceApplied(build::exposed("a"))]).await;
    harness.flush().await;
    harness.node().await;
    harness.object(ObjectEvent::ListStarted(ListKind::Slices)).await;
    harness.object(endpoints(&["10.1.0.1"])).await;
    harness.flush().await;
    assert_eq!(harness.recorder.lock().full_syncs, 0);
    harness.object(ObjectEvent::ListDone(ListKind::Slices)).await;
    harness.until("the first sync", |state| state.full_syncs == 1).await;
    let state = harness.recorder.lock();
    assert_eq!(state.programmed.services.len(), 1);
    assert_eq!(state.programmed.node.node_port_addresses.len(), 1);
    assert_eq!(state.partial_syncs, 0);
}

#[tokio::test]
async fn a_change_is_programmed_as_a_delta_and_measured() {
    let harness = Harness::running().await;
    harness.object(endpoints(&["10.1.0.1", "10.1.0.2"])).await;
    let programmed = |state: &Recorded| state.programmed.services.values().any(|s| s.cluster_endpoints.len() == 2);
    harness.until("the endpoints", programmed).await;
    harness.flush().await;
    assert_eq!(harness.syncs(), (1, 1));
    assert!(harness.metric("trama_event_to_programmed_seconds_count 1"), "the initial lists are not measured");
    assert!(harness.metric("kubeproxy_sync_proxy_rules_endpoint_changes_pending 0"));
}

#[tokio::test]
async fn an_event_that_changes_nothing_is_not_programmed() {
    let harness = Harness::running().await;
    harness.object(ObjectEvent::ServiceApplied(build::exposed("a"))).await;
    harness.object(ObjectEvent::ServiceDeleted(build::key("unknown"))).await;
    harness.node().await;
    harness.flush().await;
    harness.flush().await;
    assert_eq!(harness.syncs(), (1, 0));
}

#[tokio::test]
async fn a_relist_deletes_what_is_gone() {
    let harness = Harness::running().await;
    harness.list(ListKind::Services, Vec::new()).await;
    harness.until("the deletion", |state| state.programmed.services.is_empty()).await;
}

#[tokio::test]
async fn a_failed_sync_is_repeated_in_full_with_everything_that_came_meanwhile() {
    let harness = Harness::running().await;
    harness.recorder.lock().failures_wanted = 2;
    harness.object(endpoints(&["10.1.0.1"])).await;
    harness.until("the failure", |state| state.failed_syncs > 0).await;
    harness.object(endpoints(&["10.1.0.1", "10.1.0.2", "10.1.0.3"])).await;
    let programmed = |state: &Recorded| state.programmed.services.values().any(|s| s.cluster_endpoints.len() == 3);
    harness.until("the retry", programmed).await;
    let state = harness.recorder.lock();
    assert_eq!((state.full_syncs, state.partial_syncs, state.failed_syncs), (2, 0, 2));
    assert_eq!(harness.health.livez(Timestamp::now()).code, 200);
}

#[tokio::test]
async fn what_somebody_else_changed_is_repaired_and_counted() {
    let harness = Harness::running().await;
    harness.recorder.lock().tampered = true;
    harness.until("the repair", |state| state.full_syncs == 2).await;
    harness.flush().await;
    assert!(!harness.recorder.lock().tampered);
    assert!(harness.metric("trama_repairs_total 1"));
}

#[tokio::test]
async fn the_node_changes_without_any_service() {
    let harness = Harness::running().await;
    harness.send(Update::Host(HostAddresses::default())).await;
    harness.until("the node", |state| state.programmed.node.node_addresses.is_empty()).await;
    assert_eq!(harness.recorder.lock().partial_syncs, 1);
}

#[tokio::test]
async fn counters_are_answered_and_the_end_of_events_is_the_end() {
    let harness = Harness::running().await;
    assert_eq!(harness.flush().await[0].0, "trama_fake_full_syncs_total");
    drop(harness.events);
    let dataplane = tokio::time::timeout(DEADLINE, harness.task).await.unwrap().unwrap();
    assert_eq!(dataplane.name(), "fake");
    let state = harness.recorder.lock();
    assert_eq!((state.cleanups, state.programmed.services.len()), (0, 1), "forwarding goes on");
}
