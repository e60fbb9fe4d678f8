//! When to sync: how long to gather, when to try again, when to audit. Knows time only as it is told.

use std::time::{Duration, Instant};

use crate::config::SyncPeriods;

/// Between two syncs lies at least as much time as the former took, within these bounds: a lone change goes at once, a burst is
/// gathered, and no change waits longer than this for others.
const GAP_MIN: Duration = Duration::from_millis(1);
const GAP_MAX: Duration = Duration::from_millis(5);
/// Pause before the first retry; it doubles up to [`SyncPeriods::period`].
const RETRY_MIN: Duration = Duration::from_millis(100);
/// How often everything is compared with the kernel though nothing failed.
const RESYNC: Duration = Duration::from_secs(3600);
/// How often the kernel is looked at for what others did to it.
const AUDIT: Duration = Duration::from_secs(5);

/// The rhythm of one runner.
#[derive(Debug)]
pub(super) struct Pace {
    periods: SyncPeriods,
    /// When the next sync may start.
    next: Option<Instant>,
    /// `None` until the first full sync: it is due at once.
    last_full: Option<Instant>,
    last_audit: Option<Instant>,
    retry: Option<Retry>,
}

#[derive(Debug, Clone, Copy)]
struct Retry {
    at: Instant,
    pause: Duration,
}

impl Pace {
    pub(super) fn new(periods: SyncPeriods) -> Self {
        Self { periods, next: None, last_full: None, last_audit: None, retry: None }
    }

    /// Until when to wait for more changes. `None` when idle: take what is there and go.
    pub(super) fn gather_until(&self, now: Instant) -> Option<Instant> {
        self.next.filter(|next| now < *next)
    }

    /// Whether the next sync has to be a full one, now.
    pub(super) fn is_full_due(&self, now: Instant) -> bool {
        match (self.retry, self.last_full) {
            (Some(retry), _) => now >= retry.at,
            (None, None) => true,
            (None, Some(last)) => now.duration_since(last) >= RESYNC,
        }
    }

    /// Whether a failed sync waits to be repeated.
    pub(super) fn is_retrying(&self) -> bool {
        self.retry.is_some()
    }

    /// Whether the kernel has to be looked at, now. Not while a retry waits: it writes everything anyway.
    pub(super) fn is_audit_due(&self, now: Instant) -> bool {
        self.retry.is_none() && self.last_audit.is_some_and(|last| now.duration_since(last) >= AUDIT)
    }

    /// The kernel was looked at.
    pub(super) fn audited(&mut self, now: Instant) {
        self.last_audit = Some(now);
    }

    /// When something is due without any event.
    pub(super) fn wake_at(&self) -> Instant {
        match (self.retry, self.last_full) {
            (Some(retry), _) => retry.at,
            (None, Some(last)) => self.last_audit.map_or(last + RESYNC, |audit| (audit + AUDIT).min(last + RESYNC)),
            (None, None) => Instant::now(),
        }
    }

    pub(super) fn succeeded(&mut self, now: Instant, took: Duration, full: bool) {
        self.retry = None;
        self.next = Some(now + took.clamp(GAP_MIN, GAP_MAX).max(self.periods.min));
        if full {
            self.last_full = Some(now);
            self.last_audit = Some(now);
        }
    }

    /// Returns the pause before the retry.
    pub(super) fn failed(&mut self, now: Instant) -> Duration {
        let longer = self.retry.map_or(RETRY_MIN, |last| last.pause.saturating_mul(2));
        let pause = longer.min(self.periods.period);
        self.retry = Some(Retry { at: now + pause, pause });
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const RETRY_MAX: Duration = Duration::from_secs(30);
    const PERIODS: SyncPeriods = SyncPeriods { period: RETRY_MAX, min: Duration::ZERO };

    #[test]
    fn a_lone_change_goes_at_once_and_a_burst_is_gathered() {
        let (start, mut pace) = (Instant::now(), Pace::new(PERIODS));
        assert_eq!(pace.gather_until(start), None);
        for (took, gap) in [(MS / 10, GAP_MIN), (3 * MS, 3 * MS), (1000 * MS, GAP_MAX)] {
            pace.succeeded(start, took, false);
            assert_eq!(pace.gather_until(start), Some(start + gap));
            assert_eq!(pace.gather_until(start + gap), None);
        }
    }

    #[test]
    fn a_configured_pause_is_kept_and_bounds_the_retries() {
        let start = Instant::now();
        let mut pace = Pace::new(SyncPeriods { period: 150 * MS, min: 120 * MS });
        pace.succeeded(start, MS, true);
        assert_eq!(pace.gather_until(start), Some(start + 120 * MS), "from the end of a sync to the next");
        assert_eq!([pace.failed(start), pace.failed(start)], [100 * MS, 150 * MS]);
    }

    #[test]
    fn retries_are_full_and_their_pauses_bounded() {
        let (start, mut pace) = (Instant::now(), Pace::new(PERIODS));
        assert!(pace.is_full_due(start), "the first sync is a full one");
        let pauses: Vec<_> = (0..12).map(|_| pace.failed(start)).collect();
        assert_eq!(pauses[..3], [100 * MS, 200 * MS, 400 * MS]);
        assert_eq!(pauses[11], RETRY_MAX);
        assert!(pace.is_retrying() && !pace.is_full_due(start));
        assert_eq!(pace.wake_at(), start + RETRY_MAX);
        assert!(pace.is_full_due(start + RETRY_MAX));
        pace.succeeded(start, MS, true);
        assert!(!pace.is_retrying());
        assert_eq!(pace.failed(start), RETRY_MIN, "a success forgets earlier failures");
    }

    #[test]
    fn the_kernel_is_looked_at_every_few_seconds_unless_everything_is_written_anyway() {
        let (start, mut pace) = (Instant::now(), Pace::new(PERIODS));
        assert!(!pace.is_audit_due(start + AUDIT), "nothing is programmed yet");
        pace.succeeded(start, MS, true);
        pace.succeeded(start + AUDIT / 2, MS, false);
        assert_eq!(pace.wake_at(), start + AUDIT);
        assert!(!pace.is_audit_due(start + AUDIT - MS));
        assert!(pace.is_audit_due(start + AUDIT));
        pace.audited(start + AUDIT);
        assert_eq!(pace.wake_at(), start + AUDIT * 2);
        pace.failed(start + AUDIT);
        assert!(!pace.is_audit_due(start + AUDIT * 2));
    }

    #[test]
    fn everything_is_written_again_however_many_changes_come() {
        let (start, mut pace) = (Instant::now(), Pace::new(PERIODS));
        pace.succeeded(start, MS, true);
        pace.succeeded(start + RESYNC / 2, MS, false);
        pace.audited(start + RESYNC - MS);
        assert!(!pace.is_full_due(start + RESYNC - MS));
        assert!(pace.is_full_due(start + RESYNC));
        assert_eq!(pace.wake_at(), start + RESYNC);
    }
}
