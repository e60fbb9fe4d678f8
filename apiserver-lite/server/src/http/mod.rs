//! One HTTP request: who asks, what for, is there room, and the answer.

mod accept;
mod body;
mod changes;
mod documents;
mod metrics;
mod openapi_proto;
mod query;
mod resources;
mod response;
mod route;
mod view;

use std::sync::Arc;
use std::time::Duration;

use ::http::request::Parts;
use ::http::{Method, Request, Response};
use apiserver_machinery::status::Status;
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, watch};

use crate::config::Limits;
use crate::engine::{Engine, ListError};
use crate::identity::Identity;
use documents::DocumentRequest;
use metrics::{Gauges, Metrics};
use query::Query;
use resources::{ResourceRequest, Verb};
pub(crate) use response::Body;
use route::{Route, route};

/// The server as its connections see it.
pub(crate) struct App {
    engine: Arc<Engine>,
    limits: Limits,
    readers: Arc<Semaphore>,
    writers: Arc<Semaphore>,
    watchers: Arc<Semaphore>,
    metrics: Metrics,
    /// `host:port` as clients reach the server.
    address: String,
    shutdown: watch::Receiver<bool>,
}

/// What an answered request is counted as.
struct Counted {
    verb: &'static str,
    resource: &'static str,
}

impl App {
    pub(crate) fn new(engine: Arc<Engine>, limits: Limits, address: String, shutdown: watch::Receiver<bool>) -> Self {
        Self {
            engine,
            readers: Arc::new(Semaphore::new(limits.reads_in_flight_max)),
            writers: Arc::new(Semaphore::new(limits.writes_in_flight_max)),
            watchers: Arc::new(Semaphore::new(limits.watches_max)),
            limits,
            metrics: Metrics::default(),
            address,
            shutdown,
        }
    }

    /// Answers one request of a client with this identity; `None` has shown no certificate.
    pub(crate) async fn handle<B>(&self, request: Request<B>, identity: Option<&Identity>) -> Response<Body>
    where
        B: hyper::body::Body<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let (parts, body) = request.into_parts();
        let mut counted = Counted { verb: "other", resource: "" };
        let response = match self.answer(parts, body, identity, &mut counted).await {
            Ok(response) => response,
            Err(error) => resources::list_failure(&error),
        };
        self.metrics.count(counted.verb, counted.resource, response.status().as_u16());
        response
    }

    async fn answer<B>(
        &self,
        parts: Parts,
        body: B,
        identity: Option<&Identity>,
        counted: &mut Counted,
    ) -> Result<Response<Body>, ListError>
    where
        B: hyper::body::Body<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let path = parts.uri.path();
        // Every certificate of our CA may do everything in this server; without one only health and version are told.
        if identity.is_none() && !documents::is_public(path) {
            return Err(Status::unauthorized().into());
        }
        let query = Query::parse(parts.uri.query());
        match route(path) {
            Route::Unknown => Err(Status::path_not_found().into()),
            Route::Document(segments) => {
                counted.verb = "document";
                Ok(self.document(&parts, &query, &segments).await?)
            }
            Route::Resource { target, part } => {
                counted.resource = target.resource.plural;
                let verb = Verb::of(&parts.method, &target, &query);
                counted.verb = verb.map_or("other", Verb::as_str);
                let request = ResourceRequest {
                    method: parts.method,
                    target,
                    part,
                    query,
                    headers: parts.headers,
                    body: Bytes::new(),
                };
                self.resource(request, verb, body).await
            }
        }
    }

    async fn resource<B>(
        &self,
        mut request: ResourceRequest,
        verb: Option<Verb>,
        body: B,
    ) -> Result<Response<Body>, ListError>
    where
        B: hyper::body::Body<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let verb = request.check_verb(verb)?;
        let slot = self.slot(verb)?;
        if verb == Verb::Watch {
            return Ok(request.watch(&self.engine, slot, self.shutdown.clone()).await?);
        }
        let head = request.method == Method::HEAD;
        let work = async {
            request.body = body::read(body).await?;
            request.run(verb, &self.engine).await
        };
        let timeout = self.limits.request_timeout;
        let response = tokio::time::timeout(timeout, work).await.map_err(|_| timed_out(timeout))??;
        drop(slot);
        Ok(if head { response.map(|_| response::full(Bytes::new())) } else { response })
    }

    async fn document(&self, parts: &Parts, query: &Query, segments: &[String]) -> Result<Response<Body>, Status> {
        if !matches!(parts.method, Method::GET | Method::HEAD) {
            return Err(Status::method_not_allowed_here());
        }
        if segments.first().is_some_and(|first| first == "metrics") && segments.len() == 1 {
            return Ok(response::with_type(
                200,
                "text/plain; version=0.0.4",
                response::full(self.render_metrics().await?),
            ));
        }
        let segments = segments.iter().map(String::as_str).collect();
        DocumentRequest { segments, headers: &parts.headers, query, address: &self.address }.get()
    }

    async fn render_metrics(&self) -> Result<String, Status> {
        let revision = self.engine.store.revision().await.map_err(Status::internal)?;
        let used = |semaphore: &Semaphore, max: usize| max.saturating_sub(semaphore.available_permits());
        Ok(self.metrics.render(Gauges {
            revision: revision.0,
            watches: used(&self.watchers, self.limits.watches_max),
            in_flight: used(&self.readers, self.limits.reads_in_flight_max)
                + used(&self.writers, self.limits.writes_in_flight_max),
        }))
    }

    /// Room for one more request of this kind.
    fn slot(&self, verb: Verb) -> Result<OwnedSemaphorePermit, Status> {
        let semaphore = match verb {
            Verb::Watch => &self.watchers,
            verb if verb.is_read_only() => &self.readers,
            _ => &self.writers,
        };
        Arc::clone(semaphore).try_acquire_owned().map_err(|_: TryAcquireError| {
            Status::too_many_requests("The apiserver is overloaded, please try again later.", 1)
        })
    }
}

fn timed_out(timeout: Duration) -> Status {
    let message = format!("request did not complete within requested timeout of {} s", timeout.as_secs());
    Status::timeout(&message, 0)
}
