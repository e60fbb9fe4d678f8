//! One pass over the kernel's tables: the one place here that changes anything.

use std::io;
use std::time::Instant;

use node_sys::conntrack::{Conntrack, Entry, Filter};
use tracing::{info, warn};

use super::index::Place;
use super::{Flow, FlowIndex, PinnedSockets, ReconcilerMetrics, Scope};
use crate::model::{IpFamily, Protocol};

/// The tables of this node that remember UDP flows.
pub struct KernelTables {
    conntrack: io::Result<Conntrack>,
    sockets: Option<PinnedSockets>,
    metrics: ReconcilerMetrics,
    /// What failed last, so that it is said once.
    said: Option<String>,
}

impl KernelTables {
    /// Looks at the connection tracking table of the calling thread's network namespace, and at `sockets` where a data plane
    /// translates at the socket.
    pub fn new(sockets: Option<PinnedSockets>, metrics: ReconcilerMetrics) -> Self {
        Self { conntrack: Conntrack::open(), sockets, metrics, said: None }
    }

    /// Ends every stale flow in `scope`. Returns whether all tables could be searched; what failed is logged and counted.
    pub fn clean(&mut self, index: &FlowIndex, scope: &Scope) -> bool {
        let conntrack = self.clean_conntrack(index, scope);
        let sockets = self.clean_sockets(index);
        let failed = [("conntrack", conntrack.err()), ("sockets", sockets.err())];
        let mut succeeded = true;
        for (table, error) in failed.iter().filter_map(|(table, error)| Some((table, error.as_ref()?))) {
            succeeded = false;
            self.metrics.failed(table);
            let text = format!("{table}: {error}");
            if self.said.as_ref() != Some(&text) {
                warn!(table, %error, "cannot search for stale UDP flows; they end by their own timeouts");
                self.said = Some(text);
            }
        }
        succeeded
    }

    fn clean_conntrack(&mut self, index: &FlowIndex, scope: &Scope) -> io::Result<()> {
        if self.conntrack.is_err() {
            self.conntrack = Conntrack::open();
        }
        let table = self.conntrack.as_mut().map_err(|error| io::Error::new(error.kind(), error.to_string()))?;
        for family in [IpFamily::V4, IpFamily::V6] {
            let start = Instant::now();
            let mut deleted = 0;
            for filter in filters(family, scope) {
                deleted += table.delete_if(&filter, |entry| index.is_stale(&flow_of(entry)))?.0;
            }
            self.metrics.conntrack(family, start.elapsed(), deleted);
            if deleted > 0 {
                info!(?family, deleted, took = ?start.elapsed(), "deleted stale UDP conntrack entries");
            }
        }
        Ok(())
    }

    fn clean_sockets(&mut self, index: &FlowIndex) -> io::Result<()> {
        let Some(sockets) = &self.sockets else { return Ok(()) };
        let start = Instant::now();
        let destroyed = sockets.destroy_if(|flow| index.is_stale(flow))?;
        self.metrics.sockets(destroyed);
        if destroyed > 0 {
            info!(destroyed, took = ?start.elapsed(), "destroyed UDP sockets whose endpoint is gone");
        }
        Ok(())
    }
}

/// The kernel compares; only what may be stale reaches us.
fn filters(family: IpFamily, scope: &Scope) -> Vec<Filter> {
    let udp = Filter { protocol: Protocol::Udp as u8, v6: family == IpFamily::V6, destination: None, port: None };
    let filter = |place: &Place| match place {
        Place::Address(address) => Filter { destination: Some(address.ip()), port: Some(address.port()), ..udp },
        Place::NodePort(_, port) => Filter { port: Some(*port), ..udp },
    };
    match scope {
        Scope::Everything => vec![udp],
        Scope::Places(places) => places.iter().filter(|place| place.family() == family).map(filter).collect(),
    }
}

fn flow_of(entry: &Entry) -> Flow {
    Flow { destination: entry.original.destination, endpoint: entry.reply.source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_places_are_asked_for_by_name() {
        let places = vec![
            Place::Address("10.96.0.10:53".parse().unwrap()),
            Place::Address("[fd00::a]:53".parse().unwrap()),
            Place::NodePort(IpFamily::V4, 30053),
        ];
        let scope = Scope::Places(places);
        let udp = Filter { protocol: 17, v6: false, destination: None, port: None };
        let v4 = [
            Filter { destination: "10.96.0.10".parse().ok(), port: Some(53), ..udp },
            Filter { port: Some(30053), ..udp },
        ];
        assert_eq!(filters(IpFamily::V4, &scope), v4);
        let v6 = Filter { v6: true, destination: "fd00::a".parse().ok(), port: Some(53), ..udp };
        assert_eq!(filters(IpFamily::V6, &scope), [v6]);
        assert_eq!(filters(IpFamily::V4, &Scope::Everything), [udp]);
    }
}
