//! Where a client stands: the network namespace decides its addresses and routes, the cgroup which socket programs it meets.

use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use node_sys::{Cgroup, Netns, Placement};

use crate::{Claim, Outcome, Probe, binary};

/// A place to send traffic from.
#[derive(Debug, Clone)]
pub struct Place {
    pub(crate) claim: Arc<Claim>,
    pub(crate) netns: Arc<Netns>,
    pub(crate) cgroup: Option<Cgroup>,
}

impl Place {
    /// The same namespace without the node's cgroup: its sockets meet no socket program, its packets take the packet path.
    pub fn outside_cgroup(&self) -> Self {
        Self { cgroup: None, ..self.clone() }
    }

    /// The network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The cgroup; `None` stands outside of every node.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// Asks up to `count` times, one question after the other: [`Probe::ask_times`].
    ///
    /// # Errors
    /// When the client cannot be started; questions that fail are among the outcomes.
    pub fn probe_times(&self, probe: Probe, count: usize) -> Result<Vec<Outcome>> {
        match &self.cgroup {
            // Threads share their process's cgroup: only a process of its own stands in another one.
            Some(_) => self.probe_in_process(probe, count),
            None => Ok(self.netns.run(|| probe.ask_times(count))?),
        }
    }

    /// Asks once.
    ///
    /// # Errors
    /// When the client cannot be started.
    pub fn probe(&self, probe: Probe) -> Result<Outcome> {
        let outcome = self.probe_times(probe, 1)?.pop();
        outcome.context("the client ended without an outcome")
    }

    /// Opens a TCP connection that the caller keeps. Only outside of a cgroup, as the socket is this process's own.
    ///
    /// # Errors
    /// When the connection fails within `timeout`.
    pub fn connect(&self, target: SocketAddr, timeout: Duration) -> Result<TcpStream> {
        ensure!(
            self.cgroup.is_none(),
            "a kept connection belongs to this process, which is outside of every node's cgroup"
        );
        let stream = self.netns.run(|| TcpStream::connect_timeout(&target, timeout))?;
        stream.with_context(|| format!("cannot connect to {target} from {}", self.netns.label()))
    }

    /// A process in this place; it ends with the lab.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Result<std::process::Child> {
        self.claim.spawn(command, Placement { netns: Some(&self.netns), cgroup: self.cgroup.as_ref() })
    }

    fn probe_in_process(&self, probe: Probe, count: usize) -> Result<Vec<Outcome>> {
        let mut command = Command::new(binary("trama-lab")?);
        command.args(["probe", "--target", &probe.target.to_string(), "--count", &count.to_string()]);
        command.args(["--transport", transport_name(&probe), "--timeout-ms", &probe.timeout.as_millis().to_string()]);
        let child = self.spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        let output = child.wait_with_output().context("cannot wait for the client")?;
        ensure!(output.status.success(), "the client ended with {}", output.status);
        let lines = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| serde_json::from_slice(line).context("cannot read the client's outcome")).collect()
    }
}

fn transport_name(probe: &Probe) -> &'static str {
    match probe.transport {
        crate::Transport::Tcp => "tcp",
        crate::Transport::Udp => "udp",
        crate::Transport::UdpTwice => "udp-twice",
        crate::Transport::UdpConnected => "udp-connected",
    }
}
