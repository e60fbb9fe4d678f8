//! What the runner remembers for whoever asks how it is.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use proxy_common::ABI_VERSION;

use super::Runner;
use crate::model::{IpFamily, ServicePort};
use crate::status::{Audit, Counts, LastSync, Status};

/// Beside what the desired state and the data plane know themselves.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// When the kernel was last looked at.
    pub(super) audited: Option<Instant>,
    /// How often something was found changed.
    pub(super) repairs: u64,
    /// The last sync that succeeded.
    pub(super) synced: Option<Synced>,
}

/// A sync that succeeded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Synced {
    /// When it ended.
    pub(super) at: Instant,
    /// How long it took.
    pub(super) duration: Duration,
    /// Whether everything was looked at.
    pub(super) full: bool,
    /// Entries written.
    pub(super) kernel_writes: usize,
}

impl Runner {
    /// How everything is.
    pub(super) fn status(&self) -> Status {
        let kernel = self.parts.dataplane.describe();
        let audit = self.told.audited.map(|at| Audit {
            seconds_ago: at.elapsed().as_secs(),
            drift: kernel.drift.clone(),
            repairs: self.told.repairs,
        });
        let last_sync = self.told.synced.map(|synced| LastSync {
            seconds_ago: synced.at.elapsed().as_secs(),
            duration_seconds: synced.duration.as_secs_f64(),
            full: synced.full,
            kernel_writes: synced.kernel_writes,
            refused: self.refused.count(),
        });
        Status {
            running: true,
            mode: self.parts.dataplane.name().to_owned(),
            why: self.parts.why.clone(),
            abi: ABI_VERSION,
            counts: self.counts(),
            audit,
            last_sync,
            kernel,
        }
    }

    fn counts(&self) -> Counts {
        let services = &self.desired.snapshot().services;
        let names: BTreeSet<_> = services.keys().map(|name| (&name.namespace, &name.service)).collect();
        let by_family = |size: fn(&ServicePort) -> usize| {
            [IpFamily::V4, IpFamily::V6].map(|family| {
                services.values().filter(|service| service.name.family == family).map(|service| size(service)).sum()
            })
        };
        Counts {
            services: Some(names.len()),
            service_ports: services.len(),
            frontends: by_family(|service| service.frontends.len()),
            endpoints: by_family(|service| {
                let cluster: BTreeSet<_> = service.cluster_endpoints.iter().collect();
                cluster.into_iter().chain(&service.local_endpoints).collect::<BTreeSet<_>>().len()
            }),
        }
    }
}
