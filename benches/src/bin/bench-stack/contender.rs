//! Who is compared: one node each, all of them in one cluster and with the same Services, so that every round meets all of them in turn.

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use node_sys::sysctl;
use serde_json::{Value, json};
use trama_lab::scenario::ServiceManifest;
use trama_lab::{Cluster, Place, Pod, wait_for};

use crate::load::{self, KEPT_PORT, READY, Reached, SHORT_PORT, STREAM_PORT, Work};

/// Where datagrams of the forwarding figures go; nothing listens there, see `live`.
pub(crate) const DATAGRAM_PORT: u16 = 9009;
/// How long the first sync, or that of thousands of Services, may take.
const SYNC_LIMIT: Duration = Duration::from_secs(900);

/// What a node runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// No proxy: what the machine does by itself. Traffic goes to the pod directly.
    Plain,
    /// trama-proxy in this mode.
    Trama(String),
    /// A kube-proxy binary in this mode.
    KubeProxy(PathBuf, String),
}

impl Kind {
    pub(crate) fn title(&self) -> String {
        match self {
            Self::Plain => "no proxy".to_owned(),
            Self::Trama(mode) => format!("trama {mode}"),
            Self::KubeProxy(_, mode) => format!("kube-proxy {mode}"),
        }
    }
}

/// A node with a client, a server and a proxy.
pub(crate) struct Contender {
    pub(crate) kind: Kind,
    /// Its node's number, counted from 1.
    pub(crate) node: usize,
    pub(crate) client: Pod,
    pub(crate) server: Pod,
    /// Address of its Service; without a proxy, of the server.
    pub(crate) service: IpAddr,
}

impl Contender {
    /// Makes the pods and the Service of `node`, and starts the server and the proxy.
    pub(crate) fn start(cluster: &Cluster, kind: Kind, node: usize) -> Result<Self> {
        let client = cluster.topology().add_pod(node, &format!("client-{node}"))?;
        let server = cluster.topology().add_pod(node, &format!("server-{node}"))?;
        start_server(&server.place()).with_context(|| format!("the server of node-{node}"))?;
        let address = server.addresses()[0];
        let name = format!("web-{node}");
        cluster.apply(service(&name))?;
        cluster.apply(slice(&name, node, address))?;
        let service = if kind == Kind::Plain { address } else { v4(cluster.cluster_ips(&name)?)? };
        match &kind {
            Kind::Plain => {}
            Kind::Trama(mode) => cluster.start_proxy_with(node, &["--proxy-mode", mode])?,
            Kind::KubeProxy(program, mode) => {
                cluster.start_other_proxy(node, &mut cluster.kube_proxy_command(node, program, mode)?)?;
            }
        }
        Ok(Self { kind, node, client, server, service })
    }

    /// Where the work is asked for: the Service, or the server's pod itself.
    pub(crate) fn target(&self, work: Work, direct: bool) -> SocketAddr {
        let address = if direct { self.server.addresses()[0] } else { self.service };
        SocketAddr::new(address, work.port())
    }

    /// Waits until this node's proxy serves what the API server was told last.
    pub(crate) fn wait_for_sync(&self, cluster: &Cluster, service: &str) -> Result<()> {
        if self.kind == Kind::Plain {
            return Ok(());
        }
        let target = SocketAddr::new(v4(cluster.cluster_ips(service)?)?, SHORT_PORT);
        let what = format!("the programming of {service} by {}", self.kind.title());
        let place = self.client.place().outside_cgroup();
        wait_for(&what, SYNC_LIMIT, || Ok(place.netns().run(|| load::ask_once(target))?.is_ok().then_some(())))
    }

    /// Keeps what ended from filling the kernel's tables: rounds follow each other faster than connections do in life.
    pub(crate) fn shorten_memory(&self, cluster: &Cluster) -> Result<()> {
        let timeouts = [("tcp_timeout_time_wait", "2"), ("tcp_timeout_close", "2"), ("udp_timeout", "5")];
        cluster.topology().node(self.node)?.netns().run(|| -> Result<()> {
            for (key, seconds) in timeouts {
                match sysctl::write(&format!("net/netfilter/nf_conntrack_{key}"), seconds) {
                    // Without conntrack in the kernel there is nothing to fill.
                    Err(error) if error.is_not_found() => {}
                    written => written?,
                }
            }
            Ok(())
        })??;
        // A port that the client uses again would find its last connection here, and a SYN that seems old: another address of the server's
        // has another clock (RFC 6191).
        Ok(self.server.place().netns().run(|| sysctl::write("net/ipv4/tcp_max_tw_buckets", "0"))??)
    }

    /// Runs a client in `place` and returns what it reached.
    pub(crate) fn load(
        &self,
        place: &Place,
        work: Work,
        target: SocketAddr,
        threads: usize,
        time: Duration,
    ) -> Result<Reached> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["load", "--work", work.word(), "--target", &target.to_string()]);
        command.args(["--threads", &threads.to_string(), "--milliseconds", &time.as_millis().to_string()]);
        let child = place.spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        let output = child.wait_with_output().context("cannot wait for the client")?;
        let about = || format!("{}: {} to {target}", self.kind.title(), work.word());
        ensure!(output.status.success(), "{}: the client ended with {}", about(), output.status);
        serde_json::from_slice(&output.stdout).with_context(about)
    }
}

fn start_server(place: &Place) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("serve").stdin(Stdio::null()).stdout(Stdio::piped());
    // It ends with the lab.
    let mut server = place.spawn(&mut command)?;
    let mut line = String::new();
    let output = server.stdout.take().context("a server without an output")?;
    BufReader::new(output).read_line(&mut line)?;
    ensure!(line.trim() == READY, "it does not listen");
    Ok(())
}

/// The IPv4 address among those of a Service.
fn v4(addresses: Vec<IpAddr>) -> Result<IpAddr> {
    addresses.into_iter().find(IpAddr::is_ipv4).context("a Service without an IPv4 address")
}

/// A Service without a selector whose ports are those of the server.
pub(crate) fn service(name: &str) -> Value {
    let service = ServiceManifest::new(name, None).port("UDP", DATAGRAM_PORT, DATAGRAM_PORT);
    [SHORT_PORT, KEPT_PORT, STREAM_PORT]
        .into_iter()
        .fold(service, |service, port| service.port("TCP", port, port))
        .build()
}

/// Its endpoint.
pub(crate) fn slice(service: &str, node: usize, address: IpAddr) -> Value {
    let port = |protocol: &str, port: u16| json!({ "name": trama_lab::scenario::port_name(protocol, port), "protocol": protocol, "port": port });
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-1"), "namespace": "default",
            "labels": {
                "kubernetes.io/service-name": service,
                "endpointslice.kubernetes.io/managed-by": "benches",
            },
        },
        "addressType": "IPv4",
        "ports": [
            port("TCP", SHORT_PORT), port("TCP", KEPT_PORT), port("TCP", STREAM_PORT), port("UDP", DATAGRAM_PORT),
        ],
        "endpoints": [{
            "addresses": [address.to_string()], "conditions": { "ready": true }, "nodeName": format!("node-{node}"),
        }],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slice_has_every_port_of_the_service() {
        let names = |list: &Value| {
            let mut names: Vec<_> = list.as_array().unwrap().iter().map(|port| port["name"].to_string()).collect();
            names.sort();
            names
        };
        let (service, slice) = (service("web-1"), slice("web-1", 1, [10, 244, 1, 3].into()));
        assert_eq!(names(&service["spec"]["ports"]), names(&slice["ports"]));
        assert_eq!(slice["endpoints"][0]["nodeName"], "node-1");
    }
}
