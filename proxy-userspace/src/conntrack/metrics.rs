//! What the reconciler counts: kube-proxy's two metrics, and our own for sockets and failures.

use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry, exponential_buckets};

use crate::model::IpFamily;

/// The reconciler's metrics.
#[derive(Debug, Clone)]
pub struct ReconcilerMetrics {
    duration: HistogramVec,
    deleted: IntCounterVec,
    sockets: IntCounter,
    failures: IntCounterVec,
}

impl ReconcilerMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// Where a name is taken; that is a bug.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let by_family = &["ip_family"];
        let duration = HistogramOpts::new(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "Duration of one look at the connection tracking table",
        );
        let deleted = Opts::new(
            "kubeproxy_conntrack_reconciler_deleted_entries_total",
            "Connection tracking entries deleted because they led to an endpoint that is gone",
        );
        let failures = Opts::new("trama_stale_flow_failures_total", "Failed searches for stale UDP flows");
        let metrics = Self {
            duration: HistogramVec::new(duration.buckets(exponential_buckets(0.001, 2.0, 15)?), by_family)?,
            deleted: IntCounterVec::new(deleted, by_family)?,
            sockets: IntCounter::new(
                "trama_stale_sockets_destroyed_total",
                "UDP sockets destroyed because their endpoint is gone",
            )?,
            failures: IntCounterVec::new(failures, &["table"])?,
        };
        registry.register(Box::new(metrics.duration.clone()))?;
        registry.register(Box::new(metrics.deleted.clone()))?;
        registry.register(Box::new(metrics.sockets.clone()))?;
        registry.register(Box::new(metrics.failures.clone()))?;
        Ok(metrics)
    }

    pub(super) fn conntrack(&self, family: IpFamily, took: Duration, deleted: usize) {
        let label = match family {
            IpFamily::V4 => "IPv4",
            IpFamily::V6 => "IPv6",
        };
        self.duration.with_label_values(&[label]).observe(took.as_secs_f64());
        self.deleted.with_label_values(&[label]).inc_by(deleted as u64);
    }

    pub(super) fn sockets(&self, destroyed: usize) {
        self.sockets.inc_by(destroyed as u64);
    }

    pub(super) fn failed(&self, table: &str) {
        self.failures.with_label_values(&[table]).inc();
    }
}
