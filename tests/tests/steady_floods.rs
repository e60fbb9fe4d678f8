//! A table of flows that is full, and a million SYNs from nowhere: who talks keeps talking, and who comes is served.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use trama_lab::packet::Packet;
use trama_lab::steady::{KEPT, Steady};
use trama_lab::traffic::Load;
use trama_lab::{CLIENT_ADDRESSES, Wire, link_address, patient, wait_for};

/// One at a time: each takes as much of the machine as it can have.
static ALONE: Mutex<()> = Mutex::new(());

/// Entries of the table that is to be full, as in the arguments.
const SMALL_TABLE: u32 = 32_768;
const SMALL: &[&str] = &["--max-flows=32768"];
/// SYNs to the small table, and how many a second: kept connections are asked ten times while that many fill it anew.
const SMALL_FLOOD: u32 = 40_000;
const SMALL_RATE: u32 = 1_000;
/// Spoofed SYNs.
const FLOOD: u32 = 1_000_000;
/// How many a second, at most.
const RATE: u32 = 50_000;
/// Frames between two looks at the clock.
const BURST: u32 = 50;
/// SYNs that take all source ports towards the three endpoints (29,000 for each); four times as many then take them from one another.
/// When nobody got another port, 16 of the 20 clients were not answered any more.
const ALL_PORTS: u32 = 90_000;
/// An address behind the outside client, whose kernel does not answer for it (RFC 5737).
const LOSER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// Clients that lose their port before they go on.
const LOSERS: u16 = 20;
/// How many of them are to be answered: an endpoint may hold on to somebody else's SYN from the port that a client gets next.
const ANSWERED_MIN: usize = 18;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// Where SYNs from addresses that nobody has go in: the NodePort of `web`.
struct Door {
    wire: Wire,
    gateway: [u8; 6],
    node_port: SocketAddr,
}

impl Door {
    fn open(steady: &Steady) -> Result<Self> {
        let (topology, port) = (steady.cluster.topology(), steady.cluster.node_port("web", "TCP", 80)?);
        let node = topology.node(1)?;
        let [address, _] = node.addresses();
        let gateway = link_address(node.netns(), "eth0")?;
        let wire = Wire::open(&topology.client(), "eth0")?;
        Ok(Self { wire, gateway, node_port: SocketAddr::new(address, port) })
    }

    fn syn(&self, source: SocketAddr, sequence: u32) -> Result<()> {
        self.wire.send(self.gateway, &Packet::tcp(source, self.node_port, SYN, sequence, &[]))
    }

    /// Whether a SYN of `source` is answered.
    fn answers(&self, source: SocketAddr) -> Result<bool> {
        self.syn(source, 1)?;
        let is_answer = |packet: &Packet| {
            let flags = packet.payload.get(13).copied().unwrap_or_default();
            (packet.to() == source && packet.from() == self.node_port && flags == SYN | ACK).then_some(())
        };
        Ok(self.wire.receive(patient(Duration::from_secs(2)), is_answer).is_ok())
    }
}

/// Sends SYNs from addresses that nobody has, of 198.18.0.0/15, which is for tests; each number has another address and port.
fn flood(steady: &Steady, numbers: Range<u32>, rate: u32) -> Result<Duration> {
    let door = Door::open(steady)?;
    let start = Instant::now();
    for burst in numbers.clone().step_by(BURST as usize) {
        for number in burst..numbers.end.min(burst + BURST) {
            let source = Ipv4Addr::from(0xc612_0000 + number % (1 << 17));
            // Another port for each round through the addresses.
            let source_port = 1024 + u16::try_from(number >> 17)?;
            door.syn(SocketAddr::new(IpAddr::V4(source), source_port), number)?;
        }
        let due = Duration::from_secs(1) * (burst - numbers.start) / rate;
        wait_for("the next burst", Duration::from_secs(60), || Ok((start.elapsed() >= due).then_some(())))?;
    }
    Ok(start.elapsed())
}

fn entries(steady: &Steady) -> f64 {
    steady.cluster.metrics(1).unwrap().get(r#"trama_map_entries{map="flows_v4"}"#).copied().unwrap_or_default()
}

#[test]
fn a_full_table_of_flows_keeps_who_talks() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let steady = Steady::start(SMALL).unwrap();
    let load = Load {
        kept: KEPT.div_ceil(6),
        kept_pause: Duration::from_secs(10),
        pause: Duration::from_millis(60),
        reset: true,
    };
    let (full, outcome) = steady
        .during_load(load, || {
            flood(&steady, 0..SMALL_FLOOD, SMALL_RATE)?;
            // Entries are counted now and then.
            let full = || Some(entries(&steady)).filter(|entries| *entries > f64::from(SMALL_TABLE) * 0.8);
            wait_for("a full table", Duration::from_secs(60), || Ok(full()))
        })
        .unwrap();
    println!("{full} of {SMALL_TABLE} entries");
    outcome.is_clean().unwrap();
}

#[test]
fn a_million_spoofed_syns_keep_nobody_away() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let steady = Steady::start(&[]).unwrap();
    let (elapsed, outcome) = steady.during(|| flood(&steady, 0..FLOOD, RATE)).unwrap();
    println!("{FLOOD} SYNs in {:.1} s, {} entries", elapsed.as_secs_f64(), entries(&steady));
    outcome.is_clean().unwrap();
}

/// A SYN that comes again, as its answer was lost, is answered though its source port on the node is somebody else's by now.
#[test]
fn who_lost_a_port_to_a_flood_gets_another() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let steady = Steady::start(&[]).unwrap();
    let node = steady.cluster.topology().node(1).unwrap();
    let [outside, _] = CLIENT_ADDRESSES.map(|address| address.to_string());
    let mut ip = Command::new("ip");
    ip.args(["-n", node.netns().label(), "route", "add", &LOSER.to_string(), "via", &outside]);
    assert!(ip.status().unwrap().success());
    flood(&steady, 0..ALL_PORTS, RATE).unwrap();
    let clients: Vec<_> = (0..LOSERS).map(|number| SocketAddr::new(LOSER.into(), 1024 + number)).collect();
    let answered = || {
        let door = Door::open(&steady).unwrap();
        clients.iter().filter(|client| door.answers(**client).unwrap()).count()
    };
    let before = answered();
    flood(&steady, ALL_PORTS..5 * ALL_PORTS, RATE).unwrap();
    let after = answered();
    println!("{before} of {LOSERS} clients answered before, {after} after all ports were taken");
    assert!(before >= ANSWERED_MIN && after >= ANSWERED_MIN);
}
