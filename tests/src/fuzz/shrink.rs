//! What of a round's history a difference needs, and how it is told.

use std::collections::HashSet;
use std::fmt::Write;
use std::net::IpAddr;

use anyhow::Result;
use trama_proxy::dataplane::SyncScope;
use trama_proxy::model::{Endpoint, FrontendAddress, ServicePort, ServiceSnapshot};

use super::bed::Bed;
use super::judge::State;
use super::model::Model;
use super::pieces::Pieces;
use super::read::{Kind, Tuple, read};
use super::traffic::Sent;
use super::tunnel::Tunnel;
use crate::packet::Packet;

/// A history is tried so often: the programs choose at random.
const TRIES: usize = 30;
/// Packets before the last one that are looked at.
const HISTORY_MAX: usize = 200;
/// Packets that are told of one that cannot be repeated alone.
const TOLD_MAX: usize = 12;

/// Prints the shortest history that ends in a difference, and the Services.
pub(crate) fn report(
    bed: &mut Bed,
    snapshot: &ServiceSnapshot,
    history: &[Sent],
    reason: &str,
    state: &mut State,
) -> Result<()> {
    let Some((last, before)) = history.split_last() else { return Ok(()) };
    let flows = flows_of(&state.model, last);
    let mut needed: Vec<Sent> = before.iter().filter(|sent| is_related(sent, last)).cloned().collect();
    needed.drain(..needed.len().saturating_sub(HISTORY_MAX));
    needed.push(last.clone());
    println!("  {reason}");
    let found = match replay(bed, snapshot, &needed, state)? {
        Some(reason) => shorten(bed, snapshot, &mut needed, state)?.unwrap_or(reason),
        None => {
            println!(
                "  alone, with the Services as they are now, its flow's packets meet what they must: repeat the seed"
            );
            needed = of_its_flows(history, &flows);
            "the last packets of its flows:".to_owned()
        }
    };
    println!("  {found}");
    for (crossing, frame) in &needed {
        println!("  {:?} {:?} {}", crossing.hook, crossing.link, describe(frame));
        println!("    {}", hex(frame));
    }
    println!("  {:?}", snapshot.node);
    for service in snapshot.services.values().filter(|service| concerns(service, &needed)) {
        tell(service);
    }
    Ok(())
}

/// The tuple of a packet that has ports, in a tunnel or in none.
fn tuple_of((_, frame): &Sent) -> Option<Tuple> {
    let inner = Tunnel::read(frame).map(|tunnel| tunnel.inner);
    match read(inner.as_ref().unwrap_or(frame)) {
        Some((_, Kind::Segment(tuple, _))) => Some(tuple),
        _ => None,
    }
}

/// All tuples that a packet's flows ever had, in both directions, and its own.
fn flows_of(model: &Model, packet: &Sent) -> HashSet<Tuple> {
    let Some(own) = tuple_of(packet) else { return HashSet::new() };
    let both = |tuple: Tuple| [tuple, tuple.reversed()];
    let mut all = HashSet::from(both(own));
    for flow in &model.flows {
        let tuples = [both(flow.key), both(flow.out)].concat();
        if tuples.contains(&own) {
            all.extend(tuples);
        }
    }
    all
}

/// The last packets with one of these tuples.
fn of_its_flows(history: &[Sent], flows: &HashSet<Tuple>) -> Vec<Sent> {
    let (before, last) = history.split_at(history.len().saturating_sub(1));
    let is_one = |sent: &&Sent| tuple_of(sent).is_some_and(|tuple| flows.contains(&tuple));
    let mut all: Vec<Sent> = before.iter().filter(is_one).chain(last).cloned().collect();
    all.drain(..all.len().saturating_sub(TOLD_MAX));
    all
}

/// Whether a packet is for a Service, or from or to one of its endpoints.
fn concerns(service: &ServicePort, packets: &[Sent]) -> bool {
    let outlines = packets.iter().filter_map(|(_, frame)| read(frame)?.0);
    let ends: Vec<IpAddr> = outlines.flat_map(|outline| [outline.source, outline.destination]).collect();
    let endpoints = service.cluster_endpoints.iter().chain(&service.local_endpoints);
    endpoints.map(|endpoint| endpoint.address().ip()).any(|ip| ends.contains(&ip))
        || service.frontends.iter().any(|frontend| match frontend.address {
            FrontendAddress::Ip(ip) => ends.contains(&ip),
            FrontendAddress::NodePort => true,
        })
}

fn tell(service: &ServicePort) {
    let ServicePort { name, algorithm, affinity_seconds, load_balancer_source_ranges: ranges, .. } = service;
    println!("  {name}: {algorithm:?}, affinity {affinity_seconds:?}, ranges {ranges:?}");
    for frontend in &service.frontends {
        println!("    {:?}:{} {:?}", frontend.address, frontend.port, frontend.rules);
    }
    let list =
        |endpoints: &[Endpoint]| endpoints.iter().map(|one| one.address().to_string()).collect::<Vec<_>>().join(" ");
    println!("    cluster {}", list(&service.cluster_endpoints));
    println!("    local {}", list(&service.local_endpoints));
    println!("    kept {:?} draining {:?}", service.kept_endpoints, service.draining_endpoints);
}

/// Leaves out every packet that is not needed, one by one from the end.
fn shorten(
    bed: &mut Bed,
    snapshot: &ServiceSnapshot,
    needed: &mut Vec<Sent>,
    state: &mut State,
) -> Result<Option<String>> {
    let mut found = None;
    for index in (0..needed.len().saturating_sub(1)).rev() {
        let mut fewer = needed.clone();
        fewer.remove(index);
        if let Some(reason) = replay(bed, snapshot, &fewer, state)? {
            found = Some(reason);
            *needed = fewer;
        }
    }
    Ok(found)
}

/// The difference that the last packet of the history meets in one of some tries.
fn replay(bed: &mut Bed, snapshot: &ServiceSnapshot, history: &[Sent], state: &mut State) -> Result<Option<String>> {
    bed.clear()?;
    bed.kernel.sync(snapshot, SyncScope::Full)?;
    for _ in 0..TRIES {
        bed.kernel.forget_packets()?;
        (state.model, state.pieces) = (Model::default(), Pieces::default());
        state.model.set(snapshot);
        for (index, (crossing, frame)) in history.iter().enumerate() {
            match state.step(bed, *crossing, frame)? {
                Err(reason) if index + 1 == history.len() => return Ok(Some(reason)),
                Err(_) => break,
                Ok(()) => {}
            }
        }
    }
    Ok(None)
}

/// Whether two packets have an end in common, or one of them quotes another or is a part of one.
fn is_related(one: &Sent, other: &Sent) -> bool {
    let ends = |sent: &Sent| tuple_of(sent).map(|tuple| [tuple.source.ip(), tuple.destination.ip()]);
    match (ends(one), ends(other)) {
        (Some(one), Some(other)) => one.iter().any(|end| other.contains(end)),
        (_, None) => true,
        (None, _) => false,
    }
}

fn describe(frame: &[u8]) -> String {
    let Some((outline, kind)) = read(frame) else { return "no IP packet".to_owned() };
    let mut text = format!("{kind:?}");
    if let Some(outline) = outline {
        let piece = outline.piece.map_or_else(String::new, |piece| format!(", {piece:?}"));
        let _infallible = write!(text, " {} to {}, {} hops{piece}", outline.source, outline.destination, outline.hops);
    }
    if kind == Kind::Error
        && let Some(quoted) = frame.get(14..).and_then(Packet::parse).and_then(|packet| packet.quoted())
    {
        let _infallible = write!(text, ", about {} to {}", quoted.from(), quoted.to());
    }
    text
}

fn hex(frame: &[u8]) -> String {
    frame.iter().fold(String::new(), |mut text, byte| {
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}
