//! A pod: a namespace wired to its node by trama-cni, a cgroup below the node's, and the echo server that stands for its containers.

use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use node_sys::{Cgroup, Netns};
use trama_cni::PodLink;

use crate::topology::MTU;
use crate::{Node, Place, Probe, Transport, binary, patient};

/// How long a started echo server may take until it answers.
const START_DEADLINE: Duration = Duration::from_secs(10);

/// A pod of a [`Node`]; dropping it removes its link, its namespace and its processes.
#[derive(Debug)]
pub struct Pod {
    node: Arc<Node>,
    name: String,
    netns: Arc<Netns>,
    cgroup: Cgroup,
    host_interface: String,
    host: u8,
    addresses: [IpAddr; 2],
    server: Option<Child>,
}

impl Pod {
    /// Makes a pod without processes on `node`. `name` is unique in the lab: a DNS label, as Kubernetes asks of pods.
    ///
    /// # Errors
    /// When the node has no address left or the kernel refuses a part.
    pub fn create(node: &Arc<Node>, name: &str) -> Result<Self> {
        let (host, addresses) = node.take_pod_host()?;
        let host_interface = trama_cni::host_interface_name(&format!("n{}p{host}", node.number()));
        let made = Self::wire(node, name, &host_interface, &addresses);
        let (netns, cgroup) = made.inspect_err(|_| node.return_pod_host(host))?;
        let name = name.to_owned();
        Ok(Self { node: Arc::clone(node), name, netns, cgroup, host_interface, host, addresses, server: None })
    }

    fn wire(node: &Node, name: &str, host_interface: &str, addresses: &[IpAddr]) -> Result<(Arc<Netns>, Cgroup)> {
        let netns = node.claim.netns(&format!("pod-{name}"))?;
        let link = PodLink { node: node.netns(), pod: &netns, host_interface, addresses, mtu: MTU };
        let wired = trama_cni::attach(&link).map_err(anyhow::Error::from);
        let cgroup = wired.and_then(|()| node.claim.cgroup(&format!("{}/{name}", node.name())));
        // The first error is the one worth reporting; the namespace takes its end of the link with it.
        let cgroup = cgroup.inspect_err(|_| drop(Netns::remove(netns.label())))?;
        Ok((Arc::new(netns), cgroup))
    }

    /// Starts the pod's echo server, which answers with the pod's name, and waits until it does.
    ///
    /// # Errors
    /// When it does not answer within ten seconds.
    pub fn serve(&mut self, tcp_ports: &[u16], udp_ports: &[u16]) -> Result<()> {
        let mut command = Command::new(binary("trama-lab")?);
        command.args(["echo", "--name", &self.name]).stdin(Stdio::null());
        for (option, ports) in [("--tcp", tcp_ports), ("--udp", udp_ports)] {
            if !ports.is_empty() {
                let list: Vec<String> = ports.iter().map(u16::to_string).collect();
                command.args([option, &list.join(",")]);
            }
        }
        self.server = Some(self.place().spawn(&mut command)?);
        let probes = tcp_ports.iter().map(|port| (*port, Transport::Tcp));
        let probes = probes.chain(udp_ports.iter().map(|port| (*port, Transport::Udp)));
        probes.into_iter().try_for_each(|(port, transport)| self.wait_for(port, transport))
    }

    /// Ends the echo server at once, as a crash would. Without one, nothing happens.
    ///
    /// # Errors
    /// When the process cannot be ended.
    pub fn stop_serving(&mut self) -> Result<()> {
        let Some(mut server) = self.server.take() else { return Ok(()) };
        server.kill().context("cannot end the echo server")?;
        server.wait().context("cannot wait for the echo server")?;
        Ok(())
    }

    /// The pod's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The pod's node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// The pod's addresses: IPv4, IPv6.
    pub fn addresses(&self) -> [IpAddr; 2] {
        self.addresses
    }

    /// The node's end of the pod's link.
    pub fn host_interface(&self) -> &str {
        &self.host_interface
    }

    /// A client in the pod, in its cgroup: it meets the node's socket programs.
    pub fn place(&self) -> Place {
        Place { claim: Arc::clone(&self.node.claim), netns: Arc::clone(&self.netns), cgroup: Some(self.cgroup.clone()) }
    }

    fn wait_for(&mut self, port: u16, transport: Transport) -> Result<()> {
        let [address, _] = self.addresses;
        let deadline = Instant::now() + patient(START_DEADLINE);
        let probe = Probe { timeout: Duration::from_millis(100), ..Probe::new((address, port).into(), transport) };
        let place = self.place().outside_cgroup();
        while place.probe(probe)?.is_err() {
            if let Some(status) = self.server.as_mut().and_then(|server| server.try_wait().transpose()).transpose()? {
                bail!("the echo server of {} ended with {status}", self.name);
            }
            if Instant::now() > deadline {
                bail!("the echo server of {} does not answer on port {port}", self.name);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // Whatever cannot be removed here goes with the lab, which also reports it.
        let _ = self.cgroup.remove();
        if let Some(server) = &mut self.server {
            let _ = server.wait();
        }
        let _ = trama_cni::detach(self.node.netns(), &self.host_interface);
        let _ = Netns::remove(self.netns.label());
        self.node.return_pod_host(self.host);
    }
}
