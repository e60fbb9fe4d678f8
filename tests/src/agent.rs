//! The lab's stand-in for a kubelet: a client of the API that registers the nodes and makes every Pod bound to them run.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node as ApiNode, Pod as ApiPod};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use serde_json::json;

use crate::status::{container_ports, node_manifest, node_status, running_status};
use crate::{Node, Pod, claim};

/// The pods that run, by `namespace/name`.
pub(crate) type Pods = Arc<Mutex<HashMap<String, (String, Pod)>>>;

/// Runs the Pods of a lab's nodes.
#[derive(Clone)]
pub(crate) struct Agent {
    client: Client,
    nodes: Arc<[Arc<Node>]>,
    pods: Pods,
}

impl Agent {
    pub(crate) fn new(client: Client, nodes: Arc<[Arc<Node>]>) -> Self {
        Self { client, nodes, pods: Pods::default() }
    }

    /// The pods that run.
    pub(crate) fn pods(&self) -> &Pods {
        &self.pods
    }

    /// Creates the Node objects, ready and with their addresses and pod ranges.
    pub(crate) async fn register_nodes(&self) -> Result<()> {
        let api: Api<ApiNode> = Api::all(self.client.clone());
        for node in self.nodes.iter() {
            let named = || format!("cannot register {}", node.name());
            if api.get_opt(node.name()).await.with_context(named)?.is_none() {
                let manifest = serde_json::from_value(node_manifest(node)).with_context(named)?;
                api.create(&PostParams::default(), &manifest).await.with_context(named)?;
            }
            let status = Patch::Merge(json!({ "status": node_status(node) }));
            api.patch_status(node.name(), &PatchParams::default(), &status).await.with_context(named)?;
        }
        Ok(())
    }

    /// Follows the Pods until the runtime ends; a failure is said on stderr and the Pod is tried again with its next change.
    pub(crate) async fn follow_pods(self) {
        let api: Api<ApiPod> = Api::all(self.client.clone());
        let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
        let mut listed = Vec::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => listed.clear(),
                Ok(watcher::Event::InitApply(pod)) => {
                    listed.push(key_of(&pod));
                    self.reconcile_loudly(&pod).await;
                }
                Ok(watcher::Event::InitDone) => self.retain(&listed),
                Ok(watcher::Event::Apply(pod)) => self.reconcile_loudly(&pod).await,
                Ok(watcher::Event::Delete(pod)) => self.stop(&key_of(&pod)),
                // The watcher lists again by itself, and pods keep running meanwhile, as they do under a kubelet.
                Err(_) if claim::is_ending() => return,
                Err(error) => eprintln!("trama-lab: the watch of Pods broke, starting it again: {error}"),
            }
        }
    }

    async fn reconcile_loudly(&self, pod: &ApiPod) {
        if let Err(error) = self.reconcile(pod).await {
            eprintln!("trama-lab: pod {}: {error:#}", key_of(pod));
        }
    }

    async fn reconcile(&self, pod: &ApiPod) -> Result<()> {
        let spec = pod.spec.as_ref().context("it has no spec")?;
        let bound = spec.node_name.as_deref().and_then(|name| self.nodes.iter().find(|node| node.name() == name));
        let Some(node) = bound else { return Ok(()) };
        if pod.metadata.deletion_timestamp.is_some() {
            self.stop(&key_of(pod));
            return self.confirm_deletion(pod).await;
        }
        let uid = pod.uid().context("it has no uid")?;
        let addresses = match self.running(&key_of(pod), &uid) {
            Some(addresses) => addresses,
            None => self.start(node, pod, &uid).await?,
        };
        // A status that says so already is left alone, else every patch would bring the next event.
        if pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running") {
            return Ok(());
        }
        let status = Patch::Merge(json!({ "status": running_status(node, pod, addresses) }));
        self.api_of(pod).patch_status(&pod.name_any(), &PatchParams::default(), &status).await?;
        Ok(())
    }

    async fn start(&self, node: &Arc<Node>, pod: &ApiPod, uid: &str) -> Result<[std::net::IpAddr; 2]> {
        // A pod of the same name may have been replaced between two events.
        self.stop(&key_of(pod));
        let (node, name) = (Arc::clone(node), lab_name(pod));
        let (tcp, udp) = container_ports(pod);
        let started = tokio::task::spawn_blocking(move || -> Result<Pod> {
            let mut started = Pod::create(&node, &name)?;
            started.serve(&tcp, &udp)?;
            Ok(started)
        });
        let started = started.await.context("starting it was interrupted")??;
        let addresses = started.addresses();
        self.lock().insert(key_of(pod), (uid.to_owned(), started));
        Ok(addresses)
    }

    async fn confirm_deletion(&self, pod: &ApiPod) -> Result<()> {
        let preconditions = Some(Preconditions { uid: pod.uid(), resource_version: None });
        let now = DeleteParams { grace_period_seconds: Some(0), preconditions, ..DeleteParams::default() };
        match self.api_of(pod).delete(&pod.name_any(), &now).await {
            // Someone deleted it with a grace period of zero: nothing is left to confirm.
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
            result => Ok(result.map(|_| ())?),
        }
    }

    fn running(&self, key: &str, uid: &str) -> Option<[std::net::IpAddr; 2]> {
        let pods = self.lock();
        let (running_uid, pod) = pods.get(key)?;
        (running_uid == uid).then(|| pod.addresses())
    }

    fn stop(&self, key: &str) {
        // Removed under the lock, taken apart after it.
        let stopped = self.lock().remove(key);
        drop(stopped);
    }

    fn retain(&self, keys: &[String]) {
        let gone: Vec<String> = self.lock().keys().filter(|key| !keys.contains(key)).cloned().collect();
        gone.iter().for_each(|key| self.stop(key));
    }

    fn api_of(&self, pod: &ApiPod) -> Api<ApiPod> {
        Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, (String, Pod)>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key_of(pod: &ApiPod) -> String {
    format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any())
}

/// The name of the pod's namespace in the lab, and of its echo server: the namespace is left out where it is `default`.
fn lab_name(pod: &ApiPod) -> String {
    match pod.namespace().as_deref() {
        None | Some("default") => pod.name_any(),
        Some(namespace) => format!("{namespace}.{}", pod.name_any()),
    }
}
