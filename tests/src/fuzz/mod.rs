//! `trama-lab fuzz`: random packets at random Services, through the kernel's programs and against the model.
//!
//! ```text
//!  seed ─► world (objects ─► snapshot) ─► the real plan ─► the real maps ─┐
//!     └──► traffic (frames) ─────────────► the programs, under test-run ◄─┘ ─► judge ◄─ model (answer, flows)
//! ```
//! The model is `model::answer` and a memory of flows; it shares no code with the programs. A round is one world: its Services change
//! while its flows go on. Where a packet differs from what it must become, the round stops, and what can be left out of its history is.
#![expect(
    clippy::indexing_slicing,
    reason = "offsets into packets that were made here, and one of two by family: a wrong one ends the run at once"
)]

mod bed;
mod compare;
mod direct;
mod fate;
mod judge;
mod model;
mod pieces;
mod read;
mod shrink;
mod traffic;
mod tunnel;
mod tunnelled;
mod world;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use fastrand::Rng;
use trama_proxy::dataplane::SyncScope;
use trama_proxy::dataplane::ebpf::Hook;

use self::judge::State;
use self::model::Crossing;
use self::traffic::{Sent, Traffic};
use self::world::{World, places};

pub(crate) use self::bed::{Bed, Link, local_pod, machine, neighbour};
pub(crate) use self::fate::{DONE, ON};
pub(crate) use self::read::{ACK, FIN, RST, SCTP, SYN, crc32c};

/// Packets of one world.
const ROUND: u64 = 4000;
/// Flow entries of a family that there is room for: more than a round can make, or the kernel would forget what the model knows.
const FLOWS: u32 = 65_536;

/// What to run.
#[derive(Debug, Args)]
pub struct FuzzOptions {
    /// Begin with this seed instead of a fresh one; the seeds of the file are left out then.
    #[arg(long)]
    seed: Option<u64>,
    /// Packets behind a fresh seed, or the one that is named.
    #[arg(long, default_value_t = 1_000_000)]
    packets: u64,
    /// Seeds that are always run, one a line, with a number of packets and what they once found.
    #[arg(long)]
    seeds: Option<PathBuf>,
    /// Only the seeds of the file.
    #[arg(long, requires = "seeds")]
    kept_only: bool,
}

/// Runs every seed, and says how to repeat what differs.
///
/// # Errors
/// When the programs cannot be loaded or run, or the file of seeds cannot be read.
pub fn run(options: &FuzzOptions) -> Result<ExitCode> {
    let fresh = options.seed.unwrap_or_else(|| fastrand::u64(..1 << 48));
    let kept = match (&options.seeds, options.seed) {
        (Some(path), None) => read_seeds(path)?,
        _ => Vec::new(),
    };
    let mut bed = Bed::new(FLOWS)?;
    let (mut passed, mut failed) = (0, 0);
    let fresh = (!options.kept_only).then_some((fresh, options.packets));
    for (seed, packets) in kept.into_iter().chain(fresh) {
        match run_seed(&mut bed, seed, packets)? {
            true => passed += 1,
            false => failed += 1,
        }
    }
    println!("{passed} passed, {failed} failed");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn read_seeds(path: &Path) -> Result<Vec<(u64, u64)>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
    };
    lines.map(|line| parse(line).with_context(|| format!("{}: {line:?} is no seed", path.display()))).collect()
}

fn run_seed(bed: &mut Bed, seed: u64, packets: u64) -> Result<bool> {
    println!("seed {seed}, {packets} packets");
    let start = Instant::now();
    let mut total = Total::default();
    for round in 0..packets.div_ceil(ROUND) {
        let count = ROUND.min(packets - round * ROUND);
        if !run_round(bed, seed.wrapping_add(round), count, &mut total)? {
            return Ok(false);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let share = total.unclear as f64 / total.packets as f64 * 100.0;
    println!("  {} packets in {seconds:.1} s; {share:.2}% that nothing could be said of", total.packets);
    let met: Vec<String> = total.met.iter().map(|(what, count)| format!("{what} {count}")).collect();
    println!("  {}", met.join(", "));
    Ok(true)
}

#[derive(Default)]
struct Total {
    packets: u64,
    unclear: u64,
    met: std::collections::BTreeMap<&'static str, u64>,
}

/// One world. `false` when a packet met something else than it must.
fn run_round(bed: &mut Bed, seed: u64, packets: u64, total: &mut Total) -> Result<bool> {
    let mut rng = Rng::with_seed(seed);
    let links = Link::ALL.map(|link| bed.index(link));
    // Worlds of odd seeds know direct server return.
    let direct = seed % 2 == 1;
    let mut world = World::new(&mut rng, links, direct);
    let mut traffic = Traffic::new(rng.u64(..), direct);
    bed.set_tunnels(direct && rng.bool());
    let mut state = State::default();
    let mut history: Vec<Sent> = Vec::new();
    bed.clear()?;
    sync(bed, &mut world, &mut state, &mut traffic, true)?;
    for _ in 0..packets {
        if rng.u16(0..300) == 0 {
            world.change(&mut rng);
            sync(bed, &mut world, &mut state, &mut traffic, false)?;
        }
        let (crossing, frame) = traffic.next(&state.model);
        history.push((crossing, frame.clone()));
        let verdict = match rng.u8(..) {
            0 => marked(bed, crossing, &frame)?,
            _ => state.step(bed, crossing, &frame)?,
        };
        if let Err(reason) = verdict {
            println!("  packet {} of seed {seed} differs", history.len());
            println!("  repeat it: cargo xtask fuzz --seed {seed} --packets {packets}");
            let snapshot = std::mem::take(&mut state.model.snapshot);
            shrink::report(bed, &snapshot, &history, &reason, &mut state)?;
            return Ok(false);
        }
    }
    total.packets += packets;
    total.unclear += state.unclear;
    for (what, count) in state.met {
        *total.met.entry(what).or_default() += count;
    }
    Ok(true)
}

fn sync(bed: &mut Bed, world: &mut World, state: &mut State, traffic: &mut Traffic, whole: bool) -> Result<()> {
    let (snapshot, delta) = world.desired.checkout();
    let scope = if whole { SyncScope::Full } else { SyncScope::Changed(&delta) };
    bed.kernel.sync(snapshot, scope)?;
    state.model.set(snapshot);
    traffic.places = places(&world.desired);
    Ok(())
}

/// A packet that was translated at another hook goes on, whatever it looks like.
fn marked(bed: &Bed, crossing: Crossing, frame: &[u8]) -> Result<Result<(), String>> {
    if crossing.link == Link::Lo || crossing.hook != Hook::Egress {
        return Ok(Ok(()));
    }
    let passage = bed.pass(Hook::Egress, crossing.link, DONE, frame)?;
    let same = passage.verdict == ON && passage.frame == frame && passage.mark == DONE;
    Ok(if same { Ok(()) } else { Err("a marked packet does not go on as it came".to_owned()) })
}
