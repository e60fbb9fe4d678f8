//! One source port, two ways to one endpoint: through the Service and straight to the pod. The answers are not mixed up.
#![allow(
    missing_docs,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{Cluster, ClusterOptions, Place, Transport, patient};

const LIMIT: Duration = Duration::from_secs(3);
/// Source ports from here: below those that the kernel gives, one of which an earlier connection may have had.
const PORT: u16 = 21000;
const EBPF: &[&str] = &["--proxy-mode=ebpf"];
const NFTABLES: &[&str] = &["--proxy-mode=nftables"];
const IPTABLES: &[&str] = &["--proxy-mode=iptables"];
const IPVS: &[&str] = &["--proxy-mode=ipvs"];
/// Pods on the client's node and on the other one, with the addresses that they get.
const SERVERS: [(&str, usize, &str); 2] = [("near", 1, "10.244.1.3:8080"), ("far", 2, "10.244.2.2:8080")];

/// What one port is used for, both ways open at a time: the second one's answers come from where it asked, and the first one goes on.
fn stand_side_by_side(mode: &'static [&'static str]) {
    let lab = Lab::start(mode);
    let mut port = PORT;
    for transport in [Transport::Tcp, Transport::Udp] {
        for (name, service, direct) in &lab.servers {
            for [first, second] in [[service, direct], [direct, service]] {
                port += 1;
                let what = format!("{mode:?}, {transport:?}, {first} and then {second} from port {port}");
                let mut before = lab.open(transport, port, *first);
                assert_eq!(ask(&mut before), *name, "the first: {what}");
                let mut beside = lab.open(transport, port, *second);
                assert_eq!(ask(&mut beside), *name, "the second: {what}");
                assert_eq!(ask(&mut before), *name, "the first again: {what}");
                assert_eq!(ask(&mut beside), *name, "the second again: {what}");
            }
        }
    }
}

/// As above, but the first is closed when the second is opened.
fn follow_each_other(mode: &'static [&'static str]) {
    let lab = Lab::start(mode);
    let mut port = PORT;
    for transport in [Transport::Tcp, Transport::Udp] {
        for (name, service, direct) in &lab.servers {
            for targets in [[service, direct], [direct, service]] {
                port += 1;
                for target in targets {
                    let mut flow = lab.open(transport, port, *target);
                    assert_eq!(ask(&mut flow), *name, "{mode:?}, {transport:?}, {target} from port {port}");
                }
            }
        }
    }
}

#[test]
fn flows_of_one_port_follow_each_other() {
    [EBPF, NFTABLES, IPTABLES].into_iter().for_each(follow_each_other);
}

#[test]
fn flows_of_one_port_stand_side_by_side() {
    [EBPF, NFTABLES, IPTABLES].into_iter().for_each(stand_side_by_side);
}

/// While IPVS serves, it takes an answer of the pod's for the Service's connection (ARCHITECTURE.md, "Ideal and reality"); what takes over from it does not.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask vm test port_reuse"]
fn a_direct_flow_has_the_port_of_one_that_ipvs_began() {
    for mode in ["iptables", "nftables", "ebpf"] {
        let lab = Lab::start(IPVS);
        let mut began = Vec::new();
        for (name, service, direct) in lab.servers {
            for (port, transport) in (PORT..).zip([Transport::Tcp, Transport::Udp]) {
                let mut flow = lab.open(transport, port, service);
                assert_eq!(ask(&mut flow), name, "{transport:?} {service}");
                began.push((flow, port, transport, name, direct));
            }
        }
        lab.cluster.kill_proxy(1).unwrap();
        lab.cluster.restart_proxy_with(1, &["--proxy-mode", mode]).unwrap();
        for (first, port, transport, name, direct) in &mut began {
            let mut beside = lab.open(*transport, *port, *direct);
            assert_eq!(ask(&mut beside), *name, "{mode}: {transport:?} {direct} from port {port}");
            assert_eq!(ask(first), *name, "{mode}: what IPVS began, {transport:?} from port {port}");
        }
    }
}

/// A client outside of the socket path, and for each server its name, its Service and its pod.
struct Lab {
    cluster: Cluster,
    client: Place,
    servers: [(&'static str, SocketAddr, SocketAddr); 2],
}

impl Lab {
    fn start(mode: &'static [&'static str]) -> Self {
        let options = ClusterOptions { proxy_arguments: mode, ..ClusterOptions::default() };
        let cluster = Cluster::start(&options).unwrap();
        cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
        let client = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
        let servers = SERVERS.map(|(name, node, address)| {
            cluster.apply(pod(name, node, name, &[8080], &[8080])).unwrap();
            let service = ServiceManifest::new(name, Some(name)).port("TCP", 80, 8080).port("UDP", 80, 8080);
            cluster.apply(service.build()).unwrap();
            let service = SocketAddr::new(*cluster.cluster_ips(name).unwrap().first().unwrap(), 80);
            for transport in [Transport::Tcp, Transport::Udp] {
                cluster.wait_for_answers(&client, service, transport, &[name]).unwrap();
            }
            (name, service, address.parse().unwrap())
        });
        Self { cluster, client, servers }
    }

    /// A connected socket with a fixed port of the client.
    fn open(&self, transport: Transport, port: u16, target: SocketAddr) -> Socket {
        let own: IpAddr = "10.244.1.2".parse().unwrap();
        let kind = if transport == Transport::Tcp { Type::STREAM } else { Type::DGRAM };
        let open = || {
            let socket = Socket::new(Domain::IPV4, kind, None)?;
            // An older connection from this port is there, or in TIME_WAIT.
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::new(own, port).into())?;
            socket.connect_timeout(&target.into(), patient(LIMIT))?;
            socket.set_read_timeout(Some(patient(LIMIT)))?;
            Ok::<_, std::io::Error>(socket)
        };
        self.client.netns().run(open).unwrap().unwrap()
    }
}

/// Who answers: the first word.
fn ask(flow: &mut Socket) -> String {
    flow.write_all(b"who\n").unwrap();
    let mut answer = [0; 512];
    let length = flow.read(&mut answer).unwrap_or_default();
    let line = String::from_utf8_lossy(&answer[..length]);
    line.split(' ').next().unwrap_or_default().to_owned()
}
