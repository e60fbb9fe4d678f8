//! The store that lives in memory and dies with the process.

#[cfg(test)]
mod tests;

use std::future::ready;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::fanout::Fanout;
use crate::history::History;
use crate::{Entry, GetResponse, ListOptions, ListResponse, Revision, Store, StoreError, StoreFuture, Watch, WatchId};

/// How much a [`MemoryStore`] may hold.
#[derive(Clone, Copy, Debug)]
pub struct MemoryLimits {
    /// How long history is kept: 75 s, as long as the watch cache of kube-apiserver keeps its events at least.
    pub history_window: Duration,
    /// The most events kept; more push the oldest out before the window ends. 65,536.
    pub history_events_max: usize,
    /// The most bytes of values kept in the history. 64 MiB.
    pub history_bytes_max: u64,
    /// The most bytes of live keys and values; a write beyond is refused. 2 GiB, etcd's default quota.
    pub live_bytes_max: u64,
    /// The most open watches. 16,384.
    pub watches_max: usize,
    /// How many items a watch may lag behind before it is closed. 4,096; memory is taken only for what is buffered.
    pub watch_buffer_items_max: usize,
}

impl Default for MemoryLimits {
    fn default() -> Self {
        Self {
            history_window: Duration::from_secs(75),
            history_events_max: 65_536,
            history_bytes_max: 64 << 20,
            live_bytes_max: 2 << 30,
            watches_max: 16_384,
            watch_buffer_items_max: 4_096,
        }
    }
}

/// What a [`MemoryStore`] holds at one moment, for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUsage {
    /// The newest revision.
    pub revision: Revision,
    /// The oldest readable revision.
    pub compacted: Revision,
    /// Bytes of live keys and values.
    pub live_bytes: u64,
    /// Events in the history.
    pub history_events: usize,
    /// Open watches.
    pub watches: usize,
}

/// A [`Store`] in memory.
///
/// Lock order: `history`, then `fanout`. A write holds `history` exclusively while it publishes, so events reach every watch in
/// revision order, and a watch that registers under a shared `history` lock misses none.
#[derive(Debug)]
pub struct MemoryStore {
    history: RwLock<History>,
    fanout: Mutex<Fanout>,
    limits: MemoryLimits,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new(MemoryLimits::default())
    }
}

impl MemoryStore {
    /// An empty store at revision 1.
    pub fn new(limits: MemoryLimits) -> Self {
        let fanout = Fanout::new(limits.watches_max, limits.watch_buffer_items_max);
        Self { history: RwLock::new(History::new()), fanout: Mutex::new(fanout), limits }
    }

    /// An empty store whose history begins at `first`. A server that loses its state when it ends passes a revision above all that it
    /// gave out before, so that clients of its former life get [`StoreError::Compacted`] and read everything again instead of
    /// mixing two histories.
    pub fn beginning_at(first: Revision, limits: MemoryLimits) -> Self {
        let store = Self::new(limits);
        {
            let mut history = store.write();
            history.current = first;
            history.compacted = first;
        }
        store
    }

    /// What the store holds now.
    pub fn usage(&self) -> MemoryUsage {
        let history = self.read();
        MemoryUsage {
            revision: history.current,
            compacted: history.compacted,
            live_bytes: history.live_bytes,
            history_events: history.log_len(),
            watches: self.watches().len(),
        }
    }

    // A poisoned lock means a panic inside this file; the state is still whole because no step between two consistent states panics.
    fn read(&self) -> RwLockReadGuard<'_, History> {
        self.history.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, History> {
        self.history.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn watches(&self) -> MutexGuard<'_, Fanout> {
        self.fanout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get_now(&self, key: &str, revision: Option<Revision>) -> Result<GetResponse, StoreError> {
        let history = self.read();
        let revision = readable(&history, revision)?;
        Ok(GetResponse { revision, entry: history.get(key, revision) })
    }

    fn list_now(&self, prefix: &str, options: ListOptions<'_>) -> Result<ListResponse, StoreError> {
        let history = self.read();
        let revision = readable(&history, options.revision)?;
        let start = options.start.unwrap_or(prefix);
        let (entries, remaining) = history.page(prefix, start, revision, options.limit);
        Ok(ListResponse { revision, entries, remaining })
    }

    /// One write: `expected` is the last write that the key must have had, `None` that it must not exist.
    fn write_now(&self, key: &str, value: Option<Bytes>, expected: Option<Revision>) -> Result<Revision, StoreError> {
        let mut history = self.write();
        let current = history.get(key, history.current);
        if current.as_ref().map(|entry| entry.mod_revision) != expected {
            return Err(conflict(key, current, history.current));
        }
        let added = value.as_ref().map_or(0, |value| (key.len() + value.len()) as u64);
        if value.is_some() && history.live_bytes + added > self.limits.live_bytes_max {
            return Err(StoreError::Full { bytes: history.live_bytes, bytes_max: self.limits.live_bytes_max });
        }
        let now = Instant::now();
        let event = history.write(key, value, now);
        let limits = &self.limits;
        history.trim(now, limits.history_window, limits.history_events_max, limits.history_bytes_max);
        self.watches().publish(&event);
        Ok(event.revision)
    }

    fn watch_now(&self, prefix: &str, from: Revision) -> Result<Watch, StoreError> {
        let history = self.read();
        readable(&history, Some(from))?;
        let (id, live) = self.watches().subscribe(prefix)?;
        let backlog = if prefix.ends_with('/') {
            history.events_after(from, |key| key.starts_with(prefix))
        } else {
            history.events_after(from, |key| key == prefix)
        };
        Ok(Watch::new(id, backlog, live))
    }

    fn compact_now(&self, revision: Revision) -> Result<(), StoreError> {
        let mut history = self.write();
        if revision <= history.compacted {
            return Err(StoreError::Compacted { requested: revision, compacted: history.compacted });
        }
        readable(&history, Some(revision))?;
        history.compact(revision);
        self.watches().forget_closed();
        Ok(())
    }
}

fn conflict(key: &str, current: Option<Entry>, revision: Revision) -> StoreError {
    StoreError::Conflict { key: key.into(), current: current.map(Box::new), revision }
}

/// The revision to read at, if its history is known.
fn readable(history: &History, requested: Option<Revision>) -> Result<Revision, StoreError> {
    let current = history.current;
    let requested = requested.unwrap_or(current);
    if requested > current {
        return Err(StoreError::Future { requested, current });
    }
    if requested < history.compacted {
        return Err(StoreError::Compacted { requested, compacted: history.compacted });
    }
    Ok(requested)
}

impl Store for MemoryStore {
    fn revision(&self) -> StoreFuture<'_, Revision> {
        Box::pin(ready(Ok(self.read().current)))
    }

    fn get<'a>(&'a self, key: &'a str, revision: Option<Revision>) -> StoreFuture<'a, GetResponse> {
        Box::pin(ready(self.get_now(key, revision)))
    }

    fn list<'a>(&'a self, prefix: &'a str, options: ListOptions<'a>) -> StoreFuture<'a, ListResponse> {
        Box::pin(ready(self.list_now(prefix, options)))
    }

    fn count<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, u64> {
        Box::pin(ready(Ok(self.read().count(prefix))))
    }

    fn create<'a>(&'a self, key: &'a str, value: Bytes) -> StoreFuture<'a, Revision> {
        Box::pin(async move { self.write_now(key, Some(value), None) })
    }

    fn update<'a>(&'a self, key: &'a str, value: Bytes, expected: Revision) -> StoreFuture<'a, Revision> {
        Box::pin(async move { self.write_now(key, Some(value), Some(expected)) })
    }

    fn delete<'a>(&'a self, key: &'a str, expected: Revision) -> StoreFuture<'a, Revision> {
        Box::pin(async move { self.write_now(key, None, Some(expected)) })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch> {
        Box::pin(async move { self.watch_now(prefix, from) })
    }

    fn request_progress(&self, watch: WatchId) -> StoreFuture<'_, ()> {
        let history = self.read();
        self.watches().progress(watch, history.current);
        Box::pin(ready(Ok(())))
    }

    fn compact(&self, revision: Revision) -> StoreFuture<'_, ()> {
        Box::pin(async move { self.compact_now(revision) })
    }
}
