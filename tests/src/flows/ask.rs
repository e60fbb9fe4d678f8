//! The clients of a stand: one new connection each, on a socket that is bound to the flow's source.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::Socket;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpSocket, UdpSocket};

use super::scenario::Protocol;
use super::sctp::{self, INIT, INIT_ACK, Packet};
use super::serve::{DATAGRAM_MAX, payload};
use super::wire::{Outcome, Question, Seen};
use crate::Failure;

/// After so long without an answer a datagram is sent again, as a resolver would.
const AGAIN: Duration = Duration::from_secs(1);
/// Source ports of SCTP clients: those that Linux gives to clients.
const CLIENT_PORTS: std::ops::RangeInclusive<u16> = 32_768..=60_999;

/// Asks once. The caller bounds the time.
pub(super) async fn ask(socket: Socket, question: &Question, index: usize) -> Outcome {
    match question.protocol {
        Protocol::Tcp => ask_stream(socket, question.target).await,
        Protocol::Sctp if sctp::has_sockets() => ask_stream(socket, question.target).await,
        Protocol::Udp if question.answered && index % 2 == 1 => ask_udp(socket, question.target).await,
        Protocol::Udp => ask_udp_connected(socket, question.target).await,
        Protocol::Sctp => ask_sctp(socket, question.target).await,
    }
}

async fn ask_stream(socket: Socket, target: SocketAddr) -> Outcome {
    let mut stream = TcpSocket::from_std_stream(socket.into()).connect(target).await?;
    let mut line = Vec::new();
    (&mut stream).take(DATAGRAM_MAX as u64).read_to_end(&mut line).await?;
    Seen::parse(&line)
}

async fn ask_udp(socket: Socket, target: SocketAddr) -> Outcome {
    let socket = UdpSocket::from_std(socket.into())?;
    let mut datagram = [0; DATAGRAM_MAX];
    loop {
        socket.send_to(b"who\n", target).await?;
        let Ok(received) = tokio::time::timeout(AGAIN, socket.recv_from(&mut datagram)).await else { continue };
        let (length, from) = received?;
        if from != target {
            return Err(Failure::WrongPeer(from));
        }
        return Seen::parse(datagram.get(..length).unwrap_or_default());
    }
}

async fn ask_udp_connected(socket: Socket, target: SocketAddr) -> Outcome {
    let socket = UdpSocket::from_std(socket.into())?;
    socket.connect(target).await?;
    let mut datagram = [0; DATAGRAM_MAX];
    loop {
        let sent = send(&socket, b"who\n").await?;
        let received = tokio::time::timeout(AGAIN, socket.recv(&mut datagram)).await;
        match (received, sent) {
            (Ok(length), _) => return Seen::parse(datagram.get(..length?).unwrap_or_default()),
            (Err(_), Sent::NotPermitted) => return Err(Failure::NotPermitted),
            (Err(_), Sent::Yes) => {}
        }
    }
}

/// Whether the client's own machine let a packet out.
enum Sent {
    Yes,
    NotPermitted,
}

/// A rejected packet of the client's own machine is an error of `send` and, as an ICMP message, one of the next `recv`, which says more.
async fn send(socket: &UdpSocket, bytes: &[u8]) -> Result<Sent, Failure> {
    match socket.send(bytes).await {
        Ok(_) => Ok(Sent::Yes),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(Sent::NotPermitted),
        Err(error) => Err(error.into()),
    }
}

/// A connected raw socket receives from its peer only, and learns of ICMP errors.
async fn ask_sctp(socket: Socket, target: SocketAddr) -> Outcome {
    let socket = UdpSocket::from_std(socket.into())?;
    socket.connect(SocketAddr::new(target.ip(), 0)).await?;
    let init = Packet {
        source_port: fastrand::u16(CLIENT_PORTS),
        destination_port: target.port(),
        verification_tag: 0,
        chunk: INIT,
        initiate_tag: fastrand::u32(1..),
        cookie: Vec::new(),
    };
    let bytes = init.encode();
    loop {
        let sent = send(&socket, &bytes).await?;
        match (tokio::time::timeout(AGAIN, receive_sctp(&socket, &init, target)).await, sent) {
            (Ok(answer), _) => return answer,
            (Err(_), Sent::NotPermitted) => return Err(Failure::NotPermitted),
            (Err(_), Sent::Yes) => {}
        }
    }
}

async fn receive_sctp(socket: &UdpSocket, init: &Packet, target: SocketAddr) -> Outcome {
    let mut datagram = [0; DATAGRAM_MAX];
    loop {
        let length = socket.recv(&mut datagram).await?;
        let Some(packet) = payload(target, datagram.get(..length)).and_then(Packet::decode) else { continue };
        let ports = (packet.source_port, packet.destination_port) == (init.destination_port, init.source_port);
        if ports && packet.chunk == INIT_ACK && packet.verification_tag == init.initiate_tag {
            return Seen::parse(&packet.cookie);
        }
    }
}
