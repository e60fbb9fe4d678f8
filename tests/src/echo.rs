//! The server in every pod: answers each TCP line and each UDP datagram with one line that says who it is and whom it saw.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

/// Connections served at once; more are closed unanswered.
const CONNECTIONS_MAX: usize = 512;
/// A connection that is silent for so long is closed.
const IDLE_MAX: Duration = Duration::from_secs(120);
/// Longest request line in bytes; the rest is dropped with the connection.
const LINE_MAX: u64 = 4096;

/// What the server answered: `NAME PEER LOCAL`, separated by blanks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EchoReply {
    /// Who answered.
    pub name: String,
    /// The client's address as the server saw it.
    pub peer: SocketAddr,
    /// The server's own address on this connection.
    pub local: SocketAddr,
}

impl fmt::Display for EchoReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.name, self.peer, self.local)
    }
}

impl FromStr for EchoReply {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self> {
        let mut words = line.split_whitespace();
        let mut word = || words.next().with_context(|| format!("not an answer of the echo server: {line:?}"));
        Ok(Self { name: word()?.to_owned(), peer: word()?.parse()?, local: word()?.parse()? })
    }
}

/// A running echo server; it serves until the process ends.
#[derive(Debug)]
pub struct EchoServer {
    listeners: Vec<thread::JoinHandle<()>>,
}

impl EchoServer {
    /// Listens on every port of every local address, IPv4 and IPv6, in the calling thread's network namespace.
    ///
    /// # Errors
    /// When a port is in use.
    pub fn start(name: &str, tcp_ports: &[u16], udp_ports: &[u16]) -> Result<Self> {
        let name: Arc<str> = name.into();
        let mut listeners = Vec::with_capacity(tcp_ports.len() + udp_ports.len());
        for &port in tcp_ports {
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).with_context(|| busy("TCP", port))?;
            let name = Arc::clone(&name);
            listeners.push(thread::spawn(move || serve_tcp(&listener, &name)));
        }
        for &port in udp_ports {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).with_context(|| busy("UDP", port))?;
            let name = Arc::clone(&name);
            listeners.push(thread::spawn(move || serve_udp(&socket, &name)));
        }
        Ok(Self { listeners })
    }

    /// Waits for as long as the server serves.
    pub fn wait(self) {
        for listener in self.listeners {
            // A listener that panicked has said so on stderr.
            let _ = listener.join();
        }
    }
}

fn busy(protocol: &str, port: u16) -> String {
    format!("cannot listen on {protocol} port {port}")
}

fn serve_tcp(listener: &TcpListener, name: &Arc<str>) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming().flatten() {
        if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (name, open) = (Arc::clone(name), Arc::clone(&open));
        thread::spawn(move || {
            // A client that goes away mid-line is its own business.
            let _ = serve_connection(&stream, &name);
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn serve_connection(mut stream: &TcpStream, name: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(IDLE_MAX))?;
    let reply = EchoReply {
        name: name.to_owned(),
        peer: canonical(stream.peer_addr()?),
        local: canonical(stream.local_addr()?),
    };
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = Vec::new();
    while read_line(&mut reader, &mut line)? {
        if line.starts_with(b"GET ") {
            return answer_http(stream, reader, &reply);
        }
        stream.write_all(format!("{reply}\n").as_bytes())?;
    }
    Ok(())
}

/// For `curl`: reads the request's head to its end, as a connection closed with unread bytes is reset, and answers with one line.
fn answer_http(mut stream: &TcpStream, mut reader: impl BufRead, reply: &EchoReply) -> std::io::Result<()> {
    let mut line = Vec::new();
    while read_line(&mut reader, &mut line)? && line != b"\r\n" && line != b"\n" {}
    let body = format!("{reply}\n");
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes())
}

/// Replaces `line` with the next one; `false` at the end.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<bool> {
    line.clear();
    Ok(reader.take(LINE_MAX).read_until(b'\n', line)? > 0)
}

fn serve_udp(socket: &UdpSocket, name: &str) {
    let mut datagram = [0; LINE_MAX as usize];
    while let Ok((_, peer)) = socket.recv_from(&mut datagram) {
        let Ok(local) = local_address_towards(peer, socket) else { continue };
        let reply = EchoReply { name: name.to_owned(), peer: canonical(peer), local };
        // UDP promises nothing: the client asks again.
        let _ = socket.send_to(format!("{reply}\n").as_bytes(), peer);
    }
}

/// The source address of an answer to `peer`: what the kernel's routing chooses, as the socket is bound to every address.
fn local_address_towards(peer: SocketAddr, socket: &UdpSocket) -> std::io::Result<SocketAddr> {
    let towards = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    towards.connect(peer)?;
    Ok(SocketAddr::new(towards.local_addr()?.ip().to_canonical(), socket.local_addr()?.port()))
}

/// An IPv4 client of a dual-stack socket shows up as `::ffff:a.b.c.d`.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = address.ip().to_canonical();
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_read_back() {
        let reply = EchoReply {
            name: "web-1".into(),
            peer: "10.244.1.5:40000".parse().unwrap(),
            local: "[fd00:10:244:1::5]:80".parse().unwrap(),
        };
        assert_eq!(reply.to_string().parse::<EchoReply>().unwrap(), reply);
        assert!("web-1 10.244.1.5:1".parse::<EchoReply>().is_err());
        assert!("".parse::<EchoReply>().is_err());
    }

    #[test]
    fn http_is_answered_too() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n").unwrap();
        let (stream, _) = listener.accept().unwrap();
        serve_connection(&stream, "web-1").unwrap();
        drop(stream);
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert_eq!(body.trim_end().parse::<EchoReply>().unwrap().name, "web-1");
    }

    #[test]
    fn mapped_addresses_are_ipv4() {
        assert_eq!(canonical("[::ffff:10.0.0.1]:80".parse().unwrap()), "10.0.0.1:80".parse().unwrap());
        assert_eq!(canonical("[fd00::1]:80".parse().unwrap()), "[fd00::1]:80".parse().unwrap());
    }
}
