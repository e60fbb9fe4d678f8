//! What kube-proxy counts in one mode alone, for dashboards and alerts that were made for it.
//!
//! The eBPF mode has kube-proxy's common metrics and none of these. What a data plane knows better itself (failures and rules of
//! mode iptables) comes with its counters, under kube-proxy's names.

use prometheus::IntCounterVec;

use super::{FAMILIES, Registrar};

/// Failures, as the mode calls them.
#[derive(Debug)]
pub(super) struct ModeMetrics {
    /// Of a sync, whatever its extent.
    failures: Option<IntCounterVec>,
}

impl ModeMetrics {
    pub(super) fn new(r: &Registrar<'_>, mode: &str) -> Result<Self, prometheus::Error> {
        let failed = "Syncs that failed";
        let failures = match mode {
            "ipvs" => Some(by_family(r, "kubeproxy_sync_proxy_rules_iptables_restore_failures_total", failed)?),
            "nftables" => {
                // kube-proxy deletes stale chains in a second transaction; there is none here, so it stays at 0.
                let cleanup = "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total";
                by_family(r, cleanup, "Stale chains that could not be removed")?;
                Some(by_family(r, "kubeproxy_sync_proxy_rules_nftables_sync_failures_total", failed)?)
            }
            _ => None,
        };
        Ok(Self { failures })
    }

    pub(super) fn sync_failed(&self) {
        let Some(failures) = &self.failures else { return };
        for family in FAMILIES {
            failures.with_label_values(&[family]).inc();
        }
    }
}

/// A counter that is there from the beginning, at 0: a rate needs a first value.
fn by_family(r: &Registrar<'_>, name: &str, help: &str) -> Result<IntCounterVec, prometheus::Error> {
    let counter = r.counter_vec(name, help, &["ip_family"])?;
    for family in FAMILIES {
        counter.with_label_values(&[family]);
    }
    Ok(counter)
}

#[cfg(test)]
mod tests {
    use crate::metrics::Metrics;

    fn after_failures(mode: &str) -> String {
        let metrics = Metrics::new().unwrap();
        metrics.set_mode(mode).unwrap();
        for _ in 0..3 {
            metrics.sync_failed();
        }
        metrics.render(&Vec::new()).unwrap()
    }

    fn value(text: &str, name: &str) -> Option<u64> {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("kubeproxy_sync_proxy_rules_{name}{{ip_family=\"IPv6\"}} ")));
        line.and_then(|value| value.parse().ok())
    }

    #[test]
    fn every_mode_counts_its_failures_under_kube_proxys_name() {
        let text = after_failures("nftables");
        assert_eq!(value(&text, "nftables_sync_failures_total"), Some(3));
        assert_eq!(value(&text, "nftables_cleanup_failures_total"), Some(0));
        assert_eq!(value(&after_failures("ipvs"), "iptables_restore_failures_total"), Some(3));
        let text = after_failures("ebpf");
        assert!(!text.contains("_failures_total{"), "{text}");
        assert!(text.contains("trama_sync_failures_total 3"));
    }
}
