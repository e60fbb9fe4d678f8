//! The programs over maps of their own, in this kernel.

use std::time::Instant;

use aya::EbpfLoader;
use proxy_common::{
    BACKEND_ACTIVE, Backend, BackendLoad, Be16, FLOW_CLOSED, FLOW_CLOSING, FLOW_CONFIRMED, FLOW_COUNTED, FLOW_FOREIGN,
    FLOW_REPLY, Flow, FlowKey, NodeSettings, V4,
};

use super::*;
use crate::dataplane::ebpf::flows::FlowTable;
use crate::dataplane::ebpf::load::OBJECT;

const TCP: u8 = 6;
const UDP: u8 = 17;
/// Backend that takes flows.
const SERVES: u32 = 3;
/// Backend whose endpoint is gone.
const GONE: u32 = 4;

struct Bench {
    flows: FlowTable<V4>,
    loads: Array<MapData, BackendLoad>,
    limits: Array<MapData, FlowLimits>,
    node: Array<MapData, NodeSettings<V4>>,
    programs: FamilyPrograms,
    census: Census,
    _object: Ebpf,
}

fn flows(object: &mut Ebpf) -> FlowTable<V4> {
    let editor: &mut SchedClassifier = object.program_mut("edit_flows_v4").unwrap().try_into().unwrap();
    editor.load().unwrap();
    let editor = editor.fd().unwrap().as_fd().try_clone_to_owned().unwrap();
    let map = |name: &str| match object.map(name).unwrap() {
        aya::maps::Map::Array(map) => map.fd().as_fd().try_clone_to_owned().unwrap(),
        _ => unreachable!("{name} is an array"),
    };
    FlowTable::new(map("FLOW_HEADS_V4"), map("FLOWS_V4"), editor)
}

impl Bench {
    /// All flows may be idle for `idle_ticks`.
    fn new(idle_ticks: u32) -> Self {
        let mut loader = EbpfLoader::new();
        for (map, entries) in [("FLOWS_V4", 1024), ("FLOWS_V6", 1024), ("FLOW_HEADS_V4", 128), ("FLOW_HEADS_V6", 128)] {
            loader.map_max_entries(map, entries);
        }
        loader.override_global("FLOW_BUCKETS", &128_u32, true);
        let mut object = loader.load(OBJECT).unwrap();
        for name in ["expire_v4", "recount_v4"] {
            let program: &mut SchedClassifier = object.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap();
        }
        let mut backends: Array<_, Backend<V4>> = object.take_map("BACKENDS_V4").unwrap().try_into().unwrap();
        let backend = Backend { state: BACKEND_ACTIVE, generation: 7, ..Backend::default() };
        backends.set(SERVES, backend, 0).unwrap();
        backends.set(GONE, Backend { state: 0, generation: 8, ..backend }, 0).unwrap();
        let heads = match object.map("FLOW_HEADS_V4").unwrap() {
            aya::maps::Map::Array(data) => data.fd().as_fd().try_clone_to_owned().unwrap(),
            _ => unreachable!("it is an array"),
        };
        let heads = MappedArray::map(heads.as_fd(), 128, size_of::<FlowHead>()).unwrap();
        let loads: Array<_, BackendLoad> = object.take_map("LOADS_V4").unwrap().try_into().unwrap();
        let [expire, recount] = ["expire_v4", "recount_v4"].map(|name| descriptor(&object, name).unwrap());
        let programs = FamilyPrograms { expire, recount, backends: loads.len(), heads, counted: true };
        let flows = flows(&mut object);
        let census = object.take_map("FLOW_CENSUS").unwrap().try_into().unwrap();
        let limits = object.take_map("FLOW_LIMITS").unwrap().try_into().unwrap();
        let node = object.take_map("NODE_V4").unwrap().try_into().unwrap();
        let mut bench = Self { flows, loads, limits, node, programs, census, _object: object };
        bench.limit([idle_ticks; FlowState::COUNT]);
        bench
    }

    fn limit(&mut self, idle_ticks: [u32; FlowState::COUNT]) {
        self.limits.set(0, FlowLimits { idle_ticks, unanswered_ticks: 1 }, 0).unwrap();
    }

    /// Both entries of flow number `port`, with their flags beside the direction's.
    fn open(&mut self, protocol: u8, port: u16, flags: [u8; 2], backend_id: u32) -> [FlowKey<V4>; 2] {
        self.open_as(V4::from_octets([10, 0, 0, 1]), protocol, port, flags, backend_id)
    }

    /// As [`Bench::open`], of a client that the endpoint sees as `seen`.
    fn open_as(&mut self, seen: V4, protocol: u8, port: u16, flags: [u8; 2], backend_id: u32) -> [FlowKey<V4>; 2] {
        let address = |last| V4::from_octets([10, 0, 0, last]);
        let key = |source, destination, source_port, destination_port| FlowKey {
            source,
            destination,
            source_port: Be16::from_host(source_port),
            destination_port: Be16::from_host(destination_port),
            protocol,
            padding: [0; 3],
        };
        let to_service = key(address(1), address(2), port, 80);
        let answer = key(address(3), seen, 8080, port);
        let becomes = |twin: &FlowKey<V4>, flags| Flow {
            source: twin.destination,
            destination: twin.source,
            source_port: twin.destination_port,
            destination_port: twin.source_port,
            flags,
            backend_id,
            backend_generation: 7,
            ..Flow::default()
        };
        assert!(self.flows.add(&to_service, &becomes(&answer, flags[0])).unwrap());
        assert!(self.flows.add(&answer, &becomes(&to_service, flags[1] | FLOW_REPLY)).unwrap());
        [to_service, answer]
    }

    fn has(&self, keys: &[FlowKey<V4>; 2]) -> bool {
        let there = keys.map(|key| self.flows.get(&key).unwrap().is_some());
        assert_eq!(there[0], there[1], "both entries or none");
        there[0]
    }

    fn look(&mut self) -> FlowCensus {
        self.programs.look(&mut self.census).unwrap()
    }

    fn see(&mut self, key: FlowKey<V4>, last_seen: u32) {
        let flow = self.flows.get(&key).unwrap().unwrap();
        assert!(self.flows.remove(&key).unwrap() && self.flows.add(&key, &Flow { last_seen, ..flow }).unwrap());
    }

    fn last_seen(&self, key: &FlowKey<V4>) -> u32 {
        self.flows.get(key).unwrap().unwrap().last_seen
    }

    /// Looks until `keys` are gone.
    fn end(&mut self, keys: &[FlowKey<V4>; 2]) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.has(keys) {
            assert!(Instant::now() < deadline, "it does not end");
            self.look();
        }
    }
}

#[test]
fn an_idle_flow_ends_with_both_entries_and_an_active_one_stays() {
    let mut bench = Bench::new(u32::MAX / 4);
    assert!(!bench.programs.has_flows().unwrap());
    let idle = bench.open(UDP, 1000, [0, 0], SERVES);
    assert!(bench.programs.has_flows().unwrap());
    let stays = bench.open(TCP, 1001, [FLOW_CONFIRMED; 2], SERVES);
    let census = bench.look();
    assert_eq!((census.entries, census.expired), (4, 0), "what user space made is seen for the first time");
    assert!(bench.last_seen(&idle[0]) != 0);
    let mut limits = [u32::MAX / 4; FlowState::COUNT];
    limits[FlowState::UdpUnanswered as usize] = 2;
    bench.limit(limits);
    bench.end(&idle);
    assert!(bench.has(&stays) && bench.programs.has_flows().unwrap());
}

#[test]
fn one_direction_alone_keeps_a_flow() {
    let mut bench = Bench::new(1_000_000);
    let flow = bench.open(UDP, 1000, [FLOW_CONFIRMED; 2], SERVES);
    bench.look();
    let now = bench.last_seen(&flow[0]);
    bench.see(flow[0], now.wrapping_sub(2_000_000));
    assert_eq!(bench.look().expired, 0);
    bench.see(flow[1], now.wrapping_sub(2_000_000));
    assert_eq!(bench.look().expired, 1);
    assert!(!bench.has(&flow));
}

#[test]
fn states_follow_the_flags_of_both_entries() {
    let of = |protocol, flags| FlowState::of(protocol, flags);
    assert_eq!(of(TCP, 0), FlowState::TcpOpening);
    assert_eq!(of(TCP, FLOW_CONFIRMED), FlowState::TcpEstablished);
    assert_eq!(of(TCP, FLOW_FOREIGN), FlowState::TcpEstablished);
    assert_eq!(of(TCP, FLOW_CONFIRMED | FLOW_CLOSING), FlowState::TcpHalfClosed);
    assert_eq!(of(TCP, FLOW_CONFIRMED | FLOW_CLOSING | FLOW_CLOSED), FlowState::TcpClosed);
    assert_eq!(of(UDP, FLOW_REPLY), FlowState::UdpUnanswered);
    assert_eq!(of(UDP, FLOW_CONFIRMED), FlowState::UdpAnswered);
    assert_eq!(of(132, 0), FlowState::SctpOpening);
    assert_eq!(of(132, FLOW_CONFIRMED), FlowState::SctpEstablished);
    assert_eq!(of(132, FLOW_CLOSING), FlowState::SctpClosed);
    for (index, state) in STATES.into_iter().enumerate() {
        assert_eq!(state as usize, index);
    }
}

#[test]
fn flows_of_a_gone_endpoint_end_at_once_but_for_connections_that_are_answered() {
    let mut bench = Bench::new(u32::MAX / 4);
    let datagrams = bench.open(UDP, 1000, [FLOW_CONFIRMED; 2], GONE);
    let opening = bench.open(TCP, 1001, [0; 2], GONE);
    let connection = bench.open(TCP, 1002, [FLOW_CONFIRMED; 2], GONE);
    let others = bench.open(UDP, 1003, [FLOW_CONFIRMED; 2], SERVES);
    bench.look();
    bench.look();
    assert_eq!([&datagrams, &opening, &connection, &others].map(|flow| bench.has(flow)), [false, false, true, true]);
    // A packet to the endpoint that is not answered.
    let now = bench.last_seen(&connection[0]);
    bench.see(connection[1], now.wrapping_sub(SEEN_TICKS + 2));
    bench.end(&connection);
}

#[test]
fn open_flows_are_counted_anew() {
    let mut bench = Bench::new(u32::MAX / 4);
    bench.loads.set(SERVES, BackendLoad { open: 77, ..BackendLoad::default() }, 0).unwrap();
    for port in 1000..1010 {
        bench.open(TCP, port, [FLOW_COUNTED | FLOW_CONFIRMED, FLOW_CONFIRMED], SERVES);
    }
    bench.open(TCP, 2000, [FLOW_CONFIRMED; 2], SERVES);
    bench.open(TCP, 2001, [FLOW_COUNTED | FLOW_CLOSED, FLOW_CLOSED], SERVES);
    bench.look();
    assert_eq!(bench.look().counted, 10);
    assert_eq!(bench.loads.get(&SERVES, 0).unwrap(), BackendLoad { open: 10, ..BackendLoad::default() });
    let mut keys = Vec::new();
    bench.flows.each(|key, _| keys.push(key)).unwrap();
    keys.iter().for_each(|key| assert!(bench.flows.remove(key).unwrap()));
    bench.look();
    assert_eq!(bench.loads.get(&SERVES, 0).unwrap(), BackendLoad::default());
}

#[test]
fn source_ports_in_use_are_counted_by_endpoint() {
    let mut bench = Bench::new(u32::MAX / 4);
    let masquerade = V4::from_octets([10, 0, 0, 9]);
    bench.node.set(0, NodeSettings { masquerade, ..NodeSettings::default() }, 0).unwrap();
    for (port, backend_id) in [(1000, SERVES), (1001, SERVES), (1002, SERVES), (1003, GONE)] {
        bench.open_as(masquerade, TCP, port, [FLOW_CONFIRMED; 2], backend_id);
    }
    // The client's own.
    bench.open(TCP, 2000, [FLOW_CONFIRMED; 2], SERVES);
    let census = bench.look();
    assert_eq!((census.masqueraded, census.masqueraded_max), (4, 3));
    assert_eq!(bench.look(), census, "counted from the beginning each time");
}

#[test]
fn timeouts_are_ticks_with_what_is_not_seen_granted() {
    let limits = limits(&FlowTimeouts::default(), 250);
    assert_eq!(limits.idle_ticks[FlowState::UdpUnanswered as usize], 30 * 250 + SEEN_TICKS);
    assert_eq!(limits.idle_ticks[FlowState::TcpEstablished as usize], 86_400 * 250 + SEEN_TICKS);
    let long = FlowTimeouts { tcp_established: Duration::from_hours(24 * 365), ..FlowTimeouts::default() };
    assert_eq!(super::limits(&long, 1000).idle_ticks[1], u32::MAX / 4, "half of what a signed number holds");
}
