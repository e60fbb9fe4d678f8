//! Connections of this node itself whose own address is a Service's.
//!
//! kube-proxy's ipvs mode gives the node every Service's address, so the node's connections to a Service begin at that same address. Its
//! `--cleanup` takes the addresses away, and a socket whose address is gone can't send. Here the node keeps such an address, by a
//! [`local_route`], until those connections have ended.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use node_sys::conntrack::{Conntrack, Entry, Filter};
use node_sys::{SysError, local_route};
use tracing::{debug, info, warn};

use crate::model::Protocol;

/// How often the connections are looked for.
const PERIOD: Duration = Duration::from_secs(10);
/// Connections that keep one address, at most: of more, it is kept for the first.
const CONNECTIONS_MAX: usize = 4096;

/// What tells such a connection from others of its address: protocol number, both ends.
type Connection = (u8, SocketAddr, SocketAddr);

/// The addresses that this node keeps, each with the connections that it is kept for.
#[derive(Debug, Default)]
pub(super) struct Held(BTreeMap<IpAddr, HashSet<Connection>>);

/// Whether a connection began at the very address that it goes to, and goes on elsewhere.
fn is_own(entry: &Entry) -> bool {
    let (source, destination) = (entry.original.source.ip(), entry.original.destination.ip());
    source == destination && !source.is_loopback() && entry.is_redirected()
}

impl Held {
    /// The addresses that a process before this one has kept. What uses them now is what they are kept for.
    ///
    /// # Errors
    /// When routes or connections can't be read; the addresses stay then.
    pub(super) fn found() -> io::Result<Self> {
        let addresses = local_route::all().map_err(io::Error::other)?;
        let mut held = Self(addresses.into_iter().map(|address| (address, HashSet::new())).collect());
        if !held.0.is_empty() {
            visit(|entry| {
                if held.0.contains_key(&entry.original.source.ip()) {
                    held.note(entry);
                }
            })?;
        }
        Ok(held)
    }

    /// Keeps the addresses of those of the node's own connections for which `is_wanted` holds. That one can't be kept is logged.
    pub(super) fn keep(&mut self, is_wanted: impl Fn(&Entry) -> bool) {
        let seen = visit(|entry| {
            if is_wanted(entry) {
                self.note(entry);
            }
        });
        if let Err(error) = seen {
            warn!(%error, "cannot look for connections of this node that begin at a Service's address");
        }
        for address in self.0.keys() {
            match local_route::add(*address) {
                Ok(()) => info!(%address, "this node keeps a Service's address while its connections use it"),
                Err(error) => warn!(%error, "connections of this node that begin at a Service's address may end"),
            }
        }
    }

    /// Looks for the connections, for as long as there are any, on a thread of its own.
    pub(super) fn watch(mut self) {
        if self.0.is_empty() {
            return;
        }
        let watching = move || {
            while !self.0.is_empty() {
                thread::sleep(PERIOD);
                self.look();
            }
        };
        let started = thread::Builder::new().name("held-addresses".to_owned()).spawn(watching);
        if let Err(error) = started {
            warn!(%error, "the node keeps addresses of Services until trama-proxy is started again");
        }
    }

    /// Forgets connections that have ended, and gives back the addresses that no other uses. All stay when the table can't be read.
    fn look(&mut self) {
        let mut left = HashSet::new();
        let note = |entry: &Entry| {
            left.insert(connection(entry));
        };
        if let Err(error) = visit(note) {
            debug!(%error, "cannot look for the connections that addresses of Services are kept for");
            return;
        }
        self.0.retain(|address, connections| {
            connections.retain(|connection| left.contains(connection));
            !connections.is_empty() || !is_given_back(*address)
        });
    }

    fn note(&mut self, entry: &Entry) {
        if entry.ended {
            return;
        }
        let connections = self.0.entry(entry.original.source.ip()).or_default();
        if connections.len() < CONNECTIONS_MAX {
            connections.insert(connection(entry));
        }
    }
}

/// Whether an address that nothing uses any more is gone.
fn is_given_back(address: IpAddr) -> bool {
    let removed = local_route::remove(address);
    match &removed {
        Ok(()) => info!(%address, "the node has given back this address of a Service"),
        Err(error) => warn!(%error, "the node keeps an address of a Service that nothing uses"),
    }
    removed.is_ok()
}

/// Gives back every address, whoever uses it: for the end of everything that is ours.
pub(crate) fn give_back() -> Result<(), SysError> {
    local_route::all()?.into_iter().try_for_each(local_route::remove)
}

fn connection(entry: &Entry) -> Connection {
    (entry.protocol, entry.original.source, entry.original.destination)
}

/// Visits this node's own connections of TCP and UDP: one pass over the table serves every address.
fn visit(mut visit: impl FnMut(&Entry)) -> io::Result<()> {
    let mut table = Conntrack::open()?;
    for (protocol, v6) in [Protocol::Tcp, Protocol::Udp].into_iter().flat_map(|p| [(p, false), (p, true)]) {
        let filter = Filter { protocol: protocol as u8, v6, destination: None, port: None };
        table.for_each(&filter, |entry| {
            if is_own(entry) {
                visit(entry);
            }
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::process::Command;

    use node_sys::Netns;

    use super::*;

    /// The Services 10.96.0.1:80 and [fd00::1]:80, whose addresses this node has as kube-proxy's ipvs mode gives it some, and
    /// their endpoints. An interface of another type does as well.
    const COMMANDS: [&str; 15] = [
        "ip link set lo up",
        "ip -6 address add fd00::2/128 dev lo nodad",
        "ip -6 address add fd00::3/128 dev lo nodad",
        "ip link add kube-ipvs0 type veth peer name other",
        "ip link set kube-ipvs0 up",
        "ip address add 10.96.0.1/32 dev kube-ipvs0",
        "ip -6 address add fd00::1/128 dev kube-ipvs0 nodad",
        "nft add table inet t",
        "nft add chain inet t out { type nat hook output priority -100 ; }",
        "nft add rule inet t out ip daddr 10.96.0.1 tcp dport 80 dnat ip to 127.0.0.2:8080",
        "nft add rule inet t out ip6 daddr fd00::1 tcp dport 80 dnat ip6 to [fd00::2]:8080",
        "nft add chain inet t in { type nat hook input priority 100 ; }",
        "nft add chain inet t post { type nat hook postrouting priority 100 ; }",
        "nft add rule inet t post ip saddr 10.96.0.1 snat ip to 127.0.0.3",
        "nft add rule inet t post ip6 saddr fd00::1 snat ip6 to fd00::3",
    ];

    fn run(command: &str) {
        let mut words = command.split(' ');
        let status = Command::new(words.next().unwrap()).args(words).status().unwrap();
        assert!(status.success(), "{command}");
    }

    fn talk(client: &mut TcpStream, server: &mut TcpStream) {
        client.write_all(b"?").unwrap();
        server.read_exact(&mut [0]).unwrap();
        server.write_all(b"!").unwrap();
        client.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn a_connection_outlives_the_address_that_it_began_at() {
        let work = || {
            COMMANDS.into_iter().for_each(run);
            let addresses: [IpAddr; 2] = ["10.96.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
            let mut pairs = Vec::new();
            for (address, endpoint) in addresses.into_iter().zip(["127.0.0.2:8080", "[fd00::2]:8080"]) {
                let listener = TcpListener::bind(endpoint).unwrap();
                let client = TcpStream::connect((address, 80)).unwrap();
                assert_eq!(client.local_addr().unwrap().ip(), address);
                let (server, _) = listener.accept().unwrap();
                for end in [&client, &server] {
                    end.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                }
                pairs.push((client, server));
            }
            let mut held = Held::default();
            held.keep(|_| false);
            assert!(held.0.is_empty() && local_route::all().unwrap().is_empty(), "nobody's connections");
            held.keep(|_| true);
            run("ip link delete kube-ipvs0");
            for _ in 0..2 {
                pairs.iter_mut().for_each(|(client, server)| talk(client, server));
                held.look();
                // A process after this one goes on.
                held = Held::found().unwrap();
                let kept: Vec<_> = held.0.iter().map(|(address, connections)| (*address, connections.len())).collect();
                assert_eq!(kept, addresses.map(|address| (address, 1)));
            }
            drop(pairs);
            for v6 in [false, true] {
                let all = Filter { protocol: Protocol::Tcp as u8, v6, destination: None, port: None };
                Conntrack::open().unwrap().delete_if(&all, |_| true).unwrap();
            }
            held.look();
            assert!(held.0.is_empty() && local_route::all().unwrap().is_empty());
        };
        Netns::anonymous().unwrap().run(work).unwrap();
    }

    #[test]
    fn all_addresses_are_given_back_at_the_end() {
        let work = || {
            run("ip link set lo up");
            for address in ["10.96.0.1", "fd00::1"] {
                local_route::add(address.parse().unwrap()).unwrap();
            }
            give_back().unwrap();
            assert!(local_route::all().unwrap().is_empty());
        };
        Netns::anonymous().unwrap().run(work).unwrap();
    }
}
