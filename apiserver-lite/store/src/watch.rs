//! The receiving end of a watch.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::{Event, Revision};

/// Names a watch for [`crate::Store::request_progress`]. Ids are not reused while the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WatchId(pub u64);

/// What a watch delivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchItem {
    /// A write in the scope of the watch.
    Event(Arc<Event>),
    /// Every event up to this revision has been delivered before this item.
    Progress(Revision),
}

/// Why a watch delivers nothing more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchEnd {
    /// The reader fell further behind than the buffer holds, or the store was closed. Watch again from the last revision seen.
    #[error("the watch was closed because its reader was too slow or the store closed")]
    Closed,
}

/// A running watch. Dropping it ends it.
#[derive(Debug)]
pub struct Watch {
    id: WatchId,
    /// Events of the log from before the watch was registered; shared with the log, so bounded by it.
    backlog: VecDeque<Arc<Event>>,
    live: mpsc::Receiver<WatchItem>,
}

impl Watch {
    /// Joins what happened before registration with what comes after it. For implementations of [`crate::Store`].
    pub fn new(id: WatchId, backlog: VecDeque<Arc<Event>>, live: mpsc::Receiver<WatchItem>) -> Self {
        Self { id, backlog, live }
    }

    /// The name of this watch.
    pub fn id(&self) -> WatchId {
        self.id
    }

    /// Waits for the next item. Cancel safe: an item is lost only together with the watch.
    ///
    /// # Errors
    /// [`WatchEnd`] when nothing more will come; what was buffered before is delivered first.
    pub async fn next(&mut self) -> Result<WatchItem, WatchEnd> {
        match self.backlog.pop_front() {
            Some(event) => Ok(WatchItem::Event(event)),
            None => self.live.recv().await.ok_or(WatchEnd::Closed),
        }
    }

    /// Returns the next item if one is there already, so that a reader can put many into one write.
    pub fn try_next(&mut self) -> Option<WatchItem> {
        match self.backlog.pop_front() {
            Some(event) => Some(WatchItem::Event(event)),
            None => self.live.try_recv().ok(),
        }
    }
}
