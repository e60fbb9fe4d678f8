//! One packet through the programs, and whether it met what it must.

use anyhow::Result;
use trama_proxy::dataplane::ebpf::{Hook, Passage};

use super::bed::{Bed, Link, Way, way};
use super::compare::{Change, Part, difference, is_refusal};
use super::direct::Course;
use super::fate::{Case, DONE, Fate, Given, ON, REDIRECT, Refusal, SHOT, Sending, XDP_PASS, XDP_REDIRECT, XDP_TX};
use super::model::{Candidate, Crossing, Meaning, Model};
use super::pieces::{First, Pieces};
use super::read::{ETHERNET, Kind, Outline, Tuple, read, word};
use super::tunnel::{Tunnel, taken_off};
use crate::packet::{TCP, UDP};

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
        let given = Given { bed, crossing, frame, passage: &passage, behind: false };
        if crossing.hook != Hook::Frame {
            return self.judge(&given);
        }
        match passage.verdict {
            XDP_PASS => {
                if let Err(reason) = self.left(&given) {
                    return Ok(Err(reason));
                }
                self.step(bed, Crossing { hook: Hook::Ingress, ..crossing }, frame)
            }
            XDP_TX | XDP_REDIRECT => self.judge(&given),
            verdict => Ok(Err(format!("the XDP program returns {verdict}"))),
        }
    }

    /// A frame that the XDP program leaves to the tc hook.
    fn left(&mut self, given: &Given<'_>) -> Verdict {
        let Given { bed, crossing, frame, passage, .. } = *given;
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
            && frame.len() - ETHERNET + entry.overhead(bed.gue) <= link.mtu() as usize
            && self.model.is_present(tuple.destination.ip())
        {
            return Err("the XDP program leaves a frame of a known flow to another machine".to_owned());
        }
        self.model.note(tuple, flags);
        Ok(())
    }

    fn judge(&mut self, given: &Given<'_>) -> Result<Verdict> {
        match self.arrived(given) {
            Some(verdict) => verdict,
            None => self.look(given, None),
        }
    }

    /// A packet that is in no tunnel, or no longer; `meaning` is what one with ports must meet, where that is known already.
    pub(super) fn look(&mut self, given: &Given<'_>, meaning: Option<Meaning>) -> Result<Verdict> {
        let Given { crossing, frame, passage, .. } = *given;
        let Some((outline, kind)) = read(frame) else { return Ok(self.untouched(frame, passage)) };
        let Some(outline) = outline else { return Ok(self.plain(crossing, kind, frame, passage)) };
        if !crossing.ingress() && outline.source.is_loopback() {
            return Ok(self.untouched(frame, passage));
        }
        let case = Case { given: *given, outline };
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
            Kind::Segment(tuple, flags) => {
                let meaning = meaning.unwrap_or_else(|| self.model.segment(crossing, tuple, flags));
                self.segment(&case, tuple, flags, meaning)
            }
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
        if let (Some(source), Some(destination)) = (word(case.given.frame, at), word(case.given.frame, at + 2)) {
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

    fn segment(&mut self, case: &Case<'_>, tuple: Tuple, flags: u8, meaning: Meaning) -> Result<Verdict> {
        // What closes and opens at once opens; what was opened as the packet left its tunnel is known by now.
        let opens = match &meaning {
            Meaning::New(candidates) => candidates.iter().all(|candidate| candidate.course != Course::In),
            meaning => matches!(meaning, Meaning::Rejoin(_)),
        };
        let first = match case.outline.piece {
            Some(_) => self.pieces.first(case.given.crossing, &case.outline, tuple),
            None => First::Goes,
        };
        let verdict = match first {
            First::Goes => self.meets(case, meaning, Part::Ports, Some(tuple))?,
            First::Unclear => self.meets(case, Meaning::Unclear, Part::Ports, Some(tuple))?,
            First::Overlaps | First::Releases => {
                if matches!(meaning, Meaning::New(_) | Meaning::Rejoin(_) | Meaning::Unclear) {
                    self.model.blur(tuple);
                }
                self.dropped(case.given.passage)
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
            Meaning::Untouched => self.untouched(case.given.frame, case.given.passage),
            Meaning::Drop => self.dropped(case.given.passage),
            Meaning::Refuse => self.refused(case, Refusal::Unreachable),
            Meaning::Unclear => {
                self.unclear += 1;
                if let Some(tuple) = tuple {
                    self.model.blur(tuple);
                }
                Ok(())
            }
            Meaning::Known(entry) if entry.is_direct() && !case.given.crossing.ingress() => {
                self.untouched(case.given.frame, case.given.passage)
            }
            Meaning::Known(entry) => {
                let fate = case.fate(&entry, entry.out.destination.ip(), false);
                let Tuple { source, destination, .. } = entry.out;
                let segment = case.longest_segment(&entry, part);
                self.fulfilled(case, fate, &Change { source, destination, part, segment })?
            }
            Meaning::New(candidates) | Meaning::Rejoin(candidates) if tuple.is_none() => {
                Err(format!("a packet without ports opens a flow to {}", list(&candidates)))
            }
            Meaning::New(candidates) => tuple.map_or(Ok(Ok(())), |tuple| self.opened(case, tuple, &candidates))?,
            Meaning::Rejoin(mut candidates) => {
                let all = candidates.len();
                candidates.retain(|candidate| candidate.course == Course::Out && !candidate.lost);
                match tuple {
                    Some(tuple) if candidates.len() == all || !case.is_untouched() => {
                        self.count("found again");
                        self.opened(case, tuple, &candidates)?
                    }
                    _ => self.untouched(case.given.frame, case.given.passage),
                }
            }
        })
    }

    /// The flow goes to one of the candidates, and the model learns to which.
    fn opened(&mut self, case: &Case<'_>, key: Tuple, candidates: &[Candidate]) -> Result<Verdict> {
        let fates = candidates.iter().map(|candidate| (candidate, case.fate_of(candidate)));
        let fates: Vec<(&Candidate, Fate)> = fates.collect();
        let refused = is_refusal(case.given.frame, &case.given.passage.frame);
        if case.given.passage.verdict == SHOT || refused {
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
        let Some((candidate, out)) = landed(case, key, candidates) else {
            return Ok(Err(format!(
                "a new flow has become {:?}; it must go to one of {}",
                seen(case),
                list(candidates)
            )));
        };
        if let Err(reason) = self.model.check_port(key, out, candidate) {
            return Ok(Err(reason));
        }
        if case.given.crossing.hook == Hook::Frame && !candidate.remote {
            return Ok(Err("the XDP program opens a flow to an endpoint of this node".to_owned()));
        }
        self.model.open(case.given.crossing, key, out, candidate);
        self.count("new");
        let Tuple { source, destination, .. } = out;
        let change = Change { source, destination, part: Part::Ports, segment: None };
        self.fulfilled(case, case.fate_of(candidate), &change)
    }

    fn error(&mut self, case: &Case<'_>) -> Result<Verdict> {
        let Some((quote, quoted)) = case.quoted() else {
            return Ok(self.untouched(case.given.frame, case.given.passage));
        };
        let entry = match self.model.quoted(quoted) {
            None => return Ok(self.untouched(case.given.frame, case.given.passage)),
            Some(Err(())) => {
                self.unclear += 1;
                return Ok(Ok(()));
            }
            Some(Ok(entry)) => entry.clone(),
        };
        // A redirect; type 5 of ICMPv6 is none.
        if case.outline.source.is_ipv4() && case.given.frame.get(case.outline.transport) == Some(&5) {
            return Ok(self.dropped(case.given.passage));
        }
        if entry.is_direct() && !case.given.crossing.ingress() {
            return Ok(self.untouched(case.given.frame, case.given.passage));
        }
        let other_end = entry.out.source.ip() != quoted.destination.ip();
        let source = if other_end { entry.out.source.ip() } else { case.outline.source };
        let fate = case.fate(&entry, entry.out.destination.ip(), true);
        let part = Part::Quote { outline: quote, source: entry.out.destination, destination: entry.out.source };
        let change = Change { source: (source, 0).into(), destination: entry.out.destination, part, segment: None };
        self.count("error");
        self.fulfilled(case, fate, &change)
    }

    /// The packet has become what its fate says.
    fn fulfilled(&mut self, case: &Case<'_>, fate: Fate, change: &Change) -> Result<Verdict> {
        let (verdict, mark, mac, forwarded, kind) = match fate {
            Fate::Refused(refusal) => return Ok(self.refused(case, refusal)),
            Fate::Dropped => return Ok(self.dropped(case.given.passage)),
            Fate::Sent { verdict, mark, mac, forwarded, kind } => (verdict, mark, mac, forwarded, kind),
        };
        self.count(match kind {
            Sending::Tunnelled(_) => "into a tunnel",
            _ if forwarded => "forwarded",
            _ => "delivered",
        });
        let passage = case.given.passage;
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
            Sending::Tunnelled(ends) => match taken_off(case.given.frame, &passage.frame, ends, case.given.bed.gue) {
                Ok(frame) => frame,
                Err(reason) => return Ok(Err(reason)),
            },
            Sending::Plain | Sending::SourceLater => passage.frame.clone(),
        };
        let change = match kind {
            Sending::Tunnelled(_) => Change::inside(&case.outline),
            _ => *change,
        };
        let later = kind == Sending::SourceLater;
        Ok(difference(case.given.frame, &after, &case.outline, &change, mac, forwarded, later))
    }

    fn refused(&mut self, case: &Case<'_>, refusal: Refusal) -> Verdict {
        self.count("refused");
        let on_lo = case.given.crossing.link == Link::Lo;
        let verdict = if on_lo { ON } else { REDIRECT };
        if case.given.passage.verdict == SHOT && case.outline.transport > ETHERNET + 100 {
            return Ok(());
        }
        if case.given.passage.verdict != verdict || case.given.passage.mark != DONE {
            let Passage { verdict, mark, .. } = case.given.passage;
            return Err(format!("the verdict is {verdict} and the mark {mark:#x}; it must be refused: {refusal:?}"));
        }
        super::compare::refusal(case.given.frame, &case.given.passage.frame, &case.outline, refusal)
    }

    fn untouched(&mut self, frame: &[u8], passage: &Passage) -> Verdict {
        self.count("untouched");
        match passage.verdict == ON && passage.frame == frame && passage.mark == 0 {
            true => Ok(()),
            false => Err(format!("the verdict is {}; the packet must go on as it came", passage.verdict)),
        }
    }

    pub(super) fn dropped(&mut self, passage: &Passage) -> Verdict {
        self.count("dropped");
        match passage.verdict {
            SHOT => Ok(()),
            verdict => Err(format!("the verdict is {verdict}; the packet must be dropped")),
        }
    }

    pub(super) fn count(&mut self, what: &'static str) {
        *self.met.entry(what).or_default() += 1;
    }
}

fn list(candidates: &[Candidate]) -> String {
    let one = |candidate: &Candidate| format!("{} as {}", candidate.destination, candidate.source);
    candidates.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The tuple of the packet as it left the hook.
fn seen(case: &Case<'_>) -> Option<Tuple> {
    match read(&case.given.passage.frame) {
        Some((_, Kind::Segment(tuple, _))) => Some(tuple),
        _ => None,
    }
}

/// Where a new flow goes, and what its endpoint sees.
fn landed<'c>(case: &Case<'_>, key: Tuple, candidates: &'c [Candidate]) -> Option<(&'c Candidate, Tuple)> {
    let mut candidates = candidates.iter();
    if let Some(tunnel) = Tunnel::read(&case.given.passage.frame) {
        let is_it = |one: &&Candidate| one.course == Course::Out && one.destination.ip() == tunnel.destination;
        let candidate = candidates.find(is_it)?;
        let source = (candidate.source, key.source.port()).into();
        return Some((candidate, Tuple { source, destination: candidate.destination, ..key }));
    }
    let seen = seen(case)?;
    let is_it = |one: &&Candidate| one.course != Course::Out && one.destination == seen.destination;
    let candidate = candidates.find(is_it)?;
    // One that keeps its source for a while has the port already.
    Some((candidate, Tuple { source: (candidate.source, seen.source.port()).into(), ..seen }))
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
