//! Runs the programs that end flows, on a thread of its own: every few seconds, and soon after endpoints changed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{Array, MapData, MapError};
use aya::programs::SchedClassifier;
use node_sys::bpf::{MappedArray, open_pinned, run_repeatedly};
use node_sys::probe::ticks_per_second;
use proxy_common::flow_table::FlowHead;
use proxy_common::{FlowCensus, FlowLimits, FlowState, SEEN_TICKS};
use tracing::{debug, warn};

use super::attach::refused;
use super::encode::{SOURCE_PORT_MAX, SOURCE_PORT_MIN};
use super::{EbpfConfig, EbpfError, flows};
use crate::dataplane::Counters;

/// Between two looks at all flows.
const PERIOD: Duration = Duration::from_secs(5);
/// After endpoints changed there are looks in quick succession, this far apart: at once, and then for who has just sent something that
/// nobody will answer.
const SOON: Duration = Duration::from_millis(400);
const SOON_TIMES: u32 = 3;
/// How long a packet to an endpoint that is gone may remain unanswered.
const UNANSWERED: Duration = Duration::from_millis(300);
/// Buckets that are read at a time to see whether there is any flow: what is mapped at once.
const WINDOW: u32 = 2048;
/// How often a look that a signal interrupts is gone on with.
const INTERRUPTIONS_MAX: usize = 256;

/// When idle flows end. States that are not here have the kernel's timeouts (net/netfilter/nf_conntrack_proto_tcp.c, _sctp.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowTimeouts {
    /// TCP connections; `conntrack.tcpEstablishedTimeout`, 24 hours.
    pub tcp_established: Duration,
    /// TCP connections that one side has closed; `conntrack.tcpCloseWaitTimeout`, 1 hour.
    pub tcp_half_closed: Duration,
    /// UDP without an answer; `conntrack.udpTimeout`, 30 seconds.
    pub udp_unanswered: Duration,
    /// UDP with answers; `conntrack.udpStreamTimeout`, 120 seconds.
    pub udp_answered: Duration,
}

impl Default for FlowTimeouts {
    fn default() -> Self {
        Self {
            tcp_established: Duration::from_hours(24),
            tcp_half_closed: Duration::from_hours(1),
            udp_unanswered: Duration::from_secs(30),
            udp_answered: Duration::from_secs(120),
        }
    }
}

impl FlowTimeouts {
    /// How long a flow may be idle in a state.
    fn of(&self, state: FlowState) -> Duration {
        match state {
            FlowState::TcpEstablished => self.tcp_established,
            FlowState::TcpHalfClosed => self.tcp_half_closed,
            FlowState::TcpOpening | FlowState::TcpClosed => Duration::from_secs(120),
            FlowState::UdpUnanswered => self.udp_unanswered,
            FlowState::UdpAnswered => self.udp_answered,
            FlowState::SctpOpening => Duration::from_secs(30),
            FlowState::SctpEstablished => Duration::from_secs(210),
            FlowState::SctpClosed => Duration::from_secs(10),
        }
    }
}

const STATES: [FlowState; FlowState::COUNT] = [
    FlowState::TcpOpening,
    FlowState::TcpEstablished,
    FlowState::TcpHalfClosed,
    FlowState::TcpClosed,
    FlowState::UdpUnanswered,
    FlowState::UdpAnswered,
    FlowState::SctpOpening,
    FlowState::SctpEstablished,
    FlowState::SctpClosed,
];

/// The timeouts in ticks. Idle time is compared as a signed number, so the longest that there is is 2^31 - 1 ticks: 24 days at 1000 ticks
/// a second. What was seen is known to [`SEEN_TICKS`] only, which are granted.
fn limits(timeouts: &FlowTimeouts, ticks_per_second: u32) -> FlowLimits {
    let ticks = |duration: Duration| {
        let ticks = duration.as_millis() * u128::from(ticks_per_second) / 1000 + u128::from(SEEN_TICKS);
        u32::try_from(ticks).unwrap_or(u32::MAX).min(i32::MAX.cast_unsigned() / 2)
    };
    FlowLimits { idle_ticks: STATES.map(|state| ticks(timeouts.of(state))), unanswered_ticks: ticks(UNANSWERED) }
}

/// What was found so far.
#[derive(Debug, Default)]
struct Found {
    /// Entries that were ended.
    idle: AtomicU64,
    endpoint_gone: AtomicU64,
    /// By family, at the last look.
    ports: [PortsFound; 2],
}

/// Source ports of the node's that masqueraded flows hold: all of them, and the most towards one endpoint of one ServicePort. The same
/// number may be in use towards each endpoint; ServicePorts that share an endpoint share its ports, and are counted each for itself.
#[derive(Debug, Default)]
struct PortsFound {
    used: AtomicU64,
    used_max: AtomicU64,
}

/// What was found since the process began, whatever maps it had.
#[derive(Debug, Default, Clone)]
pub(super) struct Totals(Arc<Found>);

/// The thread. Dropping the handle ends it after the look that it is at.
#[derive(Debug)]
pub(super) struct Expiry {
    changed: SyncSender<()>,
    totals: Totals,
    /// Held during a look; whether there are to be no more.
    over: Arc<Mutex<bool>>,
}

impl Expiry {
    /// Starts to look, and to add to `totals`. The backends are known by now.
    ///
    /// # Errors
    /// [`EbpfError`] where the process can have no more threads.
    pub(super) fn start(mut looks: Looks, totals: Totals) -> Result<Self, EbpfError> {
        let (changed, receiver) = mpsc::sync_channel(1);
        let over = Arc::new(Mutex::new(false));
        let (found, ended) = (totals.clone(), Arc::clone(&over));
        let work = move || looks.work(&receiver, &found.0, &ended);
        thread::Builder::new().name("flows".to_owned()).spawn(work).map_err(|error| refused("flows", &error))?;
        Ok(Self { changed, totals, over })
    }

    /// Ends it: when this returns no look goes on, and none will begin.
    pub(super) fn end(self) -> Totals {
        *self.over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.totals
    }

    /// Says that endpoints may have gone. Returns at once.
    pub(super) fn endpoints_changed(&self) {
        // One that waits is enough.
        let _waiting = self.changed.try_send(());
    }

    /// Entries that were ended since the start, by reason; source ports in use, as the last look found them, and how many there are towards
    /// one endpoint and protocol.
    pub(super) fn samples(&self) -> Counters {
        let read = |total: &AtomicU64| total.load(Ordering::Relaxed);
        let sample = |name: &str, label: &str, value: &str, count| {
            (name.to_owned(), vec![(label.to_owned(), value.to_owned())], count)
        };
        let (ended, found) = ("trama_flow_entries_ended_total", &self.totals.0);
        let mut samples = vec![
            sample(ended, "reason", "idle", read(&found.idle)),
            sample(ended, "reason", "endpoint_gone", read(&found.endpoint_gone)),
            ("trama_snat_ports_limit".to_owned(), Vec::new(), u64::from(SOURCE_PORT_MAX - SOURCE_PORT_MIN) + 1),
        ];
        for (family, ports) in ["IPv4", "IPv6"].into_iter().zip(&found.ports) {
            samples.push(sample("trama_snat_ports_used", "ip_family", family, read(&ports.used)));
            samples.push(sample("trama_snat_ports_used_max", "ip_family", family, read(&ports.used_max)));
        }
        samples
    }
}

/// What is found so far; the programs write it.
type Census = Array<MapData, FlowCensus>;

/// The programs of one family.
struct FamilyPrograms {
    expire: OwnedFd,
    recount: OwnedFd,
    /// Backends that there is room for.
    backends: u32,
    /// The buckets.
    heads: MappedArray,
    /// Whether the last look counted flows.
    counted: bool,
}

/// The programs. The kernel keeps the maps that only they have as long as these.
pub(super) struct Looks {
    families: [FamilyPrograms; 2],
    census: Census,
}

impl Looks {
    /// Takes the programs of `object`, which are loaded, over the maps that are pinned in `directory`.
    ///
    /// # Errors
    /// [`EbpfError`] where a map can't be opened.
    pub(super) fn take(object: &mut Ebpf, config: &EbpfConfig, directory: &Path) -> Result<Self, EbpfError> {
        let ticks = ticks_per_second()?;
        let map = object.map_mut("FLOW_LIMITS").ok_or_else(|| missing("FLOW_LIMITS"))?;
        let mut map: Array<_, FlowLimits> = map.try_into().map_err(|error| refused("FLOW_LIMITS", &error))?;
        map.set(0, limits(&config.flow_timeouts, ticks), 0).map_err(|error| refused("FLOW_LIMITS", &error))?;
        let family = |suffix: &str, expire: &str, recount: &str| {
            let heads = format!("FLOW_HEADS_{suffix}");
            let path = directory.join("maps").join(&heads);
            let map = open_pinned(&path).map_err(|source| EbpfError::Bpffs { path, source })?;
            let heads = MappedArray::map(map.as_fd(), flows::buckets(config.max_flows), size_of::<FlowHead>())
                .map_err(|error| refused(&heads, &error))?;
            let (expire, recount) = (descriptor(object, expire)?, descriptor(object, recount)?);
            // An earlier process may have counted.
            Ok::<_, EbpfError>(FamilyPrograms { expire, recount, backends: config.max_endpoints, heads, counted: true })
        };
        let families = [family("V4", "expire_v4", "recount_v4")?, family("V6", "expire_v6", "recount_v6")?];
        let census = object.take_map("FLOW_CENSUS").ok_or_else(|| missing("FLOW_CENSUS"))?;
        let census = census.try_into().map_err(|error: MapError| refused("FLOW_CENSUS", &error))?;
        Ok(Self { families, census })
    }

    /// Until it is over, or nobody can say any more that endpoints changed. The first look comes before Services do, for it may take long.
    fn work(&mut self, changed: &Receiver<()>, found: &Found, over: &Mutex<bool>) {
        let mut soon = 0;
        loop {
            {
                let over = over.lock().unwrap_or_else(PoisonError::into_inner);
                if *over {
                    return;
                }
                self.look(found);
            }
            if soon > 0 {
                // Changes that come meanwhile are one: a look at each would keep a CPU, and the next change waiting.
                thread::sleep(SOON);
            }
            let pause = if soon > 0 { Duration::ZERO } else { PERIOD };
            match changed.recv_timeout(pause) {
                Ok(()) => soon = SOON_TIMES,
                Err(RecvTimeoutError::Timeout) => soon = soon.saturating_sub(1),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn look(&mut self, found: &Found) {
        for (family, ports) in self.families.iter_mut().zip(&found.ports) {
            match family.look(&mut self.census) {
                Ok(census) => found.add(&census, ports),
                Err(error) => warn!(%error, "cannot look for flows that are over"),
            }
        }
    }
}

impl Found {
    fn add(&self, census: &FlowCensus, ports: &PortsFound) {
        if census.expired + census.orphaned > 0 {
            debug!(entries = census.entries, idle = census.expired, endpoint_gone = census.orphaned, "ended flows");
        }
        self.idle.fetch_add(u64::from(census.expired), Ordering::Relaxed);
        self.endpoint_gone.fetch_add(u64::from(census.orphaned), Ordering::Relaxed);
        ports.used.store(census.masqueraded.into(), Ordering::Relaxed);
        ports.used_max.store(census.masqueraded_max.into(), Ordering::Relaxed);
    }
}

impl FamilyPrograms {
    /// Looks at all flows once, and counts those of backends anew where there is anything to count: not for nothing, for the tables are large.
    fn look(&mut self, census: &mut Census) -> io::Result<FlowCensus> {
        if !self.counted && !self.has_flows()? {
            return Ok(FlowCensus::default());
        }
        let mut found = run(&self.expire, self.heads.entries(), census)?;
        let counted = found.counted + found.masqueraded > 0;
        // Once more when there are none: the last of them may have gone.
        if counted || std::mem::replace(&mut self.counted, counted) {
            found.masqueraded_max = run(&self.recount, self.backends, census)?.masqueraded_max;
        }
        self.counted = counted;
        Ok(found)
    }

    /// Whether there is any flow, or there was one while this was read.
    fn has_flows(&self) -> io::Result<bool> {
        let end = self.heads.entries();
        for first in (0..end).step_by(WINDOW as usize) {
            let mut used = 0;
            let words = size_of::<FlowHead>() / size_of::<u32>();
            self.heads.read(first, WINDOW.min(end - first), words, |_, words| {
                if words.iter().any(|word| *word != 0) {
                    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
                    used += flows::used(&bytes);
                }
            })?;
            if used > 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Runs a program once for each of so many elements, and returns what it found.
fn run(program: &OwnedFd, elements: u32, census: &mut Census) -> io::Result<FlowCensus> {
    census.set(0, FlowCensus::default(), 0).map_err(io::Error::other)?;
    for _ in 0..INTERRUPTIONS_MAX {
        let found = census.get(&0, 0).map_err(io::Error::other)?;
        let left = elements.saturating_sub(found.next);
        if left == 0 {
            return Ok(found);
        }
        match run_repeatedly(program.as_fd(), left) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
    }
    Err(io::ErrorKind::Interrupted.into())
}

/// Another descriptor of a program that is loaded.
fn descriptor(object: &Ebpf, name: &str) -> Result<OwnedFd, EbpfError> {
    let program: &SchedClassifier =
        object.program(name).ok_or_else(|| missing(name))?.try_into().map_err(|_| missing(name))?;
    let fd = program.fd().map_err(|error| refused(name, &error))?;
    fd.as_fd().try_clone_to_owned().map_err(|error| refused(name, &error))
}

fn missing(name: &str) -> EbpfError {
    EbpfError::MissingProgram { program: name.to_owned() }
}

#[cfg(test)]
mod tests;
