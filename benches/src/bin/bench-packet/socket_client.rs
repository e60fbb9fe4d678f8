//! The process whose sockets meet the socket programs: it stands in the benchmark's own cgroup and does as it is told, line by line.

use std::io::{BufRead, Write};
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use benches::services::ENDPOINT_PORT;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

/// What the client is to do `count` times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Work {
    /// A UDP socket is made, connected and closed.
    NewUdp,
    /// One UDP socket is connected again and again.
    ReusedUdp,
    /// One UDP socket sends to an address.
    Send,
    /// A TCP socket is made, connected and reset; the time is that of connect() alone.
    NewTcp,
}

/// A line to the client.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) work: Work,
    pub(crate) target: SocketAddr,
    pub(crate) count: u32,
}

/// Its answer.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Done {
    /// All of it, in nanoseconds.
    pub(crate) nanoseconds: u64,
    /// Where the last connected socket really leads; the target where none is connected.
    pub(crate) peer: SocketAddr,
}

/// Serves until the input ends.
pub(crate) fn serve() -> Result<()> {
    let endpoint = TcpListener::bind(("0.0.0.0", ENDPOINT_PORT)).context("cannot listen as the endpoint")?;
    // Datagrams are to arrive somewhere: what nobody receives would be answered with an ICMP error, at the sender's cost.
    let _sink = std::net::UdpSocket::bind(("0.0.0.0", ENDPOINT_PORT)).context("cannot receive as the endpoint")?;
    for line in std::io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?).context("not an order")?;
        let done = obey(&order, &endpoint).with_context(|| format!("{:?} to {}", order.work, order.target))?;
        println!("{}", serde_json::to_string(&done)?);
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn obey(order: &Order, endpoint: &TcpListener) -> Result<Done> {
    let (nanoseconds, peer) = match order.work {
        Work::NewUdp => new_udp(order)?,
        Work::ReusedUdp => reused_udp(order)?,
        Work::Send => send(order)?,
        Work::NewTcp => new_tcp(order, endpoint)?,
    };
    Ok(Done { nanoseconds: u64::try_from(nanoseconds.as_nanos())?, peer })
}

fn new_udp(order: &Order) -> Result<(Duration, SocketAddr)> {
    let target = order.target.into();
    let start = Instant::now();
    for _ in 1..order.count {
        Socket::new(Domain::IPV4, Type::DGRAM, None)?.connect(&target)?;
    }
    let last = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    last.connect(&target)?;
    let passed = start.elapsed();
    Ok((passed, peer(&last)?))
}

fn reused_udp(order: &Order) -> Result<(Duration, SocketAddr)> {
    let target = order.target.into();
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    let start = Instant::now();
    for _ in 0..order.count {
        socket.connect(&target)?;
    }
    let passed = start.elapsed();
    Ok((passed, peer(&socket)?))
}

fn send(order: &Order) -> Result<(Duration, SocketAddr)> {
    let target = order.target.into();
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    let start = Instant::now();
    for _ in 0..order.count {
        socket.send_to(b"datagram", &target)?;
    }
    Ok((start.elapsed(), order.target))
}

fn new_tcp(order: &Order, endpoint: &TcpListener) -> Result<(Duration, SocketAddr)> {
    let target = order.target.into();
    let (mut passed, mut at) = (Duration::ZERO, order.target);
    for _ in 0..order.count {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        // A reset leaves no TIME_WAIT, of which there would soon be one for every port.
        socket.set_linger(Some(Duration::ZERO))?;
        let start = Instant::now();
        socket.connect(&target)?;
        passed += start.elapsed();
        at = peer(&socket)?;
        drop(endpoint.accept()?);
    }
    Ok((passed, at))
}

fn peer(socket: &Socket) -> Result<SocketAddr> {
    match socket.peer_addr()?.as_socket() {
        Some(peer) => Ok(peer),
        None => bail!("a socket of another family"),
    }
}
