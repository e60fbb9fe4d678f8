//! A cluster with ten thousand open connections and a thousand questions a second, of which none may be lost whatever is done to it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::scenario::{ServiceManifest, endpoint_slice, pod};
use crate::traffic::{Event, Load, Record, Target, Traffic, Way};
use crate::{Cluster, ClusterOptions};

/// Who may answer for the Service `web`; the last one comes and goes.
pub const SERVERS: [&str; 4] = ["web-1", "web-2", "web-3", "extra"];
/// Endpoints that the Service `web` has all the time.
const STEADY_SERVERS: usize = 3;
/// Endpoints of the Service `other`, whose answers are wrong ones; they come and go too.
const OTHERS: [&str; 2] = ["other-1", "other-2"];
/// Port of the servers.
const PORT: u16 = 8080;
/// Connections that are kept, at least.
pub const KEPT: usize = 10_000;
/// Questions a second that there are at least on a machine with other work: a tenth of what is asked for.
const RATE_MIN: f64 = 100.0;
/// Events that are told where something was lost.
const EVENTS_TOLD: usize = 10;

/// How the ways differ.
const KINDS: [&str; 3] = ["outside -> NodePort", "pod, packet path", "pod, socket path"];

/// A cluster with traffic to come.
pub struct Steady {
    /// The cluster: two nodes, clients at and on the first one.
    pub cluster: Cluster,
    ways: Vec<Way>,
}

/// What was done while traffic went on.
#[derive(Debug)]
pub struct Outcome {
    /// What each kind of way saw.
    pub records: Vec<Record>,
    /// For how long.
    pub elapsed: Duration,
}

impl Steady {
    /// Starts the cluster; every server of `web` is answering when this returns.
    ///
    /// # Errors
    /// As [`Cluster::start`], and when a server does not answer.
    pub fn start(proxy_arguments: &'static [&'static str]) -> Result<Self> {
        let cluster = Cluster::start(&ClusterOptions { proxy_arguments, ..ClusterOptions::default() })?;
        cluster.apply_all(
            [("web-1", 1), ("web-2", 2), ("web-3", 2)].map(|(name, node)| pod(name, node, "web", &[PORT], &[])),
        )?;
        for name in OTHERS.into_iter().chain(["extra", "client", "packets"]) {
            let ports: &[u16] = if ["client", "packets"].contains(&name) { &[] } else { &[PORT] };
            cluster.apply(pod(name, 1, name, ports, &[]))?;
            cluster.place_in_pod(&format!("default/{name}"))?;
        }
        let service = |name, app| {
            let service = ServiceManifest::new(name, app).port("TCP", 80, PORT).with("type", json!("NodePort"));
            service.with("ipFamilyPolicy", json!("RequireDualStack")).build()
        };
        cluster.apply_all([service("web", Some("web")), service("other", None)])?;
        let ways = ways(&cluster)?;
        ways.iter().try_for_each(|way| way.wait_for_answers(&cluster))?;
        let ways = ways.into_iter().map(|way| Way { servers: &SERVERS, ..way }).collect();
        Ok(Self { cluster, ways })
    }

    /// Keeps [`KEPT`] connections and asks a thousand times a second, half of it on those, while `work` is done.
    ///
    /// # Errors
    /// When `work` fails, or a client.
    pub fn during<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Outcome)> {
        let targets: usize = self.ways.iter().map(|way| way.targets.len()).sum();
        let kept = KEPT.div_ceil(targets);
        let load = Load {
            kept,
            kept_pause: Duration::from_millis(2 * (kept * targets) as u64),
            pause: Duration::from_millis(2 * targets as u64),
            reset: true,
        };
        self.during_load(load, work)
    }

    /// As [`Steady::during`], with another load.
    ///
    /// # Errors
    /// As there.
    pub fn during_load<T>(&self, load: Load, work: impl FnOnce() -> Result<T>) -> Result<(T, Outcome)> {
        let traffic = Traffic::start(&self.ways, load)?;
        let start = Instant::now();
        let done = work();
        let elapsed = start.elapsed();
        let outcome = Outcome { records: traffic.stop()?, elapsed };
        outcome.print();
        // What was done is worth nothing if it failed, but what the traffic saw may say why.
        Ok((done?, outcome))
    }

    /// Makes the endpoints `extra` of `web` and those of `other` come or go, in both families.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn change_endpoints(&self, round: usize) -> Result<()> {
        for (family, suffix) in ["v4", "v6"].into_iter().enumerate() {
            let address = |name: &str| -> Result<IpAddr> {
                let addresses = self.cluster.pod_addresses(&format!("default/{name}"));
                let address = addresses.and_then(|addresses| addresses.get(family).copied());
                address.with_context(|| format!("{name} does not run"))
            };
            for (service, names) in [("web", &["extra"][..]), ("other", &OTHERS)] {
                // Another number each time: none, one or two of them.
                let names = names.iter().enumerate().filter(|(place, _)| (round >> place) & 1 == 1);
                let addresses = names.map(|(_, name)| address(name)).collect::<Result<Vec<_>>>()?;
                let mut slice = endpoint_slice(&format!("{service}-more-{suffix}"), service, 80, PORT, &addresses);
                if let Some(kind) = slice.get_mut("addressType") {
                    *kind = json!(if family == 0 { "IPv4" } else { "IPv6" });
                }
                self.cluster.apply(slice)?;
            }
        }
        Ok(())
    }
}

impl Outcome {
    /// Prints a row for every kind.
    fn print(&self) {
        println!(
            "{:<22} {:>6} {:>6} {:>9} {:>7} {:>7} {:>6} {:>9}",
            "", "KEPT", "LOST", "QUESTIONS", "NEW", "FAILED", "SLOW", "SLOWEST"
        );
        for record in &self.records {
            let tcp = &record.tcp;
            println!(
                "{:<22} {:>6} {:>6} {:>9} {:>7} {:>7} {:>6} {:>6} ms",
                record.kind,
                tcp.kept,
                tcp.lost,
                tcp.questions,
                tcp.asked,
                tcp.failed,
                tcp.slow,
                tcp.slowest.as_millis()
            );
        }
        let broken = self.records.iter().flat_map(Record::events).filter(|(_, event, _)| *event != Event::Slow);
        for (_, event, text) in broken.take(EVENTS_TOLD) {
            println!("  {event:?}: {text}");
        }
        println!("{:.0} questions a second for {:.1} s", self.rate(), self.elapsed.as_secs_f64());
    }

    /// New and kept questions that took nearly as long as a SYN takes to come again.
    pub fn slow(&self) -> usize {
        self.records.iter().map(|record| record.tcp.slow).sum()
    }

    fn rate(&self) -> f64 {
        let questions: usize = self.records.iter().map(|record| record.tcp.questions + record.tcp.asked).sum();
        questions as f64 / self.elapsed.as_secs_f64()
    }

    /// # Errors
    /// When a connection was lost or refused, answered by a stranger, or not in time; or when too few were there to tell.
    pub fn is_clean(&self) -> Result<()> {
        let kept: usize = self.records.iter().map(|record| record.tcp.kept).sum();
        ensure!(kept >= KEPT, "only {kept} connections were kept");
        ensure!(self.rate() >= RATE_MIN, "only {:.0} questions a second", self.rate());
        for record in &self.records {
            let (lost, failed) = (record.tcp.lost, record.tcp.failed);
            ensure!(record.is_clean(), "{}: {lost} kept and {failed} new connections failed", record.kind);
            ensure!(record.tcp.questions >= record.tcp.kept, "{}: not every kept connection was asked", record.kind);
        }
        Ok(())
    }
}

fn ways(cluster: &Cluster) -> Result<Vec<Way>> {
    // Of their own pods: a connection that is translated on its way may have to get another port than one that a socket made itself has
    // (`port_reuse.rs`), which is not what this is about.
    let client = cluster.place_in_pod("default/client")?;
    let packets = cluster.place_in_pod("default/packets")?.outside_cgroup();
    let vips: Vec<SocketAddr> = cluster.cluster_ips("web")?.into_iter().map(|ip| SocketAddr::new(ip, 80)).collect();
    let node_port = cluster.node_port("web", "TCP", 80)?;
    let node = cluster.topology().node(1)?.addresses().map(|ip| SocketAddr::new(ip, node_port));
    let places = [cluster.topology().client(), packets, client];
    let ways = KINDS.into_iter().zip(places).enumerate().map(|(number, (kind, place))| Way {
        kind,
        name: String::new(),
        place,
        targets: tcp(if number == 0 { &node } else { &vips }),
        servers: SERVERS.get(..STEADY_SERVERS).unwrap_or_default(),
    });
    Ok(ways.collect())
}

fn tcp(addresses: &[SocketAddr]) -> Vec<Target> {
    // Each once, in any order that the API server gives them in.
    let addresses: BTreeSet<_> = addresses.iter().copied().collect();
    addresses.into_iter().map(|address| Target { udp: false, address }).collect()
}
