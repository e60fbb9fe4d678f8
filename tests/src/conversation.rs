//! One connected UDP socket that is kept and asked again and again, as a resolver keeps its sockets.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::echo::EchoReply;
use crate::{Place, binary};

/// What one question on the kept socket led to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Turn {
    /// The server of this name answered.
    Answer(String),
    /// Nothing came in time.
    Silence,
    /// A call failed with this errno.
    Error(i32),
}

impl Turn {
    /// Whether the socket is at its end: the kernel took it away from under its owner.
    pub fn is_the_end(&self) -> bool {
        matches!(self, Self::Error(libc::ECONNABORTED | libc::EDESTADDRREQ | libc::ENOTCONN))
    }
}

/// A process in a place that holds one connected UDP socket; dropping it ends it.
#[derive(Debug)]
pub struct Conversation {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Conversation {
    /// Connects a socket to `target`; nothing is sent yet.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start(place: &Place, target: SocketAddr, timeout: Duration) -> Result<Self> {
        let mut command = Command::new(binary("trama-lab")?);
        command.args(["converse", "--target", &target.to_string(), "--timeout-ms", &timeout.as_millis().to_string()]);
        let mut child = place.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let questions = child.stdin.take().context("a child without its standard input")?;
        let answers = BufReader::new(child.stdout.take().context("a child without its standard output")?);
        Ok(Self { child, questions, answers })
    }

    /// Asks once more.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn ask(&mut self) -> Result<Turn> {
        self.questions.write_all(b"\n").context("the client has ended")?;
        let mut line = String::new();
        self.answers.read_line(&mut line).context("the client has ended")?;
        serde_json::from_str(&line).context("cannot read the client's answer")
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The client's side: a question for every line of the standard input, a [`Turn`] as JSON for each.
///
/// # Errors
/// When the socket cannot be made, or nobody reads.
pub fn converse(target: SocketAddr, timeout: Duration) -> Result<()> {
    let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(timeout))?;
    socket.connect(target)?;
    for line in io::stdin().lines() {
        line?;
        println!("{}", serde_json::to_string(&turn(&socket))?);
    }
    Ok(())
}

fn turn(socket: &UdpSocket) -> Turn {
    let mut buffer = [0; 512];
    let answered = socket.send(b"who\n").and_then(|_| socket.recv(&mut buffer));
    match answered {
        Ok(length) => {
            let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
            Turn::Answer(text.parse::<EchoReply>().map_or(text, |reply| reply.name))
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Turn::Silence,
        Err(error) => Turn::Error(error.raw_os_error().unwrap_or_default()),
    }
}
