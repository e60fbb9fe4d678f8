//! Where events come from: the API server's watches and the kernel's address notifications.
//!
//! Everything ends in one bounded channel. When its reader is busy, the watches are simply read later; nothing is lost and
//! nothing piles up here. While the API server is away nothing is sent, so the last state stays.

mod address;
mod convert;
mod freshness;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod host;
mod intern;
mod service_cidrs;
mod watch;

use std::collections::BTreeMap;
use std::time::Instant;

use ipnet::IpNet;
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};

use crate::dataplane::{NumberedService, Scrape};
use crate::node::{HostAddresses, NodeFacts};
use crate::status::Status;
use crate::tracker::ObjectEvent;

pub use host::{HostError, follow_host};
pub use watch::{Watches, follow_cluster};

/// Events that may wait between the sources and the runner.
pub const EVENTS_MAX: usize = 1024;

/// One thing the runner has to know.
#[derive(Debug)]
pub struct Event {
    /// When it was received; the time until it is programmed is counted from here.
    pub received: Instant,
    /// When the change happened that an EndpointSlice reports (its `last-change-trigger-time`).
    pub trigger: Option<Timestamp>,
    /// What it is.
    pub update: Update,
}

/// What an [`Event`] says.
#[derive(Debug)]
pub enum Update {
    /// A Service or EndpointSlice.
    Object(ObjectEvent),
    /// This node's Node object.
    Node(NodeFacts),
    /// The Node has been looked for; whether it exists or not, there is nothing more to wait for.
    NodeListed,
    /// Where ClusterIPs are allocated from: all ServiceCIDRs, sorted.
    ServiceCidrs(Vec<IpNet>),
    /// The addresses of this network namespace.
    Host(HostAddresses),
    /// Somebody wants to know the data plane's counters.
    Scrape(oneshot::Sender<Scrape>),
    /// Somebody wants to know the ServicePorts with these ids of the data plane, and so many of their endpoints.
    ReadNumbered(Vec<u32>, usize, oneshot::Sender<Vec<NumberedService>>),
    /// Somebody wants to know how it is.
    ReadStatus(oneshot::Sender<Status>),
    /// Somebody wants to know the ServicePorts by the data plane's ids.
    ReadServices(oneshot::Sender<BTreeMap<u32, String>>),
}

impl Event {
    /// An event received now.
    pub fn now(update: Update) -> Self {
        Self { received: Instant::now(), trigger: None, update }
    }
}

/// A channel of [`EVENTS_MAX`] events.
pub fn channel() -> (mpsc::Sender<Event>, mpsc::Receiver<Event>) {
    mpsc::channel(EVENTS_MAX)
}
