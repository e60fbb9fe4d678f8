//! Counts and times requests to the API server, as every client of Kubernetes does (`rest_client_*`).

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use http::{Request, Response};
use tower::Service;

use crate::metrics::Metrics;

/// A client whose requests are counted.
pub(super) struct Observed<S> {
    inner: S,
    host: Arc<str>,
    metrics: Arc<Metrics>,
}

impl<S> Observed<S> {
    pub(super) fn new(inner: S, host: Arc<str>, metrics: Arc<Metrics>) -> Self {
        Self { inner, host, metrics }
    }
}

impl<S, A, B> Service<Request<A>> for Observed<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let (host, metrics) = (Arc::clone(&self.host), Arc::clone(&self.metrics));
        let method = request.method().clone();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let start = Instant::now();
            let answer = answer.await;
            let code = answer.as_ref().ok().map(|answer| answer.status().as_u16());
            metrics.api_request(method.as_str(), &host, code, start.elapsed());
            answer
        })
    }
}
