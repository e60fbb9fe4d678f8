//! Traffic that goes on while something is done to the proxies: a client process on every way, and what they saw.

mod client;
mod report;
mod target;

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

pub use self::client::{TrafficOptions, traffic};
pub use self::report::{Event, Report};
pub use self::target::Target;
use crate::{Cluster, Place, Transport, binary};

/// A way to a Service: who asks, and where.
#[derive(Debug, Clone)]
pub struct Way {
    /// What kind of way it is; those of a kind follow each other, and are counted together.
    pub kind: &'static str,
    /// Tells it from the others of its kind.
    pub name: String,
    /// Where the client stands.
    pub place: Place,
    /// Whom it asks.
    pub targets: Vec<Target>,
    /// Who may answer.
    pub servers: &'static [&'static str],
}

impl Way {
    /// Waits until every server answers at every target.
    ///
    /// # Errors
    /// When one does not in time.
    pub fn wait_for_answers(&self, cluster: &Cluster) -> Result<()> {
        for target in &self.targets {
            let transport = if target.udp { Transport::UdpConnected } else { Transport::Tcp };
            let answers = cluster.wait_for_answers(&self.place, target.address, transport, self.servers);
            answers.with_context(|| self.name.clone())?;
        }
        Ok(())
    }
}

/// How much traffic there is on each way.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Flows kept at each target.
    pub kept: usize,
    /// From one question on a kept flow to the next.
    pub kept_pause: Duration,
    /// From one new flow at a target to the next.
    pub pause: Duration,
    /// Whether new connections end with a reset. Else each occupies a port of the client's for another minute, of which there are 28,000.
    pub reset: bool,
}

/// What became of the traffic of one kind.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// Which kind.
    pub kind: &'static str,
    /// Its TCP connections.
    pub tcp: Report,
    /// Its flows of datagrams.
    pub udp: Report,
}

impl Record {
    /// Whether nothing was lost and nothing failed.
    pub fn is_clean(&self) -> bool {
        [&self.tcp, &self.udp].iter().all(|report| report.lost + report.failed == 0)
    }

    /// Events of both transports, each as a sentence.
    pub fn events(&self) -> impl Iterator<Item = &(Duration, Event, String)> {
        self.tcp.events.iter().chain(&self.udp.events)
    }
}

/// Running traffic.
#[derive(Debug)]
pub struct Traffic {
    /// When all flows stood, since the epoch.
    pub began: Duration,
    clients: Vec<Client>,
}

/// A client and the kind of traffic that it makes; dropping it ends it.
#[derive(Debug)]
struct Client {
    kind: &'static str,
    name: String,
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Traffic {
    /// Starts a client on each way; all flows that are to be kept stand when this returns.
    ///
    /// # Errors
    /// When a client cannot be started, or a flow is not answered.
    pub fn start(ways: &[Way], load: Load) -> Result<Self> {
        let mut clients = ways.iter().map(|way| Client::start(way, load)).collect::<Result<Vec<_>>>()?;
        for client in &mut clients {
            let mut line = String::new();
            client.output.read_line(&mut line).context("the client has ended")?;
            ensure!(line == "ready\n", "{}: the flows to be kept do not stand", client.name);
        }
        Ok(Self { began: now(), clients })
    }

    /// Ends it, and says what became of it: a record for every kind, in the order of the ways.
    ///
    /// # Errors
    /// When a client has ended before.
    pub fn stop(mut self) -> Result<Vec<Record>> {
        self.clients.iter_mut().for_each(|client| drop(client.input.take()));
        let mut records: Vec<Record> = Vec::new();
        for mut client in self.clients {
            if records.last().is_none_or(|record| record.kind != client.kind) {
                records.push(Record { kind: client.kind, ..Record::default() });
            }
            let Some(record) = records.last_mut() else { continue };
            for mut report in client.reports()? {
                for (_, _, text) in &mut report.events {
                    *text = format!("{} {text}", client.name);
                }
                let total = if report.udp { &mut record.udp } else { &mut record.tcp };
                total.add(&report);
            }
        }
        Ok(records)
    }
}

impl Client {
    fn start(way: &Way, load: Load) -> Result<Self> {
        let mut command = Command::new(binary("trama-lab")?);
        command.arg("traffic").args(way.targets.iter().flat_map(|target| ["--target".to_owned(), target.to_string()]));
        command.args(way.servers.iter().flat_map(|server| ["--server", server]));
        command.args(["--kept", &load.kept.to_string(), "--kept-pause-ms", &load.kept_pause.as_millis().to_string()]);
        command.args(["--pause-us", &load.pause.as_micros().to_string()]);
        command.args(load.reset.then_some("--reset"));
        let mut child = way.place.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("a child without its standard output")?);
        Ok(Self { kind: way.kind, name: way.name.clone(), child, input, output })
    }

    fn reports(&mut self) -> Result<Vec<Report>> {
        let lines: Vec<String> =
            (&mut self.output).lines().collect::<Result<_, _>>().context("the client has ended")?;
        ensure!(!lines.is_empty(), "{}: the client has ended early", self.name);
        lines.iter().map(|line| serde_json::from_str(line).context("cannot read the client's report")).collect()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Since the epoch.
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
