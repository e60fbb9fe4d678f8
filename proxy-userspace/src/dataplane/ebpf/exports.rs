//! What a scrape gets of the kernel's counts: by ServicePort and endpoint, within bounds, and how full the maps are.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::inspect::{InspectError, ServiceCounts, ServiceReading, fills};
use crate::dataplane::Counters;
use crate::model::{IpFamily, Protocol, ServicePortName};
use crate::status::MapFill;

/// ServicePorts with series of their own: the first ones that were used, until they go. All others are one series together, whose
/// namespace and service are [`OTHERS`].
pub(super) const SERVICES_MAX: usize = 1000;
/// Endpoints with series of their own, of those ServicePorts.
pub(super) const ENDPOINTS_MAX: usize = 4000;
/// No namespace and no Service can have this name.
const OTHERS: &str = "_others";
/// How old the series of ServicePorts may be: for ten thousand of them reading takes the thread that programs Services milliseconds, and
/// who scrapes in quick succession does not hold up changes.
const SERVICES_AGE_MAX: Duration = Duration::from_millis(100);
/// How old the count of the maps' entries may be: all entries are read for it.
const FILLS_AGE_MAX: Duration = Duration::from_secs(30);

/// A ServicePort as a scrape sees it.
pub(super) struct Counted<'a> {
    /// Its name.
    pub(super) name: &'a ServicePortName,
    /// Its id.
    pub(super) id: u32,
}

/// What has to be remembered from one scrape to the next.
pub(super) struct Exports {
    pub(super) services: ServiceCounts,
    seats: RefCell<BTreeSet<ServicePortName>>,
    maps: PathBuf,
    fills: RefCell<Fills>,
    last: RefCell<Option<(Instant, Counters)>>,
}

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
    /// Over the counters, and over the maps that are pinned in `maps`.
    pub(super) fn new(services: ServiceCounts, maps: PathBuf) -> Self {
        Self { services, seats: RefCell::default(), maps, fills: RefCell::default(), last: RefCell::default() }
    }

    /// The series of all ServicePorts, [`SERVICES_AGE_MAX`] old at most; `endpoints` gives the connections of the endpoints of one.
    pub(super) fn services<'a>(
        &self,
        all: impl Iterator<Item = Counted<'a>>,
        endpoints: impl FnMut(&ServicePortName) -> Vec<(SocketAddr, u64)>,
    ) -> Counters {
        let mut last = self.last.borrow_mut();
        if let Some((_, counters)) = last.as_ref().filter(|(at, _)| at.elapsed() < SERVICES_AGE_MAX) {
            return counters.clone();
        }
        let counters = self.read_services(all, endpoints);
        // The age begins when the reading ends: however long it takes, most of the time is for others.
        *last = Some((Instant::now(), counters.clone()));
        counters
    }

    fn read_services<'a>(
        &self,
        all: impl Iterator<Item = Counted<'a>>,
        mut endpoints: impl FnMut(&ServicePortName) -> Vec<(SocketAddr, u64)>,
    ) -> Counters {
        let (mut counters, mut others) = (Counters::new(), ServiceReading::default());
        let all: Vec<Counted<'a>> = all.collect();
        let readings = self.services.read_up_to(all.iter().map(|counted| counted.id).max().unwrap_or_default());
        let used: Vec<(Counted<'a>, ServiceReading)> = all
            .into_iter()
            .map(|counted| {
                let reading = readings.get(counted.id as usize).copied().unwrap_or_default();
                (counted, reading)
            })
            .filter(|(_, reading)| *reading != ServiceReading::default())
            .collect();
        let mut seats = self.seats.borrow_mut();
        let present: BTreeSet<&ServicePortName> = used.iter().map(|(counted, _)| counted.name).collect();
        seats.retain(|name| present.contains(name));
        let mut room = ENDPOINTS_MAX;
        for (Counted { name, .. }, reading) in used {
            if !seats.contains(name) && (seats.len() >= SERVICES_MAX || !seats.insert(name.clone())) {
                others.packets += reading.packets;
                others.bytes += reading.bytes;
                others.connections += reading.connections;
                continue;
            }
            push(&mut counters, &labels(name), &reading);
            for (endpoint, connections) in endpoints(name).into_iter().filter(|(_, count)| *count > 0).take(room) {
                room -= 1;
                let mut labels = labels(name);
                labels.push(("endpoint".to_owned(), endpoint.to_string()));
                counters.push(("trama_endpoint_connections_total".to_owned(), labels, connections));
            }
        }
        push(&mut counters, &other_labels(), &others);
        counters
    }

    /// How full the maps were when they were counted last; nothing before that.
    pub(super) fn maps(&self) -> Counters {
        let mut known = self.fills.borrow_mut();
        known.refresh(&self.maps);
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
