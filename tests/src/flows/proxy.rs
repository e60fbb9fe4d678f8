//! The program under test, started on a scenario's node as its user would start it.

use std::fmt;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use node_sys::Placement;
use serde_json::json;

use super::scenario::{DetectLocal, Scenario};
use super::world::World;
use crate::metrics::{Samples, http_get, parse};
use crate::{Daemon, binary, wait_for};

/// Where proxies count.
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
/// How long a proxy may take until everything is programmed, on a busy machine.
const PROGRAMMED_LIMIT: Duration = Duration::from_secs(120);
const LAST_SYNC: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";
const LAST_QUEUED: &str = "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds";

/// What decides about flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    /// The decisions alone, without a kernel.
    Model,
    /// The kernel through eBPF.
    Ebpf,
    /// The kernel through nftables.
    Nftables,
    /// The kernel through iptables.
    Iptables,
    /// The kernel through IPVS.
    Ipvs,
}

impl Backend {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Model, Self::Ebpf, Self::Nftables, Self::Iptables, Self::Ipvs];

    /// Whether this kernel can carry it. Modules that are not loaded yet count as missing.
    pub fn is_in_this_kernel(self) -> bool {
        self != Self::Ipvs || Path::new("/proc/net/ip_vs").exists()
    }

    /// Its name, which is the proxy's mode too.
    pub fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Starts the proxy in the backend's mode, and returns it when everything that the API at `api` serves is programmed.
///
/// # Errors
/// When it ends, or is not done in time.
pub(super) fn start(
    world: &World,
    scenario: &Scenario,
    backend: Backend,
    kube_proxy: Option<&Path>,
    api: SocketAddr,
) -> Result<Daemon> {
    let kubeconfig = write_kubeconfig(world, api)?;
    let mut command = match kube_proxy {
        Some(program) => {
            let mut command = Command::new(program);
            command.args([
                "--kube-api-content-type",
                "application/json",
                "--conntrack-max-per-core",
                "0",
                "--conntrack-min",
                "0",
            ]);
            command.args(["--conntrack-tcp-timeout-established", "0s", "--conntrack-tcp-timeout-close-wait", "0s"]);
            command
        }
        None => {
            let mut command = Command::new(binary("trama-proxy")?);
            command.arg("--cgroup").arg(world.cgroup.path()).arg("--bpffs").arg(&world.bpffs);
            // A scenario is small and several run at once: none needs the maps of a large cluster.
            command.args(["--max-services=1024", "--max-endpoints=4096", "--max-flows=16384"]);
            command
        }
    };
    command.arg("--kubeconfig").arg(&kubeconfig).args(["--proxy-mode", backend.name()]);
    command.args(arguments(scenario));
    command.args(["--healthz-bind-address", "0.0.0.0:10256", "--metrics-bind-address", &METRICS.to_string()]);
    let place = Placement { netns: Some(&world.node), cgroup: None };
    let mut daemon = Daemon::start(&world.claim, "proxy", &mut command, place)?;
    wait_for("the proxy having programmed everything", PROGRAMMED_LIMIT, || {
        daemon.check()?;
        // Until it listens there is no answer.
        let Ok(text) = http_get(&world.node, METRICS, "/metrics") else { return Ok(None) };
        Ok(is_programmed(&parse(&text), scenario.config.primary_node_ips.len()).then_some(()))
    })
    .with_context(|| daemon.last_words())?;
    Ok(daemon)
}

/// Both proxies take the same flags for what a scenario configures.
fn arguments(scenario: &Scenario) -> Vec<String> {
    let config = &scenario.config;
    let mut arguments = vec![format!("--hostname-override={}", config.node_name)];
    let joined = |networks: &[ipnet::IpNet]| networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    match &config.detect_local {
        DetectLocal::ClusterCidr(cidrs) if cidrs.is_empty() => {}
        DetectLocal::ClusterCidr(cidrs) => arguments.push(format!("--cluster-cidr={}", joined(cidrs))),
        DetectLocal::NodeCidr(_) => arguments.push("--detect-local-mode=NodeCIDR".to_owned()),
        DetectLocal::Bridge { interface, .. } => {
            arguments.push("--detect-local-mode=BridgeInterface".to_owned());
            arguments.push(format!("--pod-bridge-interface={interface}"));
        }
        DetectLocal::Prefix { prefix, .. } => {
            arguments.push("--detect-local-mode=InterfaceNamePrefix".to_owned());
            arguments.push(format!("--pod-interface-name-prefix={prefix}"));
        }
    }
    // Empty is an answer too: nftables mode asks of "primary" unless it is told that every address answers.
    arguments.push(format!("--nodeport-addresses={}", config.node_port_addresses.join(",")));
    if config.masquerade_all {
        arguments.push("--masquerade-all=true".to_owned());
    }
    arguments
}

fn write_kubeconfig(world: &World, api: SocketAddr) -> Result<PathBuf> {
    let path = world.claim.folder().join("kubeconfig");
    let named = |field: &str, value: serde_json::Value| json!([{ "name": "scenario", field: value }]);
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "scenario",
        "clusters": named("cluster", json!({ "server": format!("http://{api}") })),
        "users": named("user", json!({})),
        "contexts": named("context", json!({ "cluster": "scenario", "user": "scenario" })),
    });
    fs::write(&path, config.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Whether the last sync of each of the `families` ended after it was last asked for, and nothing waits. The proxy's objects never
/// change, and the node is complete before the proxy starts: so this stays true.
fn is_programmed(samples: &Samples, families: usize) -> bool {
    let by_label = |metric: &str| -> Vec<(String, f64)> {
        let matching = samples.iter().filter(|(name, _)| name.split('{').next() == Some(metric));
        matching.map(|(name, value)| (name.replacen(metric, "", 1), *value)).collect()
    };
    let (synced, queued) = (by_label(LAST_SYNC), by_label(LAST_QUEUED));
    let pending = ["service", "endpoint"]
        .iter()
        .flat_map(|kind| by_label(&format!("kubeproxy_sync_proxy_rules_{kind}_changes_pending")));
    let all_done = synced
        .iter()
        .all(|(label, done)| *done > 0.0 && queued.iter().all(|(other, asked)| other != label || asked <= done));
    synced.len() >= families && all_done && pending.into_iter().all(|(_, count)| count == 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_done_when_every_family_is() {
        let check = |text: &str, expect: bool| assert_eq!(is_programmed(&parse(text), 2), expect, "{text}");
        check("", false);
        let synced = |family: &str, time: u32| format!("{LAST_SYNC}{{ip_family=\"{family}\"}} {time}\n");
        let queued = |family: &str, time: u32| format!("{LAST_QUEUED}{{ip_family=\"{family}\"}} {time}\n");
        check(&(synced("IPv4", 5) + &synced("IPv6", 5)), true);
        check(&(synced("IPv4", 5) + &synced("IPv6", 0)), false);
        check(&synced("IPv4", 5), false);
        check(&(synced("IPv4", 5) + &synced("IPv6", 5) + &queued("IPv4", 6)), false);
        check(&(synced("IPv4", 7) + &synced("IPv6", 8) + &queued("IPv4", 6) + &queued("IPv6", 8)), true);
        check(
            &(synced("IPv4", 7) + &synced("IPv6", 7) + "kubeproxy_sync_proxy_rules_endpoint_changes_pending 1\n"),
            false,
        );
    }
}
