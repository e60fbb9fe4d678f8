//! One client: a process in its place that keeps flows and opens new ones until its input ends. One thread serves thousands of them.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use futures::{StreamExt, TryStreamExt, stream};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::now;
use super::report::{Event, Report};
use super::target::Target;
use crate::files::allow_many_files;
use crate::{EchoReply, Failure, patient};

/// How long an answer may take. A SYN that is lost comes again after one second.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a datagram is waited for before it is sent again, as a resolver would.
const DATAGRAM_PATIENCE: Duration = Duration::from_secs(1);
/// How often a datagram is sent.
const DATAGRAMS: usize = 3;
/// Flows that are opened at once in the beginning, and asked at once in the end.
const AT_ONCE: usize = 64;
/// New flows to one target that wait for their answer at once; more are begun later.
const WAITING_MAX: usize = 1024;
/// Bytes that are read at once.
const READ_AT_ONCE: usize = 256;

/// What the client is to do.
#[derive(Debug, Clone, Args)]
pub struct TrafficOptions {
    /// Whom to ask: `tcp:ADDRESS:PORT` or `udp:ADDRESS:PORT`; once for each.
    #[arg(long = "target", required = true)]
    targets: Vec<Target>,
    /// Who may answer; without any, everybody.
    #[arg(long = "server")]
    servers: Vec<String>,
    /// Flows to keep at each target.
    #[arg(long)]
    kept: usize,
    /// From one question on a kept flow to the next, in milliseconds.
    #[arg(long)]
    kept_pause_ms: u64,
    /// From one new flow at a target to the next, in microseconds.
    #[arg(long)]
    pause_us: u64,
    /// Ends new connections with a reset.
    #[arg(long)]
    reset: bool,
}

/// The client's side: a line when all flows are open, and a report as JSON for each target when the input has ended.
///
/// # Errors
/// When a flow to keep is not answered at once, or nobody reads.
pub fn traffic(options: &TrafficOptions) -> Result<()> {
    allow_many_files()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let reports = runtime.context("cannot start a tokio runtime")?.block_on(run(options))?;
    for report in reports {
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(())
}

async fn run(options: &TrafficOptions) -> Result<Vec<Report>> {
    let servers: Arc<[String]> = options.servers.clone().into();
    let (stop, stopped) = watch::channel(false);
    let mut asked = Vec::new();
    for target in &options.targets {
        let asker = Asker {
            target: *target,
            servers: Arc::clone(&servers),
            reset: options.reset,
            report: Arc::new(Mutex::new(Report { udp: target.udp, kept: options.kept, ..Report::default() })),
            stopped: stopped.clone(),
        };
        let begun = stream::iter(0..options.kept).map(|_| asker.begin()).buffer_unordered(AT_ONCE);
        asked.push((begun.try_collect::<Vec<_>>().await?, asker));
    }
    println!("ready");
    let mut tasks = JoinSet::new();
    let gate = Arc::new(Semaphore::new(AT_ONCE));
    let reports: Vec<_> = asked.iter().map(|(_, asker)| Arc::clone(&asker.report)).collect();
    for (kept, asker) in asked {
        let (count, period) = (u32::try_from(kept.len())?, Duration::from_millis(options.kept_pause_ms));
        for (place, flow) in (0..).zip(kept) {
            tasks.spawn(asker.clone().keep(flow, period * place / count, period, Arc::clone(&gate)));
        }
        tasks.spawn(asker.ask_often(Duration::from_micros(options.pause_us)));
    }
    thread::spawn(move || {
        // What is read does not matter, nor why it ended.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        // Nobody listens any more where a task has panicked.
        let _ = stop.send(true);
    });
    while let Some(ended) = tasks.join_next().await {
        ended.context("a flow's task panicked")?;
    }
    Ok(reports.iter().map(|report| lock(report).clone()).collect())
}

fn lock(report: &Mutex<Report>) -> MutexGuard<'_, Report> {
    report.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks at one target.
#[derive(Clone)]
struct Asker {
    target: Target,
    servers: Arc<[String]>,
    reset: bool,
    report: Arc<Mutex<Report>>,
    stopped: watch::Receiver<bool>,
}

/// A flow and the server at its other end.
struct Flow {
    socket: Socket,
    server: String,
}

enum Socket {
    Tcp(BufReader<TcpStream>),
    Udp(UdpSocket),
}

impl Asker {
    /// A flow that is answered.
    async fn begin(&self) -> Result<Flow> {
        let begin = async {
            let mut socket = Socket::open(self.target).await?;
            let server = socket.ask().await?;
            ensure!(self.servers.is_empty() || self.servers.contains(&server), "{server} is no endpoint");
            Ok(Flow { socket, server })
        };
        let flow: Result<Flow> = begin.await;
        flow.with_context(|| self.target.to_string())
    }

    /// Asks on a flow now and then, first after `first`; and once more in the end, so that nothing goes unnoticed.
    async fn keep(mut self, mut flow: Flow, first: Duration, period: Duration, gate: Arc<Semaphore>) {
        let mut pause = first;
        loop {
            tokio::select! {
                _ = self.stopped.changed() => break,
                () = sleep(pause) => {}
            }
            pause = period;
            if !self.turn(&mut flow).await {
                return;
            }
        }
        if let Ok(_turn) = gate.acquire().await {
            self.turn(&mut flow).await;
        }
    }

    /// Whether the flow still stands.
    async fn turn(&self, flow: &mut Flow) -> bool {
        let (began, start) = (now(), Instant::now());
        let answer = flow.socket.ask().await.and_then(|server| {
            ensure!(server == flow.server, "{server} was {}", flow.server);
            Ok(())
        });
        let what = || format!("{} from port {} with {}", self.target, flow.socket.port(), flow.server);
        let mut report = lock(&self.report);
        report.questions += 1;
        match answer {
            Ok(()) => report.answered(began, start.elapsed(), || format!("{}, kept", what())),
            Err(error) => {
                report.note(began, Event::Lost, format!("{} after {:?}: {error:#}", what(), start.elapsed()));
                return false;
            }
        }
        true
    }

    /// New flows, one after the other, without waiting for answers.
    async fn ask_often(mut self, pause: Duration) {
        let mut ticks = interval(pause);
        // A client that was kept from its CPU goes on where it is.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let waiting = Arc::new(Semaphore::new(WAITING_MAX));
        let mut asked = JoinSet::new();
        loop {
            tokio::select! {
                _ = self.stopped.changed() => break,
                _ = ticks.tick() => {}
            }
            let Ok(place) = Arc::clone(&waiting).acquire_owned().await else { break };
            let asker = self.clone();
            asked.spawn(async move {
                asker.ask_anew().await;
                drop(place);
            });
            while asked.try_join_next().is_some() {}
        }
        asked.join_all().await;
    }

    async fn ask_anew(&self) {
        let (began, start) = (now(), Instant::now());
        let answer = match self.target.udp {
            true => self.ask_by_datagrams().await,
            false => self.begin().await.map(|flow| flow.socket.end(self.reset)),
        };
        let mut report = lock(&self.report);
        report.asked += 1;
        match answer {
            Ok(()) => report.answered(began, start.elapsed(), || self.target.to_string()),
            Err(error) => report.note(began, Event::Failed, format!("{error:#} after {:?}", start.elapsed())),
        }
    }

    /// Datagrams are repeated from a socket of their own each, as a resolver does it; the sockets are never connected.
    async fn ask_by_datagrams(&self) -> Result<()> {
        for _ in 0..DATAGRAMS {
            let socket = UdpSocket::bind(any(self.target.address)).await?;
            socket.send_to(b"who\n", self.target.address).await.map_err(Failure::from)?;
            let mut buffer = [0; 512];
            let Ok(received) = timeout(patient(DATAGRAM_PATIENCE), socket.recv_from(&mut buffer)).await else {
                continue;
            };
            let (length, from) = received.map_err(Failure::from)?;
            ensure!(from == self.target.address, Failure::WrongPeer(from));
            let server = name(buffer.get(..length).unwrap_or_default())?;
            ensure!(self.servers.is_empty() || self.servers.contains(&server), "{server} is no endpoint");
            return Ok(());
        }
        bail!("{}: {DATAGRAMS} datagrams were not answered", self.target)
    }
}

impl Socket {
    async fn open(target: Target) -> Result<Self> {
        if target.udp {
            let socket = UdpSocket::bind(any(target.address)).await?;
            socket.connect(target.address).await?;
            return Ok(Self::Udp(socket));
        }
        let connected = timeout(patient(PATIENCE), TcpStream::connect(target.address)).await;
        let stream = connected.map_err(|_| Failure::Timeout)?.map_err(Failure::from)?;
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(BufReader::with_capacity(READ_AT_ONCE, stream)))
    }

    fn port(&self) -> u16 {
        let address = match self {
            Self::Tcp(stream) => stream.get_ref().local_addr(),
            Self::Udp(socket) => socket.local_addr(),
        };
        address.map_or(0, |address| address.port())
    }

    /// The name of who answers.
    async fn ask(&mut self) -> Result<String> {
        match self {
            Self::Tcp(stream) => {
                let mut line = Vec::new();
                let answered = timeout(patient(PATIENCE), async {
                    stream.write_all(b"who\n").await?;
                    stream.read_until(b'\n', &mut line).await
                });
                let length = answered.await.map_err(|_| Failure::Timeout)?.map_err(Failure::from)?;
                ensure!(length > 0, "closed");
                name(&line)
            }
            Self::Udp(socket) => ask_by_datagram(socket).await,
        }
    }

    fn end(self, reset: bool) {
        if let (Self::Tcp(stream), true) = (&self, reset) {
            // One that was reset by the other side already is as good.
            let _ = socket2::SockRef::from(stream.get_ref()).set_linger(Some(Duration::ZERO));
        }
    }
}

async fn ask_by_datagram(socket: &UdpSocket) -> Result<String> {
    let mut buffer = [0; 512];
    for _ in 0..DATAGRAMS {
        socket.send(b"who\n").await.map_err(Failure::from)?;
        if let Ok(received) = timeout(patient(DATAGRAM_PATIENCE), socket.recv(&mut buffer)).await {
            return name(buffer.get(..received.map_err(Failure::from)?).unwrap_or_default());
        }
    }
    bail!("{DATAGRAMS} datagrams were not answered")
}

fn name(answer: &[u8]) -> Result<String> {
    Ok(String::from_utf8_lossy(answer).parse::<EchoReply>()?.name)
}

fn any(target: SocketAddr) -> (IpAddr, u16) {
    (if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EchoServer;

    fn asker(target: &str, servers: &[&str]) -> (Asker, watch::Sender<bool>) {
        let (stop, stopped) = watch::channel(false);
        let servers = servers.iter().map(|server| (*server).to_owned()).collect();
        (Asker { target: target.parse().unwrap(), servers, reset: true, report: Arc::default(), stopped }, stop)
    }

    #[tokio::test]
    async fn flows_are_kept_and_their_end_is_noticed() {
        let port = free_port();
        let _server = EchoServer::start("here", &[port], &[port]).unwrap();
        for text in [format!("tcp:127.0.0.1:{port}"), format!("udp:[::1]:{port}")] {
            let (asker, _stop) = asker(&text, &["here"]);
            let mut kept = asker.begin().await.unwrap();
            assert_eq!(kept.server, "here");
            asker.ask_anew().await;
            assert!(asker.turn(&mut kept).await);
            // Somebody else's answer is a loss.
            kept.server = "there".to_owned();
            asker.clone().keep(kept, Duration::ZERO, Duration::ZERO, Arc::new(Semaphore::new(1))).await;
            let report = lock(&asker.report);
            assert_eq!((report.asked, report.failed, report.questions, report.lost), (1, 0, 2, 1));
            assert!(report.events[0].2.contains("here was there"), "{:?}", report.events);
        }
    }

    #[tokio::test]
    async fn what_is_not_answered_or_by_a_stranger_has_failed() {
        let port = free_port();
        let (refused, _stop) = asker(&format!("tcp:127.0.0.1:{port}"), &[]);
        refused.ask_anew().await;
        assert!(lock(&refused.report).events[0].2.contains("refused"));
        assert!(refused.begin().await.is_err());
        let _server = EchoServer::start("here", &[port], &[port]).unwrap();
        for transport in ["tcp", "udp"] {
            let (strange, _stop) = asker(&format!("{transport}:127.0.0.1:{port}"), &["there"]);
            strange.ask_anew().await;
            let report = lock(&strange.report);
            assert_eq!(report.failed, 1);
            assert!(report.events[0].2.contains("here is no endpoint"), "{:?}", report.events);
        }
    }

    #[tokio::test]
    async fn kept_flows_are_asked_once_more_in_the_end() {
        let port = free_port();
        let _server = EchoServer::start("here", &[port], &[]).unwrap();
        let (asker, stop) = asker(&format!("tcp:127.0.0.1:{port}"), &["here"]);
        let kept = asker.begin().await.unwrap();
        stop.send(true).unwrap();
        let hour = Duration::from_hours(1);
        asker.clone().keep(kept, hour, hour, Arc::new(Semaphore::new(1))).await;
        assert_eq!(lock(&asker.report).questions, 1);
    }

    fn free_port() -> u16 {
        std::net::UdpSocket::bind("[::]:0").unwrap().local_addr().unwrap().port()
    }
}
