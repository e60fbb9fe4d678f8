//! `trama.dev/v1alpha1`, kind ProxyConfiguration: what kube-proxy's configuration has no place for.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `apiVersion` of the document.
pub(super) const API_VERSION: &str = "trama.dev/v1alpha1";
/// `kind` of the document.
pub(super) const KIND: &str = "ProxyConfiguration";

/// `kind: ProxyConfiguration`. Everything is optional; absent means the default that the field names.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProxyConfiguration {
    /// `ProxyConfiguration`.
    pub kind: Option<String>,
    /// `trama.dev/v1alpha1`.
    pub api_version: Option<String>,
    /// The eBPF data plane.
    pub ebpf: EbpfOptions,
    /// The iptables data plane.
    pub iptables: IptablesOptions,
}

/// Options of the eBPF data plane.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EbpfOptions {
    /// cgroup v2 directory whose sockets are load-balanced; default where cgroup2 is mounted.
    pub cgroup: Option<PathBuf>,
    /// Mount point of the BPF file system; default `/sys/fs/bpf`.
    pub bpffs: Option<PathBuf>,
    /// Interfaces that carry packet programs, `*` at the end for a prefix; default all. `lo` always carries one, for what the node sends to itself.
    pub interfaces: Option<Vec<String>>,
    /// `auto`, the default, `tcx` or `clsact`.
    pub attach_mode: Option<String>,
    /// The XDP hook, for traffic from other machines to other machines.
    pub xdp: XdpOptions,
    /// Direct server return: answers go from the endpoint's node straight to the client.
    pub direct_return: DirectReturnOptions,
    /// Room in the kernel's maps.
    pub map_sizes: MapSizes,
}

/// Options of the XDP hook.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct XdpOptions {
    /// Interfaces to other machines that carry the XDP program, `*` at the end for a prefix; default none. Their drivers may take the link
    /// down for a moment when the first program comes.
    pub interfaces: Option<Vec<String>>,
    /// `native`, the default: in the driver, and not at all where that cannot; `generic`: behind it, on any interface, which gains nothing.
    pub mode: Option<String>,
}

/// Options of direct server return.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct DirectReturnOptions {
    /// How clients outside of the cluster reach endpoints on other nodes where a Service does not say: `snat`, the default, `dsr`, or
    /// `hybrid`, which is `dsr` for TCP and `snat` for the rest.
    pub forwarding: Option<String>,
    /// How packets get to the other node: `ipip`, the default, or `gue`, which is UDP to port 6080.
    pub tunnel: Option<String>,
    /// Interfaces at which other nodes' tunnels end, `*` at the end for a prefix; default the one with the node's own address and those of
    /// default routes.
    pub interfaces: Option<Vec<String>>,
}

/// Options of the iptables data plane, beside those that kube-proxy has too.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct IptablesOptions {
    /// `auto`, the default (what the kubelet's hints or the rules on this node say), `nft` or `legacy`.
    pub binary: Option<String>,
}

/// Room in the kernel's maps, in entries; for Services and endpoints what it is at first, as they grow.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct MapSizes {
    /// ServicePorts; default 65536.
    pub services: Option<u32>,
    /// Endpoints of one family; default 262144.
    pub endpoints: Option<u32>,
    /// Flows of one family; default 262144.
    pub flows: Option<u32>,
}

impl ProxyConfiguration {
    /// The same with its kind named, as it is written.
    pub(super) fn set_kind(&mut self) {
        self.api_version = Some(API_VERSION.to_owned());
        self.kind = Some(KIND.to_owned());
    }
}
