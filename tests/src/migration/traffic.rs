//! Traffic that goes on while proxies are exchanged: connections that are kept, and new ones all the time.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::{Place, Probe, Transport};

/// From one new connection of a way to its next: 100 a second.
const PAUSE: Duration = Duration::from_millis(10);
/// From one question on a kept connection to the next.
const KEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long an answer may take. A SYN that is lost once comes again after a second, and is counted as slow.
const PATIENCE: Duration = Duration::from_secs(3);
/// What takes longer has lost a packet.
const SLOW: Duration = Duration::from_millis(900);

/// A way to the Service: who asks, and where.
#[derive(Debug, Clone)]
pub(super) struct Way {
    pub(super) name: String,
    pub(super) place: Place,
    pub(super) target: SocketAddr,
}

/// What became of the traffic.
#[derive(Debug, Clone, Default)]
pub(super) struct Record {
    /// Connections that were kept.
    pub(super) kept: usize,
    /// Those that broke, or were answered by another server than before.
    pub(super) lost: Vec<String>,
    /// New connections.
    pub(super) asked: usize,
    /// Those that failed.
    pub(super) failed: Vec<String>,
    /// Those that were answered only after a repetition.
    pub(super) slow: Vec<String>,
    /// How long it all took.
    pub(super) lasted: Duration,
}

/// Running traffic.
#[derive(Debug)]
pub(super) struct Traffic {
    stop: Arc<AtomicBool>,
    began: Instant,
    kept: Vec<JoinHandle<Option<String>>>,
    askers: Vec<JoinHandle<Record>>,
}

impl Traffic {
    /// Opens `kept` connections on each way that has a place outside of a cgroup, and starts to ask on every way.
    pub(super) fn start(ways: &[Way], kept: usize) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (mut keepers, mut askers) = (Vec::new(), Vec::new());
        for way in ways {
            for _ in 0..if way.place.cgroup().is_none() { kept } else { 0 } {
                let stream = way.place.connect(way.target, PATIENCE)?;
                let mut conversation = Conversation::begin(stream).context("a connection that is not answered")?;
                let (stop, way) = (Arc::clone(&stop), way.name.clone());
                keepers.push(thread::spawn(move || conversation.go_on(&stop).err().map(|e| format!("{way}: {e:#}"))));
            }
            let (stop, way) = (Arc::clone(&stop), way.clone());
            askers.push(thread::spawn(move || ask(&way, &stop)));
        }
        Ok(Self { stop, began: Instant::now(), kept: keepers, askers })
    }

    /// Ends it, and says what became of it.
    pub(super) fn stop(self) -> Record {
        self.stop.store(true, Ordering::Relaxed);
        let mut total = Record { kept: self.kept.len(), lasted: self.began.elapsed(), ..Record::default() };
        for keeper in self.kept {
            total.lost.extend(keeper.join().unwrap_or_else(|_| Some("the client panicked".to_owned())));
        }
        for asker in self.askers {
            let record = asker.join().unwrap_or_default();
            total.asked += record.asked;
            total.failed.extend(record.failed);
            total.slow.extend(record.slow);
        }
        total
    }
}

/// One kept connection and the server at its other end.
struct Conversation {
    stream: BufReader<TcpStream>,
    server: String,
}

impl Conversation {
    fn begin(stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let mut conversation = Self { stream: BufReader::new(stream), server: String::new() };
        conversation.server = conversation.ask()?;
        Ok(conversation)
    }

    fn go_on(&mut self, stop: &AtomicBool) -> Result<()> {
        while !stop.load(Ordering::Relaxed) {
            let server = self.ask()?;
            anyhow::ensure!(server == self.server, "{} was {}", server, self.server);
            thread::sleep(KEPT_PAUSE);
        }
        Ok(())
    }

    fn ask(&mut self) -> Result<String> {
        self.stream.get_mut().write_all(b"who\n")?;
        let mut line = String::new();
        anyhow::ensure!(self.stream.read_line(&mut line)? > 0, "closed");
        Ok(line.split(' ').next().unwrap_or_default().to_owned())
    }
}

/// New connections, one after the other. A place in a cgroup asks through a process of its own, many times each.
fn ask(way: &Way, stop: &AtomicBool) -> Record {
    let mut record = Record::default();
    let began = Instant::now();
    let probe = Probe { timeout: PATIENCE, ..Probe::new(way.target, Transport::Tcp) };
    let count = if way.place.cgroup().is_none() { 1 } else { 50 };
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let at = || format!("{} after {:.1} s", way.name, start.duration_since(began).as_secs_f32());
        match way.place.probe_times(probe, count) {
            Err(error) => record.failed.push(format!("{}: {error:#}", at())),
            Ok(outcomes) => {
                record.asked += outcomes.len();
                for outcome in outcomes {
                    match outcome {
                        Err(failure) => record.failed.push(format!("{}: {failure}", at())),
                        Ok(reply) if reply.latency > SLOW => record.slow.push(format!("{}: {:?}", at(), reply.latency)),
                        Ok(_) => {}
                    }
                }
            }
        }
        thread::sleep(PAUSE.saturating_sub(start.elapsed()));
    }
    record
}
