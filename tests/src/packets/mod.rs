//! `trama-lab packets`: what goes in at a hook and what comes out, one behaviour a scenario, read from files that are written by hand.
//!
//! The programs run under test-run, as in [`crate::fuzz`]; here the expectation is written down instead of computed.
//! `tests/packets/README.md` has the words.
#![expect(
    clippy::indexing_slicing,
    reason = "offsets into packets that were made here, and one of two by family: a wrong one ends the run at once"
)]

mod services;
mod text;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use trama_proxy::dataplane::ebpf::{Hook, Passage};

use crate::fuzz::{Bed, DONE, Link, ON};
use crate::packet::Packet;
use services::Services;

/// What to run.
#[derive(Debug, Args)]
pub struct PacketsOptions {
    /// Files of scenarios.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

/// Flow entries that there is room for.
const FLOWS: u32 = 1024;

/// Runs every scenario of the files.
///
/// # Errors
/// When a file cannot be read or understood, or the programs cannot be run.
pub fn run(options: &PacketsOptions) -> Result<ExitCode> {
    let mut bed = Bed::new(FLOWS)?;
    let (mut passed, mut failed) = (0, 0);
    for path in &options.files {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        for scenario in scenarios(path, &text)? {
            match scenario.run(&mut bed) {
                Ok(()) => passed += 1,
                Err(error) => {
                    println!("{}: {}\n  {error:#}", path.display(), scenario.name);
                    failed += 1;
                }
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A behaviour.
struct Scenario<'a> {
    name: &'a str,
    /// Numbers and texts of its lines.
    lines: Vec<(usize, &'a str)>,
}

/// `# ` is a comment, `== ` begins a scenario.
fn scenarios<'a>(path: &Path, text: &'a str) -> Result<Vec<Scenario<'a>>> {
    let mut all: Vec<Scenario<'a>> = Vec::new();
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        match (line.strip_prefix("== "), all.last_mut()) {
            (Some(name), _) => all.push(Scenario { name, lines: Vec::new() }),
            (None, Some(scenario)) => scenario.lines.push((number, line)),
            (None, None) => bail!("{}:{number}: there is no scenario yet", path.display()),
        }
    }
    ensure!(!all.is_empty(), "{}: no scenario", path.display());
    Ok(all)
}

/// A packet that has met a program.
struct Met {
    hook: Hook,
    link: Link,
    frame: Vec<u8>,
    passage: Passage,
}

impl Scenario<'_> {
    fn run(&self, bed: &mut Bed) -> Result<()> {
        bed.kernel.forget_packets()?;
        let mut services = Services::default();
        services.sync(bed)?;
        let mut met: Option<Met> = None;
        for (number, line) in &self.lines {
            let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
            let done = match verb {
                "service" => services.add(rest).and_then(|()| services.sync(bed)),
                "gone" => services.remove(rest).and_then(|()| services.sync(bed)),
                "in" => send(bed, rest).map(|packet| met = Some(packet)),
                _ => met.take().context("nothing came in before it").and_then(|met| expect(bed, &met, verb, rest)),
            };
            done.with_context(|| format!("line {number}: {line}"))?;
        }
        ensure!(met.is_none(), "it ends with a packet of which nothing is expected");
        Ok(())
    }
}

/// `HOOK LINK PACKET [cut=N] [pad=N]`
fn send(bed: &Bed, text: &str) -> Result<Met> {
    let (hook, rest) = text.split_once(' ').context("no hook")?;
    let (link, packet) = rest.trim_start().split_once(' ').context("no link")?;
    let hook = match hook {
        "xdp" => Hook::Frame,
        "ingress" => Hook::Ingress,
        "egress" => Hook::Egress,
        _ => bail!("{hook} is no hook"),
    };
    let link = link_named(link)?;
    let frame = frame(link, packet)?;
    let passage = bed.pass(hook, link, 0, &frame)?;
    Ok(Met { hook, link, frame, passage })
}

fn link_named(name: &str) -> Result<Link> {
    Link::ALL.into_iter().find(|link| link.name() == name).with_context(|| format!("{name} is no link"))
}

/// `raw HEX` is a frame byte by byte behind the link-layer addresses.
fn frame(link: Link, text: &str) -> Result<Vec<u8>> {
    let mut frame = [&link.mac()[..], &[2, 9, 9, 9, 9, 9]].concat();
    let (mut length, mut version) = (None, None);
    let words: Vec<&str> = text
        .split_whitespace()
        .filter(|word| match word.split_once('=') {
            Some(("frame", bytes)) => {
                length = bytes.parse().ok();
                false
            }
            Some(("version", number)) => {
                version = number.parse::<u8>().ok();
                false
            }
            _ => true,
        })
        .collect();
    let tagged = words.contains(&"vlan");
    let words: Vec<&str> = words.into_iter().filter(|word| *word != "vlan").collect();
    let packet = text::parse(&words.join(" "))?;
    if tagged {
        frame.extend([0x81, 0, 0, 5]);
    }
    frame.extend(packet.ether_type().to_be_bytes());
    let start = frame.len();
    frame.extend(packet.bytes());
    if let (Some(version), Some(byte)) = (version, frame.get_mut(start)) {
        *byte = *byte & 0xf | version << 4;
    }
    if let Some(length) = length {
        frame.resize(length, 0);
    }
    Ok(frame)
}

/// Compares what came out with a line of the scenario.
fn expect(bed: &Bed, met: &Met, verb: &str, text: &str) -> Result<()> {
    let found = describe(bed, met)?;
    let wanted = if text.is_empty() { verb.to_owned() } else { format!("{verb} {}", normal(verb, text)?) };
    let same = found.split(' ').count() == wanted.split(' ').count()
        && found.split(' ').zip(wanted.split(' ')).all(|(found, wanted)| is_as(found, wanted));
    ensure!(same, "it is\n    {found}\n  and must be\n    {wanted}");
    Ok(())
}

/// `ADDRESS:*` is any port.
fn is_as(found: &str, wanted: &str) -> bool {
    match wanted.strip_suffix(":*") {
        Some(address) => found.rsplit_once(':').is_some_and(|(found, _)| found == address),
        None => found == wanted,
    }
}

/// The packet of an expectation, put as every packet is; any port stays so.
fn normal(verb: &str, text: &str) -> Result<String> {
    let (link, packet) = match verb {
        "out" => text.split_once(' ').map(|(link, packet)| (format!("{link} "), packet)).context("no link")?,
        _ => (String::new(), text),
    };
    let any = |word: &str| match word.strip_suffix(":*") {
        Some(address) => format!("{address}:1"),
        None => word.to_owned(),
    };
    let words: Vec<&str> = packet.split_whitespace().collect();
    let plain: Vec<String> = words.iter().map(|word| any(word)).collect();
    let written = text::write(&text::parse(&plain.join(" "))?);
    let stars = |word: &str| {
        words.iter().any(|given| given.strip_suffix(":*").is_some_and(|address| word == format!("{address}:1")))
    };
    let words: Vec<String> = written
        .split(' ')
        .map(|word| if stars(word) { format!("{}:*", word.trim_end_matches(":1")) } else { word.to_owned() })
        .collect();
    Ok(format!("{link}{}", words.join(" ")))
}

/// What became of a packet, in the words of a scenario.
fn describe(bed: &Bed, met: &Met) -> Result<String> {
    let Passage { verdict, frame, mark } = &met.passage;
    let unchanged = *frame == met.frame;
    let text = |frame: &[u8]| match frame.get(14..).and_then(Packet::parse) {
        Some(packet) => text::write(&packet),
        None => "no packet".to_owned(),
    };
    let swapped = frame[..6] == met.frame[6..12] && frame[6..12] == met.frame[..6];
    let left_by = Link::ALL.into_iter().find(|link| frame[6..12] == link.mac());
    Ok(match (met.hook, verdict) {
        (Hook::Frame, 2) if unchanged => "pass".to_owned(),
        (Hook::Frame, 1) | (Hook::Ingress | Hook::Egress, 2) => "drop".to_owned(),
        (Hook::Ingress | Hook::Egress, &ON) if unchanged && *mark == 0 => "pass".to_owned(),
        (Hook::Ingress | Hook::Egress, &ON) if *mark & DONE != 0 => {
            format!("{} {}", if *mark == DONE { "local" } else { "cut" }, text(frame))
        }
        (Hook::Frame, 3 | 4) | (Hook::Ingress | Hook::Egress, 7) => match left_by {
            _ if frame[..14] == [0; 14] => format!("lo {}", text(&arrived(bed, met)?)),
            _ if swapped => format!("back {}", text(frame)),
            Some(link) => format!("out {} {}", link.name(), text(frame)),
            None => format!("resolve {}", text(frame)),
        },
        _ => format!("verdict {verdict} mark {mark:#x} {} at {}", text(frame), met.link.name()),
    })
}

/// What crosses to `lo`, behind it.
fn arrived(bed: &Bed, met: &Met) -> Result<Vec<u8>> {
    let mut frame = met.passage.frame.clone();
    frame[12..14].copy_from_slice(&met.frame[12..14]);
    let arrived = bed.pass(Hook::Egress, Link::Lo, met.passage.mark, &frame)?;
    ensure!(arrived.verdict == ON, "on lo the verdict is {}", arrived.verdict);
    Ok(arrived.frame)
}
