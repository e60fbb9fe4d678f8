//! A packet of our own through the program that is at work in the kernel, without an interface ever seeing it.

use std::io;
use std::os::fd::AsFd;

use aya::maps::{HashMap, MapData, MapInfo, PerCpuArray};
use aya::programs::{ProgramInfo, loaded_programs};
use node_sys::bpf::test_run;
use proxy_common::decide::Crossing;
use proxy_common::flow_table::FlowEdit;
use proxy_common::pod::Pod;
use proxy_common::{Affinity, AffinityKey, Be16, Counter, FLOW_REPLY, Flow, FlowKey};

use super::super::encode::UserAddress;
use super::super::flows::FlowTable;
use super::{InspectError, Pinned, absent, map_error};
use crate::model::Protocol;

/// `TC_ACT_SHOT` (include/uapi/linux/pkt_cls.h).
const DROPPED: u32 = 2;
/// Offset of `ifindex` in `struct __sk_buff` (include/uapi/linux/bpf.h), and the size of the whole.
const CONTEXT_IFINDEX: usize = 40;
const CONTEXT_SIZE: usize = 192;
const ETHERNET: usize = 14;
const PROTOCOLS_ICMP: [u8; 2] = [1, 58];

/// What the kernel's program did with the packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trial<A> {
    /// What became of it.
    pub(super) fate: Fate<A>,
    /// Counters that moved meanwhile; those of other packets may be among them.
    pub(super) counted: Vec<Counter>,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate<A> {
    /// It goes to this endpoint from this source.
    Forward { source: A, backend: A, port: Be16 },
    /// It is answered with ICMP.
    Refuse,
    /// It is dropped.
    Drop,
    /// It goes on as it is.
    Pass,
}

/// Runs the packet, and takes back what the run left: its flow, and what the client's affinity became.
pub(super) fn run<A: UserAddress>(
    pinned: &Pinned,
    crossing: Crossing,
    key: &FlowKey<A>,
    affinity: Option<(AffinityKey<A>, Option<Affinity>)>,
) -> Result<Trial<A>, InspectError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
    FlowEdit<A>: Pod,
    AffinityKey<A>: aya::Pod,
{
    let name = if crossing.egress { "tc_egress" } else { "tc_ingress" };
    let failed = |reason: String| InspectError::Program { program: name, reason };
    let program = find(pinned, name)?;
    let program = program.fd().map_err(|error| failed(error.to_string()))?;
    let counters: PerCpuArray<MapData, u64> = pinned.open("COUNTERS")?;
    let total = |counter: &Counter| counters.get(&(*counter as u32), 0).map_or(0, |values| values.iter().sum::<u64>());
    let before: Vec<u64> = Counter::ALL.iter().map(total).collect();
    let mut context = vec![0; CONTEXT_SIZE];
    if let Some(bytes) = context.get_mut(CONTEXT_IFINDEX..CONTEXT_IFINDEX + size_of::<u32>()) {
        bytes.copy_from_slice(&crossing.interface.to_ne_bytes());
    }
    let result = test_run(program.as_fd(), &frame(key), &context).map_err(|error| failed(error.to_string()))?;
    let moved = Counter::ALL.iter().zip(before).filter(|(counter, before)| total(counter) > *before);
    let counted = moved.map(|(counter, _)| *counter).collect();
    let flow = take_flow(pinned, key)?;
    if let Some((key, former)) = affinity {
        restore_affinity(pinned, key, former)?;
    }
    let protocol = if A::WORDS == 1 { ETHERNET + 9 } else { ETHERNET + 6 };
    let fate = match flow {
        Some(flow) => Fate::Forward { source: flow.source, backend: flow.destination, port: flow.destination_port },
        None if result.verdict == DROPPED => Fate::Drop,
        None if result.frame.get(protocol).is_some_and(|protocol| PROTOCOLS_ICMP.contains(protocol)) => Fate::Refuse,
        None => Fate::Pass,
    };
    Ok(Trial { fate, counted })
}

/// The newest loaded program of this name that works on the pinned maps.
fn find(pinned: &Pinned, name: &'static str) -> Result<ProgramInfo, InspectError> {
    let failed = |reason: String| InspectError::Program { program: name, reason };
    let map = MapInfo::from_pin(pinned.path("FLOWS_V4")).map_err(|error| map_error("FLOWS_V4", &error))?;
    let uses = |program: &ProgramInfo| program.map_ids().ok().flatten().is_some_and(|ids| ids.contains(&map.id()));
    let ours =
        loaded_programs().filter_map(Result::ok).filter(|program| program.name() == name.as_bytes() && uses(program));
    ours.max_by_key(ProgramInfo::id)
        .ok_or_else(|| failed("no program of this name that uses the pinned maps is loaded".to_owned()))
}

/// Removes both entries of the flow that the packet opened.
fn take_flow<A: UserAddress>(pinned: &Pinned, key: &FlowKey<A>) -> Result<Option<Flow<A>>, InspectError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
    FlowEdit<A>: Pod,
{
    let flows = table::<A>(pinned)?;
    let failed = |error: io::Error| map_error(&format!("FLOWS_{}", A::SUFFIX), &error);
    let Some(flow) = flows.get(key).map_err(failed)? else { return Ok(None) };
    flows.remove(key).map_err(failed)?;
    let twin = flow.twin_key(key.protocol);
    // The answer's entry is ours if it leads back to us.
    let answer = flows.get(&twin).map_err(failed)?;
    if answer.is_some_and(|answer| {
        answer.flags & FLOW_REPLY != 0 && answer.destination == key.source && answer.destination_port == key.source_port
    }) {
        flows.remove(&twin).map_err(failed)?;
    }
    Ok(Some(flow))
}

fn table<A: UserAddress>(pinned: &Pinned) -> Result<FlowTable<A>, InspectError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
    FlowEdit<A>: Pod,
{
    FlowTable::open(&pinned.directory).map_err(|error| map_error(&format!("FLOWS_{}", A::SUFFIX), &error))
}

fn restore_affinity<A: UserAddress>(
    pinned: &Pinned,
    key: AffinityKey<A>,
    former: Option<Affinity>,
) -> Result<(), InspectError>
where
    AffinityKey<A>: aya::Pod,
{
    let map = format!("AFFINITY_{}", A::SUFFIX);
    let mut affinities: HashMap<MapData, AffinityKey<A>, Affinity> = pinned.open(&map)?;
    match former {
        Some(former) => affinities.insert(key, former, 0).map_err(|error| map_error(&map, &error)),
        None => absent(&map, affinities.remove(&key)).map(|_| ()),
    }
}

/// A port that no flow of the same packet uses; the ephemeral range's, so that it looks like a client's.
pub(super) fn free_port<A: UserAddress>(pinned: &Pinned, key: &FlowKey<A>) -> Result<Be16, InspectError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
    FlowEdit<A>: Pod,
{
    const FIRST: u16 = 49_152;
    const TRIED: u16 = 1_024;
    let map = format!("FLOWS_{}", A::SUFFIX);
    let flows = table::<A>(pinned)?;
    for port in (FIRST..FIRST + TRIED).map(Be16::from_host) {
        let key = FlowKey { source_port: port, ..*key };
        if flows.get(&key).map_err(|error| map_error(&map, &error))?.is_none() {
            return Ok(port);
        }
    }
    Err(InspectError::Map { map, reason: format!("{TRIED} source ports have flows already") })
}

/// The first packet of a connection: a SYN, a datagram without payload, or an INIT.
fn frame<A: UserAddress>(key: &FlowKey<A>) -> Vec<u8> {
    let transport = transport(key);
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let length = u16::try_from(transport.len()).unwrap_or(u16::MAX);
    if A::WORDS == 1 {
        frame.extend(0x0800_u16.to_be_bytes());
        let total = length.saturating_add(20).to_be_bytes();
        let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, key.protocol, 0, 0];
        header.extend(key.source.as_bytes().iter().chain(key.destination.as_bytes()));
        let checksum = internet_checksum(&header).to_be_bytes();
        if let Some(field) = header.get_mut(10..12) {
            field.copy_from_slice(&checksum);
        }
        frame.extend(header);
    } else {
        frame.extend(0x86dd_u16.to_be_bytes());
        let payload = length.to_be_bytes();
        frame.extend([0x60, 0, 0, 0, payload[0], payload[1], key.protocol, 64]);
        frame.extend(key.source.as_bytes().iter().chain(key.destination.as_bytes()));
    }
    frame.extend(transport);
    frame
}

fn transport<A: UserAddress>(key: &FlowKey<A>) -> Vec<u8> {
    const SYN: u8 = 2;
    let mut bytes = [key.source_port, key.destination_port]
        .iter()
        .flat_map(|port| port.to_host().to_be_bytes())
        .collect::<Vec<_>>();
    match key.protocol {
        protocol if protocol == Protocol::Tcp as u8 => {
            bytes.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0, 0, 0, 0]);
        }
        protocol if protocol == Protocol::Udp as u8 => bytes.extend([0, 8, 0, 0]),
        // Verification tag, checksum, and an INIT chunk of twenty bytes.
        _ => {
            bytes.extend([0; 8]);
            bytes.extend([1, 0, 0, 20, 0, 0, 0, 1, 0, 0, 0xff, 0xff, 0, 1, 0, 1, 0, 0, 0, 1]);
        }
    }
    bytes
}

/// RFC 1071.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match pair {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        _ => 0,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Nanoseconds of the monotonic clock; the kernel's coarse one is some milliseconds behind.
pub(super) fn monotonic_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        u64::try_from(time.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
    })
}

#[cfg(test)]
mod tests {
    use proxy_common::{V4, V6};

    use super::*;

    #[test]
    fn a_packet_of_our_own_has_its_headers_where_they_belong() {
        let key = FlowKey {
            source: V4::from_octets([10, 0, 0, 1]),
            destination: V4::from_octets([10, 96, 0, 1]),
            source_port: Be16::from_host(50_000),
            destination_port: Be16::from_host(80),
            protocol: 6,
            padding: [0; 3],
        };
        let bytes = frame(&key);
        assert_eq!((bytes.len(), bytes[12], bytes[13], bytes[14 + 9]), (14 + 20 + 20, 8, 0, 6));
        assert_eq!(internet_checksum(&bytes[14..34]), 0, "a header with its checksum sums up to nothing");
        assert_eq!(bytes[34..38], [0xc3, 0x50, 0, 80]);
        let v6 = FlowKey {
            source: V6([1, 2, 3, 4]),
            destination: V6([5, 6, 7, 8]),
            source_port: key.source_port,
            destination_port: key.destination_port,
            protocol: 132,
            padding: [0; 3],
        };
        let bytes = frame(&v6);
        assert_eq!((bytes.len(), bytes[14 + 6], bytes[14 + 40 + 12]), (14 + 40 + 32, 132, 1));
    }
}
