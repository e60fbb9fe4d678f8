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
    wanted: watch::Receiver<Wanted>,
    notices: crate::events::Writer,
    task: JoinHandle<Box<dyn Dataplane>>,
}

impl Harness {
    fn start() -> Self {
        let recorder = Recorder::default();
        let (events, receiver) = channel();
        let health = Arc::new(Health::new(Timestamp::now(), Duration::from_secs(60)));
        let metrics = Arc::new(Metrics::new().unwrap());
        let settings = NodeSettings {
            node_port_addresses: NodePortAddresses::Networks(Vec::new()),
            pod_detection: PodDetection::ClusterCidr(Vec::new()),
            masquerade_all: false,
            forwarding: crate::model::Forwarding::Snat,
            localhost_node_ports_v4: true,
            localhost_node_ports_v6: true,
            bind_address: None,
        };
        let (notices, writer) = crate::events::channel("node-1", Arc::clone(&metrics));
        let (health_checks, wanted) = watch::channel(Wanted::default());
        let parts = Parts {
            why: "a test".to_owned(),
            dataplane: Box::new(recorder.dataplane()),
            events: receiver,
            settings,
            health: Arc::clone(&health),
            metrics: Arc::clone(&metrics),
            reconciler: None,
            take_over: None,
            api_server: None,
            periods: SyncPeriods { period: Duration::from_secs(30), min: Duration::ZERO },
            notices,
            health_checks,
        };
        Self { recorder, events, health, metrics, wanted, notices: writer, task: tokio::spawn(run(parts)) }
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
        let (reply, scrape) = oneshot::channel();
        self.send(Update::Scrape(reply)).await;
        let scrape = tokio::time::timeout(DEADLINE, scrape).await.expect("the runner answers").unwrap();
        scrape.read(&|_, _| Vec::new())
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
    assert!(harness.metric("trama_repairs_total 1") && harness.metric("trama_audits_total 1"));
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

#[tokio::test]
async fn health_checks_are_served_once_they_are_programmed() {
    let mut harness = Harness::running().await;
    harness.recorder.lock().failures_wanted = 1;
    let mut service = build::exposed("b");
    service.health_check_node_port = Some(30900);
    harness.object(ObjectEvent::ServiceApplied(service)).await;
    harness.until("the failure", |state| state.failed_syncs == 1).await;
    assert!(harness.wanted.borrow().checks.is_empty(), "not before the sync");
    let served = harness.wanted.wait_for(|wanted| !wanted.checks.is_empty());
    let wanted = tokio::time::timeout(DEADLINE, served).await.unwrap().unwrap().clone();
    assert!(wanted.checks.iter().all(|(name, check)| &*name.service.name == "b" && check.port == 30900));
    assert_eq!(wanted.v4, ["0.0.0.0".parse::<std::net::IpAddr>().unwrap()]);
    harness.object(ObjectEvent::ServiceDeleted(build::key("b"))).await;
    let gone = harness.wanted.wait_for(|wanted| wanted.checks.is_empty());
    tokio::time::timeout(DEADLINE, gone).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_refused_service_port_is_told_once() {
    let mut harness = Harness::running().await;
    harness.recorder.lock().refuse = true;
    for address in ["10.1.0.1", "10.1.0.2"] {
        harness.object(endpoints(&[address])).await;
        let programmed = |state: &Recorded| {
            let mut all = state.programmed.services.values().flat_map(|service| &service.cluster_endpoints);
            all.any(|endpoint| endpoint.address().ip().to_string() == address)
        };
        harness.until("the endpoints", programmed).await;
    }
    harness.flush().await;
    let told: Vec<_> = std::iter::from_fn(|| harness.notices.try_next()).collect();
    assert!(matches!(told.as_slice(), [Notice::Refused(name)] if &*name.service == "a"), "{told:?}");
    assert!(harness.metric("trama_service_ports_refused 1"));
    harness.recorder.lock().refuse = false;
    harness.object(endpoints(&["10.1.0.3"])).await;
    let syncs = harness.syncs().1;
    harness.until("the last change", |state| state.partial_syncs > syncs.saturating_sub(1)).await;
    harness.flush().await;
    harness.flush().await;
    assert!(harness.metric("trama_service_ports_refused 0"));
}

#[tokio::test]
async fn what_is_refused_is_programmed_at_once_where_there_is_more_room_to_be_had() {
    let mut harness = Harness::running().await;
    {
        let mut state = harness.recorder.lock();
        (state.refuse, state.growths_left) = (true, 1);
    }
    harness.object(endpoints(&["10.1.0.1"])).await;
    harness.until("the full sync behind it", |state| state.full_syncs == 2).await;
    harness.flush().await;
    assert_eq!((harness.syncs(), harness.recorder.lock().growths_left), ((2, 1), 0));
    assert!(harness.notices.try_next().is_none(), "nobody has to do anything");
    assert!(harness.metric("trama_service_ports_refused 0"));
}

#[tokio::test]
async fn the_audit_makes_room_before_it_runs_out() {
    let harness = Harness::running().await;
    harness.recorder.lock().growths_left = 1;
    harness.until("the full sync behind it", |state| state.full_syncs == 2).await;
    harness.flush().await;
    assert_eq!(harness.syncs(), (2, 0));
    assert!(harness.metric("trama_repairs_total 0"));
}

#[tokio::test]
async fn an_annotation_that_is_not_understood_is_told_once_until_it_changes() {
    let mut harness = Harness::running().await;
    let annotated = |algorithm: &str| {
        let balancing = crate::model::Balancing::parse(Some(algorithm), None, None).map(Box::new);
        ObjectEvent::ServiceApplied(crate::model::ServiceObject { balancing, ..build::exposed("a") })
    };
    for algorithm in ["x", "x", "maglev", "y"] {
        harness.object(annotated(algorithm)).await;
    }
    harness.flush().await;
    let told: Vec<_> = std::iter::from_fn(|| harness.notices.try_next()).collect();
    let values = |notice: &Notice| match notice {
        Notice::InvalidAnnotation { service, problem } if &*service.name == "a" => problem.contains("\"x\""),
        other => panic!("{other:?}"),
    };
    assert_eq!(told.iter().map(values).collect::<Vec<_>>(), [true, false]);
}
