//! The EndpointSlice and Endpoints controller: one Service at a time, from what is cached to the fewest writes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Endpoints, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, Client, ResourceExt as _};

use crate::cache::{Cache, Key};
use crate::candidate;
use crate::endpoints;
use crate::informer::{Changed, Handler};
use crate::queue::WorkQueue;
use crate::slices::{self, Input, Plan, SERVICE_NAME};

/// Everything that endpoints depend on.
#[derive(Default)]
pub(crate) struct Known {
    pub(crate) services: Arc<Cache<Service>>,
    pub(crate) pods: Arc<Cache<Pod>>,
    pub(crate) nodes: Arc<Cache<Node>>,
    pub(crate) slices: Arc<Cache<EndpointSlice>>,
    pub(crate) endpoints: Arc<Cache<Endpoints>>,
}

/// The controller.
pub(crate) struct ServiceController {
    client: Client,
    known: Arc<Known>,
    triggers: Mutex<HashMap<Key, Triggers>>,
}

/// The times that a Service's endpoints were last made from: its own, and those of its pods by name.
#[derive(Debug, Default)]
struct Triggers {
    service: Option<Timestamp>,
    pods: HashMap<String, Timestamp>,
}

impl Triggers {
    /// Takes the present times over, and returns the earliest one that is new.
    fn advance(&mut self, service: Option<Timestamp>, pods: HashMap<String, Timestamp>) -> Option<Timestamp> {
        let new_pods = pods.iter().filter(|(name, time)| self.pods.get(*name) != Some(time)).map(|(_, time)| *time);
        let new_service = service.filter(|time| self.service != Some(*time));
        let earliest = new_pods.chain(new_service).min();
        self.service = service;
        self.pods = pods;
        earliest
    }
}

impl ServiceController {
    pub(crate) fn new(client: Client, known: Arc<Known>) -> Self {
        Self { client, known, triggers: Mutex::default() }
    }

    /// Makes the slices and the Endpoints of one Service right.
    pub(crate) async fn reconcile(&self, key: &Key) -> Result<(), kube::Error> {
        let Some(service) = self.known.services.get(key) else { return self.remove_all(key).await };
        if candidate::selector(&service).is_none() {
            // Whoever made the Service without a selector brings its endpoints.
            return Ok(());
        }
        let pods = self.known.pods.select(&key.namespace, |pod| candidate::is_selected(&service, Some(pod.labels())));
        let trigger = self.trigger(key, &service, &pods);
        let existing = self.known.slices.select(&key.namespace, |slice| slices::is_ours(slice, &key.name));
        let node = |name: &str| self.known.nodes.get(&Key { namespace: String::new(), name: name.to_owned() });
        let plan = Input { service: &service, pods: &pods, node: &node, existing: &existing, trigger }.plan();
        self.apply(key, plan).await?;
        self.sync_endpoints(key, &service, &pods).await
    }

    fn trigger(&self, key: &Key, service: &Service, pods: &[Arc<Pod>]) -> Option<Timestamp> {
        let created = service.metadata.creation_timestamp.as_ref().map(|time| time.0);
        let times = pods.iter().filter_map(|pod| Some((pod.name_any(), candidate::ready_since(pod)?))).collect();
        let mut triggers = self.triggers.lock().unwrap_or_else(PoisonError::into_inner);
        triggers.entry(key.clone()).or_default().advance(created, times)
    }

    /// What a write answers goes into the cache at once: the next sync must not see the state from before.
    async fn apply(&self, key: &Key, plan: Plan) -> Result<(), kube::Error> {
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &key.namespace);
        for slice in &plan.create {
            self.known.slices.put(Arc::new(api.create(&PostParams::default(), slice).await?));
        }
        for slice in &plan.update {
            let written = api.replace(&slice.name_any(), &PostParams::default(), slice).await?;
            self.known.slices.put(Arc::new(written));
        }
        for slice in &plan.delete {
            self.delete_slice(&api, slice).await?;
        }
        Ok(())
    }

    async fn delete_slice(&self, api: &Api<EndpointSlice>, slice: &EndpointSlice) -> Result<(), kube::Error> {
        let preconditions = Preconditions { uid: slice.uid(), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        ignore_gone(api.delete(&slice.name_any(), &parameters).await)?;
        self.known.slices.remove(&Key::of(slice));
        Ok(())
    }

    async fn sync_endpoints(&self, key: &Key, service: &Service, pods: &[Arc<Pod>]) -> Result<(), kube::Error> {
        let api: Api<Endpoints> = Api::namespaced(self.client.clone(), &key.namespace);
        let mut desired = endpoints::desired(service, pods);
        let written = match self.known.endpoints.get(key) {
            None => api.create(&PostParams::default(), &desired).await?,
            Some(existing) if endpoints::is_same(&existing, &desired) => return Ok(()),
            Some(existing) => {
                desired.metadata.resource_version = existing.resource_version();
                api.replace(&key.name, &PostParams::default(), &desired).await?
            }
        };
        self.known.endpoints.put(Arc::new(written));
        Ok(())
    }

    /// Without a Service there is nothing for its endpoints to be. This does not wait for a garbage collector, which a cluster may lack.
    async fn remove_all(&self, key: &Key) -> Result<(), kube::Error> {
        self.triggers.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &key.namespace);
        for slice in self.known.slices.select(&key.namespace, |slice| slices::is_ours(slice, &key.name)) {
            self.delete_slice(&api, &slice).await?;
        }
        if self.known.endpoints.get(key).is_some() {
            let api: Api<Endpoints> = Api::namespaced(self.client.clone(), &key.namespace);
            ignore_gone(api.delete(&key.name, &DeleteParams::default()).await)?;
            self.known.endpoints.remove(key);
        }
        Ok(())
    }
}

/// An object that is gone, or was made anew, needs no deletion.
fn ignore_gone<T>(outcome: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match outcome {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Ok(()),
    }
}

/// Finds the Services that a change concerns.
#[derive(Clone)]
pub(crate) struct Router {
    pub(crate) known: Arc<Known>,
    pub(crate) queue: Arc<WorkQueue<Key>>,
}

impl Router {
    fn all(&self) {
        self.known.services.keys().into_iter().for_each(|key| self.queue.add(key));
        // Slices and Endpoints whose Service went away unseen.
        for slice in self.known.slices.select_all(|slice| slice.labels().contains_key(SERVICE_NAME)) {
            self.owner_of(&slice);
        }
    }

    fn owner_of(&self, slice: &EndpointSlice) {
        if let Some(name) = slice.labels().get(SERVICE_NAME).filter(|name| slices::is_ours(slice, name)) {
            self.queue.add(Key { namespace: slice.namespace().unwrap_or_default(), name: name.clone() });
        }
    }

    fn selecting(&self, pod: &Pod) {
        let namespace = pod.namespace().unwrap_or_default();
        for service in
            self.known.services.select(&namespace, |service| candidate::is_selected(service, Some(pod.labels())))
        {
            self.queue.add(Key::of(&*service));
        }
    }
}

impl Handler<Service> for Router {
    fn changed(&self, change: &Changed<Service>) {
        change.after.iter().chain(&change.before).take(1).for_each(|service| self.queue.add(Key::of(&**service)));
    }

    fn replaced(&self) {
        self.all();
    }
}

impl Handler<Pod> for Router {
    fn changed(&self, change: &Changed<Pod>) {
        // Labels may have changed: both the Services that selected the pod and those that do now.
        for pod in change.before.iter().chain(&change.after) {
            self.selecting(pod);
        }
    }

    fn replaced(&self) {
        self.all();
    }
}

impl Handler<Node> for Router {
    fn changed(&self, change: &Changed<Node>) {
        let labels = |node: &Option<Arc<Node>>| node.as_ref().map(|node| node.labels().clone());
        if labels(&change.before) == labels(&change.after) {
            return;
        }
        let Some(node) = change.after.as_ref().or(change.before.as_ref()) else { return };
        let name = node.name_any();
        let on_node = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(name.as_str());
        for pod in self.known.pods.select_all(on_node) {
            self.selecting(&pod);
        }
    }

    fn replaced(&self) {
        self.all();
    }
}

impl Handler<EndpointSlice> for Router {
    fn changed(&self, change: &Changed<EndpointSlice>) {
        for slice in change.before.iter().chain(&change.after) {
            self.owner_of(slice);
        }
    }

    fn replaced(&self) {
        self.all();
    }
}

impl Handler<Endpoints> for Router {
    fn changed(&self, change: &Changed<Endpoints>) {
        for endpoints in change.before.iter().chain(&change.after).take(1) {
            let key = Key::of(&**endpoints);
            // Endpoints without a Service of ours are someone else's.
            let ours = self.known.services.get(&key).is_some_and(|service| candidate::selector(&service).is_some());
            if ours {
                self.queue.add(key);
            }
        }
    }

    fn replaced(&self) {
        self.all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_new_time_triggers() {
        let at = |second: i64| Timestamp::from_second(second).unwrap();
        let pods =
            |times: &[(&str, i64)]| times.iter().map(|(name, second)| ((*name).to_owned(), at(*second))).collect();
        let mut triggers = Triggers::default();
        assert_eq!(triggers.advance(Some(at(5)), pods(&[("a", 7)])), Some(at(5)));
        assert_eq!(triggers.advance(Some(at(5)), pods(&[("a", 7)])), None);
        assert_eq!(triggers.advance(Some(at(5)), pods(&[("a", 9), ("b", 8)])), Some(at(8)));
        assert_eq!(triggers.advance(Some(at(5)), pods(&[("b", 8)])), None);
    }
}
