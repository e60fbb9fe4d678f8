//! The bytes of every key and value, written down: a change of layout shows here, and must raise `ABI_VERSION`.
//!
//! Ports and addresses are in network byte order; all other numbers are in the order of the little-endian machines that the
//! goldens were written on.

use super::*;
use crate::pod::Pod;

const ADDRESS_V4: V4 = V4::from_octets([10, 96, 0, 1]);
const ADDRESS_V6: V6 = V6::from_octets([0xfd, 0, 0, 0x10, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
const OTHER_V4: V4 = V4::from_octets([10, 244, 1, 2]);
const OTHER_V6: V6 = V6::from_octets([0xfd, 0, 0x10, 0x24, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);

const HEX_V4: &str = "0a600001";
const HEX_V6: &str = "fd000010009600000000000000000001";
const HEX_OTHER_V4: &str = "0af40102";
const HEX_OTHER_V6: &str = "fd001024400000000000000000000002";

/// Compares the value's bytes with hexadecimal digits; spaces separate fields.
#[track_caller]
fn check(value: &impl Pod, expected: &str) {
    let mut digits = expected.bytes().filter(|byte| *byte != b' ');
    for (offset, byte) in value.as_bytes().iter().enumerate() {
        let mut digit = || char::from(digits.next().expect("the golden is too short")).to_digit(16).unwrap();
        assert_eq!(u32::from(*byte), digit() * 16 + digit(), "byte {offset}");
    }
    assert_eq!(digits.next(), None, "the golden is too long");
}

/// [`check`] with addresses in front.
#[track_caller]
fn check_after(value: &impl Pod, addresses: [&str; 2], rest: &str) {
    let mut expected = [b' '; 256];
    let mut length = 0;
    for part in [addresses[0], addresses[1], rest] {
        expected[length..length + part.len()].copy_from_slice(part.as_bytes());
        length += part.len();
    }
    check(value, core::str::from_utf8(&expected[..length]).unwrap());
}

#[test]
fn frontend_keys() {
    let port = Be16::from_host(80);
    let v4 = FrontendKey { address: ADDRESS_V4, port, protocol: 6, padding: 0 };
    check_after(&v4, [HEX_V4, ""], "0050 06 00");
    let v6 = FrontendKey { address: ADDRESS_V6, port, protocol: 17, padding: 0 };
    check_after(&v6, [HEX_V6, ""], "0050 11 00");
}

#[test]
fn frontend() {
    let rule = |action, local, masquerade| RuleBits::new(action, local, masquerade);
    let rules = [
        rule(RuleBits::FORWARD, false, false),
        rule(RuleBits::REJECT, false, true),
        rule(RuleBits::FORWARD, true, true).with_direct_return(),
    ];
    let value = Frontend {
        service_id: 1,
        cluster_first: 0x102,
        cluster_count: 3,
        local_first: 0x104,
        local_count: 1,
        rules: Frontend::pack_rules(rules),
        affinity_seconds: 10800,
        flags: FRONTEND_SOURCE_RANGES,
    };
    check(&value, "01000000 02010000 03000000 04010000 01000000 00091c00 302a0000 01000000");
    assert_eq!([Origin::Pod, Origin::Node, Origin::External].map(|origin| value.rule(origin)), rules);
    assert_eq!(rules.map(RuleBits::action), [RuleBits::FORWARD, RuleBits::REJECT, RuleBits::FORWARD]);
}

#[test]
fn backends() {
    let port = Be16::from_host(8080);
    let rest = "1f90 01 01 07000000 02000000";
    let v4 = Backend { address: OTHER_V4, port, state: BACKEND_ACTIVE, local: 1, service_id: 7, generation: 2 };
    check_after(&v4, [HEX_OTHER_V4, ""], rest);
    let v6 = Backend { address: OTHER_V6, port, state: BACKEND_ACTIVE, local: 1, service_id: 7, generation: 2 };
    check_after(&v6, [HEX_OTHER_V6, ""], rest);
}

fn flow_key<A: Copy>(source: A, destination: A) -> FlowKey<A> {
    let (source_port, destination_port) = (Be16::from_host(40000), Be16::from_host(80));
    FlowKey { source, destination, source_port, destination_port, protocol: 6, padding: [0; 3] }
}

#[test]
fn flow_keys() {
    check_after(&flow_key(OTHER_V4, ADDRESS_V4), [HEX_OTHER_V4, HEX_V4], "9c40 0050 06 000000");
    check_after(&flow_key(OTHER_V6, ADDRESS_V6), [HEX_OTHER_V6, HEX_V6], "9c40 0050 06 000000");
}

fn flow<A: Copy>(source: A, destination: A) -> Flow<A> {
    Flow {
        source,
        destination,
        source_port: Be16::from_host(40000),
        destination_port: Be16::from_host(8080),
        service_id: 4,
        backend_id: 5,
        backend_generation: 6,
        last_seen: 9,
        interface: 8,
        link: [0x0000_0002, 0x0002_0100, 0x0200_0000].map(u32::from_le),
        mtu: 1500,
        route_tick: 7,
        flags: FLOW_REPLY | FLOW_CLOSING,
    }
}

#[test]
fn flows() {
    let rest = "9c40 1f90 04000000 05000000 06000000 09000000 08000000 020000000001 020000000002 dc05 07 03";
    check_after(&flow(ADDRESS_V4, OTHER_V4), [HEX_V4, HEX_OTHER_V4], rest);
    check_after(&flow(ADDRESS_V6, OTHER_V6), [HEX_V6, HEX_OTHER_V6], rest);
}

#[test]
fn a_flow_s_twin_is_its_tuple_reversed() {
    let twin = flow(ADDRESS_V4, OTHER_V4).twin_key(6);
    check_after(&twin, [HEX_OTHER_V4, HEX_V4], "1f90 9c40 06 000000");
}

/// One bit means three things, by whose entry it is in.
#[test]
fn the_bit_of_tunnels_is_told_by_the_entry() {
    let kind = |flags, service_id| {
        let flow = Flow::<V4> { flags, service_id, ..Flow::default() };
        [flow.is_direct(), flow.came_by_tunnel(), flow.is_stacks()]
    };
    assert_eq!(kind(FLOW_TUNNEL, 1), [true, false, false]);
    assert_eq!(kind(FLOW_REPLY | FLOW_TUNNEL, 1), [false, true, false]);
    assert_eq!(kind(FLOW_REPLY | FLOW_STACK, 0), [false, false, true]);
    let others = !(FLOW_REPLY | FLOW_TUNNEL);
    assert_eq!([kind(others, 1), kind(others | FLOW_REPLY, 1)], [[false; 3]; 2]);
}

#[test]
fn affinities() {
    check_after(&AffinityKey { client: OTHER_V4, service_id: 7 }, [HEX_OTHER_V4, ""], "07000000");
    check_after(&AffinityKey { client: OTHER_V6, service_id: 7 }, [HEX_OTHER_V6, ""], "07000000");
    let key = SocketAffinityKey { netns_cookie: 0x1_0000_0002, service_id: 7, padding: 0 };
    check(&key, "0200000001000000 07000000 00000000");
    let value = Affinity { backend_id: 5, backend_generation: 6, last_used_seconds: 0x100, padding: 0 };
    check(&value, "05000000 06000000 00010000 00000000");
}

fn peer<A: Copy>(frontend: A, backend: A) -> SocketPeer<A> {
    let (frontend_port, backend_port) = (Be16::from_host(53), Be16::from_host(5353));
    SocketPeer { frontend, backend, frontend_port, backend_port, backend_id: 5, backend_generation: 6 }
}

#[test]
fn socket_peers() {
    let rest = "0035 14e9 05000000 06000000";
    check_after(&peer(ADDRESS_V4, OTHER_V4), [HEX_V4, HEX_OTHER_V4], rest);
    check_after(&peer(ADDRESS_V6, OTHER_V6), [HEX_V6, HEX_OTHER_V6], rest);
    let connected = ConnectedPeer { cookie: 7, peer: peer(ADDRESS_V4, OTHER_V4), padding: 0 };
    assert_eq!(connected.as_bytes()[..8], 7_u64.to_ne_bytes(), "the cookie comes first");
    assert_eq!(connected.as_bytes()[8..28], *connected.peer.as_bytes());
    let mut storage = SocketPeers::<V4> { peers: Default::default(), next: 9 };
    storage.peers[1] = peer(ADDRESS_V4, OTHER_V4);
    let bytes = storage.as_bytes();
    assert_eq!(bytes[20..40], *storage.peers[1].as_bytes(), "the second entry follows the first");
    assert_eq!(bytes[160..], [9, 0, 0, 0], "the cursor comes last");
    let storage = SocketPeers::<V6> { peers: Default::default(), next: 9 };
    assert_eq!(storage.as_bytes()[352..], [9, 0, 0, 0]);
}

#[test]
fn node_addresses() {
    check(&NodeAddress { flags: NODE_ADDRESS_LOCAL | NODE_ADDRESS_NODE_PORT }, "03000000");
}

#[test]
fn node_settings() {
    let mut v4 = NodeSettings::<V4> {
        masquerade: OTHER_V4,
        source_port_min: 1024,
        source_port_max: 29999,
        node_port_min: 30000,
        node_port_max: 32767,
        flags: NODE_LOOPBACK_NODE_PORTS | NODE_CLUSTER_IPS_ANYWHERE,
        flood_limit: 3,
        netns_cookie: [7, 1],
        pod_cidr_count: 1,
        pod_cidrs: [Cidr::default(); POD_CIDRS_MAX],
        service_cidr_count: 2,
        service_cidrs: [Cidr::default(); SERVICE_CIDRS_MAX],
    };
    v4.pod_cidrs[0] = Cidr { network: ADDRESS_V4, mask: V4::from_octets([255, 255, 0, 0]) };
    let bytes = v4.as_bytes();
    assert_eq!(bytes[..16], [10, 244, 1, 2, 0, 4, 0x2f, 0x75, 0x30, 0x75, 0xff, 0x7f, 6, 0, 0, 0]);
    assert_eq!(bytes[16..32], [3, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(bytes[32..40], [10, 96, 0, 1, 255, 255, 0, 0]);
    assert!(bytes[40..96].iter().all(|byte| *byte == 0));
    assert_eq!(bytes[96..100], [2, 0, 0, 0]);
    assert!(bytes[100..].iter().all(|byte| *byte == 0));
    let v6 = NodeSettings::<V6> { masquerade: OTHER_V6, pod_cidr_count: 2, ..NodeSettings::default() };
    let bytes = v6.as_bytes();
    assert_eq!(bytes[..16], OTHER_V6.octets());
    assert!(bytes[16..40].iter().all(|byte| *byte == 0));
    assert_eq!(bytes[40..44], [2, 0, 0, 0]);
}

#[test]
fn source_ranges() {
    check_after(&SourceRange { service_id: 7, client: OTHER_V4 }, ["07000000", HEX_OTHER_V4], "");
    check_after(&SourceRange { service_id: 7, client: OTHER_V6 }, ["07000000", HEX_OTHER_V6], "");
}

#[test]
fn endpoints() {
    check_after(&EndpointKey { address: OTHER_V4, service_id: 7 }, [HEX_OTHER_V4, ""], "07000000");
    check_after(&EndpointKey { address: OTHER_V6, service_id: 7 }, [HEX_OTHER_V6, ""], "07000000");
}
