//! The metrics: kube-proxy's names where they mean the same here, `trama_*` for the rest.

mod by_mode;
mod exposition;
mod slis;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder, exponential_buckets,
};

use self::by_mode::ModeMetrics;
use self::exposition::{write_counters, write_process, write_sample};
pub use self::slis::Slis;
use crate::dataplane::Counters;
use crate::model::NoLocalEndpoints;

/// kube-proxy runs one proxier per family, and its metrics carry the family; ours are synced together.
const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// client-go's.
const REQUEST_BUCKETS: [f64; 12] = [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0];

/// Every metric that this process keeps itself.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    kube: KubeProxyMetrics,
    own: OwnMetrics,
    by_mode: OnceLock<ModeMetrics>,
    start: Duration,
    snapshot_version: AtomicU64,
}

/// What kube-proxy has too, under its names.
#[derive(Debug)]
struct KubeProxyMetrics {
    sync_duration: HistogramVec,
    full_sync_duration: HistogramVec,
    partial_sync_duration: HistogramVec,
    sync_last: GaugeVec,
    sync_last_queued: GaugeVec,
    network_programming: HistogramVec,
    endpoint_changes: IntCounter,
    endpoint_changes_pending: IntGauge,
    service_changes: IntCounter,
    service_changes_pending: IntGauge,
    no_local_endpoints: IntGaugeVec,
    healthz: IntCounterVec,
    livez: IntCounterVec,
}

/// What kube-proxy does not have.
#[derive(Debug)]
struct OwnMetrics {
    event_to_programmed: Histogram,
    lists_complete: Gauge,
    first_sync: Gauge,
    sync_failures: IntCounter,
    audits: IntCounter,
    repairs: IntCounter,
    kernel_writes: IntCounter,
    services: IntGauge,
    refused: IntGauge,
    conflicts: IntGauge,
    rejected_endpoints: IntGauge,
    watch_errors: IntCounterVec,
    events_dropped: IntCounter,
    api_requests: IntCounterVec,
    api_request_duration: HistogramVec,
}

/// What a finished sync reports.
#[derive(Debug, Clone, Copy)]
pub struct SyncDone {
    /// How long it took.
    pub duration: Duration,
    /// Whether everything was looked at.
    pub full: bool,
    /// Entries written to or deleted from the kernel.
    pub kernel_writes: usize,
    /// ServicePorts refused.
    pub refused: usize,
    /// ServicePorts in the snapshot.
    pub services: usize,
    /// Its version.
    pub version: u64,
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Errors
    /// Where two metrics have one name; that is a bug.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let registrar = Registrar(&registry);
        let (kube, own) = (KubeProxyMetrics::new(&registrar)?, OwnMetrics::new(&registrar)?);
        let by_mode = OnceLock::new();
        Ok(Self { registry, kube, own, by_mode, start: unix_time(), snapshot_version: AtomicU64::new(0) })
    }

    /// Registers what kube-proxy has in this mode alone, once the mode is known.
    ///
    /// # Errors
    /// Where two metrics have one name; that is a bug.
    pub fn set_mode(&self, mode: &str) -> Result<(), prometheus::Error> {
        let metrics = ModeMetrics::new(&Registrar(&self.registry), mode)?;
        // A second mode in one process would have failed to register.
        let _ = self.by_mode.set(metrics);
        Ok(())
    }

    /// Counts a request to the API server at `host`; `code` is its status, or nothing where there was no answer.
    pub fn api_request(&self, method: &str, host: &str, code: Option<u16>, duration: Duration) {
        let code = code.map_or_else(|| "<error>".to_owned(), |code| code.to_string());
        self.own.api_requests.with_label_values(&[&code, method, host]).inc();
        self.own.api_request_duration.with_label_values(&[method, host]).observe(duration.as_secs_f64());
    }

    /// Counts an Event that was not written.
    pub fn event_dropped(&self) {
        self.own.events_dropped.inc();
    }

    /// Where parts with metrics of their own register them.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Counts a failed list or watch.
    pub fn watch_error(&self, resource: &str, reason: &str) {
        self.own.watch_errors.with_label_values(&[resource, reason]).inc();
    }

    /// Counts an answer of `/healthz` (or `/livez`).
    pub fn probe(&self, is_livez: bool, code: u16) {
        let counter = if is_livez { &self.kube.livez } else { &self.kube.healthz };
        counter.with_label_values(&[&code.to_string()]).inc();
    }

    /// An EndpointSlice changed.
    pub fn endpoint_change(&self) {
        self.kube.endpoint_changes.inc();
        self.kube.endpoint_changes_pending.inc();
    }

    /// A Service changed.
    pub fn service_change(&self) {
        self.kube.service_changes.inc();
        self.kube.service_changes_pending.inc();
    }

    /// Both initial lists are complete.
    pub fn lists_complete(&self) {
        self.own.lists_complete.set(unix_time().as_secs_f64());
    }

    /// A sync is asked for.
    pub fn sync_queued(&self) {
        self.kube.sync_last_queued.set_all(unix_time().as_secs_f64());
    }

    /// A sync failed.
    pub fn sync_failed(&self) {
        self.own.sync_failures.inc();
        if let Some(by_mode) = self.by_mode.get() {
            by_mode.sync_failed();
        }
    }

    /// The data plane looked whether the kernel still holds what was programmed.
    pub fn audit(&self) {
        self.own.audits.inc();
    }

    /// Somebody else changed what was programmed.
    pub fn repair(&self) {
        self.own.repairs.inc();
    }

    /// A sync succeeded: nothing is pending any more.
    pub fn sync_done(&self, done: SyncDone) {
        let seconds = done.duration.as_secs_f64();
        self.kube.sync_duration.observe_all(seconds);
        let kind = if done.full { &self.kube.full_sync_duration } else { &self.kube.partial_sync_duration };
        kind.observe_all(seconds);
        let now = unix_time().as_secs_f64();
        self.kube.sync_last.set_all(now);
        if self.own.first_sync.get() == 0.0 {
            self.own.first_sync.set(now);
        }
        self.own.kernel_writes.inc_by(done.kernel_writes as u64);
        self.own.refused.set(gauge(done.refused));
        self.own.services.set(gauge(done.services));
        self.snapshot_version.store(done.version, Ordering::Relaxed);
        self.nothing_pending();
    }

    /// Everything received is programmed (or made no difference).
    pub fn nothing_pending(&self) {
        self.kube.endpoint_changes_pending.set(0);
        self.kube.service_changes_pending.set(0);
    }

    /// One change was programmed this long after it was received.
    pub fn programmed(&self, after: Duration) {
        self.own.event_to_programmed.observe(after.as_secs_f64());
    }

    /// One EndpointSlice was programmed this long after the change that it reports.
    pub fn network_programmed(&self, after: Duration) {
        self.kube.network_programming.observe_all(after.as_secs_f64());
    }

    /// Sets the counts that the model keeps.
    pub fn model(&self, no_local: NoLocalEndpoints, conflicts: usize, rejected_endpoints: u64) {
        for (policy, counts) in [("internal", no_local.internal), ("external", no_local.external)] {
            for (family, count) in FAMILIES.into_iter().zip(counts) {
                self.kube.no_local_endpoints.with_label_values(&[policy, family]).set(gauge(count));
            }
        }
        self.own.conflicts.set(gauge(conflicts));
        self.own.rejected_endpoints.set(i64::try_from(rejected_endpoints).unwrap_or(i64::MAX));
    }

    /// The text exposition: what is registered, the process, and `counters` of the data plane.
    ///
    /// # Errors
    /// Where a metric can't be encoded; that is a bug.
    pub fn render(&self, counters: &Counters) -> Result<String, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        let mut text = String::from_utf8_lossy(&text).into_owned();
        write_process(&mut text, self.start);
        let version = self.snapshot_version.load(Ordering::Relaxed);
        write_sample(&mut text, "trama_snapshot_version", "gauge", version);
        write_counters(&mut text, counters);
        Ok(text)
    }
}

impl KubeProxyMetrics {
    fn new(r: &Registrar<'_>) -> Result<Self, prometheus::Error> {
        let by_family = &["ip_family"];
        let family_histogram =
            |name, help| r.histogram_vec(name, help, exponential_buckets(0.001, 2.0, 15)?, by_family);
        Ok(Self {
            sync_duration: family_histogram("kubeproxy_sync_proxy_rules_duration_seconds", "Duration of a sync")?,
            full_sync_duration: family_histogram(
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "Duration of a full sync",
            )?,
            partial_sync_duration: family_histogram(
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "Duration of a partial sync",
            )?,
            sync_last: r.gauge_vec(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "When the last successful sync ended",
                by_family,
            )?,
            sync_last_queued: r.gauge_vec(
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "When a sync was last asked for",
                by_family,
            )?,
            network_programming: r.histogram_vec(
                "kubeproxy_network_programming_duration_seconds",
                "From the change of a pod or Service to its programming",
                network_programming_buckets(),
                by_family,
            )?,
            endpoint_changes: r
                .counter("kubeproxy_sync_proxy_rules_endpoint_changes_total", "EndpointSlice changes seen")?,
            endpoint_changes_pending: r.gauge(
                "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
                "EndpointSlice changes not yet programmed",
            )?,
            service_changes: r.counter("kubeproxy_sync_proxy_rules_service_changes_total", "Service changes seen")?,
            service_changes_pending: r
                .gauge("kubeproxy_sync_proxy_rules_service_changes_pending", "Service changes not yet programmed")?,
            no_local_endpoints: r.gauge_vec_int(
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
                "ServicePorts with a Local traffic policy and no local endpoint",
                &["traffic_policy", "ip_family"],
            )?,
            healthz: r.counter_vec("kubeproxy_proxy_healthz_total", "Answers of /healthz", &["code"])?,
            livez: r.counter_vec("kubeproxy_proxy_livez_total", "Answers of /livez", &["code"])?,
        })
    }
}

impl OwnMetrics {
    fn new(r: &Registrar<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            event_to_programmed: r.histogram(
                "trama_event_to_programmed_seconds",
                "From the receipt of a change to its programming",
                event_buckets(),
            )?,
            lists_complete: r.float_gauge(
                "trama_lists_complete_timestamp_seconds",
                "When both initial lists were complete; 0 before",
            )?,
            first_sync: r
                .float_gauge("trama_first_sync_timestamp_seconds", "When the first sync succeeded; 0 before")?,
            sync_failures: r.counter("trama_sync_failures_total", "Syncs that failed")?,
            audits: r
                .counter("trama_audits_total", "Times that the kernel was looked at for changes by somebody else")?,
            repairs: r.counter(
                "trama_repairs_total",
                "Times that everything was written again because somebody else had changed it",
            )?,
            kernel_writes: r.counter("trama_kernel_writes_total", "Entries written to or deleted from the kernel")?,
            services: r
                .gauge("trama_service_ports", "ServicePorts in the programmed snapshot, one per port and family")?,
            refused: r.gauge("trama_service_ports_refused", "ServicePorts that the kernel has no room for")?,
            conflicts: r.gauge(
                "trama_frontend_conflicts",
                "Frontends not expressed because another ServicePort answers at their address",
            )?,
            rejected_endpoints: r.gauge(
                "trama_endpoint_addresses_rejected",
                "Endpoints ignored because their address may never be a target",
            )?,
            watch_errors: r.counter_vec(
                "trama_watch_errors_total",
                "Failed lists and watches",
                &["resource", "reason"],
            )?,
            events_dropped: r.counter("trama_events_dropped_total", "Events that were not written to the API")?,
            api_requests: r.counter_vec(
                "rest_client_requests_total",
                "Requests to the API server",
                &["code", "method", "host"],
            )?,
            api_request_duration: r.histogram_vec(
                "rest_client_request_duration_seconds",
                "Until the API server began its answer",
                REQUEST_BUCKETS.to_vec(),
                &["verb", "host"],
            )?,
        })
    }
}

/// Makes metrics and registers them.
struct Registrar<'r>(&'r Registry);

impl Registrar<'_> {
    fn add<C: prometheus::core::Collector + Clone + 'static>(&self, metric: C) -> Result<C, prometheus::Error> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.add(IntCounter::new(name, help)?)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.add(IntGauge::new(name, help)?)
    }

    fn float_gauge(&self, name: &str, help: &str) -> Result<Gauge, prometheus::Error> {
        self.add(Gauge::new(name, help)?)
    }

    fn counter_vec(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    fn gauge_vec(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, prometheus::Error> {
        self.add(GaugeVec::new(Opts::new(name, help), labels)?)
    }

    fn gauge_vec_int(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    fn histogram(&self, name: &str, help: &str, buckets: Vec<f64>) -> Result<Histogram, prometheus::Error> {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?)
    }

    fn histogram_vec(
        &self,
        name: &str,
        help: &str,
        buckets: Vec<f64>,
        labels: &[&str],
    ) -> Result<HistogramVec, prometheus::Error> {
        self.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), labels)?)
    }
}

/// Sets or observes one value for both families.
trait BothFamilies {
    fn observe_all(&self, _value: f64) {}
    fn set_all(&self, _value: f64) {}
}

impl BothFamilies for HistogramVec {
    fn observe_all(&self, value: f64) {
        for family in FAMILIES {
            self.with_label_values(&[family]).observe(value);
        }
    }
}

impl BothFamilies for GaugeVec {
    fn set_all(&self, value: f64) {
        for family in FAMILIES {
            self.with_label_values(&[family]).set(value);
        }
    }
}

/// kube-proxy's: quarters, then every second to a minute, every 5 to two, every 30 to five.
fn network_programming_buckets() -> Vec<f64> {
    let seconds = (1..60).map(f64::from);
    let fives = (0..12).map(|i| 60.0 + 5.0 * f64::from(i));
    let halves = (0..7).map(|i| 120.0 + 30.0 * f64::from(i));
    [0.25, 0.5].into_iter().chain(seconds).chain(fives).chain(halves).collect()
}

/// Fine around the 20 ms that a change may take.
fn event_buckets() -> Vec<f64> {
    let milliseconds = [0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0, 250.0, 500.0];
    milliseconds.iter().map(|ms| ms / 1000.0).chain([1.0, 2.5, 5.0, 10.0, 30.0]).collect()
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_what_was_observed() {
        let metrics = Metrics::new().unwrap();
        metrics.service_change();
        metrics.probe(false, 503);
        metrics.model(NoLocalEndpoints { internal: [1, 0], external: [0, 2] }, 3, 4);
        metrics.sync_done(SyncDone {
            duration: Duration::from_millis(5),
            full: true,
            kernel_writes: 7,
            refused: 1,
            services: 9,
            version: 2,
        });
        let label = |key: &str, value: &str| (key.to_string(), value.to_string());
        let counters = vec![
            ("trama_drops_total".to_string(), vec![label("reason", "a\"b")], 5),
            ("trama_flows".to_string(), Vec::new(), 6),
        ];
        let text = metrics.render(&counters).unwrap();
        for line in [
            "kubeproxy_sync_proxy_rules_service_changes_total 1",
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv6\",traffic_policy=\"external\"} 2",
            "kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 1",
            "trama_kernel_writes_total 7",
            "trama_frontend_conflicts 3",
            "trama_endpoint_addresses_rejected 4",
            "trama_snapshot_version 2",
            "# TYPE trama_drops_total counter",
            "trama_drops_total{reason=\"a\\\"b\"} 5",
            "trama_flows 6",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
        assert!(text.contains("process_resident_memory_bytes ") && text.contains("process_cpu_seconds_total "));
    }

    #[test]
    fn network_programming_has_kube_proxys_buckets() {
        let buckets = network_programming_buckets();
        assert_eq!(buckets.len(), 80);
        assert_eq!((buckets[2], buckets[60], buckets[61], buckets[73], buckets[79]), (1.0, 59.0, 60.0, 120.0, 300.0));
    }
}
