//! The configuration: a file and flags, checked once, into one [`Config`].

mod file;
mod flags;
mod mode;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;

use crate::dataplane::ebpf::{AttachMode, EbpfConfig};
use crate::dataplane::iptables::{IptablesConfig, Variant};
use crate::model::IpFamily;
use crate::node::{NodePortAddresses, NodeSettings, POD_CIDRS_MAX, PodDetection};

pub use file::{ClientConnection, EbpfOptions, IptablesOptions, MapSizes, ProxyConfiguration};
pub use flags::Flags;
pub use mode::Mode;

/// Where health is answered unless configured otherwise, as kube-proxy does.
const HEALTHZ_DEFAULT: &str = "0.0.0.0:10256";
/// Where metrics are answered unless configured otherwise, as kube-proxy does.
const METRICS_DEFAULT: &str = "127.0.0.1:10249";
/// The longest interface name (IFNAMSIZ without its terminator).
const INTERFACE_NAME_MAX: usize = 15;

/// Everything that the process was told, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of this node's Node object.
    pub node_name: String,
    /// Kubeconfig file; `None` is the usual search (`KUBECONFIG`, `~/.kube/config`, in-cluster).
    pub kubeconfig: Option<PathBuf>,
    /// Where `/healthz` and `/livez` answer; `None` is nowhere.
    pub healthz_address: Option<SocketAddr>,
    /// Where `/metrics` answers; `None` is nowhere.
    pub metrics_address: Option<SocketAddr>,
    /// Which data plane.
    pub mode: Mode,
    /// What concerns the node.
    pub node: NodeSettings,
    /// What concerns the eBPF data plane.
    pub ebpf: EbpfConfig,
    /// What concerns the iptables data plane.
    pub iptables: IptablesConfig,
    /// The same as it was written, for `/configz`.
    pub effective: ProxyConfiguration,
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
    #[error("configuration file {path}: field {field}: {problem}")]
    Field {
        /// The file.
        path: PathBuf,
        /// Path of the field, or of the mapping that holds it.
        field: String,
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
}

impl Config {
    /// Reads the file that the flags name, lets the flags override it, and checks the result.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn load(flags: &Flags) -> Result<Self, ConfigError> {
        let mut effective = match &flags.config {
            Some(path) => ProxyConfiguration::read(path)?,
            None => ProxyConfiguration::default(),
        };
        flags.apply(&mut effective);
        Self::check(effective)
    }

    fn check(effective: ProxyConfiguration) -> Result<Self, ConfigError> {
        let mode = Mode::parse(effective.mode.as_deref().unwrap_or_default())?;
        let healthz = effective.healthz_bind_address.as_deref().unwrap_or(HEALTHZ_DEFAULT);
        let metrics = effective.metrics_bind_address.as_deref().unwrap_or(METRICS_DEFAULT);
        Ok(Self {
            node_name: node_name(effective.hostname_override.as_deref())?,
            kubeconfig: effective.client_connection.kubeconfig.clone().filter(|path| !path.as_os_str().is_empty()),
            healthz_address: bind_address("healthzBindAddress", healthz, 10256)?,
            metrics_address: bind_address("metricsBindAddress", metrics, 10249)?,
            mode,
            node: node_settings(&effective)?,
            ebpf: ebpf_settings(&effective.ebpf)?,
            iptables: iptables_settings(&effective.iptables)?,
            effective,
        })
    }
}

fn value(field: &'static str, value: &str, problem: &str) -> ConfigError {
    ConfigError::Value { field, value: value.to_owned(), problem: problem.to_owned() }
}

/// Node names are lower case; the host name need not be.
fn node_name(configured: Option<&str>) -> Result<String, ConfigError> {
    let name = match configured.map(str::trim).filter(|name| !name.is_empty()) {
        Some(name) => name.to_owned(),
        None => fs::read_to_string("/proc/sys/kernel/hostname").map_err(ConfigError::Hostname)?,
    };
    let name = name.trim().to_lowercase();
    let well_formed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if name.is_empty() || !name.chars().all(well_formed) {
        return Err(value("hostnameOverride", &name, "is not a node name: letters, digits, '-' and '.'"));
    }
    Ok(name)
}

/// Empty is nowhere; an address alone gets the usual port.
fn bind_address(field: &'static str, text: &str, port: u16) -> Result<Option<SocketAddr>, ConfigError> {
    if text.is_empty() {
        return Ok(None);
    }
    let with_port = text.parse().ok();
    let alone = || text.trim_matches(['[', ']']).parse().ok().map(|address| SocketAddr::new(address, port));
    let address = with_port.or_else(alone);
    address.map(Some).ok_or_else(|| value(field, text, "is not an address and port, like 0.0.0.0:10256"))
}

fn node_settings(config: &ProxyConfiguration) -> Result<NodeSettings, ConfigError> {
    let cidrs = cluster_cidrs(config.cluster_cidr.as_deref().unwrap_or_default())?;
    let pod_detection = match config.detect_local_mode.as_deref() {
        None | Some("" | "ClusterCIDR") => PodDetection::ClusterCidr(cidrs),
        Some("NodeCIDR") => PodDetection::NodeCidr,
        Some(other) => return Err(value("detectLocalMode", other, "is neither ClusterCIDR nor NodeCIDR")),
    };
    Ok(NodeSettings {
        node_port_addresses: node_port_addresses(config.node_port_addresses.as_deref().unwrap_or_default())?,
        pod_detection,
        masquerade_all: config.masquerade_all.unwrap_or(false),
    })
}

fn cluster_cidrs(text: &str) -> Result<Vec<IpNet>, ConfigError> {
    let field = "clusterCIDR";
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    let networks: Vec<_> = parts.map(|part| network(field, part)).collect::<Result<_, _>>()?;
    for family in [IpFamily::V4, IpFamily::V6] {
        if networks.iter().filter(|net| IpFamily::of(net.addr()) == family).count() > POD_CIDRS_MAX {
            return Err(value(field, text, "holds more than 8 networks of one family"));
        }
    }
    Ok(networks)
}

fn node_port_addresses(list: &[String]) -> Result<NodePortAddresses, ConfigError> {
    let field = "nodePortAddresses";
    match list {
        [only] if only == "primary" => Ok(NodePortAddresses::Primary),
        _ if list.iter().any(|entry| entry == "primary") => {
            Err(value(field, &list.join(","), "mixes \"primary\" with networks; it must stand alone"))
        }
        _ => list.iter().map(|entry| network(field, entry)).collect::<Result<_, _>>().map(NodePortAddresses::Networks),
    }
}

fn network(field: &'static str, text: &str) -> Result<IpNet, ConfigError> {
    let net: Result<IpNet, _> = text.trim().parse();
    net.map(|net| net.trunc()).map_err(|_| value(field, text, "is not a network, like 10.244.0.0/16"))
}

fn ebpf_settings(options: &EbpfOptions) -> Result<EbpfConfig, ConfigError> {
    let cgroup = match &options.cgroup {
        Some(path) => path.clone(),
        None => cgroup_mount(&fs::read_to_string("/proc/mounts").unwrap_or_default()).ok_or(ConfigError::NoCgroup)?,
    };
    let attach_mode = match options.attach_mode.as_deref() {
        None | Some("auto") => AttachMode::Auto,
        Some("tcx") => AttachMode::Tcx,
        Some("clsact") => AttachMode::Clsact,
        Some(other) => return Err(value("ebpf.attachMode", other, "is none of auto, tcx and clsact")),
    };
    let sizes = &options.map_sizes;
    Ok(EbpfConfig {
        cgroup,
        bpffs: options.bpffs.clone().unwrap_or_else(|| PathBuf::from("/sys/fs/bpf")),
        interfaces: interfaces(options.interfaces.as_deref().unwrap_or_default())?,
        attach_mode,
        max_services: size("ebpf.mapSizes.services", sizes.services, 65_536, 1 << 22)?,
        max_endpoints: size("ebpf.mapSizes.endpoints", sizes.endpoints, 262_144, 1 << 24)?,
        max_flows: size("ebpf.mapSizes.flows", sizes.flows, 262_144, 1 << 26)?,
    })
}

fn iptables_settings(options: &IptablesOptions) -> Result<IptablesConfig, ConfigError> {
    let variant = match options.binary.as_deref() {
        None | Some("auto") => None,
        Some("nft") => Some(Variant::Nft),
        Some("legacy") => Some(Variant::Legacy),
        Some(other) => return Err(value("iptables.binary", other, "is none of auto, nft and legacy")),
    };
    let masquerade_bit = options.masquerade_bit.unwrap_or(14);
    if masquerade_bit > 31 {
        return Err(value("iptables.masqueradeBit", &masquerade_bit.to_string(), "is not between 0 and 31"));
    }
    Ok(IptablesConfig { variant, masquerade_bit, localhost_node_ports: options.localhost_node_ports.unwrap_or(true) })
}

fn interfaces(list: &[String]) -> Result<Vec<String>, ConfigError> {
    let field = "ebpf.interfaces";
    let checked = list.iter().map(|pattern| {
        let name = pattern.strip_suffix('*').unwrap_or(pattern);
        let is_name = name.len() <= INTERFACE_NAME_MAX && !name.contains(['*', '/', ' ', '\0']);
        let named = is_name && !pattern.is_empty();
        named
            .then(|| pattern.clone())
            .ok_or_else(|| value(field, pattern, "is no interface name, nor one that ends in *"))
    });
    checked.collect()
}

fn size(field: &'static str, configured: Option<u32>, default: u32, max: u32) -> Result<u32, ConfigError> {
    let size = configured.unwrap_or(default);
    let problem = || format!("is not between 1 and {max}");
    let wrong = || ConfigError::Value { field, value: size.to_string(), problem: problem() };
    (1..=max).contains(&size).then_some(size).ok_or_else(wrong)
}

/// The first cgroup2 mount. Spaces in mount points are written as octal escapes; such a place has to be named by hand.
fn cgroup_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (place, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| Path::new(place).to_owned())
    })
}

#[cfg(test)]
mod tests;
