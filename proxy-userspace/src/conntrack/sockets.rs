//! Connected UDP sockets that the eBPF data plane translated: each remembers its endpoint as its own peer.

use std::collections::HashMap;
use std::io::{self, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use node_sys::Netns;
use node_sys::bpf::MapIterator;
use node_sys::read_elements;
use node_sys::sock_diag::{ConnectedSocket, UdpSockets};
use tracing::debug;

use super::Flow;

/// Network namespaces that are searched: one a pod. A node has some hundreds.
const NAMESPACES_MAX: usize = 4096;
/// Sockets that one pass ends at most; a pass that finds more is followed by another.
const SOCKETS_MAX: usize = 65_536;
/// A record begins with the socket's cookie.
const COOKIE_BYTES: usize = 8;
/// No socket has this cookie.
const FREE: [u8; COOKIE_BYTES] = [0; COOKIE_BYTES];

/// Where the data plane's programs keep one kind of record: a cookie and a value.
#[derive(Debug)]
pub enum Records {
    /// In the sockets themselves: this gives those of all sockets.
    Storage(MapIterator),
    /// In the places of an array; a cookie of 0 marks a free one.
    Places(OwnedFd),
}

/// One kind of record.
#[derive(Debug)]
pub struct Remembered {
    /// Where they are.
    pub records: Records,
    /// Length of a value in bytes.
    pub value_bytes: usize,
    /// The translations in a value.
    pub flows: fn(&[u8]) -> Vec<Flow>,
}

/// The sockets that the socket programs of one data plane have translated, in all network namespaces. They are told from all
/// other sockets by what the programs stored in them.
#[derive(Debug)]
pub struct PinnedSockets {
    remembered: Vec<Remembered>,
}

/// Cookies of sockets, and the endpoints that they must not be connected to.
type Wanted = HashMap<u64, Vec<Flow>>;

impl PinnedSockets {
    /// Sockets with these records.
    pub fn new(remembered: Vec<Remembered>) -> Self {
        Self { remembered }
    }

    /// Destroys every socket that is connected by a flow for which `is_stale` holds. Returns how many. Namespaces are entered
    /// only where there is something to end.
    ///
    /// # Errors
    /// When the records cannot be read, or no namespace could be searched: without `CAP_NET_ADMIN` or `CAP_SYS_ADMIN`.
    pub fn destroy_if(&self, is_stale: impl Fn(&Flow) -> bool) -> io::Result<usize> {
        let mut wanted = Wanted::new();
        for remembered in &self.remembered {
            remembered.read(|cookie, flows| {
                let stale: Vec<Flow> = flows.into_iter().filter(&is_stale).collect();
                if !stale.is_empty() && (wanted.len() < SOCKETS_MAX || wanted.contains_key(&cookie)) {
                    wanted.entry(cookie).or_default().extend(stale);
                }
            })?;
        }
        if wanted.is_empty() {
            return Ok(0);
        }
        // A socket's translations may be in several places, and one that lives leads to the same endpoint.
        for remembered in &self.remembered {
            remembered.read(|cookie, flows| {
                if let Some(stale) = wanted.get_mut(&cookie) {
                    keep_living(stale, flows.into_iter().filter(|flow| !is_stale(flow)));
                }
            })?;
        }
        // The thread goes from one namespace to the next and never comes back.
        thread::scope(|scope| {
            let walk = scope.spawn(|| walk(&wanted));
            walk.join().unwrap_or_else(|_| Err(io::Error::other("the search for sockets panicked")))
        })
    }
}

impl Remembered {
    /// Hands every socket's cookie and translations to `visit`. What is written meanwhile may be half of each; then there is no such
    /// endpoint, or the socket is connected to another.
    fn read(&self, mut visit: impl FnMut(u64, Vec<Flow>)) -> io::Result<()> {
        let length = COOKIE_BYTES + self.value_bytes;
        let visit = |record: &[u8]| {
            if let Some((cookie, value)) =
                record.split_first_chunk::<COOKIE_BYTES>().filter(|(cookie, _)| **cookie != FREE)
            {
                visit(u64::from_ne_bytes(*cookie), (self.flows)(value));
            }
        };
        match &self.records {
            Records::Storage(iterator) => read_stream(iterator, length, visit),
            Records::Places(map) => read_elements(map.as_fd(), length, 0, usize::MAX, visit),
        }
    }
}

fn read_stream(iterator: &MapIterator, length: usize, mut visit: impl FnMut(&[u8])) -> io::Result<()> {
    let mut records = BufReader::new(iterator.read()?);
    let mut record = vec![0; length];
    loop {
        match records.read_exact(&mut record) {
            Ok(()) => visit(&record),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Takes the flows to endpoints out of `stale` that a living flow of the same socket leads to.
fn keep_living(stale: &mut Vec<Flow>, living: impl Iterator<Item = Flow>) {
    for living in living {
        stale.retain(|flow| flow.endpoint != living.endpoint);
    }
}

fn walk(wanted: &Wanted) -> io::Result<usize> {
    let (mut destroyed, mut searched, mut failed) = (0, 0, None);
    let visit = |netns: &Netns| {
        let entered = netns.enter_forever().map_err(io::Error::other);
        match entered.and_then(|()| search(wanted)) {
            Ok(count) => {
                destroyed += count;
                searched += 1;
            }
            Err(error) => {
                debug!(netns = netns.label(), %error, "cannot search a namespace for sockets");
                failed = Some(error);
            }
        }
    };
    Netns::for_each(NAMESPACES_MAX, visit).map_err(io::Error::other)?;
    match failed {
        Some(error) if searched == 0 => Err(error),
        _ => Ok(destroyed),
    }
}

/// In the namespace of the calling thread.
fn search(wanted: &Wanted) -> io::Result<usize> {
    let mut sockets = UdpSockets::open()?;
    let mut found: Vec<ConnectedSocket> = Vec::new();
    for v6 in [false, true] {
        sockets.for_each_connected(v6, |socket| {
            let flows = wanted.get(&socket.cookie);
            // It may have been connected to something else since.
            if flows.is_some_and(|flows| flows.iter().any(|flow| flow.endpoint == socket.remote)) {
                found.push(socket.clone());
            }
        })?;
    }
    let mut destroyed = 0;
    for socket in &found {
        destroyed += usize::from(sockets.destroy(socket)?);
    }
    Ok(destroyed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_that_another_service_still_has_is_not_stale() {
        let flow = |destination: &str, endpoint: &str| Flow {
            destination: destination.parse().unwrap(),
            endpoint: endpoint.parse().unwrap(),
        };
        let (left, stays) = (flow("10.96.0.1:53", "10.1.0.1:53"), flow("10.96.0.2:53", "10.1.0.1:53"));
        let other = flow("10.96.0.1:53", "10.1.0.2:53");
        let remaining = |mut stale: Vec<Flow>, living: &[Flow]| {
            keep_living(&mut stale, living.iter().copied());
            stale
        };
        assert_eq!(remaining(vec![left], &[stays]), []);
        assert_eq!(remaining(vec![left, other], &[]), [left, other]);
        assert_eq!(remaining(vec![left, other], &[stays]), [other]);
    }
}
