//! `/metrics/slis`: health checks as Kubernetes' components count them (component-base `metrics/prometheus/slis`).

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

/// The one check that kube-proxy counts there: that `/healthz` of the metrics port was answered. It can only succeed; what
/// `/healthz` and `/livez` of the health port answer is in `/metrics`.
#[derive(Debug, Default)]
pub struct Slis {
    answered: AtomicU64,
}

impl Slis {
    /// `/healthz` was answered.
    pub fn observe_ping(&self) {
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    /// In Prometheus' text format; empty before the first check, as kube-proxy's is.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let answered = self.answered.load(Ordering::Relaxed);
        if answered == 0 {
            return text;
        }
        for (name, kind, help, labels, value) in [
            (
                "kubernetes_healthcheck",
                "gauge",
                "This metric records the result of a single healthcheck.",
                "name=\"ping\",type=\"healthz\"",
                1,
            ),
            (
                "kubernetes_healthchecks_total",
                "counter",
                "This metric records the results of all healthcheck.",
                "name=\"ping\",status=\"success\",type=\"healthz\"",
                answered,
            ),
        ] {
            // Writing into a String cannot fail.
            let _ = write!(text, "# HELP {name} [STABLE] {help}\n# TYPE {name} {kind}\n{name}{{{labels}}} {value}\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_counted_from_the_first() {
        let slis = Slis::default();
        assert_eq!(slis.render(), "");
        slis.observe_ping();
        slis.observe_ping();
        let lines: Vec<String> =
            slis.render().lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
        assert_eq!(
            lines,
            [
                "kubernetes_healthcheck{name=\"ping\",type=\"healthz\"} 1",
                "kubernetes_healthchecks_total{name=\"ping\",status=\"success\",type=\"healthz\"} 2",
            ]
        );
    }
}
