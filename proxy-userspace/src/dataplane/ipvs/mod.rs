//! The IPVS data plane: nf_tables decides what a packet means and says it with a mark, IPVS chooses the endpoint.
//!
//! ```text
//!   prerouting -150, output -150     mark = map[address . protocol . port] of the packet's origin: which list of endpoints
//!   prerouting -101, output -101     destination NAT of others leaves it alone
//!   rule 90: our marks are local     so that packets to addresses that no interface has reach IPVS
//!   input 99, output -98             IPVS: virtual service of that mark, NAT to an endpoint
//!   postrouting 90                   affinity is learnt, the mark goes
//!   postrouting 100                  masquerade, if the connection's mark asks for it
//! ```
//! Invariants: a virtual service per list of endpoints that a frontend leads to, known by mark, so that the rules of
//! [`OriginRules`](crate::model::OriginRules) are expressed exactly; no address is added to an interface; virtual services whose
//! mark is not ours are never touched, which is why excluded networks and strict ARP need nothing here; a packet is led only to a virtual service that is there. Start reading at [`IpvsDataplane`].
mod compile;
mod kernel;
mod layout;
mod marks;
mod plan;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use node_sys::ipvs::{Scheduler, ServiceId, Timeouts};

use super::elements::has_table;
use super::{Counters, Dataplane, SyncError, SyncReport, SyncScope};
use crate::config::IpvsSettings;
use crate::model::{ServiceDelta, ServiceSnapshot};
use kernel::{FAMILIES, Kernel};
use plan::{Commands, Planner};

/// Why this node can't carry the IPVS data plane.
#[derive(Debug, thiserror::Error)]
pub enum IpvsOpenError {
    /// What the kernel says.
    #[error(transparent)]
    Kernel(#[from] SyncError),
    /// The configuration names a scheduler that is not known here.
    #[error("there is no scheduler {0:?}")]
    Scheduler(String),
}

/// Services by IPVS.
#[derive(Debug)]
pub struct IpvsDataplane {
    scheduler: Scheduler,
    timeouts: Timeouts,
    planner: Planner,
    kernel: Kernel,
}

impl IpvsDataplane {
    /// Proves that the kernel has IPVS and nf_tables. Nothing is changed before the first sync.
    ///
    /// # Errors
    /// What this kernel, or this user, lacks.
    pub fn open(settings: &IpvsSettings) -> Result<Self, IpvsOpenError> {
        let unknown = || IpvsOpenError::Scheduler(settings.scheduler.clone());
        let scheduler = Scheduler::of_name(&settings.scheduler).ok_or_else(unknown)?;
        let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
        let timeouts = Timeouts {
            tcp: seconds(settings.tcp_timeout),
            tcp_fin: seconds(settings.tcp_fin_timeout),
            udp: seconds(settings.udp_timeout),
        };
        Ok(Self { scheduler, timeouts, planner: Planner::default(), kernel: Kernel::open()? })
    }

    /// Removes everything of ours, whatever process made it: tables, virtual services, rules of routing; kernel parameters get the
    /// kernel's own values where there was anything of ours and nobody else has virtual services.
    ///
    /// # Errors
    /// The first thing that could not be removed; everything else is removed all the same.
    pub fn remove() -> Result<(), SyncError> {
        kernel::remove()
    }

    /// Whether a process has left something here.
    pub fn is_left() -> bool {
        has_table(layout::TABLE)
    }

    /// Reads what is there and makes the difference: connections and remembered clients outlive it.
    fn sync_all(&mut self, desired: &ServiceSnapshot) -> Result<SyncReport, SyncError> {
        self.planner.rebuild(desired);
        self.kernel.prepare(self.timeouts)?;
        self.kernel.read_services()?;
        let ids: BTreeSet<ServiceId> = self.kernel.held.keys().copied().chain(self.planner.service_ids()).collect();
        let commands = self.commands(ids);
        let refused = self.kernel.run(&commands.before)?;
        let mut writes = commands.before.len() + commands.after.len();
        for family in FAMILIES {
            let (fresh, there) = match self.kernel.read_elements(family)? {
                Some(there) => (false, there),
                None => (true, BTreeMap::new()),
            };
            let elements = self.planner.elements_since(self.planner.everything(family, there));
            writes += elements.delete.len() + elements.add.len();
            self.kernel.write_table(family, Some((&desired.node, fresh)), &elements)?;
        }
        self.kernel.run(&commands.after)?;
        self.kernel.drain(&self.planner)?;
        Ok(SyncReport {
            services_changed: desired.services.len(),
            kernel_writes: writes,
            refused: self.planner.names_of(&refused),
            ..SyncReport::default()
        })
    }

    fn sync_changed(&mut self, desired: &ServiceSnapshot, delta: &ServiceDelta) -> Result<SyncReport, SyncError> {
        let touched = self.planner.change(desired, delta);
        let commands = self.commands(touched.services);
        let refused = self.kernel.run(&commands.before)?;
        let elements = self.planner.elements_since(touched.elements);
        for family in FAMILIES {
            self.kernel.write_table(family, None, &elements)?;
        }
        self.kernel.run(&commands.after)?;
        self.kernel.drain(&self.planner)?;
        let writes = commands.before.len() + commands.after.len() + elements.delete.len() + elements.add.len();
        Ok(SyncReport {
            services_changed: delta.changed.len(),
            kernel_writes: writes,
            refused: self.planner.names_of(&refused),
            ..SyncReport::default()
        })
    }

    fn commands(&mut self, ids: BTreeSet<ServiceId>) -> Commands {
        let mut commands = Commands::default();
        for id in ids {
            let wanted = self.planner.service(id);
            commands.lead(id, self.kernel.held.get(&id), wanted, self.scheduler);
            if let Some(wanted) = wanted {
                self.kernel.held.entry(id).or_default().abrupt = !wanted.graceful;
            }
        }
        commands
    }
}

impl Dataplane for IpvsDataplane {
    fn name(&self) -> &'static str {
        "ipvs"
    }

    fn sync(&mut self, desired: &ServiceSnapshot, scope: SyncScope<'_>) -> Result<SyncReport, SyncError> {
        match scope {
            SyncScope::Changed(delta) if !delta.node_changed => self.sync_changed(desired, delta),
            SyncScope::Changed(_) | SyncScope::Full => self.sync_all(desired),
        }
    }

    /// Also lets servers go whose last connection has ended.
    fn audit(&mut self) -> Result<bool, SyncError> {
        self.kernel.drain(&self.planner)?;
        self.kernel.is_intact(&self.planner)
    }

    fn counters(&self) -> Counters {
        let servers = || self.kernel.held.values().flat_map(|held| held.servers.values());
        let draining = servers().filter(|weight| **weight == 0).count();
        vec![
            ("trama_ipvs_virtual_services".to_owned(), Vec::new(), self.kernel.held.len() as u64),
            ("trama_ipvs_real_servers".to_owned(), Vec::new(), servers().count() as u64),
            ("trama_ipvs_draining_servers".to_owned(), Vec::new(), draining as u64),
        ]
    }

    fn cleanup(&mut self) -> Result<(), SyncError> {
        kernel::remove()
    }
}
