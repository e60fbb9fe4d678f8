//! A work queue of keys: each key waits at most once, is worked on by one worker at a time, and backs off when it fails.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

const BACKOFF_MIN: Duration = Duration::from_millis(5);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// The queue. It holds each key once, so it is bounded by the number of objects that the keys name.
#[derive(Debug)]
pub(crate) struct WorkQueue<K> {
    state: Mutex<State<K>>,
    added: Notify,
}

#[derive(Debug)]
struct State<K> {
    waiting: VecDeque<K>,
    /// Keys in `waiting`, and keys in work that have to be worked on again.
    wanted: HashSet<K>,
    working: HashSet<K>,
    failures: HashMap<K, u32>,
}

impl<K: Clone + Eq + Hash + Send + 'static> WorkQueue<K> {
    pub(crate) fn new() -> Self {
        let state = State {
            waiting: VecDeque::new(),
            wanted: HashSet::new(),
            working: HashSet::new(),
            failures: HashMap::new(),
        };
        Self { state: Mutex::new(state), added: Notify::new() }
    }

    /// Asks for work on a key, unless that is asked for already.
    pub(crate) fn add(&self, key: K) {
        let mut state = self.lock();
        if !state.wanted.insert(key.clone()) || state.working.contains(&key) {
            return;
        }
        state.waiting.push_back(key);
        drop(state);
        self.added.notify_one();
    }

    /// Waits for a key to work on. Each key must be given back with [`WorkQueue::done`] or [`WorkQueue::retry`].
    pub(crate) async fn next(&self) -> K {
        loop {
            // Registered before looking, so that an addition between both is not missed.
            let added = self.added.notified();
            if let Some(key) = self.take() {
                return key;
            }
            added.await;
        }
    }

    fn take(&self) -> Option<K> {
        let mut state = self.lock();
        let key = state.waiting.pop_front()?;
        state.wanted.remove(&key);
        state.working.insert(key.clone());
        if !state.waiting.is_empty() {
            // One notification may stand for several additions: the next worker is woken here.
            self.added.notify_one();
        }
        Some(key)
    }

    /// The work on a key succeeded.
    pub(crate) fn done(&self, key: &K) {
        self.lock().failures.remove(key);
        self.finish(key);
    }

    /// The work on a key failed: it is done again, later each time.
    pub(crate) fn retry(self: &Arc<Self>, key: K) {
        let failures = {
            let mut state = self.lock();
            let failures = state.failures.entry(key.clone()).or_default();
            *failures = failures.saturating_add(1);
            *failures
        };
        self.finish(&key);
        let queue = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(backoff(failures)).await;
            queue.add(key);
        });
    }

    fn finish(&self, key: &K) {
        let mut state = self.lock();
        state.working.remove(key);
        if state.wanted.contains(key) {
            state.waiting.push_back(key.clone());
            drop(state);
            self.added.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The delay after the n-th failure in a row.
fn backoff(failures: u32) -> Duration {
    BACKOFF_MIN.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(BACKOFF_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_waits_once_and_is_worked_on_once() {
        let queue = Arc::new(WorkQueue::new());
        queue.add("a");
        queue.add("a");
        queue.add("b");
        assert_eq!(queue.next().await, "a");
        queue.add("a");
        assert_eq!(queue.next().await, "b");
        assert!(queue.take().is_none(), "a is in work");
        queue.done(&"a");
        assert_eq!(queue.next().await, "a");
    }

    #[tokio::test(start_paused = true)]
    async fn failures_come_back() {
        let queue = Arc::new(WorkQueue::new());
        queue.add("a");
        let key = queue.next().await;
        queue.retry(key);
        assert_eq!(queue.next().await, "a");
        queue.done(&"a");
        assert!(queue.lock().failures.is_empty());
    }

    #[test]
    fn backoff_is_bounded() {
        assert_eq!(backoff(1), BACKOFF_MIN);
        assert_eq!(backoff(2), BACKOFF_MIN * 2);
        assert_eq!(backoff(u32::MAX), BACKOFF_MAX);
    }
}
