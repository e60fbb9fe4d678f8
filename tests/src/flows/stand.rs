//! A stand: one process that serves and asks in any namespace of a lab. Its cgroup decides which socket programs its sockets meet.

use std::collections::HashMap;
use std::io::{self, BufRead, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::StreamExt;
use node_sys::Netns;
use socket2::{Domain, Socket, Type};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

use super::scenario::Protocol;
use super::wire::{Answer, Outcome, Question, Request, Stall};
use super::{ask, sctp, serve};
use crate::Failure;

/// Connections of a stand that are open at once.
const OPEN_MAX: usize = 512;
/// Failures after which a question that wants many connections is given up: what is broken is broken.
const FAILURES_MAX: usize = 3;
/// Waiting connections of a listener.
pub(super) const BACKLOG: i32 = 1024;

/// Serves requests from standard input until it ends.
///
/// # Errors
/// When a request cannot be read or an answer cannot be written.
pub fn run() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start a tokio runtime")?;
    let stand = Stand::default();
    for line in io::stdin().lock().lines() {
        let request = serde_json::from_str(&line?).context("cannot read a request")?;
        let answer = match request {
            Request::Serve(stalls) => Answer::Serving(stand.serve(&runtime, stalls)),
            Request::Ask(questions) => Answer::Asked(runtime.block_on(stand.ask(questions))),
        };
        let mut output = io::stdout().lock();
        writeln!(output, "{}", serde_json::to_string(&answer)?)?;
        output.flush()?;
    }
    runtime.shutdown_background();
    Ok(())
}

/// Clients of one address that ask one address over SCTP: an ICMP error on a raw socket does not say which of them it is for.
type RawPair = (String, IpAddr, IpAddr);

struct Stand {
    namespaces: Mutex<HashMap<String, Arc<Netns>>>,
    raw: Mutex<HashMap<RawPair, Arc<Semaphore>>>,
    open: Semaphore,
}

impl Default for Stand {
    fn default() -> Self {
        Self { namespaces: Mutex::default(), raw: Mutex::default(), open: Semaphore::new(OPEN_MAX) }
    }
}

impl Stand {
    fn netns(&self, name: &str) -> io::Result<Arc<Netns>> {
        let mut namespaces = self.namespaces.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(netns) = namespaces.get(name) {
            return Ok(Arc::clone(netns));
        }
        let netns = Arc::new(Netns::open(name).map_err(io::Error::other)?);
        namespaces.insert(name.to_owned(), Arc::clone(&netns));
        Ok(netns)
    }

    fn serve(&self, runtime: &Runtime, stalls: Vec<Stall>) -> Vec<String> {
        let _inside = runtime.enter();
        let mut problems = Vec::new();
        for stall in stalls {
            let started = self.sockets(&stall.netns, stall.protocol, stall.address, true, 1);
            let started =
                started.and_then(|sockets| sockets.into_iter().try_for_each(|socket| serve::start(socket, &stall)));
            if let Err(error) = started {
                problems.push(format!("cannot serve {} {} in {}: {error}", stall.protocol, stall.address, stall.netns));
            }
        }
        problems
    }

    async fn ask(&self, questions: Vec<Question>) -> Vec<Vec<Outcome>> {
        futures::future::join_all(questions.iter().map(|question| self.ask_one(question))).await
    }

    async fn ask_one(&self, question: &Question) -> Vec<Outcome> {
        let local = SocketAddr::new(question.source, 0);
        let sockets = match self.sockets(&question.netns, question.protocol, local, false, question.count) {
            Ok(sockets) => sockets,
            Err(error) => return vec![Err(Failure::Other(format!("cannot ask from {}: {error}", question.source)))],
        };
        let raw = self.raw_turns(question);
        let asked = sockets.into_iter().enumerate().map(|(index, socket)| self.connect(question, &raw, index, socket));
        let mut asked = futures::stream::iter(asked).buffer_unordered(question.parallel);
        let mut outcomes: Vec<Outcome> = Vec::with_capacity(question.count);
        let mut failures = 0;
        while failures < FAILURES_MAX
            && let Some(outcome) = asked.next().await
        {
            failures += usize::from(outcome.is_err());
            outcomes.push(outcome);
        }
        outcomes
    }

    async fn connect(&self, question: &Question, raw: &Semaphore, index: usize, socket: Socket) -> Outcome {
        // Neither is ever closed; if it were, the connection would go ahead all the same.
        let _open = self.open.acquire().await;
        let _turn = if is_raw(question.protocol) { raw.acquire().await.ok() } else { None };
        let patience = Duration::from_millis(question.patience_ms);
        match tokio::time::timeout(patience, ask::ask(socket, question, index)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Failure::Timeout),
        }
    }

    fn raw_turns(&self, question: &Question) -> Arc<Semaphore> {
        let pair = (question.netns.clone(), question.source, question.target.ip());
        let mut raw = self.raw.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(raw.entry(pair).or_insert_with(|| Arc::new(Semaphore::new(1))))
    }

    /// Sockets made and bound inside the namespace, in which they stay.
    fn sockets(
        &self,
        netns: &str,
        protocol: Protocol,
        local: SocketAddr,
        listen: bool,
        count: usize,
    ) -> io::Result<Vec<Socket>> {
        let make = || (0..count).map(|_| socket(protocol, local, listen)).collect();
        self.netns(netns)?.run(make).map_err(io::Error::other)?
    }
}

fn socket(protocol: Protocol, local: SocketAddr, listen: bool) -> io::Result<Socket> {
    let domain = Domain::for_address(local);
    let socket = match protocol {
        Protocol::Tcp => Socket::new(domain, Type::STREAM, None),
        Protocol::Udp => Socket::new(domain, Type::DGRAM, None),
        Protocol::Sctp => sctp::socket(local),
    }?;
    socket.set_nonblocking(true)?;
    // A client on the node does not choose 127.0.0.1 as its source, the kernel does.
    if local.ip().is_loopback() && !listen {
        return Ok(socket);
    }
    // A raw socket has no port, and refuses one in IPv6.
    let local = if is_raw(protocol) { SocketAddr::new(local.ip(), 0) } else { local };
    socket.bind(&local.into())?;
    if listen && protocol != Protocol::Udp && !is_raw(protocol) {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}

/// Whether packets are made by hand.
fn is_raw(protocol: Protocol) -> bool {
    protocol == Protocol::Sctp && !sctp::has_sockets()
}
