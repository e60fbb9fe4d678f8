//! Fields that kube-proxy knows and that mean nothing here: who sets one is told so, once, at the start.

use std::path::Path;

use serde_json::Value;

use super::{GoDuration, KubeProxyConfiguration};

/// The fields that were set to something, by name, each with the reason why it is without effect. To be asked before defaults
/// are filled in.
pub(super) fn ignored(config: &KubeProxyConfiguration) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut note = |set: bool, field: &str, reason: &str| {
        if set {
            found.push(format!("{field} has no effect: {reason}"));
        }
    };
    let (client, logging, windows) = (&config.client_connection, &config.logging, &config.winkernel);
    let json = "this proxy speaks JSON with the API server";
    note(has_text(&client.accept_content_types), "clientConnection.acceptContentTypes", json);
    let content_type = client.content_type.as_deref().unwrap_or_default();
    note(!matches!(content_type, "" | "application/json"), "clientConnection.contentType", json);
    let gates = config.feature_gates.as_ref();
    let gates = gates.into_iter().flat_map(|gates| gates.keys().map(String::as_str)).collect::<Vec<_>>().join(", ");
    note(!gates.is_empty(), "featureGates", &format!("there are no gates here ({gates})"));
    let default_period = GoDuration::from_secs(15 * 60);
    let period = config.config_sync_period.filter(|period| !period.is_zero() && *period != default_period);
    note(period.is_some(), "configSyncPeriod", "watches are never resynchronised by time");
    note(
        config.enable_profiling == Some(true),
        "enableProfiling",
        "there is no Go profiler; /debug/pprof is not served",
    );
    note(has_text(&config.show_hidden_metrics_for_version), "showHiddenMetricsForVersion", "no metric is hidden");
    note(has_text(&config.port_range), "portRange", "kube-proxy ignores it too");
    let window = "this proxy runs on Linux";
    note(config.windows_run_as_service == Some(true), "windowsRunAsService", window);
    note(has_text(&windows.network_name), "winkernel.networkName", window);
    note(has_text(&windows.source_vip), "winkernel.sourceVip", window);
    note(windows.enable_dsr == Some(true), "winkernel.enableDSR", window);
    note(has_text(&windows.root_hns_endpoint_name), "winkernel.rootHnsEndpointName", window);
    note(windows.forward_health_check_vip == Some(true), "winkernel.forwardHealthCheckVip", window);
    let flush = logging.flush_frequency.as_ref();
    note(
        flush.is_some_and(|value| !is_default_flush(value)),
        "logging.flushFrequency",
        "every line is written at once",
    );
    note(
        logging.vmodule.as_ref().is_some_and(|list| !list.is_empty()),
        "logging.vmodule",
        "there are no such files here",
    );
    for (routing, name) in [(&logging.options.text, "text"), (&logging.options.json, "json")] {
        let one = "everything goes to standard error at once";
        note(routing.split_stream == Some(true), &format!("logging.options.{name}.splitStream"), one);
        let buffered = routing.info_buffer_size.as_ref().is_some_and(|size| !is_zero(size));
        note(buffered, &format!("logging.options.{name}.infoBufferSize"), one);
    }
    found
}

/// Whether any text is there.
fn has_text(field: &Option<impl AsRef<Path>>) -> bool {
    field.as_ref().is_some_and(|text| !text.as_ref().as_os_str().is_empty())
}

/// Zero or kube-proxy's default of 5 s, as a number of nanoseconds or a duration.
fn is_default_flush(value: &Value) -> bool {
    let duration = value.as_str().and_then(|text| text.parse::<GoDuration>().ok());
    is_zero(value) || value.as_u64() == Some(5_000_000_000) || duration == Some(GoDuration::from_secs(5))
}

fn is_zero(value: &Value) -> bool {
    value.as_u64() == Some(0) || matches!(value.as_str(), Some("" | "0" | "0s"))
}
