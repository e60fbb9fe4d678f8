//! As much of an API server as three watches need.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use futures::{Stream, stream};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// The resourceVersion of the first lists.
const FIRST_VERSION: u64 = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Resource {
    Services,
    Slices,
    Nodes,
    ServiceCidrs,
}

struct State {
    objects: HashMap<Resource, Vec<Value>>,
    requests: HashMap<Resource, Vec<String>>,
    watches: HashMap<Resource, Vec<mpsc::UnboundedSender<String>>>,
    forbidden: Option<Resource>,
    /// Posted, with the path.
    events: Vec<(String, Value)>,
    /// Connections are dropped.
    down: bool,
    /// Watches that resume from the first version are told that they are too old.
    stale: bool,
    /// Every watch is told that it is too old.
    gone: bool,
    refused: usize,
    version: u64,
}

#[derive(Clone)]
pub(super) struct FakeApi {
    state: Arc<Mutex<State>>,
    address: SocketAddr,
}

type Body = BoxBody<Bytes, Infallible>;

impl FakeApi {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = State {
            objects: HashMap::new(),
            requests: HashMap::new(),
            watches: HashMap::new(),
            forbidden: None,
            events: Vec::new(),
            down: false,
            stale: false,
            gone: false,
            refused: 0,
            version: FIRST_VERSION,
        };
        let api = Self { state: Arc::new(Mutex::new(state)), address };
        tokio::spawn(api.clone().accept(listener));
        api
    }

    async fn accept(self, listener: TcpListener) {
        while let Ok((stream, _)) = listener.accept().await {
            if self.is_refused() {
                continue;
            }
            let api = self.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let api = api.clone();
                async move {
                    let answer = match *request.method() {
                        Method::POST => api.take_event(request).await,
                        _ => api.answer(&request),
                    };
                    answer.ok_or_else(|| std::io::Error::other("down"))
                }
            });
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    }

    async fn take_event(&self, request: Request<Incoming>) -> Option<Response<Body>> {
        let path = request.uri().path().to_owned();
        assert!(path.starts_with("/apis/events.k8s.io/v1/namespaces/"), "{path}");
        let body = request.into_body().collect().await.ok()?.to_bytes();
        let event: Value = serde_json::from_slice(&body).unwrap();
        self.lock().events.push((path, event.clone()));
        Some(json_response(StatusCode::CREATED, &event))
    }

    /// What was posted: path and Event.
    pub(super) fn events(&self) -> Vec<(String, Value)> {
        self.lock().events.clone()
    }

    fn is_refused(&self) -> bool {
        let mut state = self.lock();
        state.refused += usize::from(state.down);
        state.down
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Replaces the objects; watches are not told.
    pub(super) fn set(&self, resource: Resource, objects: Vec<Value>) {
        self.lock().objects.insert(resource, objects);
    }

    /// What the next list carries as its resourceVersion.
    pub(super) fn set_version(&self, version: u64) {
        self.lock().version = version;
    }

    pub(super) fn requests(&self, resource: Resource) -> Vec<String> {
        self.lock().requests.get(&resource).cloned().unwrap_or_default()
    }

    pub(super) fn refused(&self) -> usize {
        self.lock().refused
    }

    pub(super) fn forbid(&self, resource: Option<Resource>) {
        self.lock().forbidden = resource;
    }

    pub(super) fn set_gone(&self, gone: bool) {
        self.lock().gone = gone;
    }

    pub(super) fn set_stale(&self, stale: bool) {
        self.lock().stale = stale;
    }

    /// Going down breaks every watch off.
    pub(super) fn set_down(&self, down: bool) {
        let mut state = self.lock();
        state.down = down;
        state.watches.clear();
    }

    /// Tells the watch, once there is one.
    pub(super) async fn event(&self, resource: Resource, kind: &str, object: Value) {
        let version = {
            let mut state = self.lock();
            state.version += 1;
            state.version
        };
        self.event_at(resource, kind, object, version).await;
    }

    /// The same at any resourceVersion, however late.
    pub(super) async fn event_at(&self, resource: Resource, kind: &str, mut object: Value, version: u64) {
        super::wait("a watch", || self.lock().watches.get(&resource).is_some_and(|list| !list.is_empty())).await;
        let state = self.lock();
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let line = format!("{}\n", json!({"type": kind, "object": object}));
        for watch in state.watches.get(&resource).into_iter().flatten() {
            // A watch that has ended meanwhile is not told.
            let _ = watch.send(line.clone());
        }
    }

    /// Ends the watch with 410 Gone.
    pub(super) async fn expire(&self, resource: Resource) {
        let status =
            json!({"kind": "Status", "status": "Failure", "reason": "Expired", "code": 410, "message": "too old"});
        self.event(resource, "ERROR", status).await;
    }

    fn answer(&self, request: &Request<Incoming>) -> Option<Response<Body>> {
        let resource = match request.uri().path() {
            "/api/v1/services" => Resource::Services,
            "/apis/discovery.k8s.io/v1/endpointslices" => Resource::Slices,
            "/api/v1/nodes" => Resource::Nodes,
            "/apis/networking.k8s.io/v1/servicecidrs" => Resource::ServiceCidrs,
            other => panic!("unexpected request for {other}"),
        };
        if self.is_refused() {
            return None;
        }
        let query = request.uri().query().unwrap_or_default().to_owned();
        let mut state = self.lock();
        state.requests.entry(resource).or_default().push(query.clone());
        if state.forbidden == Some(resource) {
            return Some(status(StatusCode::FORBIDDEN, "Forbidden"));
        }
        if !query.contains("watch=true") {
            return Some(list(&state, resource, &query));
        }
        if state.gone {
            return Some(status(StatusCode::GONE, "Expired"));
        }
        if state.stale && query.contains(&format!("resourceVersion={FIRST_VERSION}")) {
            return Some(status(StatusCode::GONE, "Expired"));
        }
        let (sender, receiver) = mpsc::unbounded_channel();
        state.watches.entry(resource).or_default().push(sender);
        Some(Response::new(BodyExt::boxed(StreamBody::new(frames(receiver)))))
    }
}

fn frames(
    receiver: mpsc::UnboundedReceiver<String>,
) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + Sync {
    stream::unfold(receiver, |mut receiver| async move {
        let line = receiver.recv().await?;
        Some((Ok(Frame::data(Bytes::from(line))), receiver))
    })
}

/// One page; the continue token is where the next begins.
fn list(state: &State, resource: Resource, query: &str) -> Response<Body> {
    let parameter = |name: &str| {
        let value = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        value.and_then(|value| value.parse::<usize>().ok())
    };
    let all = state.objects.get(&resource).cloned().unwrap_or_default();
    let (start, limit) = (parameter("continue").unwrap_or(0), parameter("limit").unwrap_or(all.len()));
    let end = (start + limit).min(all.len());
    // A list after the version has been lost gets a new one, so that its watch is not stale again.
    let version = if state.stale { state.version + 1 } else { state.version };
    let mut metadata = json!({"resourceVersion": version.to_string()});
    if end < all.len() {
        metadata["continue"] = json!(end.to_string());
    }
    json_response(
        StatusCode::OK,
        &json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": &all[start..end]}),
    )
}

fn status(code: StatusCode, reason: &str) -> Response<Body> {
    let code_number = code.as_u16();
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": reason, "code": code_number,
        "message": reason,
    });
    json_response(code, &body)
}

fn json_response(code: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(BodyExt::boxed(Full::new(Bytes::from(value.to_string()))));
    *response.status_mut() = code;
    response
}
