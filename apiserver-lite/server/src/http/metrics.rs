//! Counters for `/metrics`, in the Prometheus text format with the names that kube-apiserver uses where it has them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

/// What a request is counted by. All three come from small, fixed sets, which bounds the map.
type Label = (&'static str, &'static str, u16);

/// The counters of a server.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    requests: Mutex<BTreeMap<Label, u64>>,
}

/// What is measured when the metrics are read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gauges {
    pub(crate) revision: u64,
    pub(crate) watches: usize,
    pub(crate) in_flight: usize,
}

impl Metrics {
    /// Counts one answered request. `resource` is empty for documents.
    pub(crate) fn count(&self, verb: &'static str, resource: &'static str, code: u16) {
        *self.requests.lock().unwrap_or_else(PoisonError::into_inner).entry((verb, resource, code)).or_default() += 1;
    }

    /// The text of `/metrics`.
    pub(crate) fn render(&self, gauges: Gauges) -> String {
        let mut out =
            String::from("# HELP apiserver_request_total Answered requests.\n# TYPE apiserver_request_total counter\n");
        for ((verb, resource, code), count) in &*self.requests.lock().unwrap_or_else(PoisonError::into_inner) {
            // Writing into a String can't fail.
            let _ = writeln!(
                out,
                "apiserver_request_total{{verb=\"{verb}\",resource=\"{resource}\",code=\"{code}\"}} {count}"
            );
        }
        for (name, help, value) in [
            ("apiserver_store_revision", "The newest revision of the store.", gauges.revision),
            ("apiserver_longrunning_requests", "Open watches.", gauges.watches as u64),
            ("apiserver_current_inflight_requests", "Requests that are being answered.", gauges.in_flight as u64),
        ] {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_format() {
        let metrics = Metrics::default();
        metrics.count("list", "pods", 200);
        metrics.count("list", "pods", 200);
        let text = metrics.render(Gauges { revision: 7, watches: 2, in_flight: 1 });
        assert!(text.contains("apiserver_request_total{verb=\"list\",resource=\"pods\",code=\"200\"} 2\n"), "{text}");
        assert!(text.contains("\napiserver_store_revision 7\n"), "{text}");
    }
}
