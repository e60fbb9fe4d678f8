//! What the oracle and its stands say to each other: one line of JSON a request, one line an answer.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::scenario::Protocol;
use crate::Failure;

/// What a stand is asked to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Serve until the end.
    Serve(Vec<Stall>),
    /// Open connections, all questions at once.
    Ask(Vec<Question>),
}

/// What a stand answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// What could not be served, a sentence each.
    Serving(Vec<String>),
    /// Outcomes by question, in order.
    Asked(Vec<Vec<Outcome>>),
}

/// A server to run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Stall {
    /// Full name of the network namespace.
    pub(super) netns: String,
    pub(super) protocol: Protocol,
    pub(super) address: SocketAddr,
}

/// Connections to open.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Question {
    /// Full name of the network namespace.
    pub(super) netns: String,
    pub(super) protocol: Protocol,
    pub(super) source: IpAddr,
    pub(super) target: SocketAddr,
    pub(super) count: usize,
    /// Connections that are open at once.
    pub(super) parallel: usize,
    /// Whether answers are expected: then every other UDP client does not connect its socket, and will not learn of a refusal.
    pub(super) answered: bool,
    /// For how long each connection waits for an answer.
    pub(super) patience_ms: u64,
}

/// Whom one connection reached, or why it reached nobody.
pub(super) type Outcome = Result<Seen, Failure>;

/// What a server says of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Seen {
    /// The server's own address.
    pub(super) reached: SocketAddr,
    /// The client's address as the server saw it.
    pub(super) source: IpAddr,
}

impl Seen {
    /// `REACHED SOURCE`: what servers send.
    pub(super) fn to_line(self) -> String {
        format!("{} {}\n", self.reached, self.source)
    }

    pub(super) fn parse(bytes: &[u8]) -> Outcome {
        let text = String::from_utf8_lossy(bytes);
        let parsed = text
            .trim_end()
            .split_once(' ')
            .and_then(|(reached, source)| Some(Self { reached: reached.parse().ok()?, source: source.parse().ok()? }));
        parsed.ok_or_else(|| Failure::Other(format!("answered with {text:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_read_back() {
        let seen = Seen { reached: "[fd00::1]:80".parse().unwrap(), source: "fd00::2".parse().unwrap() };
        assert_eq!(Seen::parse(seen.to_line().as_bytes()), Ok(seen));
        assert!(Seen::parse(b"hello").is_err());
        let request = Request::Ask(Vec::new());
        let line = serde_json::to_string(&request).unwrap();
        assert!(matches!(serde_json::from_str(&line).unwrap(), Request::Ask(list) if list.is_empty()));
    }
}
