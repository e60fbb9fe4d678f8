//! ServicePorts that the kernel had no room for: remembered until they are programmed or gone, and tried again from time to time.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::dataplane::SyncScope;
use crate::model::ServicePortName;

/// Pause before the first attempt; it doubles up to [`PAUSE_MAX`]. Everything else is programmed, and room comes back only
/// when other Services shrink.
const PAUSE_MIN: Duration = Duration::from_secs(15);
const PAUSE_MAX: Duration = Duration::from_secs(1800);

/// What waits for room; never more than there are ServicePorts.
#[derive(Debug, Default)]
pub(super) struct Refused {
    names: BTreeSet<ServicePortName>,
    next: Option<(Instant, Duration)>,
}

impl Refused {
    /// Takes in what a sync of `scope` refused. Returns those that did not wait before.
    pub(super) fn synced(
        &mut self,
        now: Instant,
        scope: SyncScope<'_>,
        refused: &[ServicePortName],
    ) -> Vec<ServicePortName> {
        let newly = refused.iter().filter(|name| !self.names.contains(name)).cloned().collect();
        match scope {
            SyncScope::Full => self.names.clear(),
            SyncScope::Changed(delta) => self.names.retain(|name| !delta.changed.contains(name)),
        }
        self.names.extend(refused.iter().cloned());
        let full = matches!(scope, SyncScope::Full);
        self.next = match self.next {
            _ if self.names.is_empty() => None,
            Some((_, pause)) if full => Some(later(now, (pause * 2).min(PAUSE_MAX))),
            Some(next) => Some(next),
            None => Some(later(now, PAUSE_MIN)),
        };
        newly
    }

    /// Whether this one waits.
    pub(super) fn holds(&self, name: &ServicePortName) -> bool {
        self.names.contains(name)
    }

    /// How many wait.
    pub(super) fn count(&self) -> usize {
        self.names.len()
    }

    /// When to try a full sync for them.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.next.map(|(at, _)| at)
    }
}

fn later(now: Instant, pause: Duration) -> (Instant, Duration) {
    (now + pause, pause)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{IpFamily, NameParts, Protocol, ServiceDelta};

    fn name(service: &str) -> ServicePortName {
        let (namespace, service, port) = ("ns".into(), service.into(), "".into());
        ServicePortName::new(NameParts { namespace, service, port, protocol: Protocol::Tcp, family: IpFamily::V4 })
    }

    #[test]
    fn a_refusal_is_remembered_until_it_is_programmed_or_gone() {
        let (start, mut refused) = (Instant::now(), Refused::default());
        let delta = |services: &[&str]| ServiceDelta {
            changed: services.iter().map(|service| name(service)).collect(),
            ..ServiceDelta::default()
        };
        assert!(refused.synced(start, SyncScope::Full, &[]).is_empty());
        assert_eq!(refused.retry_at(), None);
        let newly = refused.synced(start, SyncScope::Changed(&delta(&["a", "b"])), &[name("a")]);
        assert_eq!(newly, [name("a")]);
        refused.synced(start, SyncScope::Changed(&delta(&["c"])), &[]);
        assert_eq!((refused.count(), refused.retry_at()), (1, Some(start + PAUSE_MIN)));
        assert!(refused.synced(start, SyncScope::Full, &[name("a")]).is_empty(), "it is no news");
        assert_eq!(refused.retry_at(), Some(start + 2 * PAUSE_MIN), "the attempt failed");
        for _ in 0..20 {
            refused.synced(start, SyncScope::Full, &[name("a")]);
        }
        assert_eq!(refused.retry_at(), Some(start + PAUSE_MAX));
        refused.synced(start, SyncScope::Changed(&delta(&["a"])), &[]);
        assert_eq!((refused.count(), refused.retry_at()), (0, None));
    }
}
