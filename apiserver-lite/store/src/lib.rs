//! A revisioned key-value store with watch: what Kubernetes needs of etcd, and no more.
//!
//! ```text
//!  server -> Store (trait) -> MemoryStore: one ordered map of version chains + one bounded event log -> fan-out to watches
//! ```
//!
//! Invariants
//! - One revision counter covers every key. It only grows, by one per successful write, and starts at 1 for an empty store.
//! - A list is consistent: all its entries are read at the one revision that it reports.
//! - A watch delivers each event of its scope once, in revision order, without a gap; where it can't, it ends with an error.
//! - A write never waits for a reader of a watch: a watch whose buffer is full is closed.
//! - A value is held once, as shared immutable [`bytes::Bytes`], by the map, the log and every watch.
//!
//! Start reading at [`Store`]. What the methods promise is written down as code in the `conformance` module (feature
//! `conformance`), which every implementation runs. Failure model: [`StoreError`] says whether to retry, to read again or to give up.
#![forbid(unsafe_code)]

mod error;
mod fanout;
mod history;
mod memory;
mod watch;

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;

pub use error::StoreError;
pub use memory::{MemoryLimits, MemoryStore, MemoryUsage};
pub use watch::{Watch, WatchEnd, WatchId, WatchItem};

/// A point in the store's single history: 1 for an empty store, one more after each successful write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One key with its value at some revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key, such as `/registry/pods/default/web`.
    pub key: Arc<str>,
    /// The value as it was written.
    pub value: Bytes,
    /// The revision of the write that made the key exist.
    pub create_revision: Revision,
    /// The revision of the last write to the key.
    pub mod_revision: Revision,
}

/// The answer of [`Store::get`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GetResponse {
    /// The revision that was read: the requested one, or the newest.
    pub revision: Revision,
    /// The entry, or `None` where the key did not exist at that revision.
    pub entry: Option<Entry>,
}

/// What [`Store::list`] reads.
#[derive(Clone, Copy, Debug, Default)]
pub struct ListOptions<'a> {
    /// The revision to read at; `None` is the newest.
    pub revision: Option<Revision>,
    /// Only keys equal to or after this one; `None` starts at the prefix.
    pub start: Option<&'a str>,
    /// The most entries to return; 0 is no limit.
    pub limit: usize,
}

/// The answer of [`Store::list`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListResponse {
    /// The revision that was read.
    pub revision: Revision,
    /// The entries in key order.
    pub entries: Vec<Entry>,
    /// How many entries of the prefix come after the last one returned.
    pub remaining: u64,
}

/// What happened to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The key did not exist before.
    Created,
    /// The key has a new value.
    Updated,
    /// The key is gone.
    Deleted,
}

/// One write, as the log and every watch share it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The key that was written.
    pub key: Arc<str>,
    /// The revision of this write.
    pub revision: Revision,
    /// The new value; for a deletion, the last value.
    pub value: Bytes,
    /// The value that this write replaced; `None` for a creation. For a deletion it equals `value`.
    pub previous: Option<Bytes>,
}

/// The future of a store call. It is boxed so that one process can choose its store when it starts.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// A revisioned key-value store.
///
/// A *prefix* is a string that ends in `/` and means every key below it; for [`Store::watch`] a string without the final `/` is that
/// one key. Revisions below the compacted one answer [`StoreError::Compacted`], those above the newest [`StoreError::Future`].
pub trait Store: Send + Sync + 'static {
    /// Returns the newest revision, linearizably: no write that ended before this call began is missed.
    fn revision(&self) -> StoreFuture<'_, Revision>;

    /// Reads one key, at `revision` or now.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] and [`StoreError::Future`] for a revision that can't be read.
    fn get<'a>(&'a self, key: &'a str, revision: Option<Revision>) -> StoreFuture<'a, GetResponse>;

    /// Reads the keys of a prefix in key order, all at one revision.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] and [`StoreError::Future`] for a revision that can't be read.
    fn list<'a>(&'a self, prefix: &'a str, options: ListOptions<'a>) -> StoreFuture<'a, ListResponse>;

    /// Counts the keys of a prefix now.
    fn count<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, u64>;

    /// Writes a key that must not exist, and returns the revision of the write.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] with the entry that exists, [`StoreError::Full`].
    fn create<'a>(&'a self, key: &'a str, value: Bytes) -> StoreFuture<'a, Revision>;

    /// Replaces a key whose last write was `expected`, and returns the revision of this write.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] with what is there instead, [`StoreError::Full`].
    fn update<'a>(&'a self, key: &'a str, value: Bytes, expected: Revision) -> StoreFuture<'a, Revision>;

    /// Removes a key whose last write was `expected`, and returns the revision of the removal.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] with what is there instead.
    fn delete<'a>(&'a self, key: &'a str, expected: Revision) -> StoreFuture<'a, Revision>;

    /// Follows the events of a prefix or of one key, beginning with the first one *after* `from`.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] where events after `from` are no longer known, [`StoreError::Future`], [`StoreError::TooManyWatches`].
    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch>;

    /// Makes the watch deliver [`WatchItem::Progress`] with the newest revision, after every event up to it. A watch that has ended
    /// is ignored.
    fn request_progress(&self, watch: WatchId) -> StoreFuture<'_, ()>;

    /// Forgets all history before `revision`. Reads at `revision` and watches from it still work.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] where that was done before, [`StoreError::Future`].
    fn compact(&self, revision: Revision) -> StoreFuture<'_, ()>;
}
