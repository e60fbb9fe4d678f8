//! The two HTTP servers: health for load balancers (10256) and metrics for operators (10249).

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONTENT_TYPE, HeaderName};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tracing::{debug, warn};

use crate::dataplane::Counters;
use crate::health::{Answer, Health};
use crate::metrics::Metrics;
use crate::source::{Event, Update};

/// Connections of one server at a time; further ones wait in the listen queue.
const CONNECTIONS_MAX: usize = 64;
/// How long a client may take to send a request, or stay idle.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a scrape waits for the data plane's counters before it does without.
const COUNTERS_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after a failed `accept`: it fails again at once where descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const NOSNIFF: HeaderName = HeaderName::from_static("x-content-type-options");

/// A server that can't be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for {purpose}: {source}")]
pub struct ListenError {
    /// The configured address.
    pub address: SocketAddr,
    /// What it is for.
    pub purpose: &'static str,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

type Reply = Response<Full<Bytes>>;

/// What a server answers.
pub trait Routes: Send + Sync + 'static {
    /// The answer for a path.
    fn answer(&self, path: &str) -> impl Future<Output = Reply> + Send;
}

/// Takes the address.
///
/// # Errors
/// Where another process has it, or it is not ours.
pub async fn listen(address: SocketAddr, purpose: &'static str) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).await.map_err(|source| ListenError { address, purpose, source })
}

/// Answers until it is aborted.
pub async fn serve<R: Routes>(listener: TcpListener, routes: R) {
    let routes = Arc::new(routes);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let routes = Arc::clone(&routes);
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let routes = Arc::clone(&routes);
                async move { Ok::<_, std::convert::Infallible>(routes.answer(request.uri().path()).await) }
            });
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
            if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
                debug!(%error, "connection ended");
            }
            drop(place);
        });
    }
}

/// `/healthz` and `/livez`.
pub struct HealthRoutes {
    /// What is answered.
    pub health: Arc<Health>,
    /// Where answers are counted.
    pub metrics: Arc<Metrics>,
}

impl Routes for HealthRoutes {
    async fn answer(&self, path: &str) -> Reply {
        let now = Timestamp::now();
        let (is_livez, Answer { code, body }) = match path {
            "/healthz" => (false, self.health.healthz(now)),
            "/livez" => (true, self.health.livez(now)),
            _ => return not_found(),
        };
        self.metrics.probe(is_livez, code);
        reply(StatusCode::from_u16(code).unwrap_or_default(), "application/json", body)
    }
}

/// `/metrics`, `/healthz`, `/proxyMode` and `/configz`.
pub struct MetricsRoutes {
    /// What is rendered.
    pub metrics: Arc<Metrics>,
    /// Reaches the data plane, which has counters of its own.
    pub events: mpsc::Sender<Event>,
    /// Name of the data plane.
    pub mode: &'static str,
    /// The effective configuration, as JSON.
    pub configz: String,
}

impl Routes for MetricsRoutes {
    async fn answer(&self, path: &str) -> Reply {
        match path {
            "/metrics" => self.render().await,
            "/healthz" => reply(StatusCode::OK, TEXT, "ok".to_owned()),
            "/proxyMode" => reply(StatusCode::OK, TEXT, self.mode.to_owned()),
            "/configz" => reply(StatusCode::OK, "application/json", self.configz.clone()),
            _ => not_found(),
        }
    }
}

impl MetricsRoutes {
    async fn render(&self) -> Reply {
        let counters = tokio::time::timeout(COUNTERS_TIMEOUT, self.counters()).await.ok().flatten().unwrap_or_default();
        match self.metrics.render(&counters) {
            Ok(text) => reply(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text),
            Err(error) => reply(StatusCode::INTERNAL_SERVER_ERROR, TEXT, error.to_string()),
        }
    }

    async fn counters(&self) -> Option<Counters> {
        let (ask, answer) = oneshot::channel();
        self.events.send(Event::now(Update::ReadCounters(ask))).await.ok()?;
        answer.await.ok()
    }
}

const TEXT: &str = "text/plain; charset=utf-8";

fn not_found() -> Reply {
    reply(StatusCode::NOT_FOUND, TEXT, "404 page not found\n".to_owned())
}

fn reply(status: StatusCode, content_type: &'static str, body: String) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::from(body)));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply.headers_mut().insert(NOSNIFF, HeaderValue::from_static("nosniff"));
    reply
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn get(address: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut text)).await.unwrap().unwrap();
        let code = text.split(' ').nth(1).unwrap().parse().unwrap();
        (code, text)
    }

    async fn start<R: Routes>(routes: R) -> SocketAddr {
        let listener = listen("127.0.0.1:0".parse().unwrap(), "a test").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, routes));
        address
    }

    #[tokio::test]
    async fn health_is_answered_and_counted() {
        let health = Arc::new(Health::new(Timestamp::now()));
        let metrics = Arc::new(Metrics::new().unwrap());
        let address = start(HealthRoutes { health: Arc::clone(&health), metrics: Arc::clone(&metrics) }).await;
        assert_eq!(get(address, "/livez").await.0, 200);
        assert_eq!(get(address, "/healthz?verbose").await.0, 503);
        health.node_seen(false);
        let (code, text) = get(address, "/healthz").await;
        assert_eq!(code, 200);
        assert!(
            text.contains("content-type: application/json\r\n") && text.contains("x-content-type-options: nosniff\r\n")
        );
        assert!(text.contains("\"nodeEligible\":true"));
        assert_eq!(get(address, "/other").await.0, 404);
        let rendered = metrics.render(&Vec::new()).unwrap();
        for line in ["kubeproxy_proxy_healthz_total{code=\"200\"} 1", "kubeproxy_proxy_healthz_total{code=\"503\"} 1"] {
            assert!(rendered.contains(line), "{rendered}");
        }
    }

    #[tokio::test]
    async fn metrics_hold_the_data_planes_counters_and_do_without_when_it_is_gone() {
        let (events, mut received) = crate::source::channel();
        let metrics = Arc::new(Metrics::new().unwrap());
        let routes = MetricsRoutes { metrics, events, mode: "fake", configz: "{}".to_owned() };
        let address = start(routes).await;
        let dataplane = tokio::spawn(async move {
            let Update::ReadCounters(reply) = received.recv().await.unwrap().update else { panic!("not a question") };
            reply.send(vec![("trama_x_total".to_owned(), Vec::new(), 3)]).unwrap();
        });
        let (code, text) = get(address, "/metrics").await;
        assert_eq!(code, 200);
        assert!(text.contains("\ntrama_x_total 3\n"));
        dataplane.await.unwrap();
        let (code, text) = get(address, "/metrics").await;
        assert!(code == 200 && !text.contains("trama_x_total") && text.contains("process_resident_memory_bytes"));
        assert!(get(address, "/proxyMode").await.1.ends_with("fake"));
        assert!(get(address, "/configz").await.1.ends_with("{}"));
        assert!(get(address, "/healthz").await.1.ends_with("ok"));
    }

    #[tokio::test]
    async fn a_busy_port_is_one_sentence() {
        let taken = listen("127.0.0.1:0".parse().unwrap(), "a test").await.unwrap();
        let address = taken.local_addr().unwrap();
        let error = listen(address, "health checks").await.unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("cannot listen on {address} for health checks: Address already in use")),
            "{error}"
        );
    }
}
