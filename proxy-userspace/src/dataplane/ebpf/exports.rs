//! What a scrape gets of the kernel's counts: by ServicePort and endpoint, within bounds, and how full the maps are. Whole maps are read for
//! both, on other threads than the one that programs Services.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::inspect::{InspectError, Pinned, ServiceCounts, ServiceReading, fills};
use super::pins::maps_of;
use crate::dataplane::{AskNumbered, Counters, NumberedService};
use crate::model::{IpFamily, Protocol, ServicePortName};
use crate::status::MapFill;

/// ServicePorts with series of their own: the first ones that were used, until they go. All others are one series together, whose
/// namespace and service are [`OTHERS`].
pub(super) const SERVICES_MAX: usize = 1000;
/// Endpoints with series of their own, of those ServicePorts.
pub(super) const ENDPOINTS_MAX: usize = 4000;
/// No namespace and no Service can have this name.
const OTHERS: &str = "_others";
/// How old the count of the maps' entries may be: all entries are read for it.
const FILLS_AGE_MAX: Duration = Duration::from_secs(30);

/// What has to be remembered from one scrape to the next.
pub(super) struct Exports {
    pub(super) services: ServiceCounts,
    seats: Arc<Mutex<Seats>>,
    directory: PathBuf,
    fills: RefCell<Fills>,
}

/// Ids of the ServicePorts that have series of their own.
type Seats = BTreeSet<u32>;

/// The last count of the maps' entries, and the next one while it goes on: on a thread of its own, for full tables take a while and the
/// one that programs Services has no time for it.
#[derive(Default)]
struct Fills {
    last: Option<(Instant, Vec<MapFill>)>,
    next: Option<JoinHandle<Result<Vec<MapFill>, InspectError>>>,
}

impl Fills {
    /// Takes a count that has ended, and starts another when the last one is old.
    fn refresh(&mut self, maps: &Path) {
        if let Some(counting) = self.next.take_if(|counting| counting.is_finished()) {
            match counting.join() {
                Ok(Ok(fills)) => self.last = Some((Instant::now(), fills)),
                Ok(Err(error)) => tracing::debug!(%error, "cannot count the entries of the maps"),
                Err(_) => tracing::debug!("counting the entries of the maps ended early"),
            }
        }
        let is_old = self.last.as_ref().is_none_or(|(at, _)| at.elapsed() > FILLS_AGE_MAX);
        if is_old && self.next.is_none() {
            let maps = maps.to_owned();
            let started = thread::Builder::new().name("fills".to_owned()).spawn(move || fills(&maps));
            self.next =
                started.inspect_err(|error| tracing::debug!(%error, "cannot count the entries of the maps")).ok();
        }
    }
}

impl Exports {
    /// Over the counters, and over the maps that are pinned in the directory of a version.
    pub(super) fn new(services: ServiceCounts, directory: PathBuf) -> Self {
        Self { services, seats: Arc::default(), directory, fills: RefCell::default() }
    }

    /// Reads the series of all ServicePorts, whose ids are below `ids_end`.
    pub(super) fn services(&self, ids_end: u32) -> impl FnOnce(AskNumbered<'_>) -> Counters + Send + 'static {
        let (pinned, seats) = (Pinned::at(&self.directory), Arc::clone(&self.seats));
        move |ask| {
            let read = read_services(&pinned, &seats, ids_end, ask);
            // They are back once an audit has made the pins again.
            read.inspect_err(|error| tracing::debug!(%error, "cannot read the counters of ServicePorts"))
                .unwrap_or_default()
        }
    }

    /// How full the maps were when they were counted last; nothing before that.
    pub(super) fn maps(&self) -> Counters {
        let mut known = self.fills.borrow_mut();
        known.refresh(&maps_of(&self.directory));
        let fills = known.last.iter().flat_map(|(_, fills)| fills);
        fills
            .flat_map(|MapFill { map, entries, maximum }| {
                let labels = vec![("map".to_owned(), map.to_ascii_lowercase())];
                [
                    ("trama_map_entries".to_owned(), labels.clone(), *entries as u64),
                    ("trama_map_entries_max".to_owned(), labels, *maximum as u64),
                ]
            })
            .collect()
    }
}

/// Those of `all` that have one of these ids; `endpoints` gives so many ids and addresses of one.
pub(super) fn numbered<'a>(
    all: impl Iterator<Item = (&'a ServicePortName, u32)>,
    ids: &[u32],
    endpoints_max: usize,
    endpoints: impl Fn(&ServicePortName, usize) -> Vec<(u32, SocketAddr)>,
) -> Vec<NumberedService> {
    let wanted: BTreeSet<u32> = ids.iter().copied().collect();
    let mut room = endpoints_max;
    let numbered = all.filter(|(_, id)| wanted.contains(id)).map(|(name, id)| {
        let endpoints = endpoints(name, room);
        room -= endpoints.len();
        NumberedService { id, name: name.clone(), endpoints }
    });
    numbered.collect()
}

fn read_services(
    pinned: &Pinned,
    seats: &Mutex<Seats>,
    ids_end: u32,
    ask: AskNumbered<'_>,
) -> Result<Counters, InspectError> {
    let readings = pinned.service_counts()?.read_up_to(ids_end.saturating_sub(1));
    let used = (0..).zip(readings).filter(|(_, reading)| *reading != ServiceReading::default()).collect();
    let (seated, others) = take_seats(seats, used);
    let named = ask(seated.keys().copied().collect(), ENDPOINTS_MAX);
    let mut counters = Counters::new();
    for (service, reading) in named.iter().filter_map(|service| Some((service, seated.get(&service.id)?))) {
        push(&mut counters, &labels(&service.name), reading);
    }
    push(&mut counters, &other_labels(), &others);
    for family in [IpFamily::V4, IpFamily::V6] {
        let counts = pinned.backend_counts(family)?;
        push_endpoints(&mut counters, named.iter().filter(|service| service.name.family == family), |id| {
            counts.read(id)
        });
    }
    Ok(counters)
}

/// Divides what was used into that with series of its own and the sum of the rest. Whoever had a seat keeps it.
fn take_seats(
    seats: &Mutex<Seats>,
    mut used: BTreeMap<u32, ServiceReading>,
) -> (BTreeMap<u32, ServiceReading>, ServiceReading) {
    // What a panic left is a set all the same.
    let mut seats = seats.lock().unwrap_or_else(PoisonError::into_inner);
    seats.retain(|id| used.contains_key(id));
    let room = SERVICES_MAX.saturating_sub(seats.len());
    let new: Vec<u32> = used.keys().filter(|id| !seats.contains(id)).take(room).copied().collect();
    seats.extend(new);
    let others = used.extract_if(.., |id, _| !seats.contains(id));
    let others = others.fold(ServiceReading::default(), |sum, (_, reading)| ServiceReading {
        packets: sum.packets + reading.packets,
        bytes: sum.bytes + reading.bytes,
        connections: sum.connections + reading.connections,
    });
    (used, others)
}

fn push_endpoints<'a>(
    counters: &mut Counters,
    services: impl Iterator<Item = &'a NumberedService>,
    connections: impl Fn(u32) -> u64,
) {
    for service in services {
        for (id, endpoint) in &service.endpoints {
            let count = connections(*id);
            if count > 0 {
                let mut labels = labels(&service.name);
                labels.push(("endpoint".to_owned(), endpoint.to_string()));
                counters.push(("trama_endpoint_connections_total".to_owned(), labels, count));
            }
        }
    }
}

fn push(counters: &mut Counters, labels: &[(String, String)], reading: &ServiceReading) {
    let values = [
        ("trama_service_packets_total", reading.packets),
        ("trama_service_bytes_total", reading.bytes),
        ("trama_service_connections_total", reading.connections),
    ];
    counters.extend(values.map(|(name, value)| (name.to_owned(), labels.to_vec(), value)));
}

fn labels(name: &ServicePortName) -> Vec<(String, String)> {
    let protocol = match name.protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
    };
    let family = match name.family {
        IpFamily::V4 => "IPv4",
        IpFamily::V6 => "IPv6",
    };
    named([&name.namespace, &name.service, &name.port, protocol, family])
}

fn other_labels() -> Vec<(String, String)> {
    named([OTHERS, OTHERS, "", "", ""])
}

fn named(values: [&str; 5]) -> Vec<(String, String)> {
    let names = ["namespace", "service", "port", "protocol", "ip_family"];
    names.into_iter().zip(values).map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(ids: impl IntoIterator<Item = u32>) -> BTreeMap<u32, ServiceReading> {
        ids.into_iter().map(|id| (id, ServiceReading { packets: 2, bytes: 100, connections: 1 })).collect()
    }

    #[test]
    fn the_first_that_are_used_have_series_of_their_own_until_they_go() {
        let (seats, max) = (Mutex::default(), SERVICES_MAX as u32);
        let (seated, others) = take_seats(&seats, used(2..max + 1));
        assert_eq!((seated.len(), others.packets), (SERVICES_MAX - 1, 0));
        // One seat was left; who comes later with a smaller number gets it, and nobody loses one.
        let (seated, others) = take_seats(&seats, used(0..max + 1));
        assert!(seated.contains_key(&0) && seated.contains_key(&2) && !seated.contains_key(&1));
        assert_eq!((seated.len(), others), (SERVICES_MAX, ServiceReading { packets: 2, bytes: 100, connections: 1 }));
        let (seated, others) = take_seats(&seats, used(1..max + 1));
        assert!(seated.contains_key(&1) && others == ServiceReading::default());
    }
}
