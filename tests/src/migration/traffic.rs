//! Traffic that goes on while proxies are exchanged: a client process on every way, and what they saw.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use super::client::{Event, Report};
use super::ways::Way;
use crate::binary;

/// How much traffic there is on each way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    /// Flows kept at each target.
    pub(super) kept: usize,
    /// From one new flow at a target to the next.
    pub(super) pause: Duration,
}

/// What became of the traffic of one kind.
#[derive(Debug, Clone, Default)]
pub(super) struct Record {
    pub(super) kind: &'static str,
    pub(super) tcp: Report,
    pub(super) udp: Report,
}

impl Record {
    /// Whether nothing was lost and nothing failed.
    pub(super) fn is_clean(&self) -> bool {
        [&self.tcp, &self.udp].iter().all(|report| report.lost + report.failed == 0)
    }

    /// Events of both transports, each as a sentence.
    pub(super) fn events(&self) -> impl Iterator<Item = &(Duration, Event, String)> {
        self.tcp.events.iter().chain(&self.udp.events)
    }
}

/// Running traffic.
#[derive(Debug)]
pub(super) struct Traffic {
    /// When all flows stood, since the epoch.
    pub(super) began: Duration,
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
    pub(super) fn start(ways: &[Way], load: Load) -> Result<Self> {
        let mut clients = ways.iter().map(|way| Client::start(way, load)).collect::<Result<Vec<_>>>()?;
        for client in &mut clients {
            let mut line = String::new();
            client.output.read_line(&mut line).context("the client has ended")?;
            ensure!(line == "ready\n", "{}: the flows to be kept do not stand", client.name);
        }
        Ok(Self { began: now(), clients })
    }

    /// Ends it, and says what became of it: a record for every kind, in the order of the ways.
    pub(super) fn stop(mut self) -> Result<Vec<Record>> {
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
        command.args(["--kept", &load.kept.to_string(), "--pause-ms", &load.pause.as_millis().to_string()]);
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
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
