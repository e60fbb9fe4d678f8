//! kube-proxy's flags that count only without a file (`cmd/kube-proxy/app/options.go` of 1.36).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::Args;

use super::values::{gates, go_bool, set, without_empty};
use crate::config::{GoDuration, KubeProxyConfiguration};

/// kube-proxy's flags that are ignored where a file is named.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "As kube-proxy (ignored with --config)")]
pub struct KubeProxyFlags {
    /// Without effect
    #[arg(long, value_name = "GATES", value_parser = gates, hide = true)]
    pub feature_gates: Option<BTreeMap<String, bool>>,
    /// Kubeconfig file [default: the pod's service account, then KUBECONFIG and ~/.kube/config]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<String>,
    /// Without effect: JSON is spoken
    #[arg(long, value_name = "TYPE", hide = true)]
    pub kube_api_content_type: Option<String>,
    /// Requests to the API server at once [default: 10]
    #[arg(long, value_name = "N")]
    pub kube_api_burst: Option<i32>,
    /// Requests to the API server a second [default: 5]
    #[arg(long, value_name = "N")]
    pub kube_api_qps: Option<f32>,
    /// The node's primary address, in place of what its Node says; nothing listens on it
    #[arg(long, value_name = "ADDRESS")]
    pub bind_address: Option<String>,
    /// Where /healthz and /livez answer; empty is nowhere [default: 0.0.0.0:10256]
    #[arg(long, value_name = "ADDRESS")]
    pub healthz_bind_address: Option<String>,
    /// Deprecated by kube-proxy: see --healthz-bind-address
    #[arg(long, value_name = "PORT", hide = true)]
    pub healthz_port: Option<u16>,
    /// Where /metrics answers; empty is nowhere [default: 127.0.0.1:10249]
    #[arg(long, value_name = "ADDRESS")]
    pub metrics_bind_address: Option<String>,
    /// Deprecated by kube-proxy: see --metrics-bind-address
    #[arg(long, value_name = "PORT", hide = true)]
    pub metrics_port: Option<u16>,
    /// End with an error when a port is taken, instead of trying again
    #[arg(long, value_name = "BOOL", value_parser = go_bool, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub bind_address_hard_fail: Option<bool>,
    /// Without effect: there is no Go profiler
    #[arg(long, value_name = "BOOL", value_parser = go_bool, num_args = 0..=1, default_missing_value = "true", require_equals = true, hide = true)]
    pub profiling: Option<bool>,
    /// Without effect: no metric is hidden
    #[arg(long, value_name = "VERSION", hide = true)]
    pub show_hidden_metrics_for_version: Option<String>,
    /// Data plane: auto, ebpf, nftables, iptables or ipvs [default: auto]
    #[arg(long, value_name = "MODE")]
    pub proxy_mode: Option<String>,
    /// Mode iptables: bit of the packet mark that asks for masquerading [default: 14]
    #[arg(long, value_name = "BIT")]
    pub iptables_masquerade_bit: Option<i32>,
    /// Masquerade all ClusterIP traffic
    #[arg(long, value_name = "BOOL", value_parser = go_bool, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub masquerade_all: Option<bool>,
    /// Whether NodePorts answer on 127.0.0.1, in the modes that can [default: true]
    #[arg(long, value_name = "BOOL", value_parser = go_bool, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub iptables_localhost_nodeports: Option<bool>,
    /// How long a change may wait; modes but ipvs [default: 30s]
    #[arg(long, value_name = "DURATION")]
    pub iptables_sync_period: Option<GoDuration>,
    /// Least pause between syncs; modes but ipvs [default: as short as the last sync]
    #[arg(long, value_name = "DURATION")]
    pub iptables_min_sync_period: Option<GoDuration>,
    /// How long a change may wait; mode ipvs [default: 30s]
    #[arg(long, value_name = "DURATION")]
    pub ipvs_sync_period: Option<GoDuration>,
    /// Least pause between syncs; mode ipvs
    #[arg(long, value_name = "DURATION")]
    pub ipvs_min_sync_period: Option<GoDuration>,
    /// Mode ipvs: scheduler of the kernel [default: rr]
    #[arg(long, value_name = "NAME")]
    pub ipvs_scheduler: Option<String>,
    /// Mode ipvs: virtual servers in these networks are never removed
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    pub ipvs_exclude_cidrs: Option<Vec<String>>,
    /// Mode ipvs: interfaces answer ARP only for their own addresses
    #[arg(long, value_name = "BOOL", value_parser = go_bool, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub ipvs_strict_arp: Option<bool>,
    /// Mode ipvs: idle TCP connections, 0 leaves the kernel's
    #[arg(long, value_name = "DURATION")]
    pub ipvs_tcp_timeout: Option<GoDuration>,
    /// Mode ipvs: TCP connections after a FIN, 0 leaves the kernel's
    #[arg(long, value_name = "DURATION")]
    pub ipvs_tcpfin_timeout: Option<GoDuration>,
    /// Mode ipvs: UDP, 0 leaves the kernel's
    #[arg(long, value_name = "DURATION")]
    pub ipvs_udp_timeout: Option<GoDuration>,
    /// How pods are told from others: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix [default: ClusterCIDR]
    #[arg(long, value_name = "MODE")]
    pub detect_local_mode: Option<String>,
    /// Mode BridgeInterface: the bridge of pods
    #[arg(long, value_name = "NAME")]
    pub pod_bridge_interface: Option<String>,
    /// Mode InterfaceNamePrefix: what the names of pods' interfaces begin with
    #[arg(long, value_name = "PREFIX")]
    pub pod_interface_name_prefix: Option<String>,
    /// Networks of all pods, separated by commas
    #[arg(long, value_name = "CIDRS")]
    pub cluster_cidr: Option<String>,
    /// Where NodePorts answer: networks separated by commas, or "primary" [default: all addresses; mode nftables: primary]
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    pub nodeport_addresses: Option<Vec<String>>,
    /// oom_score_adj of this process, -1000 to 1000 [default: -999]
    #[arg(long, value_name = "N")]
    pub oom_score_adj: Option<i32>,
    /// Connection tracking entries per CPU, 0 leaves the kernel's limit [default: 32768]
    #[arg(long, value_name = "N")]
    pub conntrack_max_per_core: Option<i32>,
    /// Least number of connection tracking entries [default: 131072]
    #[arg(long, value_name = "N")]
    pub conntrack_min: Option<i32>,
    /// Idle TCP connections, 0 leaves the kernel's [default: 24h]
    #[arg(long, value_name = "DURATION")]
    pub conntrack_tcp_timeout_established: Option<GoDuration>,
    /// TCP connections in CLOSE_WAIT, 0 leaves the kernel's [default: 1h]
    #[arg(long, value_name = "DURATION")]
    pub conntrack_tcp_timeout_close_wait: Option<GoDuration>,
    /// Packets outside of a connection's window count as valid
    #[arg(long, value_name = "BOOL", value_parser = go_bool, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub conntrack_tcp_be_liberal: Option<bool>,
    /// UDP without an answer, 0 leaves the kernel's
    #[arg(long, value_name = "DURATION")]
    pub conntrack_udp_timeout: Option<GoDuration>,
    /// UDP with answers, 0 leaves the kernel's
    #[arg(long, value_name = "DURATION")]
    pub conntrack_udp_timeout_stream: Option<GoDuration>,
    /// Without effect: watches are not resynchronised by time
    #[arg(long, value_name = "DURATION", hide = true)]
    pub config_sync_period: Option<GoDuration>,
}

impl KubeProxyFlags {
    /// Puts every flag that was given into `config`; returns their names.
    pub(super) fn apply(&self, config: &mut KubeProxyConfiguration) -> Vec<&'static str> {
        let mut given = Vec::new();
        self.apply_process(config, &mut given);
        self.apply_addresses(config, &mut given);
        self.apply_modes(config, &mut given);
        self.apply_traffic(config, &mut given);
        self.apply_conntrack(config, &mut given);
        given
    }

    fn apply_process(&self, config: &mut KubeProxyConfiguration, given: &mut Vec<&'static str>) {
        set(&mut config.feature_gates, &self.feature_gates, "feature-gates", given);
        let kubeconfig = self.kubeconfig.as_ref().map(PathBuf::from);
        set(&mut config.client_connection.kubeconfig, &kubeconfig, "kubeconfig", given);
        set(&mut config.client_connection.content_type, &self.kube_api_content_type, "kube-api-content-type", given);
        set(&mut config.client_connection.burst, &self.kube_api_burst, "kube-api-burst", given);
        set(&mut config.client_connection.qps, &self.kube_api_qps, "kube-api-qps", given);
        set(&mut config.enable_profiling, &self.profiling, "profiling", given);
        set(
            &mut config.show_hidden_metrics_for_version,
            &self.show_hidden_metrics_for_version,
            "show-hidden-metrics-for-version",
            given,
        );
        set(&mut config.oom_score_adj, &self.oom_score_adj, "oom-score-adj", given);
        set(&mut config.config_sync_period, &self.config_sync_period, "config-sync-period", given);
    }

    fn apply_addresses(&self, config: &mut KubeProxyConfiguration, given: &mut Vec<&'static str>) {
        set(&mut config.bind_address, &self.bind_address, "bind-address", given);
        set(&mut config.healthz_bind_address, &self.healthz_bind_address, "healthz-bind-address", given);
        set(&mut config.metrics_bind_address, &self.metrics_bind_address, "metrics-bind-address", given);
        let address = self.healthz_port.map(|port| with_port(config.healthz_bind_address.as_deref(), port));
        set(&mut config.healthz_bind_address, &address, "healthz-port", given);
        let address = self.metrics_port.map(|port| with_port(config.metrics_bind_address.as_deref(), port));
        set(&mut config.metrics_bind_address, &address, "metrics-port", given);
        set(&mut config.bind_address_hard_fail, &self.bind_address_hard_fail, "bind-address-hard-fail", given);
    }

    fn apply_modes(&self, config: &mut KubeProxyConfiguration, given: &mut Vec<&'static str>) {
        set(&mut config.mode, &self.proxy_mode, "proxy-mode", given);
        set(&mut config.iptables.masquerade_bit, &self.iptables_masquerade_bit, "iptables-masquerade-bit", given);
        set(&mut config.iptables.masquerade_all, &self.masquerade_all, "masquerade-all", given);
        set(&mut config.nftables.masquerade_all, &self.masquerade_all, "masquerade-all", &mut Vec::new());
        set(
            &mut config.iptables.localhost_node_ports,
            &self.iptables_localhost_nodeports,
            "iptables-localhost-nodeports",
            given,
        );
        set(&mut config.iptables.sync_period, &self.iptables_sync_period, "iptables-sync-period", given);
        set(&mut config.nftables.sync_period, &self.iptables_sync_period, "iptables-sync-period", &mut Vec::new());
        set(&mut config.iptables.min_sync_period, &self.iptables_min_sync_period, "iptables-min-sync-period", given);
        set(
            &mut config.nftables.min_sync_period,
            &self.iptables_min_sync_period,
            "iptables-min-sync-period",
            &mut Vec::new(),
        );
        set(&mut config.ipvs.sync_period, &self.ipvs_sync_period, "ipvs-sync-period", given);
        set(&mut config.ipvs.min_sync_period, &self.ipvs_min_sync_period, "ipvs-min-sync-period", given);
        set(&mut config.ipvs.scheduler, &self.ipvs_scheduler, "ipvs-scheduler", given);
        set(&mut config.ipvs.exclude_cidrs, &without_empty(&self.ipvs_exclude_cidrs), "ipvs-exclude-cidrs", given);
        set(&mut config.ipvs.strict_arp, &self.ipvs_strict_arp, "ipvs-strict-arp", given);
        set(&mut config.ipvs.tcp_timeout, &self.ipvs_tcp_timeout, "ipvs-tcp-timeout", given);
        set(&mut config.ipvs.tcp_fin_timeout, &self.ipvs_tcpfin_timeout, "ipvs-tcpfin-timeout", given);
        set(&mut config.ipvs.udp_timeout, &self.ipvs_udp_timeout, "ipvs-udp-timeout", given);
    }

    fn apply_traffic(&self, config: &mut KubeProxyConfiguration, given: &mut Vec<&'static str>) {
        set(&mut config.detect_local_mode, &self.detect_local_mode, "detect-local-mode", given);
        set(&mut config.detect_local.bridge_interface, &self.pod_bridge_interface, "pod-bridge-interface", given);
        set(
            &mut config.detect_local.interface_name_prefix,
            &self.pod_interface_name_prefix,
            "pod-interface-name-prefix",
            given,
        );
        set(&mut config.cluster_cidr, &self.cluster_cidr, "cluster-cidr", given);
        set(&mut config.node_port_addresses, &without_empty(&self.nodeport_addresses), "nodeport-addresses", given);
    }

    fn apply_conntrack(&self, config: &mut KubeProxyConfiguration, given: &mut Vec<&'static str>) {
        set(&mut config.conntrack.max_per_core, &self.conntrack_max_per_core, "conntrack-max-per-core", given);
        set(&mut config.conntrack.min, &self.conntrack_min, "conntrack-min", given);
        set(
            &mut config.conntrack.tcp_established_timeout,
            &self.conntrack_tcp_timeout_established,
            "conntrack-tcp-timeout-established",
            given,
        );
        set(
            &mut config.conntrack.tcp_close_wait_timeout,
            &self.conntrack_tcp_timeout_close_wait,
            "conntrack-tcp-timeout-close-wait",
            given,
        );
        set(&mut config.conntrack.tcp_be_liberal, &self.conntrack_tcp_be_liberal, "conntrack-tcp-be-liberal", given);
        set(&mut config.conntrack.udp_timeout, &self.conntrack_udp_timeout, "conntrack-udp-timeout", given);
        set(
            &mut config.conntrack.udp_stream_timeout,
            &self.conntrack_udp_timeout_stream,
            "conntrack-udp-timeout-stream",
            given,
        );
    }
}

/// The deprecated flags for ports: 0 is nowhere, and an address that has a port keeps it.
fn with_port(address: Option<&str>, port: u16) -> String {
    let address = address.unwrap_or_default();
    match (port, address.parse::<IpAddr>()) {
        (0, _) => String::new(),
        (_, Ok(alone)) => SocketAddr::new(alone, port).to_string(),
        (_, Err(_)) => address.to_owned(),
    }
}
