//! The verbs over HTTP: from method, parameters and body to the engine, and back.

use std::sync::Arc;
use std::time::Duration;

use apiserver_machinery::decode::{self, Decoded, FieldValidation, Format};
use apiserver_machinery::meta;
use apiserver_machinery::schema::registry;
use apiserver_machinery::status::Status;
use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, Method, Response};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::accept;
use super::changes::{Patch, PatchForm};
use super::query::{Query, check_dry_run};
use super::response::{self, Body};
use super::view::{Presenter, WatchPresenter};
use crate::engine::{
    Change, DeleteOptions, Deletion, Engine, ListError, Listing, Part, Replacement, Stored, Target, Updated,
    WatchRequest, WatchStep, WatchStream,
};

/// The shortest time that a watch without `timeoutSeconds` lasts; the longest is twice that (as in kube-apiserver).
const WATCH_SECONDS_MIN: u64 = 1_800;

/// A request on a resource. The body has been read.
pub(crate) struct ResourceRequest {
    pub(crate) method: Method,
    pub(crate) target: Target,
    pub(crate) part: Part,
    pub(crate) query: Query,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// The verb that a request means, for limits, metrics and errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Verb {
    Get,
    List,
    Watch,
    Create,
    Update,
    Patch,
    Delete,
    DeleteCollection,
}

impl Verb {
    /// Reads the verb off a request; `None` for a method that means nothing here.
    pub(crate) fn of(method: &Method, target: &Target, query: &Query) -> Option<Self> {
        let collection = target.name.is_empty();
        match *method {
            Method::GET | Method::HEAD if query.flag("watch") == Some(true) => Some(Self::Watch),
            Method::GET | Method::HEAD if collection => Some(Self::List),
            Method::GET | Method::HEAD => Some(Self::Get),
            Method::POST if collection => Some(Self::Create),
            Method::PUT if !collection => Some(Self::Update),
            Method::PATCH if !collection => Some(Self::Patch),
            Method::DELETE if collection => Some(Self::DeleteCollection),
            Method::DELETE => Some(Self::Delete),
            _ => None,
        }
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
            Self::DeleteCollection => "deletecollection",
        }
    }

    /// Whether the verb only reads.
    pub(crate) fn is_read_only(self) -> bool {
        matches!(self, Self::Get | Self::List | Self::Watch)
    }
}

impl ResourceRequest {
    /// Checks that the resource offers the verb in this place.
    ///
    /// # Errors
    /// 405.
    pub(crate) fn check_verb(&self, verb: Option<Verb>) -> Result<Verb, Status> {
        let refused = || Status::method_not_allowed_here();
        let verb = verb.ok_or_else(refused)?;
        let resource = self.target.resource;
        let offered = match self.part {
            Part::Main => resource.has_verb(verb.as_str()),
            Part::Status => matches!(verb, Verb::Get | Verb::Update | Verb::Patch),
            Part::Finalize => verb == Verb::Update,
        };
        // Objects are made inside one namespace, and namespaces are emptied one by one.
        let needs_namespace = matches!(verb, Verb::Create | Verb::DeleteCollection);
        if !offered || (needs_namespace && resource.namespaced && self.target.namespace.is_empty()) {
            return Err(refused());
        }
        Ok(verb)
    }

    /// Runs every verb but watch.
    ///
    /// # Errors
    /// The Status to answer with, and the token of an expired list.
    pub(crate) async fn run(self, verb: Verb, engine: &Arc<Engine>) -> Result<Response<Body>, ListError> {
        let presenter = self.presenter()?;
        match verb {
            Verb::Get => {
                let stored = engine.get(&self.target, self.query.revision()?).await?;
                Ok(presenter.object(200, &stored)?)
            }
            Verb::List => {
                let request = self.query.list_request(&self.target)?;
                Ok(presenter.list(engine.list(&self.target, &request).await?)?)
            }
            Verb::Create => Ok(self.create(engine, presenter).await?),
            Verb::Update => Ok(self.replace(engine, presenter).await?),
            Verb::Patch => Ok(self.patch(engine, presenter).await?),
            Verb::Delete => Ok(self.delete(engine, presenter).await?),
            Verb::DeleteCollection => self.delete_collection(engine, presenter).await,
            Verb::Watch => Err(Status::method_not_allowed_here().into()),
        }
    }

    fn presenter(&self) -> Result<Presenter, Status> {
        let view = accept::view(&self.headers)?;
        Ok(Presenter { resource: self.target.resource, view, include: self.query.include_object()? })
    }

    fn decode(&self, options_kind: &str) -> Result<Decoded, Status> {
        let format = accept::body_format(&self.headers)?;
        decode::object(&self.body, format, self.target.resource, self.query.field_validation(options_kind)?)
    }

    async fn create(&self, engine: &Arc<Engine>, presenter: Presenter) -> Result<Response<Body>, Status> {
        let dry_run = self.query.dry_run("CreateOptions")?;
        let Decoded { object, warnings } = self.decode("CreateOptions")?;
        let (engine, target) = (Arc::clone(engine), self.target.clone());
        let stored = uncancelled(async move { engine.create(&target, object, dry_run).await }).await?;
        let mut response = presenter.object(201, &stored)?;
        response::warn(&mut response, &warnings);
        Ok(response)
    }

    async fn replace(&self, engine: &Arc<Engine>, presenter: Presenter) -> Result<Response<Body>, Status> {
        let dry_run = self.query.dry_run("UpdateOptions")?;
        let Decoded { object, warnings } = self.decode("UpdateOptions")?;
        let change = Arc::new(Replacement::new(&self.target, object)?);
        let updated = self.update(engine, change, dry_run).await?;
        let mut response = presenter.object(if updated.created { 201 } else { 200 }, &updated.stored)?;
        response::warn(&mut response, &warnings);
        Ok(response)
    }

    async fn patch(&self, engine: &Arc<Engine>, presenter: Presenter) -> Result<Response<Body>, Status> {
        let dry_run = self.query.dry_run("PatchOptions")?;
        let form = PatchForm::of(accept::content_type(&self.headers))?;
        let validation = self.query.field_validation("PatchOptions")?;
        let Decoded { object: document, mut warnings } = decode::patch(&self.body, Format::Json, validation)?;
        let change = Arc::new(Patch::new(self.target.clone(), form, document, validation));
        let updated = self.update(engine, Arc::clone(&change), dry_run).await?;
        let mut response = presenter.object(200, &updated.stored)?;
        warnings.extend(change.take_warnings());
        response::warn(&mut response, &warnings);
        Ok(response)
    }

    async fn update<C: Change + 'static>(
        &self,
        engine: &Arc<Engine>,
        change: Arc<C>,
        dry_run: bool,
    ) -> Result<Updated, Status> {
        let (engine, target, part) = (Arc::clone(engine), self.target.clone(), self.part);
        uncancelled(async move { engine.update(&target, part, &*change, dry_run).await }).await
    }

    async fn delete(&self, engine: &Arc<Engine>, presenter: Presenter) -> Result<Response<Body>, Status> {
        let options = self.delete_options()?;
        let (shared, target) = (Arc::clone(engine), self.target.clone());
        let deletion = uncancelled(async move { shared.delete(&target, &options).await }).await?;
        let (stored, removed) = match &deletion {
            Deletion::Removed(stored) => (stored, true),
            Deletion::Marked(stored) => (stored, false),
        };
        if !removed || Engine::returns_deleted_object(self.target.resource) {
            return presenter.object(200, stored);
        }
        let object = stored.decode()?;
        let status = Status::success(self.target.resource.into(), &self.target.name, meta::uid(&object));
        Ok(response::json(200, &status))
    }

    async fn delete_collection(&self, engine: &Arc<Engine>, presenter: Presenter) -> Result<Response<Body>, ListError> {
        let options = self.delete_options()?;
        let request = self.query.list_request(&self.target)?;
        let (shared, target) = (Arc::clone(engine), self.target.clone());
        let deleted: Vec<Stored> =
            uncancelled(async move { shared.delete_collection(&target, &request, &options).await }).await?;
        let revision = engine.store.revision().await.map_err(Status::internal)?;
        Ok(presenter.list(Listing { items: deleted, revision, token: String::new(), remaining: None })?)
    }

    fn delete_options(&self) -> Result<DeleteOptions, Status> {
        if self.body.is_empty() {
            return self.delete_options_of_query();
        }
        let format = accept::body_format(&self.headers)?;
        let ty = registry().type_by_name("meta.v1", "DeleteOptions").ok_or_else(Status::path_not_found)?;
        let object = decode::typed(&self.body, format, ty, FieldValidation::Ignore)?.object;
        let dry_run: Vec<&str> =
            object.get("dryRun").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
        check_dry_run(&dry_run, "DeleteOptions")?;
        Ok(DeleteOptions::from_object(&object))
    }

    fn delete_options_of_query(&self) -> Result<DeleteOptions, Status> {
        let policy = self.query.text("propagationPolicy");
        Ok(DeleteOptions {
            grace_period_seconds: self.query.number("gracePeriodSeconds")?,
            propagation_policy: (!policy.is_empty()).then(|| policy.to_owned()),
            orphan_dependents: self.query.flag("orphanDependents"),
            dry_run: self.query.dry_run("DeleteOptions")?,
            ..DeleteOptions::default()
        })
    }

    /// Starts a watch; `slot` is held as long as it lasts, and `shutdown` ends it.
    ///
    /// # Errors
    /// 400, 406 and 422 for what is known to be wrong before the stream begins.
    pub(crate) async fn watch(
        self,
        engine: &Arc<Engine>,
        slot: OwnedSemaphorePermit,
        shutdown: watch::Receiver<bool>,
    ) -> Result<Response<Body>, Status> {
        let presenter = self.presenter()?;
        self.query.check_watch()?;
        let request = WatchRequest {
            selection: self.query.selection(&self.target)?,
            revision: self.watch_revision()?,
            bookmarks: self.query.flag("allowWatchBookmarks") == Some(true),
            initial_events: self.query.flag("sendInitialEvents"),
            timeout: self.watch_timeout()?,
        };
        let mut target = self.target;
        target.name.clear();
        let stream = engine.watch(&target, request, Box::new(WatchPresenter::new(presenter))).await;
        Ok(response::json_chunks(watch_chunks(stream, slot, shutdown)))
    }

    fn watch_revision(&self) -> Result<Option<apiserver_store::Revision>, Status> {
        let resource = self.target.resource;
        // On a watch, kube-apiserver reports a broken version as an invalid object of the resource.
        self.query.revision().map_err(|status| {
            let text = self.query.text("resourceVersion");
            let detail =
                format!("strconv.ParseUint: parsing {}: invalid syntax", apiserver_machinery::field::quote(text));
            let error = apiserver_machinery::field::FieldError::invalid("resourceVersion", text, detail);
            if status.code == 400 { Status::invalid(resource.into(), &self.target.name, &[error]) } else { status }
        })
    }

    fn watch_timeout(&self) -> Result<Duration, Status> {
        let asked = self
            .query
            .number("timeoutSeconds")?
            .and_then(|seconds| u64::try_from(seconds).ok())
            .filter(|seconds| *seconds > 0);
        let random = || fastrand::u64(WATCH_SECONDS_MIN..=2 * WATCH_SECONDS_MIN);
        // A day is longer than any client waits, and keeps the deadline within what a clock can add.
        Ok(Duration::from_secs(asked.unwrap_or_else(random).min(86_400)))
    }
}

/// The chunks of a watch until it ends or the server does.
fn watch_chunks(
    stream: WatchStream,
    slot: OwnedSemaphorePermit,
    shutdown: watch::Receiver<bool>,
) -> impl stream::Stream<Item = Bytes> + Send + 'static {
    stream::unfold((stream, slot, shutdown), |(mut stream, slot, mut shutdown)| async move {
        let step = tokio::select! {
            step = stream.next() => step,
            _ = shutdown.wait_for(|ending| *ending) => WatchStep::End,
        };
        match step {
            WatchStep::Chunk(bytes) => Some((bytes, (stream, slot, shutdown))),
            WatchStep::End => None,
        }
    })
}

/// Runs a write to its end even when the client goes away: what it took (addresses, ports) must be used or given back.
async fn uncancelled<T, E>(work: impl Future<Output = Result<T, E>> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<Status> + Send + 'static,
{
    match tokio::spawn(work).await {
        Ok(outcome) => outcome,
        Err(error) => Err(Status::internal(error).into()),
    }
}

/// The document of a failed list: the Status with the token to go on.
pub(crate) fn list_failure(error: &ListError) -> Response<Body> {
    let mut document = error.status.to_value();
    if let (false, Some(metadata)) =
        (error.token.is_empty(), document.get_mut("metadata").and_then(Value::as_object_mut))
    {
        metadata.insert("continue".to_owned(), json!(error.token));
    }
    response::failure(&error.status, &document)
}
