//! One client, one question, one answer: who served it, whom the server saw, how long it took, or why it failed.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::echo::{EchoReply, canonical};
use crate::patient;

/// Failures after which a client stops asking.
const FAILURES_MAX: usize = 5;

/// How the client talks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum Transport {
    /// A TCP connection of its own for every question.
    Tcp,
    /// A UDP socket that is never connected: `sendto` and `recvfrom`.
    Udp,
    /// The same, with a second question from the same socket, which the same server has to answer.
    UdpTwice,
    /// A connected UDP socket: `connect`, `send` and `recv`.
    UdpConnected,
}

/// A question to an echo server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Whom the client asks.
    pub target: SocketAddr,
    /// How it asks.
    pub transport: Transport,
    /// How long it waits for the connection, and again for the answer, on a machine of usual speed: see [`patient`].
    pub timeout: Duration,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Name of the server that answered.
    pub server: String,
    /// The client's address as the server saw it.
    pub seen_source: SocketAddr,
    /// The server's own address.
    pub server_address: SocketAddr,
    /// Whom the client takes the answer to come from: `getpeername`, or the datagram's source.
    pub seen_peer: SocketAddr,
    /// The client's own address.
    pub client_address: SocketAddr,
    /// From before the connection to after the answer.
    pub latency: Duration,
}

/// Why there was no answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Failure {
    /// `ECONNREFUSED`: a closed port, a Service without endpoints, or an ICMP port unreachable.
    #[error("refused")]
    Refused,
    /// Nothing came within the timeout.
    #[error("timed out")]
    Timeout,
    /// `EHOSTUNREACH` or `ENETUNREACH`: no route, or an ICMP message that says so.
    #[error("unreachable")]
    Unreachable,
    /// The server, or something on the way, reset the connection.
    #[error("reset")]
    Reset,
    /// `EPERM`: a firewall of the client's own machine dropped the packet.
    #[error("not permitted")]
    NotPermitted,
    /// An answer came from an address that was not asked.
    #[error("answered by {0}, which was not asked")]
    WrongPeer(SocketAddr),
    /// A server answered a socket that another one had answered before.
    #[error("answered by another server than before: {0}")]
    AnotherServer(String),
    /// Anything else, in the kernel's words.
    #[error("{0}")]
    Other(String),
}

/// An answer or the reason why there was none.
pub type Outcome = Result<Reply, Failure>;

impl Probe {
    /// A question with the usual patience of two seconds.
    pub fn new(target: SocketAddr, transport: Transport) -> Self {
        Self { target, transport, timeout: Duration::from_secs(2) }
    }

    /// Asks once, from the calling thread's namespace and the process's cgroup.
    ///
    /// # Errors
    /// The reason why there was no answer.
    pub fn ask(&self) -> Outcome {
        let start = Instant::now();
        let (line, seen_peer, client_address) = match self.transport {
            Transport::Tcp => self.ask_tcp(),
            Transport::Udp => self.ask_udp(&self.udp_socket()?),
            Transport::UdpTwice => self.ask_udp_twice(),
            Transport::UdpConnected => self.ask_udp_connected(),
        }?;
        let latency = start.elapsed();
        let reply: EchoReply = line.parse().map_err(|e: anyhow::Error| Failure::Other(e.to_string()))?;
        Ok(Reply {
            server: reply.name,
            seen_source: reply.peer,
            server_address: reply.local,
            seen_peer: canonical(seen_peer),
            client_address: canonical(client_address),
            latency,
        })
    }

    /// Asks up to `count` times, each time with a socket of its own. It stops after five failures: what is broken is broken, and
    /// every failure may cost the whole patience.
    pub fn ask_times(&self, count: usize) -> Vec<Outcome> {
        let mut outcomes = Vec::with_capacity(count);
        let mut failures = 0;
        while outcomes.len() < count && failures < FAILURES_MAX {
            let outcome = self.ask();
            failures += usize::from(outcome.is_err());
            outcomes.push(outcome);
        }
        outcomes
    }

    fn ask_tcp(&self) -> Result<(String, SocketAddr, SocketAddr), Failure> {
        let stream = TcpStream::connect_timeout(&self.target, patient(self.timeout))?;
        stream.set_read_timeout(Some(patient(self.timeout)))?;
        (&stream).write_all(b"who\n")?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        Ok((line, stream.peer_addr()?, stream.local_addr()?))
    }

    fn ask_udp_twice(&self) -> Result<(String, SocketAddr, SocketAddr), Failure> {
        let socket = self.udp_socket()?;
        let [first, second] = [self.ask_udp(&socket)?, self.ask_udp(&socket)?];
        if first.0 != second.0 { Err(Failure::AnotherServer(second.0)) } else { Ok(second) }
    }

    fn ask_udp(&self, socket: &UdpSocket) -> Result<(String, SocketAddr, SocketAddr), Failure> {
        socket.send_to(b"who\n", self.target)?;
        let mut buffer = [0; 512];
        let (length, from) = socket.recv_from(&mut buffer)?;
        if canonical(from) != canonical(self.target) {
            return Err(Failure::WrongPeer(from));
        }
        Ok((text(&buffer, length), from, socket.local_addr()?))
    }

    fn ask_udp_connected(&self) -> Result<(String, SocketAddr, SocketAddr), Failure> {
        let socket = self.udp_socket()?;
        socket.connect(self.target)?;
        socket.send(b"who\n")?;
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer)?;
        Ok((text(&buffer, length), socket.peer_addr()?, socket.local_addr()?))
    }

    fn udp_socket(&self) -> io::Result<UdpSocket> {
        let any: IpAddr =
            if self.target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_read_timeout(Some(patient(self.timeout)))?;
        Ok(socket)
    }
}

fn text(buffer: &[u8], length: usize) -> String {
    String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned()
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            // A read that ran into its timeout is `EAGAIN`.
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::Timeout,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Self::Unreachable,
            io::ErrorKind::PermissionDenied => Self::NotPermitted,
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Reset,
            _ => Self::Other(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EchoServer;

    #[test]
    fn every_transport_is_answered() {
        let port = free_port();
        let _server = EchoServer::start("here", &[port], &[port]).unwrap();
        for ip in ["127.0.0.1", "::1"] {
            for transport in [Transport::Tcp, Transport::Udp, Transport::UdpTwice, Transport::UdpConnected] {
                let target = SocketAddr::new(ip.parse().unwrap(), port);
                let reply = Probe::new(target, transport).ask().unwrap();
                assert_eq!((reply.server.as_str(), reply.server_address, reply.seen_peer), ("here", target, target));
                assert_eq!(reply.seen_source.port(), reply.client_address.port());
            }
        }
    }

    #[test]
    fn failures_have_names() {
        let target = SocketAddr::from(([127, 0, 0, 1], free_port()));
        assert_eq!(Probe::new(target, Transport::Tcp).ask(), Err(Failure::Refused));
        assert_eq!(Probe::new(target, Transport::UdpConnected).ask(), Err(Failure::Refused));
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let patience = Duration::from_millis(50);
        let probe = Probe { timeout: patience, ..Probe::new(silent.local_addr().unwrap(), Transport::Udp) };
        assert_eq!(probe.ask(), Err(Failure::Timeout));
    }

    fn free_port() -> u16 {
        UdpSocket::bind("[::]:0").unwrap().local_addr().unwrap().port()
    }
}
