//! The configuration: a file and flags, checked once, into one [`Config`].
//!
//! The file holds YAML documents of two kinds, each at most once: kube-proxy's own KubeProxyConfiguration, every field of it, and
//! our ProxyConfiguration for what that has no place for. As with kube-proxy, a file makes most flags void.

mod changed;
mod check;
mod document;
mod duration;
mod flags;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod ignored;
mod kube_proxy;
mod mode;
mod own;
mod write;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use crate::conntrack_sysctls::ConntrackSysctls;
use crate::dataplane::ebpf::EbpfConfig;
use crate::dataplane::iptables::IptablesConfig;
use crate::dataplane::nftables::NftablesConfig;
use crate::node::NodeSettings;

pub use changed::file_changed;
pub use document::Documents;
pub use duration::{DurationError, GoDuration};
pub use flags::{Flags, KubeProxyFlags, LogFlags, OwnFlags};
pub use kube_proxy::{
    ClientConnection, ConntrackSection, DetectLocal, IptablesSection, IpvsSection, KUBE_PROXY_API_VERSION,
    KUBE_PROXY_KIND, KubeProxyConfiguration, Logging, LoggingOptions, NftablesSection, OutputRouting, VmoduleItem,
    WinkernelSection,
};
pub use mode::Mode;
pub use own::{DirectReturnOptions, EbpfOptions, IptablesOptions, MapSizes, ProxyConfiguration};

/// Everything that the process was told, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of this node's Node object.
    pub node_name: String,
    /// How to reach the API server.
    pub api: ApiSettings,
    /// Where `/healthz` and `/livez` answer; `None` is nowhere.
    pub healthz_address: Option<SocketAddr>,
    /// Where `/metrics` answers; `None` is nowhere.
    pub metrics_address: Option<SocketAddr>,
    /// Whether a port that is taken ends the process.
    pub bind_hard_fail: bool,
    /// Which data plane.
    pub mode: Mode,
    /// When to program.
    pub sync: SyncPeriods,
    /// What concerns the node.
    pub node: NodeSettings,
    /// What concerns the eBPF data plane.
    pub ebpf: EbpfConfig,
    /// What concerns the iptables data plane.
    pub iptables: IptablesConfig,
    /// What concerns the nftables data plane.
    pub nftables: NftablesConfig,
    /// What concerns the IPVS data plane.
    pub ipvs: IpvsSettings,
    /// The node's connection tracking.
    pub conntrack: ConntrackSysctls,
    /// `oom_score_adj` of this process, -1000 to 1000.
    pub oom_score_adj: i32,
    /// How to log.
    pub log: LogSettings,
    /// What was set without effect, one sentence each.
    pub warnings: Vec<String>,
    /// The same as it could be written, defaults filled in.
    pub effective: Documents,
}

/// How to reach the API server.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ApiSettings {
    /// Kubeconfig file; `None` is the pod's service account, else the usual search (`KUBECONFIG`, `~/.kube/config`).
    pub kubeconfig: Option<PathBuf>,
    /// Address in place of the kubeconfig's.
    pub master: Option<String>,
    /// Requests a second on the average; `None` is without bound.
    pub qps: Option<f32>,
    /// Requests at once, at least 1.
    pub burst: u32,
}

/// When to program: `syncPeriod` and `minSyncPeriod` of the mode's section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SyncPeriods {
    /// The longest pause before a failed sync is tried again. A change that waits for twice as long makes the proxy unhealthy.
    pub period: Duration,
    /// The least pause between two syncs. Zero, for kube-proxy's default of 1 s, is as short as the last sync took.
    pub min: Duration,
}

/// The IPVS data plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpvsSettings {
    /// Name of the kernel's scheduler.
    pub scheduler: String,
    /// Virtual servers inside these networks are never removed.
    pub exclude_cidrs: Vec<IpNet>,
    /// Whether interfaces answer ARP only for their own addresses (arp_ignore 1, arp_announce 2).
    pub strict_arp: bool,
    /// Idle TCP connections; zero leaves the kernel's.
    pub tcp_timeout: Duration,
    /// TCP connections after a FIN; zero leaves the kernel's.
    pub tcp_fin_timeout: Duration,
    /// UDP; zero leaves the kernel's.
    pub udp_timeout: Duration,
}

/// How to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogSettings {
    /// As klog's: 4 and more logs every sync, 6 and more everything.
    pub verbosity: u32,
    /// One JSON object a line, instead of text.
    pub json: bool,
}

/// What is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read configuration file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is no YAML.
    #[error("configuration file {path} is not valid YAML: {problem}")]
    Yaml {
        /// The file.
        path: PathBuf,
        /// What and where, one line.
        problem: String,
    },
    /// A field is unknown or has the wrong type.
    #[error("configuration file {path}{}: field {field}: {problem}", line.map(|line| format!(", line {line}")).unwrap_or_default())]
    Field {
        /// The file.
        path: PathBuf,
        /// Path of the field.
        field: String,
        /// Its line, from 1, where it has one.
        line: Option<u64>,
        /// What is wrong.
        problem: String,
    },
    /// A value makes no sense.
    #[error("{field}: {value:?} {problem}")]
    Value {
        /// Name of the field in the file; the flag of that name may have set it.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        problem: String,
    },
    /// No cgroup v2 hierarchy.
    #[error("no cgroup2 file system is mounted; mount one or name a directory with --cgroup")]
    NoCgroup,
    /// The machine has no name.
    #[error("cannot read the host name: {0}; set it with --hostname-override")]
    Hostname(#[source] std::io::Error),
    /// `--write-config-to` does not work.
    #[error("cannot write the configuration to {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Config {
    /// Reads the file that the flags name, lets the flags override it, and checks the result.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn load(flags: &Flags) -> Result<Self, ConfigError> {
        let mut documents = match flags.file() {
            Some(path) => Documents::read(&path)?,
            None => Documents::default(),
        };
        documents.set_defaults();
        let void = flags.apply(&mut documents);
        let master = Some(flags.master.clone()).filter(|master| !master.is_empty());
        let mut config = check::config(documents, master)?;
        if !void.is_empty() {
            let names = void.iter().map(|name| format!("--{name}")).collect::<Vec<_>>().join(", ");
            config.warnings.insert(0, format!("{names} has no effect beside --config; set it in the file"));
        }
        Ok(config)
    }

    /// The node's primary address, where it was configured.
    pub fn bind_address(&self) -> Option<IpAddr> {
        self.node.bind_address
    }
}

#[cfg(test)]
mod tests;
