//! One client of an exchange: a process in its place that keeps flows and opens new ones until its input ends.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::{EchoReply, Failure, Probe, Transport, patient};

/// From one question on a kept flow to the next.
const KEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long an answer may take. A SYN that is lost comes again after one second.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a datagram is waited for before it is sent again, as a resolver would.
const DATAGRAM_PATIENCE: Duration = Duration::from_secs(1);
/// How often a datagram is sent.
const DATAGRAMS: usize = 3;
/// What takes longer has lost a packet.
const SLOW: Duration = Duration::from_millis(900);
/// Events that a target's report has at most; the counts are complete.
const EVENTS_MAX: usize = 20;

/// What the client is to do.
#[derive(Debug, Clone, Args)]
pub struct TrafficOptions {
    /// Whom to ask: `tcp:ADDRESS:PORT` or `udp:ADDRESS:PORT`; once for each.
    #[arg(long = "target", required = true)]
    targets: Vec<Target>,
    /// Flows to keep at each target.
    #[arg(long)]
    kept: usize,
    /// From one new flow at a target to the next, in milliseconds.
    #[arg(long)]
    pause_ms: u64,
}

/// A Service's address and how it is talked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target {
    /// Whether by UDP, else by TCP.
    pub(super) udp: bool,
    /// Where.
    pub(super) address: SocketAddr,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", if self.udp { "udp" } else { "tcp" }, self.address)
    }
}

impl FromStr for Target {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (transport, address) = text.split_once(':').context("a target is tcp:ADDRESS:PORT or udp:ADDRESS:PORT")?;
        let udp = match transport {
            "tcp" => false,
            "udp" => true,
            other => bail!("{other} is neither tcp nor udp"),
        };
        Ok(Self { udp, address: address.parse().with_context(|| format!("{address} is no address and port"))? })
    }
}

/// What can happen to a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Event {
    /// A kept one broke, or was answered by another server than before.
    Lost,
    /// A new one was not answered.
    Failed,
    /// One was answered after a repetition.
    Slow,
}

/// What became of the flows to one target.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) udp: bool,
    pub(super) kept: usize,
    pub(super) lost: usize,
    pub(super) asked: usize,
    pub(super) failed: usize,
    pub(super) slow: usize,
    /// The first of them, each with the time since the epoch.
    pub(super) events: Vec<(Duration, Event, String)>,
}

impl Report {
    /// Counts an event that began at `began`.
    fn note(&mut self, began: Duration, event: Event, text: String) {
        *match event {
            Event::Lost => &mut self.lost,
            Event::Failed => &mut self.failed,
            Event::Slow => &mut self.slow,
        } += 1;
        if self.events.len() < EVENTS_MAX {
            self.events.push((began, event, text));
        }
    }

    /// Adds what another saw.
    pub(super) fn add(&mut self, other: &Self) {
        self.kept += other.kept;
        self.lost += other.lost;
        self.asked += other.asked;
        self.failed += other.failed;
        self.slow += other.slow;
        self.events.extend(other.events.iter().cloned());
    }
}

/// The client's side: a line when all flows are open, and a report as JSON for each target when the input has ended.
///
/// # Errors
/// When a flow to keep is not answered at once, or nobody reads.
pub fn traffic(options: &TrafficOptions) -> Result<()> {
    let mut kept = Vec::new();
    for target in &options.targets {
        for _ in 0..options.kept {
            kept.push((*target, Kept::begin(*target).with_context(|| format!("{target} is not answered"))?));
        }
    }
    println!("ready");
    let (stop, pause) = (AtomicBool::new(false), Duration::from_millis(options.pause_ms));
    let stop = &stop;
    let reports: Vec<Report> = thread::scope(|scope| {
        let mut threads = Vec::new();
        for (target, mut flow) in kept {
            threads.push((target, scope.spawn(move || flow.go_on(target, stop))));
        }
        for target in &options.targets {
            threads.push((*target, scope.spawn(move || ask(*target, pause, stop))));
        }
        // What is read does not matter, nor why it ended.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        stop.store(true, Ordering::Relaxed);
        let mut reports: Vec<Report> =
            options.targets.iter().map(|target| Report { udp: target.udp, ..Report::default() }).collect();
        for (target, thread) in threads {
            let place = options.targets.iter().position(|one| *one == target);
            let report = place.and_then(|place| reports.get_mut(place));
            if let (Some(report), Ok(seen)) = (report, thread.join()) {
                report.add(&seen);
            }
        }
        reports
    });
    for report in reports {
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(())
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A kept flow and the server at its other end.
struct Kept {
    socket: Socket,
    server: String,
}

enum Socket {
    Tcp(BufReader<TcpStream>),
    Udp(UdpSocket),
}

impl Kept {
    fn begin(target: Target) -> Result<Self> {
        let socket = if target.udp { Socket::udp(target.address)? } else { Socket::tcp(target.address)? };
        let mut kept = Self { socket, server: String::new() };
        kept.server = kept.socket.ask()?;
        Ok(kept)
    }

    fn go_on(&mut self, target: Target, stop: &AtomicBool) -> Report {
        let mut report = Report { kept: 1, ..Report::default() };
        while !stop.load(Ordering::Relaxed) {
            let (began, start) = (now(), Instant::now());
            let asked = self.socket.ask().and_then(|server| {
                ensure!(server == self.server, "{server} was {}", self.server);
                Ok(())
            });
            let what = || format!("{target} from port {} with {}", self.socket.port(), self.server);
            if let Err(error) = asked {
                report.note(began, Event::Lost, format!("{}: {error:#}", what()));
                break;
            }
            if start.elapsed() > SLOW {
                report.note(began, Event::Slow, format!("{}, kept: {:?}", what(), start.elapsed()));
            }
            thread::sleep(KEPT_PAUSE);
        }
        report
    }
}

impl Socket {
    fn tcp(target: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&target, patient(PATIENCE))?;
        stream.set_read_timeout(Some(patient(PATIENCE)))?;
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(BufReader::new(stream)))
    }

    fn udp(target: SocketAddr) -> Result<Self> {
        let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_read_timeout(Some(patient(DATAGRAM_PATIENCE)))?;
        socket.connect(target)?;
        Ok(Self::Udp(socket))
    }

    fn port(&self) -> u16 {
        let address = match self {
            Self::Tcp(stream) => stream.get_ref().local_addr(),
            Self::Udp(socket) => socket.local_addr(),
        };
        address.map_or(0, |address| address.port())
    }

    /// The name of who answers.
    fn ask(&mut self) -> Result<String> {
        let line = match self {
            Self::Tcp(stream) => {
                stream.get_mut().write_all(b"who\n")?;
                let mut line = String::new();
                ensure!(stream.read_line(&mut line)? > 0, "closed");
                line
            }
            Self::Udp(socket) => ask_by_datagram(socket)?,
        };
        Ok(line.parse::<EchoReply>()?.name)
    }
}

fn ask_by_datagram(socket: &UdpSocket) -> Result<String> {
    let mut buffer = [0; 512];
    for _ in 0..DATAGRAMS {
        socket.send(b"who\n")?;
        match socket.recv(&mut buffer) {
            Ok(length) => return Ok(String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    bail!("{DATAGRAMS} datagrams were not answered")
}

/// New flows, one after the other.
fn ask(target: Target, pause: Duration, stop: &AtomicBool) -> Report {
    let mut report = Report::default();
    while !stop.load(Ordering::Relaxed) {
        let (began, start) = (now(), Instant::now());
        report.asked += 1;
        match ask_once(target) {
            Err(failure) => report.note(began, Event::Failed, format!("{target}: {failure}")),
            Ok(()) if start.elapsed() > SLOW => {
                report.note(began, Event::Slow, format!("{target}: {:?}", start.elapsed()));
            }
            Ok(()) => {}
        }
        thread::sleep(pause.saturating_sub(start.elapsed()));
    }
    report
}

/// Datagrams are repeated from a socket of their own, as a resolver does it.
fn ask_once(target: Target) -> Result<(), Failure> {
    let (transport, timeout, attempts) = match target.udp {
        true => (Transport::Udp, DATAGRAM_PATIENCE, DATAGRAMS),
        false => (Transport::Tcp, PATIENCE, 1),
    };
    let probe = Probe { timeout, ..Probe::new(target.address, transport) };
    let mut last = Failure::Timeout;
    for _ in 0..attempts {
        match probe.ask() {
            Ok(_) => return Ok(()),
            Err(Failure::Timeout) => last = Failure::Timeout,
            Err(failure) => return Err(failure),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EchoServer;

    #[test]
    fn targets_read_back() {
        for text in ["tcp:10.96.0.1:80", "udp:[fd00::1]:53"] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
        assert!("sctp:10.96.0.1:80".parse::<Target>().is_err());
        assert!("10.96.0.1:80".parse::<Target>().is_err());
    }

    #[test]
    fn flows_are_kept_and_their_end_is_noticed() {
        let port = UdpSocket::bind("[::]:0").unwrap().local_addr().unwrap().port();
        let _server = EchoServer::start("here", &[port], &[port]).unwrap();
        let stop = AtomicBool::new(false);
        for text in [format!("tcp:127.0.0.1:{port}"), format!("udp:[::1]:{port}")] {
            let target: Target = text.parse().unwrap();
            let mut kept = Kept::begin(target).unwrap();
            assert_eq!(kept.server, "here");
            assert!(ask_once(target).is_ok());
            // Somebody else's answer is a loss.
            kept.server = "there".to_owned();
            let report = kept.go_on(target, &stop);
            assert_eq!((report.kept, report.lost), (1, 1));
            assert!(report.events[0].2.contains("here was there"), "{:?}", report.events);
        }
    }

    #[test]
    fn what_is_not_answered_has_failed() {
        let port = UdpSocket::bind("[::]:0").unwrap().local_addr().unwrap().port();
        let target: Target = format!("tcp:127.0.0.1:{port}").parse().unwrap();
        assert_eq!(ask_once(target), Err(Failure::Refused));
        assert!(Kept::begin(target).is_err());
    }
}
