//! What the socket programs remember in a socket, read from user space.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use aya::Btf;
use aya::programs::Iter;
use node_sys::bpf::{MapIterator, open_pinned};
use proxy_common::pod::Pod;
use proxy_common::{Be16, ConnectedPeer, SocketPeer, SocketPeers, V4, V6};

use super::attach::refused;
use super::encode::UserAddress;
use super::load::{load, release_object};
use super::pins::{current_directory, maps_of, with_sizes_in_use};
use super::{EbpfConfig, EbpfError};
use crate::conntrack::{Flow, PinnedSockets, Records, Remembered};

/// The kernel's type of iterator, the part of `bpf_iter_*` that names it.
const STORAGE_ITERATOR: &str = "bpf_sk_storage_map";

/// The sockets that the data plane with this configuration translates; it has been opened before. Where the kernel has no iterators over
/// socket storage, those that are connected and have a place of their own.
///
/// # Errors
/// [`EbpfError`] where the data plane's maps are not there.
pub fn pinned_sockets(config: &EbpfConfig) -> Result<PinnedSockets, EbpfError> {
    let directory = current_directory(&config.bpffs);
    let mut remembered = vec![places::<V4>("CONNECTED_V4", &directory)?, places::<V6>("CONNECTED_V6", &directory)?];
    let storages = storages(config, &directory);
    release_object();
    match storages {
        Ok(storages) => remembered.extend(storages),
        Err(error) => tracing::warn!(
            %error,
            "a UDP socket whose place in CONNECTED is another's will not be ended when its endpoint is gone: that takes iterators, which a \
             kernel that is locked down does not have"
        ),
    }
    Ok(PinnedSockets::new(remembered))
}

/// The array of connected sockets.
fn places<A: UserAddress>(map: &str, directory: &Path) -> Result<Remembered, EbpfError>
where
    ConnectedPeer<A>: Pod,
    SocketPeer<A>: Pod,
{
    let map = pinned_map(map, directory)?;
    let value_bytes = size_of::<ConnectedPeer<A>>() - size_of::<u64>();
    Ok(Remembered { records: Records::Places(map), value_bytes, flows: connected::<A> })
}

/// What sockets hold themselves.
fn storages(config: &EbpfConfig, directory: &Path) -> Result<Vec<Remembered>, EbpfError> {
    // The object once more, for its iterators, which nothing has to stay attached for: the links end with this process.
    let mut object = load(&with_sizes_in_use(config), directory)?;
    let btf = Btf::from_sys_fs().map_err(|error| refused(STORAGE_ITERATOR, &error))?;
    let (v4, v6) =
        ((size_of::<SocketPeers<V4>>(), stored::<V4> as Read), (size_of::<SocketPeers<V6>>(), stored::<V6> as Read));
    let mut remembered = Vec::with_capacity(2);
    for (program, map, (value_bytes, flows)) in [("peers_v4", "SOCKETS_V4", v4), ("peers_v6", "SOCKETS_V6", v6)] {
        let missing = || EbpfError::MissingProgram { program: program.to_owned() };
        let loaded: &mut Iter = object.program_mut(program).ok_or_else(missing)?.try_into().map_err(|_| missing())?;
        loaded.load(STORAGE_ITERATOR, &btf).map_err(|error| refused(program, &error))?;
        let map = pinned_map(map, directory)?;
        let program_fd = loaded.fd().map_err(|error| refused(program, &error))?;
        let iterator = MapIterator::new(program_fd.as_fd(), map.as_fd()).map_err(|error| refused(program, &error))?;
        remembered.push(Remembered { records: Records::Storage(iterator), value_bytes, flows });
    }
    Ok(remembered)
}

fn pinned_map(map: &str, directory: &Path) -> Result<OwnedFd, EbpfError> {
    let path = maps_of(directory).join(map);
    open_pinned(&path).map_err(|source| EbpfError::Bpffs { path, source })
}

/// Reads the translations in a value.
type Read = fn(&[u8]) -> Vec<Flow>;

/// The translation of one connected socket: what follows its cookie in [`ConnectedPeer`].
fn connected<A: UserAddress>(value: &[u8]) -> Vec<Flow>
where
    SocketPeer<A>: Pod,
{
    let peer = value.get(..size_of::<SocketPeer<A>>()).and_then(SocketPeer::<A>::from_bytes);
    peer.iter().filter(|peer| peer.backend_port != Be16(0)).map(flow).collect()
}

/// The translations in one value of a socket storage map.
fn stored<A: UserAddress>(value: &[u8]) -> Vec<Flow>
where
    SocketPeers<A>: Pod,
{
    let peers = SocketPeers::<A>::from_bytes(value);
    let used = peers.iter().flat_map(|peers| peers.peers.iter()).filter(|peer| peer.backend_port != Be16(0));
    used.map(flow).collect()
}

fn flow<A: UserAddress>(peer: &SocketPeer<A>) -> Flow {
    let address = |address: A, port: Be16| SocketAddr::new(address.to_ip(), port.to_host());
    Flow { destination: address(peer.frontend, peer.frontend_port), endpoint: address(peer.backend, peer.backend_port) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read() {
        let mut peers = SocketPeers::<V4>::default();
        peers.peers[3] = SocketPeer {
            frontend: V4::from_octets([10, 96, 0, 10]),
            frontend_port: Be16::from_host(53),
            backend: V4::from_octets([10, 244, 1, 2]),
            backend_port: Be16::from_host(5353),
            ..SocketPeer::default()
        };
        let flow = Flow { destination: "10.96.0.10:53".parse().unwrap(), endpoint: "10.244.1.2:5353".parse().unwrap() };
        assert_eq!(stored::<V4>(peers.as_bytes()), [flow]);
        assert_eq!(connected::<V4>(peers.peers[3].as_bytes()), [flow]);
        assert!(connected::<V4>(SocketPeer::<V4>::default().as_bytes()).is_empty());
        let mut peers = SocketPeers::<V6>::default();
        peers.peers[0] = SocketPeer {
            frontend: V6::from_octets([0xfd; 16]),
            backend: V6::from_octets([0xfe; 16]),
            frontend_port: Be16::from_host(1),
            backend_port: Be16::from_host(2),
            ..SocketPeer::default()
        };
        assert_eq!(stored::<V6>(peers.as_bytes())[0].endpoint.port(), 2);
        assert!(stored::<V4>(&[0; 7]).is_empty());
        assert!(stored::<V4>(SocketPeers::<V4>::default().as_bytes()).is_empty());
    }
}
