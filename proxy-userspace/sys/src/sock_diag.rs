//! Sockets of a network namespace, whoever owns them: listed and destroyed.
//!
//! Needs `CAP_NET_ADMIN`; destroying needs a kernel with `CONFIG_INET_DIAG_DESTROY`, which Debian's has.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::netlink::{ACK, DUMP, Socket};

/// Messages of linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

/// A connected UDP socket is in this state (net/tcp_states.h).
const TCP_ESTABLISHED: u32 = 1;

/// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
const ID_BYTES: usize = 48;
/// Where the id is in `struct inet_diag_msg`, and where the cookie is in the id.
const ID_OFFSET: usize = 4;
const COOKIE_OFFSET: usize = 40;

/// A connected socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectedSocket {
    /// Its own address.
    pub local: SocketAddr,
    /// Where it is connected to, as the kernel has it; an IPv4-mapped address is given as IPv4.
    pub remote: SocketAddr,
    /// The kernel's number for it (`SO_COOKIE`), never used twice.
    pub cookie: u64,
    /// The kernel's name for it.
    id: [u8; ID_BYTES],
    v6: bool,
}

/// Access to the UDP sockets of one network namespace.
#[derive(Debug)]
pub struct UdpSockets {
    socket: Socket,
}

impl UdpSockets {
    /// Looks at the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel has no sock_diag.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: Socket::open(libc::NETLINK_SOCK_DIAG)? })
    }

    /// Visits every connected UDP socket of one family. An IPv6 socket may be connected to an IPv4-mapped address.
    ///
    /// # Errors
    /// `ENOENT` where the kernel has no `udp_diag`.
    pub fn for_each_connected(&mut self, v6: bool, mut visit: impl FnMut(&ConnectedSocket)) -> io::Result<()> {
        self.socket.ask(
            SOCK_DIAG_BY_FAMILY,
            DUMP,
            |body| put_request(body, v6, &[0; ID_BYTES]),
            |message| {
                if let Some(socket) = ConnectedSocket::parse(message.body, v6) {
                    visit(&socket);
                }
                Ok(())
            },
        )
    }

    /// Destroys `socket`: its owner's next call fails with `ECONNABORTED`, or `EDESTADDRREQ` where it sends without an address.
    /// Returns whether it was still there.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the kernel cannot, `EPERM` without `CAP_NET_ADMIN`.
    pub fn destroy(&mut self, socket: &ConnectedSocket) -> io::Result<bool> {
        match self.socket.ask(SOCK_DESTROY, ACK, |body| put_request(body, socket.v6, &socket.id), |_| Ok(())) {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// `struct inet_diag_req_v2`.
fn put_request(body: &mut Vec<u8>, v6: bool, id: &[u8; ID_BYTES]) {
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    let byte = |number: i32| u8::try_from(number).unwrap_or_default();
    // Family, protocol, no extensions, padding.
    body.extend([byte(family), byte(libc::IPPROTO_UDP), 0, 0]);
    body.extend((1_u32 << TCP_ESTABLISHED).to_ne_bytes());
    body.extend(id);
}

impl ConnectedSocket {
    fn parse(payload: &[u8], v6: bool) -> Option<Self> {
        let id: [u8; ID_BYTES] = *payload.get(ID_OFFSET..)?.first_chunk()?;
        let endpoint = |port: usize, address: usize| -> Option<SocketAddr> {
            let port = u16::from_be_bytes(*id.get(port..)?.first_chunk()?);
            let bytes = id.get(address..)?;
            let address: IpAddr = match v6 {
                true => Ipv6Addr::from(*bytes.first_chunk::<16>()?).into(),
                false => Ipv4Addr::from(*bytes.first_chunk::<4>()?).into(),
            };
            Some(SocketAddr::new(address.to_canonical(), port))
        };
        // Two halves, the lower one first.
        let half = |offset: usize| Some(u64::from(u32::from_ne_bytes(*id.get(offset..)?.first_chunk()?)));
        let cookie = half(COOKIE_OFFSET)? | half(COOKIE_OFFSET + 4)? << 32;
        Some(Self { local: endpoint(0, 4)?, remote: endpoint(2, 20)?, cookie, id, v6 })
    }
}

/// Reads a message as one about a socket.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzzing(body: &[u8]) {
    let _sockets = [false, true].map(|v6| ConnectedSocket::parse(body, v6));
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;

    use super::*;

    /// `SO_COOKIE`, as the owner of a socket reads it.
    fn cookie(socket: &UdpSocket) -> u64 {
        let (mut cookie, mut length) = (0_u64, libc::socklen_t::try_from(size_of::<u64>()).unwrap());
        // SAFETY: the kernel writes at most `length` bytes to `cookie`, which has as many.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        assert_eq!(result, 0);
        cookie
    }

    #[test]
    fn a_connected_socket_is_found_by_its_cookie_and_ended() {
        for (address, v6) in [("127.0.0.1:0", false), ("[::1]:0", true)] {
            let server = UdpSocket::bind(address).unwrap();
            let client = UdpSocket::bind(address).unwrap();
            client.connect(server.local_addr().unwrap()).unwrap();
            let (mut sockets, mut found) = (UdpSockets::open().unwrap(), None);
            let mine = cookie(&client);
            let visit = |socket: &ConnectedSocket| {
                if socket.cookie == mine {
                    found = Some(socket.clone());
                }
            };
            sockets.for_each_connected(v6, visit).unwrap();
            let found = found.expect("the socket is listed");
            assert_eq!((found.local, found.remote), (client.local_addr().unwrap(), server.local_addr().unwrap()));
            assert!(sockets.destroy(&found).unwrap());
            assert_eq!(client.recv(&mut [0]).unwrap_err().raw_os_error(), Some(libc::ECONNABORTED));
            assert_eq!(client.send(b"x").unwrap_err().raw_os_error(), Some(libc::EDESTADDRREQ));
            assert!(!sockets.destroy(&found).unwrap(), "once");
            client.connect(server.local_addr().unwrap()).unwrap();
            client.send(b"x").unwrap();
        }
    }

    #[test]
    fn mapped_addresses_are_ipv4() {
        let mut payload = vec![0; ID_OFFSET + ID_BYTES];
        payload[ID_OFFSET..ID_OFFSET + 4].copy_from_slice(&[0x13, 0x88, 0, 53]);
        payload[ID_OFFSET + 20..ID_OFFSET + 36]
            .copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 3]);
        let socket = ConnectedSocket::parse(&payload, true).unwrap();
        assert_eq!((socket.remote, socket.local.port()), ("10.0.0.3:53".parse().unwrap(), 5000));
        assert_eq!(ConnectedSocket::parse(&payload[..20], true), None);
    }
}
