//! Rounds: every contender in turn does a short piece of everything, again and again, so that what the machine does besides meets all.

use std::time::Duration;

use anyhow::{Context, Result};
use trama_lab::{Cluster, Place};

use crate::contender::{Contender, Kind};
use crate::figures::{CONNECTIONS, Figures, THROUGHPUT};
use crate::live::{self, Flows, Live};
use crate::load::{Reached, Work};
use crate::say;

/// How much of everything there is in a round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slice {
    /// Of each load.
    pub(crate) time: Duration,
    /// Of each kind of forwarded datagrams.
    pub(crate) packets: u32,
    /// Threads of the clients that count connections.
    pub(crate) threads: usize,
}

/// Where a client stands.
#[derive(Clone, Copy)]
struct Stand {
    name: &'static str,
    /// Whether the node's socket programs see its sockets.
    in_cgroup: bool,
}

const STANDS: [Stand; 2] =
    [Stand { name: "pod", in_cgroup: true }, Stand { name: "pod without socket LB", in_cgroup: false }];

/// Everything that rounds need.
pub(crate) struct Rounds<'a> {
    pub(crate) cluster: &'a Cluster,
    pub(crate) contenders: &'a [Contender],
    pub(crate) live: Vec<Live>,
    pub(crate) slice: Slice,
    pub(crate) figures: Figures,
    /// What failed, with whom.
    pub(crate) failures: Vec<String>,
    /// Rounds so far, of every number of Services.
    rounds: u16,
}

impl<'a> Rounds<'a> {
    pub(crate) fn new(cluster: &'a Cluster, contenders: &'a [Contender], slice: Slice) -> Result<Self> {
        let live: Result<Vec<_>> = contenders.iter().map(|contender| Live::new(cluster, contender)).collect();
        let figures = Figures::new(contenders.iter().map(|contender| contender.kind.title()).collect());
        Ok(Self { cluster, contenders, live: live?, slice, figures, failures: Vec::new(), rounds: 0 })
    }

    /// One round with `services` Services in the cluster.
    pub(crate) fn run(&mut self, services: u32, round: u32) -> Result<()> {
        self.rounds += 1;
        for column in 0..self.contenders.len() {
            let Some(contender) = self.contenders.get(column) else { continue };
            say(&format!("{services} Services, round {round}: {}", contender.kind.title()));
            self.forwarding(column, contender, services).with_context(|| contender.kind.title())?;
            for stand in STANDS.iter().filter(|stand| stand.in_cgroup || contender.kind != Kind::Plain) {
                let place = contender.client.place();
                let place = if stand.in_cgroup { place } else { place.outside_cgroup() };
                self.connections(column, contender, &place, *stand, services)?;
                self.throughput(column, contender, &place, *stand, services)?;
            }
        }
        Ok(())
    }

    fn forwarding(&mut self, column: usize, contender: &Contender, services: u32) -> Result<()> {
        let (cluster, node, packets, source) =
            (self.cluster, contender.node, self.slice.packets, live::new_source(self.rounds));
        let Some(sender) = self.live.get_mut(column) else { return Ok(()) };
        let mut add = |what: &str, value| {
            self.figures.add(&format!("{what}, {services} Services"), "ns", column, value);
        };
        if contender.kind == Kind::Plain {
            add("a frame that is made and dropped", sender.floor(cluster, node, packets)?);
        }
        // The first flow is opened before it is measured, as are the many.
        for (name, flows) in [("1 flow", Flows::One), ("16k flows", Flows::Many)] {
            sender.forward(cluster, node, flows, live::MANY).context(name)?;
            add(&format!("forwarded datagram, {name}"), sender.forward(cluster, node, flows, packets).context(name)?);
        }
        let new = sender.forward(cluster, node, Flows::New(source), live::MANY).context("new flow each")?;
        add("forwarded datagram, new flow each", new);
        Ok(())
    }

    fn connections(
        &mut self,
        column: usize,
        contender: &Contender,
        place: &Place,
        stand: Stand,
        services: u32,
    ) -> Result<()> {
        let among = format!("{}, {services} Services", stand.name);
        let many = self.load(contender, place, Work::Short, false, self.slice.threads)?;
        self.figures.add(&format!("{CONNECTIONS}, {among}"), "1/s", column, many.per_second);
        let one = self.load(contender, place, Work::Short, false, 1)?;
        let kept = self.load(contender, place, Work::Kept, false, 1)?;
        for (what, reached) in [("request on a new connection", one), ("request on a kept connection", kept)] {
            for (share, micros) in [("p50", reached.p50_us), ("p99", reached.p99_us)] {
                let Some(micros) = micros else { continue };
                self.figures.add(&format!("{what}, {share}, {among}"), "us", column, micros);
            }
        }
        Ok(())
    }

    /// To the Service between two halves to the pod: what drifts meanwhile is the same for both.
    fn throughput(
        &mut self,
        column: usize,
        contender: &Contender,
        place: &Place,
        stand: Stand,
        services: u32,
    ) -> Result<()> {
        let among = format!("{}, {services} Services", stand.name);
        let before = self.load(contender, place, Work::Stream, true, 1)?.per_second;
        let service = self.load(contender, place, Work::Stream, false, 1)?.per_second;
        let after = self.load(contender, place, Work::Stream, true, 1)?.per_second;
        self.figures.add(&format!("throughput to the Service, {among}"), "MB/s", column, service / 1e6);
        let ratio = service / ((before + after) / 2.0);
        self.figures.add(&format!("{THROUGHPUT}, {among}"), "ratio", column, ratio);
        Ok(())
    }

    fn load(
        &mut self,
        contender: &Contender,
        place: &Place,
        work: Work,
        direct: bool,
        threads: usize,
    ) -> Result<Reached> {
        let target = contender.target(work, direct);
        let reached = contender.load(place, work, target, threads, self.slice.time)?;
        if reached.failures > 0 {
            let first = reached.first_failure.as_deref().unwrap_or("unknown");
            let about = format!("{}: {} to {target}", contender.kind.title(), work.word());
            self.failures.push(format!("{about}: {} failed, the first with: {first}", reached.failures));
        }
        Ok(reached)
    }
}
