//! The command line.

use std::path::PathBuf;

use clap::Parser;

use super::file::ProxyConfiguration;

/// The node's Service proxy: watches Services and EndpointSlices and programs the kernel.
///
/// Flags override the configuration file.
#[derive(Debug, Clone, Default, Parser)]
#[command(name = "trama-proxy", version)]
pub struct Flags {
    /// Configuration file (apiVersion trama.dev/v1alpha1, kind ProxyConfiguration)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Kubeconfig file; without it KUBECONFIG, ~/.kube/config and the in-cluster configuration are tried
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Name of this node's Node object [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub hostname_override: Option<String>,
    /// Networks of all pods, separated by commas
    #[arg(long, value_name = "CIDRS")]
    pub cluster_cidr: Option<String>,
    /// Masquerade all ClusterIP traffic
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub masquerade_all: Option<bool>,
    /// Where NodePorts answer: networks separated by commas, or "primary" [default: all addresses]
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    pub nodeport_addresses: Option<Vec<String>>,
    /// Where /healthz and /livez answer; empty is nowhere [default: 0.0.0.0:10256]
    #[arg(long, value_name = "ADDRESS")]
    pub healthz_bind_address: Option<String>,
    /// Where /metrics answers; empty is nowhere [default: 127.0.0.1:10249]
    #[arg(long, value_name = "ADDRESS")]
    pub metrics_bind_address: Option<String>,
    /// Data plane: ebpf
    #[arg(long, value_name = "MODE")]
    pub proxy_mode: Option<String>,
    /// cgroup v2 directory whose sockets are load-balanced [default: where cgroup2 is mounted]
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
    /// Mount point of the BPF file system [default: /sys/fs/bpf]
    #[arg(long, value_name = "PATH")]
    pub bpffs: Option<PathBuf>,
    /// Interfaces that carry packet programs, separated by commas, "*" at the end for a prefix [default: all but loopback]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub interfaces: Option<Vec<String>>,
    /// How packet programs are attached: auto, tcx or clsact [default: auto]
    #[arg(long, value_name = "HOW")]
    pub attach_mode: Option<String>,
    /// ServicePorts that the kernel has room for [default: 65536]
    #[arg(long, value_name = "N")]
    pub max_services: Option<u32>,
    /// Endpoints of one family that the kernel has room for [default: 262144]
    #[arg(long, value_name = "N")]
    pub max_endpoints: Option<u32>,
    /// Flows of one family that the kernel remembers [default: 262144]
    #[arg(long, value_name = "N")]
    pub max_flows: Option<u32>,
    /// Mode iptables: which kind of iptables, auto, nft or legacy [default: auto]
    #[arg(long, value_name = "KIND")]
    pub iptables_binary: Option<String>,
    /// Remove everything that trama-proxy has put into this node's kernel, and exit
    #[arg(long)]
    pub cleanup: bool,
}

impl Flags {
    /// Puts every flag that was given over what the file says.
    pub(super) fn apply(&self, config: &mut ProxyConfiguration) {
        set(&mut config.client_connection.kubeconfig, &self.kubeconfig);
        set(&mut config.hostname_override, &self.hostname_override);
        set(&mut config.cluster_cidr, &self.cluster_cidr);
        set(&mut config.masquerade_all, &self.masquerade_all);
        set(&mut config.node_port_addresses, &without_empty(&self.nodeport_addresses));
        set(&mut config.healthz_bind_address, &self.healthz_bind_address);
        set(&mut config.metrics_bind_address, &self.metrics_bind_address);
        set(&mut config.mode, &self.proxy_mode);
        set(&mut config.ebpf.cgroup, &self.cgroup);
        set(&mut config.ebpf.bpffs, &self.bpffs);
        set(&mut config.ebpf.interfaces, &without_empty(&self.interfaces));
        set(&mut config.ebpf.attach_mode, &self.attach_mode);
        set(&mut config.ebpf.map_sizes.services, &self.max_services);
        set(&mut config.ebpf.map_sizes.endpoints, &self.max_endpoints);
        set(&mut config.ebpf.map_sizes.flows, &self.max_flows);
        set(&mut config.iptables.binary, &self.iptables_binary);
    }
}

fn set<T: Clone>(field: &mut Option<T>, flag: &Option<T>) {
    if flag.is_some() {
        field.clone_from(flag);
    }
}

/// `--interfaces ""` is an empty list.
fn without_empty(list: &Option<Vec<String>>) -> Option<Vec<String>> {
    list.as_ref().map(|list| list.iter().filter(|entry| !entry.is_empty()).cloned().collect())
}
