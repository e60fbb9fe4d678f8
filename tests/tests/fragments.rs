//! Datagrams in fragments go through Services whole, in whatever order their fragments come.
#![allow(
    missing_docs,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::json;
use trama_lab::packet::Packet;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{CLIENT_ADDRESSES, Cluster, Place, Wire, link_address, patient, wait_for};

const LIMIT: Duration = Duration::from_secs(5);
/// Where the pods give back what they get.
const PORT: u16 = 9001;
/// Two pods, one on each node, each with a Service of its name.
const PODS: [(&str, usize); 2] = [("near", 1), ("far", 2)];
const HELD: &str = "trama_dataplane_path_total{path=\"fragment_held\"}";
const OVERLAP: &str = "trama_dataplane_drop_total{reason=\"fragment_overlap\"}";

/// Gives every datagram back to its sender, for as long as the test runs.
fn give_back(place: &Place) {
    let socket = place.netns().run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT))).unwrap().unwrap();
    thread::spawn(move || {
        let mut datagram = vec![0; 1 << 16];
        while let Ok((length, from)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..length], from);
        }
    });
}

fn start() -> Cluster {
    let cluster = Cluster::new().unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    for (name, node) in PODS {
        cluster.apply(pod(name, node, name, &[], &[])).unwrap();
        let service = ServiceManifest::new(name, Some(name)).port("UDP", 53, PORT).with("type", json!("NodePort"));
        cluster.apply(service.with("ipFamilyPolicy", json!("RequireDualStack")).build()).unwrap();
        give_back(&cluster.place_in_pod(&format!("default/{name}")).unwrap());
    }
    cluster
}

/// So many bytes, no two pieces alike.
fn data(length: usize) -> Vec<u8> {
    (0..length).map(|byte| (byte / 8 * 37 + byte) as u8).collect()
}

fn bind(place: &Place, like: IpAddr) -> UdpSocket {
    let any: IpAddr = if like.is_ipv4() { [0, 0, 0, 0].into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = place.netns().run(|| UdpSocket::bind((any, 0))).unwrap().unwrap();
    socket.set_read_timeout(Some(patient(Duration::from_millis(500)))).unwrap();
    socket
}

/// The answer, if there is one and it is the question.
fn comes_back(socket: &UdpSocket, target: SocketAddr, question: &[u8]) -> bool {
    let mut answer = vec![0; 1 << 16];
    loop {
        match socket.recv_from(&mut answer) {
            Ok((length, from)) if from == target && answer[..length] == *question => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
}

/// Asks until the answer comes: while a Service is new, and where the first datagram tells its sender of an MTU.
fn is_given_back(place: &Place, target: SocketAddr, length: usize) {
    let socket = bind(place, target.ip());
    let question = data(length);
    let asked = wait_for("the whole datagram", CHANGE_LIMIT, || {
        socket.send_to(&question, target)?;
        Ok(comes_back(&socket, target, &question).then_some(()))
    });
    asked.unwrap_or_else(|error| panic!("{length} bytes to {target} from {}: {error}", place.netns().label()));
}

#[test]
fn large_datagrams_reach_every_kind_of_service_address_and_come_back() {
    let cluster = start();
    let node = cluster.topology().node(1).unwrap();
    let client = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
    let (own, outside) = (node.place().outside_cgroup(), cluster.topology().client());
    for (name, _) in PODS {
        let port = cluster.node_port(name, "UDP", 53).unwrap();
        for (ip, node_ip) in cluster.cluster_ips(name).unwrap().into_iter().zip(node.addresses()) {
            for length in [1600, 8192, 40000] {
                is_given_back(&outside, (node_ip, port).into(), length);
                is_given_back(&client, (ip, 53).into(), length);
                is_given_back(&client, (node_ip, port).into(), length);
                // To an address of its own the node sends over `lo`, where nothing is cut.
                is_given_back(&own, (ip, 53).into(), length);
            }
        }
    }
}

/// Puts the uplink of a node behind a bridge, which has its addresses from then on: what comes in is seen at both.
const BEHIND_A_BRIDGE: &str = r#"set -e
ip link add br1 type bridge
ip link set br1 address "$(ip -o link show dev eth0 | sed 's/.*link.ether \([^ ]*\).*/\1/')"
for address in $(ip -o address show dev eth0 scope global | awk '{print $4}'); do
    ip address del "$address" dev eth0
    case "$address" in *:*) ip address add "$address" dev br1 nodad ;; *) ip address add "$address" dev br1 ;; esac
done
ip link set eth0 master br1
ip link set br1 up"#;

#[test]
fn what_is_no_services_passes_a_bridge_and_its_port_whole() {
    let cluster = Cluster::new().unwrap();
    let node = cluster.topology().node(1).unwrap();
    let addresses = node.addresses();
    let done = node.netns().run(|| Command::new("sh").args(["-c", BEHIND_A_BRIDGE]).status()).unwrap().unwrap();
    assert!(done.success(), "{done}");
    let bridge = node.netns().run(|| nix::net::if_::if_nametoindex("br1")).unwrap().unwrap();
    wait_for("the program at the bridge", CHANGE_LIMIT, || {
        let versions = std::fs::read_dir(node.bpffs().join("trama"))?.flatten();
        let mut links = versions.map(|version| version.path().join(format!("links/tc_ingress-{bridge}")));
        Ok(links.any(|link| link.exists()).then_some(()))
    })
    .unwrap();
    give_back(&node.place());
    for address in addresses {
        for length in [1600, 8192] {
            is_given_back(&cluster.topology().client(), (address, PORT).into(), length);
        }
    }
}

/// A client outside, one of its sockets, and the first node's NodePort of a Service.
struct Talk {
    wire: Wire,
    gateway: [u8; 6],
    socket: UdpSocket,
    own: SocketAddr,
    target: SocketAddr,
}

impl Talk {
    fn open(cluster: &Cluster, name: &str, family: usize) -> Self {
        let (node, outside) = (cluster.topology().node(1).unwrap(), cluster.topology().client());
        let target = SocketAddr::new(node.addresses()[family], cluster.node_port(name, "UDP", 53).unwrap());
        is_given_back(&outside, target, 100);
        let socket = bind(&outside, target.ip());
        let own = SocketAddr::new(CLIENT_ADDRESSES[family], socket.local_addr().unwrap().port());
        let wire = Wire::open(&outside, "eth0").unwrap();
        Self { wire, gateway: link_address(node.netns(), "eth0").unwrap(), socket, own, target }
    }

    fn fragments(&self, identification: u32, question: &[u8]) -> Vec<Packet> {
        Packet::udp(self.own, self.target, question).fragments(identification, 1440)
    }

    fn send(&self, fragments: &[Packet]) {
        fragments.iter().for_each(|fragment| self.wire.send(self.gateway, fragment).unwrap());
    }
}

#[test]
fn fragments_may_come_in_any_order() {
    let cluster = start();
    let mut random = fastrand::Rng::with_seed(7);
    for (name, family) in [("far", 0), ("near", 0), ("near", 1), ("far", 1)] {
        let talk = Talk::open(&cluster, name, family);
        let before = cluster.metrics(1).unwrap().get(HELD).copied().unwrap_or(0.0);
        for identification in 1..=20 {
            let question = data(8000 + identification as usize);
            let mut fragments = talk.fragments(identification, &question);
            match identification {
                1 => fragments.reverse(),
                2 => fragments.rotate_left(1),
                _ => random.shuffle(&mut fragments),
            }
            talk.send(&fragments);
            assert!(
                comes_back(&talk.socket, talk.target, &question),
                "{name}, {}, datagram {identification}",
                talk.own
            );
        }
        let held = cluster.metrics(1).unwrap().get(HELD).copied().unwrap_or(0.0) - before;
        assert!(held >= 10.0, "{held} fragments had to wait");
    }
}

#[test]
fn fragments_that_overlap_go_nowhere_else() {
    let cluster = start();
    for family in [0, 1] {
        let talk = Talk::open(&cluster, "far", family);
        let before = cluster.metrics(1).unwrap().get(OVERLAP).copied().unwrap_or(0.0);
        let question = data(4000);
        let fragments = talk.fragments(99, &question);
        talk.send(&fragments[..1]);
        // Another beginning for the same datagram, and a fragment that would overwrite the header.
        let port = cluster.node_port("near", "UDP", 53).unwrap();
        let other = Packet::udp(talk.own, SocketAddr::new(talk.target.ip(), port), &question);
        talk.send(&other.fragments(99, 1440)[..1]);
        talk.send(&fragments[1..]);
        assert!(comes_back(&talk.socket, talk.target, &question), "the first beginning counts");
        let is_counted = |count: f64| {
            let more = before + count;
            wait_for("the count", LIMIT, || Ok((cluster.metrics(1)?.get(OVERLAP) == Some(&more)).then_some(())))
        };
        is_counted(1.0).unwrap();
        // A whole datagram went by: its identification may be used again.
        let again = Packet::udp(talk.own, talk.target, &data(3000)).fragments(99, 1440);
        talk.send(&again);
        assert!(comes_back(&talk.socket, talk.target, &data(3000)));
        is_counted(1.0).unwrap();
    }
}

#[test]
fn fragments_for_the_node_itself_are_put_together_by_its_kernel() {
    let cluster = start();
    let node = cluster.topology().node(1).unwrap();
    give_back(&node.place());
    for (family, ip) in node.addresses().into_iter().enumerate() {
        let target = SocketAddr::new(ip, PORT);
        is_given_back(&cluster.topology().client(), target, 8000);
        let talk = Talk { target, ..Talk::open(&cluster, "far", family) };
        for identification in 1..=3 {
            let question = data(9000 + identification as usize);
            let mut fragments = talk.fragments(identification, &question);
            if identification != 1 {
                fragments.reverse();
            }
            talk.send(&fragments);
            assert!(comes_back(&talk.socket, talk.target, &question));
        }
        // A beginning that never comes keeps nobody from going on.
        talk.send(&talk.fragments(1000, &data(8000))[1..]);
        is_given_back(&cluster.topology().client(), target, 8000);
    }
}
