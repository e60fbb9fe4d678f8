//! The process: options to running server, in an order in which a failure leaves nothing half made.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use apiserver_server::{Config, Limits, Server, StartError, TlsError, tls_config};
use apiserver_store::{MemoryLimits, MemoryStore, Revision};
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::kubeconfig::kubeconfig;
use crate::options::{Controllers, Options, OptionsError};
use crate::pki::{Authority, PkiError, prepare};

/// Names under which pods and people reach an API server.
const SERVER_NAMES: [&str; 5] =
    ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"];

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The options contradict each other.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The port can't be had.
    #[error("listening on {address} failed")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Certificates can't be read, made or written.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// Certificates can't be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The cluster can't be brought into its first state.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The controllers can't connect.
    #[error(transparent)]
    Controllers(#[from] apiserver_controllers::ControllersError),
}

/// Runs a server until `stop` resolves. `ready` is called with its URL once it answers.
///
/// # Errors
/// [`AppError`] where it can't start; then no file is left that was not there before.
pub async fn run(options: Options, stop: impl Future<Output = ()>, ready: impl FnOnce(&str)) -> Result<(), AppError> {
    options.check()?;
    let listen = options.listen();
    let failed = |source| AppError::Listen { address: listen, source };
    let listener = TcpListener::bind(listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let made_directory = !options.data_dir.exists();
    let prepared = prepare_server(&options, address).await;
    if prepared.is_err() && made_directory {
        // Only goes when it is empty, and a directory that stays does no harm.
        let _ = std::fs::remove_dir(&options.data_dir);
    }
    let Prepared { server, url, controllers } = prepared?;
    serve(server, listener, stop, || ready(&url), controllers).await
}

/// A server with all its files in place.
struct Prepared {
    server: Server,
    url: String,
    /// The kubeconfig of the controllers, if they are wanted.
    controllers: Option<String>,
}

async fn prepare_server(options: &Options, address: SocketAddr) -> Result<Prepared, AppError> {
    let mut authority = Authority::open(&options.data_dir)?;
    let serving = authority.serving(&names(options), &addresses(options))?;
    let tls = tls_config(vec![serving.certificate()], serving.key(), authority.certificate())?;
    let config = Config {
        tls,
        service_ranges: options.service_cluster_ip_range.clone(),
        node_ports: options.service_node_port_range.clone(),
        advertise_address: options.advertised(),
        advertise_port: address.port(),
        limits: Limits::default(),
    };
    let server = Server::new(config, Arc::new(new_store())).await?;
    let url = format!("https://{}", SocketAddr::new(reachable(address.ip()), address.port()));
    let admin =
        kubeconfig(&url, &authority, "kubernetes-admin", &authority.client("kubernetes-admin", "system:masters")?);
    let file = options
        .write_kubeconfig
        .as_deref()
        .map(|path| Ok::<_, PkiError>((prepare(parent(path), admin.as_bytes())?, path)));
    let file = file.transpose()?;
    authority.save()?;
    if let Some((file, path)) = file {
        let failed = |error: tempfile::PersistError| PkiError::File {
            action: "writing",
            path: path.to_owned(),
            source: error.error,
        };
        file.persist(path).map_err(failed)?;
    }
    let user = "system:kube-controller-manager";
    let controllers = match options.controllers {
        Controllers::All => Some(kubeconfig(&url, &authority, user, &authority.client(user, "system:masters")?)),
        Controllers::None => None,
    };
    Ok(Prepared { server, url, controllers })
}

async fn serve(
    server: Server,
    listener: TcpListener,
    stop: impl Future<Output = ()>,
    ready: impl FnOnce(),
    controllers: Option<String>,
) -> Result<(), AppError> {
    let (server_ending, server_ended) = watch::channel(false);
    let (controllers_ending, controllers_ended) = watch::channel(false);
    let wait = |mut ended: watch::Receiver<bool>| async move {
        // An error means that the sender is gone, which is an end as well.
        let _ = ended.wait_for(|ended| *ended).await;
    };
    let serving = tokio::spawn(server.run(listener, wait(server_ended)));
    let running = match controllers {
        Some(kubeconfig) => {
            Some(tokio::spawn(apiserver_controllers::start(&kubeconfig, wait(controllers_ended)).await?))
        }
        None => None,
    };
    ready();
    stop.await;
    // Controllers go first, so that they do not complain about a server that is gone.
    let _ = controllers_ending.send(true);
    if let Some(running) = running {
        let _ = running.await;
    }
    let _ = server_ending.send(true);
    let _ = serving.await;
    Ok(())
}

/// Revisions begin with the time, so that a client of an earlier process never meets a number again that it knows: 10,000 writes per
/// second could be made on average without running ahead of the clock.
fn new_store() -> MemoryStore {
    /// 2026-01-01T00:00:00Z.
    const EPOCH_SECONDS: i64 = 1_767_225_600;
    let seconds = u64::try_from(Timestamp::now().as_second() - EPOCH_SECONDS).unwrap_or(0);
    MemoryStore::beginning_at(Revision(1 + seconds * 10_000), MemoryLimits::default())
}

/// An address that clients on this machine can use.
fn reachable(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    }
}

fn names(options: &Options) -> Vec<String> {
    let given = options.tls_san.iter().filter(|name| name.parse::<IpAddr>().is_err()).cloned();
    SERVER_NAMES.into_iter().map(str::to_owned).chain(given).collect()
}

fn addresses(options: &Options) -> Vec<IpAddr> {
    let mut all = vec![
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
        options.bind_address,
        options.advertised(),
    ];
    // The Service `kubernetes` has the first address of the default range.
    all.extend(
        options.service_cluster_ip_range.iter().filter_map(|range| range.hosts().find(|ip| *ip != range.network())),
    );
    all.extend(options.tls_san.iter().filter_map(|name| name.parse::<IpAddr>().ok()));
    all.retain(|ip| !ip.is_unspecified());
    all.sort();
    all.dedup();
    all
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != PathBuf::new() => parent,
        _ => Path::new("."),
    }
}
