//! A whole cluster on one machine: the API server, one trama-proxy per node, and Pods that run, each as the user would start it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::Client;
use kube::api::DynamicObject;
use kube::client::ConfigExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use node_sys::Placement;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::task::AbortHandle;
use tower::ServiceBuilder;

use crate::agent::Agent;
use crate::daemon::Daemon;
use crate::metrics::{Samples, http_get, parse};
use crate::{Node, Place, Topology, binary, manifest, relay, wait_for};

/// The ranges that pods of every node come from.
pub const CLUSTER_CIDRS: &str = "10.244.0.0/16,fd00:10:244::/56";
/// Where trama-proxy says whether it is healthy, on its node.
const HEALTH: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10256);
/// Where trama-proxy counts, on its node.
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
/// Descriptors that are left to a process whose maps are not to grow: enough for some of the larger maps, not for all.
const SPARE_FILES: u64 = 40;
/// When the kernel was first programmed, in seconds since 1970; 0 before.
const FIRST_SYNC: &str = "trama_first_sync_timestamp_seconds";
/// How long a program may take to be ready, on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// What kind of cluster to start.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// The lab's id; `None` draws one of its own, so that clusters run side by side.
    pub id: Option<String>,
    /// Number of nodes.
    pub nodes: u8,
    /// Port of the API server on 127.0.0.1; `None` takes a free one.
    pub port: Option<u16>,
    /// Whether trama-proxy is started; else [`Cluster::restart_proxy`] starts it.
    pub proxies: bool,
    /// More arguments of every trama-proxy.
    pub proxy_arguments: &'static [&'static str],
    /// Called with a short sentence before each step that takes time.
    pub progress: fn(&str),
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self { id: None, nodes: 2, port: None, proxies: true, proxy_arguments: &[], progress: |_| {} }
    }
}

/// A running cluster. Dropping it ends its programs and removes its lab.
pub struct Cluster {
    // Fields are dropped in this order: clients before servers, and the lab's namespaces last.
    runtime: Runtime,
    agent: Agent,
    client: Client,
    proxies: Vec<Mutex<Option<Daemon>>>,
    proxy_arguments: &'static [&'static str],
    apiserver: Apiserver,
    kubeconfig: PathBuf,
    topology: Topology,
}

/// The API server and the ways to it, one a node.
struct Apiserver {
    _daemon: Daemon,
    port: u16,
    relays: Mutex<Vec<AbortHandle>>,
}

impl Cluster {
    /// Starts a cluster; it is ready when this returns: nodes are registered and every trama-proxy is healthy.
    ///
    /// # Errors
    /// When the port is busy, a program is not built or does not get ready; nothing is left then.
    pub fn start(options: &ClusterOptions) -> Result<Self> {
        let port = options.port.map_or_else(free_port, check_port)?;
        (options.progress)("making namespaces, links and cgroups");
        let topology = match &options.id {
            Some(id) => Topology::with_id(id, options.nodes)?,
            None => Topology::new(options.nodes)?,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.context("cannot start a tokio runtime")?;
        (options.progress)("starting apiserver-lite");
        let (mut apiserver, kubeconfig) = start_apiserver(&topology, port)?;
        let client = wait_for_apiserver(&runtime, &mut apiserver, &kubeconfig)?;
        (options.progress)("registering the nodes");
        let agent = Agent::new(client.clone(), topology.nodes().into());
        runtime.block_on(agent.register_nodes())?;
        runtime.spawn(agent.clone().follow_pods());
        let relays = {
            let _inside = runtime.enter();
            topology.nodes().iter().map(|node| relay::start(node.netns(), port)).collect::<Result<Vec<_>>>()?
        };
        let proxies = topology.nodes().iter().map(|_| Mutex::default()).collect();
        let proxy_arguments = options.proxy_arguments;
        let apiserver = Apiserver { _daemon: apiserver, port, relays: Mutex::new(relays) };
        let cluster = Self { runtime, agent, client, proxies, proxy_arguments, apiserver, kubeconfig, topology };
        if options.proxies {
            (options.progress)("starting trama-proxy on every node");
            cluster.start_proxies()?;
        }
        Ok(cluster)
    }

    /// Starts a cluster of two nodes with an id and a port of its own.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub fn new() -> Result<Self> {
        Self::start(&ClusterOptions::default())
    }

    /// The nodes, the client and the switch.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The administrator's kubeconfig; it works on the machine and on every node.
    pub fn kubeconfig(&self) -> &PathBuf {
        &self.kubeconfig
    }

    /// An administrator's client; use it inside [`Cluster::block_on`].
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Runs a future on the cluster's runtime, so that requests with [`Cluster::client`] are served.
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Runs a future beside everything else until the cluster is dropped.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(work);
    }

    /// Whether the EndpointSlices of every Service with a selector name exactly the Pods that run and match it.
    ///
    /// # Errors
    /// When the API server does not list.
    pub fn slices_are_complete(&self) -> Result<bool> {
        self.block_on(crate::slices::are_complete(&self.client))
    }

    /// Applies an object as `kubectl apply` would.
    ///
    /// # Errors
    /// When it is no Kubernetes object or the API server refuses it.
    pub fn apply(&self, object: Value) -> Result<()> {
        let object: DynamicObject = serde_json::from_value(object).context("not a Kubernetes object")?;
        self.block_on(manifest::apply(&self.client, &object))
    }

    /// Deletes an object by its apiVersion, kind, namespace and name. One that is not there is no error.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn delete(&self, object: Value) -> Result<()> {
        let object: DynamicObject = serde_json::from_value(object).context("not a Kubernetes object")?;
        self.block_on(manifest::delete(&self.client, &object))
    }

    /// A client in the Pod `namespace/name`, inside its node's cgroup; waits until the Pod runs.
    ///
    /// # Errors
    /// When it does not run in time.
    pub fn place_in_pod(&self, key: &str) -> Result<Place> {
        wait_for(&format!("the start of pod {key}"), READY_LIMIT, || {
            let pods = self.agent.pods().lock().unwrap_or_else(PoisonError::into_inner);
            Ok(pods.get(key).map(|(_, pod)| pod.place()))
        })
    }

    /// Name of the interface on its node that the running Pod `namespace/name` is wired to.
    pub fn host_interface(&self, key: &str) -> Option<String> {
        let pods = self.agent.pods().lock().unwrap_or_else(PoisonError::into_inner);
        pods.get(key).map(|(_, pod)| pod.host_interface().to_owned())
    }

    /// Addresses of the running Pod `namespace/name`: IPv4, IPv6.
    pub fn pod_addresses(&self, key: &str) -> Option<[std::net::IpAddr; 2]> {
        let pods = self.agent.pods().lock().unwrap_or_else(PoisonError::into_inner);
        pods.get(key).map(|(_, pod)| pod.addresses())
    }

    /// Name of the running Pod with this address.
    pub fn pod_at(&self, address: std::net::IpAddr) -> Option<String> {
        let pods = self.agent.pods().lock().unwrap_or_else(PoisonError::into_inner);
        pods.values().find(|(_, pod)| pod.addresses().contains(&address)).map(|(_, pod)| pod.name().to_owned())
    }

    /// What trama-proxy on `node-NUMBER` counts.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn metrics(&self, number: usize) -> Result<Samples> {
        Ok(parse(&http_get(self.topology.node(number)?.netns(), METRICS, "/metrics")?))
    }

    /// Takes the API server away from every node: connections to it are closed, and new ones refused. It keeps its state meanwhile.
    ///
    /// # Errors
    /// When a node's port stays open.
    pub fn take_apiserver_away(&self) -> Result<()> {
        self.relays().drain(..).for_each(|relay| relay.abort());
        let is_away =
            |node: &Node| node.netns().run(|| TcpStream::connect((Ipv4Addr::LOCALHOST, self.apiserver.port)).is_err());
        wait_for("the API server being away", READY_LIMIT, || {
            let away = self.topology.nodes().iter().map(|node| is_away(node)).collect::<Result<Vec<_>, _>>()?;
            Ok(away.iter().all(|away| *away).then_some(()))
        })
    }

    /// Gives it back.
    ///
    /// # Errors
    /// When its port is in use on a node.
    pub fn give_apiserver_back(&self) -> Result<()> {
        let _inside = self.runtime.enter();
        let start = |node: &std::sync::Arc<Node>| relay::start(node.netns(), self.apiserver.port);
        *self.relays() = self.topology.nodes().iter().map(start).collect::<Result<_>>()?;
        Ok(())
    }

    fn relays(&self) -> MutexGuard<'_, Vec<AbortHandle>> {
        self.apiserver.relays.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills trama-proxy on `node-NUMBER` with SIGKILL, and leaves everything that it put into the kernel.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill_proxy(&self, number: usize) -> Result<()> {
        let mut proxy = self.proxy(number)?.take().with_context(|| format!("no trama-proxy runs on node-{number}"))?;
        proxy.kill()
    }

    /// Starts trama-proxy on `node-NUMBER`, in place of one that runs, and waits until it has programmed the kernel. That it is
    /// healthy says less: it is so from its start, while its predecessor's programs still see the packets.
    ///
    /// # Errors
    /// When it does not get so far.
    pub fn restart_proxy(&self, number: usize) -> Result<()> {
        self.restart_proxy_with(number, self.proxy_arguments)
    }

    /// As [`Cluster::restart_proxy`], with these arguments instead of those of the options.
    ///
    /// # Errors
    /// As there.
    pub fn restart_proxy_with(&self, number: usize, more: &[&str]) -> Result<()> {
        self.restart_proxy_as(number, &mut self.proxy_command(number, more)?)
    }

    /// As [`Cluster::restart_proxy`], with a trama-proxy of this command.
    ///
    /// # Errors
    /// As there.
    pub fn restart_proxy_as(&self, number: usize, command: &mut Command) -> Result<()> {
        self.start_other_proxy(number, command)?;
        self.wait_for_proxy(number)?;
        wait_for(&format!("the first sync of trama-proxy {number}"), READY_LIMIT, || {
            if let Some(proxy) = self.proxy(number)?.as_mut() {
                proxy.check()?;
            }
            // One that is busy with its first sync may not answer in time.
            let samples = self.metrics(number).unwrap_or_default();
            Ok(samples.get(FIRST_SYNC).filter(|at| **at > 0.0).map(|_| ()))
        })
    }

    /// Starts trama-proxy on `node-NUMBER`, in place of one that runs, and does not wait.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start_proxy(&self, number: usize) -> Result<()> {
        self.start_proxy_with(number, self.proxy_arguments)
    }

    /// As [`Cluster::start_proxy`], with these arguments instead of those of the options.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start_proxy_with(&self, number: usize, more: &[&str]) -> Result<()> {
        self.start_other_proxy(number, &mut self.proxy_command(number, more)?)
    }

    /// Runs `command` on `node-NUMBER` where trama-proxy would run, in place of what runs there.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start_other_proxy(&self, number: usize, command: &mut Command) -> Result<()> {
        let node = self.topology.node(number)?;
        let mut slot = self.proxy(number)?;
        // The old one has to be gone before the new one listens on its ports.
        drop(slot.take());
        let place = Placement { netns: Some(node.netns()), cgroup: None };
        *slot = Some(Daemon::start(&node.claim, &format!("proxy-{}", node.name()), command, place)?);
        Ok(())
    }

    /// How trama-proxy is started on `node-NUMBER`, with `more` arguments.
    ///
    /// # Errors
    /// When it is not built.
    pub fn proxy_command(&self, number: usize, more: &[&str]) -> Result<Command> {
        self.proxy_command_of("trama-proxy", number, more)
    }

    /// As [`Cluster::proxy_command`], of another build of it.
    ///
    /// # Errors
    /// As there.
    pub fn proxy_command_of(&self, program: &str, number: usize, more: &[&str]) -> Result<Command> {
        let node = self.topology.node(number)?;
        let mut command = Command::new(binary(program)?);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(["--hostname-override", node.name()]);
        command.args(["--cluster-cidr", CLUSTER_CIDRS]);
        command.arg("--cgroup").arg(node.cgroup().path()).arg("--bpffs").arg(node.bpffs());
        command.args(["--healthz-bind-address", "0.0.0.0:10256", "--metrics-bind-address", "127.0.0.1:10249"]);
        command.args(more);
        Ok(command)
    }

    /// Where the cluster's files are; removed with it.
    pub fn folder(&self) -> PathBuf {
        self.topology.claim().folder()
    }

    /// Process id of trama-proxy on `node-NUMBER`.
    ///
    /// # Errors
    /// When it does not run.
    pub fn proxy_pid(&self, number: usize) -> Result<u32> {
        let proxy = self.proxy(number)?;
        Ok(proxy.as_ref().with_context(|| format!("no trama-proxy runs on node-{number}"))?.pid())
    }

    /// Keeps the maps of the trama-proxy on `node-NUMBER` at the size that they have: it may open too few descriptors for larger ones.
    ///
    /// # Errors
    /// As with [`Cluster::proxy_pid`].
    pub fn keep_maps_from_growing(&self, number: usize) -> Result<()> {
        let pid = self.proxy_pid(number)?;
        let files = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
        Ok(node_sys::limit_open_files(pid, files + SPARE_FILES)?)
    }

    fn start_proxies(&self) -> Result<()> {
        (1..=self.proxies.len()).try_for_each(|number| self.start_proxy(number))?;
        (1..=self.proxies.len()).try_for_each(|number| self.wait_for_proxy(number))
    }

    fn proxy(&self, number: usize) -> Result<MutexGuard<'_, Option<Daemon>>> {
        let proxy = number.checked_sub(1).and_then(|index| self.proxies.get(index));
        let proxy = proxy.with_context(|| format!("the cluster has no node-{number}"))?;
        Ok(proxy.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn wait_for_proxy(&self, number: usize) -> Result<()> {
        let node = self.topology.node(number)?;
        wait_for(&format!("trama-proxy on {} being healthy", node.name()), READY_LIMIT, || {
            if let Some(proxy) = self.proxy(number)?.as_mut() {
                proxy.check()?;
            }
            Ok(http_get(node.netns(), HEALTH, "/healthz").is_ok().then_some(()))
        })
    }
}

fn start_apiserver(topology: &Topology, port: u16) -> Result<(Daemon, PathBuf)> {
    let folder = topology.claim().folder().join("apiserver");
    let kubeconfig = topology.claim().folder().join("kubeconfig");
    let mut command = Command::new(binary("apiserver-lite")?);
    command.args(["--bind-address", "127.0.0.1", "--secure-port", &port.to_string()]);
    command.arg("--data-dir").arg(&folder).arg("--write-kubeconfig").arg(&kubeconfig);
    let daemon = Daemon::start(topology.claim(), "apiserver-lite", &mut command, Placement::default())?;
    Ok((daemon, kubeconfig))
}

fn wait_for_apiserver(runtime: &Runtime, apiserver: &mut Daemon, kubeconfig: &PathBuf) -> Result<Client> {
    wait_for("apiserver-lite being ready", READY_LIMIT, || {
        apiserver.check()?;
        if !kubeconfig.exists() {
            return Ok(None);
        }
        runtime.block_on(async {
            let Ok(client) = client_from(kubeconfig).await else { return Ok(None) };
            let request = http::Request::get("/readyz").body(Vec::new()).context("a request that cannot be built")?;
            Ok(client.request_text(request).await.is_ok().then_some(client))
        })
    })
}

async fn client_from(kubeconfig: &PathBuf) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    // kube's own client leaves Nagle's algorithm on: the body of a request then waits up to 40 ms for the header's acknowledgement.
    connector.set_nodelay(true);
    let connector = config.rustls_https_connector_with_connector(connector)?;
    let service = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(connector);
    let service = ServiceBuilder::new().layer(config.base_uri_layer()).service(service);
    Ok(Client::new(service, config.default_namespace))
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot find a free port on 127.0.0.1")?;
    Ok(listener.local_addr().context("cannot find a free port on 127.0.0.1")?.port())
}

fn check_port(port: u16) -> Result<u16> {
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Ok(_) => Ok(port),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            bail!("port {port} on 127.0.0.1 is busy: the API server needs it; `ss -ltnp` shows who has it")
        }
        Err(error) => Err(error).with_context(|| format!("cannot listen on 127.0.0.1:{port}")),
    }
}
