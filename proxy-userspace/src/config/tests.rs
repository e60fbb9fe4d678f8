use clap::Parser;

use super::*;

const HEAD: &str = "apiVersion: trama.dev/v1alpha1\nkind: ProxyConfiguration\n";

fn parse(body: &str) -> Result<ProxyConfiguration, ConfigError> {
    ProxyConfiguration::parse(&format!("{HEAD}{body}"), Path::new("/etc/p.yaml"))
}

/// The sentence for a file that is wrong.
fn complaint(body: &str) -> String {
    let error = parse(body).and_then(|config| {
        let mut config = config;
        config.ebpf.cgroup.get_or_insert_with(|| "/sys/fs/cgroup".into());
        Config::check(config)
    });
    let text = error.expect_err(body).to_string();
    assert_eq!(text.lines().count(), 1, "one sentence: {text}");
    text
}

fn load(arguments: &[&str]) -> Config {
    let all = ["trama-proxy", "--cgroup", "/c", "--hostname-override", "Node1"].iter().chain(arguments);
    Config::load(&Flags::try_parse_from(all).unwrap()).unwrap()
}

#[test]
fn defaults() {
    let config = load(&[]);
    assert_eq!(config.node_name, "node1");
    assert_eq!(config.healthz_address, Some("0.0.0.0:10256".parse().unwrap()));
    assert_eq!(config.metrics_address, Some("127.0.0.1:10249".parse().unwrap()));
    assert_eq!(config.node.node_port_addresses, NodePortAddresses::Networks(Vec::new()));
    assert_eq!(config.node.pod_detection, PodDetection::ClusterCidr(Vec::new()));
    assert_eq!(config.ebpf.bpffs, Path::new("/sys/fs/bpf"));
    let sizes = (config.ebpf.max_services, config.ebpf.max_endpoints, config.ebpf.max_flows);
    assert_eq!(sizes, (65_536, 262_144, 262_144));
    assert_eq!(config.kubeconfig, None);
}

#[test]
fn flags_go_before_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    let body =
        "clusterCIDR: 10.0.0.0/8\nmasqueradeAll: true\nebpf:\n  mapSizes: {services: 10}\n  interfaces: [eth*]\n";
    fs::write(&path, format!("{HEAD}{body}")).unwrap();
    let file = path.to_str().unwrap();
    let config = load(&["--config", file]);
    assert!(config.node.masquerade_all);
    assert_eq!((config.ebpf.max_services, &config.ebpf.interfaces[..]), (10, &["eth*".to_owned()][..]));
    let over = [
        "--config",
        file,
        "--masquerade-all=false",
        "--max-services=20",
        "--interfaces=",
        "--cluster-cidr=10.1.2.3/16,fd00::/64",
    ];
    let config = load(&over);
    assert!(!config.node.masquerade_all);
    assert_eq!((config.ebpf.max_services, config.ebpf.interfaces.len()), (20, 0));
    let networks = vec!["10.1.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()];
    assert_eq!(config.node.pod_detection, PodDetection::ClusterCidr(networks));
}

#[test]
fn addresses_to_listen_on() {
    assert_eq!(load(&["--healthz-bind-address="]).healthz_address, None);
    assert_eq!(load(&["--metrics-bind-address=[::]:1"]).metrics_address, Some("[::]:1".parse().unwrap()));
    assert_eq!(load(&["--metrics-bind-address=10.0.0.1"]).metrics_address, Some("10.0.0.1:10249".parse().unwrap()));
    assert_eq!(load(&["--healthz-bind-address=::1"]).healthz_address, Some("[::1]:10256".parse().unwrap()));
}

#[test]
fn a_wrong_file_is_one_sentence_that_names_the_field() {
    let cases = [
        ("clusterCidr: 10.0.0.0/8", "clusterCidr"),
        ("masqueradeAll: maybe", "masqueradeAll"),
        ("ebpf: {mapSizes: {services: many}}", "ebpf.mapSizes.services"),
        ("ebpf: {mapSizes: {services: 0}}", "ebpf.mapSizes.services"),
        ("ebpf: {mapSizes: {flows: -1}}", "ebpf.mapSizes.flows"),
        ("ebpf: {attachMode: xdp}", "ebpf.attachMode"),
        ("ebpf: {interfaces: ['a*b']}", "ebpf.interfaces"),
        ("mode: ipchains", "mode"),
        ("clusterCIDR: 10.0.0.0", "clusterCIDR"),
        ("detectLocalMode: BridgeInterface", "detectLocalMode"),
        ("nodePortAddresses: [primary, 10.0.0.0/8]", "nodePortAddresses"),
        ("nodePortAddresses: 10.0.0.0/8", "nodePortAddresses"),
        ("healthzBindAddress: here", "healthzBindAddress"),
        ("hostnameOverride: 'a b'", "hostnameOverride"),
    ];
    for (body, field) in cases {
        assert!(complaint(body).contains(field), "{body}: {}", complaint(body));
    }
}

#[test]
fn a_file_of_another_kind_or_no_file_is_refused() {
    let path = Path::new("/etc/p.yaml");
    let sentence = |text: &str| ProxyConfiguration::parse(text, path).unwrap_err().to_string();
    assert!(sentence("kind: ProxyConfiguration").contains("apiVersion"));
    assert!(sentence("apiVersion: trama.dev/v1alpha1\nkind: Other").contains("field kind"));
    assert!(sentence("a: [1").contains("not valid YAML"));
    assert_eq!(sentence("a: [1").lines().count(), 1);
    assert!(sentence("").contains("/etc/p.yaml"));
    let missing = ProxyConfiguration::read(Path::new("/nonexistent/p.yaml")).unwrap_err().to_string();
    assert!(missing.contains("/nonexistent/p.yaml"));
}

#[test]
fn finds_the_cgroup2_mount() {
    let mounts =
        "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
    assert_eq!(cgroup_mount(mounts), Some("/sys/fs/cgroup".into()));
    assert_eq!(cgroup_mount("proc /proc proc rw 0 0\n"), None);
}

#[test]
fn the_effective_configuration_can_be_written_and_read_again() {
    let config = load(&["--cluster-cidr=10.0.0.0/8"]).effective;
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<ProxyConfiguration>(&text).unwrap(), config);
}
