//! A client with two sockets that have one place in the map of connected sockets: the second is remembered elsewhere.

use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{Transport, patient};

/// Sockets that are opened at most for one with the same place: cookies are given out in blocks to each CPU.
const SOCKETS_MAX: u32 = 2_000_000;
const TIMEOUT: Duration = Duration::from_secs(2);

/// What the client saw while both sockets were open.
#[derive(Debug, Serialize, Deserialize)]
pub struct Twins {
    /// Cookies of the two sockets.
    pub cookies: [u64; 2],
    /// Whom each takes itself to be connected to.
    pub peers: [SocketAddr; 2],
    /// Who sent the answer that came before the first socket was connected to the other address; UDP only.
    pub late_answer: Option<SocketAddr>,
    /// Whom the first socket took itself to be connected to then; UDP only.
    pub reconnected: Option<SocketAddr>,
}

/// Connects two sockets whose cookies are equal modulo `places` to `target`, and the first one to `other` where it is UDP. Prints a line of
/// JSON, keeps the sockets until a line of input, and prints another line when they are closed.
///
/// # Errors
/// When a socket does not connect, or no second one is found.
pub fn twins(target: SocketAddr, other: SocketAddr, transport: Transport, places: u64) -> Result<()> {
    let first = connected(&open(target, transport)?, target)?;
    let place = first.cookie()? % places;
    let mut cookies = (0..SOCKETS_MAX).map(|_| open(target, transport));
    let twin = cookies.find(|socket| socket.as_ref().is_ok_and(|socket| is_in(socket, place, places)));
    let twin = connected(&twin.context("no second socket has the place")??, target)?;
    let peers = [peer(&first)?, peer(&twin)?];
    let (late_answer, reconnected) = match transport {
        Transport::Tcp => (None, None),
        Transport::Udp | Transport::UdpTwice | Transport::UdpConnected => {
            let late = late_answer(&first, other)?;
            (Some(late), Some(peer(&first)?))
        }
    };
    say(&Twins { cookies: [first.cookie()?, twin.cookie()?], peers, late_answer, reconnected })?;
    std::io::stdin().lock().read_line(&mut String::new())?;
    drop((first, twin));
    say(&"closed")?;
    std::io::stdin().lock().read_line(&mut String::new())?;
    Ok(())
}

fn open(target: SocketAddr, transport: Transport) -> Result<Socket> {
    let kind = if transport == Transport::Tcp { Type::STREAM } else { Type::DGRAM };
    let socket = Socket::new(Domain::for_address(target), kind, None)?;
    Ok(socket)
}

fn connected(socket: &Socket, target: SocketAddr) -> Result<Socket> {
    socket.connect_timeout(&target.into(), patient(TIMEOUT)).with_context(|| format!("cannot connect to {target}"))?;
    Ok(socket.try_clone()?)
}

fn is_in(socket: &Socket, place: u64, places: u64) -> bool {
    socket.cookie().is_ok_and(|cookie| cookie % places == place)
}

fn peer(socket: &Socket) -> Result<SocketAddr> {
    socket.peer_addr()?.as_socket().context("the peer has another family")
}

/// Asks whom the socket is connected to, connects it to `other` once the answer is there, and reads it after that.
fn late_answer(socket: &Socket, other: SocketAddr) -> Result<SocketAddr> {
    socket.set_read_timeout(Some(patient(TIMEOUT)))?;
    socket.send(b"who\n")?;
    let mut buffer = [std::mem::MaybeUninit::uninit(); 512];
    socket.peek(&mut buffer).context("no answer")?;
    socket.connect(&SockAddr::from(other))?;
    let (length, from) = socket.recv_from(&mut buffer)?;
    ensure!(length > 0, "the answer is empty");
    from.as_socket().context("the answer has another family")
}

fn say(what: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(what)?);
    Ok(std::io::stdout().flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    #[test]
    fn a_place_comes_again() {
        let any = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 1);
        let first = open(any, Transport::Udp).unwrap();
        let place = first.cookie().unwrap() % 64;
        let any = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 1);
        let mut sockets = (0..100_000).map(|_| open(any, Transport::Udp).unwrap());
        assert!(sockets.any(|socket| is_in(&socket, place, 64)));
    }
}
