//! Outcomes counted: who answered how often, how fast, and what went wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use crate::{Failure, Outcome};

/// Outcomes of the same question asked many times.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Answers by the server's name.
    pub answers: BTreeMap<String, usize>,
    /// Questions without an answer, in order.
    pub failures: Vec<Failure>,
    peers: BTreeSet<SocketAddr>,
    sources: BTreeSet<std::net::IpAddr>,
    latencies: Vec<Duration>,
}

impl Tally {
    /// Counts.
    pub fn of(outcomes: &[Outcome]) -> Self {
        let mut tally = Self::default();
        for outcome in outcomes {
            match outcome {
                Ok(reply) => {
                    *tally.answers.entry(reply.server.clone()).or_default() += 1;
                    tally.peers.insert(reply.seen_peer);
                    tally.sources.insert(reply.seen_source.ip());
                    tally.latencies.push(reply.latency);
                }
                Err(failure) => tally.failures.push(failure.clone()),
            }
        }
        tally.latencies.sort();
        tally
    }

    /// Questions asked.
    pub fn asked(&self) -> usize {
        self.latencies.len() + self.failures.len()
    }

    /// Names of those who answered.
    pub fn servers(&self) -> BTreeSet<String> {
        self.answers.keys().cloned().collect()
    }

    /// The client's addresses as the servers saw them.
    pub fn sources(&self) -> &BTreeSet<std::net::IpAddr> {
        &self.sources
    }

    /// Questions that were refused.
    pub fn refused(&self) -> usize {
        self.failures.iter().filter(|failure| **failure == Failure::Refused).count()
    }

    /// Questions that no one answered in time.
    pub fn timed_out(&self) -> usize {
        self.failures.iter().filter(|failure| **failure == Failure::Timeout).count()
    }

    /// Median time to the answer.
    pub fn median(&self) -> Option<Duration> {
        self.latencies.get(self.latencies.len() / 2).copied()
    }

    /// Why this is not what a Service with exactly the endpoints `names` gives; `None` when it is.
    pub fn fault_unless_all_answer(&self, names: &BTreeSet<String>, target: SocketAddr) -> Option<String> {
        if let Some(failure) = self.failures.first() {
            return Some(format!("{} of {} failed: {failure}", self.failures.len(), self.asked()));
        }
        let servers = self.servers();
        if let Some(stranger) = servers.difference(names).next() {
            return Some(format!("{stranger} is no endpoint"));
        }
        if let Some(missing) = names.difference(&servers).next() {
            return Some(format!("{missing} never answered"));
        }
        let stranger = self.peers.iter().find(|peer| **peer != target);
        stranger.map(|peer| format!("the client sees the peer {peer}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reply;

    fn answer(server: &str, peer: &str, millis: u64) -> Outcome {
        Ok(Reply {
            server: server.into(),
            seen_source: "10.244.1.5:4000".parse().unwrap(),
            server_address: "10.244.2.5:8080".parse().unwrap(),
            seen_peer: peer.parse().unwrap(),
            client_address: "10.244.1.5:4000".parse().unwrap(),
            latency: Duration::from_millis(millis),
        })
    }

    fn fault(outcomes: &[Outcome]) -> Option<String> {
        let names = ["a", "b"].map(str::to_owned).into();
        Tally::of(outcomes).fault_unless_all_answer(&names, "10.96.0.9:80".parse().unwrap())
    }

    #[test]
    fn every_endpoint_has_to_answer_as_the_service() {
        let (a, b) = (answer("a", "10.96.0.9:80", 1), answer("b", "10.96.0.9:80", 3));
        assert_eq!(fault(&[a.clone(), b.clone()]), None);
        assert_eq!(fault(&[a.clone(), a.clone()]).unwrap(), "b never answered");
        assert_eq!(fault(&[a.clone(), b.clone(), answer("c", "10.96.0.9:80", 1)]).unwrap(), "c is no endpoint");
        assert_eq!(fault(&[a.clone(), b.clone(), Err(Failure::Refused)]).unwrap(), "1 of 3 failed: refused");
        let bare = answer("b", "10.244.2.5:8080", 1);
        assert_eq!(fault(&[a, bare]).unwrap(), "the client sees the peer 10.244.2.5:8080");
    }

    #[test]
    fn the_median_is_a_measured_value() {
        let tally = Tally::of(&[1, 9, 2].map(|millis| answer("a", "10.96.0.9:80", millis)));
        assert_eq!(tally.median(), Some(Duration::from_millis(2)));
        assert_eq!(Tally::default().median(), None);
    }
}
