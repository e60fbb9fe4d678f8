//! The rows: what each one sets up, what proves that it did its work, and its times.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};

use crate::Options;
use crate::bed::Bed;
use crate::frame::{self, ACK, SYN};
use crate::programs::{Programs, Traffic, Verdicts, is_backend};

/// `TC_ACT_REDIRECT` of include/uapi/linux/pkt_cls.h.
const REDIRECT: u32 = 7;
/// `TC_ACT_OK`.
const PASS: u32 = 0;
/// Steps of one repeat of a calibration program.
const STEPS: u32 = 128;
/// Flows of the "64k" rows.
const MANY: u32 = 65536;
/// Sources of the rows in which every packet is a new flow: more than the table holds.
const EVER_NEW: u32 = 1 << 24;

/// One line of the result.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// What was measured.
    pub(crate) name: String,
    /// Whether it is a calibration row.
    pub(crate) calibration: bool,
    /// Nanoseconds of each run, ascending.
    pub(crate) nanoseconds: Vec<f64>,
}

/// Client, virtual address and a destination that is no service, of one family.
#[derive(Clone, Copy)]
struct Family {
    name: &'static str,
    client: SocketAddr,
    frontend: SocketAddr,
    elsewhere: SocketAddr,
}

/// Measures all rows that the options ask for.
pub(crate) fn measure(options: &Options, bed: &Bed) -> Result<Vec<Row>> {
    let mut bench = Bench { options, interface: bed.in_index(), rows: Vec::new() };
    bench.calibrate()?;
    let v4 = family("IPv4", ["10.1.0.0:1024", "10.96.0.1:80", "10.5.0.1:80"])?;
    let v6 = family("IPv6", ["[fd00:c::]:1024", "[fd00:10:96::1]:80", "[fd00:5::1]:80"])?;
    bench.not_a_service(v4)?;
    bench.service(v4, 1, true)?;
    bench.service(v6, 1, true)?;
    bench.service(v4, 10_000, false)?;
    Ok(bench.rows)
}

fn family(name: &'static str, addresses: [&str; 3]) -> Result<Family> {
    let [client, frontend, elsewhere] = addresses.map(str::parse);
    Ok(Family { name, client: client?, frontend: frontend?, elsewhere: elsewhere? })
}

struct Bench<'a> {
    options: &'a Options,
    interface: u32,
    rows: Vec<Row>,
}

impl Bench<'_> {
    fn calibrate(&mut self) -> Result<()> {
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
        let name = "LRU insert, table of 64k, full";
        self.row(name, true, STEPS, |repeats| {
            let (time, inserted) = programs.time("lru_insert", &frame, repeats)?;
            ensure!(inserted == STEPS, "{name}: an insert failed");
            Ok(time)
        })?;
        for (name, program) in [("route lookup", "route_lookup"), ("transport checksum, by helper", "checksum_replace")]
        {
            self.row(name, true, STEPS, |repeats| {
                let (time, done) = programs.time(program, &frame, repeats)?;
                ensure!(done == STEPS, "{name}: {done} of {STEPS} were done");
                Ok(time)
            })?;
        }
        programs.set_traffic(&Traffic { frame: frame.clone(), flows: Some(MANY) })?;
        let name = "wrapper alone (restores the packet; part of every row below)";
        self.row(name, true, 1, |packets| programs.time("wrapper_only", &frame, packets).map(|(t, _)| t))
    }

    /// Packets to an address that is no service: they must come out as they went in.
    fn not_a_service(&mut self, family: Family) -> Result<()> {
        for (what, flags) in [("data", ACK), ("SYN", SYN)] {
            let name = format!("not a service: pass, {what}");
            let frame = frame::tcp(family.client, family.elsewhere, flags);
            let mut programs = Programs::load(self.interface)?;
            programs.program_services(family.frontend, 1)?;
            programs.set_traffic(&Traffic { frame: frame.clone(), flows: Some(1) })?;
            let (verdict, out) = programs.one("wrapped_ingress", &frame)?;
            ensure!(verdict == PASS && out == frame, "{name}: the packet was changed or its verdict is {verdict}");
            self.traffic_row(&mut programs, &name, &Traffic { frame, flows: Some(1) }, Expect::Pass)?;
        }
        Ok(())
    }

    /// Established, new and reply rows of a service among `services`.
    fn service(&mut self, family: Family, services: u32, every_row: bool) -> Result<()> {
        let among = if services == 1 { String::new() } else { format!(", {services} services") };
        let label = |what: &str| format!("{} DNAT, {what}{among}", family.name);
        let (syn, data) = (self.packet(family, SYN), self.packet(family, ACK));
        let mut programs = Programs::load(self.interface)?;
        programs.program_services(family.frontend, services)?;
        programs.set_traffic(&Traffic { frame: syn.clone(), flows: Some(1) })?;
        let backend = first_packet(&mut programs, &syn, family).with_context(|| label("new flow"))?;

        let name = label("established, 1 flow");
        programs.set_traffic(&Traffic { frame: data.clone(), flows: Some(1) })?;
        let (verdict, out) = programs.one("wrapped_ingress", &data)?;
        ensure!(verdict == REDIRECT, "{name}: verdict {verdict}");
        frame::check(&out, family.client, backend, 1).with_context(|| name.clone())?;
        self.traffic_row(&mut programs, &name, &Traffic { frame: data.clone(), flows: Some(1) }, Expect::Redirect)?;

        if every_row {
            self.reply_row(&mut programs, family, backend, &label("reply, 1 flow"))?;
        }
        programs.set_traffic(&Traffic { frame: syn.clone(), flows: Some(MANY) })?;
        programs.time("wrapped_ingress", &syn, MANY)?;
        let name = label("established, 64k flows");
        self.traffic_row(&mut programs, &name, &Traffic { frame: data, flows: Some(MANY) }, Expect::Redirect)?;
        let name = label("new flow each, both entries written");
        self.traffic_row(&mut programs, &name, &Traffic { frame: syn, flows: Some(EVER_NEW) }, Expect::Redirect)
    }

    fn reply_row(&mut self, programs: &mut Programs, family: Family, backend: SocketAddr, name: &str) -> Result<()> {
        let reply = frame::tcp(backend, family.client, ACK);
        programs.set_traffic(&Traffic { frame: reply.clone(), flows: None })?;
        let (verdict, out) = programs.one("wrapped_ingress", &reply)?;
        ensure!(verdict == REDIRECT, "{name}: verdict {verdict}");
        frame::check(&out, family.frontend, family.client, 1).with_context(|| name.to_owned())?;
        self.traffic_row(programs, name, &Traffic { frame: reply, flows: None }, Expect::Redirect)
    }

    fn packet(&self, family: Family, flags: u8) -> Vec<u8> {
        frame::tcp(family.client, family.frontend, flags)
    }

    /// A row of the packet path: every packet of every run must have had the expected verdict.
    fn traffic_row(&mut self, programs: &mut Programs, name: &str, traffic: &Traffic, expect: Expect) -> Result<()> {
        programs.set_traffic(traffic)?;
        let mut sent = 0;
        self.row(name, false, 1, |packets| {
            sent += packets;
            programs.time("wrapped_ingress", &traffic.frame, packets).map(|(time, _)| time)
        })?;
        let verdicts = programs.verdicts()?;
        let expected = match expect {
            Expect::Redirect => Verdicts { redirected: sent, passed: 0, dropped: 0 },
            Expect::Pass => Verdicts { redirected: 0, passed: sent, dropped: 0 },
        };
        ensure!(verdicts == expected, "{name}: verdicts {verdicts:?}, expected {expected:?}");
        Ok(())
    }

    /// Runs `time` with a number of repeats and records the nanoseconds of one of its `steps`.
    fn row(
        &mut self,
        name: &str,
        calibration: bool,
        steps: u32,
        mut time: impl FnMut(u32) -> Result<std::time::Duration>,
    ) -> Result<()> {
        if !name.contains(&self.options.only) {
            return Ok(());
        }
        eprint!("\r\x1b[K{name} ...");
        let repeats = (self.options.packets / steps).max(1);
        let mut nanoseconds = Vec::new();
        for _ in 0..self.options.runs {
            nanoseconds.push(time(repeats)?.as_nanos() as f64 / f64::from(steps));
        }
        eprint!("\r\x1b[K");
        nanoseconds.sort_by(f64::total_cmp);
        self.rows.push(Row { name: name.to_owned(), calibration, nanoseconds });
        Ok(())
    }
}

/// What every packet of a row must meet.
#[derive(Clone, Copy)]
enum Expect {
    Redirect,
    Pass,
}

/// Opens the first flow and returns the backend that it was given; the packet must be right in every byte.
fn first_packet(programs: &mut Programs, syn: &[u8], family: Family) -> Result<SocketAddr> {
    let (verdict, out) = programs.one("wrapped_ingress", syn)?;
    ensure!(verdict == REDIRECT, "the first packet has verdict {verdict}");
    let backend = destination(&out).context("the first packet is cut short")?;
    ensure!(is_backend(backend.ip()), "{backend} is no endpoint of the service");
    frame::check(&out, family.client, backend, 1)?;
    Ok(backend)
}

fn destination(frame: &[u8]) -> Option<SocketAddr> {
    let tcp = frame::tcp_offset(frame);
    let port = u16::from_be_bytes(frame.get(tcp + 2..tcp + 4)?.try_into().ok()?);
    if tcp == 34 {
        let octets: [u8; 4] = frame.get(30..34)?.try_into().ok()?;
        return Some(SocketAddr::new(octets.into(), port));
    }
    let octets: [u8; 16] = frame.get(38..54)?.try_into().ok()?;
    Some(SocketAddr::new(octets.into(), port))
}
