//! What a client saw, counted.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Events that a target's report has at most; the counts are complete.
const EVENTS_MAX: usize = 20;
/// What takes longer has lost a packet.
const SLOW: Duration = Duration::from_millis(900);

/// What can happen to a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A kept one broke, or was answered by another server than before.
    Lost,
    /// A new one was not answered, or by nobody who may.
    Failed,
    /// One was answered after a repetition.
    Slow,
}

/// What became of the flows to one target.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Whether they were of datagrams.
    pub udp: bool,
    /// Flows that were kept.
    pub kept: usize,
    /// Those of them that broke.
    pub lost: usize,
    /// Questions that were asked on those.
    pub questions: usize,
    /// New flows.
    pub asked: usize,
    /// Those of them that were not answered, or by nobody who may.
    pub failed: usize,
    /// Questions of both kinds that were answered late.
    pub slow: usize,
    /// How long the slowest answer took.
    pub slowest: Duration,
    /// The first events, each with the time since the epoch when it began.
    pub events: Vec<(Duration, Event, String)>,
}

impl Report {
    /// Counts an event that began at `began`.
    pub(super) fn note(&mut self, began: Duration, event: Event, text: String) {
        *match event {
            Event::Lost => &mut self.lost,
            Event::Failed => &mut self.failed,
            Event::Slow => &mut self.slow,
        } += 1;
        // What is slow leaves room for what is lost.
        let room = if event == Event::Slow { EVENTS_MAX / 2 } else { EVENTS_MAX };
        if self.events.len() < room {
            self.events.push((began, event, text));
        }
    }

    /// Counts an answer that took `latency`.
    pub(super) fn answered(&mut self, began: Duration, latency: Duration, what: impl FnOnce() -> String) {
        self.slowest = self.slowest.max(latency);
        if latency > SLOW {
            self.note(began, Event::Slow, format!("{}: {latency:?}", what()));
        }
    }

    /// Adds what another saw.
    pub(super) fn add(&mut self, other: &Self) {
        self.udp = other.udp;
        self.kept += other.kept;
        self.lost += other.lost;
        self.questions += other.questions;
        self.asked += other.asked;
        self.failed += other.failed;
        self.slow += other.slow;
        self.slowest = self.slowest.max(other.slowest);
        self.events.extend(other.events.iter().cloned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_beyond_those_that_are_told() {
        let mut report = Report::default();
        for _ in 0..EVENTS_MAX + 5 {
            report.note(Duration::ZERO, Event::Failed, "refused".to_owned());
        }
        report.answered(Duration::ZERO, Duration::from_millis(5), || unreachable!());
        report.answered(Duration::ZERO, Duration::from_secs(1), String::new);
        assert_eq!((report.failed, report.slow, report.events.len()), (EVENTS_MAX + 5, 1, EVENTS_MAX));
        let mut sum = report.clone();
        sum.add(&report);
        assert_eq!((sum.failed, sum.slowest), (2 * (EVENTS_MAX + 5), Duration::from_secs(1)));
    }
}
