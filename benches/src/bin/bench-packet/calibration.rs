//! Calibration rows: what single steps cost in this run, on this machine.

use anyhow::{Result, ensure};
use benches::frame::{self, ACK};
use benches::programs::{Programs, Sizes, Traffic};

use crate::rows::Bench;

/// Steps of one repeat of a calibration program.
const STEPS: u32 = 128;
/// Lines of memory: 64 MB, as the entries of so many IPv4 flows are.
const LINES: u32 = 1 << 20;
/// Flows that the wrappers go through.
const FLOWS: u32 = 65536;

impl Bench<'_> {
    pub(crate) fn calibrate(&mut self) -> Result<()> {
        let frame = frame::tcp("10.1.0.0:1024".parse()?, "10.5.0.1:80".parse()?, ACK);
        let mut programs = Programs::load(self.interface)?;
        self.row("empty XDP program", true, 1, |packets| programs.time("empty_xdp", &frame, packets).map(|(t, _)| t))?;
        self.row("empty tc program", true, 1, |packets| programs.time("empty_tc", &frame, packets).map(|(t, _)| t))?;
        for (name, keys) in [("hash lookup, 1 key", 1), ("hash lookup, 64k keys", 65536)] {
            programs.fill_hash(keys)?;
            self.row(name, true, STEPS, |repeats| {
                let (time, found) = programs.time("hash_lookup", &frame, repeats)?;
                ensure!(found == STEPS, "{name}: found {found} of {STEPS} keys");
                Ok(time)
            })?;
        }
        self.calibrate_memory(&frame)?;
        let name = "LRU insert, table of 64k, full";
        self.row(name, true, STEPS, |repeats| {
            let (time, inserted) = programs.time("lru_insert", &frame, repeats)?;
            ensure!(inserted == STEPS, "{name}: an insert failed");
            Ok(time)
        })?;
        for (name, program) in [
            ("route lookup", "route_lookup"),
            ("transport checksum, by helper", "checksum_replace"),
            ("head of a frame moved, by helper (a DSR row has two)", "move_head"),
        ] {
            self.row(name, true, STEPS, |repeats| {
                let (time, done) = programs.time(program, &frame, repeats)?;
                ensure!(done == STEPS, "{name}: {done} of {STEPS} were done");
                Ok(time)
            })?;
        }
        programs.set_traffic(&Traffic { frame: frame.clone(), flows: Some(FLOWS) })?;
        for (program, hook) in [("wrapper_only", "tc"), ("wrapper_only_xdp", "XDP")] {
            let name = format!("wrapper alone, {hook} (restores the packet; part of every row below)");
            self.row(&name, true, 1, |packets| programs.time(program, &frame, packets).map(|(t, _)| t))?;
        }
        Ok(())
    }

    /// What a row with a million flows pays for each line of memory that its packet needs and no cache has.
    fn calibrate_memory(&mut self, frame: &[u8]) -> Result<()> {
        let name = "cache line read, one of 1M in no order";
        if !self.wants(name) {
            return Ok(());
        }
        let sizes = Sizes { lines: LINES, ..Sizes::default() };
        let mut programs = Programs::load_only(self.interface, &sizes, &["line_reads"])?;
        programs.fill_lines(LINES)?;
        self.row(name, true, STEPS, |repeats| {
            let (time, done) = programs.time("line_reads", frame, repeats)?;
            ensure!(done == STEPS, "{name}: {done} of {STEPS} were done");
            Ok(time)
        })
    }
}
