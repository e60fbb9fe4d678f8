//! The whole process without a kernel: a fake API server over HTTP in front, the recording data plane behind.

mod api;
mod faults;

use std::time::Instant;

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use self::api::{FakeApi, Resource};
use super::*;
use crate::admin;
use crate::config::Flags;
use crate::dataplane::fake::{Recorded, Recorder};

/// Longer than the longest pause between attempts at the API server, 30 s with its jitter: after a storm one may have just begun.
const DEADLINE: Duration = Duration::from_secs(90);

struct Process {
    recorder: Recorder,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), AppError>>,
    _directory: tempfile::TempDir,
}

fn config(directory: &std::path::Path, api: &FakeApi) -> Config {
    let path = directory.join("kubeconfig");
    let server = api.address();
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: a\nusers: [{{name: u, user: {{}}}}]\n\
         contexts: [{{name: a, context: {{cluster: c, user: u}}}}]\n\
         clusters: [{{name: c, cluster: {{server: 'http://{server}'}}}}]\n"
    );
    fs::write(&path, kubeconfig).unwrap();
    let arguments = [
        "trama-proxy",
        "--kubeconfig",
        path.to_str().unwrap(),
        "--hostname-override=node1",
        "--healthz-bind-address=",
        "--metrics-bind-address=",
        "--cgroup=/nonexistent",
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
        "--kube-api-qps=-1",
    ];
    let flags = Flags::read(arguments.map(std::ffi::OsString::from)).unwrap();
    Config::load(&flags).unwrap()
}

impl Process {
    fn start(api: &FakeApi) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path(), api);
        let recorder = Recorder::default();
        let dataplane = recorder.dataplane();
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async move {
            let _ = stopped.await;
        };
        let task = tokio::spawn(run(
            config,
            move |_| Ok(Opened { dataplane: Box::new(dataplane), why: "a test".to_owned() }),
            shutdown,
        ));
        Self { recorder, stop: Some(stop), task, _directory: directory }
    }

    async fn until(&self, what: &str, done: impl Fn(&Recorded) -> bool) {
        wait(what, || done(&self.recorder.lock())).await;
    }

    /// Names of the Services that are programmed.
    fn services(&self) -> Vec<String> {
        self.recorder.lock().programmed.services.keys().map(|name| name.service.to_string()).collect()
    }

    async fn stop(mut self) -> Recorder {
        self.stop.take().unwrap().send(()).unwrap();
        tokio::time::timeout(DEADLINE, self.task).await.expect("the process ends").unwrap().unwrap();
        self.recorder
    }
}

async fn wait(what: &str, done: impl Fn() -> bool) {
    let poll = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, poll).await.unwrap_or_else(|_| panic!("not within {DEADLINE:?}: {what}"));
}

fn service(index: usize) -> Value {
    json!({
        "metadata": {"name": format!("s{index}"), "namespace": "ns", "managedFields": [{"manager": "x", "fieldsV1": {"f:spec": {}}}]},
        "spec": {"clusterIP": format!("10.96.{}.{}", index / 250, index % 250 + 1), "ports": [{"port": 80}]},
    })
}

fn slice(index: usize, address: &str) -> Value {
    json!({
        "metadata": {"name": format!("s{index}-x"), "namespace": "ns", "labels": {"kubernetes.io/service-name": format!("s{index}")}},
        "addressType": "IPv4", "endpoints": [{"addresses": [address]}], "ports": [{"name": "", "port": 8080}],
    })
}

async fn api(services: usize) -> FakeApi {
    let api = FakeApi::start().await;
    api.set(Resource::Services, (0..services).map(service).collect());
    api.set(Resource::Slices, (0..services).map(|i| slice(i, "10.1.0.1")).collect());
    api.set(Resource::Nodes, vec![json!({"metadata": {"name": "node1"}})]);
    api
}

fn endpoint_count(state: &Recorded, address: &str) -> usize {
    let all = state.programmed.services.values().flat_map(|port| &port.cluster_endpoints);
    all.filter(|endpoint| endpoint.address().ip().to_string() == address).count()
}

#[tokio::test]
async fn lists_in_pages_then_follows_the_watch() {
    let api = api(250).await;
    let process = Process::start(&api);
    process.until("everything", |state| endpoint_count(state, "10.1.0.1") == 250).await;
    assert_eq!(process.recorder.lock().full_syncs, 1);
    for resource in [Resource::Services, Resource::Slices] {
        let requests = api.requests(resource);
        let lists: Vec<_> = requests.iter().filter(|query| !query.contains("watch=true")).collect();
        assert_eq!(lists.len(), 3, "100, 100 and 50: {lists:?}");
        assert!(lists.iter().all(|query| query.contains("limit=100")), "{lists:?}");
    }
    let selectors = |resource, wanted: &str| api.requests(resource).iter().all(|query| query.contains(wanted));
    assert!(selectors(Resource::Services, "labelSelector=%21service.kubernetes.io%2Fservice-proxy-name"));
    assert!(selectors(Resource::Services, "fieldSelector=spec.clusterIP%21%3DNone"));
    assert!(selectors(Resource::Slices, "labelSelector=%21service.kubernetes.io%2Fheadless"));
    assert!(selectors(Resource::Nodes, "fieldSelector=metadata.name%3Dnode1"));
    api.event(Resource::Slices, "MODIFIED", slice(7, "10.1.0.2")).await;
    process.until("the change", |state| endpoint_count(state, "10.1.0.2") == 1).await;
    api.event(Resource::Services, "DELETED", service(7)).await;
    process.until("the deletion", |state| state.programmed.services.len() == 249).await;
    // A bad address never gets through, and does not hold up the rest.
    api.event(Resource::Slices, "MODIFIED", slice(8, "127.0.0.1")).await;
    process.until("the bad address", |state| endpoint_count(state, "10.1.0.1") == 248).await;
    assert_eq!(endpoint_count(&process.recorder.lock(), "127.0.0.1"), 0);
    assert_eq!(process.recorder.lock().full_syncs, 1);
    process.stop().await;
}

#[tokio::test]
async fn an_expired_watch_lists_again_and_finds_what_was_deleted() {
    let api = api(3).await;
    let process = Process::start(&api);
    process.until("the first state", |state| state.programmed.services.len() == 3).await;
    api.set(Resource::Services, vec![service(0), service(5)]);
    api.expire(Resource::Services).await;
    wait("the new state", || process.services() == ["s0", "s5"]).await;
    assert_eq!(process.recorder.lock().full_syncs, 1);
    process.stop().await;
}

#[tokio::test]
async fn the_last_state_stays_while_the_api_server_is_away() {
    let api = api(3).await;
    let process = Process::start(&api);
    process.until("the first state", |state| state.programmed.services.len() == 3).await;
    let before = (process.recorder.lock().programmed.clone(), api.refused());
    api.set_down(true);
    wait("attempts to reconnect", || api.refused() >= before.1 + 3).await;
    assert_eq!(process.recorder.lock().programmed, before.0);
    // What happened meanwhile shows when it is back, though no event told of it.
    api.set(Resource::Services, vec![service(1), service(2), service(9)]);
    api.set_stale(true);
    api.set_down(false);
    wait("the new state", || process.services() == ["s1", "s2", "s9"]).await;
    process.stop().await;
}

#[tokio::test]
async fn nothing_is_programmed_while_one_list_is_forbidden() {
    let api = api(2).await;
    api.forbid(Some(Resource::Slices));
    let process = Process::start(&api);
    wait("two attempts", || api.requests(Resource::Slices).len() >= 2).await;
    assert_eq!(process.recorder.lock().full_syncs, 0);
    api.forbid(None);
    process.until("the first sync", |state| endpoint_count(state, "10.1.0.1") == 2).await;
    process.stop().await;
}

#[tokio::test]
async fn the_end_leaves_everything_programmed() {
    let api = api(2).await;
    let process = Process::start(&api);
    process.until("the first sync", |state| state.full_syncs == 1).await;
    let recorder = process.stop().await;
    let state = recorder.lock();
    assert_eq!((state.programmed.services.len(), state.cleanups), (2, 0));
}

#[tokio::test]
async fn a_busy_port_that_must_not_be_is_told_and_ends_it_before_the_data_plane_is_opened() {
    let api = api(1).await;
    let directory = tempfile::tempdir().unwrap();
    let taken = admin::listen("127.0.0.1:0".parse().unwrap(), "a test").unwrap();
    let healthz_address = taken.local_addr().ok();
    let config = Config { healthz_address, bind_hard_fail: true, ..config(directory.path(), &api) };
    let open = |_: &Config| -> Result<Opened, OpenError> { panic!("opened") };
    let error = run(config, open, std::future::pending()).await.unwrap_err().to_string();
    assert!(error.contains("health checks") && error.contains("in use"), "{error}");
    assert!(api.requests(Resource::Services).is_empty());
    let events = api.events();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].1["reason"], "FailedToStartProxierHealthcheck");
}

#[tokio::test]
async fn the_start_is_an_event_of_the_node() {
    let api = api(1).await;
    let process = Process::start(&api);
    wait("the event", || !api.events().is_empty()).await;
    let (path, event) = api.events().remove(0);
    assert_eq!(path, "/apis/events.k8s.io/v1/namespaces/default/events");
    assert_eq!(
        (&event["reason"], &event["type"], &event["action"]),
        (&"Starting".into(), &"Normal".into(), &"StartKubeProxy".into())
    );
    assert_eq!((&event["regarding"]["kind"], &event["regarding"]["name"]), (&"Node".into(), &"node1".into()));
    assert_eq!((&event["reportingController"], &event["reportingInstance"]), (&"trama-proxy".into(), &"node1".into()));
    process.stop().await;
}

#[tokio::test]
async fn a_load_balancers_health_check_follows_the_local_endpoints() {
    let api = api(1).await;
    // Any port will do; the one of a listener that is gone again is free.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut balanced = service(0);
    balanced["spec"]["type"] = json!("LoadBalancer");
    balanced["spec"]["externalTrafficPolicy"] = json!("Local");
    balanced["spec"]["healthCheckNodePort"] = json!(port);
    api.set(Resource::Services, vec![balanced]);
    let process = Process::start(&api);
    process.until("the first sync", |state| state.full_syncs == 1).await;
    until_answered(port, "503 ", "\"localEndpoints\": 0").await;
    let mut local = slice(0, "10.1.0.1");
    local["endpoints"][0]["nodeName"] = json!("node1");
    api.event(Resource::Slices, "MODIFIED", local.clone()).await;
    until_answered(port, "200 ", "\"localEndpoints\": 1").await;
    local["endpoints"][0]["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
    api.event(Resource::Slices, "MODIFIED", local).await;
    until_answered(port, "503 ", "\"localEndpoints\": 0").await;
    api.event(Resource::Services, "DELETED", service(0)).await;
    let closed = async {
        while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, closed).await.unwrap();
    process.stop().await;
}

/// Asks a health check until its answer holds both.
async fn until_answered(port: u16, code: &str, content: &str) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let ask = async || {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.ok()?;
        Some(text)
    };
    let poll = async {
        while !ask().await.is_some_and(|text| text.contains(&format!("HTTP/1.1 {code}")) && text.contains(content)) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, poll).await.unwrap_or_else(|_| panic!("no {code}with {content}"));
}
