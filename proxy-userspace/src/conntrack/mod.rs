//! Ends UDP flows that lead to an endpoint which is gone: the kernel remembers where the first datagram went, and nothing in UDP
//! would ever make it forget while a client keeps sending.
//!
//! ```text
//!  runner, after a sync ──changed UDP ServicePorts──► thread: index ──► conntrack entries  (every data plane)
//!                          (coalesced, never waits)                └──► connected sockets  (eBPF: every pod's namespace)
//! ```
//! Both places remember the same two facts, what the client named and who answers, and one pure decision
//! ([`FlowIndex::is_stale`]) serves both. The work happens on a thread of its own, after the data plane was programmed, and takes
//! at most a fifth of one CPU.
pub(crate) mod held;
mod index;
mod kernel;
mod metrics;
mod pause;
pub(crate) mod redirected;
mod sockets;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub use index::{Flow, FlowIndex, Scope};
pub use kernel::KernelTables;
pub use metrics::ReconcilerMetrics;
pub use sockets::{PinnedSockets, Records, Remembered};

use crate::dataplane::SyncScope;
use crate::model::{NodeConfig, Protocol, ServicePort, ServicePortName, ServiceSnapshot};

/// After a pass the thread rests this many times as long as the pass took, within the bounds.
const REST_FACTOR: u32 = 4;
const REST_MIN: Duration = Duration::from_millis(20);
const REST_MAX: Duration = Duration::from_secs(10);
/// A pass that failed is repeated over everything after this long, unless a change comes first.
const RETRY: Duration = Duration::from_secs(60);

/// Does one pass; `false` when part of it failed. [`KernelTables::clean`] in earnest.
pub type Pass = Box<dyn FnMut(&FlowIndex, &Scope) -> bool + Send>;

/// What has changed since the last pass: at most one entry for every UDP ServicePort that there is or was.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// `None` is gone.
    pub(crate) services: BTreeMap<ServicePortName, Option<Arc<ServicePort>>>,
    /// The node's facts where they changed.
    pub(crate) node: Option<Arc<NodeConfig>>,
    /// `services` is all there is.
    pub(crate) full: bool,
}

#[derive(Debug, Default)]
struct Inbox {
    changes: Changes,
    /// Whether there is anything to look at.
    due: bool,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    wake: Condvar,
}

/// The reconciler's thread; dropping the handle ends it after the pass that it is at.
#[derive(Debug)]
pub struct Reconciler {
    shared: Arc<Shared>,
}

impl Reconciler {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the process can have no more threads.
    pub fn start(pass: Pass) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let worker = Arc::clone(&shared);
        thread::Builder::new().name("stale-flows".to_owned()).spawn(move || work(&worker, pass))?;
        Ok(Self { shared })
    }

    /// Tells what has just been programmed. Returns at once.
    pub fn synced(&self, snapshot: &ServiceSnapshot, scope: SyncScope<'_>) {
        let mut inbox = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        match scope {
            SyncScope::Full => {
                let udp = snapshot.services.iter().filter(|(name, _)| name.protocol == Protocol::Udp);
                let services = udp.map(|(name, service)| (name.clone(), Some(Arc::clone(service)))).collect();
                inbox.changes = Changes { services, node: Some(Arc::clone(&snapshot.node)), full: true };
                inbox.due = true;
            }
            SyncScope::Changed(delta) => {
                if delta.node_changed {
                    inbox.changes.node = Some(Arc::clone(&snapshot.node));
                }
                for name in delta.changed.iter().filter(|name| name.protocol == Protocol::Udp) {
                    inbox.changes.services.insert(name.clone(), snapshot.services.get(name).cloned());
                    inbox.due = true;
                }
            }
        }
        if inbox.due {
            self.shared.wake.notify_one();
        }
    }
}

impl Drop for Reconciler {
    fn drop(&mut self) {
        self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.shared.wake.notify_one();
    }
}

impl Shared {
    /// Waits for changes, or for `deadline`. `None` is the end.
    fn wait(&self, deadline: Option<Instant>) -> Option<Changes> {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if inbox.closed {
                return None;
            }
            if inbox.due || left.is_some_and(|left| left.is_zero()) {
                inbox.due = false;
                return Some(std::mem::take(&mut inbox.changes));
            }
            inbox = match left {
                Some(left) => self.wake.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.wake.wait(inbox).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Sleeps unless the end comes.
    fn rest(&self, pause: Duration) {
        let inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        // Changes that come meanwhile are taken in together afterwards.
        drop(self.wake.wait_timeout_while(inbox, pause, |inbox| !inbox.closed));
    }
}

fn work(shared: &Shared, mut pass: Pass) {
    let mut index = FlowIndex::default();
    let mut retry_at = None;
    while let Some(changes) = shared.wait(retry_at) {
        let scope = index.take_in(changes, retry_at.is_some());
        let start = Instant::now();
        let succeeded = pass(&index, &scope);
        index.forget_gone();
        let took = start.elapsed();
        retry_at = (!succeeded).then(|| Instant::now() + RETRY);
        shared.rest((took * REST_FACTOR).clamp(REST_MIN, REST_MAX));
    }
}

#[cfg(test)]
mod tests;
