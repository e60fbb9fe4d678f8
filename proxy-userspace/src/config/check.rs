//! From the documents to a checked [`Config`].

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::{
    ApiSettings, ClientConnection, Config, ConfigError, ConntrackSection, Documents, EbpfOptions, GoDuration,
    IptablesOptions, IpvsSection, IpvsSettings, KubeProxyConfiguration, LogSettings, Logging, Mode, SyncPeriods,
};
use crate::conntrack_sysctls::ConntrackSysctls;
use crate::dataplane::ebpf::{AttachMode, ENDPOINTS_MAX, EbpfConfig, FlowTimeouts, FrameMode, SERVICES_MAX};
use crate::dataplane::iptables::{IptablesConfig, Variant};
use crate::dataplane::nftables::NftablesConfig;
use crate::model::{Forwarding, IpFamily};
use crate::node::{NodePortAddresses, NodeSettings, POD_CIDRS_MAX, PodDetection};

/// The longest interface name (IFNAMSIZ without its terminator).
const INTERFACE_NAME_MAX: usize = 15;
/// kube-proxy's default for the least pause between syncs, in seconds. Its syncs cost seconds, ours do not: who has not asked for
/// another pause gets none.
const MIN_SYNC_DEFAULT: GoDuration = GoDuration::from_secs(1);
/// The schedulers of IPVS (`net/netfilter/ipvs`), those of kube-proxy first.
const SCHEDULERS: [&str; 14] =
    ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh", "fo", "ovf", "twos"];

/// Checks everything; `documents` has its defaults filled in.
pub(super) fn config(documents: Documents, master: Option<String>) -> Result<Config, ConfigError> {
    let kube = &documents.kube_proxy;
    let name = kube.mode.as_deref().unwrap_or_default();
    let mode =
        Mode::parse(name).ok_or_else(|| value("mode", name, "is none of auto, ebpf, nftables, iptables and ipvs"))?;
    Ok(Config {
        node_name: node_name(kube.hostname_override.as_deref())?,
        api: api(&kube.client_connection, master)?,
        healthz_address: bind_address("healthzBindAddress", kube.healthz_bind_address.as_deref(), 10256)?,
        metrics_address: bind_address("metricsBindAddress", kube.metrics_bind_address.as_deref(), 10249)?,
        bind_hard_fail: kube.bind_address_hard_fail.unwrap_or_default(),
        mode,
        sync: sync_periods(kube, mode)?,
        node: NodeSettings { forwarding: forwarding(&documents.own.ebpf)?, ..node_settings(kube, mode)? },
        ebpf: EbpfConfig { flow_timeouts: flow_timeouts(&kube.conntrack), ..ebpf(&documents.own.ebpf, mode)? },
        iptables: iptables(kube, &documents.own.iptables)?,
        nftables: NftablesConfig { masquerade_bit: mark("nftables.masqueradeBit", kube.nftables.masquerade_bit)? },
        ipvs: ipvs(&kube.ipvs)?,
        conntrack: conntrack(&kube.conntrack)?,
        oom_score_adj: in_range("oomScoreAdj", kube.oom_score_adj.unwrap_or_default(), -1000, 1000)?,
        log: log(&kube.logging)?,
        warnings: super::ignored::ignored(kube).into_iter().chain(masqueraded(&documents.own.ebpf, mode)).collect(),
        effective: documents,
    })
}

fn value(field: &'static str, value: &str, problem: &str) -> ConfigError {
    ConfigError::Value { field, value: value.to_owned(), problem: problem.to_owned() }
}

fn in_range(field: &'static str, number: i32, min: i32, max: i32) -> Result<i32, ConfigError> {
    let wrong = || value(field, &number.to_string(), &format!("is not between {min} and {max}"));
    (min..=max).contains(&number).then_some(number).ok_or_else(wrong)
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

fn api(client: &ClientConnection, master: Option<String>) -> Result<ApiSettings, ConfigError> {
    let burst = client.burst.unwrap_or_default();
    let burst =
        u32::try_from(burst).map_err(|_| value("clientConnection.burst", &burst.to_string(), "is below zero"))?;
    let qps = client.qps.unwrap_or_default();
    if !qps.is_finite() {
        return Err(value("clientConnection.qps", &qps.to_string(), "is not a number of requests a second"));
    }
    Ok(ApiSettings {
        kubeconfig: client.kubeconfig.clone().filter(|path| !path.as_os_str().is_empty()),
        master,
        qps: (qps > 0.0).then_some(qps),
        burst: burst.max(1),
    })
}

/// Empty is nowhere; an address alone gets the usual port.
fn bind_address(field: &'static str, text: Option<&str>, port: u16) -> Result<Option<SocketAddr>, ConfigError> {
    let text = text.unwrap_or_default();
    if text.is_empty() {
        return Ok(None);
    }
    let with_port = text.parse::<SocketAddr>().ok();
    let alone = || text.trim_matches(['[', ']']).parse().ok().map(|address| SocketAddr::new(address, port));
    let address = with_port.or_else(alone).filter(|address| address.port() != 0);
    let problem = format!("is not an address and port, like 0.0.0.0:{port}");
    address.map(Some).ok_or_else(|| value(field, text, &problem))
}

fn sync_periods(kube: &KubeProxyConfiguration, mode: Mode) -> Result<SyncPeriods, ConfigError> {
    let (field, period, min) = match mode {
        Mode::Ipvs => ("ipvs.minSyncPeriod", kube.ipvs.sync_period, kube.ipvs.min_sync_period),
        Mode::Nftables => ("nftables.minSyncPeriod", kube.nftables.sync_period, kube.nftables.min_sync_period),
        _ => ("iptables.minSyncPeriod", kube.iptables.sync_period, kube.iptables.min_sync_period),
    };
    let (period, min) = (period.unwrap_or_default(), min.unwrap_or_default());
    if period.is_zero() {
        return Err(value(field, &period.to_string(), "is the syncPeriod, which must be greater than 0"));
    }
    if min > period {
        return Err(value(field, &min.to_string(), &format!("is longer than syncPeriod, {period}")));
    }
    let min = if min == MIN_SYNC_DEFAULT { GoDuration::default() } else { min };
    Ok(SyncPeriods { period: period.0, min: min.0 })
}

fn node_settings(kube: &KubeProxyConfiguration, mode: Mode) -> Result<NodeSettings, ConfigError> {
    let bind = kube.bind_address.as_deref().unwrap_or_default();
    let bind: IpAddr = bind.parse().map_err(|_| value("bindAddress", bind, "is not an address"))?;
    let masquerade_all = match mode {
        Mode::Nftables => kube.nftables.masquerade_all,
        _ => kube.iptables.masquerade_all,
    };
    let localhost = kube.iptables.localhost_node_ports.unwrap_or_default();
    let listed = kube.node_port_addresses.as_deref().unwrap_or_default();
    let primary = mode == Mode::Nftables && listed.is_empty();
    Ok(NodeSettings {
        node_port_addresses: if primary { NodePortAddresses::Primary } else { node_port_addresses(listed)? },
        pod_detection: pod_detection(kube)?,
        masquerade_all: masquerade_all.unwrap_or_default(),
        forwarding: Forwarding::default(),
        localhost_node_ports_v4: localhost,
        localhost_node_ports_v6: localhost,
        bind_address: Some(bind).filter(|address| !address.is_unspecified()),
    })
}

fn pod_detection(kube: &KubeProxyConfiguration) -> Result<PodDetection, ConfigError> {
    let cidrs = cluster_cidrs(kube.cluster_cidr.as_deref().unwrap_or_default())?;
    let (names, mode) = (&kube.detect_local, kube.detect_local_mode.as_deref().unwrap_or_default());
    match mode {
        "ClusterCIDR" => Ok(PodDetection::ClusterCidr(cidrs)),
        "NodeCIDR" => Ok(PodDetection::NodeCidr),
        "BridgeInterface" => {
            let name = interface("detectLocal.bridgeInterface", names.bridge_interface.as_deref())?;
            Ok(PodDetection::BridgeInterface(name))
        }
        "InterfaceNamePrefix" => {
            let prefix = interface("detectLocal.interfaceNamePrefix", names.interface_name_prefix.as_deref())?;
            Ok(PodDetection::InterfaceNamePrefix(prefix))
        }
        other => {
            let problem = "is none of ClusterCIDR, NodeCIDR, BridgeInterface and InterfaceNamePrefix";
            Err(value("detectLocalMode", other, problem))
        }
    }
}

fn interface(field: &'static str, name: Option<&str>) -> Result<Arc<str>, ConfigError> {
    let name = name.unwrap_or_default();
    if !name.is_empty() && is_interface_name(name) {
        return Ok(Arc::from(name));
    }
    Err(value(field, name, "is not the name of an interface, which this detectLocalMode needs"))
}

fn is_interface_name(name: &str) -> bool {
    name.len() <= INTERFACE_NAME_MAX && !name.contains(['*', '/', ' ', '\0'])
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
        _ => networks(field, list).map(NodePortAddresses::Networks),
    }
}

fn networks(field: &'static str, list: &[String]) -> Result<Vec<IpNet>, ConfigError> {
    list.iter().map(|entry| network(field, entry)).collect()
}

fn network(field: &'static str, text: &str) -> Result<IpNet, ConfigError> {
    let net: Result<IpNet, _> = text.trim().parse();
    net.map(|net| net.trunc()).map_err(|_| value(field, text, "is not a network, like 10.244.0.0/16"))
}

fn mark(field: &'static str, bit: Option<i32>) -> Result<u8, ConfigError> {
    let bit = in_range(field, bit.unwrap_or_default(), 0, 31)?;
    Ok(u8::try_from(bit).unwrap_or_default())
}

fn iptables(kube: &KubeProxyConfiguration, options: &IptablesOptions) -> Result<IptablesConfig, ConfigError> {
    let variant = match options.binary.as_deref() {
        None | Some("" | "auto") => None,
        Some("nft") => Some(Variant::Nft),
        Some("legacy") => Some(Variant::Legacy),
        Some(other) => return Err(value("iptables.binary", other, "is none of auto, nft and legacy")),
    };
    Ok(IptablesConfig {
        variant,
        masquerade_bit: mark("iptables.masqueradeBit", kube.iptables.masquerade_bit)?,
        localhost_node_ports: kube.iptables.localhost_node_ports.unwrap_or_default(),
    })
}

fn ipvs(section: &IpvsSection) -> Result<IpvsSettings, ConfigError> {
    let scheduler = section.scheduler.clone().unwrap_or_default();
    if !SCHEDULERS.contains(&scheduler.as_str()) {
        return Err(value("ipvs.scheduler", &scheduler, &format!("is none of {}", SCHEDULERS.join(", "))));
    }
    Ok(IpvsSettings {
        scheduler,
        exclude_cidrs: networks("ipvs.excludeCIDRs", section.exclude_cidrs.as_deref().unwrap_or_default())?,
        strict_arp: section.strict_arp.unwrap_or_default(),
        tcp_timeout: section.tcp_timeout.unwrap_or_default().0,
        tcp_fin_timeout: section.tcp_fin_timeout.unwrap_or_default().0,
        udp_timeout: section.udp_timeout.unwrap_or_default().0,
    })
}

fn conntrack(section: &ConntrackSection) -> Result<ConntrackSysctls, ConfigError> {
    let count = |field, number: Option<i32>| {
        let number = number.unwrap_or_default();
        u32::try_from(number).map_err(|_| value(field, &number.to_string(), "is below zero"))
    };
    Ok(ConntrackSysctls {
        max_per_core: count("conntrack.maxPerCore", section.max_per_core)?,
        min: count("conntrack.min", section.min)?,
        tcp_established: section.tcp_established_timeout.unwrap_or_default().0,
        tcp_close_wait: section.tcp_close_wait_timeout.unwrap_or_default().0,
        tcp_be_liberal: section.tcp_be_liberal.unwrap_or_default(),
        udp: section.udp_timeout.unwrap_or_default().0,
        udp_stream: section.udp_stream_timeout.unwrap_or_default().0,
    })
}

fn log(section: &Logging) -> Result<LogSettings, ConfigError> {
    let json = match section.format.as_deref() {
        None | Some("" | "text") => false,
        Some("json") => true,
        Some(other) => return Err(value("logging.format", other, "is neither text nor json")),
    };
    Ok(LogSettings { verbosity: section.verbosity.unwrap_or_default(), json })
}

fn forwarding(options: &EbpfOptions) -> Result<Forwarding, ConfigError> {
    let name = options.direct_return.forwarding.as_deref().unwrap_or_default();
    let wrong = || value("ebpf.directReturn.forwarding", name, "is none of snat, dsr and hybrid");
    if name.is_empty() { Ok(Forwarding::default()) } else { Forwarding::parse(name).ok_or_else(wrong) }
}

/// What to say where direct server return is asked for and cannot be.
fn masqueraded(options: &EbpfOptions, mode: Mode) -> Option<String> {
    let asked = options.direct_return.forwarding.as_deref().is_some_and(|name| !matches!(name, "" | "snat"));
    let cannot = asked && !matches!(mode, Mode::Auto | Mode::Ebpf);
    cannot.then(|| format!("ebpf.directReturn.forwarding has no effect: mode {} masquerades", mode.name()))
}

fn ebpf(options: &EbpfOptions, mode: Mode) -> Result<EbpfConfig, ConfigError> {
    let mounted = || cgroup_mount(&fs::read_to_string("/proc/mounts").unwrap_or_default());
    let cgroup = match options.cgroup.clone().or_else(mounted) {
        Some(path) => path,
        None if mode == Mode::Ebpf => return Err(ConfigError::NoCgroup),
        // Other modes need none, and a choice among modes finds out that it is missing.
        None => PathBuf::from("/sys/fs/cgroup"),
    };
    let attach_mode = match options.attach_mode.as_deref() {
        None | Some("" | "auto") => AttachMode::Auto,
        Some("tcx") => AttachMode::Tcx,
        Some("clsact") => AttachMode::Clsact,
        Some(other) => return Err(value("ebpf.attachMode", other, "is none of auto, tcx and clsact")),
    };
    let xdp_mode = match options.xdp.mode.as_deref() {
        None | Some("" | "native") => FrameMode::Native,
        Some("generic") => FrameMode::Generic,
        Some(other) => return Err(value("ebpf.xdp.mode", other, "is neither native nor generic")),
    };
    let tunnels_are_gue = match options.direct_return.tunnel.as_deref() {
        None | Some("" | "ipip") => false,
        Some("gue") => true,
        Some(other) => return Err(value("ebpf.directReturn.tunnel", other, "is neither ipip nor gue")),
    };
    let tunnel_interfaces = options.direct_return.interfaces.as_deref().unwrap_or_default();
    let sizes = &options.map_sizes;
    Ok(EbpfConfig {
        cgroup,
        bpffs: options.bpffs.clone().unwrap_or_else(|| PathBuf::from("/sys/fs/bpf")),
        interfaces: interfaces("ebpf.interfaces", options.interfaces.as_deref().unwrap_or_default())?,
        attach_mode,
        xdp_interfaces: interfaces("ebpf.xdp.interfaces", options.xdp.interfaces.as_deref().unwrap_or_default())?,
        xdp_mode,
        tunnels_are_gue,
        tunnel_interfaces: interfaces("ebpf.directReturn.interfaces", tunnel_interfaces)?,
        max_services: size("ebpf.mapSizes.services", sizes.services, 65_536, SERVICES_MAX)?,
        max_endpoints: size("ebpf.mapSizes.endpoints", sizes.endpoints, 262_144, ENDPOINTS_MAX)?,
        max_flows: size("ebpf.mapSizes.flows", sizes.flows, 262_144, 1 << 26)?,
        flow_timeouts: FlowTimeouts::default(),
    })
}

/// The timeouts of the `conntrack` section hold for the flows of the eBPF data plane as well; what it leaves to the kernel is as the
/// kernel's own default.
fn flow_timeouts(section: &ConntrackSection) -> FlowTimeouts {
    let default = FlowTimeouts::default();
    let given = |configured: Option<GoDuration>, default: Duration| {
        configured.map(|given| given.0).filter(|given| *given >= Duration::from_secs(1)).unwrap_or(default)
    };
    FlowTimeouts {
        tcp_established: given(section.tcp_established_timeout, default.tcp_established),
        tcp_half_closed: given(section.tcp_close_wait_timeout, default.tcp_half_closed),
        udp_unanswered: given(section.udp_timeout, default.udp_unanswered),
        udp_answered: given(section.udp_stream_timeout, default.udp_answered),
    }
}

fn interfaces(field: &'static str, list: &[String]) -> Result<Vec<String>, ConfigError> {
    let checked = list.iter().map(|pattern| {
        let name = pattern.strip_suffix('*').unwrap_or(pattern);
        let named = is_interface_name(name) && !pattern.is_empty();
        let wrong = || value(field, pattern, "is no interface name, nor one that ends in *");
        named.then(|| pattern.clone()).ok_or_else(wrong)
    });
    checked.collect()
}

fn size(field: &'static str, configured: Option<u32>, default: u32, max: u32) -> Result<u32, ConfigError> {
    let size = configured.unwrap_or(default);
    let wrong = || value(field, &size.to_string(), &format!("is not between 1 and {max}"));
    (1..=max).contains(&size).then_some(size).ok_or_else(wrong)
}

/// The first cgroup2 mount. Spaces in mount points are written as octal escapes; such a place has to be named by hand.
pub(super) fn cgroup_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (place, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| Path::new(place).to_owned())
    })
}
