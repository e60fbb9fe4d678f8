//! What a server is started with.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

/// How much the server does at once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Reading requests in flight; more get 429. 400, as in kube-apiserver.
    pub reads_in_flight_max: usize,
    /// Writing requests in flight; more get 429. 200, as in kube-apiserver.
    pub writes_in_flight_max: usize,
    /// Open watches; more get 429. 10,000.
    pub watches_max: usize,
    /// Open connections; more wait in the listener's queue. 10,000.
    pub connections_max: usize,
    /// How long a request other than a watch may take. 60 s, as in kube-apiserver.
    pub request_timeout: Duration,
    /// How long connections may take to end when the server stops. 5 s.
    pub shutdown_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            reads_in_flight_max: 400,
            writes_in_flight_max: 200,
            watches_max: 10_000,
            connections_max: 10_000,
            request_timeout: Duration::from_secs(60),
            shutdown_timeout: Duration::from_secs(5),
        }
    }
}

/// Everything a server needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Certificate, key and the CA of clients; see [`crate::tls_config`].
    pub tls: Arc<rustls::ServerConfig>,
    /// One range of cluster IPs per IP family, the default family first.
    pub service_ranges: Vec<IpNet>,
    /// The node ports that Services may have.
    pub node_ports: RangeInclusive<u16>,
    /// The address at which pods and nodes reach this server: the endpoint of the Service `default/kubernetes`.
    pub advertise_address: IpAddr,
    /// The port that goes with it.
    pub advertise_port: u16,
    /// Bounds.
    pub limits: Limits,
}
