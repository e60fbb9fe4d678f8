//! `kubeproxy.config.k8s.io/v1alpha1`, kind KubeProxyConfiguration: every field that kube-proxy 1.36 knows.
//!
//! Source of names and meanings: `k8s.io/kube-proxy/config/v1alpha1/types.go`. `null` is the same as absent everywhere.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::duration::GoDuration;

/// `apiVersion` of the document.
pub const KUBE_PROXY_API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
/// `kind` of the document.
pub const KUBE_PROXY_KIND: &str = "KubeProxyConfiguration";

/// kube-proxy's configuration. Everything is optional; [`Self::set_defaults`] says what absent means.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct KubeProxyConfiguration {
    /// [`KUBE_PROXY_KIND`].
    pub kind: Option<String>,
    /// [`KUBE_PROXY_API_VERSION`].
    pub api_version: Option<String>,
    /// Gates of kube-proxy; none means anything here.
    pub feature_gates: Option<BTreeMap<String, bool>>,
    /// How to reach the API server.
    #[serde(deserialize_with = "or_default")]
    pub client_connection: ClientConnection,
    /// How to log.
    #[serde(deserialize_with = "or_default")]
    pub logging: Logging,
    /// Name of the Node; default the host name.
    pub hostname_override: Option<String>,
    /// The node's primary address, in place of what its Node says; nothing listens on it.
    pub bind_address: Option<String>,
    /// Where `/healthz` and `/livez` answer; default `0.0.0.0:10256`.
    pub healthz_bind_address: Option<String>,
    /// Where `/metrics` answers; default `127.0.0.1:10249`.
    pub metrics_bind_address: Option<String>,
    /// Whether a port that is taken ends the process; default false: it is tried again.
    pub bind_address_hard_fail: Option<bool>,
    /// Go's profiler; there is none here.
    pub enable_profiling: Option<bool>,
    /// Means nothing here: no metric is hidden.
    pub show_hidden_metrics_for_version: Option<String>,
    /// Data plane: empty or `auto`, `ebpf`, `nftables`, `iptables`, `ipvs`. The first two and `ebpf` are not known to kube-proxy.
    pub mode: Option<String>,
    /// Mode iptables.
    #[serde(deserialize_with = "or_default")]
    pub iptables: IptablesSection,
    /// Mode ipvs.
    #[serde(deserialize_with = "or_default")]
    pub ipvs: IpvsSection,
    /// Mode nftables.
    #[serde(deserialize_with = "or_default")]
    pub nftables: NftablesSection,
    /// Windows; means nothing here.
    #[serde(deserialize_with = "or_default")]
    pub winkernel: WinkernelSection,
    /// How pods are told from others: `ClusterCIDR`, the default, `NodeCIDR`, `BridgeInterface` or `InterfaceNamePrefix`.
    pub detect_local_mode: Option<String>,
    /// Names for the last two of them.
    #[serde(deserialize_with = "or_default")]
    pub detect_local: DetectLocal,
    /// Networks of all pods, separated by commas.
    #[serde(rename = "clusterCIDR")]
    pub cluster_cidr: Option<String>,
    /// Where NodePorts answer: networks, or `primary` alone; default all addresses, in mode nftables `primary`.
    pub node_port_addresses: Option<Vec<String>>,
    /// `oom_score_adj` of this process, -1000 to 1000; default -999.
    pub oom_score_adj: Option<i32>,
    /// The node's connection tracking.
    #[serde(deserialize_with = "or_default")]
    pub conntrack: ConntrackSection,
    /// Means nothing here: watches are not resynchronised by time.
    pub config_sync_period: Option<GoDuration>,
    /// Means nothing, to kube-proxy either.
    pub port_range: Option<String>,
    /// Windows; means nothing here.
    pub windows_run_as_service: Option<bool>,
}

/// How to reach the API server (`k8s.io/component-base/config`).
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ClientConnection {
    /// Kubeconfig file; default the service account of the pod, else the usual search.
    pub kubeconfig: Option<PathBuf>,
    /// Means nothing here: JSON is spoken.
    pub accept_content_types: Option<String>,
    /// Means nothing here: JSON is spoken.
    pub content_type: Option<String>,
    /// Requests a second, on the average; default 5, below zero without bound.
    pub qps: Option<f32>,
    /// Requests at once; default 10.
    pub burst: Option<i32>,
}

/// How to log (`k8s.io/component-base/logs/api/v1`).
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Logging {
    /// `text`, the default, or `json`.
    pub format: Option<String>,
    /// Means nothing here: every line is written at once. Nanoseconds, or a duration.
    pub flush_frequency: Option<Value>,
    /// 4 and more logs every sync, 6 and more everything; default 0.
    pub verbosity: Option<u32>,
    /// Means nothing here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmodule: Option<Vec<VmoduleItem>>,
    /// Means nothing here.
    #[serde(deserialize_with = "or_default")]
    pub options: LoggingOptions,
}

/// Verbosity of one file of kube-proxy's source.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct VmoduleItem {
    /// Name of the file.
    pub file_pattern: String,
    /// Its verbosity.
    pub verbosity: u32,
}

/// Options of the two formats.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LoggingOptions {
    /// Of text.
    #[serde(deserialize_with = "or_default")]
    pub text: OutputRouting,
    /// Of JSON.
    #[serde(deserialize_with = "or_default")]
    pub json: OutputRouting,
}

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct OutputRouting {
    /// Information to one stream, errors to the other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split_stream: Option<bool>,
    /// Quantity of bytes: a number or a text.
    pub info_buffer_size: Option<Value>,
}

/// Mode iptables.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct IptablesSection {
    /// Bit of the packet mark that asks for masquerading, 0 to 31; default 14.
    pub masquerade_bit: Option<i32>,
    /// Masquerade all ClusterIP traffic, in every mode but nftables; default false.
    pub masquerade_all: Option<bool>,
    /// Whether NodePorts answer on 127.0.0.1; default true. Modes iptables and ebpf.
    pub localhost_node_ports: Option<bool>,
    /// See [`SyncPeriods`](super::SyncPeriods); of every mode but ipvs and nftables.
    pub sync_period: Option<GoDuration>,
    /// See [`SyncPeriods`](super::SyncPeriods); of every mode but ipvs and nftables.
    pub min_sync_period: Option<GoDuration>,
}

/// Mode ipvs.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct IpvsSection {
    /// See [`SyncPeriods`](super::SyncPeriods).
    pub sync_period: Option<GoDuration>,
    /// See [`SyncPeriods`](super::SyncPeriods).
    pub min_sync_period: Option<GoDuration>,
    /// Scheduler of the kernel; default `rr`.
    pub scheduler: Option<String>,
    /// Virtual servers inside these networks are never removed.
    #[serde(rename = "excludeCIDRs")]
    pub exclude_cidrs: Option<Vec<String>>,
    /// Whether interfaces answer ARP only for their own addresses.
    #[serde(rename = "strictARP")]
    pub strict_arp: Option<bool>,
    /// Idle TCP connections; zero leaves the kernel's.
    pub tcp_timeout: Option<GoDuration>,
    /// TCP connections after a FIN; zero leaves the kernel's.
    pub tcp_fin_timeout: Option<GoDuration>,
    /// UDP; zero leaves the kernel's.
    pub udp_timeout: Option<GoDuration>,
}

/// Mode nftables.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NftablesSection {
    /// Bit of the packet mark that asks for masquerading, 0 to 31; default 14.
    pub masquerade_bit: Option<i32>,
    /// Masquerade all ClusterIP traffic; default false.
    pub masquerade_all: Option<bool>,
    /// See [`SyncPeriods`](super::SyncPeriods).
    pub sync_period: Option<GoDuration>,
    /// See [`SyncPeriods`](super::SyncPeriods).
    pub min_sync_period: Option<GoDuration>,
}

/// Windows; means nothing here.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WinkernelSection {
    /// Name of the network.
    pub network_name: Option<String>,
    /// Source address.
    pub source_vip: Option<String>,
    /// Direct server return.
    #[serde(rename = "enableDSR")]
    pub enable_dsr: Option<bool>,
    /// Name of an endpoint.
    pub root_hns_endpoint_name: Option<String>,
    /// Health check addresses.
    pub forward_health_check_vip: Option<bool>,
}

/// Interfaces of pods.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct DetectLocal {
    /// Mode BridgeInterface: the bridge.
    pub bridge_interface: Option<String>,
    /// Mode InterfaceNamePrefix: what the names of pods' interfaces begin with.
    pub interface_name_prefix: Option<String>,
}

/// The node's connection tracking.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ConntrackSection {
    /// Entries per CPU; default 32768, 0 leaves the kernel's limit.
    pub max_per_core: Option<i32>,
    /// At least so many entries; default 131072.
    pub min: Option<i32>,
    /// Idle TCP connections; default 24h, zero leaves the kernel's.
    pub tcp_established_timeout: Option<GoDuration>,
    /// TCP connections in CLOSE_WAIT; default 1h, zero leaves the kernel's.
    pub tcp_close_wait_timeout: Option<GoDuration>,
    /// Whether packets outside of the window count as valid; false leaves the kernel's.
    pub tcp_be_liberal: Option<bool>,
    /// UDP without an answer; zero leaves the kernel's.
    pub udp_timeout: Option<GoDuration>,
    /// UDP with answers; zero leaves the kernel's.
    pub udp_stream_timeout: Option<GoDuration>,
}

/// `null` for a section is the same as no section.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl KubeProxyConfiguration {
    /// Gives every absent field its default, as kube-proxy 1.36 does (`pkg/proxy/apis/config/v1alpha1/defaults.go`). Where Go
    /// cannot tell an empty value from an absent one, an empty value is absent.
    pub fn set_defaults(&mut self) {
        self.api_version = Some(KUBE_PROXY_API_VERSION.to_owned());
        self.kind = Some(KUBE_PROXY_KIND.to_owned());
        fill_text(&mut self.bind_address, "0.0.0.0");
        let wide = self.bind_address.as_deref().is_none_or(|address| !address.contains(':'));
        let (healthz, metrics) = if wide { ("0.0.0.0", "127.0.0.1") } else { ("[::]", "[::1]") };
        fill_text(&mut self.healthz_bind_address, &format!("{healthz}:10256"));
        fill_text(&mut self.metrics_bind_address, &format!("{metrics}:10249"));
        self.oom_score_adj.get_or_insert(-999);
        fill_duration(&mut self.config_sync_period, 15 * 60);
        self.feature_gates.get_or_insert_default();
        for text in [
            &mut self.hostname_override,
            &mut self.show_hidden_metrics_for_version,
            &mut self.mode,
            &mut self.cluster_cidr,
            &mut self.port_range,
            &mut self.detect_local.bridge_interface,
            &mut self.detect_local.interface_name_prefix,
        ] {
            text.get_or_insert_default();
        }
        fill_text(&mut self.detect_local_mode, "ClusterCIDR");
        self.bind_address_hard_fail.get_or_insert_default();
        self.enable_profiling.get_or_insert_default();
        self.node_port_addresses.get_or_insert_default();
        self.client_connection.set_defaults();
        self.logging.set_defaults();
        self.set_section_defaults();
    }

    fn set_section_defaults(&mut self) {
        let iptables = &mut self.iptables;
        iptables.masquerade_bit.get_or_insert(14);
        iptables.masquerade_all.get_or_insert_default();
        iptables.localhost_node_ports.get_or_insert(true);
        fill_duration(&mut iptables.sync_period, 30);
        fill_duration(&mut iptables.min_sync_period, 1);
        let nftables = &mut self.nftables;
        nftables.masquerade_bit.get_or_insert(14);
        nftables.masquerade_all.get_or_insert_default();
        fill_duration(&mut nftables.sync_period, 30);
        fill_duration(&mut nftables.min_sync_period, 1);
        let ipvs = &mut self.ipvs;
        fill_duration(&mut ipvs.sync_period, 30);
        fill_text(&mut ipvs.scheduler, "rr");
        ipvs.exclude_cidrs.get_or_insert_default();
        ipvs.strict_arp.get_or_insert_default();
        for timeout in
            [&mut ipvs.min_sync_period, &mut ipvs.tcp_timeout, &mut ipvs.tcp_fin_timeout, &mut ipvs.udp_timeout]
        {
            timeout.get_or_insert_default();
        }
        let conntrack = &mut self.conntrack;
        conntrack.max_per_core.get_or_insert(32 * 1024);
        conntrack.min.get_or_insert(128 * 1024);
        conntrack.tcp_established_timeout.get_or_insert(GoDuration::from_secs(24 * 3600));
        conntrack.tcp_close_wait_timeout.get_or_insert(GoDuration::from_secs(3600));
        conntrack.tcp_be_liberal.get_or_insert_default();
        conntrack.udp_timeout.get_or_insert_default();
        conntrack.udp_stream_timeout.get_or_insert_default();
        let winkernel = &mut self.winkernel;
        winkernel.enable_dsr.get_or_insert_default();
        winkernel.forward_health_check_vip.get_or_insert_default();
        for text in [&mut winkernel.network_name, &mut winkernel.source_vip, &mut winkernel.root_hns_endpoint_name] {
            text.get_or_insert_default();
        }
    }
}

impl ClientConnection {
    fn set_defaults(&mut self) {
        self.kubeconfig.get_or_insert_default();
        self.accept_content_types.get_or_insert_default();
        fill_text(&mut self.content_type, "application/json");
        if self.qps.unwrap_or_default() == 0.0 {
            self.qps = Some(5.0);
        }
        if self.burst.unwrap_or_default() == 0 {
            self.burst = Some(10);
        }
    }
}

impl Logging {
    fn set_defaults(&mut self) {
        fill_text(&mut self.format, "text");
        self.verbosity.get_or_insert_default();
        self.flush_frequency.get_or_insert_with(|| Value::from("5s"));
        for routing in [&mut self.options.text, &mut self.options.json] {
            routing.info_buffer_size.get_or_insert_with(|| Value::from("0"));
        }
    }
}

fn fill_text(field: &mut Option<String>, default: &str) {
    if field.as_deref().unwrap_or_default().is_empty() {
        *field = Some(default.to_owned());
    }
}

fn fill_duration(field: &mut Option<GoDuration>, default_seconds: u64) {
    if field.unwrap_or_default().is_zero() {
        *field = Some(GoDuration::from_secs(default_seconds));
    }
}
