//! Watching the kernel's events: switched on through a map, and off by itself when nobody renews it.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use aya::maps::{Array, MapData, RingBuf};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proxy_common::counter::CounterKind;
use proxy_common::event::{EVENT_EGRESS, EVENT_SOCKET, Event, MonitorSettings};
use proxy_common::pod::Pod;
use proxy_common::{Be16, Counter, V6};

use super::super::encode::UserAddress;
use super::trial::monotonic_ns;
use super::{InspectError, Pinned, map_error};

/// How long the programs go on after the last renewal: a watcher that was killed costs no longer than this.
const LEASE: Duration = Duration::from_secs(3);
/// Pause between renewals.
const RENEWAL: Duration = Duration::from_secs(1);

/// What to watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MonitorOptions {
    /// Only what was dropped, refused, or given back to the kernel.
    pub drops: bool,
    /// One of how many events is told; 0 and 1 are each.
    pub sample: u32,
}

/// Why a watcher comes back.
#[derive(Debug, Clone, PartialEq)]
pub enum Watched {
    /// With an event.
    Seen(Seen),
    /// Nothing happened until the deadline.
    Quiet,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// How long ago it was when it was read.
    pub age: Duration,
    /// What it was counted as.
    pub reason: Counter,
    /// `ingress`, `egress` or `socket`.
    pub path: &'static str,
    /// IP protocol number.
    pub protocol: u8,
    /// Source; `None` for a socket, whose source is not known.
    pub source: Option<SocketAddr>,
    /// Destination before translation.
    pub destination: SocketAddr,
    /// Where it goes instead, for work done.
    pub backend: Option<SocketAddr>,
    /// ServicePort; 0 for none.
    pub service_id: u32,
    /// Interface; 0 for a socket.
    pub interface: u32,
}

/// A watcher. Dropping it switches the events off.
pub struct Monitor {
    settings: Array<MapData, MonitorSettings>,
    ring: RingBuf<MapData>,
    wanted: MonitorSettings,
    renewed: Instant,
}

impl Monitor {
    /// Switches the events on. What an earlier watcher left unread is thrown away.
    ///
    /// # Errors
    /// [`InspectError::Watched`] while somebody else watches.
    pub fn start(pinned: &Pinned, options: MonitorOptions) -> Result<Self, InspectError> {
        let settings: Array<MapData, MonitorSettings> = pinned.open("MONITOR")?;
        let known = settings.get(&0, 0).map_err(|error| map_error("MONITOR", &error))?;
        let now = monotonic_ns();
        if known.deadline_ns > now {
            return Err(InspectError::Watched { seconds: (known.deadline_ns - now).div_ceil(1_000_000_000) });
        }
        let mut ring: RingBuf<MapData> = pinned.open("EVENTS")?;
        while ring.next().is_some() {}
        let owner = now ^ u64::from(std::process::id()) << 32;
        let (reasons, sample) = (reasons(options.drops), options.sample);
        let wanted = MonitorSettings { deadline_ns: 0, owner, reasons, sample, padding: 0 };
        let mut monitor = Self { settings, ring, wanted, renewed: Instant::now() };
        monitor.renew()?;
        Ok(monitor)
    }

    /// The next event, waiting until `deadline` at most.
    ///
    /// # Errors
    /// [`InspectError::Watched`] when somebody else has begun to watch; when the kernel's ring can't be read.
    pub fn next(&mut self, deadline: Instant) -> Result<Watched, InspectError> {
        loop {
            if self.renewed.elapsed() >= RENEWAL {
                self.renew()?;
            }
            if let Some(item) = self.ring.next() {
                if let Some(seen) = Event::from_bytes(&item).and_then(|event| seen(&event)) {
                    return Ok(Watched::Seen(seen));
                }
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Watched::Quiet);
            }
            let wait = PollTimeout::try_from(left.min(RENEWAL)).unwrap_or(PollTimeout::ZERO);
            let mut ready = [PollFd::new(self.ring.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, wait) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(map_error("EVENTS", &error)),
            }
        }
    }

    fn renew(&mut self) -> Result<(), InspectError> {
        let known = self.settings.get(&0, 0).map_err(|error| map_error("MONITOR", &error))?;
        let now = monotonic_ns();
        if known.deadline_ns > now && known.owner != self.wanted.owner {
            return Err(InspectError::Watched { seconds: (known.deadline_ns - now).div_ceil(1_000_000_000) });
        }
        let lease = u64::try_from(LEASE.as_nanos()).unwrap_or(u64::MAX);
        self.wanted.deadline_ns = now.saturating_add(lease);
        self.settings.set(0, self.wanted, 0).map_err(|error| map_error("MONITOR", &error))?;
        self.renewed = Instant::now();
        Ok(())
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if self.settings.get(&0, 0).is_ok_and(|known| known.owner == self.wanted.owner) {
            // Where this fails the deadline does it.
            let _late = self.settings.set(0, MonitorSettings::default(), 0);
        }
    }
}

/// A bit for each counter that is told. Packets of known flows are never told: there is one for each connection already.
fn reasons(drops: bool) -> u64 {
    let told = |counter: &&Counter| match counter.kind() {
        CounterKind::Path => {
            let is_known =
                matches!(counter, Counter::PacketEstablished | Counter::FrameEstablished | Counter::PacketFragment);
            !drops && !is_known
        }
        CounterKind::Drop | CounterKind::Pass => true,
        CounterKind::Monitor => false,
    };
    Counter::ALL.iter().filter(told).fold(0, |bits, counter| bits | 1 << *counter as u32)
}

fn seen(event: &Event) -> Option<Seen> {
    let reason = Counter::from_index(event.reason)?;
    let is_unread = matches!(reason, Counter::Fragment | Counter::Malformed | Counter::ExtensionHeaders);
    let has_ports = !is_unread && matches!(event.protocol, 6 | 17 | 132);
    let address = |address: V6, port: Be16| {
        let ip: IpAddr = match address.mapped_v4() {
            Some(v4) => v4.to_ip(),
            None => address.to_ip(),
        };
        SocketAddr::new(ip, if has_ports { port.to_host() } else { 0 })
    };
    // What comes once the flow is known names the flow's ServicePort; what comes before, the frontend's.
    let service_id = match reason {
        Counter::PacketNew
        | Counter::FrameNew
        | Counter::PacketError
        | Counter::TimeToLive
        | Counter::TooBig
        | Counter::NoRoute
        | Counter::RewriteFailed => event.flow_service_id,
        _ if is_unread => 0,
        _ => event.frontend_service_id,
    };
    let is_work = reason.kind() == CounterKind::Path;
    let path = match event.path {
        EVENT_SOCKET => "socket",
        EVENT_EGRESS => "egress",
        _ => "ingress",
    };
    Some(Seen {
        age: Duration::from_nanos(monotonic_ns().saturating_sub(event.time_ns)),
        reason,
        path,
        protocol: event.protocol,
        source: (event.path != EVENT_SOCKET).then(|| address(event.source, event.source_port)),
        destination: address(event.destination, event.destination_port),
        backend: is_work.then(|| address(event.backend, event.backend_port)),
        service_id,
        interface: event.interface,
    })
}

#[cfg(test)]
mod tests {
    use proxy_common::{Address, V4};

    use super::*;

    fn event(reason: Counter) -> Event {
        Event {
            source: V4::from_octets([10, 0, 0, 1]).widen(),
            destination: V4::from_octets([10, 96, 0, 1]).widen(),
            backend: V4::from_octets([10, 244, 0, 2]).widen(),
            source_port: Be16::from_host(5000),
            destination_port: Be16::from_host(80),
            backend_port: Be16::from_host(8080),
            protocol: 6,
            reason: reason as u32,
            frontend_service_id: 3,
            flow_service_id: 4,
            ..Event::default()
        }
    }

    #[test]
    fn an_event_names_the_service_that_its_reason_knows() {
        let of = |reason| seen(&event(reason)).unwrap();
        assert_eq!((of(Counter::PacketNew).service_id, of(Counter::PolicyDrop).service_id), (4, 3));
        assert_eq!(of(Counter::PacketNew).backend, Some("10.244.0.2:8080".parse().unwrap()));
        assert_eq!(of(Counter::PolicyDrop).backend, None);
        assert_eq!(of(Counter::Fragment).destination, "10.96.0.1:0".parse().unwrap());
        let socket = seen(&Event { path: EVENT_SOCKET, ..event(Counter::SocketConnect) }).unwrap();
        assert_eq!((socket.source, socket.path), (None, "socket"));
        assert_eq!(seen(&Event { reason: 63, ..event(Counter::PacketNew) }), None);
    }

    #[test]
    fn packets_of_known_flows_are_never_told() {
        for drops in [false, true] {
            assert_eq!(reasons(drops) >> Counter::PacketEstablished as u32 & 1, 0);
            assert_eq!(reasons(drops) >> Counter::FrameEstablished as u32 & 1, 0);
            assert_eq!(reasons(drops) >> Counter::PolicyDrop as u32 & 1, 1);
        }
        assert_eq!(
            (reasons(false) >> Counter::PacketNew as u32 & 1, reasons(true) >> Counter::PacketNew as u32 & 1),
            (1, 0)
        );
    }
}
