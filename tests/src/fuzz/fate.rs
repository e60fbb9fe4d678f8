//! What a packet with a known tuple must become: its verdict, mark and link-layer addresses, or what it is answered with.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use trama_proxy::dataplane::ebpf::{Hook, Passage};

use super::bed::{Bed, Link, Way, family, way};
use super::compare::Part;
use super::direct::Course;
use super::model::{Candidate, Crossing, Entry};
use super::read::{ETHERNET, Outline, SYN, Tuple, has_ports, outline_v4, outline_v6, read, word};
use super::tunnel::overhead;
use crate::packet::TCP;

/// `TC_ACT_UNSPEC`, which leaves a packet to the programs behind, `TC_ACT_*` (include/uapi/linux/pkt_cls.h) and `XDP_*`
/// (include/uapi/linux/bpf.h).
pub(crate) const ON: u32 = u32::MAX;
pub(super) const SHOT: u32 = 2;
pub(super) const REDIRECT: u32 = 7;
pub(super) const XDP_PASS: u32 = 2;
pub(super) const XDP_TX: u32 = 3;
pub(super) const XDP_REDIRECT: u32 = 4;
/// `MARK_DONE` and `MARK_SOURCE` of ARCHITECTURE.md.
pub(crate) const DONE: u32 = 0x0020_0000;
const SOURCE: u32 = 0x0040_0000;

/// ICMP errors that the programs make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    Unreachable,
    TimeExceeded,
    TooBig(u32),
}

/// What a packet with a known tuple must become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Refused(Refusal),
    Dropped,
    Sent { verdict: u32, mark: u32, mac: Mac, forwarded: bool, kind: Sending },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sending {
    Plain,
    /// To the node's own sockets, over `lo`.
    HandedOver,
    /// With the source that it came with: the kernel cuts it first.
    SourceLater,
    /// As it is, in a tunnel between these ends.
    Tunnelled([IpAddr; 2]),
}

/// Link-layer addresses behind the hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mac {
    Same,
    Swapped,
    Zero,
    To([u8; 6], [u8; 6]),
}

/// A packet, and what the program did with it.
#[derive(Clone, Copy)]
pub(super) struct Given<'a> {
    pub(super) bed: &'a Bed,
    pub(super) crossing: Crossing,
    /// As it was before, out of its tunnel.
    pub(super) frame: &'a [u8],
    pub(super) passage: &'a Passage,
    /// It came in a tunnel.
    pub(super) behind: bool,
}

/// The same, read.
pub(super) struct Case<'a> {
    pub(super) given: Given<'a>,
    pub(super) outline: Outline,
}

impl Case<'_> {
    pub(super) fn fate_of(&self, candidate: &Candidate) -> Fate {
        if candidate.lost {
            return Fate::Dropped;
        }
        if candidate.course == Course::Out {
            return self.fate_in_tunnel([candidate.source, candidate.destination.ip()], false);
        }
        self.fate_to(candidate.destination.ip(), candidate.source != self.outline.source, false, false, false)
    }

    /// What becomes of a packet that goes to another node in a tunnel: what came in one never does.
    fn fate_in_tunnel(&self, ends: [IpAddr; 2], is_error: bool) -> Fate {
        let overhead = overhead(family(ends[0]), self.given.bed.gue);
        match way(ends[1]) {
            Way::Out(link, mac) if !self.given.behind => {
                let room = link.mtu() as usize - overhead;
                match self.leaving(link, mac) {
                    _ if self.outline.hops <= 1 => self.failing(Refusal::TimeExceeded, is_error),
                    _ if self.given.frame.len() - ETHERNET > room => {
                        self.failing(Refusal::TooBig(room as u32), is_error)
                    }
                    Fate::Sent { verdict, mark, mac, forwarded, .. } => {
                        Fate::Sent { verdict, mark, mac, forwarded, kind: Sending::Tunnelled(ends) }
                    }
                    fate => fate,
                }
            }
            _ => Fate::Dropped,
        }
    }

    /// What a SYN may ask for whose receiver does not know that its packets go in a tunnel.
    pub(super) fn longest_segment(&self, entry: &Entry, part: Part) -> Option<u16> {
        let flags = self.given.frame.get(self.outline.transport + 13).copied().unwrap_or(0);
        let asks = matches!(part, Part::Ports) && self.outline.protocol == TCP && flags & SYN != 0;
        if !asks || !entry.reply || entry.course != Course::In {
            return None;
        }
        let mtu = match way(entry.out.destination.ip()) {
            Way::Out(link, Some(_)) => link.mtu(),
            _ => 1500,
        };
        let of = family(self.outline.source);
        Some((mtu as usize - overhead(of, self.given.bed.gue) - [40, 60][of]) as u16)
    }

    pub(super) fn is_untouched(&self) -> bool {
        self.given.passage.verdict == ON && self.given.passage.frame == self.given.frame && self.given.passage.mark == 0
    }

    pub(super) fn fate(&self, entry: &Entry, to: IpAddr, is_error: bool) -> Fate {
        if entry.is_direct() {
            return self.fate_in_tunnel([entry.out.source.ip(), to], is_error);
        }
        let source_changes = entry.out.source.ip() != self.outline.source;
        self.fate_to(to, source_changes, entry.reply, entry.stack, is_error)
    }

    /// What becomes of a packet that now goes to `to`.
    fn fate_to(&self, to: IpAddr, source_changes: bool, reply: bool, stack: bool, is_error: bool) -> Fate {
        let ingress = self.given.crossing.ingress();
        let sent = |verdict, mark, mac, forwarded, kind| Fate::Sent { verdict, mark, mac, forwarded, kind };
        if stack {
            return sent(ON, 0, Mac::Same, false, Sending::Plain);
        }
        if !ingress && to == self.outline.destination {
            return sent(ON, DONE, Mac::Same, false, Sending::Plain);
        }
        match way(to) {
            Way::Own if ingress && reply => sent(REDIRECT, DONE, Mac::Zero, false, Sending::HandedOver),
            Way::Own if ingress || self.given.crossing.link == Link::Lo => {
                sent(ON, DONE, Mac::Same, false, Sending::Plain)
            }
            Way::Own => sent(REDIRECT, DONE, Mac::Swapped, false, Sending::Plain),
            Way::Out(..) if ingress && self.outline.hops <= 1 => self.failing(Refusal::TimeExceeded, is_error),
            Way::Out(link, _) if self.given.frame.len() - ETHERNET > link.mtu() as usize => {
                if !ingress || !self.outline.may_be_cut {
                    return self.failing(Refusal::TooBig(link.mtu()), is_error);
                }
                let (mark, kind) = match source_changes {
                    true => (DONE | SOURCE, Sending::SourceLater),
                    false => (DONE, Sending::Plain),
                };
                sent(ON, mark, Mac::Same, false, kind)
            }
            Way::Out(link, mac) => self.leaving(link, mac),
        }
    }

    fn leaving(&self, link: Link, mac: Option<[u8; 6]>) -> Fate {
        let mac = mac.map_or(Mac::Same, |mac| Mac::To(mac, link.mac()));
        let (verdict, mark) = match self.given.crossing.hook {
            Hook::Frame if link == self.given.crossing.link => (XDP_TX, 0),
            Hook::Frame => (XDP_REDIRECT, 0),
            _ => (REDIRECT, DONE),
        };
        Fate::Sent { verdict, mark, mac, forwarded: self.given.crossing.ingress(), kind: Sending::Plain }
    }

    /// No error is answered with an error.
    fn failing(&self, refusal: Refusal, is_error: bool) -> Fate {
        if is_error { Fate::Dropped } else { Fate::Refused(refusal) }
    }

    /// The packet that an ICMP error quotes, if it has ports.
    pub(super) fn quoted(&self) -> Option<(Outline, Tuple)> {
        let at = self.outline.transport + 8;
        let quote = if self.outline.source.is_ipv4() {
            outline_v4(self.given.frame, at)
        } else {
            outline_v6(self.given.frame, at)
        };
        let quote = quote.ok()?;
        // What lies behind the error's own end is no quotation.
        let outside = quote.transport + 4 > self.outline.end;
        if outside || quote.piece.is_some_and(|piece| piece.offset != 0) || !has_ports(quote.protocol) {
            return None;
        }
        let tuple = Tuple {
            source: (quote.source, word(self.given.frame, quote.transport)?).into(),
            destination: (quote.destination, word(self.given.frame, quote.transport + 2)?).into(),
            protocol: quote.protocol,
        };
        Some((quote, tuple))
    }

    /// The packet behind `lo`, which it crosses under a loopback address.
    pub(super) fn handed_over(&self) -> Result<Result<Vec<u8>, String>> {
        let passage = self.given.passage;
        let loopback: IpAddr = match self.outline.source {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        let mut frame = passage.frame.clone();
        if frame[..ETHERNET] != [0; ETHERNET] {
            return Ok(Err("its Ethernet header is not empty".to_owned()));
        }
        // The kernel writes it anew.
        frame[12..ETHERNET].copy_from_slice(&self.given.frame[12..ETHERNET]);
        let crossing = read(&frame).and_then(|(outline, _)| outline).map(|outline| outline.destination);
        if crossing != Some(loopback) {
            return Ok(Err(format!("it crosses to lo for {crossing:?}")));
        }
        let arrived = self.given.bed.pass(Hook::Egress, Link::Lo, passage.mark, &frame)?;
        Ok(match arrived.verdict {
            ON => Ok(arrived.frame),
            verdict => Err(format!("on lo the verdict is {verdict}")),
        })
    }
}
