//! The server in every pod: answers each TCP line and each UDP datagram with one line that says who it is and whom it saw.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::files::allow_many_files;

/// Connections of one port that are served at once; more wait in the listener's queue.
const CONNECTIONS_MAX: usize = 16_384;
/// A connection that is silent for so long is closed.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// Longest request line in bytes; the rest is dropped with the connection.
const LINE_MAX: u64 = 4096;
/// Bytes that are read at once: thousands of connections are served, and their lines are short.
const READ_AT_ONCE: usize = 256;
/// Until a connection is accepted again after one could not be.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

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
    thread: thread::JoinHandle<()>,
}

impl EchoServer {
    /// Listens on every port of every local address, IPv4 and IPv6, in the calling thread's network namespace.
    ///
    /// # Errors
    /// When a port is in use, or the process can have no more threads.
    pub fn start(name: &str, tcp_ports: &[u16], udp_ports: &[u16]) -> Result<Self> {
        allow_many_files()?;
        let name: Arc<str> = name.into();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("cannot start a tokio runtime")?;
        let inside = runtime.enter();
        for &port in tcp_ports {
            let listener = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, port));
            let listener = listener.and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
            let listener = TcpListener::from_std(listener.with_context(|| busy("TCP", port))?)?;
            runtime.spawn(serve_tcp(listener, Arc::clone(&name)));
        }
        for &port in udp_ports {
            let socket = std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port));
            let socket = socket.and_then(|socket| socket.set_nonblocking(true).map(|()| socket));
            let socket = UdpSocket::from_std(socket.with_context(|| busy("UDP", port))?)?;
            runtime.spawn(serve_udp(socket, Arc::clone(&name)));
        }
        drop(inside);
        // A thread is in the namespace of the one that starts it.
        let serve = move || runtime.block_on(std::future::pending());
        let thread = thread::Builder::new().name("echo".to_owned()).spawn(serve).context("cannot start a thread")?;
        Ok(Self { thread })
    }

    /// Waits for as long as the server serves.
    pub fn wait(self) {
        // One that panicked has said so on stderr.
        let _ = self.thread.join();
    }
}

fn busy(protocol: &str, port: u16) -> String {
    format!("cannot listen on {protocol} port {port}")
}

async fn serve_tcp(listener: TcpListener, name: Arc<str>) {
    let open = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    while let Ok(slot) = Arc::clone(&open).acquire_owned().await {
        let Ok((stream, _)) = listener.accept().await else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let name = Arc::clone(&name);
        tokio::spawn(async move {
            // A client that goes away mid-line is its own business.
            let _ = serve_connection(stream, &name).await;
            drop(slot);
        });
    }
}

async fn serve_connection(mut stream: TcpStream, name: &str) -> io::Result<()> {
    let reply = EchoReply {
        name: name.to_owned(),
        peer: canonical(stream.peer_addr()?),
        local: canonical(stream.local_addr()?),
    };
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::with_capacity(READ_AT_ONCE, reader);
    let mut line = Vec::new();
    while read_line(&mut reader, &mut line).await? {
        if line.starts_with(b"GET ") {
            return answer_http(reader, writer, &reply).await;
        }
        writer.write_all(format!("{reply}\n").as_bytes()).await?;
    }
    Ok(())
}

/// For `curl`: reads the request's head to its end, as a connection closed with unread bytes is reset, and answers with one line.
async fn answer_http(
    mut reader: impl AsyncBufRead + Unpin,
    mut writer: impl AsyncWriteExt + Unpin,
    reply: &EchoReply,
) -> io::Result<()> {
    let mut line = Vec::new();
    while read_line(&mut reader, &mut line).await? && line != b"\r\n" && line != b"\n" {}
    let body = format!("{reply}\n");
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    writer.write_all(format!("{head}{body}").as_bytes()).await
}

/// Replaces `line` with the next one; `false` at the end.
async fn read_line(reader: &mut (impl AsyncBufRead + Unpin), line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    Ok(timeout(IDLE_MAX, reader.take(LINE_MAX).read_until(b'\n', line)).await?? > 0)
}

async fn serve_udp(socket: UdpSocket, name: Arc<str>) {
    let mut datagram = [0; LINE_MAX as usize];
    while let Ok((_, peer)) = socket.recv_from(&mut datagram).await {
        let Ok(local) = local_address_towards(peer, &socket) else { continue };
        let reply = EchoReply { name: name.to_string(), peer: canonical(peer), local };
        // UDP promises nothing: the client asks again.
        let _ = socket.send_to(format!("{reply}\n").as_bytes(), peer).await;
    }
}

/// The source address of an answer to `peer`: what the kernel's routing chooses, as the socket is bound to every address.
fn local_address_towards(peer: SocketAddr, socket: &UdpSocket) -> io::Result<SocketAddr> {
    let towards = std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
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
    use std::io::{Read, Write};

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
        let port = std::net::UdpSocket::bind("[::]:0").unwrap().local_addr().unwrap().port();
        let _server = EchoServer::start("web-1", &[port], &[]).unwrap();
        let mut client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n").unwrap();
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
