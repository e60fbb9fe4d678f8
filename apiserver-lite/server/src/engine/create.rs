//! The verb `create`.

use apiserver_machinery::meta;
use apiserver_machinery::schema::Resource;
use apiserver_machinery::status::Status;
use apiserver_machinery::{defaults, validation};
use apiserver_store::StoreError;
use serde_json::Value;

use super::object::encode;
use super::{Engine, Stored, Target, events, keys, now_text, strategy, unexpected};

/// How many names are tried for a `generateName`, as in kube-apiserver.
const GENERATED_NAMES_MAX: usize = 8;

impl Engine {
    /// Creates an object that was decoded for `target.resource`; `target.name` is not used.
    ///
    /// # Errors
    /// 400, 403, 404 for what does not fit the request or the namespace, 409 for a name in use, 422 for an invalid object.
    pub(crate) async fn create(&self, target: &Target, mut object: Value, dry_run: bool) -> Result<Stored, Status> {
        match_namespace(target, &mut object)?;
        refuse_resource_version(&object)?;
        self.admit_creation(target, meta::name(&object)).await?;
        if !meta::name(&object).is_empty() || meta::generate_name_base(&object).is_empty() {
            return self.create_named(target.resource, object, dry_run).await;
        }
        self.create_generated(target.resource, object, dry_run).await
    }

    async fn create_generated(
        &self,
        resource: &'static Resource,
        object: Value,
        dry_run: bool,
    ) -> Result<Stored, Status> {
        let mut name = String::new();
        for _ in 0..GENERATED_NAMES_MAX {
            name = meta::generate_name(meta::generate_name_base(&object), || fastrand::u32(..));
            let mut named = object.clone();
            meta::set(&mut named, "name", name.as_str());
            match self.create_named(resource, named, dry_run).await {
                Err(status) if status.reason == "AlreadyExists" => {}
                outcome => return outcome,
            }
        }
        Err(Status::generate_name_conflict(resource.into(), &name, 1))
    }

    async fn create_named(&self, resource: &'static Resource, object: Value, dry_run: bool) -> Result<Stored, Status> {
        let mut object = events::to_storage(resource, object);
        let resource = keys::storage_resource(resource);
        stamp(&mut object);
        strategy::prepare_create(resource, &mut object);
        defaults::apply(resource, &mut object);
        let reservation = self.reserve_for_create(resource, &mut object, dry_run).await?;
        let outcome = self.validate_and_write(resource, &object, dry_run).await;
        self.settle(reservation, outcome.is_ok()).await;
        outcome
    }

    async fn validate_and_write(&self, resource: &Resource, object: &Value, dry_run: bool) -> Result<Stored, Status> {
        let name = meta::name(object);
        let errors = validation::validate_create(resource, object);
        if !errors.is_empty() {
            return Err(Status::invalid_object(resource, name, &errors));
        }
        let key = keys::object_key(resource, meta::namespace(object), name);
        let bytes = encode(object)?;
        if dry_run {
            let read = self.store.get(&key, None).await.map_err(unexpected)?;
            let free = read.entry.is_none();
            return free
                .then_some(Stored { bytes, revision: None })
                .ok_or_else(|| Status::already_exists(resource.into(), name));
        }
        match self.store.create(&key, bytes.clone()).await {
            Ok(revision) => Ok(Stored::new(bytes, revision)),
            Err(StoreError::Conflict { .. }) => Err(Status::already_exists(resource.into(), name)),
            Err(error) => Err(unexpected(error)),
        }
    }
}

/// Gives the object the namespace of the request, or refuses another one.
pub(super) fn match_namespace(target: &Target, object: &mut Value) -> Result<(), Status> {
    let given = meta::namespace(object);
    if given == target.namespace {
        return Ok(());
    }
    if target.namespace.is_empty() {
        meta::remove(object, "namespace");
        return Ok(());
    }
    if given.is_empty() {
        meta::set(object, "namespace", target.namespace.as_str());
        return Ok(());
    }
    Err(Status::bad_request("the namespace of the provided object does not match the namespace sent on the request"))
}

fn refuse_resource_version(object: &Value) -> Result<(), Status> {
    if matches!(meta::resource_version(object), "" | "0") {
        return Ok(());
    }
    // kube-apiserver answers this one without a reason.
    let message = "resourceVersion should not be set on objects to be created".to_owned();
    Err(Status { code: 500, reason: "", message, details: None })
}

/// Sets what only the server may say about a new object.
fn stamp(object: &mut Value) {
    for key in ["deletionTimestamp", "deletionGracePeriodSeconds", "resourceVersion", "selfLink", "managedFields"] {
        meta::remove(object, key);
    }
    meta::set(object, "uid", uuid::Uuid::new_v4().to_string());
    meta::set(object, "creationTimestamp", now_text());
}
