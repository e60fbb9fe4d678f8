//! An API server that lists and watches exactly the objects of one scenario, whatever a real one would say of them. They never change.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use futures::stream;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use node_sys::Netns;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::scenario::{Config, DetectLocal, Scenario};

/// The only resourceVersion there is.
const VERSION: &str = "1";

type Body = BoxBody<Bytes, Infallible>;

/// One kind: where it is listed, and its objects.
struct Collection {
    api_version: &'static str,
    kind: &'static str,
    items: Vec<Value>,
}

/// The running server; dropping it closes its listener.
pub(super) struct ScenarioApi {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl ScenarioApi {
    /// Serves on 127.0.0.1 of the namespace. Inside a runtime only.
    pub(super) fn start(netns: &Netns, scenario: &Scenario) -> Result<Self> {
        let listener = netns.run(|| std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        let listener = listener.context("cannot listen on 127.0.0.1 of the node")?;
        let address = listener.local_addr().context("the listener has no address")?;
        listener.set_nonblocking(true).context("cannot prepare the listener")?;
        let listener = TcpListener::from_std(listener).context("cannot use the listener")?;
        let collections = Arc::new(collections(scenario));
        let task = tokio::spawn(accept(listener, collections));
        Ok(Self { address, task })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for ScenarioApi {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, collections: Arc<HashMap<&'static str, Collection>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let collections = Arc::clone(&collections);
        let service = service_fn(move |request: Request<Incoming>| {
            let response = answer(&collections, request.method(), request.uri());
            async move { Ok::<_, Infallible>(response) }
        });
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

fn collections(scenario: &Scenario) -> HashMap<&'static str, Collection> {
    let collection = |api_version, kind, items: Vec<Value>| Collection {
        api_version,
        kind,
        items: items.into_iter().enumerate().map(|(index, item)| completed(item, api_version, kind, index)).collect(),
    };
    let cidrs = scenario.config.service_cidrs.iter().enumerate();
    let cidrs = cidrs
        .map(|(index, cidr)| json!({ "metadata": { "name": format!("cidr-{index}") }, "spec": { "cidrs": [cidr] } }));
    HashMap::from([
        ("/api/v1/services", collection("v1", "Service", scenario.services.clone())),
        ("/api/v1/nodes", collection("v1", "Node", vec![node(&scenario.config)])),
        (
            "/apis/discovery.k8s.io/v1/endpointslices",
            collection("discovery.k8s.io/v1", "EndpointSlice", scenario.endpoint_slices.clone()),
        ),
        ("/apis/networking.k8s.io/v1/servicecidrs", collection("networking.k8s.io/v1", "ServiceCIDR", cidrs.collect())),
    ])
}

fn node(config: &Config) -> Value {
    let addresses = config.primary_node_ips.iter().map(|ip| json!({ "type": "InternalIP", "address": ip }));
    let mut spec = json!({});
    if let DetectLocal::NodeCidr(cidrs) = &config.detect_local
        && let Some(first) = cidrs.first()
    {
        spec = json!({ "podCIDR": first, "podCIDRs": cidrs });
    }
    let mut labels = BTreeMap::from([("kubernetes.io/hostname", &config.node_name)]);
    labels.extend(config.zone.as_ref().map(|zone| ("topology.kubernetes.io/zone", zone)));
    json!({
        "metadata": { "name": config.node_name, "labels": labels },
        "spec": spec,
        "status": { "addresses": addresses.collect::<Vec<_>>() },
    })
}

/// What every stored object has. Everything else stays as the scenario says.
fn completed(mut item: Value, api_version: &str, kind: &str, index: usize) -> Value {
    if let Some(object) = item.as_object_mut() {
        object.insert("apiVersion".to_owned(), json!(api_version));
        object.insert("kind".to_owned(), json!(kind));
        let metadata = object.entry("metadata").or_insert_with(|| json!({}));
        if let Some(metadata) = metadata.as_object_mut() {
            metadata.insert("resourceVersion".to_owned(), json!(VERSION));
            metadata.entry("uid").or_insert_with(|| json!(format!("00000000-0000-4000-8000-{index:012}")));
        }
    }
    item
}

fn answer(collections: &HashMap<&'static str, Collection>, method: &Method, uri: &http::Uri) -> Response<Body> {
    if method != Method::GET {
        // Events and their like: taken and forgotten.
        return respond(StatusCode::CREATED, &json!({ "kind": "Status", "apiVersion": "v1", "status": "Success" }));
    }
    let Some((collection, name)) = find(collections, uri.path()) else { return not_found(uri.path()) };
    let query = Query::parse(uri.query().unwrap_or_default());
    if let Some(name) = name {
        let named = collection.items.iter().find(|item| field(item, "metadata.name") == name);
        return named.map_or_else(|| not_found(name), |item| respond(StatusCode::OK, item));
    }
    let items: Vec<&Value> = collection.items.iter().filter(|item| query.selects(item)).collect();
    if query.watch {
        return watch(collection, &items, query.initial_events);
    }
    let list = json!({
        "kind": format!("{}List", collection.kind), "apiVersion": collection.api_version,
        "metadata": { "resourceVersion": VERSION }, "items": items,
    });
    respond(StatusCode::OK, &list)
}

fn find<'a, 'p>(
    collections: &'a HashMap<&'static str, Collection>,
    path: &'p str,
) -> Option<(&'a Collection, Option<&'p str>)> {
    if let Some(collection) = collections.get(path) {
        return Some((collection, None));
    }
    let (parent, name) = path.rsplit_once('/')?;
    collections.get(parent).map(|collection| (collection, Some(name)))
}

/// Events of the objects where they were asked for, then silence for as long as the connection lives.
fn watch(collection: &Collection, items: &[&Value], initial_events: bool) -> Response<Body> {
    let mut lines = String::new();
    if initial_events {
        let bookmark = json!({ "type": "BOOKMARK", "object": {
            "kind": collection.kind, "apiVersion": collection.api_version,
            "metadata": { "resourceVersion": VERSION, "annotations": { "k8s.io/initial-events-end": "true" } },
        } });
        let added = items.iter().map(|item| json!({ "type": "ADDED", "object": item }));
        lines.extend(added.chain([bookmark]).map(|event| format!("{event}\n")));
    }
    let frames = stream::unfold(Some(lines), |lines| async move {
        match lines {
            Some(lines) => Some((Ok(Frame::data(Bytes::from(lines))), None)),
            None => std::future::pending().await,
        }
    });
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(frames)));
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}

/// What is understood of a request's query.
#[derive(Debug, Default, PartialEq, Eq)]
struct Query {
    watch: bool,
    initial_events: bool,
    /// Label keys that must not be there: `!KEY`.
    without_labels: Vec<String>,
    /// Fields by their path, the value, and whether it must be equal.
    fields: Vec<(String, String, bool)>,
}

impl Query {
    fn parse(text: &str) -> Self {
        let mut query = Self::default();
        for (key, value) in form_urlencoded::parse(text.as_bytes()) {
            match &*key {
                "watch" => query.watch = matches!(&*value, "1" | "true"),
                "sendInitialEvents" => query.initial_events = value == "true",
                "labelSelector" => {
                    query.without_labels =
                        value.split(',').filter_map(|term| Some(term.strip_prefix('!')?.to_owned())).collect();
                }
                "fieldSelector" => query.fields = value.split(',').filter_map(field_term).collect(),
                _ => {}
            }
        }
        query
    }

    fn selects(&self, item: &Value) -> bool {
        let labels = item.get("metadata").and_then(|metadata| metadata.get("labels"));
        let has = |key: &String| labels.is_some_and(|labels| labels.get(key).is_some());
        !self.without_labels.iter().any(has)
            && self.fields.iter().all(|(path, value, equal)| (field(item, path) == value) == *equal)
    }
}

fn field_term(term: &str) -> Option<(String, String, bool)> {
    let (path, value, equal) = match term.split_once("!=") {
        Some((path, value)) => (path, value, false),
        None => term.split_once('=').map(|(path, value)| (path, value.trim_start_matches('='), true))?,
    };
    Some((path.to_owned(), value.to_owned(), equal))
}

fn field<'a>(item: &'a Value, path: &str) -> &'a str {
    path.split('.').try_fold(item, |value, key| value.get(key)).and_then(Value::as_str).unwrap_or_default()
}

fn not_found(what: &str) -> Response<Body> {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "NotFound", "code": 404,
        "message": format!("the scenario has no {what}"),
    });
    respond(StatusCode::NOT_FOUND, &status)
}

fn respond(code: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(BodyExt::boxed(Full::new(Bytes::from(value.to_string()))));
    *response.status_mut() = code;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_of_proxies_are_obeyed() {
        let query = Query::parse(
            "labelSelector=%21service.kubernetes.io%2Fheadless%2C%21service.kubernetes.io%2Fservice-proxy-name&fieldSelector=spec.clusterIP%21%3DNone&watch=true",
        );
        assert!(query.watch && !query.initial_events);
        let item = |labels: Value, ip: &str| json!({ "metadata": { "name": "a", "labels": labels }, "spec": { "clusterIP": ip } });
        assert!(query.selects(&item(json!({ "app": "x" }), "10.0.0.1")));
        assert!(query.selects(&json!({ "metadata": { "name": "a" } })));
        assert!(!query.selects(&item(json!({ "service.kubernetes.io/headless": "" }), "10.0.0.1")));
        assert!(!query.selects(&item(json!({}), "None")));
        let query = Query::parse("fieldSelector=metadata.name%3Da&watch=0");
        assert!(query.selects(&item(json!({}), "")) && !query.selects(&json!({ "metadata": { "name": "b" } })));
    }

    #[test]
    fn objects_stay_as_they_are_written() {
        let item = completed(json!({ "spec": { "ports": [{ "targetPort": 0 }] } }), "v1", "Service", 3);
        assert_eq!(item["spec"]["ports"][0]["targetPort"], 0);
        assert_eq!((&item["metadata"]["resourceVersion"], &item["kind"]), (&json!(VERSION), &json!("Service")));
    }
}
