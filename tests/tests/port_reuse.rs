//! One source port, two ways to one endpoint: through the Service and straight to the pod. The answers are not mixed up.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use tokio::net::TcpSocket;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{Cluster, Place, Transport, patient};

const LIMIT: Duration = Duration::from_secs(3);
/// Source ports from here: below those that the kernel gives, one of which an earlier connection may have had.
const PORT: u16 = 21000;
/// Pods on the client's node and on the other one, with the addresses that they get.
const SERVERS: [(&str, usize, &str); 2] = [("near", 1, "10.244.1.3:8080"), ("far", 2, "10.244.2.2:8080")];

#[test]
fn a_direct_connection_is_not_taken_for_an_older_translated_one() {
    let (_cluster, client, servers) = start();
    for (name, service, direct) in servers {
        for (port, targets) in [(PORT, [service, direct]), (PORT + 1, [direct, service])] {
            for target in targets {
                assert_eq!(ask(&mut connect(&client, port, target)), name, "{target} from port {port}");
            }
        }
    }
}

#[test]
fn a_direct_connection_may_stand_beside_a_translated_one() {
    let (_cluster, client, servers) = start();
    for (name, service, direct) in servers {
        let mut through = connect(&client, PORT, service);
        assert_eq!(ask(&mut through), name);
        let mut beside = connect(&client, PORT, direct);
        assert_eq!(ask(&mut beside), name, "the pod itself, while the Service's connection is open");
        assert_eq!(ask(&mut through), name, "the Service's connection goes on");
    }
}

#[test]
fn a_translated_connection_may_stand_beside_a_direct_one() {
    let (_cluster, client, servers) = start();
    for (name, service, direct) in servers {
        // As a socket makes it that the socket programs have connected to an endpoint.
        let mut beside = connect(&client, PORT, direct);
        assert_eq!(ask(&mut beside), name);
        let mut through = connect(&client, PORT, service);
        assert_eq!(ask(&mut through), name, "the Service, while the pod's own connection is open");
        assert_eq!(ask(&mut beside), name, "the pod's own connection goes on");
        assert_eq!(ask(&mut through), name, "and so does the Service's");
    }
}

/// A cluster with a client outside of the socket path, and for each server its name, its Service and its pod.
fn start() -> (Cluster, Place, Vec<(&'static str, SocketAddr, SocketAddr)>) {
    let cluster = Cluster::new().unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    let client = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
    let servers = SERVERS.map(|(name, node, address)| {
        cluster.apply(pod(name, node, name, &[8080], &[])).unwrap();
        cluster.apply(ServiceManifest::new(name, Some(name)).port("TCP", 80, 8080).build()).unwrap();
        let service = SocketAddr::new(*cluster.cluster_ips(name).unwrap().first().unwrap(), 80);
        cluster.wait_for_answers(&client, service, Transport::Tcp, &[name]).unwrap();
        (name, service, address.parse().unwrap())
    });
    (cluster, client, servers.into())
}

/// A connection from a fixed port of the client.
fn connect(client: &Place, port: u16, target: SocketAddr) -> TcpStream {
    let own: IpAddr = "10.244.1.2".parse().unwrap();
    let stream = client.netns().run(|| connect_from((own, port).into(), target)).unwrap().unwrap();
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(patient(LIMIT))).unwrap();
    stream
}

fn connect_from(own: SocketAddr, target: SocketAddr) -> std::io::Result<TcpStream> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stream = runtime.block_on(async {
        let socket = TcpSocket::new_v4()?;
        // The older connection from this port is in TIME_WAIT.
        socket.set_reuseaddr(true)?;
        socket.bind(own)?;
        tokio::time::timeout(patient(LIMIT), socket.connect(target)).await?
    })?;
    stream.into_std()
}

/// Who answers: the first word of the line.
fn ask(stream: &mut TcpStream) -> String {
    stream.write_all(b"who\n").unwrap();
    let mut line = String::new();
    BufReader::new(&mut *stream).read_line(&mut line).unwrap();
    line.split(' ').next().unwrap_or_default().to_owned()
}
