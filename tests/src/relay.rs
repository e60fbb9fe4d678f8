//! Brings the API server's port into a node: the nodes have no way to the machine's own network, and need none.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use node_sys::Netns;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

/// Connections to the API server from one node at once; more wait.
const CONNECTIONS_MAX: usize = 64;

/// Listens on 127.0.0.1:`port` inside `netns` and passes every connection on to 127.0.0.1:`port` of the machine, until the
/// runtime ends or the task is aborted: then all connections are closed, and new ones refused. Call it inside a tokio runtime.
///
/// # Errors
/// When the port is in use in the namespace.
pub(crate) fn start(netns: &Netns, port: u16) -> Result<AbortHandle> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    // A socket stays in the namespace where it was made; everything after this runs outside.
    let listener = netns.run(|| std::net::TcpListener::bind(address))?;
    let listener = listener.with_context(|| format!("cannot listen on {address} in {}", netns.label()))?;
    listener.set_nonblocking(true).context("cannot make the relay's socket non-blocking")?;
    let listener = TcpListener::from_std(listener).context("cannot hand the relay's socket to tokio")?;
    Ok(tokio::spawn(accept(listener, address)).abort_handle())
}

async fn accept(listener: TcpListener, to: SocketAddr) {
    let slots = std::sync::Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
    // Dropped with this task, and all connections with it.
    let mut open = JoinSet::new();
    while let Ok(slot) = std::sync::Arc::clone(&slots).acquire_owned().await {
        let Ok((mut inner, _)) = listener.accept().await else { continue };
        while open.try_join_next().is_some() {}
        open.spawn(async move {
            // Either side may go away at any time: to the other it looks like a closed connection, which is what it is.
            if let Ok(mut outer) = TcpStream::connect(to).await {
                // Small writes of a watch would wait for acknowledgements otherwise, up to 40 ms; without it they are only slower.
                let _ = inner.set_nodelay(true);
                let _ = outer.set_nodelay(true);
                let _ = copy_bidirectional(&mut inner, &mut outer).await;
            }
            drop(slot);
        });
    }
}
