//! Against the kernel's own table, in a namespace of the test's own.

use std::net::UdpSocket;
use std::time::Instant;

use super::*;
use crate::{Netns, sysctl};

/// A namespace whose `lo` is up and whose packets are tracked.
fn tracked<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let netns = Netns::anonymous().unwrap();
    netns
        .run(|| {
            for command in [
                "ip link set lo up",
                // A rule that asks for the state makes the namespace track its packets.
                "nft add table inet t",
                "nft add chain inet t c { type filter hook output priority 0 ; }",
                "nft add rule inet t c ct state new accept",
            ] {
                let mut words = command.split(' ');
                let status = std::process::Command::new(words.next().unwrap()).args(words).status().unwrap();
                assert!(status.success(), "{command}");
            }
            // No entry ends by itself, however slow the machine is.
            sysctl::write("net/netfilter/nf_conntrack_udp_timeout", "3600").unwrap();
            work()
        })
        .unwrap()
}

fn filter(v6: bool) -> Filter {
    Filter { protocol: 17, v6, destination: None, port: None }
}

fn destinations(table: &mut Conntrack, filter: &Filter) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    assert_eq!(table.for_each(filter, |entry| found.push(entry.original.destination)).unwrap(), Dump::Complete);
    found.sort();
    found
}

fn talk(to: &str) {
    let to: SocketAddr = to.parse().unwrap();
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    UdpSocket::bind(any).unwrap().send_to(b"x", to).unwrap();
}

#[test]
fn the_kernel_filters_and_deletes() {
    tracked(|| {
        let mut table = Conntrack::open().unwrap();
        let all = ["127.0.0.1:1001", "127.0.0.1:1002", "127.0.0.2:1001"];
        all.iter().for_each(|to| talk(to));
        talk("[::1]:1001");
        // A TCP entry that the filter keeps out.
        let _refused = std::net::TcpStream::connect("127.0.0.1:1001");
        let parsed: Vec<SocketAddr> = all.iter().map(|a| a.parse().unwrap()).collect();
        assert_eq!(destinations(&mut table, &filter(false)), parsed);
        assert_eq!(destinations(&mut table, &filter(true)), ["[::1]:1001".parse().unwrap()]);
        let by_port = Filter { port: Some(1001), ..filter(false) };
        assert_eq!(destinations(&mut table, &by_port), [parsed[0], parsed[2]]);
        let by_address = Filter { destination: Some(parsed[2].ip()), ..filter(false) };
        assert_eq!(destinations(&mut table, &by_address), [parsed[2]]);
        let by_both = Filter { destination: Some(parsed[0].ip()), ..by_port };
        assert_eq!(destinations(&mut table, &by_both), [parsed[0]]);
        let v6 = |address: &str| Filter { destination: address.parse().ok(), ..filter(true) };
        assert_eq!(destinations(&mut table, &v6("::1")), ["[::1]:1001".parse().unwrap()]);
        assert_eq!(destinations(&mut table, &v6("::2")), []);

        let (deleted, end) = table.delete_if(&filter(false), |entry| entry.original.destination == parsed[1]).unwrap();
        assert_eq!((deleted, end), (1, Dump::Complete));
        assert_eq!(destinations(&mut table, &filter(false)), [parsed[0], parsed[2]]);
        let (deleted, _) = table.delete_if(&filter(true), |_| true).unwrap();
        assert_eq!((deleted, destinations(&mut table, &filter(true)).len()), (1, 0));
    });
}

#[test]
fn a_recreated_entry_is_another_one() {
    tracked(|| {
        let mut table = Conntrack::open().unwrap();
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let mut first = None;
        socket.send_to(b"x", "127.0.0.1:1001").unwrap();
        table.for_each(&filter(false), |entry| first = Some(*entry)).unwrap();
        let first = first.unwrap();
        assert!(delete(&mut table.changes, &first).unwrap());
        assert!(!delete(&mut table.changes, &first).unwrap(), "gone");
        let other = Entry { id: [1, 2, 3, 4], ..first };
        socket.send_to(b"x", "127.0.0.1:1001").unwrap();
        assert!(!delete(&mut table.changes, &other).unwrap(), "the id tells them apart");
        assert_eq!(destinations(&mut table, &filter(false)).len(), 1);
    });
}

#[test]
fn a_large_table_is_streamed_and_deleted_from_while_it_is_read() {
    tracked(|| {
        let mut table = Conntrack::open().unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        for port in 1..=10_000 {
            // Answers of closed ports are errors of a later send.
            let _refused = socket.send_to(b"x", ("127.0.0.1", port));
        }
        let mut seen = 0;
        table.for_each(&filter(false), |_| seen += 1).unwrap();
        assert!(seen > 9_000, "{seen}");
        let start = Instant::now();
        let odd = |entry: &Entry| entry.original.destination.port() % 2 == 1;
        let (deleted, _) = table.delete_if(&filter(false), odd).unwrap();
        println!("{deleted} of {seen} entries deleted in {:?}", start.elapsed());
        let left = destinations(&mut table, &filter(false));
        assert!(left.len() > 4_000 && left.iter().all(|to| to.port() % 2 == 0), "{}", left.len());
    });
}

#[test]
fn a_connection_is_handed_over_whatever_was_believed_of_it() {
    tracked(|| {
        let mut table = Conntrack::open().unwrap();
        for (client, service, node, endpoint) in [
            ("127.0.0.3:4000", "127.0.0.9:80", "127.0.0.1:5000", "127.0.0.2:8080"),
            ("[fd00::3]:4000", "[fd00::9]:80", "[fd00::3]:4000", "[fd00::2]:8080"),
        ] {
            let tuple = |source: &str, destination: &str| Tuple {
                source: source.parse().unwrap(),
                destination: destination.parse().unwrap(),
            };
            let (arriving, leaving) = (tuple(client, service), tuple(node, endpoint));
            let translation = Translation { protocol: TCP, arriving, leaving };
            // Another connection, whose source port conntrack has changed to the one that is wanted.
            let other = tuple(if arriving.source.is_ipv6() { "[fd00::3]:4999" } else { "127.0.0.3:4999" }, endpoint);
            table.replace(&Translation { arriving: other, ..translation }, 60).unwrap();
            // Believed to be untranslated, once as it arrives and once as it leaves.
            for plain in [arriving, leaving] {
                table.replace(&Translation { protocol: TCP, arriving: plain, leaving: plain }, 60).unwrap();
            }
            table.replace(&translation, 60).unwrap();
            table.replace(&translation, 60).unwrap();
            let mut found = Vec::new();
            let tcp = Filter { protocol: 6, v6: arriving.source.is_ipv6(), destination: None, port: None };
            table.for_each(&tcp, |entry| found.push((entry.original, entry.reply))).unwrap();
            assert_eq!(found, [(arriving, tuple(endpoint, node))]);
            // Datagrams of the same tuples are another flow.
            table.replace(&Translation { protocol: 17, ..translation }, 60).unwrap();
            let udp = Filter { protocol: 17, ..tcp };
            table.for_each(&udp, |entry| found.push((entry.original, entry.reply))).unwrap();
            assert_eq!(found, [(arriving, tuple(endpoint, node)); 2]);
        }
    });
}

#[test]
fn connections_that_have_ended_are_known() {
    tracked(|| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let mut table = Conntrack::open().unwrap();
        let tcp = Filter { protocol: TCP, ..filter(false) };
        let mut ended = move || {
            let mut found = Vec::new();
            table.for_each(&tcp, |entry| found.push((entry.ended, entry.is_translated()))).unwrap();
            found
        };
        assert_eq!(ended(), [(false, false)]);
        drop((accepted, stream));
        let deadline = Instant::now() + std::time::Duration::from_secs(5);
        while ended() != [(true, false)] {
            assert!(Instant::now() < deadline, "{:?}", ended());
        }
    });
}
