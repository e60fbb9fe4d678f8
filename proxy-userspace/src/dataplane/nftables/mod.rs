//! The nftables backend: one table of ours in each family, written over netlink; no other program runs and none is needed.
//!
//! ```text
//!  ServiceSnapshot ─► plan (pure, per family) ─► Changes ─► apply: one transaction
//!
//!  new connection ─► origin: pod, node or other ─► from-*: frontends {address . protocol . port -> id . classes}
//!                     ─► classes {class -> chain} ─► ip-cluster-3: slots {id . random of 3 -> endpoint} ─► dnat
//! ```
//! A packet sees the state before a transaction or the one after it. The number of sets is constant; the number of chains
//! grows with the number of different list lengths in use. Established connections are conntrack's: they meet no rule of ours
//! but one look at their state. Needs nf_tables with NAT (Linux 5.15 or later; tried on 6.1 and 6.18) and `CAP_NET_ADMIN`.

mod apply;
mod changes;
mod classes;
mod encode;
mod layout;
mod plan;
mod rules;
#[cfg(test)]
mod tests;

use std::io;

use node_sys::nftables::{Nftables, NftablesError};
use node_sys::probe::{self, Capability};

use self::apply::TableWriter;
use super::elements::has_table;
use super::{Counters, Dataplane, SyncError, SyncReport, SyncScope};
use crate::model::{IpFamily, ServiceSnapshot};

/// Both families.
const FAMILIES: [IpFamily; 2] = [IpFamily::V4, IpFamily::V6];

/// Settings of the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NftablesConfig {
    /// Which bit of a packet's mark, 0 to 31, asks for masquerade between two hooks: `nftables.masqueradeBit`, 14 unless
    /// configured, as kube-proxy's.
    pub masquerade_bit: u8,
}

impl Default for NftablesConfig {
    fn default() -> Self {
        Self { masquerade_bit: 14 }
    }
}

/// Why nftables can't be used.
#[derive(Debug, thiserror::Error)]
pub enum NftablesOpenError {
    /// The process may not.
    #[error("missing {missing}; run trama-proxy as root or give it these capabilities")]
    Privileges {
        /// Names, separated by commas.
        missing: String,
    },
    /// The process cannot be examined.
    #[error(transparent)]
    Probe(#[from] node_sys::SysError),
    /// The kernel does not do all that is needed.
    #[error("this kernel's nf_tables does not do all that is needed: {0}")]
    Kernel(#[from] NftablesError),
}

/// The nftables backend of this node.
pub struct NftablesDataplane {
    connection: Nftables,
    tables: [TableWriter; 2],
    /// Number of the last transaction in this network namespace, if it is known to be ours.
    generation: Option<u32>,
}

impl NftablesDataplane {
    /// Connects, and has the kernel check everything that the tables are made of, without leaving anything. What an earlier
    /// process left is not touched before the first sync.
    ///
    /// # Errors
    /// [`NftablesOpenError`] names what is missing.
    pub fn open(config: NftablesConfig) -> Result<Self, NftablesOpenError> {
        let missing = probe::missing_capabilities(&[Capability::NetAdmin])?;
        if !missing.is_empty() {
            let names: Vec<&str> = missing.iter().map(|capability| capability.name()).collect();
            return Err(NftablesOpenError::Privileges { missing: names.join(", ") });
        }
        let mut connection = Nftables::open()?;
        let tables = FAMILIES.map(|family| TableWriter::new(family, config));
        for table in &tables {
            table.preflight(&mut connection)?;
        }
        Ok(Self { connection, tables, generation: None })
    }

    /// Removes our tables from this network namespace, whatever process made them.
    ///
    /// # Errors
    /// What could not be removed; that there is nothing is no error.
    pub fn remove() -> Result<(), NftablesError> {
        let mut connection = Nftables::open()?;
        let results = FAMILIES.map(|family| apply::remove(&mut connection, family));
        results.into_iter().collect()
    }

    /// Whether a process has left something here.
    pub fn is_left() -> bool {
        has_table(layout::TABLE)
    }

    /// Runs `work` for each table, and remembers whether nobody else's transactions came between.
    fn sync_tables(
        &mut self,
        work: impl Fn(&mut TableWriter, &mut Nftables) -> Result<Written, NftablesError>,
    ) -> Result<SyncReport, NftablesError> {
        let before = std::mem::take(&mut self.generation);
        let mut report = SyncReport::default();
        let mut transactions = 0;
        for table in &mut self.tables {
            let written = work(table, &mut self.connection)?;
            report.services_changed += written.services;
            report.kernel_writes += written.entries;
            transactions += written.transactions;
        }
        let now = self.connection.generation()?;
        let expected = before.map(|before| before.wrapping_add(transactions));
        self.generation = expected.filter(|expected| *expected == now);
        Ok(report)
    }
}

/// What one table's part of a sync was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Written {
    services: usize,
    entries: usize,
    transactions: u32,
}

impl Dataplane for NftablesDataplane {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn sync(&mut self, desired: &ServiceSnapshot, scope: SyncScope<'_>) -> Result<SyncReport, SyncError> {
        let result = match scope {
            SyncScope::Full => self.sync_tables(|table, connection| table.write_all(connection, desired)),
            SyncScope::Changed(delta) => {
                self.sync_tables(|table, connection| table.write_changes(connection, desired, delta))
            }
        };
        result.map_err(|error| kernel_error(&error))
    }

    fn audit(&mut self) -> Result<bool, SyncError> {
        let generation = self.connection.generation().map_err(|error| kernel_error(&error))?;
        if self.generation == Some(generation) {
            return Ok(true);
        }
        for table in &mut self.tables {
            if !table.is_intact(&mut self.connection).map_err(|error| kernel_error(&error))? {
                return Ok(false);
            }
        }
        // Read before the look: what happened during it is looked at next time.
        self.generation = Some(generation);
        Ok(true)
    }

    fn counters(&self) -> Counters {
        let sizes = self.tables.iter().flat_map(|table| {
            let (services, classes) = table.sizes();
            let family = vec![("ip_family".to_owned(), table.family_name().to_owned())];
            [
                ("trama_nftables_service_ports".to_owned(), family.clone(), services as u64),
                ("trama_nftables_classes".to_owned(), family, classes as u64),
            ]
        });
        sizes.collect()
    }

    fn cleanup(&mut self) -> Result<(), SyncError> {
        let results = FAMILIES.map(|family| apply::remove(&mut self.connection, family));
        results.into_iter().collect::<Result<(), _>>().map_err(|error| kernel_error(&error))
    }
}

/// The kernel's refusal in the words of every backend.
fn kernel_error(error: &NftablesError) -> SyncError {
    SyncError::Kernel { object: "nftables".to_owned(), source: io::Error::other(error.to_string()) }
}
