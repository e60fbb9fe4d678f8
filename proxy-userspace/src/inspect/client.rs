//! Asking the running process.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use super::{CommandError, Node};

/// For the connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// For the answer; the process gives up after ten seconds itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Largest answer in bytes: the names of a quarter of a million ServicePorts.
const ANSWER_MAX: u64 = 64 << 20;

/// The answer to `path`.
pub(super) fn ask<T: DeserializeOwned>(address: SocketAddr, path: &str) -> io::Result<T> {
    let text = exchange(address, path)?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or(io::ErrorKind::InvalidData)?;
    let status = head.lines().next().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
    if status != "200" {
        return Err(io::Error::other(format!("status {status}: {}", body.trim())));
    }
    serde_json::from_str(body).map_err(io::Error::other)
}

/// HTTP/1.0: the answer ends with the connection, so it needs no length and no chunks.
fn exchange(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}

/// How old names may be; also the least pause between two questions for them.
const AGE_MAX: Duration = Duration::from_secs(1);

/// Names of ServicePorts by id, as far as somebody knows them.
pub(super) struct Names {
    address: SocketAddr,
    known: BTreeMap<u32, String>,
    asked: Instant,
}

impl Names {
    /// Asks the process.
    pub(super) fn ask(node: &Node) -> Result<Self, CommandError> {
        let address = node.metrics_bind_address;
        let known = ask(address, "/services").map_err(|reason| CommandError::NoNames { address, reason })?;
        Ok(Self { address, known, asked: Instant::now() })
    }

    /// Asks the process; nothing is known where none runs.
    pub(super) fn ask_if_any(node: &Node) -> Self {
        let address = node.metrics_bind_address;
        Self { address, known: ask(address, "/services").unwrap_or_default(), asked: Instant::now() }
    }

    /// Asks once more if what is known is older than [`AGE_MAX`]: an id goes to another ServicePort when its own is gone.
    pub(super) fn keep_fresh(&mut self) {
        if self.asked.elapsed() < AGE_MAX {
            return;
        }
        if let Ok(known) = ask(self.address, "/services") {
            self.known = known;
        }
        self.asked = Instant::now();
    }

    /// All that are known.
    pub(super) fn all(&self) -> &BTreeMap<u32, String> {
        &self.known
    }

    /// Name of a ServicePort, or its number where nobody knows the name.
    pub(super) fn name(&self, id: u32) -> String {
        self.known.get(&id).cloned().unwrap_or_else(|| format!("ServicePort {id}"))
    }
}
