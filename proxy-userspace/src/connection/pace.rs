//! How often the API server is asked: `clientConnection.qps` and `burst`.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::Request;
use tower::Service;

/// So many requests at once, and so many a second after that. It holds one point in time, however long the queue is.
#[derive(Debug)]
pub(super) struct Bucket {
    interval: Duration,
    burst: Duration,
    /// When the last request that was let in would have gone at an even pace.
    last: Mutex<Option<Instant>>,
}

impl Bucket {
    /// `qps` is above 0.
    pub(super) fn new(qps: f32, burst: u32) -> Self {
        let interval = Duration::try_from_secs_f32(1.0 / qps).unwrap_or(Duration::MAX);
        let burst = interval.saturating_mul(burst.saturating_sub(1));
        Self { interval, burst, last: Mutex::new(None) }
    }

    /// Takes a place; returns when it is.
    fn reserve(&self, now: Instant) -> Instant {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let even = last.and_then(|last| last.checked_add(self.interval)).map_or(now, |next| next.max(now));
        *last = Some(even);
        even.checked_sub(self.burst).map_or(now, |early| early.max(now))
    }
}

/// A client that waits for its place in the bucket.
pub(super) struct Paced<S> {
    inner: S,
    bucket: Option<Arc<Bucket>>,
}

impl<S> Paced<S> {
    pub(super) fn new(inner: S, bucket: Option<Arc<Bucket>>) -> Self {
        Self { inner, bucket }
    }
}

impl<S, B> Service<Request<B>> for Paced<S>
where
    S: Service<Request<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let place =
            self.bucket.as_ref().filter(|_| !is_next_page(&request)).map(|bucket| bucket.reserve(Instant::now()));
        // Nothing is sent before this future is polled.
        let answer = self.inner.call(request);
        Box::pin(async move {
            if let Some(place) = place {
                tokio::time::sleep_until(place.into()).await;
            }
            answer.await
        })
    }
}

/// A list in pages counts once: a large cluster must not be listed at five pages a second.
fn is_next_page<B>(request: &Request<B>) -> bool {
    let query = request.uri().query().unwrap_or_default();
    query.split('&').any(|pair| pair.strip_prefix("continue=").is_some_and(|token| !token.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_at_once_and_then_evenly() {
        let (bucket, start) = (Bucket::new(5.0, 3), Instant::now());
        let waits = || bucket.reserve(start).duration_since(start).as_millis();
        assert_eq!([waits(), waits(), waits(), waits(), waits()], [0, 0, 0, 200, 400]);
        let later = start + Duration::from_secs(10);
        let waits = || bucket.reserve(later).duration_since(later).as_millis();
        assert_eq!([waits(), waits(), waits(), waits()], [0, 0, 0, 200], "the burst has grown back, and no more");
    }

    #[test]
    fn a_tiny_rate_does_not_overflow() {
        let (bucket, now) = (Bucket::new(f32::MIN_POSITIVE, u32::MAX), Instant::now());
        assert_eq!(bucket.reserve(now), now);
        bucket.reserve(now);
    }

    #[tokio::test(start_paused = true)]
    async fn pages_of_one_list_are_not_paced() {
        let inner = tower::service_fn(|_: Request<()>| async { Ok::<_, std::convert::Infallible>(()) });
        let mut client = Paced::new(inner, Some(Arc::new(Bucket::new(0.1, 1))));
        let request = |uri: &str| Request::get(uri).body(()).unwrap();
        let start = tokio::time::Instant::now();
        client.call(request("/api/v1/services?limit=500")).await.unwrap();
        for page in 0..10 {
            client.call(request(&format!("/api/v1/services?limit=500&continue={page}"))).await.unwrap();
        }
        assert!(start.elapsed() < Duration::from_secs(5));
        client.call(request("/api/v1/nodes?limit=500&continue=")).await.unwrap();
        assert!(start.elapsed() > Duration::from_secs(5), "{:?}", start.elapsed());
    }
}
