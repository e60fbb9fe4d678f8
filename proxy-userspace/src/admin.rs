//! HTTP servers: health for load balancers (10256), metrics for operators (10249), and what all of ours have in common.

use std::future::Future;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::header::{CONTENT_TYPE, HeaderName};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::Timestamp;
use nix::sys::socket::{setsockopt, sockopt::Ipv6V6Only};
use serde::Serialize;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use crate::dataplane::{Counters, NumberedService};
use crate::health::{Answer, Health};
use crate::metrics::{Metrics, Slis};
use crate::source::{Event, Update};

/// Connections of one server at a time; further ones wait.
const CONNECTIONS_MAX: usize = 64;
/// Connections that the kernel keeps until they are accepted.
const LISTEN_QUEUE: u32 = 1024;
/// How long a client may take to send a request, or stay idle.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a scrape waits for the data plane's counters before it takes those of the last one.
const COUNTERS_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a question to the runner may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failed `accept`: it fails again at once where descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Until a port that was taken is tried again.
const LISTEN_RETRY: Duration = Duration::from_secs(5);

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
    pub source: io::Error,
}

/// An answer.
pub type Reply = Response<Full<Bytes>>;

/// A configured port: open, or to be tried again.
#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    purpose: &'static str,
    listener: Option<TcpListener>,
}

impl Port {
    /// Takes the address. Where it is taken, that is an error if `hard_fail`; else it is tried again by [`Self::serve`], as
    /// kube-proxy does: the proxy that is being replaced may still have it.
    ///
    /// # Errors
    /// See [`listen`].
    pub fn open(address: SocketAddr, purpose: &'static str, hard_fail: bool) -> Result<Self, ListenError> {
        let listener = match listen(address, purpose) {
            Ok(listener) => Some(listener),
            Err(error) if hard_fail => return Err(error),
            Err(error) => {
                warn!(%error, "trying again every 5 s");
                None
            }
        };
        Ok(Self { address, purpose, listener })
    }

    /// Answers until it is dropped.
    pub async fn serve<R: Routes>(self, routes: R) {
        let listener = match self.listener {
            Some(listener) => listener,
            None => loop {
                tokio::time::sleep(LISTEN_RETRY).await;
                if let Ok(listener) = listen(self.address, self.purpose) {
                    info!(address = %self.address, purpose = self.purpose, "listening at last");
                    break listener;
                }
            },
        };
        serve(listener, routes).await;
    }
}

/// What a server answers.
pub trait Routes: Send + Sync + 'static {
    /// The answer for a path.
    fn answer(&self, path: &str) -> impl Future<Output = Reply> + Send;
}

/// Takes the address. The unspecified address of either family takes both, as Go's listeners do: the default `0.0.0.0` answers
/// on a node's IPv6 addresses too.
///
/// # Errors
/// Where another process has it, or it is not ours.
pub fn listen(address: SocketAddr, purpose: &'static str) -> Result<TcpListener, ListenError> {
    let listener = if address.ip().is_unspecified() {
        let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, address.port()));
        match bind(both, false) {
            // A kernel without IPv6.
            Err(error) if address.is_ipv4() && error.kind() != io::ErrorKind::AddrInUse => bind(address, false),
            listener => listener,
        }
    } else {
        bind(address, false)
    };
    listener.map_err(|source| ListenError { address, purpose, source })
}

/// Takes exactly this address: the unspecified one of IPv6 leaves IPv4 to others if `v6_only`.
pub(crate) fn bind(address: SocketAddr, v6_only: bool) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() {
        setsockopt(&socket, Ipv6V6Only, &v6_only)?;
    }
    socket.bind(address)?;
    socket.listen(LISTEN_QUEUE)
}

/// Answers until it is dropped.
pub async fn serve<R: Routes>(listener: TcpListener, routes: R) {
    serve_within(listener, routes, Arc::new(Semaphore::new(CONNECTIONS_MAX))).await;
}

/// Answers until it is dropped, on as many connections at a time as there are places.
pub(crate) async fn serve_within<R: Routes>(listener: TcpListener, routes: R, places: Arc<Semaphore>) {
    let routes = Arc::new(routes);
    let mut connections = JoinSet::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        while connections.try_join_next().is_some() {}
        let connection = converse(stream, Arc::clone(&routes));
        connections.spawn(async move {
            connection.await;
            drop(place);
        });
    }
}

async fn converse<R: Routes>(stream: TcpStream, routes: Arc<R>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let routes = Arc::clone(&routes);
        async move { Ok::<_, std::convert::Infallible>(routes.answer(request.uri().path()).await) }
    });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
        debug!(%error, "connection ended");
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

/// `/metrics`, `/metrics/slis`, `/healthz`, `/proxyMode`, `/configz`, and what the commands that look at a node ask: `/status` and
/// `/services`.
pub struct MetricsRoutes {
    /// What is rendered.
    pub metrics: Arc<Metrics>,
    /// Reaches the data plane, which has counters of its own.
    pub events: mpsc::Sender<Event>,
    /// Name of the data plane.
    pub mode: &'static str,
    /// The effective configuration, as JSON.
    pub configz: String,
    /// The data plane's counters as they were last seen. A scrape gets these when a large sync holds the data plane.
    pub last: Mutex<Counters>,
    /// Its own answers to `/healthz`.
    pub slis: Slis,
}

impl Routes for MetricsRoutes {
    async fn answer(&self, path: &str) -> Reply {
        match path {
            "/metrics" => self.render().await,
            "/metrics/slis" => reply(StatusCode::OK, EXPOSITION, self.slis.render()),
            "/healthz" => {
                self.slis.observe_ping();
                reply(StatusCode::OK, TEXT, "ok".to_owned())
            }
            "/proxyMode" => reply(StatusCode::OK, TEXT, self.mode.to_owned()),
            "/status" => self.ask(Update::ReadStatus).await,
            "/services" => self.ask(Update::ReadServices).await,
            "/configz" => reply(StatusCode::OK, "application/json", self.configz.clone()),
            _ => not_found(),
        }
    }
}

impl MetricsRoutes {
    async fn render(&self) -> Reply {
        let fresh = tokio::time::timeout(COUNTERS_TIMEOUT, self.counters()).await.ok().flatten();
        // What a panic left is whole: it is replaced in one move.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        *last = fresh.unwrap_or_else(|| std::mem::take(&mut last));
        match self.metrics.render(&last) {
            Ok(text) => reply(StatusCode::OK, EXPOSITION, text),
            Err(error) => reply(StatusCode::INTERNAL_SERVER_ERROR, TEXT, error.to_string()),
        }
    }

    /// The runner's answer to a question, as JSON. 503 when a large sync holds it for too long.
    async fn ask<T: Serialize>(&self, question: fn(oneshot::Sender<T>) -> Update) -> Reply {
        let (ask, answer) = oneshot::channel();
        let exchange = async {
            self.events.send(Event::now(question(ask))).await.ok()?;
            answer.await.ok()
        };
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, exchange).await.ok().flatten();
        match answer.and_then(|answer| serde_json::to_string(&answer).ok()) {
            Some(json) => reply(StatusCode::OK, "application/json", json),
            None => reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, "the data plane is busy\n".to_owned()),
        }
    }

    /// On a thread of its own, for what is not at hand is read from whole maps.
    async fn counters(&self) -> Option<Counters> {
        let (ask, answer) = oneshot::channel();
        self.events.send(Event::now(Update::Scrape(ask))).await.ok()?;
        let scrape = answer.await.ok()?;
        let events = self.events.clone();
        let read = move || scrape.read(&|ids, endpoints_max| numbered(&events, ids, endpoints_max));
        tokio::task::spawn_blocking(read).await.ok()
    }
}

/// The runner's answer, waited for; nothing when it has ended.
fn numbered(events: &mpsc::Sender<Event>, ids: Vec<u32>, endpoints_max: usize) -> Vec<NumberedService> {
    let (ask, answer) = oneshot::channel();
    match events.blocking_send(Event::now(Update::ReadNumbered(ids, endpoints_max, ask))) {
        Ok(()) => answer.blocking_recv().unwrap_or_default(),
        Err(_) => Vec::new(),
    }
}

const TEXT: &str = "text/plain; charset=utf-8";
/// Prometheus' text format.
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

fn not_found() -> Reply {
    reply(StatusCode::NOT_FOUND, TEXT, "404 page not found\n".to_owned())
}

/// An answer that browsers do not guess about.
pub(crate) fn reply(status: StatusCode, content_type: &'static str, body: String) -> Reply {
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
    use crate::dataplane::{AskNumbered, Scrape};
    use crate::model::{IpFamily, NameParts, Protocol, ServicePortName};

    async fn get(address: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut text)).await.unwrap().unwrap();
        let code = text.split(' ').nth(1).unwrap().parse().unwrap();
        (code, text)
    }

    fn service(id: u32) -> NumberedService {
        let (namespace, service, port) = ("ns".into(), "web".into(), "".into());
        let name = NameParts { namespace, service, port, protocol: Protocol::Tcp, family: IpFamily::V4 };
        NumberedService { id, name: ServicePortName::new(name), endpoints: Vec::new() }
    }

    async fn start<R: Routes>(routes: R) -> SocketAddr {
        let listener = listen("127.0.0.1:0".parse().unwrap(), "a test").unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, routes));
        address
    }

    #[tokio::test]
    async fn health_is_answered_and_counted() {
        let health = Arc::new(Health::new(Timestamp::now(), Duration::from_secs(60)));
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
    async fn metrics_hold_the_data_planes_counters_and_the_last_ones_when_it_does_not_answer() {
        let (events, mut received) = crate::source::channel();
        let metrics = Arc::new(Metrics::new().unwrap());
        let (configz, last, slis) = ("{}".to_owned(), Mutex::default(), Slis::default());
        let routes = MetricsRoutes { metrics, events, mode: "fake", configz, last, slis };
        let address = start(routes).await;
        let dataplane = tokio::spawn(async move {
            let Update::Scrape(reply) = received.recv().await.unwrap().update else { panic!("not a question") };
            let at_hand = vec![("trama_x_total".to_owned(), Vec::new(), 3)];
            let rest =
                |ask: AskNumbered<'_>| vec![("trama_y_total".to_owned(), Vec::new(), ask(vec![7], 2).len() as u64)];
            reply.send(Scrape::at_hand(at_hand).with_rest(rest)).unwrap();
            let asked = received.recv().await.unwrap().update;
            let Update::ReadNumbered(ids, 2, reply) = asked else { panic!("not the question") };
            reply.send(ids.into_iter().map(service).collect()).unwrap();
        });
        let (code, text) = get(address, "/metrics").await;
        assert_eq!(code, 200);
        assert!(text.contains("\ntrama_x_total 3\n") && text.contains("\ntrama_y_total 1\n"), "{text}");
        dataplane.await.unwrap();
        let (code, text) = get(address, "/metrics").await;
        assert!(code == 200 && text.contains("\ntrama_x_total 3\n") && text.contains("process_resident_memory_bytes"));
        assert!(get(address, "/proxyMode").await.1.ends_with("fake"));
        assert!(get(address, "/configz").await.1.ends_with("{}"));
        assert!(get(address, "/healthz").await.1.ends_with("ok"));
        let (code, text) = get(address, "/metrics/slis").await;
        assert_eq!(code, 200);
        let counted = "kubernetes_healthchecks_total{name=\"ping\",status=\"success\",type=\"healthz\"} 1\n";
        assert!(text.ends_with(counted), "{text}");
    }

    #[tokio::test]
    async fn a_busy_port_is_one_sentence() {
        let taken = listen("127.0.0.1:0".parse().unwrap(), "a test").unwrap();
        let address = taken.local_addr().unwrap();
        let error = listen(address, "health checks").unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("cannot listen on {address} for health checks: Address already in use")),
            "{error}"
        );
    }

    #[tokio::test]
    async fn the_unspecified_address_answers_both_families() {
        let listener = listen("0.0.0.0:0".parse().unwrap(), "a test").unwrap();
        let port = listener.local_addr().unwrap().port();
        let health = Arc::new(Health::new(Timestamp::now(), Duration::from_secs(60)));
        tokio::spawn(serve(listener, HealthRoutes { health, metrics: Arc::new(Metrics::new().unwrap()) }));
        assert_eq!(get(SocketAddr::from(([127, 0, 0, 1], port)), "/livez").await.0, 200);
        assert_eq!(get(SocketAddr::from((Ipv6Addr::LOCALHOST, port)), "/livez").await.0, 200);
    }

    #[tokio::test(start_paused = true)]
    async fn a_port_that_is_taken_is_an_error_or_tried_again() {
        let taken = listen("127.0.0.1:0".parse().unwrap(), "a test").unwrap();
        let address = taken.local_addr().unwrap();
        assert!(Port::open(address, "a test", true).is_err());
        let port = Port::open(address, "a test", false).unwrap();
        let health = Arc::new(Health::new(Timestamp::now(), Duration::from_secs(60)));
        tokio::spawn(port.serve(HealthRoutes { health, metrics: Arc::new(Metrics::new().unwrap()) }));
        drop(taken);
        tokio::time::sleep(LISTEN_RETRY + Duration::from_millis(1)).await;
        assert_eq!(get(address, "/livez").await.0, 200);
    }
}
