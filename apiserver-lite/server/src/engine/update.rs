//! The verbs `update` and `patch`: read, change, check and write again until no one else wrote in between.

use apiserver_machinery::meta;
use apiserver_machinery::schema::Resource;
use apiserver_machinery::status::Status;
use apiserver_machinery::{defaults, field::FieldError, validation};
use apiserver_store::{Revision, StoreError};
use serde_json::Value;

use super::create::match_namespace;
use super::object::encode;
use super::{Engine, Stored, Target, events, keys, strategy, unexpected};

/// How often a change is tried again when others write the same object; kube-apiserver patches five times.
const ATTEMPTS_MAX: usize = 8;

/// Which part of an object a request may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Everything but what `/status` owns.
    Main,
    /// `/status`.
    Status,
    /// `/finalize` of a Namespace.
    Finalize,
}

/// A requested change: from the object as the client's API shows it to the object that it should become.
pub(crate) trait Change: Send + Sync {
    /// Makes the new object. Called once per attempt.
    ///
    /// # Errors
    /// Whatever makes the change impossible for this object.
    fn apply(&self, current: &Value) -> Result<Value, Status>;

    /// Whether the change can be made again to what someone else wrote meanwhile, as a patch can.
    fn is_repeatable(&self) -> bool;

    /// The object to create where none exists, for a `PUT` of a kind that allows it.
    fn object_to_create(&self) -> Option<Value>;
}

/// What an update did.
#[derive(Debug)]
pub(crate) struct Updated {
    pub(crate) stored: Stored,
    pub(crate) created: bool,
}

impl Engine {
    /// Applies a change to the object of `target`.
    ///
    /// # Errors
    /// 404, 409 for an outdated `resourceVersion` or `uid`, 422 for an invalid outcome, and what the change itself refuses.
    pub(crate) async fn update(
        &self,
        target: &Target,
        part: Part,
        change: &dyn Change,
        dry_run: bool,
    ) -> Result<Updated, Status> {
        for _ in 0..ATTEMPTS_MAX {
            if let Some(updated) = self.try_update(target, part, change, dry_run).await? {
                return Ok(updated);
            }
        }
        Err(Status::conflict_modified(target.resource.into(), &target.name))
    }

    /// One attempt; `None` when someone else wrote the object meanwhile.
    async fn try_update(
        &self,
        target: &Target,
        part: Part,
        change: &dyn Change,
        dry_run: bool,
    ) -> Result<Option<Updated>, Status> {
        let resource = keys::storage_resource(target.resource);
        let key = keys::object_key(resource, &target.namespace, &target.name);
        let Some(entry) = self.store.get(&key, None).await.map_err(unexpected)?.entry else {
            return self.create_instead(target, part, change, dry_run).await.map(Some);
        };
        let old = Stored::from(entry.clone()).decode()?;
        let mut new = change.apply(&events::from_storage(target.resource, old.clone()))?;
        match_namespace(target, &mut new)?;
        let mut new = events::to_storage(target.resource, new);
        let unconditional = check_versions(target, &new, &old)?;
        prepare(resource, part, &mut new, &old);
        defaults::apply(resource, &mut new);
        let reservation = self.reserve_for_update(resource, part, &mut new, &old, dry_run).await?;
        let attempt =
            Attempt { resource, part, key: &key, old: &old, old_bytes: &entry.value, revision: entry.mod_revision };
        let outcome = self.validate_and_replace(&attempt, &new, dry_run).await;
        let written = matches!(outcome, Ok(Some(_)));
        self.settle(reservation, written).await;
        match outcome? {
            Some(stored) => Ok(Some(Updated { stored, created: false })),
            None if unconditional || change.is_repeatable() => Ok(None),
            None => Err(Status::conflict_modified(target.resource.into(), &target.name)),
        }
    }

    async fn create_instead(
        &self,
        target: &Target,
        part: Part,
        change: &dyn Change,
        dry_run: bool,
    ) -> Result<Updated, Status> {
        let object = change.object_to_create();
        let allowed = part == Part::Main && strategy::allows_create_on_update(target.resource);
        match object {
            Some(mut object) if allowed => {
                meta::remove(&mut object, "resourceVersion");
                let stored = self.create(target, object, dry_run).await?;
                Ok(Updated { stored, created: true })
            }
            _ => Err(target.not_found()),
        }
    }

    async fn validate_and_replace(
        &self,
        attempt: &Attempt<'_>,
        new: &Value,
        dry_run: bool,
    ) -> Result<Option<Stored>, Status> {
        let errors = match attempt.part {
            Part::Main => validation::validate_update(attempt.resource, new, attempt.old),
            Part::Status => validation::validate_status_update(attempt.resource, new, attempt.old),
            Part::Finalize => Vec::new(),
        };
        if !errors.is_empty() {
            return Err(Status::invalid_object(attempt.resource, meta::name(attempt.old), &errors));
        }
        let bytes = encode(new)?;
        if dry_run {
            return Ok(Some(Stored::new(bytes, attempt.revision)));
        }
        if is_finally_gone(attempt.resource, new) {
            let removed = self.remove(attempt.resource, attempt.key, new, attempt.revision).await?;
            return Ok(removed.map(|revision| Stored::new(bytes, revision)));
        }
        if bytes == *attempt.old_bytes {
            // Nothing changed: no write, no event, the same resourceVersion.
            return Ok(Some(Stored::new(bytes, attempt.revision)));
        }
        match self.store.update(attempt.key, bytes.clone(), attempt.revision).await {
            Ok(revision) => Ok(Some(Stored::new(bytes, revision))),
            Err(StoreError::Conflict { .. }) => Ok(None),
            Err(error) => Err(unexpected(error)),
        }
    }

    /// Removes an object from the store and frees what it owned; `None` when someone else wrote it meanwhile.
    pub(super) async fn remove(
        &self,
        resource: &Resource,
        key: &str,
        object: &Value,
        expected: Revision,
    ) -> Result<Option<Revision>, Status> {
        match self.store.delete(key, expected).await {
            Ok(revision) => {
                self.release_deleted(resource, object).await;
                Ok(Some(revision))
            }
            Err(StoreError::Conflict { .. }) => Ok(None),
            Err(error) => Err(unexpected(error)),
        }
    }
}

/// What one attempt works on.
struct Attempt<'a> {
    resource: &'static Resource,
    part: Part,
    key: &'a str,
    old: &'a Value,
    old_bytes: &'a [u8],
    revision: Revision,
}

/// Checks `uid` and `resourceVersion` of the sent object against the stored one, and returns whether the client left the version open.
fn check_versions(target: &Target, new: &Value, old: &Value) -> Result<bool, Status> {
    let resource = target.resource;
    let (sent, stored) = (meta::uid(new), meta::uid(old));
    if !sent.is_empty() && sent != stored {
        let cause = format!("Precondition failed: UID in precondition: {sent}, UID in object meta: {stored}");
        return Err(Status::conflict(resource.into(), &target.name, cause));
    }
    match meta::resource_version(new) {
        "" | "0" if strategy::allows_unconditional_update(resource) => Ok(true),
        "" | "0" => {
            let error = FieldError::invalid("metadata.resourceVersion", 0, "must be specified for an update");
            Err(Status::invalid_object(resource, &target.name, &[error]))
        }
        version if version == meta::resource_version(old) => Ok(false),
        version if version.parse::<u64>().is_err() => Err(bad_version(resource, &target.name, version)),
        _ => Err(Status::conflict_modified(resource.into(), &target.name)),
    }
}

fn bad_version(resource: &Resource, name: &str, version: &str) -> Status {
    let detail = format!("strconv.ParseUint: parsing {}: invalid syntax", apiserver_machinery::field::quote(version));
    let error = FieldError::invalid("metadata.resourceVersion", version, detail);
    Status::invalid_object(resource, name, &[error])
}

/// Keeps what this part of an update may not change.
fn prepare(resource: &Resource, part: Part, new: &mut Value, old: &Value) {
    match part {
        Part::Main => strategy::prepare_update(resource, new, old),
        Part::Status => strategy::prepare_status_update(new, old),
        Part::Finalize => strategy::prepare_finalize_update(new, old),
    }
    for key in ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        match meta::metadata(old).and_then(|metadata| metadata.get(key)) {
            Some(value) => meta::set(new, key, value.clone()),
            None => {
                meta::remove(new, key);
            }
        }
    }
    for key in ["resourceVersion", "selfLink", "managedFields"] {
        meta::remove(new, key);
    }
}

/// Whether an update leaves an object that was only waiting for its last finalizer.
fn is_finally_gone(resource: &Resource, object: &Value) -> bool {
    let waiting = meta::deletion_timestamp(object).is_some() && meta::finalizers(object).next().is_none();
    if super::namespace::is_namespace(resource) {
        return waiting && !super::delete::has_namespace_finalizers(object);
    }
    waiting && meta::deletion_grace_period_seconds(object).unwrap_or(0) == 0
}
