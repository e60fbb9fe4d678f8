//! A server on a free port of 127.0.0.1 with its own authority, and a client that sends raw requests over TLS.
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step fails the test")]
#![allow(clippy::indexing_slicing, reason = "an absent field of a JSON value reads as null")]
#![allow(clippy::needless_pass_by_value, reason = "callers build the value in place")]

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use apiserver_server::{Config, Limits, Server, tls_config};
use apiserver_store::{MemoryLimits, MemoryStore, Revision, Store};
use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// How long anything may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// A certificate authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) certificate: CertificateDer<'static>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test CA");
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    pub(crate) fn sign(&self, user: &str, group: &str) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        params.distinguished_name.push(DnType::OrganizationName, group);
        params.subject_alt_names = vec![SanType::IpAddress(IpAddr::from([127, 0, 0, 1]))];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.der().clone(), PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())))
    }
}

/// A running server.
pub(crate) struct Api {
    pub(crate) address: SocketAddr,
    pub(crate) authority: Authority,
    pub(crate) store: Arc<MemoryStore>,
    client: Arc<ClientConfig>,
    stop: Option<oneshot::Sender<()>>,
    running: Option<tokio::task::JoinHandle<()>>,
}

/// How a server differs from the usual.
pub(crate) struct Setup {
    pub(crate) ranges: Vec<&'static str>,
    pub(crate) node_ports: std::ops::RangeInclusive<u16>,
    pub(crate) limits: Limits,
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) advertise: IpAddr,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            ranges: vec!["10.96.0.0/16", "fd00:10:96::/112"],
            node_ports: 30000..=32767,
            limits: Limits::default(),
            store: Arc::new(MemoryStore::new(MemoryLimits::default())),
            advertise: IpAddr::from([192, 0, 2, 10]),
        }
    }
}

/// One answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }

    /// The document, after checking the code.
    #[track_caller]
    pub(crate) fn expect(&self, code: u16) -> Value {
        assert_eq!(self.code, code, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    /// The message of a Status, after checking code and reason.
    #[track_caller]
    pub(crate) fn refused(&self, code: u16, reason: &str) -> String {
        let status = self.expect(code);
        assert_eq!(status["kind"], "Status", "{status}");
        assert_eq!(status["status"], "Failure", "{status}");
        assert_eq!(status["code"], code, "{status}");
        assert_eq!(status["reason"].as_str().unwrap_or_default(), reason, "{status}");
        status["message"].as_str().unwrap_or_default().to_owned()
    }
}

impl Api {
    pub(crate) async fn start() -> Self {
        Self::start_with(Setup::default()).await
    }

    pub(crate) async fn start_with(setup: Setup) -> Self {
        let authority = Authority::new();
        let (certificate, key) = authority.sign("kube-apiserver", "server");
        let config = Config {
            tls: tls_config(vec![certificate], key, authority.certificate.clone()).unwrap(),
            service_ranges: setup.ranges.iter().map(|range| range.parse().unwrap()).collect(),
            node_ports: setup.node_ports,
            advertise_address: setup.advertise,
            advertise_port: 6443,
            limits: setup.limits,
        };
        let store: Arc<dyn Store> = setup.store.clone();
        let server = Server::new(config, store).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(server.run(listener, async {
            let _ = stopped.await;
        }));
        let client = client_config(&authority, Some(authority.sign("admin", "system:masters")));
        Self { address, authority, store: setup.store, client, stop: Some(stop), running: Some(running) }
    }

    /// Stops the server and waits until it is gone.
    pub(crate) async fn stop(mut self) {
        drop(self.stop.take());
        tokio::time::timeout(DEADLINE, self.running.take().unwrap()).await.unwrap().unwrap();
    }

    pub(crate) async fn revision(&self) -> Revision {
        self.store.revision().await.unwrap()
    }

    /// Sends a request as the administrator.
    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path).header("host", "localhost");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send_as(&self.client, request.body(Full::new(body.into())).unwrap()).await.unwrap()
    }

    /// Sends a request with another TLS configuration.
    pub(crate) async fn send_as(
        &self,
        client: &Arc<ClientConfig>,
        request: Request<Full<Bytes>>,
    ) -> Result<Answer, String> {
        let response = tokio::time::timeout(DEADLINE, self.open(client, request)).await.unwrap()?;
        let (parts, body) = response.into_parts();
        let body = tokio::time::timeout(DEADLINE, body.collect()).await.unwrap().map_err(|error| error.to_string())?;
        Ok(Answer { code: parts.status.as_u16(), headers: parts.headers, body: body.to_bytes() })
    }

    async fn open(
        &self,
        client: &Arc<ClientConfig>,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, String> {
        let stream = TcpStream::connect(self.address).await.map_err(|error| error.to_string())?;
        let connector = tokio_rustls::TlsConnector::from(Arc::clone(client));
        let name = ServerName::IpAddress(IpAddr::from([127, 0, 0, 1]).into());
        let tls = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        sender.send_request(request).await.map_err(|error| error.to_string())
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[(ACCEPT.as_str(), "application/json")], "").await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, &[(CONTENT_TYPE.as_str(), "application/json")], body.to_string()).await
    }

    pub(crate) async fn put(&self, path: &str, body: &Value) -> Answer {
        self.send("PUT", path, &[(CONTENT_TYPE.as_str(), "application/json")], body.to_string()).await
    }

    pub(crate) async fn patch(&self, path: &str, form: &str, body: &Value) -> Answer {
        let form = format!("application/{form}-patch+json");
        self.send("PATCH", path, &[(CONTENT_TYPE.as_str(), &form)], body.to_string()).await
    }

    pub(crate) async fn delete(&self, path: &str, options: Value) -> Answer {
        let body = if options.is_null() { String::new() } else { options.to_string() };
        self.send("DELETE", path, &[(CONTENT_TYPE.as_str(), "application/json")], body).await
    }

    /// Opens a watch.
    pub(crate) async fn watch(&self, path: &str) -> Events {
        self.watch_as(path, "application/json").await
    }

    /// Opens a watch with an `Accept` header.
    pub(crate) async fn watch_as(&self, path: &str, accept: &str) -> Events {
        let request = Request::builder().uri(path).header("host", "localhost").header(ACCEPT, accept);
        let response = self.open(&self.client, request.body(Full::default()).unwrap()).await.unwrap();
        assert_eq!(response.status().as_u16(), 200);
        Events { body: response.into_body(), buffer: Vec::new() }
    }
}

/// The events of a watch.
pub(crate) struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Events {
    /// The next event, or `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let frame = tokio::time::timeout(DEADLINE, self.body.frame()).await.expect("no event in time")?;
            if let Ok(data) = frame.unwrap().into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }

    /// Type and name of the next event.
    pub(crate) async fn next_name(&mut self) -> (String, String) {
        let event = self.next().await.expect("the stream ended");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (text(&event["type"]), text(&event["object"]["metadata"]["name"]))
    }
}

/// A TLS configuration with or without a client certificate.
pub(crate) fn client_config(
    trusted: &Authority,
    identity: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.certificate.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    Arc::new(match identity {
        Some((certificate, key)) => builder.with_client_auth_cert(vec![certificate], key).unwrap(),
        None => builder.with_no_client_auth(),
    })
}

pub(crate) fn config_map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": "v"}})
}

pub(crate) fn pod(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "a"}},
        "spec": {"containers": [{"name": "c", "image": "i"}]}})
}

pub(crate) fn service(name: &str, spec: Value) -> Value {
    let mut service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec});
    if service["spec"].get("ports").is_none() {
        service["spec"]["ports"] = json!([{"port": 80, "protocol": "TCP"}]);
    }
    service
}

pub(crate) const CONFIG_MAPS: &str = "/api/v1/namespaces/default/configmaps";
pub(crate) const PODS: &str = "/api/v1/namespaces/default/pods";
pub(crate) const SERVICES: &str = "/api/v1/namespaces/default/services";
