//! SCTP through a Service with the kernel's own sockets, on every data plane: associations, data of every size, refusals.
//!
//! Only where the kernel has SCTP: `cargo xtask vm test sctp_sockets`. Between veth devices a packet carries no checksum (its device is
//! said to fill it in), and large writes travel as one packet that is to be cut: the tests switch both on and off along the way.
#![allow(
    missing_docs,
    clippy::panic,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, DeleteParams};
use node_sys::Netns;
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{CLIENT_ADDRESSES, Cluster, ClusterOptions, patient, wait_for};

/// IP protocol number.
const SCTP: i32 = 132;
const SERVERS: [(&str, usize); 2] = [("near", 1), ("far", 2)];
/// Bytes of a message: one chunk, padding, almost a packet, several packets, a packet that the device is to cut.
const SIZES: [usize; 6] = [1, 3, 1300, 1500, 9000, 60_000];
/// For an association or its data, on a machine of usual speed.
const PATIENCE: Duration = Duration::from_secs(5);
/// For silence.
const SILENCE: Duration = Duration::from_secs(2);

fn socket(address: SocketAddr) -> Socket {
    Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::from(SCTP))).unwrap()
}

/// A listener in the namespace: each association is told who serves it and whom it sees, then gets back what it sends.
fn serve(netns: &Netns, name: &'static str, address: SocketAddr) {
    let listen = || {
        let socket = socket(address);
        socket.bind(&address.into())?;
        socket.listen(64)?;
        Ok(TcpListener::from(socket))
    };
    let listener: io::Result<TcpListener> = netns.run(listen).unwrap();
    let listener = listener.unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || greet_and_echo(&mut stream, name));
        }
    });
}

/// Until the client goes.
fn greet_and_echo(stream: &mut TcpStream, name: &str) -> io::Result<()> {
    let peer = stream.peer_addr()?.ip();
    stream.write_all(format!("{name} {peer}").as_bytes())?;
    let mut message = vec![0; 65_536];
    loop {
        match stream.read(&mut message)? {
            0 => return Ok(()),
            length => stream.write_all(message.get(..length).unwrap_or_default())?,
        }
    }
}

/// An association from the namespace.
fn associate(netns: &Netns, target: SocketAddr, patience: Duration) -> io::Result<TcpStream> {
    let connect = || {
        let socket = socket(target);
        hear_refusals(&socket, target);
        socket.connect_timeout(&target.into(), patient(patience)).map(|()| TcpStream::from(socket))
    };
    let stream = netns.run(connect).unwrap()?;
    stream.set_read_timeout(Some(patient(PATIENCE)))?;
    Ok(stream)
}

/// An ICMP error ends an attempt to associate only where the socket asks for it.
fn hear_refusals(socket: &Socket, target: SocketAddr) {
    use nix::sys::socket::{setsockopt, sockopt};
    let set = match target {
        SocketAddr::V4(_) => setsockopt(socket, sockopt::Ipv4RecvErr, &true),
        SocketAddr::V6(_) => setsockopt(socket, sockopt::Ipv6RecvErr, &true),
    };
    set.unwrap();
}

/// Associates, is greeted by `server`, and sends data there and back; returns whom the server saw.
fn talk(netns: &Netns, target: SocketAddr, server: &str) -> IpAddr {
    let failed = |what: &str, error: io::Error| -> ! { panic!("{} to {target}: {what}: {error}", netns.label()) };
    let mut stream = associate(netns, target, PATIENCE).unwrap_or_else(|error| failed("associate", error));
    assert_eq!(stream.peer_addr().unwrap(), target, "the client sees whom it named");
    let mut greeting = [0; 256];
    let length = stream.read(&mut greeting).unwrap_or_else(|error| failed("greeting", error));
    let greeting = String::from_utf8_lossy(greeting.get(..length).unwrap()).into_owned();
    let (name, seen) = greeting.split_once(' ').unwrap();
    assert_eq!(name, server, "{} to {target}", netns.label());
    for size in SIZES {
        let sent: Vec<u8> = (0..size).map(|index| (index * 31 + size) as u8).collect();
        let mut echoed = vec![0; size];
        stream.write_all(&sent).unwrap_or_else(|error| failed("send", error));
        stream.read_exact(&mut echoed).unwrap_or_else(|error| failed(&format!("{size} bytes back"), error));
        assert!(sent == echoed, "{} to {target}: {size} bytes came back different", netns.label());
    }
    seen.parse().unwrap()
}

/// Whether devices of the namespace are said to fill in SCTP's checksum, and to cut large packets.
fn set_offload(netns: &Netns, on: bool) {
    let state = if on { "on" } else { "off" };
    let arguments = ["-K", "eth0", "tx-checksum-sctp", state, "tx-sctp-segmentation", state];
    let output = netns.run(|| Command::new("ethtool").args(arguments).output()).unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A client on node-1, a server on each node, a Service for each of the servers and one for nobody.
fn start(mode: &'static [&'static str]) -> Cluster {
    let options = ClusterOptions { proxy_arguments: mode, ..ClusterOptions::default() };
    let cluster = Cluster::start(&options).unwrap();
    cluster.apply_all(SERVERS.map(|(name, node)| pod(name, node, name, &[], &[]))).unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    for name in ["near", "far", "nobody"] {
        let service = ServiceManifest::new(name, Some(name)).port("SCTP", 3868, 8868);
        let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
        cluster.apply(service.build()).unwrap();
    }
    for (name, node) in SERVERS {
        let place = cluster.place_in_pod(&format!("default/{name}")).unwrap();
        for address in pod_addresses(&cluster, node, place.netns()) {
            serve(place.netns(), name, (address, 8868).into());
        }
    }
    cluster
}

/// The addresses in the node's pod ranges that the namespace has.
fn pod_addresses(cluster: &Cluster, node: usize, netns: &Netns) -> Vec<IpAddr> {
    let cidrs = cluster.topology().node(node).unwrap().pod_cidrs();
    let output = netns.run(|| Command::new("ip").args(["-o", "addr", "show", "eth0"]).output()).unwrap().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let words = text.split_whitespace().filter_map(|word| word.split('/').next()?.parse::<IpAddr>().ok());
    words.filter(|ip| ipnet::IpNet::V4(cidrs.v4).contains(ip) || ipnet::IpNet::V6(cidrs.v6).contains(ip)).collect()
}

/// Until the proxies have caught up with the objects.
fn wait_until_served(cluster: &Cluster, client: &Netns) {
    for ip in ["near", "far"].iter().flat_map(|name| cluster.cluster_ips(name).unwrap()) {
        let served = || Ok(associate(client, (ip, 3868).into(), SILENCE).ok());
        wait_for("the Service being served", CHANGE_LIMIT, served).unwrap();
    }
}

fn all_of(mode: &'static [&'static str]) {
    let cluster = start(mode);
    let client = cluster.place_in_pod("default/client").unwrap();
    let servers = SERVERS.map(|(name, _)| cluster.place_in_pod(&format!("default/{name}")).unwrap());
    let (node, outside) = (cluster.topology().node(1).unwrap(), cluster.topology().client());
    wait_until_served(&cluster, client.netns());
    // Who has a checksum to fill in: everybody; the uplink not, which fills it in halfway; the ends not.
    for (pods, uplink) in [(true, true), (true, false), (false, true)] {
        for place in [&client, &outside].into_iter().chain(&servers) {
            set_offload(place.netns(), pods);
        }
        set_offload(node.netns(), uplink);
        println!("pods' devices fill in: {pods}; node's: {uplink}");
        for (name, _) in SERVERS {
            let node_port = cluster.node_port(name, "SCTP", 3868).unwrap();
            for (index, ip) in cluster.cluster_ips(name).unwrap().into_iter().enumerate() {
                let own = pod_addresses(&cluster, 1, client.netns());
                let seen = talk(client.netns(), (ip, 3868).into(), name);
                assert!(own.contains(&seen), "{ip}: {seen}");
                // Its packets are decided at the uplink, behind which the other node is.
                if name == "far" {
                    talk(node.netns(), (ip, 3868).into(), name);
                }
                let address = *node.addresses().get(index).unwrap();
                assert!(!CLIENT_ADDRESSES.contains(&talk(outside.netns(), (address, node_port).into(), name)));
            }
        }
    }
    refused_without_endpoints(&cluster, client.netns(), node.netns());
    nothing_is_left_of_a_deleted_service(&cluster, client.netns());
}

fn refused_without_endpoints(cluster: &Cluster, client: &Netns, node: &Netns) {
    for ip in cluster.cluster_ips("nobody").unwrap() {
        for netns in [client, node] {
            let error = associate(netns, (ip, 3868).into(), PATIENCE).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{} to {ip}", netns.label());
        }
    }
}

fn nothing_is_left_of_a_deleted_service(cluster: &Cluster, client: &Netns) {
    let targets = cluster.cluster_ips("far").unwrap();
    let services: Api<Service> = Api::namespaced(cluster.client(), "default");
    cluster.block_on(services.delete("far", &DeleteParams::default())).unwrap();
    for ip in targets {
        let gone = || Ok(associate(client, (ip, 3868).into(), SILENCE).err());
        wait_for("the Service being gone", CHANGE_LIMIT, gone).unwrap();
    }
}

#[test]
#[ignore = "needs a kernel with SCTP sockets: cargo xtask vm test sctp_sockets"]
fn ebpf() {
    all_of(&["--proxy-mode=ebpf"]);
}

#[test]
#[ignore = "needs a kernel with SCTP sockets: cargo xtask vm test sctp_sockets"]
fn nftables() {
    all_of(&["--proxy-mode=nftables"]);
}

#[test]
#[ignore = "needs a kernel with SCTP sockets: cargo xtask vm test sctp_sockets"]
fn iptables() {
    all_of(&["--proxy-mode=iptables"]);
}

#[test]
#[ignore = "needs a kernel with SCTP sockets and IPVS: cargo xtask vm test sctp_sockets"]
fn ipvs() {
    all_of(&["--proxy-mode=ipvs"]);
}
