//! Version chains per key and the event log over them: what can be read at which revision, and what is forgotten when.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::{Entry, Event, EventKind, Revision};

/// The state of a key after one write to it.
#[derive(Clone, Debug)]
struct Version {
    create_revision: Revision,
    mod_revision: Revision,
    /// `None` marks a deletion.
    value: Option<Bytes>,
}

/// All versions of all keys since the compacted revision, and the events that made them.
#[derive(Debug)]
pub(crate) struct History {
    keys: BTreeMap<Arc<str>, VecDeque<Version>>,
    log: VecDeque<(Instant, Arc<Event>)>,
    pub(crate) current: Revision,
    pub(crate) compacted: Revision,
    /// Bytes of values that the log holds.
    log_bytes: u64,
    /// Bytes of the keys and values that exist now.
    pub(crate) live_bytes: u64,
}

impl History {
    pub(crate) fn new() -> Self {
        Self {
            keys: BTreeMap::new(),
            log: VecDeque::new(),
            current: Revision(1),
            compacted: Revision(0),
            log_bytes: 0,
            live_bytes: 0,
        }
    }

    /// The entry of a key at a revision that the caller has checked to be readable.
    pub(crate) fn get(&self, key: &str, at: Revision) -> Option<Entry> {
        let (key, versions) = self.keys.get_key_value(key)?;
        entry_at(key, versions, at)
    }

    /// The entries of `[start, end of prefix)` at a revision, in key order.
    pub(crate) fn range<'a>(
        &'a self,
        prefix: &'a str,
        start: &'a str,
        at: Revision,
    ) -> impl Iterator<Item = Entry> + 'a {
        self.scan(prefix, start).filter_map(move |(key, versions)| entry_at(key, versions, at))
    }

    /// Up to `limit` entries (0 is no limit) of the range, and how many more there are.
    pub(crate) fn page(&self, prefix: &str, start: &str, at: Revision, limit: usize) -> (Vec<Entry>, u64) {
        if limit == 0 {
            return (self.range(prefix, start, at).collect(), 0);
        }
        let mut scan = self.scan(prefix, start);
        let entries: Vec<Entry> =
            scan.by_ref().filter_map(|(key, versions)| entry_at(key, versions, at)).take(limit).collect();
        let remaining = scan.filter(|(_, versions)| exists_at(versions, at)).count();
        (entries, remaining as u64)
    }

    /// How many keys of the prefix exist now.
    pub(crate) fn count(&self, prefix: &str) -> u64 {
        self.scan(prefix, prefix).filter(|(_, versions)| exists_at(versions, self.current)).count() as u64
    }

    fn scan<'a>(
        &'a self,
        prefix: &'a str,
        start: &'a str,
    ) -> impl Iterator<Item = (&'a Arc<str>, &'a VecDeque<Version>)> + 'a {
        let from = if start > prefix { start } else { prefix };
        self.keys
            .range::<str, _>((Bound::Included(from), Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
    }

    /// Applies one write that the caller has checked, and returns its event. `value` of `None` deletes.
    pub(crate) fn write(&mut self, key: &str, value: Option<Bytes>, now: Instant) -> Arc<Event> {
        let previous = self.get(key, self.current);
        let revision = Revision(self.current.0 + 1);
        let key: Arc<str> = previous.as_ref().map_or_else(|| Arc::from(key), |entry| Arc::clone(&entry.key));
        self.account(&key, value.as_ref(), previous.as_ref());
        let create_revision = previous.as_ref().map_or(revision, |entry| entry.create_revision);
        let version = Version { create_revision, mod_revision: revision, value: value.clone() };
        self.keys.entry(Arc::clone(&key)).or_default().push_back(version);
        self.current = revision;
        let kind = match (&value, &previous) {
            (None, _) => EventKind::Deleted,
            (Some(_), None) => EventKind::Created,
            (Some(_), Some(_)) => EventKind::Updated,
        };
        let previous = previous.map(|entry| entry.value);
        let value = value.or_else(|| previous.clone()).unwrap_or_default();
        let event = Arc::new(Event { kind, key, revision, value, previous });
        self.log_bytes += event.value.len() as u64;
        self.log.push_back((now, Arc::clone(&event)));
        event
    }

    fn account(&mut self, key: &str, value: Option<&Bytes>, previous: Option<&Entry>) {
        let size = |value: &Bytes| (key.len() + value.len()) as u64;
        self.live_bytes += value.map_or(0, size);
        self.live_bytes = self.live_bytes.saturating_sub(previous.map_or(0, |entry| size(&entry.value)));
    }

    /// The logged events after `from` that `wanted` accepts.
    pub(crate) fn events_after(&self, from: Revision, wanted: impl Fn(&str) -> bool) -> VecDeque<Arc<Event>> {
        let first = self.log.partition_point(|(_, event)| event.revision <= from);
        self.log.range(first..).map(|(_, event)| event).filter(|event| wanted(&event.key)).cloned().collect()
    }

    /// Forgets what is too old, too many or too big; each write pays for at most the few that it pushed out.
    pub(crate) fn trim(&mut self, now: Instant, window: Duration, events_max: usize, log_bytes_max: u64) {
        while let Some((written, event)) = self.log.front() {
            let expired = now.duration_since(*written) > window;
            let excess = self.log.len() > events_max || self.log_bytes > log_bytes_max;
            // The newest event always stays, so that a watch can begin just before it.
            if self.log.len() <= 1 || !(expired || excess) {
                return;
            }
            let revision = event.revision;
            self.compact(revision);
        }
    }

    /// Forgets every version that no read at `revision` or later can see, and every event up to `revision`.
    pub(crate) fn compact(&mut self, revision: Revision) {
        while let Some((_, event)) = self.log.pop_front_if(|(_, event)| event.revision <= revision) {
            self.log_bytes = self.log_bytes.saturating_sub(event.value.len() as u64);
            self.forget_before(&event);
        }
        self.compacted = self.compacted.max(revision);
    }

    fn forget_before(&mut self, event: &Event) {
        let Some(versions) = self.keys.get_mut(&event.key) else { return };
        while versions.pop_front_if(|version| version.mod_revision < event.revision).is_some() {}
        let deleted = |version: &mut Version| version.value.is_none() && version.mod_revision == event.revision;
        while versions.pop_front_if(deleted).is_some() {}
        if versions.is_empty() {
            self.keys.remove(&event.key);
        }
    }

    /// How many events the log holds.
    pub(crate) fn log_len(&self) -> usize {
        self.log.len()
    }
}

fn version_at(versions: &VecDeque<Version>, at: Revision) -> Option<&Version> {
    versions.iter().rev().find(|version| version.mod_revision <= at)
}

fn exists_at(versions: &VecDeque<Version>, at: Revision) -> bool {
    version_at(versions, at).is_some_and(|version| version.value.is_some())
}

fn entry_at(key: &Arc<str>, versions: &VecDeque<Version>, at: Revision) -> Option<Entry> {
    let version = version_at(versions, at)?;
    let value = version.value.clone()?;
    Some(Entry {
        key: Arc::clone(key),
        value,
        create_revision: version.create_revision,
        mod_revision: version.mod_revision,
    })
}
