//! The namespace controller: empties namespaces that are being deleted, and gives the others a ServiceAccount.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, PostParams};
use kube::discovery::{Discovery, Scope, verbs};
use kube::{Api, Client, ResourceExt as _};

use crate::cache::{Cache, Key};
use crate::informer::{Changed, Handler};
use crate::queue::WorkQueue;

const FINALIZER: &str = "kubernetes";
const DEFAULT_ACCOUNT: &str = "default";
/// Objects that one round deletes of one resource; the next round deletes the rest.
const DELETIONS_PER_ROUND_MAX: u32 = 500;

/// Why a namespace is not finished.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NamespaceError {
    #[error(transparent)]
    Api(#[from] kube::Error),
    /// Something waits for finalizers or a grace period.
    #[error("{remaining} objects are still there")]
    NotEmpty { remaining: usize },
}

/// The controller.
pub(crate) struct NamespaceController {
    pub(crate) client: Client,
    pub(crate) namespaces: Arc<Cache<Namespace>>,
}

impl NamespaceController {
    /// Brings one namespace further.
    pub(crate) async fn reconcile(&self, key: &Key) -> Result<(), NamespaceError> {
        let Some(namespace) = self.namespaces.get(key) else { return Ok(()) };
        if namespace.metadata.deletion_timestamp.is_none() {
            return Ok(self.ensure_account(&key.name).await?);
        }
        if !is_held(&namespace) {
            return Ok(());
        }
        match self.empty(&key.name).await? {
            0 => Ok(self.finalize(&namespace).await?),
            remaining => Err(NamespaceError::NotEmpty { remaining }),
        }
    }

    async fn ensure_account(&self, namespace: &str) -> Result<(), kube::Error> {
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        if api.get_metadata_opt(DEFAULT_ACCOUNT).await?.is_some() {
            return Ok(());
        }
        let mut account = ServiceAccount::default();
        account.metadata.name = Some(DEFAULT_ACCOUNT.to_owned());
        match api.create(&PostParams::default(), &account).await {
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Deletes what is in the namespace, and returns how much is still there.
    async fn empty(&self, namespace: &str) -> Result<usize, kube::Error> {
        let discovery = Discovery::new(self.client.clone()).run_aggregated().await?;
        let mut remaining = 0;
        for group in discovery.groups() {
            for (resource, capabilities) in group.recommended_resources() {
                let deletable =
                    capabilities.supports_operation(verbs::DELETE) && capabilities.supports_operation(verbs::LIST);
                if capabilities.scope == Scope::Namespaced && deletable {
                    remaining += self.empty_resource(namespace, &resource).await?;
                }
            }
        }
        Ok(remaining)
    }

    async fn empty_resource(&self, namespace: &str, resource: &ApiResource) -> Result<usize, kube::Error> {
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, resource);
        let page = ListParams::default().limit(DELETIONS_PER_ROUND_MAX);
        for object in api.list_metadata(&page).await?.items {
            if object.metadata.deletion_timestamp.is_some() {
                continue;
            }
            match api.delete(&object.name_any(), &DeleteParams::default()).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                outcome => drop(outcome?),
            }
        }
        Ok(api.list_metadata(&page).await?.items.len())
    }

    /// Takes our finalizer off, which lets the namespace go.
    async fn finalize(&self, namespace: &Namespace) -> Result<(), kube::Error> {
        let mut finalized = namespace.clone();
        if let Some(finalizers) = finalized.spec.as_mut().and_then(|spec| spec.finalizers.as_mut()) {
            finalizers.retain(|finalizer| finalizer != FINALIZER);
        }
        let name = namespace.name_any();
        let body = serde_json::to_vec(&finalized).map_err(kube::Error::SerdeError)?;
        let request = http::Request::put(format!("/api/v1/namespaces/{name}/finalize"))
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|error| kube::Error::BuildRequest(kube::core::request::Error::BuildRequest(error)))?;
        match self.client.request::<Namespace>(request).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            outcome => outcome.map(drop),
        }
    }
}

fn is_held(namespace: &Namespace) -> bool {
    let finalizers = namespace.spec.iter().flat_map(|spec| spec.finalizers.iter().flatten());
    finalizers.into_iter().any(|finalizer| finalizer == FINALIZER)
}

/// Queues namespaces that changed.
pub(crate) struct NamespaceRouter {
    pub(crate) namespaces: Arc<Cache<Namespace>>,
    pub(crate) queue: Arc<WorkQueue<Key>>,
}

impl Handler<Namespace> for NamespaceRouter {
    fn changed(&self, change: &Changed<Namespace>) {
        change.after.iter().for_each(|namespace| self.queue.add(Key::of(&**namespace)));
    }

    fn replaced(&self) {
        self.namespaces.keys().into_iter().for_each(|key| self.queue.add(key));
    }
}
