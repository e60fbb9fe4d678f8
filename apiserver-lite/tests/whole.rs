//! Server and controllers together, seen through an ordinary client: kube.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a failed step fails the test"
)]

use std::collections::HashSet;
use std::time::{Duration, Instant};

use apiserver_lite::Options;
use clap::Parser as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Config, ResourceExt as _};
use serde_json::json;
use tokio::sync::oneshot;

const DEADLINE: Duration = Duration::from_secs(30);

/// A running process' worth of server, in this process.
struct Cluster {
    client: Client,
    stop: Option<oneshot::Sender<()>>,
    running: Option<tokio::task::JoinHandle<Result<(), apiserver_lite::AppError>>>,
    _data: tempfile::TempDir,
}

impl Cluster {
    async fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let kubeconfig = data.path().join("kubeconfig");
        let arguments =
            ["apiserver-lite", "--secure-port", "0", "--data-dir", data.path().to_str().unwrap(), "--write-kubeconfig"];
        let options = Options::parse_from(arguments.into_iter().chain([kubeconfig.to_str().unwrap()]));
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, is_ready) = oneshot::channel();
        let running = tokio::spawn(async move {
            let stop = async {
                let _ = stopped.await;
            };
            apiserver_lite::run(options, stop, |_| ready.send(()).unwrap()).await
        });
        tokio::time::timeout(DEADLINE, is_ready).await.unwrap().unwrap();
        let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
        Self { client: Client::try_from(config).unwrap(), stop: Some(stop), running: Some(running), _data: data }
    }

    fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), "default")
    }

    async fn stop(mut self) {
        drop(self.stop.take());
        tokio::time::timeout(DEADLINE, self.running.take().unwrap()).await.unwrap().unwrap().unwrap();
    }
}

async fn create<K>(api: &Api<K>, object: serde_json::Value) -> K
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + serde::Serialize + std::fmt::Debug,
{
    api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap()
}

fn web_service(name: &str) -> serde_json::Value {
    json!({"metadata": {"name": name}, "spec": {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8080}]}})
}

fn ready_status(ip: &str) -> serde_json::Value {
    json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}})
}

async fn make_pod(cluster: &Cluster, name: &str, app: &str) {
    let pod = json!({"metadata": {"name": name, "labels": {"app": app}},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]}});
    create::<Pod>(&cluster.api(), pod).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_becomes_ready_is_an_endpoint_soon() {
    let cluster = Cluster::start().await;
    create::<Node>(&Api::all(cluster.client.clone()), json!({"metadata": {"name": "n1"}})).await;
    create::<Service>(&cluster.api(), web_service("web")).await;
    let slices: Api<EndpointSlice> = cluster.api();
    let parameters = WatchParams::default().labels("kubernetes.io/service-name=web").timeout(60);
    let mut events = slices.watch(&parameters, "0").await.unwrap().boxed();
    let mut delays = Vec::new();
    for number in 1..=20 {
        let (name, ip) = (format!("p{number}"), format!("10.1.0.{number}"));
        make_pod(&cluster, &name, "web").await;
        let status = Patch::Merge(ready_status(&ip));
        let began = Instant::now();
        cluster.api::<Pod>().patch_status(&name, &PatchParams::default(), &status).await.unwrap();
        wait_for(&mut events, &ip).await;
        delays.push(began.elapsed());
    }
    delays.sort();
    println!("pod ready -> slice seen: median {:?}, slowest {:?}", delays[delays.len() / 2], delays[delays.len() - 1]);
    assert!(delays[delays.len() / 2] < Duration::from_secs(1), "{delays:?}");
    cluster.stop().await;
}

async fn wait_for(
    events: &mut (impl futures::Stream<Item = kube::Result<WatchEvent<EndpointSlice>>> + Unpin),
    ip: &str,
) {
    let seen = async {
        while let Some(event) = events.try_next().await.unwrap() {
            let (WatchEvent::Added(slice) | WatchEvent::Modified(slice)) = event else { continue };
            let mut endpoints = slice.endpoints.iter().flatten();
            if endpoints.any(|endpoint| endpoint.addresses.iter().any(|address| address == ip)) {
                return;
            }
        }
        panic!("the watch ended");
    };
    tokio::time::timeout(DEADLINE, seen).await.expect("the pod is in no slice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_of_others_stay_and_services_without_selector_get_none() {
    let cluster = Cluster::start().await;
    let slices: Api<EndpointSlice> = cluster.api();
    let own = json!({"metadata": {"name": "mine", "labels": {"kubernetes.io/service-name": "web", "endpointslice.kubernetes.io/managed-by": "me"}},
        "addressType": "IPv4", "endpoints": [{"addresses": ["192.0.2.1"]}], "ports": [{"port": 1}]});
    create(&slices, own).await;
    create::<Service>(&cluster.api(), json!({"metadata": {"name": "bare"}, "spec": {"ports": [{"port": 80}]}})).await;
    create::<Service>(&cluster.api(), web_service("web")).await;
    let deadline = Instant::now() + DEADLINE;
    let list = loop {
        let list = slices.list(&ListParams::default()).await.unwrap();
        // `mine` and the empty one that says that `web` was seen.
        if list.items.len() == 2 || Instant::now() > deadline {
            break list;
        }
    };
    let owners: HashSet<String> =
        list.iter().map(|slice| slice.labels()["kubernetes.io/service-name"].clone()).collect();
    assert_eq!((list.items.len(), owners), (2, HashSet::from(["web".to_owned()])));
    cluster.api::<Service>().delete("web", &DeleteParams::default()).await.unwrap();
    while slices.list(&ListParams::default()).await.unwrap().items.len() != 1 {
        assert!(Instant::now() < deadline, "the controller's slice is still there");
    }
    assert_eq!(slices.get("mine").await.unwrap().endpoints.unwrap().len(), 1);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn namespaces_are_emptied_and_go() {
    let cluster = Cluster::start().await;
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    create(&namespaces, json!({"metadata": {"name": "team"}})).await;
    let inside: Api<Service> = Api::namespaced(cluster.client.clone(), "team");
    create(&inside, web_service("web")).await;
    namespaces.delete("team", &DeleteParams::default()).await.unwrap();
    let deadline = Instant::now() + DEADLINE;
    while namespaces.get_opt("team").await.unwrap().is_some() {
        assert!(Instant::now() < deadline, "the namespace is still there");
    }
    assert!(inside.list(&ListParams::default()).await.unwrap().items.is_empty());
    cluster.stop().await;
}

/// Number of Services and slices that the next test writes; more to measure with (`TRAMA_LOAD=10000`).
fn load() -> usize {
    std::env::var("TRAMA_LOAD").ok().and_then(|text| text.parse().ok()).unwrap_or(300)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_writers_and_a_watcher_agree() {
    let cluster = Cluster::start().await;
    let count = load();
    let services: Api<Service> = cluster.api();
    let slices: Api<EndpointSlice> = cluster.api();
    let seen = tokio::spawn(collect(slices.clone(), count));
    let began = Instant::now();
    let created: Vec<String> = stream::iter(0..count)
        .map(|number| {
            let (services, slices) = (services.clone(), slices.clone());
            async move {
                let name = format!("s{number:05}");
                let bare = json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}});
                let service = create(&services, bare).await;
                create(&slices, ten_endpoints(&name, number)).await;
                service.spec.unwrap().cluster_ip.unwrap()
            }
        })
        .buffer_unordered(32)
        .collect()
        .await;
    let elapsed = began.elapsed();
    println!("{} writes in {elapsed:?}: {:.0} per second", 2 * count, 2.0 * count as f64 / elapsed.as_secs_f64());
    let distinct: HashSet<&String> = created.iter().collect();
    assert_eq!(distinct.len(), count, "an address was given out twice");
    assert_eq!(tokio::time::timeout(DEADLINE, seen).await.unwrap().unwrap(), count);
    let began = Instant::now();
    let mut listed = 0;
    let mut page = slices.list(&ListParams::default().limit(500)).await.unwrap();
    loop {
        listed += page.items.len();
        let Some(token) = page.metadata.continue_.filter(|token| !token.is_empty()) else { break };
        page = slices.list(&ListParams::default().limit(500).continue_token(&token)).await.unwrap();
    }
    println!("{listed} slices listed in {:?}", began.elapsed());
    assert_eq!(listed, count);
    cluster.stop().await;
}

fn ten_endpoints(service: &str, number: usize) -> serde_json::Value {
    let endpoints: Vec<_> = (1..=10)
        .map(|last| {
            json!({"addresses": [format!("10.{}.{}.{last}", number / 250 % 250, number % 250)], "nodeName": "n1",
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("{service}-{last}")}})
        })
        .collect();
    json!({"metadata": {"name": format!("{service}-x"), "labels": {"kubernetes.io/service-name": service}}, "addressType": "IPv4",
        "endpoints": endpoints, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]})
}

/// Follows slices as trama-proxy does until `count` were seen.
async fn collect(slices: Api<EndpointSlice>, count: usize) -> usize {
    let config = watcher::Config::default().streaming_lists().labels("!service.kubernetes.io/headless");
    let mut events = watcher(slices, config).boxed();
    let mut seen = HashSet::new();
    while seen.len() < count {
        match events.try_next().await.unwrap() {
            Some(Event::Apply(slice) | Event::InitApply(slice)) => seen.insert(slice.name_any()),
            Some(_) => continue,
            None => break,
        };
    }
    seen.len()
}
