//! The processes at both ends of a measurement: a server with three ports, and a client that asks it for a bounded time.
//!
//! Both are this program, started in a pod's namespace and cgroup.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use benches::figures::percentile;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Answers one byte on each connection and closes it.
pub(crate) const SHORT_PORT: u16 = 8080;
/// Answers every byte, for as long as the client stays.
pub(crate) const KEPT_PORT: u16 = 8081;
/// Takes all that comes and answers one byte at its end.
pub(crate) const STREAM_PORT: u16 = 8082;
/// Printed by the server once it listens.
pub(crate) const READY: &str = "ready";
/// Connections of the short kind that are answered at once: more than clients have threads.
const ACCEPTORS: usize = 8;
/// How long any step may take before it counts as a failure.
const PATIENCE: Duration = Duration::from_secs(5);
/// A client that has failed so often gives up: each failure may take [`PATIENCE`].
const FAILURES_MAX: u64 = 3;
/// Bytes of one write and one read of a stream.
const CHUNK: usize = 128 * 1024;

/// What a client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Work {
    /// Connects, asks one byte, reads to the end and closes, again and again.
    Short,
    /// Asks one byte after the other on one connection.
    Kept,
    /// Writes on one connection as fast as it goes.
    Stream,
}

impl Work {
    /// The server's port for it.
    pub(crate) fn port(self) -> u16 {
        match self {
            Self::Short => SHORT_PORT,
            Self::Kept => KEPT_PORT,
            Self::Stream => STREAM_PORT,
        }
    }

    /// How it is called on the command line.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Kept => "kept",
            Self::Stream => "stream",
        }
    }
}

/// What a client reached.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Reached {
    /// Connections, requests or bytes a second.
    pub(crate) per_second: f64,
    /// Microseconds of one, half of them and 99 of 100 at most; `None` of a stream, and where all failed.
    pub(crate) p50_us: Option<f64>,
    pub(crate) p99_us: Option<f64>,
    /// Connections and requests that failed.
    pub(crate) failures: u64,
    /// What the first of them met.
    pub(crate) first_failure: Option<String>,
}

/// Serves until the process is ended.
pub(crate) fn serve() -> Result<()> {
    let listen =
        |port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).with_context(|| format!("cannot listen on {port}"));
    let (short, kept, stream) = (listen(SHORT_PORT)?, listen(KEPT_PORT)?, listen(STREAM_PORT)?);
    println!("{READY}");
    for _ in 0..ACCEPTORS {
        let listener = short.try_clone()?;
        // A client that goes away is its own business: it counts what failed.
        thread::spawn(move || listener.incoming().flatten().for_each(|stream| drop(answer_once(stream))));
    }
    thread::spawn(move || each(&kept, answer_always));
    each(&stream, take_all);
    Ok(())
}

/// A thread a connection; a client has one at a time.
fn each(listener: &TcpListener, work: fn(TcpStream) -> std::io::Result<()>) {
    for stream in listener.incoming().flatten() {
        thread::spawn(move || work(stream));
    }
}

fn answer_once(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    stream.write_all(&byte)
}

fn answer_always(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)?;
    }
}

fn take_all(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    while stream.read(&mut buffer)? > 0 {}
    stream.write_all(&[1])
}

/// Works for `time` on `threads` threads (a stream and a kept connection have one).
pub(crate) fn client(work: Work, target: SocketAddr, threads: usize, time: Duration) -> Result<Reached> {
    match work {
        Work::Short => Ok(short(target, threads, time)),
        Work::Kept => kept(target, time),
        Work::Stream => stream(target, time),
    }
}

/// What one thread met: seconds of each connection, and failures.
#[derive(Default)]
struct Met {
    seconds: Vec<f64>,
    failures: Vec<String>,
}

fn short(target: SocketAddr, threads: usize, time: Duration) -> Reached {
    let start = Instant::now();
    let work = || {
        let mut met = Met::default();
        // Once at least: on a busy machine a thread may begin when the time is over.
        loop {
            let before = Instant::now();
            match ask_once(target) {
                Ok(()) => met.seconds.push(before.elapsed().as_secs_f64()),
                Err(error) => met.failures.push(error.to_string()),
            }
            if start.elapsed() >= time || met.failures.len() as u64 >= FAILURES_MAX {
                return met;
            }
        }
    };
    let all = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let lost = || Met { failures: vec!["a thread of the client ended".to_owned()], ..Met::default() };
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| lost())).collect::<Vec<_>>()
    });
    let passed = start.elapsed().as_secs_f64();
    let failures: Vec<String> = all.iter().flat_map(|met| met.failures.clone()).collect();
    reached(all.into_iter().flat_map(|met| met.seconds).collect(), passed, &failures)
}

/// A whole short connection: one byte there, one back, and the end that the server makes.
pub(crate) fn ask_once(target: SocketAddr) -> std::io::Result<()> {
    let mut stream = connect(target)?;
    stream.write_all(&[1])?;
    let mut answer = Vec::with_capacity(1);
    stream.read_to_end(&mut answer)?;
    if answer.len() == 1 { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}

fn connect(target: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn kept(target: SocketAddr, time: Duration) -> Result<Reached> {
    let mut stream = connect(target).with_context(|| format!("cannot connect to {target}"))?;
    let (mut seconds, mut byte) = (Vec::new(), [1]);
    let start = Instant::now();
    while seconds.is_empty() || start.elapsed() < time {
        let before = Instant::now();
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        seconds.push(before.elapsed().as_secs_f64());
    }
    Ok(reached(seconds, start.elapsed().as_secs_f64(), &[]))
}

fn stream(target: SocketAddr, time: Duration) -> Result<Reached> {
    let mut stream = connect(target).with_context(|| format!("cannot connect to {target}"))?;
    let (chunk, mut bytes) = (vec![0; CHUNK], 0u64);
    let start = Instant::now();
    while bytes == 0 || start.elapsed() < time {
        stream.write_all(&chunk)?;
        bytes += CHUNK as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    // Bytes in buffers are not there yet: the server says when it has them all.
    ensure!(stream.read(&mut [0])? == 1, "the server did not take all of the stream");
    let per_second = bytes as f64 / start.elapsed().as_secs_f64();
    Ok(Reached { per_second, ..Reached::default() })
}

fn reached(mut seconds: Vec<f64>, passed: f64, failures: &[String]) -> Reached {
    seconds.sort_by(f64::total_cmp);
    let micros = |hundredths| (!seconds.is_empty()).then(|| percentile(&seconds, hundredths) * 1e6);
    Reached {
        per_second: seconds.len() as f64 / passed,
        p50_us: micros(50),
        p99_us: micros(99),
        failures: failures.len() as u64,
        first_failure: failures.first().cloned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_counted_and_named() {
        let reached = reached(vec![0.002, 0.001], 0.5, &["refused".to_owned(), "late".to_owned()]);
        assert_eq!((reached.per_second, reached.p50_us, reached.p99_us), (4.0, Some(1000.0), Some(2000.0)));
        assert_eq!((reached.failures, reached.first_failure.as_deref()), (2, Some("refused")));
    }

    #[test]
    fn a_thread_that_begins_late_asks_once() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap();
        let server = thread::spawn(move || answer_once(listener.accept().unwrap().0).unwrap());
        let reached = short(target, 1, Duration::ZERO);
        assert!(reached.per_second > 0.0 && reached.failures == 0, "{reached:?}");
        server.join().unwrap();
    }

    #[test]
    fn nobody_there_is_a_failure() {
        // Bound and dropped: nobody listens.
        let target = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let reached = short(target, 1, Duration::from_secs(5));
        assert_eq!((reached.failures, reached.per_second), (FAILURES_MAX, 0.0));
        // The client's answer is read as it was written, also without a latency.
        let answer = serde_json::to_string(&reached).unwrap();
        assert_eq!(serde_json::from_str::<Reached>(&answer).unwrap(), reached);
    }
}
