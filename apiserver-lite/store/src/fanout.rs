//! Which watches an event goes to, found by the event's key and not by asking every watch.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::mpsc::{self, error::TrySendError};

use crate::{Event, Revision, StoreError, WatchId, WatchItem};

/// Open watches by scope: a prefix ending in `/`, or one key.
#[derive(Debug)]
pub(crate) struct Fanout {
    scopes: HashMap<Box<str>, Vec<Subscriber>>,
    scope_of: HashMap<WatchId, Box<str>>,
    id_next: u64,
    watches_max: usize,
    buffer_items_max: usize,
}

#[derive(Debug)]
struct Subscriber {
    id: WatchId,
    sender: mpsc::Sender<WatchItem>,
}

impl Fanout {
    pub(crate) fn new(watches_max: usize, buffer_items_max: usize) -> Self {
        Self { scopes: HashMap::new(), scope_of: HashMap::new(), id_next: 0, watches_max, buffer_items_max }
    }

    /// Registers a watch. Closed ones are forgotten first when the limit is reached: a reader that went away is only noticed at an event.
    pub(crate) fn subscribe(&mut self, scope: &str) -> Result<(WatchId, mpsc::Receiver<WatchItem>), StoreError> {
        if self.scope_of.len() >= self.watches_max {
            self.forget_closed();
        }
        if self.scope_of.len() >= self.watches_max {
            return Err(StoreError::TooManyWatches { watches_max: self.watches_max });
        }
        let (sender, receiver) = mpsc::channel(self.buffer_items_max);
        self.id_next += 1;
        let id = WatchId(self.id_next);
        self.scopes.entry(scope.into()).or_default().push(Subscriber { id, sender });
        self.scope_of.insert(id, scope.into());
        Ok((id, receiver))
    }

    /// Sends an event to every watch whose scope holds its key: the key itself and each of its `/` prefixes, so at most one look-up per
    /// path segment however many watches are open.
    pub(crate) fn publish(&mut self, event: &Arc<Event>) {
        for (end, _) in event.key.match_indices('/') {
            if let Some(scope) = event.key.get(..=end) {
                self.publish_scope(scope, event);
            }
        }
        self.publish_scope(&event.key, event);
    }

    /// Queues a progress item behind everything that was sent to the watch before.
    pub(crate) fn progress(&mut self, id: WatchId, revision: Revision) {
        let Some(scope) = self.scope_of.get(&id) else { return };
        let subscriber = self.scopes.get(scope).and_then(|all| all.iter().find(|s| s.id == id));
        if let Some(subscriber) = subscriber {
            // A full buffer needs no progress item: its reader has events to read, and the next request will find it.
            let _ = subscriber.sender.try_send(WatchItem::Progress(revision));
        }
    }

    /// How many watches are open, counting those whose reader left since the last event.
    pub(crate) fn len(&self) -> usize {
        self.scope_of.len()
    }

    fn publish_scope(&mut self, scope: &str, event: &Arc<Event>) {
        let Some(subscribers) = self.scopes.get_mut(scope) else { return };
        let scope_of = &mut self.scope_of;
        // Dropping the sender of a full buffer is what closes a slow watch: its reader gets what is buffered, then the end.
        subscribers.retain(|s| match s.sender.try_send(WatchItem::Event(Arc::clone(event))) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Closed(_)) => {
                scope_of.remove(&s.id);
                false
            }
        });
        if subscribers.is_empty() {
            self.scopes.remove(scope);
        }
    }

    /// Drops every watch whose reader is gone.
    pub(crate) fn forget_closed(&mut self) {
        let scope_of = &mut self.scope_of;
        self.scopes.retain(|_, subscribers| {
            subscribers.retain(|s| {
                let open = !s.sender.is_closed();
                if !open {
                    scope_of.remove(&s.id);
                }
                open
            });
            !subscribers.is_empty()
        });
    }
}
