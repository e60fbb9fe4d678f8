//! Connections that IPVS redirects become NAT's, which conntrack does by itself: IPVS drops every packet of a connection whose virtual
//! service is gone, and a virtual service goes with the proxy that made it.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use node_sys::conntrack::{Conntrack, Entry, Filter, Replaced};
use node_sys::sysctl;
use tracing::{info, warn};

use super::held::Held;
use super::index::Place;
use crate::model::{IpFamily, NodeConfig, Protocol, ServiceSnapshot};

/// Whether IPVS forgets a connection as soon as its server goes. It then deletes what conntrack knows of it too, though that may be NAT's by
/// now; so it must be off while virtual services go. Off it waits for the connection's own timeout, which answers put off.
pub(crate) const EXPIRE_NODEST: &str = "net/ipv4/vs/expire_nodest_conn";

/// How long an entry waits for its connection's next packet, in seconds: connections that ended without a FIN must not fill the table
/// for days.
pub(crate) const TCP_TIMEOUT_S: u32 = 3600;
/// The same for datagrams: the kernel's own for what has not been answered (`nf_conntrack_udp_timeout`).
pub(crate) const UDP_TIMEOUT_S: u32 = 30;

/// Then everything is looked at once more: what was under way when the frontends changed hands has its entry by then.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// Hands those connections of TCP and UDP to NAT for which `is_wanted` holds, and returns how many there were. That something could not be
/// is logged: nobody could do anything else about it.
pub(crate) fn hand_to_nat(is_wanted: impl Fn(&Entry) -> bool) -> usize {
    let (mut count, mut refused) = (0, None);
    let all = [(Protocol::Tcp, TCP_TIMEOUT_S), (Protocol::Udp, UDP_TIMEOUT_S)];
    for ((protocol, timeout_s), v6) in all.into_iter().flat_map(|part| [(part, false), (part, true)]) {
        let filter = Filter { protocol: protocol as u8, v6, destination: None, port: None };
        match hand_filtered(&filter, timeout_s, &is_wanted) {
            Ok(replaced) => {
                count += replaced.count;
                refused = refused.or(replaced.refused);
            }
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    if count > 0 {
        info!(count, "handed connections of IPVS to NAT");
    }
    if let Some(error) = refused {
        warn!(count, %error, "not every connection of IPVS could be handed to NAT; some may end with its virtual services");
    }
    count
}

fn hand_filtered(filter: &Filter, timeout_s: u32, is_wanted: &impl Fn(&Entry) -> bool) -> io::Result<Replaced> {
    let wanted = |entry: &Entry| !entry.ended && entry.is_redirected() && is_wanted(entry);
    Conntrack::open()?.replace_if(filter, timeout_s, wanted)
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
        let Some(protocol) = [Protocol::Tcp, Protocol::Udp].into_iter().find(|known| *known as u8 == entry.protocol)
        else {
            return false;
        };
        let destination = entry.original.destination;
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
    let taken = hand_to_nat(|entry| !entry.destination_nat && served.contains(entry));
    if taken > 0 {
        keep_for_nat();
        held.keep(|entry| served.contains(entry) && !served.node.node_addresses.contains(&entry.original.source.ip()));
    }
    held
}

/// Only where there is something to keep: whoever else has virtual services on this node chose the parameter.
fn keep_for_nat() {
    match sysctl::write(EXPIRE_NODEST, "0") {
        Ok(()) => info!(parameter = EXPIRE_NODEST, "set to 0, so that they outlive the virtual services"),
        Err(error) => warn!(%error, "connections of a proxy that used IPVS may end with its virtual services"),
    }
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
                assert_eq!(hand_filtered(&tcp, 60, &|_: &Entry| false).unwrap().count, 0);
                assert_eq!(hand_filtered(&tcp, 60, &|_: &Entry| true).unwrap().count, 1);
                let mut found = Vec::new();
                Conntrack::open().unwrap().for_each(&tcp, |entry| found.push(*entry)).unwrap();
                assert_eq!(found.iter().map(Entry::translation).collect::<Vec<_>>(), [translation]);
                assert!(found[0].destination_nat);
            })
            .unwrap();
    }
}
