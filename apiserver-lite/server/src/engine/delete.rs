//! The verbs `delete` and `deletecollection`: grace periods, finalizers and preconditions.

use apiserver_machinery::field::FieldError;
use apiserver_machinery::meta;
use apiserver_machinery::schema::Resource;
use apiserver_machinery::status::{GroupResource, Status};
use apiserver_store::{Revision, StoreError};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::namespace::is_namespace;
use super::object::encode;
use super::read::{ListError, ListRequest};
use super::{Engine, Stored, Target, keys, strategy, unexpected};

const ATTEMPTS_MAX: usize = 8;

/// `metav1.DeleteOptions`.
#[derive(Clone, Debug, Default)]
pub(crate) struct DeleteOptions {
    pub(crate) grace_period_seconds: Option<i64>,
    pub(crate) propagation_policy: Option<String>,
    pub(crate) orphan_dependents: Option<bool>,
    pub(crate) uid: Option<String>,
    pub(crate) resource_version: Option<String>,
    pub(crate) dry_run: bool,
}

/// What a deletion did.
#[derive(Debug)]
pub(crate) enum Deletion {
    /// The object is gone; this was its last state.
    Removed(Stored),
    /// The object is marked and waits for its grace period or its finalizers.
    Marked(Stored),
}

impl DeleteOptions {
    /// Reads a decoded `DeleteOptions` body.
    pub(crate) fn from_object(object: &Value) -> Self {
        let text = |path: &[&str]| meta::value_at(object, path).and_then(Value::as_str).map(str::to_owned);
        Self {
            grace_period_seconds: object.get("gracePeriodSeconds").and_then(Value::as_i64),
            propagation_policy: text(&["propagationPolicy"]),
            orphan_dependents: object.get("orphanDependents").and_then(Value::as_bool),
            uid: text(&["preconditions", "uid"]),
            resource_version: text(&["preconditions", "resourceVersion"]),
            dry_run: object.get("dryRun").and_then(Value::as_array).is_some_and(|all| !all.is_empty()),
        }
    }

    /// Checks the options against each other.
    ///
    /// # Errors
    /// 422.
    pub(crate) fn validate(&self) -> Result<(), Status> {
        let mut errors = Vec::new();
        if self.propagation_policy.is_some() && self.orphan_dependents.is_some() {
            errors.push(FieldError::invalid(
                "propagationPolicy",
                self.propagation_policy.clone(),
                "orphanDependents and deletionPropagation cannot be both set",
            ));
        }
        if let Some(policy) = &self.propagation_policy
            && !matches!(policy.as_str(), "Background" | "Foreground" | "Orphan")
        {
            let supported = ["Background", "Foreground", "Orphan"];
            errors.push(FieldError::not_supported("propagationPolicy", policy.as_str(), &supported));
        }
        if errors.is_empty() {
            return Ok(());
        }
        Err(Status::invalid(GroupResource { group: "meta.k8s.io", resource: "DeleteOptions" }, "", &errors))
    }
}

impl Engine {
    /// Deletes one object, or marks it for deletion.
    ///
    /// # Errors
    /// 403 for namespaces that stay, 404, 409 for a precondition that does not hold.
    pub(crate) async fn delete(&self, target: &Target, options: &DeleteOptions) -> Result<Deletion, Status> {
        options.validate()?;
        Self::admit_deletion(target)?;
        for _ in 0..ATTEMPTS_MAX {
            if let Some(deletion) = self.try_delete(target, options).await? {
                return Ok(deletion);
            }
        }
        Err(Status::conflict_modified(target.resource.into(), &target.name))
    }

    async fn try_delete(&self, target: &Target, options: &DeleteOptions) -> Result<Option<Deletion>, Status> {
        let resource = keys::storage_resource(target.resource);
        let key = keys::object_key(resource, &target.namespace, &target.name);
        let read = self.store.get(&key, None).await.map_err(unexpected)?;
        let Some(entry) = read.entry else { return Err(target.not_found()) };
        let stored = Stored::from(entry);
        let object = stored.decode()?;
        check_preconditions(target, options, &object)?;
        match plan(resource, &object, options) {
            Plan::Nothing => Ok(Some(Deletion::Marked(stored))),
            Plan::Mark(marked) => self.mark(&key, &stored, &marked, options.dry_run).await,
            Plan::Remove if options.dry_run => Ok(Some(Deletion::Removed(stored))),
            Plan::Remove => {
                let expected = stored.revision.unwrap_or(Revision(0));
                let removed = self.remove(resource, &key, &object, expected).await?;
                Ok(removed.map(|revision| Deletion::Removed(Stored::new(stored.bytes, revision))))
            }
        }
    }

    async fn mark(
        &self,
        key: &str,
        stored: &Stored,
        marked: &Value,
        dry_run: bool,
    ) -> Result<Option<Deletion>, Status> {
        let bytes = encode(marked)?;
        let revision = stored.revision.unwrap_or(Revision(0));
        if dry_run || bytes == stored.bytes {
            return Ok(Some(Deletion::Marked(Stored::new(bytes, revision))));
        }
        match self.store.update(key, bytes.clone(), revision).await {
            Ok(revision) => Ok(Some(Deletion::Marked(Stored::new(bytes, revision)))),
            Err(StoreError::Conflict { .. }) => Ok(None),
            Err(error) => Err(unexpected(error)),
        }
    }

    /// Deletes every object that the request selects, one by one, and returns their last states.
    ///
    /// # Errors
    /// As [`Engine::delete`]; what was deleted before the error stays deleted.
    pub(crate) async fn delete_collection(
        &self,
        target: &Target,
        request: &ListRequest,
        options: &DeleteOptions,
    ) -> Result<Vec<Stored>, ListError> {
        let listing = self.list(target, request).await?;
        let mut deleted = Vec::with_capacity(listing.items.len());
        for item in listing.items {
            let object = item.decode()?;
            let one = Target {
                resource: target.resource,
                namespace: meta::namespace(&object).to_owned(),
                name: meta::name(&object).to_owned(),
            };
            match self.delete(&one, options).await {
                Ok(Deletion::Removed(_) | Deletion::Marked(_)) => deleted.push(item),
                Err(status) if status.reason == "NotFound" => {}
                Err(status) => return Err(status.into()),
            }
        }
        Ok(deleted)
    }
}

/// What a deletion does to an object in its present state.
#[derive(Debug, PartialEq)]
enum Plan {
    /// It is waiting already.
    Nothing,
    /// Write this and wait.
    Mark(Value),
    /// Remove it.
    Remove,
}

fn plan(resource: &Resource, object: &Value, options: &DeleteOptions) -> Plan {
    if is_namespace(resource) {
        return plan_namespace(object);
    }
    if meta::deletion_timestamp(object).is_some() {
        return plan_again(object, options.grace_period_seconds);
    }
    // `propagationPolicy` sets no finalizer: without a garbage collector nothing would ever take it off again. kube-apiserver does the
    // same where garbage collection is turned off.
    let held = meta::finalizers(object).next().is_some();
    let grace = strategy::grace_period_seconds(resource, object, options.grace_period_seconds).unwrap_or(0);
    if grace == 0 && !held {
        return Plan::Remove;
    }
    let mut marked = object.clone();
    set_deadline(&mut marked, Timestamp::now(), grace);
    if meta::generation(object) > 0 {
        meta::set(&mut marked, "generation", meta::generation(object) + 1);
    }
    Plan::Mark(marked)
}

/// A deletion of what is being deleted can only make it go sooner.
fn plan_again(object: &Value, requested: Option<i64>) -> Plan {
    let pending = meta::finalizers(object).next().is_some();
    let current = meta::deletion_grace_period_seconds(object).unwrap_or(0);
    let wanted = requested.map(|seconds| if seconds < 0 { 1 } else { seconds });
    match wanted {
        _ if current == 0 && pending => Plan::Nothing,
        _ if current == 0 => Plan::Remove,
        Some(0) if !pending => Plan::Remove,
        Some(seconds) if seconds < current => {
            let mut marked = object.clone();
            let began = meta::deletion_timestamp(object).and_then(meta::parse_time).unwrap_or_else(Timestamp::now)
                - SignedDuration::from_secs(current);
            let ended = began + SignedDuration::from_secs(seconds) <= Timestamp::now();
            let from = if ended { Timestamp::now() } else { began };
            set_deadline(&mut marked, from, if ended { seconds.min(1) } else { seconds });
            Plan::Mark(marked)
        }
        _ => Plan::Nothing,
    }
}

/// A Namespace goes in two steps: first it terminates, and when its content is gone its own finalizers let it go.
fn plan_namespace(object: &Value) -> Plan {
    let waiting = meta::deletion_timestamp(object).is_some();
    let held = has_namespace_finalizers(object) || meta::finalizers(object).next().is_some();
    match (waiting, held) {
        (true, true) => Plan::Nothing,
        (true, false) => Plan::Remove,
        (false, _) => {
            let mut marked = object.clone();
            meta::set(&mut marked, "deletionTimestamp", meta::format_time(Timestamp::now()));
            if let Some(status) = marked.get_mut("status").and_then(Value::as_object_mut) {
                status.insert("phase".to_owned(), json!("Terminating"));
            }
            Plan::Mark(marked)
        }
    }
}

/// Whether a Namespace still has something in `spec.finalizers`.
pub(super) fn has_namespace_finalizers(object: &Value) -> bool {
    meta::value_at(object, &["spec", "finalizers"]).and_then(Value::as_array).is_some_and(|all| !all.is_empty())
}

fn set_deadline(object: &mut Value, from: Timestamp, grace_seconds: i64) {
    let deadline = from + SignedDuration::from_secs(grace_seconds);
    meta::set(object, "deletionTimestamp", meta::format_time(deadline));
    meta::set(object, "deletionGracePeriodSeconds", grace_seconds);
}

fn check_preconditions(target: &Target, options: &DeleteOptions, object: &Value) -> Result<(), Status> {
    let stale = |what: &str, sent: &str, stored: &str, guess: &str| {
        let cause =
            format!("the {what} in the precondition ({sent}) does not match the {what} in record ({stored}). {guess}");
        Err(Status::conflict(target.resource.into(), &target.name, cause))
    };
    if let Some(uid) = options.uid.as_deref().filter(|uid| *uid != meta::uid(object)) {
        return stale("UID", uid, meta::uid(object), "The object might have been deleted and then recreated");
    }
    if let Some(version) =
        options.resource_version.as_deref().filter(|version| *version != meta::resource_version(object))
    {
        return stale(
            "ResourceVersion",
            version,
            meta::resource_version(object),
            "The object might have been modified",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use apiserver_machinery::schema::registry;

    use super::*;

    fn resource(plural: &str) -> &'static Resource {
        registry().resource("", "v1", plural).unwrap()
    }

    fn bound_pod() -> Value {
        json!({"metadata": {"name": "p", "generation": 1}, "spec": {"nodeName": "n"}})
    }

    #[test]
    fn what_is_not_held_is_removed() {
        assert_eq!(plan(resource("configmaps"), &json!({"metadata": {}}), &DeleteOptions::default()), Plan::Remove);
        let unbound = json!({"metadata": {}, "spec": {}});
        assert_eq!(plan(resource("pods"), &unbound, &DeleteOptions::default()), Plan::Remove);
    }

    #[test]
    fn a_bound_pod_waits_until_it_is_deleted_with_grace_zero() {
        let Plan::Mark(marked) = plan(resource("pods"), &bound_pod(), &DeleteOptions::default()) else {
            panic!("not marked")
        };
        assert_eq!(meta::deletion_grace_period_seconds(&marked), Some(30));
        assert_eq!(meta::generation(&marked), 2);
        assert_eq!(plan(resource("pods"), &marked, &DeleteOptions::default()), Plan::Nothing);
        let now = DeleteOptions { grace_period_seconds: Some(0), ..DeleteOptions::default() };
        assert_eq!(plan(resource("pods"), &marked, &now), Plan::Remove);
        let shorter = DeleteOptions { grace_period_seconds: Some(5), ..DeleteOptions::default() };
        let Plan::Mark(shortened) = plan(resource("pods"), &marked, &shorter) else { panic!("not shortened") };
        assert_eq!(meta::deletion_grace_period_seconds(&shortened), Some(5));
    }

    #[test]
    fn finalizers_hold_an_object() {
        let held = json!({"metadata": {"finalizers": ["x/y"]}});
        let Plan::Mark(marked) = plan(resource("configmaps"), &held, &DeleteOptions::default()) else {
            panic!("not marked")
        };
        assert!(meta::deletion_timestamp(&marked).is_some());
        assert_eq!(plan(resource("configmaps"), &marked, &DeleteOptions::default()), Plan::Nothing);
    }

    #[test]
    fn a_namespace_terminates_first() {
        let active = json!({"metadata": {}, "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}});
        let Plan::Mark(marked) = plan(resource("namespaces"), &active, &DeleteOptions::default()) else {
            panic!("not marked")
        };
        assert_eq!(marked["status"]["phase"], "Terminating");
        assert_eq!(plan(resource("namespaces"), &marked, &DeleteOptions::default()), Plan::Nothing);
    }
}
