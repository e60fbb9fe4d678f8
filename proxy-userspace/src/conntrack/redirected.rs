//! Connections that IPVS redirects become NAT's, which conntrack does by itself: IPVS drops every packet of a connection whose virtual
//! service is gone, and a virtual service goes with the proxy that made it.
//!
//! IPVS has to forget such a connection first. When it does so by itself, a while after the last packet that it
//! saw (UDP: five minutes, seen on Linux 6.1), it takes what conntrack knows of the connection with it, though that is NAT's by then.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use node_sys::conntrack::{Conntrack, Entry, Filter, Translation};
use node_sys::ipvs::{Command, Ipvs, IpvsError, Remembered, Service, ServiceAddress, remembered};
use node_sys::{SysError, sysctl};
use tracing::{info, warn};

use super::held::Held;
use super::index::Place;
use super::pause::pause;
use crate::model::{IpFamily, NodeConfig, Protocol, ServiceSnapshot};

/// Whether IPVS forgets a connection as soon as its server goes, and conntrack's entry with it; since Linux 5.9 at once, and not with
/// the connection's next packet.
pub(crate) const EXPIRE_NODEST: &str = "net/ipv4/vs/expire_nodest_conn";

/// How long an entry waits for its connection's next packet, in seconds: connections that ended without a FIN must not fill the table
/// for days.
pub(crate) const TCP_TIMEOUT_S: u32 = 3600;
/// The same for datagrams: the kernel's own for what has not been answered (`nf_conntrack_udp_timeout`).
pub(crate) const UDP_TIMEOUT_S: u32 = 30;

/// Then everything is looked at once more: what was under way when the frontends changed hands has its entry by then.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// Connections that are handed over together, at most: some 150 bytes each here, and as much again in the kernel while they wait.
const CONNECTIONS_MAX: usize = 1 << 18;

/// How long the kernel may take to forget connections, which it does on a thread of its own, and how often it is looked at.
const FORGETTING_MAX: Duration = Duration::from_secs(2);
const FORGETTING_LOOK: Duration = Duration::from_millis(5);

/// Why IPVS goes on with connections.
#[derive(Debug, thiserror::Error)]
enum ForgetError {
    /// IPVS does not answer.
    #[error(transparent)]
    Ask(#[from] IpvsError),
    /// It refuses to remove a virtual service.
    #[error("a virtual service cannot be removed: {0}")]
    Refused(#[source] io::Error),
    /// Its parameter cannot be read or set.
    #[error(transparent)]
    Parameter(#[from] SysError),
    /// Its connections cannot be listed.
    #[error("its connections cannot be listed: {0}")]
    List(#[source] io::Error),
    /// Some are still there.
    #[error("{0} connections are still there")]
    Left(usize),
}

/// Hands those connections of TCP and UDP to NAT for which `is_wanted` holds, and returns how many there were. Their virtual services, of
/// which `is_theirs` tells, go with them. That something could not be is logged: nobody could do anything else about it.
///
/// Their packets wait meanwhile. Where there are none, nothing is removed.
pub(crate) fn hand_to_nat(is_wanted: impl Fn(&Entry) -> bool, is_theirs: impl Fn(&Service) -> bool) -> usize {
    let connections = redirected(is_wanted).unwrap_or_else(|error| {
        warn!(%error, "connections of IPVS cannot be listed; they may end with its virtual services");
        Vec::new()
    });
    if connections.is_empty() {
        return 0;
    }
    let start = Instant::now();
    let paused = pause(&connections);
    if let Err(error) = &paused {
        warn!(%error, "connections may end whose packets come while they are handed to NAT");
    }
    if let Err(error) = forget(&connections, is_theirs) {
        warn!(%error, "IPVS remembers connections that are NAT's now; those may end when it forgets them");
    }
    let count = give(&connections);
    info!(count, took = ?start.elapsed(), "handed connections of IPVS to NAT");
    count
}

/// At most [`CONNECTIONS_MAX`].
fn redirected(is_wanted: impl Fn(&Entry) -> bool) -> io::Result<Vec<Translation>> {
    let (mut all, mut left) = (HashSet::new(), 0usize);
    let mut table = Conntrack::open()?;
    for (protocol, v6) in [Protocol::Tcp, Protocol::Udp].into_iter().flat_map(|part| [(part, false), (part, true)]) {
        let filter = Filter { protocol: protocol as u8, v6, destination: None, port: None };
        table.for_each(&filter, |entry| {
            let counts = !entry.ended && entry.is_redirected() && is_wanted(entry);
            if counts && all.len() < CONNECTIONS_MAX {
                all.insert(entry.translation());
            } else if counts {
                left += 1;
            }
        })?;
    }
    if left > 0 {
        warn!(handed = all.len(), left, "too many connections of IPVS to hand all of them to NAT; the others may end");
    }
    Ok(all.into_iter().collect())
}

/// Returns how many NAT has now.
fn give(connections: &[Translation]) -> usize {
    let (mut count, mut refused) = (0, None);
    match Conntrack::open() {
        Ok(mut table) => {
            for connection in connections {
                let timeout_s = if connection.protocol == Protocol::Tcp as u8 { TCP_TIMEOUT_S } else { UDP_TIMEOUT_S };
                match table.replace(connection, timeout_s) {
                    Ok(()) => count += 1,
                    Err(error) => refused = Some(error),
                }
            }
        }
        Err(error) => refused = Some(error),
    }
    if let Some(error) = refused {
        warn!(count, %error, "not every connection of IPVS could be handed to NAT; some may end");
    }
    count
}

/// Makes IPVS forget connections, by removing their virtual services.
fn forget(connections: &[Translation], is_theirs: impl Fn(&Service) -> bool) -> Result<(), ForgetError> {
    let mut ipvs = Ipvs::open()?;
    let services = ipvs.services()?;
    let deletions: Vec<Command> = services.iter().filter(|service| is_theirs(service)).filter_map(deletion).collect();
    let before = sysctl::read(EXPIRE_NODEST)?;
    sysctl::write(EXPIRE_NODEST, "1")?;
    let refusals = ipvs.run(&deletions);
    let forgotten = wait_until_forgotten(connections);
    sysctl::write(EXPIRE_NODEST, before.trim())?;
    if let Some(refusal) = refusals?.into_iter().next() {
        return Err(ForgetError::Refused(refusal.source));
    }
    forgotten
}

fn deletion(service: &Service) -> Option<Command> {
    service.id.map(Command::DeleteService).or(service.address.map(Command::DeleteServiceAt))
}

fn wait_until_forgotten(connections: &[Translation]) -> Result<(), ForgetError> {
    let connections: HashSet<Remembered> = connections.iter().map(as_ipvs_has_it).collect();
    let start = Instant::now();
    loop {
        let mut left = 0;
        let count = |connection| left += usize::from(connections.contains(&connection));
        remembered(count).map_err(ForgetError::List)?;
        if left == 0 {
            return Ok(());
        }
        if start.elapsed() > FORGETTING_MAX {
            return Err(ForgetError::Left(left));
        }
        thread::sleep(FORGETTING_LOOK);
    }
}

fn as_ipvs_has_it(connection: &Translation) -> Remembered {
    let Translation { protocol, arriving, .. } = *connection;
    Remembered { client: arriving.source, to: ServiceAddress { protocol, address: arriving.destination } }
}

/// What is served by a snapshot: enough to tell a connection to a Service from one to somebody else's virtual service.
struct Served {
    node: Arc<NodeConfig>,
    places: HashSet<(Protocol, Place)>,
}

impl Served {
    fn new(snapshot: &ServiceSnapshot) -> Self {
        let services = snapshot.services.values();
        let places = services.flat_map(|service| {
            service.frontends.iter().map(|frontend| (service.name.protocol, Place::of(service, frontend)))
        });
        Self { places: places.collect(), node: Arc::clone(&snapshot.node) }
    }

    fn contains(&self, entry: &Entry) -> bool {
        self.serves(ServiceAddress { protocol: entry.protocol, address: entry.original.destination })
    }

    fn serves(&self, ServiceAddress { protocol, address: destination }: ServiceAddress) -> bool {
        let Some(protocol) = [Protocol::Tcp, Protocol::Udp].into_iter().find(|known| *known as u8 == protocol) else {
            return false;
        };
        let node_port = Place::NodePort(IpFamily::of(destination.ip()), destination.port());
        self.places.contains(&(protocol, Place::Address(destination)))
            || self.node.node_addresses.contains(&destination.ip()) && self.places.contains(&(protocol, node_port))
    }
}

/// To be called once `snapshot` is programmed by something that is not IPVS, and before anybody is told so: from now on nothing new goes
/// to the virtual services of a proxy before us, and whoever is told may remove them.
pub(crate) fn take_over(snapshot: &ServiceSnapshot) {
    let held = held_before();
    // Without this parameter there is no IPVS, or conntrack knows nothing of what it does.
    if sysctl::read("net/ipv4/vs/conntrack").is_ok_and(|value| value.trim() != "0") {
        let served = Served::new(snapshot);
        let held = take(&served, held);
        let again = move || {
            thread::sleep(SECOND_LOOK);
            take(&served, held).watch();
        };
        // Without the second look the first one counts.
        let _ = thread::Builder::new().name("ipvs-connections".to_owned()).spawn(again);
    } else {
        held.watch();
    }
}

/// For a data plane of IPVS, whose own connections need nothing: goes on with what a process before it has begun.
pub(crate) fn go_on(_: &ServiceSnapshot) {
    held_before().watch();
}

fn held_before() -> Held {
    Held::found().unwrap_or_else(|error| {
        warn!(%error, "addresses of Services that this node keeps for connections of its own stay");
        Held::default()
    })
}

fn take(served: &Served, mut held: Held) -> Held {
    let is_theirs = |service: &Service| service.address.is_some_and(|address| served.serves(address));
    let taken = hand_to_nat(|entry| !entry.destination_nat && served.contains(entry), is_theirs);
    if taken > 0 {
        held.keep(|entry| served.contains(entry) && !served.node.node_addresses.contains(&entry.original.source.ip()));
    }
    held
}

#[cfg(test)]
mod tests {
    use node_sys::Netns;
    use node_sys::conntrack::{Translation, Tuple};

    use super::*;
    use crate::model::tests::build::{endpoint, exposed, key, node, policy, slice};
    use crate::model::{Desired, decide};

    /// [`exposed`]: 10.96.0.1:80, 192.0.2.1:80, 192.0.2.2:80 and NodePort 30080 of 192.168.0.2, all TCP.
    fn served() -> Served {
        let mut desired = Desired::default();
        desired.set_node(node());
        desired.replace(
            &key("web"),
            decide(&exposed("web"), &[&slice("one", "web", vec![endpoint("10.1.0.1")])], &policy()),
        );
        Served::new(desired.checkout().0)
    }

    #[test]
    fn only_what_goes_to_a_frontend_is_taken() {
        let served = served();
        let netns = Netns::anonymous().unwrap();
        let taken = |protocol: u8, destination: &str| {
            let tuple =
                |source: &str, to: &str| Tuple { source: source.parse().unwrap(), destination: to.parse().unwrap() };
            let arriving = tuple("198.51.100.1:4000", destination);
            let leaving = tuple("198.51.100.1:4000", "10.1.0.1:8080");
            let mut table = Conntrack::open().unwrap();
            table.replace(&Translation { protocol, arriving, leaving }, 60).unwrap();
            let filter = Filter { protocol, v6: false, destination: Some(arriving.destination.ip()), port: None };
            let mut found = Vec::new();
            table.for_each(&filter, |entry| found.push((entry.is_redirected(), served.contains(entry)))).unwrap();
            assert_eq!(found.len(), 1, "{destination}");
            assert!(found[0].0);
            found[0].1
        };
        netns
            .run(|| {
                let (tcp, udp) = (Protocol::Tcp as u8, Protocol::Udp as u8);
                assert!(taken(tcp, "10.96.0.1:80") && taken(tcp, "192.168.0.2:30080"));
                assert!(!taken(udp, "10.96.0.1:80"), "another protocol");
                assert!(!taken(tcp, "203.0.113.9:80") && !taken(tcp, "203.0.113.9:30080"), "somebody else's");
            })
            .unwrap();
    }

    #[test]
    fn what_is_wanted_becomes_nats_and_stays_what_it_was() {
        let netns = Netns::anonymous().unwrap();
        netns
            .run(|| {
                let tuple =
                    |to: &str| Tuple { source: "198.51.100.1:4000".parse().unwrap(), destination: to.parse().unwrap() };
                let translation =
                    Translation { protocol: 6, arriving: tuple("10.96.0.1:80"), leaving: tuple("10.1.0.1:8080") };
                Conntrack::open().unwrap().replace(&translation, 60).unwrap();
                let tcp = Filter { protocol: 6, v6: false, destination: None, port: None };
                assert_eq!(redirected(|_| false).unwrap(), []);
                let found = redirected(|_| true).unwrap();
                assert_eq!((&found[..], give(&found)), (&[translation][..], 1));
                let mut found = Vec::new();
                Conntrack::open().unwrap().for_each(&tcp, |entry| found.push(*entry)).unwrap();
                assert_eq!(found.iter().map(Entry::translation).collect::<Vec<_>>(), [translation]);
                assert!(found[0].destination_nat);
            })
            .unwrap();
    }
}
