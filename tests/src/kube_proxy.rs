//! kube-proxy in the place of trama-proxy, for comparisons: the binary is the caller's.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{CLUSTER_CIDRS, Cluster};

impl Cluster {
    /// How the kube-proxy `program` is started on `node-NUMBER` in `mode`; with `--cleanup` added it removes what it left.
    /// JSON, because the lab's API server speaks it, and conntrack's limits are the machine's; everything else is its default.
    ///
    /// # Errors
    /// When there is no such node, or its configuration can't be written.
    pub fn kube_proxy_command(&self, number: usize, program: &Path, mode: &str) -> Result<Command> {
        let node = self.topology().node(number)?;
        let config = self.folder().join(format!("kube-proxy-{}.yaml", node.name()));
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: {mode}\n\
             clientConnection: {{kubeconfig: {}, contentType: application/json, acceptContentTypes: application/json}}\n\
             clusterCIDR: {CLUSTER_CIDRS}\nhostnameOverride: {}\noomScoreAdj: 0\nconntrack: {{maxPerCore: 0}}\n",
            self.kubeconfig().display(),
            node.name(),
        );
        fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        let mut command = Command::new(program);
        command.arg("--config").arg(config);
        Ok(command)
    }
}
