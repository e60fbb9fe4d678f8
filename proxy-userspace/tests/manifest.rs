//! The manifest under `examples/install` is what the program needs, and no more: checked against the program itself.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "what a test prepares fails by panicking, like the test"
)]

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Container, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use trama_proxy::config::{Config, Flags, Mode};

fn documents() -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/install/trama-proxy.yaml");
    serde_saphyr::from_multiple(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The object of a kind; every field that is written is one that Kubernetes knows.
fn object<T: DeserializeOwned + Serialize>(kind: &str) -> T {
    let document = documents().into_iter().find(|document| document["kind"] == kind).unwrap();
    let object: T = serde_json::from_value(document.clone()).unwrap();
    assert_eq!(serde_json::to_value(&object).unwrap(), document, "a field of {kind} is not known");
    object
}

fn daemon_set() -> DaemonSet {
    object("DaemonSet")
}

fn container() -> Container {
    let mut containers = daemon_set().spec.unwrap().template.spec.unwrap().containers;
    assert_eq!(containers.len(), 1);
    containers.remove(0)
}

/// The program's configuration as it is inside of the pod.
fn config(directory: &Path) -> Config {
    let text = object::<ConfigMap>("ConfigMap").data.unwrap()["config.yaml"].clone();
    let file: PathBuf = directory.join("config.yaml");
    std::fs::write(&file, text).unwrap();
    let arguments = container().args.unwrap().into_iter().map(|argument| {
        let local = argument.replace("/etc/trama-proxy/config.yaml", file.to_str().unwrap());
        OsString::from(local.replace("$(NODE_NAME)", "node-1"))
    });
    let command = container().command.unwrap().into_iter().map(OsString::from);
    Config::load(&Flags::read(command.chain(arguments)).unwrap()).unwrap()
}

#[test]
fn the_configuration_is_accepted_without_a_warning() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path());
    assert_eq!((config.node_name.as_str(), config.mode), ("node-1", Mode::Auto));
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
    let mounted: Vec<_> =
        container().volume_mounts.unwrap().into_iter().map(|mount| PathBuf::from(mount.mount_path)).collect();
    assert!(mounted.contains(&config.ebpf.cgroup) && mounted.contains(&config.ebpf.bpffs), "{mounted:?}");
}

#[test]
fn probes_ask_the_port_that_is_served_on_the_nodes_network() {
    let directory = tempfile::tempdir().unwrap();
    let port = i32::from(config(directory.path()).healthz_address.unwrap().port());
    let container = container();
    let probe = |probe: Option<k8s_openapi::api::core::v1::Probe>| probe.unwrap().http_get.unwrap();
    let (live, ready) = (probe(container.liveness_probe), probe(container.readiness_probe));
    assert_eq!((live.path.as_deref(), ready.path.as_deref()), (Some("/livez"), Some("/healthz")));
    for probe in [live, ready] {
        assert_eq!(probe.port, k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::Int(port));
    }
    assert_eq!(daemon_set().spec.unwrap().template.spec.unwrap().host_network, Some(true));
}

#[test]
fn the_role_allows_what_is_asked_of_the_api_and_nothing_else() {
    let mut allowed = BTreeSet::new();
    for rule in object::<ClusterRole>("ClusterRole").rules.unwrap() {
        for group in rule.api_groups.unwrap() {
            for resource in rule.resources.as_ref().unwrap() {
                for verb in &rule.verbs {
                    allowed.insert(format!("{verb} {resource}.{group}"));
                }
            }
        }
    }
    let watched = ["services.", "nodes.", "endpointslices.discovery.k8s.io", "servicecidrs.networking.k8s.io"];
    let watches = watched.iter().flat_map(|resource| ["list", "watch"].map(|verb| format!("{verb} {resource}")));
    let events = ["create", "patch"].map(|verb| format!("{verb} events.events.k8s.io"));
    assert_eq!(allowed, watches.chain(events).collect());
    let account = object::<ServiceAccount>("ServiceAccount").metadata;
    let binding = object::<ClusterRoleBinding>("ClusterRoleBinding");
    let subject = binding.subjects.unwrap().remove(0);
    assert_eq!((Some(subject.name), subject.namespace), (account.name.clone(), account.namespace));
    assert_eq!(daemon_set().spec.unwrap().template.spec.unwrap().service_account_name, account.name);
}

#[test]
fn the_container_has_no_privilege_beyond_its_capabilities() {
    let context = container().security_context.unwrap();
    assert_eq!((context.privileged, context.allow_privilege_escalation), (Some(false), Some(false)));
    assert_eq!(context.read_only_root_filesystem, Some(true));
    let capabilities = context.capabilities.unwrap();
    assert_eq!(capabilities.drop.unwrap(), ["ALL"]);
    assert_eq!(capabilities.add.unwrap(), ["BPF", "NET_ADMIN", "PERFMON", "SYS_ADMIN", "SYS_PTRACE"]);
    let pod = daemon_set().spec.unwrap().template.spec.unwrap();
    assert_eq!(pod.host_pid, Some(true), "the last two are of use only where the pods' processes are seen");
}
