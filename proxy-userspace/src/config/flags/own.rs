//! Flags that count beside a file: how to log, and what only we have.

use std::path::PathBuf;

use clap::Args;

use super::values::{go_bool, set, without_empty};
use crate::config::{Logging, ProxyConfiguration, VmoduleItem};

/// How to log. kube-proxy has more of these; all of them are understood.
#[derive(Debug, Clone, Default, Args)]
pub struct LogFlags {
    /// How much to log, from 0: 4 and more logs every sync, 6 and more everything; RUST_LOG goes before; overrides the file
    #[arg(short = 'v', long = "v", value_name = "N", help_heading = "Logging")]
    pub verbosity: Option<u32>,
    /// text or json; overrides the file [default: text]
    #[arg(long, value_name = "FORMAT", help_heading = "Logging")]
    pub logging_format: Option<String>,
    /// Without effect
    #[arg(long, value_name = "DURATION", hide = true)]
    pub log_flush_frequency: Option<String>,
    /// Without effect
    #[arg(long, value_name = "PATTERNS", hide = true)]
    pub vmodule: Option<String>,
    /// Without effect
    #[arg(long, value_parser = go_bool, num_args = 0..=1, default_missing_value = "true", require_equals = true, hide = true)]
    pub log_text_split_stream: Option<bool>,
    /// Without effect
    #[arg(long, hide = true)]
    pub log_text_info_buffer_size: Option<String>,
    /// Without effect
    #[arg(long, value_parser = go_bool, num_args = 0..=1, default_missing_value = "true", require_equals = true, hide = true)]
    pub log_json_split_stream: Option<bool>,
    /// Without effect
    #[arg(long, hide = true)]
    pub log_json_info_buffer_size: Option<String>,
}

impl LogFlags {
    pub(super) fn apply(&self, logging: &mut Logging) {
        let given = &mut Vec::new();
        set(&mut logging.verbosity, &self.verbosity, "v", given);
        set(&mut logging.format, &self.logging_format, "logging-format", given);
        let flush = self.log_flush_frequency.clone().map(Into::into);
        set(&mut logging.flush_frequency, &flush, "log-flush-frequency", given);
        let item = |pattern: &String| vec![VmoduleItem { file_pattern: pattern.clone(), verbosity: 0 }];
        set(&mut logging.vmodule, &self.vmodule.as_ref().map(item), "vmodule", given);
        let (text, json) = (&mut logging.options.text, &mut logging.options.json);
        set(&mut text.split_stream, &self.log_text_split_stream, "log-text-split-stream", given);
        set(&mut json.split_stream, &self.log_json_split_stream, "log-json-split-stream", given);
        let size = self.log_text_info_buffer_size.clone().map(Into::into);
        set(&mut text.info_buffer_size, &size, "log-text-info-buffer-size", given);
        let size = self.log_json_info_buffer_size.clone().map(Into::into);
        set(&mut json.info_buffer_size, &size, "log-json-info-buffer-size", given);
    }
}

/// What only we have; each overrides the file.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Not in kube-proxy (override the file)")]
pub struct OwnFlags {
    /// cgroup v2 directory whose sockets are load-balanced [default: where cgroup2 is mounted]
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
    /// Mount point of the BPF file system [default: /sys/fs/bpf]
    #[arg(long, value_name = "PATH")]
    pub bpffs: Option<PathBuf>,
    /// Interfaces that carry packet programs, separated by commas, "*" at the end for a prefix; lo always does [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub interfaces: Option<Vec<String>>,
    /// How packet programs are attached: auto, tcx or clsact [default: auto]
    #[arg(long, value_name = "HOW")]
    pub attach_mode: Option<String>,
    /// Interfaces to other machines that carry the XDP program, separated by commas, "*" at the end for a prefix [default: none]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub xdp_interfaces: Option<Vec<String>>,
    /// Where the XDP program runs: native (in the driver) or generic [default: native]
    #[arg(long, value_name = "MODE")]
    pub xdp_mode: Option<String>,
    /// How clients outside reach endpoints on other nodes where a Service does not say: snat, dsr or hybrid (TCP dsr, rest snat) [default: snat]
    #[arg(long, value_name = "HOW")]
    pub forwarding: Option<String>,
    /// How packets get to the other node with dsr: ipip, or gue (UDP port 6080) [default: ipip]
    #[arg(long, value_name = "HOW")]
    pub dsr_tunnel: Option<String>,
    /// Interfaces where other nodes' tunnels end, separated by commas, "*" at the end for a prefix [default: that of the node's address, and of default routes]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub dsr_interfaces: Option<Vec<String>>,
    /// ServicePorts that the kernel has room for at first; grows by itself [default: 65536]
    #[arg(long, value_name = "N")]
    pub max_services: Option<u32>,
    /// Endpoints of one family that the kernel has room for at first; grows by itself [default: 262144]
    #[arg(long, value_name = "N")]
    pub max_endpoints: Option<u32>,
    /// Flows of one family that the kernel remembers [default: 262144]
    #[arg(long, value_name = "N")]
    pub max_flows: Option<u32>,
    /// Mode iptables: which kind of iptables, auto, nft or legacy [default: auto]
    #[arg(long, value_name = "KIND")]
    pub iptables_binary: Option<String>,
}

impl OwnFlags {
    pub(super) fn apply(&self, config: &mut ProxyConfiguration) {
        let (given, options) = (&mut Vec::new(), &mut config.ebpf);
        set(&mut config.iptables.binary, &self.iptables_binary, "iptables-binary", given);
        set(&mut options.cgroup, &self.cgroup, "cgroup", given);
        set(&mut options.bpffs, &self.bpffs, "bpffs", given);
        set(&mut options.interfaces, &without_empty(&self.interfaces), "interfaces", given);
        set(&mut options.attach_mode, &self.attach_mode, "attach-mode", given);
        set(&mut options.xdp.interfaces, &without_empty(&self.xdp_interfaces), "xdp-interfaces", given);
        set(&mut options.xdp.mode, &self.xdp_mode, "xdp-mode", given);
        let direct = &mut options.direct_return;
        set(&mut direct.forwarding, &self.forwarding, "forwarding", given);
        set(&mut direct.tunnel, &self.dsr_tunnel, "dsr-tunnel", given);
        set(&mut direct.interfaces, &without_empty(&self.dsr_interfaces), "dsr-interfaces", given);
        set(&mut options.map_sizes.services, &self.max_services, "max-services", given);
        set(&mut options.map_sizes.endpoints, &self.max_endpoints, "max-endpoints", given);
        set(&mut options.map_sizes.flows, &self.max_flows, "max-flows", given);
    }
}
