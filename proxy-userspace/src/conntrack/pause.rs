//! Packets of some connections wait while what the kernel knows of these is exchanged.
//!
//! One that comes when nothing is known would begin anew: masqueraded to another port, so that the endpoint knows no such connection, or as one
//! to the node itself, which refuses it. A packet of TCP that is dropped is sent again, and a datagram is lost as any may be.

use std::net::{IpAddr, SocketAddr};

use node_sys::conntrack::Translation;
use node_sys::nftables::{
    Batch, ChainHook, ChainKind, Data, ElementRef, Expression, Family, Field, Hook, LookupTarget, MetaKey, Nftables,
    NftablesError, Register, Set, SetFlags, Verdict,
};

/// Our table in each family. It belongs to a socket of ours, so it goes with the process if nothing else takes it away.
const TABLE: &str = "trama-pause";
const SET: &str = "connections";
/// Priority of the chains, `NF_IP_PRI_RAW`: before conntrack looks.
const BEFORE_CONNTRACK: i32 = -300;
/// A queue that nobody reads.
const NOBODYS_QUEUE: u16 = 29_810;

/// Packets wait for as long as this is held.
#[derive(Debug)]
pub(super) struct Pause(#[expect(dead_code, reason = "it is held open: the tables go with it")] Nftables);

/// Drops the packets of these connections, in both directions, until the result is dropped.
///
/// # Errors
/// When nf_tables refuses it; nothing waits then.
pub(super) fn pause(connections: &[Translation]) -> Result<Pause, NftablesError> {
    let mut kernel = Nftables::open()?;
    for family in [Family::Ipv4, Family::Ipv6] {
        let quietly = Expression::Queue { number: NOBODYS_QUEUE };
        if kernel.commit(batch(family, connections, quietly)).is_err() {
            // A kernel without queues. Senders on this node are told of what is dropped.
            kernel.commit(batch(family, connections, Expression::Verdict(Verdict::Drop)))?;
        }
    }
    Ok(Pause(kernel))
}

/// `on_the_way_out` is what is done with packets that this node sends.
fn batch(family: Family, connections: &[Translation], on_the_way_out: Expression) -> Batch {
    let mut batch = Batch::new(family, TABLE);
    batch.add_owned_table();
    let (key, flags) = (fields(family), SetFlags::default());
    batch.add_set(&Set { name: SET.into(), key, data: Data::None, flags, size: None });
    for tuple in connections.iter().flat_map(both_ways).filter(|tuple| family_of(tuple.1) == family) {
        batch.add_element(SET, ElementRef::key(&bytes(tuple)));
    }
    let drop = Expression::Verdict(Verdict::Drop);
    for (name, hook, end) in [("prerouting", Hook::Prerouting, drop), ("output", Hook::Output, on_the_way_out)] {
        let kind = ChainKind::Filter;
        batch.add_chain(name, Some(ChainHook { kind, hook, priority: BEFORE_CONNTRACK }));
        batch.add_rule(name, &matching(family).into_iter().chain([end]).collect::<Vec<_>>());
    }
    batch
}

/// Protocol, source and destination of a packet.
type Packet = (u8, SocketAddr, SocketAddr);

/// As the client's packets arrive here, and as the answers do.
fn both_ways(connection: &Translation) -> [Packet; 2] {
    let Translation { protocol, arriving, leaving } = *connection;
    [(protocol, arriving.source, arriving.destination), (protocol, leaving.destination, leaving.source)]
}

fn family_of(address: SocketAddr) -> Family {
    if address.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }
}

/// The fields of a key.
const fn fields(family: Family) -> &'static [Field] {
    match family {
        Family::Ipv6 => &[Field::Ipv6, Field::Ipv6, Field::Protocol, Field::Port, Field::Port],
        _ => &[Field::Ipv4, Field::Ipv4, Field::Protocol, Field::Port, Field::Port],
    }
}

/// The key as the registers hold it: each field padded to four bytes.
fn bytes((protocol, source, destination): Packet) -> Vec<u8> {
    let address = |ip| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let port = |port: u16| {
        let [high, low] = port.to_be_bytes();
        vec![high, low, 0, 0]
    };
    let parts = [address(source.ip()), address(destination.ip()), vec![protocol, 0, 0, 0]];
    parts.into_iter().chain([port(source.port()), port(destination.port())]).flatten().collect()
}

/// Goes on with packets that are in the set.
fn matching(family: Family) -> [Expression; 6] {
    let words = if family == Family::Ipv6 { 4 } else { 1 };
    [
        Expression::source_address(family, Register(0)),
        Expression::destination_address(family, Register(words)),
        Expression::Meta { key: MetaKey::Protocol, to: Register(2 * words) },
        Expression::source_port(Register(2 * words + 1)),
        Expression::destination_port(Register(2 * words + 2)),
        Expression::Lookup { set: SET.into(), key: Register(0), target: LookupTarget::Nothing },
    ]
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::time::Duration;

    use node_sys::Netns;
    use node_sys::conntrack::Tuple;

    use super::*;

    /// A sender has sent again by then, and does so once more within [`LIMIT`].
    const SILENCE: Duration = Duration::from_millis(350);
    const LIMIT: Duration = Duration::from_secs(10);

    fn connected(address: &str) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    fn read(mut end: &TcpStream, limit: Duration) -> Result<u8, ErrorKind> {
        let mut byte = [0];
        end.set_read_timeout(Some(limit)).unwrap();
        end.read_exact(&mut byte).map(|()| byte[0]).map_err(|error| error.kind())
    }

    fn untranslated(protocol: u8, source: SocketAddr, destination: SocketAddr) -> Translation {
        let tuple = Tuple { source, destination };
        Translation { protocol, arriving: tuple, leaving: tuple }
    }

    fn try_connections(address: &str) {
        let (client, server) = connected(address);
        let (other_client, other_server) = connected(address);
        let ends = (client.local_addr().unwrap(), server.local_addr().unwrap());
        let paused = pause(&[untranslated(6, ends.0, ends.1)]).unwrap();
        for (mut from, to) in [(&client, &server), (&server, &client)] {
            from.write_all(b"1").unwrap();
            assert_eq!(read(to, SILENCE), Err(ErrorKind::WouldBlock), "{address}");
        }
        (&other_client).write_all(b"2").unwrap();
        assert_eq!(read(&other_server, LIMIT), Ok(b'2'), "another connection");
        let (new_client, new_server) = connected(address);
        (&new_client).write_all(b"3").unwrap();
        assert_eq!(read(&new_server, LIMIT), Ok(b'3'), "a new connection");
        drop(paused);
        assert_eq!((read(&server, LIMIT), read(&client, LIMIT)), (Ok(b'1'), Ok(b'1')), "sent again");
        for family in [Family::Ipv4, Family::Ipv6] {
            assert_eq!(Nftables::open().unwrap().table(family, TABLE).unwrap(), None, "it goes with its socket");
        }
    }

    fn try_datagrams(address: &str) {
        let (client, server) = (UdpSocket::bind((address, 0)).unwrap(), UdpSocket::bind((address, 0)).unwrap());
        let (from, to) = (client.local_addr().unwrap(), server.local_addr().unwrap());
        server.set_read_timeout(Some(SILENCE)).unwrap();
        let paused = pause(&[untranslated(17, from, to)]).unwrap();
        // Where the kernel has no queues the sender is told.
        let _told = client.send_to(b"1", to);
        assert!(server.recv(&mut [0]).is_err());
        drop(paused);
        client.send_to(b"2", to).unwrap();
        let mut byte = [0];
        server.recv(&mut byte).unwrap();
        assert_eq!(byte, *b"2");
    }

    #[test]
    fn only_the_packets_of_these_connections_wait() {
        let work = || {
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
            assert!(up.success());
            for address in ["127.0.0.1", "::1"] {
                try_connections(address);
                try_datagrams(address);
            }
        };
        Netns::anonymous().unwrap().run(work).unwrap();
    }
}
