//! The one interface between the model and a kernel: eBPF, nftables, iptables and IPVS behind the same trait.

pub mod ebpf;
mod elements;
#[cfg(test)]
pub(crate) mod fake;
pub mod iptables;
pub mod ipvs;
pub mod nftables;
mod scrape;
mod select;

pub use scrape::{AskNumbered, Counters, NumberedService, Scrape};
pub use select::{OpenError, Opened, open, remove, remove_others};

use std::collections::BTreeMap;

use crate::model::{ServiceDelta, ServicePortName, ServiceSnapshot};
use crate::status::Description;

/// How much of the desired state a sync has to look at.
#[derive(Debug, Clone, Copy)]
pub enum SyncScope<'a> {
    /// Everything: the first sync, and every sync after a failed one.
    Full,
    /// Only what the delta names; the kernel holds the previous snapshot.
    Changed(&'a ServiceDelta),
}

/// What a sync did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SyncReport {
    /// ServicePorts written or removed.
    pub services_changed: usize,
    /// Entries written to or deleted from the kernel.
    pub kernel_writes: usize,
    /// ServicePorts refused whole because the kernel has no room for them.
    pub refused: Vec<ServicePortName>,
    /// ServicePorts that were to be balanced by Maglev and are at random, because the kernel has no room for their table.
    pub without_table: Vec<ServicePortName>,
}

/// Why a sync failed.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// The kernel refused a write.
    #[error("cannot write {object}: {source}")]
    Kernel {
        /// Map, rule or object that was written.
        object: String,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// iptables did not do what it was told.
    #[error(transparent)]
    Iptables(iptables::IptablesError),
}

/// A way to express Services in the kernel of this node.
///
/// Calls come from one thread, one at a time; they may block.
pub trait Dataplane: Send {
    /// Short name as in `--proxy-mode`, for logs and `/proxyMode`.
    fn name(&self) -> &'static str;

    /// Makes the kernel equal to `desired`.
    ///
    /// # Errors
    /// On `Err` the kernel may hold part of the change; the caller retries with [`SyncScope::Full`].
    fn sync(&mut self, desired: &ServiceSnapshot, scope: SyncScope<'_>) -> Result<SyncReport, SyncError>;

    /// Looks, at little cost, whether the kernel still holds what was programmed: whoever administers the node may have
    /// flushed or detached it. On `false` the caller syncs with [`SyncScope::Full`].
    ///
    /// # Errors
    /// When the kernel can't be asked; nothing has been changed.
    fn audit(&mut self) -> Result<bool, SyncError> {
        Ok(true)
    }

    /// Makes room where it runs short, or where the last sync refused something. Returns whether there is more than before; then the
    /// caller syncs with [`SyncScope::Full`] at once. What is programmed goes on meanwhile.
    fn grow(&mut self) -> bool {
        false
    }

    /// How full its maps are, what hangs where, and what the last audit found.
    fn describe(&self) -> Description {
        Description::default()
    }

    /// Names of the ServicePorts by the ids that the kernel has for them, where it has ids.
    fn service_names(&self) -> BTreeMap<u32, String> {
        BTreeMap::new()
    }

    /// The ServicePorts with these ids, where it has ids, and their endpoints up to a number in all.
    fn numbered(&self, _ids: &[u32], _endpoints_max: usize) -> Vec<NumberedService> {
        Vec::new()
    }

    /// Counters of the kernel side for `/metrics` that are at hand.
    fn counters(&self) -> Counters;

    /// All counters for `/metrics`: those at hand, and how the others are read.
    fn scrape(&self) -> Scrape {
        Scrape::at_hand(self.counters())
    }

    /// Removes everything that this dataplane owns and nothing else. Idempotent.
    ///
    /// # Errors
    /// What could not be removed; everything else is removed all the same.
    fn cleanup(&mut self) -> Result<(), SyncError>;
}
