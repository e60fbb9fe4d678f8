//! One small HTTP server per Service with a healthCheckNodePort: load balancers ask it whether this node has endpoints
//! (kube-proxy 1.36 `pkg/proxy/healthcheck/service_health.go`).
//!
//! The runner says after each sync what has to be served; a task opens and closes ports accordingly. A port that is taken is an
//! Event at its Service, stops no other, and is tried again with the next change and every 30 s.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use http::StatusCode;
use http::header::{HeaderName, HeaderValue};
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::Health;
use crate::admin::{self, Reply, Routes};
use crate::events::{Events, Notice};
use crate::model::{HealthCheck, HealthCheckName, IpFamily, NodeConfig, ServiceKey};
use crate::node::NodePortAddresses;

/// Ports that are listened on, each address counted; Services beyond it are refused like those whose port is taken.
const LISTENERS_MAX: usize = 4096;
/// Connections to all of them at a time; further ones wait.
const CONNECTIONS_MAX: usize = 256;
/// Until ports that could not be opened are tried again.
const RETRY: Duration = Duration::from_secs(30);

const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What has to be served.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Every health check.
    pub checks: BTreeMap<HealthCheckName, HealthCheck>,
    /// Where those of IPv4 listen.
    pub v4: Vec<IpAddr>,
    /// Where those of IPv6 listen.
    pub v6: Vec<IpAddr>,
}

impl Wanted {
    /// All addresses of a family where NodePorts answer everywhere, else those where they do.
    pub fn new(
        checks: &BTreeMap<HealthCheckName, HealthCheck>,
        configured: &NodePortAddresses,
        node: &NodeConfig,
    ) -> Self {
        let addresses = |family, unspecified: IpAddr| {
            if configured.matches_all(family) {
                return vec![unspecified];
            }
            node.node_port_addresses.iter().copied().filter(|address| IpFamily::of(*address) == family).collect()
        };
        Self {
            checks: checks.clone(),
            v4: addresses(IpFamily::V4, Ipv4Addr::UNSPECIFIED.into()),
            v6: addresses(IpFamily::V6, Ipv6Addr::UNSPECIFIED.into()),
        }
    }

    fn addresses(&self, family: IpFamily) -> &[IpAddr] {
        match family {
            IpFamily::V4 => &self.v4,
            IpFamily::V6 => &self.v6,
        }
    }
}

/// Serves what `wanted` holds until its sender is gone.
pub async fn serve(mut wanted: watch::Receiver<Wanted>, health: Arc<Health>, events: Events) {
    let mut servers = Servers::new(health, events);
    loop {
        let now = wanted.borrow_and_update().clone();
        servers.reconcile(&now).await;
        let changed = if servers.failed.is_empty() {
            wanted.changed().await
        } else {
            tokio::time::timeout(RETRY, wanted.changed()).await.unwrap_or(Ok(()))
        };
        if changed.is_err() {
            return;
        }
    }
}

/// The ports that are open.
struct Servers {
    health: Arc<Health>,
    events: Events,
    places: Arc<Semaphore>,
    running: BTreeMap<HealthCheckName, Server>,
    /// Why the others are not; said once per reason.
    failed: BTreeMap<HealthCheckName, String>,
}

/// One check. Dropping it closes its ports and connections.
struct Server {
    port: u16,
    addresses: Vec<IpAddr>,
    endpoints: Arc<AtomicU32>,
    tasks: JoinSet<()>,
}

impl Servers {
    fn new(health: Arc<Health>, events: Events) -> Self {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        Self { health, events, places, running: BTreeMap::new(), failed: BTreeMap::new() }
    }

    /// First closes, then opens: a port may go from one Service to another.
    async fn reconcile(&mut self, wanted: &Wanted) {
        let stays = |name: &HealthCheckName, server: &mut Server| {
            let same_port = wanted.checks.get(name).is_some_and(|check| check.port == server.port);
            same_port && server.addresses == wanted.addresses(name.family)
        };
        for (name, mut server) in self.running.extract_if(.., |name, server| !stays(name, server)) {
            info!(service = %name.service, port = server.port, "health check closed");
            server.tasks.shutdown().await;
        }
        self.failed.retain(|name, _| wanted.checks.contains_key(name));
        for (name, check) in &wanted.checks {
            if let Some(server) = self.running.get(name) {
                server.endpoints.store(check.local_endpoints, Ordering::Relaxed);
            } else {
                self.open(name, *check, wanted.addresses(name.family));
            }
        }
    }

    fn open(&mut self, name: &HealthCheckName, check: HealthCheck, addresses: &[IpAddr]) {
        match self.listen(check.port, addresses) {
            Ok(listeners) => {
                info!(service = %name.service, port = check.port, "health check opened");
                self.failed.remove(name);
                let server = self.start(name, check, addresses, listeners);
                self.running.insert(name.clone(), server);
            }
            Err(problem) => self.fail(name, check.port, problem),
        }
    }

    fn fail(&mut self, name: &HealthCheckName, port: u16, problem: String) {
        if self.failed.get(name) == Some(&problem) {
            return;
        }
        warn!(service = %name.service, port, problem, "cannot serve the health check of a Service; others go on");
        let service = name.service.clone();
        self.events.notify(Notice::HealthCheckFailed { service, port, problem: problem.clone() });
        self.failed.insert(name.clone(), problem);
    }

    /// All addresses, or none.
    fn listen(&self, port: u16, addresses: &[IpAddr]) -> Result<Vec<TcpListener>, String> {
        let open: usize = self.running.values().map(|server| server.addresses.len()).sum();
        if open + addresses.len() > LISTENERS_MAX {
            return Err(format!("more than {LISTENERS_MAX} ports would be open"));
        }
        let bind = |address: &IpAddr| {
            let address = SocketAddr::new(*address, port);
            admin::bind(address, true).map_err(|error| format!("listen {address}: {error}"))
        };
        addresses.iter().map(bind).collect()
    }

    fn start(
        &self,
        name: &HealthCheckName,
        check: HealthCheck,
        addresses: &[IpAddr],
        listeners: Vec<TcpListener>,
    ) -> Server {
        let endpoints = Arc::new(AtomicU32::new(check.local_endpoints));
        let mut tasks = JoinSet::new();
        for listener in listeners {
            let routes = ServiceRoutes {
                service: name.service.clone(),
                endpoints: Arc::clone(&endpoints),
                health: Arc::clone(&self.health),
            };
            tasks.spawn(admin::serve_within(listener, routes, Arc::clone(&self.places)));
        }
        Server { port: check.port, addresses: addresses.to_vec(), endpoints, tasks }
    }
}

/// The answer of one check, the same at any path.
struct ServiceRoutes {
    service: ServiceKey,
    endpoints: Arc<AtomicU32>,
    health: Arc<Health>,
}

impl Routes for ServiceRoutes {
    async fn answer(&self, _path: &str) -> Reply {
        let endpoints = self.endpoints.load(Ordering::Relaxed);
        answer(&self.service, endpoints, self.health.is_healthy(Timestamp::now()))
    }
}

fn answer(service: &ServiceKey, endpoints: u32, healthy: bool) -> Reply {
    let ServiceKey { namespace, name } = service;
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n\
         \t\"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
    );
    let code = if endpoints != 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut reply = admin::reply(code, "application/json", body);
    reply.headers_mut().insert(WEIGHT, HeaderValue::from(endpoints));
    reply
}

#[cfg(test)]
#[path = "services_tests.rs"]
mod tests;
