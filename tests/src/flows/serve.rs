//! The servers of a stand: each says who it is and whom it saw, at once.

use std::io;
use std::net::SocketAddr;

use socket2::Socket;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, UdpSocket};

use super::scenario::Protocol;
use super::sctp::{self, INIT, INIT_ACK, Packet};
use super::wire::{Seen, Stall};

/// Largest datagram that is read, in bytes.
pub(super) const DATAGRAM_MAX: usize = 2048;

/// Starts a server on a bound socket, in the current runtime; it serves until the runtime ends.
pub(super) fn start(socket: Socket, stall: &Stall) -> io::Result<()> {
    let address = stall.address;
    match stall.protocol {
        // A listener knows nothing of its protocol but how to accept.
        Protocol::Sctp if sctp::has_sockets() => serve_streams(socket, address)?,
        Protocol::Tcp => serve_streams(socket, address)?,
        Protocol::Udp => {
            let socket = UdpSocket::from_std(socket.into())?;
            tokio::spawn(serve_udp(socket, address));
        }
        Protocol::Sctp => {
            let socket = UdpSocket::from_std(socket.into())?;
            tokio::spawn(serve_sctp(socket, address));
        }
    }
    Ok(())
}

fn serve_streams(socket: Socket, address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::from_std(socket.into())?;
    tokio::spawn(accept(listener, address));
    Ok(())
}

async fn accept(listener: TcpListener, address: SocketAddr) {
    while let Ok((mut stream, peer)) = listener.accept().await {
        let seen = Seen { reached: address, source: peer.ip() };
        // A client that is gone already has its answer.
        let _ = stream.write_all(seen.to_line().as_bytes()).await;
    }
}

async fn serve_udp(socket: UdpSocket, address: SocketAddr) {
    let mut datagram = [0; DATAGRAM_MAX];
    loop {
        // An ICMP error for an earlier answer comes back as an error of the next call.
        let Ok((_, peer)) = socket.recv_from(&mut datagram).await else { continue };
        let seen = Seen { reached: address, source: peer.ip() };
        let _ = socket.send_to(seen.to_line().as_bytes(), peer).await;
    }
}

/// A raw socket sees every SCTP packet to its address; only an INIT to its port is answered.
async fn serve_sctp(socket: UdpSocket, address: SocketAddr) {
    let mut datagram = [0; DATAGRAM_MAX];
    loop {
        let Ok((length, peer)) = socket.recv_from(&mut datagram).await else { continue };
        let Some(packet) = payload(address, datagram.get(..length)).and_then(Packet::decode) else { continue };
        if packet.chunk != INIT || packet.destination_port != address.port() {
            continue;
        }
        let seen = Seen { reached: address, source: peer.ip() };
        let answer = Packet {
            source_port: address.port(),
            destination_port: packet.source_port,
            verification_tag: packet.initiate_tag,
            chunk: INIT_ACK,
            initiate_tag: 1,
            cookie: seen.to_line().into_bytes(),
        };
        let _ = socket.send_to(&answer.encode(), SocketAddr::new(peer.ip(), 0)).await;
    }
}

/// An IPv4 raw socket gives the IP header too.
pub(super) fn payload(local: SocketAddr, datagram: Option<&[u8]>) -> Option<&[u8]> {
    let datagram = datagram?;
    match local {
        SocketAddr::V4(_) => datagram.get(usize::from(datagram.first()? & 0x0f) * 4..),
        SocketAddr::V6(_) => Some(datagram),
    }
}
