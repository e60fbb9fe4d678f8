//! Maps that grow in the running process: larger ones are made beside those in use, as a process does that was configured with larger
//! sizes, and take over from them.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use super::carry::Predecessor;
use super::expiry::{Expiry, Looks};
use super::load::preflight;
use super::maps::TUNNEL_ENDPOINTS_MAX;
use super::pins::{make_other_place, remove_directory};
use super::{EbpfConfig, EbpfDataplane, EbpfError, kernel};
use crate::dataplane::Counters;

/// The most ServicePorts that anybody can configure, and that maps grow to.
pub const SERVICES_MAX: u32 = 1 << 22;
/// The most endpoints of one family, in the same way.
pub const ENDPOINTS_MAX: u32 = 1 << 24;
/// A map grows when more than this part of it is taken.
const CROWDED_PERCENT: u64 = 80;
/// How long nothing is tried after a failure: each attempt loads all programs, and what the kernel lacked it may lack for long.
const REST: Duration = Duration::from_secs(600);
/// Name of the metric.
const METRIC: &str = "trama_map_growths_total";

/// How much of a map is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Filled {
    /// Its name, as in [`Full`](super::plan::Full).
    pub(super) map: &'static str,
    /// Entries taken.
    pub(super) used: u64,
    /// Entries that there is room for.
    pub(super) room: u64,
}

impl Filled {
    fn is_crowded(&self) -> bool {
        self.used * 100 > self.room * CROWDED_PERCENT
    }
}

/// What is remembered between two growths.
#[derive(Debug, Default)]
pub(super) struct Growth {
    /// Maps that had no room for a ServicePort since the last look; no more than there are maps.
    refused: BTreeSet<&'static str>,
    failed_at: Option<Instant>,
    grown: u64,
    failed: u64,
}

impl Growth {
    /// The map of this name has no room for a ServicePort.
    pub(super) fn refused(&mut self, map: &'static str) {
        self.refused.insert(map);
    }

    fn rests(&self) -> bool {
        self.failed_at.is_some_and(|at| at.elapsed() < REST)
    }

    /// How often maps grew, and how often that failed.
    pub(super) fn samples(&self) -> Counters {
        let sample = |result: &str, count| (METRIC.to_owned(), vec![("result".to_owned(), result.to_owned())], count);
        vec![sample("grown", self.grown), sample("failed", self.failed)]
    }
}

/// The configuration with twice the size for what has no room or little left; `None` where all have enough, or can have no more. Flows are
/// not among it: they have an end by themselves.
fn larger(config: &EbpfConfig, filled: &[Filled], refused: &BTreeSet<&'static str>) -> Option<EbpfConfig> {
    let crowded = filled.iter().filter(|filled| filled.is_crowded()).map(|filled| filled.map);
    let mut larger = config.clone();
    for map in crowded.chain(refused.iter().copied()) {
        match map {
            // As large as it gets.
            "endpoints" if config.max_endpoints >= TUNNEL_ENDPOINTS_MAX => {}
            "backends" | "slots" | "endpoints" => {
                larger.max_endpoints = doubled(config.max_endpoints, ENDPOINTS_MAX);
            }
            _ => larger.max_services = doubled(config.max_services, SERVICES_MAX),
        }
    }
    (larger != *config).then_some(larger)
}

fn doubled(size: u32, limit: u32) -> u32 {
    size.saturating_mul(2).min(limit.max(size))
}

impl EbpfDataplane {
    /// Makes larger maps where there is need. Returns whether they are in use now.
    ///
    /// While the maps before them are still taken over there is no place for others; the sync that ends it has yet to succeed.
    pub(super) fn grow_where_crowded(&mut self) -> bool {
        let refused = std::mem::take(&mut self.growth.refused);
        if self.predecessor.is_some() || self.growth.rests() {
            return false;
        }
        let Some(larger) = larger(&self.config, &self.filled(), &refused) else { return false };
        let (before, start) = (self.config.clone(), Instant::now());
        match self.enlarge(&larger) {
            Ok(()) => {
                self.growth.grown += 1;
                tracing::info!(
                    services = %from_to(before.max_services, larger.max_services),
                    endpoints = %from_to(before.max_endpoints, larger.max_endpoints),
                    took = ?start.elapsed(),
                    "the maps have grown"
                );
                true
            }
            Err(error) => {
                self.growth.failed += 1;
                self.growth.failed_at = Some(Instant::now());
                tracing::warn!(
                    %error,
                    services = before.max_services,
                    endpoints = before.max_endpoints,
                    retry_after = ?REST,
                    "the maps are nearly full and cannot grow; those in use stay, and what does not fit into them is refused"
                );
                false
            }
        }
    }

    /// How full everything is whose size follows from the configuration, flows excepted.
    fn filled(&self) -> Vec<Filled> {
        let ids = u64::from(self.config.max_services) * 2;
        let mut all = vec![Filled { map: "service_stats", used: self.service_ids.taken(), room: ids }];
        all.extend(self.v4.filled());
        all.extend(self.v6.filled());
        all
    }

    /// Makes maps of these sizes in the other place and puts the programs over them in the place of ours. Where that fails, ours are where
    /// they were, and nothing is left of the others.
    fn enlarge(&mut self, larger: &EbpfConfig) -> Result<(), EbpfError> {
        let kernel_version = preflight()?;
        // What is taken over is read from its pins.
        self.pins.restore().map_err(|source| kernel(&self.directory, source))?;
        let directory = make_other_place(&larger.bpffs, &self.directory)?;
        let predecessor = Some(Predecessor::running(&self.directory, &directory));
        let made = Self::load_beside(larger, &directory, predecessor, kernel_version).and_then(|(mut made, looks)| {
            made.begin()?;
            Ok((made, looks))
        });
        match made {
            Ok((made, looks)) => {
                self.give_way_to(made, looks);
                Ok(())
            }
            Err(error) => {
                self.stay(&directory);
                Err(error)
            }
        }
    }

    /// Everything in this process that holds the maps holds the successor's from here on. What counts flows has ended before the other
    /// begins: they may have the same counts.
    fn give_way_to(&mut self, mut successor: Self, looks: Option<Looks>) {
        successor.growth = std::mem::take(&mut self.growth);
        let totals = self.expiry.take().map(Expiry::end).unwrap_or_default();
        successor.look_after_flows(looks, totals);
        *self = successor;
    }

    /// Puts our programs back where the successor's may be, and removes what it left.
    fn stay(&mut self, successor: &Path) {
        if let Err(error) = self.attacher.reattach(&self.config.cgroup) {
            tracing::warn!(%error, "programs are to be attached again by the next audit");
        }
        if let Err(error) = remove_directory(successor) {
            tracing::warn!(path = %successor.display(), %error, "cannot remove maps that are not in use");
        }
    }
}

fn from_to(before: u32, after: u32) -> String {
    if before == after { before.to_string() } else { format!("{before} -> {after}") }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::dataplane::ebpf::{AttachMode, FlowTimeouts, FrameMode};

    fn config(max_services: u32, max_endpoints: u32) -> EbpfConfig {
        EbpfConfig {
            cgroup: PathBuf::new(),
            bpffs: PathBuf::new(),
            interfaces: Vec::new(),
            attach_mode: AttachMode::Auto,
            xdp_interfaces: Vec::new(),
            xdp_mode: FrameMode::Native,
            tunnels_are_gue: false,
            tunnel_interfaces: Vec::new(),
            max_services,
            max_endpoints,
            max_flows: 1024,
            flow_timeouts: FlowTimeouts::default(),
        }
    }

    fn sizes(of: &EbpfConfig, filled: &[(&'static str, u64, u64)], refused: &[&'static str]) -> Option<(u32, u32)> {
        let filled: Vec<Filled> =
            filled.iter().map(|(map, used, room)| Filled { map, used: *used, room: *room }).collect();
        let larger = larger(of, &filled, &refused.iter().copied().collect())?;
        assert_eq!(larger.max_flows, of.max_flows);
        Some((larger.max_services, larger.max_endpoints))
    }

    #[test]
    fn what_is_more_than_four_fifths_full_doubles() {
        let small = config(10, 100);
        assert_eq!(sizes(&small, &[("frontends", 32, 40), ("backends", 80, 100), ("slots", 0, 400)], &[]), None);
        assert_eq!(sizes(&small, &[("frontends", 33, 40)], &[]), Some((20, 100)));
        assert_eq!(sizes(&small, &[("slots", 321, 400), ("backends", 99, 100)], &[]), Some((10, 200)));
        assert_eq!(sizes(&small, &[("cluster_ips", 9, 10), ("slots", 400, 400)], &[]), Some((20, 200)));
    }

    #[test]
    fn what_was_refused_doubles_however_full_it_is() {
        let small = config(10, 100);
        assert_eq!(sizes(&small, &[("slots", 1, 400)], &["slots"]), Some((10, 200)));
        assert_eq!(sizes(&small, &[], &["service_stats", "source_ranges"]), Some((20, 100)));
    }

    #[test]
    fn what_is_as_large_as_it_gets_stays() {
        let large = config(SERVICES_MAX - 1, ENDPOINTS_MAX);
        assert_eq!(sizes(&large, &[("backends", 9, 10)], &["slots"]), None);
        assert_eq!(sizes(&large, &[("cluster_ips", 9, 10)], &[]), Some((SERVICES_MAX, ENDPOINTS_MAX)));
        // Tunnels' endpoints have a limit of their own, long before.
        assert_eq!(sizes(&config(10, TUNNEL_ENDPOINTS_MAX), &[("endpoints", 9, 10)], &["endpoints"]), None);
        assert_eq!(sizes(&config(10, 100), &[], &["endpoints"]), Some((10, 200)));
    }

    #[test]
    fn nothing_is_tried_soon_after_a_failure() {
        let mut growth = Growth::default();
        assert!(!growth.rests());
        growth.failed_at = Some(Instant::now());
        assert!(growth.rests());
    }
}
