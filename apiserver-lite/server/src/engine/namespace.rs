//! Namespace lifecycle: what may be made where, and which namespaces stay.

use apiserver_machinery::schema::{Resource, registry};
use apiserver_machinery::status::{Cause, GroupResource, Status};
use serde::Deserialize;

use super::{Engine, Target, keys, unexpected};

const NAMESPACES: GroupResource<'static> = GroupResource { group: "", resource: "namespaces" };

/// Namespaces that the admission plugin NamespaceLifecycle of kube-apiserver does not let go.
const IMMORTAL: [&str; 3] = ["default", "kube-public", "kube-system"];

#[derive(Deserialize)]
struct Lifecycle {
    metadata: LifecycleMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LifecycleMetadata {
    deletion_timestamp: Option<String>,
}

impl Engine {
    /// Checks that an object may be made in its namespace.
    ///
    /// # Errors
    /// 404 where the namespace does not exist, 403 where it is being deleted.
    pub(super) async fn admit_creation(&self, target: &Target, name: &str) -> Result<(), Status> {
        if !target.resource.namespaced {
            return Ok(());
        }
        let namespace = &target.namespace;
        let Some(resource) = namespaces() else { return Ok(()) };
        let read = self.store.get(&keys::object_key(resource, "", namespace), None).await.map_err(unexpected)?;
        let Some(entry) = read.entry else { return Err(Status::not_found(NAMESPACES, namespace)) };
        let lifecycle: Lifecycle = serde_json::from_slice(&entry.value).map_err(Status::internal)?;
        if lifecycle.metadata.deletion_timestamp.is_some() {
            return Err(terminating(target.resource, namespace, name));
        }
        Ok(())
    }

    /// Checks that an object may be deleted.
    ///
    /// # Errors
    /// 403 for the namespaces that every cluster has.
    pub(super) fn admit_deletion(target: &Target) -> Result<(), Status> {
        if is_namespace(target.resource) && IMMORTAL.contains(&target.name.as_str()) {
            return Err(Status::forbidden(NAMESPACES, &target.name, "this namespace may not be deleted"));
        }
        Ok(())
    }
}

/// Whether the resource is `namespaces`.
pub(super) fn is_namespace(resource: &Resource) -> bool {
    resource.group.is_empty() && resource.plural == "namespaces"
}

fn namespaces() -> Option<&'static Resource> {
    registry().resource("", "v1", "namespaces")
}

fn terminating(resource: &Resource, namespace: &str, name: &str) -> Status {
    let text = format!("unable to create new content in namespace {namespace} because it is being terminated");
    let mut status = Status::forbidden(resource.into(), name, text);
    if let Some(details) = &mut status.details {
        details.causes.push(Cause {
            reason: "NamespaceTerminating".to_owned(),
            message: format!("namespace {namespace} is being terminated"),
            field: "metadata.namespace".to_owned(),
        });
    }
    status
}
