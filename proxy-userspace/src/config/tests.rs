//! The configuration as people write it.

use std::ffi::OsString;
use std::path::Path;

use serde_json::Value;

use super::check::cgroup_mount;
use super::*;
use crate::node::{NodePortAddresses, PodDetection};

const KUBE_PROXY: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
const OWN: &str = "apiVersion: trama.dev/v1alpha1\nkind: ProxyConfiguration\n";

/// What kubeadm writes into the ConfigMap `kube-proxy`: every field, nearly all of them empty.
const KUBEADM: &str = include_str!("testdata/kubeadm.yaml");

fn flags(arguments: &[&str]) -> Result<Flags, clap::Error> {
    let all = ["trama-proxy", "--cgroup", "/c"].iter().chain(arguments);
    Flags::read(all.map(OsString::from))
}

fn try_load(arguments: &[&str]) -> Result<Config, ConfigError> {
    let named: Vec<_> = [&["--hostname-override=Node1"], arguments].concat();
    Config::load(&flags(&named).unwrap())
}

fn load(arguments: &[&str]) -> Config {
    try_load(arguments).unwrap()
}

/// Loads a file with this text, and flags.
fn try_load_file(text: &str, arguments: &[&str]) -> Result<Config, ConfigError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    std::fs::write(&path, text).unwrap();
    try_load(&[&["--config", path.to_str().unwrap()], arguments].concat())
}

fn load_file(text: &str) -> Config {
    try_load_file(text, &[]).unwrap()
}

/// The sentence for a file that is wrong.
fn complaint(text: &str) -> String {
    let problem = try_load_file(text, &[]).expect_err(text).to_string();
    assert_eq!(problem.lines().count(), 1, "one sentence: {problem}");
    problem
}

#[test]
fn defaults_are_kube_proxys() {
    let config = load(&[]);
    assert_eq!(config.node_name, "node1");
    assert_eq!(config.healthz_address, Some("0.0.0.0:10256".parse().unwrap()));
    assert_eq!(config.metrics_address, Some("127.0.0.1:10249".parse().unwrap()));
    assert_eq!(config.node.node_port_addresses, NodePortAddresses::Networks(Vec::new()));
    assert_eq!(config.node.pod_detection, PodDetection::ClusterCidr(Vec::new()));
    assert_eq!((config.mode, config.oom_score_adj, config.bind_hard_fail), (Mode::Auto, -999, false));
    assert_eq!((config.iptables.masquerade_bit, config.nftables.masquerade_bit), (14, 14));
    assert_eq!(config.sync, SyncPeriods { period: Duration::from_secs(30), min: Duration::ZERO });
    assert_eq!((config.api.qps, config.api.burst, config.api.kubeconfig), (Some(5.0), 10, None));
    let expect = ConntrackSysctls {
        max_per_core: 32_768,
        min: 131_072,
        tcp_established: Duration::from_secs(86_400),
        tcp_close_wait: Duration::from_secs(3_600),
        ..ConntrackSysctls::default()
    };
    assert_eq!(config.conntrack, expect);
    let sizes = (config.ebpf.max_services, config.ebpf.max_endpoints, config.ebpf.max_flows);
    assert_eq!((sizes, config.ebpf.bpffs.as_path()), ((65_536, 262_144, 262_144), Path::new("/sys/fs/bpf")));
    assert_eq!(config.warnings, Vec::<String>::new());
}

#[test]
fn what_kubeadm_writes_means_the_defaults_and_warns_of_nothing() {
    let config = load_file(KUBEADM);
    assert_eq!(config.warnings, Vec::<String>::new());
    let default = load(&["--kubeconfig=/var/lib/kube-proxy/kubeconfig.conf", "--cluster-cidr=10.244.0.0/16"]);
    assert_eq!((config.node, config.conntrack, config.sync), (default.node, default.conntrack, default.sync));
    assert_eq!((config.api, config.mode, config.ipvs), (default.api, default.mode, default.ipvs));
    assert_eq!(config.effective.kube_proxy.iptables, default.effective.kube_proxy.iptables);
}

#[test]
fn every_mode_of_kube_proxy_is_that_mode_here() {
    for (text, mode) in [
        ("", Mode::Auto),
        ("auto", Mode::Auto),
        ("ebpf", Mode::Ebpf),
        ("iptables", Mode::Iptables),
        ("nftables", Mode::Nftables),
        ("ipvs", Mode::Ipvs),
    ] {
        assert_eq!(load_file(&format!("{KUBE_PROXY}mode: '{text}'\n")).mode, mode);
        assert_eq!(load(&[&format!("--proxy-mode={text}")]).mode, mode);
    }
    assert!(complaint(&format!("{KUBE_PROXY}mode: kernelspace\n")).contains("mode: \"kernelspace\" is none of"));
}

#[test]
fn both_kinds_stand_in_one_file_in_any_order() {
    let kube_proxy = format!("{KUBE_PROXY}clusterCIDR: 10.0.0.0/8\n");
    let own = format!("# ours\n{OWN}ebpf:\n  mapSizes: {{services: 10}}\n  interfaces: [eth*]\n");
    for text in [
        format!("{kube_proxy}---\n{own}"),
        format!("---\n{own}--- # next\n{kube_proxy}---\n"),
        format!("{own}\n---\n# nothing here\n---\n{kube_proxy}"),
    ] {
        let config = load_file(&text);
        assert_eq!(config.node.pod_detection, PodDetection::ClusterCidr(vec!["10.0.0.0/8".parse().unwrap()]));
        assert_eq!((config.ebpf.max_services, &config.ebpf.interfaces[..]), (10, &["eth*".to_owned()][..]));
    }
    assert!(complaint(&format!("{kube_proxy}---\n{kube_proxy}")).contains("comes twice"));
}

#[test]
fn a_file_makes_kube_proxys_flags_void_and_says_which() {
    let text = format!(
        "{KUBE_PROXY}mode: iptables\nclusterCIDR: 10.0.0.0/8\nhostnameOverride: other\nlogging: {{verbosity: 1}}\n---\n{OWN}ebpf: {{bpffs: /a, mapSizes: {{flows: 5}}}}\n"
    );
    let given = ["--proxy-mode=ebpf", "--cluster-cidr=10.9.0.0/16", "--bpffs=/b", "-v", "4", "--master=http://a:1"];
    let config = try_load_file(&text, &given).unwrap();
    assert_eq!(config.mode, Mode::Iptables);
    assert_eq!(config.node.pod_detection, PodDetection::ClusterCidr(vec!["10.0.0.0/8".parse().unwrap()]));
    assert_eq!(config.warnings, ["--proxy-mode, --cluster-cidr has no effect beside --config; set it in the file"]);
    assert_eq!(config.node_name, "node1", "overrides");
    assert_eq!((config.log.verbosity, config.api.master.as_deref()), (4, Some("http://a:1")), "override");
    assert_eq!((config.ebpf.bpffs.as_path(), config.ebpf.max_flows), (Path::new("/b"), 5), "ours override");
    assert_eq!(load(&["--config="]).warnings, Vec::<String>::new(), "an empty name is no file");
}

#[test]
fn flags_are_read_as_go_reads_them() {
    let config = load(&[
        "--masquerade_all",
        "--iptables-localhost-nodeports=f",
        "--nodeport-addresses=10.0.0.0/8,192.168.0.0/16",
        "--cluster-cidr=10.1.2.3/16, fd00::/64",
        "--iptables-sync-period=1m",
        "--iptables-min-sync-period=2s",
        "--oom-score-adj",
        "-5",
        "--kube-api-qps=-1",
        "--bind-address-hard-fail=true",
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-udp-timeout=1m30s",
        "--v=2",
        "-v=5",
        "--cleanup=false",
    ]);
    assert!(config.node.masquerade_all && !config.node.localhost_node_ports_v4 && config.bind_hard_fail);
    let NodePortAddresses::Networks(networks) = &config.node.node_port_addresses else { panic!("networks") };
    assert_eq!(networks.len(), 2);
    let networks = vec!["10.1.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()];
    assert_eq!(config.node.pod_detection, PodDetection::ClusterCidr(networks));
    assert_eq!(config.sync, SyncPeriods { period: Duration::from_secs(60), min: Duration::from_secs(2) });
    assert_eq!((config.oom_score_adj, config.api.qps, config.log.verbosity), (-5, None, 5));
    assert_eq!((config.conntrack.max_per_core, config.conntrack.udp), (0, Duration::from_secs(90)));
    assert_eq!(config.conntrack.tcp_established, Duration::ZERO);
    let cleanup = |arguments: &[&str]| flags(arguments).unwrap().is_cleanup();
    assert!(cleanup(&["--cleanup"]) && cleanup(&["--cleanup", "--config="]) && !cleanup(&["--cleanup=false"]));
    assert!(flags(&["--init-only"]).unwrap().is_init_only());
    for wrong in
        ["--masquerade-all=maybe", "--iptables-sync-period=5", "--v=x", "--max-flows=-1", "--no-such-flag", "word"]
    {
        assert_eq!(flags(&[wrong]).unwrap_err().exit_code(), 2, "{wrong}");
    }
}

#[test]
fn addresses_to_listen_on() {
    assert_eq!(load(&["--healthz-bind-address="]).healthz_address, None);
    assert_eq!(load(&["--metrics-bind-address=[::]:1"]).metrics_address, Some("[::]:1".parse().unwrap()));
    assert_eq!(load(&["--metrics-bind-address=10.0.0.1"]).metrics_address, Some("10.0.0.1:10249".parse().unwrap()));
    assert_eq!(load(&["--healthz-bind-address=::1"]).healthz_address, Some("[::1]:10256".parse().unwrap()));
    assert_eq!(load(&["--healthz-port=0", "--metrics-port=0"]).healthz_address, None);
    let alone = load(&["--healthz-bind-address=10.0.0.1", "--healthz-port=99"]).healthz_address;
    assert_eq!(alone, Some("10.0.0.1:99".parse().unwrap()));
    let in_file =
        load_file(&format!("{KUBE_PROXY}healthzBindAddress: ''\nmetricsBindAddress: null\nbindAddress: '::'\n"));
    assert_eq!(in_file.healthz_address, Some("[::]:10256".parse().unwrap()), "empty in a file is the default");
    assert_eq!(in_file.metrics_address, Some("[::1]:10249".parse().unwrap()));
    assert_eq!(load(&["--bind-address=192.0.2.7"]).bind_address(), Some("192.0.2.7".parse().unwrap()));
}

#[test]
fn all_four_ways_to_tell_pods() {
    let detection = |body: &str| load_file(&format!("{KUBE_PROXY}{body}\n")).node.pod_detection;
    assert_eq!(detection("detectLocalMode: NodeCIDR"), PodDetection::NodeCidr);
    assert_eq!(
        detection("detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}"),
        PodDetection::BridgeInterface("cni0".into())
    );
    assert_eq!(
        detection("detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: veth}"),
        PodDetection::InterfaceNamePrefix("veth".into())
    );
    let by_flag = load(&["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=br0"]).node.pod_detection;
    assert_eq!(by_flag, PodDetection::BridgeInterface("br0".into()));
}

#[test]
fn settings_of_a_mode_come_from_its_section() {
    let text = |mode: &str| {
        format!(
            "{KUBE_PROXY}mode: {mode}\niptables: {{masqueradeAll: true, masqueradeBit: 3, syncPeriod: 10s}}\n\
             nftables: {{masqueradeBit: 4, minSyncPeriod: 3s}}\n\
             ipvs: {{scheduler: sh, excludeCIDRs: [10.0.0.0/8], strictARP: true, tcpFinTimeout: 2m, syncPeriod: 20s}}\n"
        )
    };
    let config = load_file(&text("nftables"));
    assert_eq!(config.node.node_port_addresses, NodePortAddresses::Primary, "kube-proxy's default of this mode");
    assert!(!config.node.masquerade_all);
    assert_eq!(config.sync, SyncPeriods { period: Duration::from_secs(30), min: Duration::from_secs(3) });
    assert_eq!((config.iptables.masquerade_bit, config.nftables.masquerade_bit), (3, 4));
    let config = load_file(&text("ipvs"));
    assert!(config.node.masquerade_all && config.ipvs.strict_arp);
    assert_eq!((config.ipvs.scheduler.as_str(), config.ipvs.exclude_cidrs.len()), ("sh", 1));
    assert_eq!((config.ipvs.tcp_fin_timeout, config.sync.period), (Duration::from_secs(120), Duration::from_secs(20)));
    assert_eq!(load_file(&text("iptables")).sync.period, Duration::from_secs(10));
}

#[test]
fn a_wrong_file_is_one_sentence_that_names_field_and_line() {
    for (body, field, line) in [
        ("clusterCidr: 10.0.0.0/8", "clusterCidr", 3),
        ("mode: ipvs\niptables:\n  masqueradeAll: maybe", "iptables.masqueradeAll", 5),
        ("iptables:\n  masquerade: true", "iptables.masquerade", 4),
        ("conntrack:\n  min: many", "conntrack.min", 4),
        ("\n\nconntrack:\n  udpTimeout: 5", "conntrack.udpTimeout", 6),
        ("nodePortAddresses: 10.0.0.0/8", "nodePortAddresses", 3),
        ("logging:\n  options:\n    text: {no: 1}", "logging.options.text.no", 5),
        ("featureGates: {A: 3}", "featureGates.A", 3),
        ("ipvs: {syncPeriod: -1s}", "ipvs.syncPeriod", 3),
    ] {
        let problem = complaint(&format!("{KUBE_PROXY}{body}\n"));
        assert!(problem.contains(&format!("line {line}: field {field}: ")), "{body}: {problem}");
    }
    let second = complaint(&format!("{KUBE_PROXY}---\n{OWN}ebpf:\n  mapSizes:\n    servces: 1\n"));
    assert!(
        second.contains("line 8: field ebpf.mapSizes.servces: "),
        "lines count from the file's beginning: {second}"
    );
}

#[test]
fn a_wrong_value_is_one_sentence_that_names_the_field() {
    for (body, field) in [
        ("clusterCIDR: 10.0.0.0", "clusterCIDR"),
        ("detectLocalMode: Magic", "detectLocalMode"),
        ("detectLocalMode: BridgeInterface", "detectLocal.bridgeInterface"),
        (
            "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: a-very-long-name}",
            "interfaceNamePrefix",
        ),
        ("nodePortAddresses: [primary, 10.0.0.0/8]", "nodePortAddresses"),
        ("healthzBindAddress: here", "healthzBindAddress"),
        ("metricsBindAddress: '127.0.0.1:0'", "metricsBindAddress"),
        ("bindAddress: here", "bindAddress"),
        ("iptables: {masqueradeBit: 32}", "iptables.masqueradeBit"),
        ("nftables: {masqueradeBit: -1}", "nftables.masqueradeBit"),
        ("iptables: {syncPeriod: 1s, minSyncPeriod: 2s}", "minSyncPeriod"),
        ("ipvs: {scheduler: best}", "ipvs.scheduler"),
        ("ipvs: {excludeCIDRs: [x]}", "ipvs.excludeCIDRs"),
        ("oomScoreAdj: 1001", "oomScoreAdj"),
        ("conntrack: {maxPerCore: -1}", "conntrack.maxPerCore"),
        ("clientConnection: {burst: -1}", "clientConnection.burst"),
        ("logging: {format: xml}", "logging.format"),
    ] {
        assert!(complaint(&format!("{KUBE_PROXY}{body}\n")).contains(field), "{body}");
    }
    for (body, field) in [
        ("ebpf: {mapSizes: {services: 0}}", "ebpf.mapSizes.services"),
        ("ebpf: {attachMode: xdp}", "ebpf.attachMode"),
        ("ebpf: {interfaces: ['a*b']}", "ebpf.interfaces"),
    ] {
        assert!(complaint(&format!("{OWN}{body}\n")).contains(field), "{body}");
    }
    assert!(try_load(&["--hostname-override=a b"]).unwrap_err().to_string().contains("hostnameOverride"));
}

#[test]
fn a_file_of_another_kind_or_no_file_is_refused() {
    assert!(complaint("kind: KubeProxyConfiguration\n").contains("field apiVersion"));
    assert!(complaint("apiVersion: trama.dev/v1alpha1\nkind: Other\n").contains("field kind"));
    assert!(
        complaint("apiVersion: kubeproxy.config.k8s.io/v1alpha2\nkind: KubeProxyConfiguration\n").contains("v1alpha1")
    );
    assert!(complaint("a: [1").contains("not valid YAML"));
    assert!(complaint("").contains("config.yaml"));
    assert!(try_load(&["--config=/nonexistent/p.yaml"]).unwrap_err().to_string().contains("/nonexistent/p.yaml"));
}

#[test]
fn direct_server_return_is_asked_for_by_name() {
    let config = load(&["--proxy-mode=ebpf", "--forwarding=hybrid", "--dsr-tunnel=gue", "--dsr-interfaces=eth1,bond*"]);
    assert_eq!(config.node.forwarding, crate::model::Forwarding::Hybrid);
    assert!(config.ebpf.tunnels_are_gue);
    assert_eq!((config.ebpf.tunnel_interfaces, config.warnings), (vec!["eth1".to_owned(), "bond*".to_owned()], vec![]));
    for (flag, complaint) in [
        ("--forwarding=fast", "ebpf.directReturn.forwarding: \"fast\" is none of snat, dsr and hybrid"),
        ("--dsr-tunnel=vxlan", "ebpf.directReturn.tunnel: \"vxlan\" is neither ipip nor gue"),
    ] {
        assert_eq!(try_load(&[flag]).unwrap_err().to_string(), complaint);
    }
    let elsewhere = load(&["--proxy-mode=nftables", "--forwarding=dsr"]).warnings;
    assert_eq!(elsewhere, ["ebpf.directReturn.forwarding has no effect: mode nftables masquerades"]);
}

#[test]
fn every_field_without_effect_is_named() {
    let text = format!(
        "{KUBE_PROXY}featureGates: {{A: true, B: false}}\nenableProfiling: true\nshowHiddenMetricsForVersion: '1.35'\n\
         portRange: 1-2\nwindowsRunAsService: true\nconfigSyncPeriod: 1m\n\
         clientConnection: {{acceptContentTypes: a, contentType: application/vnd.kubernetes.protobuf}}\n\
         winkernel: {{networkName: a, sourceVip: b, enableDSR: true, rootHnsEndpointName: c, forwardHealthCheckVip: true}}\n\
         logging: {{flushFrequency: 1s, vmodule: [{{filePattern: a, verbosity: 1}}], options: {{text: {{splitStream: true}}, json: {{infoBufferSize: 5}}}}}}\n"
    );
    let warnings = load_file(&text).warnings;
    let names: Vec<_> = warnings.iter().filter_map(|warning| warning.split(" has no effect: ").next()).collect();
    let expect = [
        "clientConnection.acceptContentTypes",
        "clientConnection.contentType",
        "featureGates",
        "configSyncPeriod",
        "enableProfiling",
        "showHiddenMetricsForVersion",
        "portRange",
        "windowsRunAsService",
        "winkernel.networkName",
        "winkernel.sourceVip",
        "winkernel.enableDSR",
        "winkernel.rootHnsEndpointName",
        "winkernel.forwardHealthCheckVip",
        "logging.flushFrequency",
        "logging.vmodule",
        "logging.options.text.splitStream",
        "logging.options.json.infoBufferSize",
    ];
    assert_eq!(names, expect);
    assert!(warnings[2].contains("A, B"));
    let by_flag = load(&["--feature-gates=A=true,B=false", "--profiling", "--config-sync-period=1s"]).warnings;
    assert_eq!(by_flag.len(), 3, "{by_flag:?}");
}

#[test]
fn what_is_written_is_read_back_and_shown_under_kube_proxys_key() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("written.yaml");
    let config = load(&["--cluster-cidr=10.0.0.0/8", "--conntrack-udp-timeout=90s", "--max-flows=9"]);
    config.effective.write(&path).unwrap();
    let again = try_load(&["--config", path.to_str().unwrap()]).unwrap();
    assert_eq!(again.effective, config.effective);
    let configz = config.effective.configz();
    let shown = &configz["kubeproxy.config.k8s.io"];
    assert_eq!(shown["kind"], "KubeProxyConfiguration");
    assert_eq!((&shown["clusterCIDR"], &shown["conntrack"]["udpTimeout"]), (&"10.0.0.0/8".into(), &"1m30s".into()));
    assert_eq!(configz["trama.dev"]["ebpf"]["mapSizes"]["flows"], 9);
    // Every field that kubeadm writes is shown, under the same name.
    let kubeadm: Value = serde_saphyr::from_str(KUBEADM).unwrap();
    let missing: Vec<_> = paths(&kubeadm, "").into_iter().filter(|path| shown.pointer(path).is_none()).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

fn paths(value: &Value, place: &str) -> Vec<String> {
    match value.as_object() {
        Some(fields) => fields.iter().flat_map(|(name, value)| paths(value, &format!("{place}/{name}"))).collect(),
        None => vec![place.to_owned()],
    }
}

#[test]
fn finds_the_cgroup2_mount() {
    let mounts =
        "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
    assert_eq!(cgroup_mount(mounts), Some("/sys/fs/cgroup".into()));
    assert_eq!(cgroup_mount("proc /proc proc rw 0 0\n"), None);
}
