//! Flows that conntrack translates for another proxy when we come.
//!
//! Datagrams have no beginning: without a flow of ours, the next one would go to another endpoint. So they become flows of ours.
//! Connections stay conntrack's, but nothing of ours may take the tuple of their answers: their port was chosen without us.

use std::io;
use std::net::IpAddr;
use std::path::Path;

use node_sys::conntrack::{Conntrack, Entry, Filter};
use proxy_common::flow_table::FlowEdit;
use proxy_common::pod::Pod;
use proxy_common::{Be16, FLOW_ANSWERED, FLOW_CONFIRMED, FLOW_FOREIGN, FLOW_REPLY, Flow, FlowKey, FrontendKey, V4, V6};
use tracing::{info, warn};

use super::encode::UserAddress;
use super::flows::FlowTable;
use super::plan::Planner;
use crate::dataplane::SyncError;
use crate::model::{NodeConfig, Protocol};

/// TCP's number.
const TCP: u8 = Protocol::Tcp as u8;
/// UDP's number.
const UDP: u8 = Protocol::Udp as u8;
/// One entry of this many may be taken for what others translate; the rest of the map is for flows to come.
const SHARE: u32 = 4;

/// The flows of both families, for as long as they have not been filled in.
pub(super) struct Takeover {
    v4: FlowTable<V4>,
    v6: FlowTable<V6>,
    room: u32,
}

/// What an entry of conntrack becomes in `FLOWS`.
type Entries<A> = Vec<(FlowKey<A>, Flow<A>)>;

impl Takeover {
    /// Opens the tables that are pinned in the directory of a version. `max_flows` is their size.
    pub(super) fn open(version: &Path, max_flows: u32) -> Result<Self, SyncError> {
        let failed = |source| SyncError::Kernel { object: "the table of flows".to_owned(), source };
        let (v4, v6) = (FlowTable::open(version).map_err(failed)?, FlowTable::open(version).map_err(failed)?);
        Ok(Self { v4, v6, room: max_flows / SHARE })
    }

    /// Fills in what conntrack translates now. To be called before the frontends are there, so that no datagram finds its flow
    /// missing, and again behind them, for what began meanwhile. Without conntrack there is nothing to take over.
    pub(super) fn run(&self, v4: &Planner<V4>, v6: &Planner<V6>, node: &NodeConfig) {
        let filled = fill(&self.v4, v4, node, self.room).and_then(|a| Ok(a + fill(&self.v6, v6, node, self.room)?));
        match filled {
            Ok(0) => {}
            Ok(entries) => info!(entries, "took over flows of the proxy before us"),
            Err(error) => warn!(%error, "flows of a proxy before us may be mixed up with new ones"),
        }
    }
}

/// Returns how many entries were written.
fn fill<A: UserAddress>(flows: &FlowTable<A>, planner: &Planner<A>, node: &NodeConfig, room: u32) -> io::Result<usize>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
    FlowEdit<A>: Pod,
{
    let Ok(mut table) = Conntrack::open() else { return Ok(0) };
    let backend = planner.backends_behind();
    let wanted = |entry: &Entry| match entry.protocol {
        TCP => held(entry),
        _ => taken(entry, node, &backend),
    };
    let v6 = A::from_ip(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)).is_some();
    let mut written = 0;
    for protocol in [TCP, UDP] {
        let filter = Filter { protocol, v6, destination: None, port: None };
        let mut result = Ok(());
        // A kernel without conntrack translates nothing.
        let _ = table.for_each(&filter, |entry| {
            for (key, flow) in wanted(entry).unwrap_or_default() {
                if written < room as usize && result.is_ok() {
                    // A flow that we know of is ours.
                    result = flows.add(&key, &flow).map(|new| written += usize::from(new));
                }
            }
        });
        result?;
    }
    Ok(written)
}

/// The answers of a translated connection, as they arrive here.
fn held<A: UserAddress>(entry: &Entry) -> Option<Entries<A>> {
    if entry.ended || !entry.is_translated() {
        return None;
    }
    let key = key(entry.reply.source, entry.reply.destination, TCP)?;
    Some(vec![(key, Flow { flags: FLOW_FOREIGN, ..Flow::default() })])
}

/// A translated flow of datagrams to an endpoint that serves. What the node itself sends is translated before it is a packet that
/// we see.
fn taken<A: UserAddress>(
    entry: &Entry,
    node: &NodeConfig,
    backend: impl Fn(&FrontendKey<A>, A, Be16) -> Option<(u32, u32)>,
) -> Option<Entries<A>> {
    let (original, reply) = (&entry.original, &entry.reply);
    if !entry.is_translated() || node.node_addresses.contains(&original.source.ip()) {
        return None;
    }
    let (address, port) = (A::from_ip(reply.source.ip())?, Be16::from_host(reply.source.port()));
    let frontend = |ip: A| FrontendKey {
        address: ip,
        port: Be16::from_host(original.destination.port()),
        protocol: UDP,
        padding: 0,
    };
    let exact = backend(&frontend(A::from_ip(original.destination.ip())?), address, port);
    let node_port = || {
        let answers = node.node_port_addresses.contains(&original.destination.ip());
        answers.then(|| backend(&frontend(A::default()), address, port)).flatten()
    };
    let (backend_id, backend_generation) = exact.or_else(node_port)?;
    let forward_key: FlowKey<A> = key(original.source, original.destination, UDP)?;
    let answer_key: FlowKey<A> = key(reply.source, reply.destination, UDP)?;
    let becomes = |to: &FlowKey<A>, flags| Flow {
        source: to.destination,
        destination: to.source,
        source_port: to.destination_port,
        destination_port: to.source_port,
        flags: flags | FLOW_ANSWERED | FLOW_CONFIRMED,
        // Nobody asked us to open it.
        service_id: 0,
        backend_id,
        backend_generation,
        // The kernel's clock is the programs' to read.
        last_seen: 0,
        ..Flow::default()
    };
    // The answer's first, as with every flow.
    let (forward, answer) = (becomes(&answer_key, 0), becomes(&forward_key, FLOW_REPLY));
    Some(vec![(answer_key, answer), (forward_key, forward)])
}

fn key<A: UserAddress>(from: std::net::SocketAddr, to: std::net::SocketAddr, protocol: u8) -> Option<FlowKey<A>> {
    Some(FlowKey {
        source: A::from_ip(from.ip())?,
        destination: A::from_ip(to.ip())?,
        source_port: Be16::from_host(from.port()),
        destination_port: Be16::from_host(to.port()),
        protocol,
        padding: [0; 3],
    })
}

#[cfg(test)]
mod tests;
