//! The generic REST engine: one implementation of every verb for every kind, over a [`Store`].
//!
//! What differs between kinds is data ([`strategy`]) or one of three hooks: namespaces end in two steps, Services own addresses and
//! ports, and both Event APIs show the same objects.

mod continuation;
mod create;
mod delete;
mod events;
mod keys;
mod namespace;
mod object;
mod read;
mod replace;
mod selection;
mod strategy;
mod update;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use apiserver_machinery::meta;
use apiserver_machinery::schema::Resource;
use apiserver_machinery::status::Status;
use apiserver_store::{Revision, Store, StoreError};
use jiff::Timestamp;

use crate::service::ServiceAllocator;

pub(crate) use delete::{DeleteOptions, Deletion};
pub(crate) use events::{from_storage, is_converted};
pub(crate) use keys::resource_prefix;
pub(crate) use object::{Stored, encode, partial_metadata, put_decimal};
pub(crate) use read::{ListError, ListRequest, Listing, VersionMatch};
pub(crate) use replace::{Replacement, check_names};
pub(crate) use selection::Selection;
pub(crate) use update::{Change, Part, Updated};
pub(crate) use watch::{EventEncoder, WatchRequest, WatchStep, WatchStream, bookmark_object};

/// How long a request waits for a revision that the store has not reached, as the watch cache of kube-apiserver does.
const FRESHNESS_WAIT_MAX: Duration = Duration::from_secs(3);

/// What a request is about.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// The resource that the path names.
    pub(crate) resource: &'static Resource,
    /// Empty for cluster-scoped resources and for requests over all namespaces.
    pub(crate) namespace: String,
    /// Empty for requests on a collection.
    pub(crate) name: String,
}

impl Target {
    /// 404 for the object.
    pub(crate) fn not_found(&self) -> Status {
        Status::not_found(self.resource.into(), &self.name)
    }
}

/// Everything that the verbs share.
pub(crate) struct Engine {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) services: ServiceAllocator,
}

impl Engine {
    pub(crate) fn new(store: Arc<dyn Store>, services: ServiceAllocator) -> Self {
        Self { store, services }
    }

    /// Whether `DELETE` answers with the object that it removed.
    pub(crate) fn returns_deleted_object(resource: &Resource) -> bool {
        strategy::returns_deleted_object(resource)
    }

    /// Waits until the store has reached `revision`, for at most [`FRESHNESS_WAIT_MAX`].
    ///
    /// # Errors
    /// 504 when it has not.
    pub(crate) async fn wait_for(&self, revision: Revision) -> Result<(), Status> {
        let deadline = tokio::time::Instant::now() + FRESHNESS_WAIT_MAX;
        loop {
            let current = self.store.revision().await.map_err(unexpected)?;
            if current >= revision {
                return Ok(());
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(Status::too_large_resource_version(revision.0, current.0));
            }
            // A future revision is a client's mistake or another server's number; polling keeps the common path free of waiters.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// The time that goes into objects, in whole seconds of UTC.
fn now_text() -> String {
    meta::format_time(Timestamp::now())
}

/// A store failure that says nothing about the request.
fn unexpected(error: StoreError) -> Status {
    match error {
        StoreError::Full { .. } | StoreError::TooManyWatches { .. } => Status::too_many_requests(error.to_string(), 5),
        StoreError::Future { requested, current } => Status::too_large_resource_version(requested.0, current.0),
        StoreError::Compacted { .. } => Status::expired(LIST_TOO_OLD),
        StoreError::Conflict { .. } => Status::internal(error),
    }
}

const LIST_TOO_OLD: &str = "The resourceVersion for the provided list is too old.";
