//! The configuration file, as it is written.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ConfigError;

const API_VERSION: &str = "trama.dev/v1alpha1";
const KIND: &str = "ProxyConfiguration";

/// `kind: ProxyConfiguration`. Everything is optional; absent means the default that the field names.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProxyConfiguration {
    /// `trama.dev/v1alpha1`.
    #[serde(default)]
    pub api_version: Option<String>,
    /// `ProxyConfiguration`.
    #[serde(default)]
    pub kind: Option<String>,
    /// Data plane: `ebpf`, the default.
    #[serde(default)]
    pub mode: Option<String>,
    /// Name of the Node; default the host name.
    #[serde(default)]
    pub hostname_override: Option<String>,
    /// How to reach the API server.
    #[serde(default)]
    pub client_connection: ClientConnection,
    /// Networks of all pods, separated by commas; default none, and then nobody is known to be a pod.
    #[serde(default, rename = "clusterCIDR")]
    pub cluster_cidr: Option<String>,
    /// `ClusterCIDR`, the default, or `NodeCIDR`.
    #[serde(default)]
    pub detect_local_mode: Option<String>,
    /// Where NodePorts answer: networks, or `primary` alone; default all addresses.
    #[serde(default)]
    pub node_port_addresses: Option<Vec<String>>,
    /// Masquerade all ClusterIP traffic; default false.
    #[serde(default)]
    pub masquerade_all: Option<bool>,
    /// Default `0.0.0.0:10256`; empty is nowhere.
    #[serde(default)]
    pub healthz_bind_address: Option<String>,
    /// Default `127.0.0.1:10249`; empty is nowhere.
    #[serde(default)]
    pub metrics_bind_address: Option<String>,
    /// The eBPF data plane.
    #[serde(default)]
    pub ebpf: EbpfOptions,
    /// The iptables data plane.
    #[serde(default)]
    pub iptables: IptablesOptions,
}

/// How to reach the API server.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClientConnection {
    /// Kubeconfig file; default the usual search.
    #[serde(default)]
    pub kubeconfig: Option<PathBuf>,
}

/// Options of the eBPF data plane.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EbpfOptions {
    /// cgroup v2 directory whose sockets are load-balanced; default where cgroup2 is mounted.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// Mount point of the BPF file system; default `/sys/fs/bpf`.
    #[serde(default)]
    pub bpffs: Option<PathBuf>,
    /// Interfaces that carry packet programs, `*` at the end for a prefix; default all but loopback.
    #[serde(default)]
    pub interfaces: Option<Vec<String>>,
    /// `auto`, the default, `tcx` or `clsact`.
    #[serde(default)]
    pub attach_mode: Option<String>,
    /// Room in the kernel's maps.
    #[serde(default)]
    pub map_sizes: MapSizes,
}

/// Options of the iptables data plane.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IptablesOptions {
    /// `auto`, the default (what the kubelet's hints or the rules on this node say), `nft` or `legacy`.
    #[serde(default)]
    pub binary: Option<String>,
    /// Bit of the packet mark that asks for masquerade, 0 to 31; default 14, as kube-proxy's.
    #[serde(default)]
    pub masquerade_bit: Option<u8>,
    /// Whether NodePorts answer on 127.0.0.1; default true. Sets `net.ipv4.conf.all.route_localnet`.
    #[serde(default)]
    pub localhost_node_ports: Option<bool>,
}

/// Room in the kernel's maps, in entries.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MapSizes {
    /// ServicePorts; default 65536.
    #[serde(default)]
    pub services: Option<u32>,
    /// Endpoints of one family; default 262144.
    #[serde(default)]
    pub endpoints: Option<u32>,
    /// Flows of one family; default 262144.
    #[serde(default)]
    pub flows: Option<u32>,
}

impl ProxyConfiguration {
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Parsed in two steps, because only the second knows the path of a field that is wrong.
    pub(super) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let yaml = serde_saphyr::from_str::<serde_json::Value>(text);
        let tree = yaml.map_err(|error| {
            let problem = error.without_snippet().to_string();
            let problem = problem.lines().next().unwrap_or_default().to_owned();
            ConfigError::Yaml { path: path.to_owned(), problem }
        })?;
        let parsed: Result<Self, _> = serde_path_to_error::deserialize(tree);
        let config = parsed.map_err(|error| {
            let field = match error.path().to_string() {
                root if root == "." => "(top level)".to_owned(),
                field => field,
            };
            ConfigError::Field { path: path.to_owned(), field, problem: error.inner().to_string() }
        })?;
        config.expect("apiVersion", config.api_version.as_deref(), API_VERSION, path)?;
        config.expect("kind", config.kind.as_deref(), KIND, path)?;
        Ok(config)
    }

    fn expect(&self, field: &str, is: Option<&str>, must: &str, path: &Path) -> Result<(), ConfigError> {
        if is == Some(must) {
            return Ok(());
        }
        let problem = format!("must be {must:?}, not {:?}", is.unwrap_or_default());
        Err(ConfigError::Field { path: path.to_owned(), field: field.to_owned(), problem })
    }
}
