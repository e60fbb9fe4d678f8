//! Connections: accept, TLS, identity, HTTP/1.1 or HTTP/2, and a clean end.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use apiserver_store::Store;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use crate::bootstrap::{self, StartError};
use crate::config::Config;
use crate::engine::Engine;
use crate::http::App;
use crate::identity::Identity;
use crate::service::ServiceAllocator;

/// How long a client may take for the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may stay without a request.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the server waits after a failed accept, which means that it is out of file descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(50);
/// Concurrent requests of one HTTP/2 connection, as in kube-apiserver.
const STREAMS_PER_CONNECTION_MAX: u32 = 100;

/// A server that is ready to accept connections.
pub struct Server {
    app: Arc<App>,
    acceptor: TlsAcceptor,
    connections: Arc<Semaphore>,
    shutdown: watch::Sender<bool>,
    shutdown_timeout: Duration,
}

impl Server {
    /// Brings the store into the state that a cluster begins with (namespaces, the Service `kubernetes`) and takes over what it holds.
    ///
    /// # Errors
    /// [`StartError`] where the store does not answer or holds what this server did not write.
    pub async fn new(config: Config, store: Arc<dyn Store>) -> Result<Self, StartError> {
        let services = ServiceAllocator::new(&config.service_ranges, config.node_ports.clone());
        let engine = Arc::new(Engine::new(store, services));
        bootstrap::run(&engine, &config).await?;
        let (shutdown, receiver) = watch::channel(false);
        let address = std::net::SocketAddr::from((config.advertise_address, config.advertise_port)).to_string();
        Ok(Self {
            app: Arc::new(App::new(engine, config.limits, address, receiver)),
            acceptor: TlsAcceptor::from(config.tls),
            connections: Arc::new(Semaphore::new(config.limits.connections_max)),
            shutdown,
            shutdown_timeout: config.limits.shutdown_timeout,
        })
    }

    /// Serves until `stop` resolves, then ends watches, lets requests finish and returns.
    pub async fn run(self, listener: TcpListener, stop: impl Future<Output = ()>) {
        let graceful = GracefulShutdown::new();
        tokio::pin!(stop);
        loop {
            let accepted = tokio::select! {
                () = &mut stop => break,
                accepted = self.accept(&listener) => accepted,
            };
            if let Some((stream, slot)) = accepted {
                let connection =
                    Connection { app: Arc::clone(&self.app), acceptor: self.acceptor.clone(), _slot: slot };
                tokio::spawn(connection.serve(stream, graceful.watcher()));
            }
        }
        drop(listener);
        // Watches never end by themselves; nobody listening to the signal means that there are none.
        let _ = self.shutdown.send(true);
        if tokio::time::timeout(self.shutdown_timeout, graceful.shutdown()).await.is_err() {
            tracing::warn!("connections that did not end in time are cut");
        }
    }

    async fn accept(&self, listener: &TcpListener) -> Option<(TcpStream, OwnedSemaphorePermit)> {
        // The semaphore is never closed.
        let slot = Arc::clone(&self.connections).acquire_owned().await.ok()?;
        match listener.accept().await {
            Ok((stream, _)) => Some((stream, slot)),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                None
            }
        }
    }
}

/// One accepted connection.
struct Connection {
    app: Arc<App>,
    acceptor: TlsAcceptor,
    _slot: OwnedSemaphorePermit,
}

impl Connection {
    async fn serve(self, stream: TcpStream, watcher: Watcher) {
        // Without it every small answer waits for the client's acknowledgement.
        let _ = stream.set_nodelay(true);
        let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.acceptor.accept(stream)).await;
        let Ok(Ok(tls)) = handshake else { return };
        let certificates = tls.get_ref().1.peer_certificates();
        let identity = Arc::new(certificates.and_then(|chain| chain.first()).and_then(Identity::of));
        if let Some(identity) = &*identity {
            tracing::debug!(user = %identity.user, groups = ?identity.groups, "client connected");
        }
        let app = Arc::clone(&self.app);
        let service = service_fn(move |request| {
            let (app, identity) = (Arc::clone(&app), Arc::clone(&identity));
            async move { Ok::<_, Infallible>(app.handle(request, identity.as_ref().as_ref()).await) }
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_TIMEOUT);
        builder
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(Duration::from_secs(30))
            .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX);
        let connection = builder.serve_connection(TokioIo::new(tls), service).into_owned();
        if let Err(error) = watcher.watch(connection).await {
            tracing::debug!(%error, "connection ended");
        }
    }
}
