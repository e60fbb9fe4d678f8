//! One packet through the programs, and whether it met what it must.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use trama_proxy::dataplane::ebpf::{Hook, Passage};

use super::bed::{Bed, Link, Way, way};
use super::compare::{Change, Part, difference, is_refusal};
use super::model::{Candidate, Crossing, Entry, Meaning, Model};
use super::pieces::{First, Pieces};
use super::read::{ETHERNET, Kind, Outline, Tuple, has_ports, outline_v4, outline_v6, read, word};
use crate::packet::{TCP, UDP};

/// `TC_ACT_UNSPEC`, which leaves a packet to the programs behind, `TC_ACT_*` (include/uapi/linux/pkt_cls.h) and `XDP_*`
/// (include/uapi/linux/bpf.h).
pub(crate) const ON: u32 = u32::MAX;
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
const XDP_REDIRECT: u32 = 4;
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
enum Fate {
    Refused(Refusal),
    Dropped,
    Sent { verdict: u32, mark: u32, mac: Mac, forwarded: bool, kind: Sending },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sending {
    Plain,
    /// To the node's own sockets, over `lo`.
    HandedOver,
    /// With the source that it came with: the kernel cuts it first.
    SourceLater,
}

/// Link-layer addresses behind the hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mac {
    Same,
    Swapped,
    Zero,
    To([u8; 6], [u8; 6]),
}

/// Everything that is known while packets come.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) model: Model,
    pub(crate) pieces: Pieces,
    /// Packets of which nothing could be said.
    pub(crate) unclear: u64,
    /// What packets met, by its name.
    pub(crate) met: std::collections::BTreeMap<&'static str, u64>,
}

/// What is different from what must be, in words.
pub(crate) type Verdict = Result<(), String>;

impl State {
    /// Runs a packet; the inner result is the verdict.
    pub(crate) fn step(&mut self, bed: &Bed, crossing: Crossing, frame: &[u8]) -> Result<Verdict> {
        let passage = bed.pass(crossing.hook, crossing.link, 0, frame)?;
        if crossing.hook != Hook::Frame {
            return self.judge(bed, crossing, frame, &passage);
        }
        match passage.verdict {
            XDP_PASS => {
                if let Err(reason) = self.left(crossing, frame, &passage) {
                    return Ok(Err(reason));
                }
                self.step(bed, Crossing { hook: Hook::Ingress, ..crossing }, frame)
            }
            XDP_TX | XDP_REDIRECT => self.judge(bed, crossing, frame, &passage),
            verdict => Ok(Err(format!("the XDP program returns {verdict}"))),
        }
    }

    /// A frame that the XDP program leaves to the tc hook.
    fn left(&mut self, crossing: Crossing, frame: &[u8], passage: &Passage) -> Verdict {
        if passage.frame != frame {
            return Err("the XDP program changed a frame that it passes on".to_owned());
        }
        let Some((Some(outline), Kind::Segment(tuple, flags))) = read(frame) else { return Ok(()) };
        if !is_plain(frame, &outline) {
            return Ok(());
        }
        if let Meaning::Known(entry) = self.model.segment(crossing, tuple, flags)
            && !entry.stack
            && let Way::Out(link @ (Link::Eth0 | Link::Eth1), Some(_)) = way(entry.out.destination.ip())
            && frame.len() - ETHERNET <= link.mtu() as usize
            && self.model.is_present(tuple.destination.ip())
        {
            return Err("the XDP program leaves a frame of a known flow to another machine".to_owned());
        }
        self.model.note(tuple, flags);
        Ok(())
    }

    fn judge(&mut self, bed: &Bed, crossing: Crossing, frame: &[u8], passage: &Passage) -> Result<Verdict> {
        let Some((outline, kind)) = read(frame) else { return Ok(self.untouched(frame, passage)) };
        let Some(outline) = outline else { return Ok(self.plain(crossing, kind, frame, passage)) };
        if !crossing.ingress() && outline.source.is_loopback() {
            return Ok(self.untouched(frame, passage));
        }
        let case = Case { bed, crossing, frame, passage, outline };
        match kind {
            Kind::Other | Kind::Malformed => Ok(self.plain(crossing, kind, frame, passage)),
            Kind::Doubtful => self.doubtful(&case),
            Kind::Portless => {
                let meaning = self.model.portless(crossing, &outline);
                self.meets(&case, meaning, Part::Nothing, None)
            }
            Kind::Error => self.error(&case),
            Kind::Later => {
                let meaning = self.pieces.later(crossing, &outline, &self.model, frame.len());
                self.meets(&case, meaning, Part::Addresses, None)
            }
            Kind::Segment(tuple, flags) => self.segment(&case, tuple, flags),
        }
    }

    fn plain(&mut self, crossing: Crossing, kind: Kind, frame: &[u8], passage: &Passage) -> Verdict {
        match kind {
            Kind::Malformed if crossing.ingress() => self.dropped(passage),
            _ => self.untouched(frame, passage),
        }
    }

    fn doubtful(&mut self, case: &Case<'_>) -> Result<Verdict> {
        let at = case.outline.transport;
        if let (Some(source), Some(destination)) = (word(case.frame, at), word(case.frame, at + 2)) {
            let tuple = Tuple {
                source: (case.outline.source, source).into(),
                destination: (case.outline.destination, destination).into(),
                protocol: case.outline.protocol,
            };
            self.model.blur(tuple);
        }
        self.pieces.doubt(&case.outline);
        self.unclear += 1;
        Ok(Ok(()))
    }

    fn segment(&mut self, case: &Case<'_>, tuple: Tuple, flags: u8) -> Result<Verdict> {
        let meaning = self.model.segment(case.crossing, tuple, flags);
        // What closes and opens at once opens.
        let opens = matches!(meaning, Meaning::New(_));
        let first = match case.outline.piece {
            Some(_) => self.pieces.first(case.crossing, &case.outline, tuple),
            None => First::Goes,
        };
        let verdict = match first {
            First::Goes => self.meets(case, meaning, Part::Ports, Some(tuple))?,
            First::Unclear => self.meets(case, Meaning::Unclear, Part::Ports, Some(tuple))?,
            First::Overlaps | First::Releases => {
                if matches!(meaning, Meaning::New(_) | Meaning::Unclear) {
                    self.model.blur(tuple);
                }
                self.dropped(case.passage)
            }
        };
        if !opens {
            self.model.note(tuple, flags);
        }
        Ok(verdict)
    }

    /// The packet must meet what the meaning says; `tuple` is that of a packet that may open a flow.
    fn meets(&mut self, case: &Case<'_>, meaning: Meaning, part: Part, tuple: Option<Tuple>) -> Result<Verdict> {
        Ok(match meaning {
            Meaning::Untouched => self.untouched(case.frame, case.passage),
            Meaning::Drop => self.dropped(case.passage),
            Meaning::Refuse => self.refused(case, Refusal::Unreachable),
            Meaning::Unclear => {
                self.unclear += 1;
                if let Some(tuple) = tuple {
                    self.model.blur(tuple);
                }
                Ok(())
            }
            Meaning::Known(entry) => {
                let fate = case.fate(&entry, entry.out.destination.ip(), false);
                let out = entry.out;
                self.fulfilled(case, fate, &Change { source: out.source, destination: out.destination, part })?
            }
            Meaning::New(candidates) => match tuple {
                Some(tuple) => self.opened(case, tuple, &candidates)?,
                None => Err("a packet without ports opens a flow".to_owned()),
            },
        })
    }

    /// The flow goes to one of the candidates, and the model learns to which.
    fn opened(&mut self, case: &Case<'_>, key: Tuple, candidates: &[Candidate]) -> Result<Verdict> {
        let fates = candidates.iter().map(|candidate| (candidate, case.fate_of(candidate)));
        let fates: Vec<(&Candidate, Fate)> = fates.collect();
        let refused = is_refusal(case.frame, &case.passage.frame);
        if case.passage.verdict == SHOT || refused {
            self.model.blur(key);
            for fate in
                fates.iter().map(|(_, fate)| *fate).filter(|fate| matches!(fate, Fate::Refused(_) | Fate::Dropped))
            {
                if self.fulfilled(case, fate, &Change::of(key))?.is_ok() {
                    return Ok(Ok(()));
                }
            }
            return Ok(Err(format!(
                "a new flow is {}; it must go to one of {}",
                if refused { "refused" } else { "dropped" },
                list(candidates)
            )));
        }
        let Some(seen) = seen(case) else {
            return Ok(Err(format!(
                "a new flow has become no packet with ports; it must go to one of {}",
                list(candidates)
            )));
        };
        let Some((candidate, fate)) =
            fates.into_iter().find(|(candidate, _)| candidate.destination == seen.destination)
        else {
            return Ok(Err(format!("a new flow goes to {seen:?}; it must be one of {}", list(candidates))));
        };
        // One that keeps its source for a while has the port already.
        let out = Tuple { source: (candidate.source, seen.source.port()).into(), ..seen };
        if let Err(reason) = self.model.check_port(key, out, candidate) {
            return Ok(Err(reason));
        }
        if case.crossing.hook == Hook::Frame && !candidate.remote {
            return Ok(Err("the XDP program opens a flow to an endpoint of this node".to_owned()));
        }
        self.model.open(case.crossing, key, out, candidate);
        self.count("new");
        self.fulfilled(case, fate, &Change { source: out.source, destination: out.destination, part: Part::Ports })
    }

    fn error(&mut self, case: &Case<'_>) -> Result<Verdict> {
        let Some((quote, quoted)) = case.quoted() else { return Ok(self.untouched(case.frame, case.passage)) };
        let entry = match self.model.quoted(quoted) {
            None => return Ok(self.untouched(case.frame, case.passage)),
            Some(Err(())) => {
                self.unclear += 1;
                return Ok(Ok(()));
            }
            Some(Ok(entry)) => entry.clone(),
        };
        // A redirect; type 5 of ICMPv6 is none.
        if case.outline.source.is_ipv4() && case.frame.get(case.outline.transport) == Some(&5) {
            return Ok(self.dropped(case.passage));
        }
        let other_end = entry.out.source.ip() != quoted.destination.ip();
        let source = if other_end { entry.out.source.ip() } else { case.outline.source };
        let fate = case.fate(&entry, entry.out.destination.ip(), true);
        let part = Part::Quote { outline: quote, source: entry.out.destination, destination: entry.out.source };
        let change = Change { source: (source, 0).into(), destination: entry.out.destination, part };
        self.count("error");
        self.fulfilled(case, fate, &change)
    }

    /// The packet has become what its fate says.
    fn fulfilled(&mut self, case: &Case<'_>, fate: Fate, change: &Change) -> Result<Verdict> {
        let (verdict, mark, mac, forwarded, kind) = match fate {
            Fate::Refused(refusal) => return Ok(self.refused(case, refusal)),
            Fate::Dropped => return Ok(self.dropped(case.passage)),
            Fate::Sent { verdict, mark, mac, forwarded, kind } => (verdict, mark, mac, forwarded, kind),
        };
        self.count(if forwarded { "forwarded" } else { "delivered" });
        let passage = case.passage;
        if passage.verdict != verdict || passage.mark != mark {
            return Ok(Err(format!(
                "the verdict is {} and the mark {:#x}; they must be {verdict} and {mark:#x}, as {fate:?}",
                passage.verdict, passage.mark
            )));
        }
        let after = match kind {
            Sending::HandedOver => match case.handed_over()? {
                Ok(frame) => frame,
                Err(reason) => return Ok(Err(reason)),
            },
            Sending::Plain | Sending::SourceLater => passage.frame.clone(),
        };
        let later = kind == Sending::SourceLater;
        Ok(difference(case.frame, &after, &case.outline, change, mac, forwarded, later))
    }

    fn refused(&mut self, case: &Case<'_>, refusal: Refusal) -> Verdict {
        self.count("refused");
        let on_lo = case.crossing.link == Link::Lo;
        let verdict = if on_lo { ON } else { REDIRECT };
        if case.passage.verdict == SHOT && case.outline.transport > ETHERNET + 100 {
            return Ok(());
        }
        if case.passage.verdict != verdict || case.passage.mark != DONE {
            let Passage { verdict, mark, .. } = case.passage;
            return Err(format!("the verdict is {verdict} and the mark {mark:#x}; it must be refused: {refusal:?}"));
        }
        super::compare::refusal(case.frame, &case.passage.frame, &case.outline, refusal)
    }

    fn untouched(&mut self, frame: &[u8], passage: &Passage) -> Verdict {
        self.count("untouched");
        match passage.verdict == ON && passage.frame == frame && passage.mark == 0 {
            true => Ok(()),
            false => Err(format!("the verdict is {}; the packet must go on as it came", passage.verdict)),
        }
    }

    fn dropped(&mut self, passage: &Passage) -> Verdict {
        self.count("dropped");
        match passage.verdict {
            SHOT => Ok(()),
            verdict => Err(format!("the verdict is {verdict}; the packet must be dropped")),
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.met.entry(what).or_default() += 1;
    }
}

fn list(candidates: &[Candidate]) -> String {
    let one = |candidate: &Candidate| format!("{} as {}", candidate.destination, candidate.source);
    candidates.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The tuple of the packet as it left the hook.
fn seen(case: &Case<'_>) -> Option<Tuple> {
    match read(&case.passage.frame) {
        Some((_, Kind::Segment(tuple, _))) => Some(tuple),
        _ => None,
    }
}

/// A packet, and what the program did with it.
struct Case<'a> {
    bed: &'a Bed,
    crossing: Crossing,
    frame: &'a [u8],
    passage: &'a Passage,
    outline: Outline,
}

impl Case<'_> {
    fn fate_of(&self, candidate: &Candidate) -> Fate {
        if candidate.lost {
            return Fate::Dropped;
        }
        self.fate_to(candidate.destination.ip(), candidate.source != self.outline.source, false, false, false)
    }

    fn fate(&self, entry: &Entry, to: IpAddr, is_error: bool) -> Fate {
        let source_changes = entry.out.source.ip() != self.outline.source;
        self.fate_to(to, source_changes, entry.reply, entry.stack, is_error)
    }

    /// What becomes of a packet that now goes to `to`.
    fn fate_to(&self, to: IpAddr, source_changes: bool, reply: bool, stack: bool, is_error: bool) -> Fate {
        let ingress = self.crossing.ingress();
        let sent = |verdict, mark, mac, forwarded, kind| Fate::Sent { verdict, mark, mac, forwarded, kind };
        if stack {
            return sent(ON, 0, Mac::Same, false, Sending::Plain);
        }
        if !ingress && to == self.outline.destination {
            return sent(ON, DONE, Mac::Same, false, Sending::Plain);
        }
        match way(to) {
            Way::Own if ingress && reply => sent(REDIRECT, DONE, Mac::Zero, false, Sending::HandedOver),
            Way::Own if ingress || self.crossing.link == Link::Lo => sent(ON, DONE, Mac::Same, false, Sending::Plain),
            Way::Own => sent(REDIRECT, DONE, Mac::Swapped, false, Sending::Plain),
            Way::Out(..) if ingress && self.outline.hops <= 1 => self.failing(Refusal::TimeExceeded, is_error),
            Way::Out(link, _) if self.frame.len() - ETHERNET > link.mtu() as usize => {
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
        let (verdict, mark) = match self.crossing.hook {
            Hook::Frame if link == self.crossing.link => (XDP_TX, 0),
            Hook::Frame => (XDP_REDIRECT, 0),
            _ => (REDIRECT, DONE),
        };
        Fate::Sent { verdict, mark, mac, forwarded: self.crossing.ingress(), kind: Sending::Plain }
    }

    /// No error is answered with an error.
    fn failing(&self, refusal: Refusal, is_error: bool) -> Fate {
        if is_error { Fate::Dropped } else { Fate::Refused(refusal) }
    }

    /// The packet that an ICMP error quotes, if it has ports.
    fn quoted(&self) -> Option<(Outline, Tuple)> {
        let at = self.outline.transport + 8;
        let quote = if self.outline.source.is_ipv4() { outline_v4(self.frame, at) } else { outline_v6(self.frame, at) };
        let quote = quote.ok()?;
        // What lies behind the error's own end is no quotation.
        let outside = quote.transport + 4 > self.outline.end;
        if outside || quote.piece.is_some_and(|piece| piece.offset != 0) || !has_ports(quote.protocol) {
            return None;
        }
        let tuple = Tuple {
            source: (quote.source, word(self.frame, quote.transport)?).into(),
            destination: (quote.destination, word(self.frame, quote.transport + 2)?).into(),
            protocol: quote.protocol,
        };
        Some((quote, tuple))
    }

    /// The packet behind `lo`, which it crosses under a loopback address.
    fn handed_over(&self) -> Result<Result<Vec<u8>, String>> {
        let passage = self.passage;
        let loopback: IpAddr = match self.outline.source {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        let mut frame = passage.frame.clone();
        if frame[..ETHERNET] != [0; ETHERNET] {
            return Ok(Err("its Ethernet header is not empty".to_owned()));
        }
        // The kernel writes it anew.
        frame[12..ETHERNET].copy_from_slice(&self.frame[12..ETHERNET]);
        let crossing = read(&frame).and_then(|(outline, _)| outline).map(|outline| outline.destination);
        if crossing != Some(loopback) {
            return Ok(Err(format!("it crosses to lo for {crossing:?}")));
        }
        let arrived = self.bed.pass(Hook::Egress, Link::Lo, passage.mark, &frame)?;
        Ok(match arrived.verdict {
            ON => Ok(arrived.frame),
            verdict => Err(format!("on lo the verdict is {verdict}")),
        })
    }
}

/// Whether the XDP program may look at a frame at all.
fn is_plain(frame: &[u8], outline: &Outline) -> bool {
    let header = if outline.source.is_ipv4() { 20 } else { 40 };
    let length = match outline.protocol {
        TCP => frame.get(outline.transport + 12).map_or(usize::MAX, |byte| usize::from(byte >> 4) * 4),
        UDP => 8,
        _ => return false,
    };
    let at = outline.transport;
    outline.piece.is_none() && at == ETHERNET + header && outline.hops > 1 && length <= outline.end - at
}
