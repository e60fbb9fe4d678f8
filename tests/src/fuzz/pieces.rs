//! What is known of datagrams in fragments.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::model::{Crossing, Meaning, Model};
use super::read::{Outline, Tuple};
use crate::packet::TCP;

/// Fragments of one datagram that wait for the first one, and the longest frame that does.
const HELD_MAX: u32 = 16;
const HELD_BYTES: usize = 2048;
/// What is older may or may not be remembered: a second at least, as kernels are built.
const FRESH: Duration = Duration::from_millis(700);

#[derive(Debug, Clone, Copy)]
struct Datagram {
    /// Ports and protocol, once the first fragment came.
    known: Option<(u16, u16, u8)>,
    held: u32,
    seen: usize,
    end: usize,
    since: Instant,
    /// It met a packet when nobody could say whether it is still remembered.
    doubtful: bool,
}

/// What becomes of a first fragment beside what its flow says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum First {
    Goes,
    /// It is dropped: another beginning of the same datagram was there.
    Overlaps,
    /// It is used up: those that waited for it go with a copy of it.
    Releases,
    Unclear,
}

type Key = (IpAddr, IpAddr, u32, u8);

/// All datagrams of late.
#[derive(Default)]
pub(crate) struct Pieces {
    datagrams: HashMap<Key, Datagram>,
}

fn key(outline: &Outline) -> Key {
    let identification = outline.piece.map_or(0, |piece| piece.identification);
    let protocol = if outline.source.is_ipv4() { outline.protocol } else { 0 };
    (outline.source, outline.destination, identification, protocol)
}

impl Datagram {
    fn new(known: Option<(u16, u16, u8)>, seen: usize) -> Self {
        Self { known, held: 0, seen, end: 0, since: Instant::now(), doubtful: false }
    }

    fn is_complete(&self) -> bool {
        self.end != 0 && self.seen >= self.end
    }

    fn is_doubtful(&self) -> bool {
        self.doubtful || self.since.elapsed() > FRESH
    }
}

impl Pieces {
    /// A first fragment.
    pub(crate) fn first(&mut self, crossing: Crossing, outline: &Outline, tuple: Tuple) -> First {
        let ports = (tuple.source.port(), tuple.destination.port(), tuple.protocol);
        let other = self.datagrams.get(&key(outline)).copied();
        let old = other.is_some_and(|other| other.is_doubtful());
        let same = other.is_some_and(|other| other.known.is_some_and(|known| (known.0, known.1) == (ports.0, ports.1)));
        let holds = other.is_some_and(|other| other.known.is_some() && !other.is_complete());
        if holds && !old && (same != crossing.ingress()) {
            return if crossing.ingress() { First::Overlaps } else { First::Goes };
        }
        let seen = outline.end - outline.transport;
        let new = Datagram { doubtful: old, ..Datagram::new(Some(ports), seen) };
        self.datagrams.insert(key(outline), new);
        match other {
            Some(_) if old => First::Unclear,
            Some(other) if other.held > 0 && crossing.ingress() => First::Releases,
            _ => First::Goes,
        }
    }

    /// A first fragment that may or may not be taken for one.
    pub(crate) fn doubt(&mut self, outline: &Outline) {
        self.datagrams.entry(key(outline)).or_insert(Datagram::new(None, 0)).doubtful = true;
    }

    /// A later fragment.
    pub(crate) fn later(&mut self, crossing: Crossing, outline: &Outline, model: &Model, length: usize) -> Meaning {
        let Some(piece) = outline.piece else { return Meaning::Unclear };
        let key = key(outline);
        let Some(datagram) = self.datagrams.get_mut(&key) else { return self.wait(crossing, key, length) };
        if datagram.is_doubtful() {
            datagram.doubtful = true;
            return Meaning::Unclear;
        }
        let Some((source, destination, protocol)) = datagram.known else { return self.wait(crossing, key, length) };
        if crossing.ingress() && datagram.is_complete() {
            return self.wait(crossing, key, length);
        }
        if piece.offset < if protocol == TCP { 20 } else { 8 } {
            return Meaning::Drop;
        }
        if crossing.ingress() {
            datagram.seen += outline.end - outline.transport;
            if !piece.more {
                datagram.end = piece.offset + outline.end - outline.transport;
            }
        }
        let source = SocketAddr::new(outline.source, source);
        let tuple = Tuple { source, destination: SocketAddr::new(outline.destination, destination), protocol };
        model.piece(tuple)
    }

    fn wait(&mut self, crossing: Crossing, key: Key, length: usize) -> Meaning {
        if !crossing.ingress() || length > HELD_BYTES {
            return Meaning::Untouched;
        }
        let new = Datagram::new(None, 0);
        let datagram = self.datagrams.entry(key).or_insert(new);
        if datagram.known.is_some() {
            *datagram = new;
        }
        if datagram.held >= HELD_MAX {
            return Meaning::Untouched;
        }
        datagram.held += 1;
        Meaning::Drop
    }
}
