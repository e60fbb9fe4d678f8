//! Entries of conntrack, and what they become.

use node_sys::Netns;
use node_sys::conntrack::{Translation, Tuple};

use super::*;

const CLIENT: &str = "10.244.1.7:4000";
const SERVICE: &str = "10.96.0.10:53";
const ENDPOINT: &str = "10.244.2.3:5353";
const NODE: &str = "172.18.0.11:50000";

fn tuple(source: &str, destination: &str) -> Tuple {
    Tuple { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
}

/// What conntrack says of a flow that it was told of.
fn entry(protocol: u8, arriving: (&str, &str), leaving: (&str, &str)) -> Entry {
    let translation =
        Translation { protocol, arriving: tuple(arriving.0, arriving.1), leaving: tuple(leaving.0, leaving.1) };
    let netns = Netns::anonymous().unwrap();
    let mut found = Vec::new();
    netns
        .run(|| {
            let mut table = Conntrack::open().unwrap();
            table.replace(&translation, 60).unwrap();
            let filter = Filter { protocol, v6: false, destination: None, port: None };
            table.for_each(&filter, |entry| found.push(*entry)).unwrap();
        })
        .unwrap();
    *found.first().unwrap()
}

/// Serves [`ENDPOINT`] behind frontends with this address.
fn serving(address: V4) -> impl Fn(&FrontendKey<V4>, V4, Be16) -> Option<(u32, u32)> {
    move |key, endpoint, port| {
        let right = key.address == address && endpoint.to_ip().to_string() == "10.244.2.3" && port.to_host() == 5353;
        right.then_some((7, 3))
    }
}

fn v4(address: &str) -> V4 {
    V4::from_ip(address.parse().unwrap()).unwrap()
}

#[test]
fn a_connection_keeps_the_tuple_of_its_answers() {
    let translated = entry(TCP, (CLIENT, SERVICE), (NODE, ENDPOINT));
    let [(key, flow)] = held::<V4>(&translated).unwrap().try_into().unwrap();
    assert_eq!((key.source, key.source_port.to_host()), (v4("10.244.2.3"), 5353));
    assert_eq!((key.destination, key.destination_port.to_host()), (v4("172.18.0.11"), 50000));
    assert_eq!(flow, Flow { flags: FLOW_FOREIGN, ..Flow::default() });
    let mut over = translated;
    over.ended = true;
    assert!(held::<V4>(&over).is_none());
    assert!(held::<V4>(&entry(TCP, (CLIENT, ENDPOINT), (CLIENT, ENDPOINT))).is_none(), "translates nothing");
}

#[test]
fn datagrams_stay_with_their_endpoint() {
    let node = NodeConfig::default();
    let masqueraded = entry(UDP, (CLIENT, SERVICE), (NODE, ENDPOINT));
    let [(answer_key, answer), (forward_key, forward)] =
        taken(&masqueraded, &node, serving(v4("10.96.0.10"))).unwrap().try_into().unwrap();
    assert_eq!(forward.twin_key(UDP), answer_key);
    assert_eq!(answer.twin_key(UDP), forward_key);
    assert_eq!((forward_key.source, forward_key.destination), (v4("10.244.1.7"), v4("10.96.0.10")));
    assert_eq!((forward.source, forward.destination), (v4("172.18.0.11"), v4("10.244.2.3")));
    let answered = FLOW_ANSWERED | FLOW_CONFIRMED;
    assert_eq!((forward.flags, answer.flags), (answered, FLOW_REPLY | answered));
    assert_eq!((forward.backend_id, forward.backend_generation), (7, 3));
    assert!(taken(&masqueraded, &node, serving(v4("10.96.0.11"))).is_none(), "its endpoint is gone");
}

#[test]
fn datagrams_of_node_ports_and_of_the_node_itself() {
    let mut node = NodeConfig::default();
    let node_port = entry(UDP, ("172.18.0.200:4000", "172.18.0.11:30053"), ("172.18.0.200:4000", ENDPOINT));
    let wildcard = serving(V4::default());
    assert!(taken(&node_port, &node, &wildcard).is_none());
    node.node_port_addresses = ["172.18.0.11".parse().unwrap()].into();
    assert!(taken(&node_port, &node, &wildcard).is_some());
    node.node_addresses = ["172.18.0.200".parse().unwrap()].into();
    assert!(taken(&node_port, &node, &wildcard).is_none());
}
