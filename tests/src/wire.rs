//! A wire to a place's interface: packets made by hand go out, and everything that passes by is seen as it is.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;
use node_sys::{Netns, packet_socket};

use crate::packet::Packet;
use crate::{Place, patient};

/// Longest frame that is read.
const FRAME_MAX: usize = 1 << 16;
/// Between two looks at the deadline.
const PAUSE: Duration = Duration::from_millis(20);
/// Bytes of an Ethernet header.
const ETHERNET_LENGTH: usize = 14;

/// An interface of a place.
#[derive(Debug)]
pub struct Wire {
    // Any socket's file descriptor: it is written to and read from, and never asked for its address.
    socket: UdpSocket,
    own: [u8; 6],
}

impl Wire {
    /// Opens the place's interface of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(place: &Place, interface: &str) -> Result<Self> {
        let open = || -> Result<UdpSocket> {
            let socket = UdpSocket::from(packet_socket(if_nametoindex(interface)?)?);
            socket.set_read_timeout(Some(PAUSE))?;
            Ok(socket)
        };
        let socket = place.netns().run(open)?.with_context(|| format!("cannot open {interface}"))?;
        Ok(Self { socket, own: link_address(place.netns(), interface)? })
    }

    /// Sends a packet to the link-layer address `to`.
    ///
    /// # Errors
    /// When the interface is down or the packet too long for it.
    pub fn send(&self, to: [u8; 6], packet: &Packet) -> Result<()> {
        self.send_bytes(to, packet.ether_type(), &packet.bytes())
    }

    /// Sends whatever bytes behind an Ethernet header of this type.
    ///
    /// # Errors
    /// As [`Wire::send`].
    pub fn send_bytes(&self, to: [u8; 6], ether_type: u16, bytes: &[u8]) -> Result<()> {
        let frame = [&to[..], &self.own, &ether_type.to_be_bytes(), bytes].concat();
        self.socket.send(&frame).context("cannot send a frame")?;
        Ok(())
    }

    /// Reads packets until `pick` picks one.
    ///
    /// # Errors
    /// When it has picked none after `limit`.
    pub fn receive<T>(&self, limit: Duration, mut pick: impl FnMut(&Packet) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + patient(limit);
        let mut frame = vec![0; FRAME_MAX];
        while Instant::now() < deadline {
            let Ok(length) = self.socket.recv(&mut frame) else { continue };
            let packet = frame.get(ETHERNET_LENGTH..length).and_then(Packet::parse);
            if let Some(picked) = packet.as_ref().and_then(&mut pick) {
                return Ok(picked);
            }
        }
        bail!("the packet did not come within {} s", limit.as_secs_f32())
    }
}

/// The link-layer address of an interface in `netns`.
///
/// # Errors
/// When there is no such interface, or it has none.
pub fn link_address(netns: &Netns, interface: &str) -> Result<[u8; 6]> {
    let find = || -> nix::Result<Option<[u8; 6]>> {
        let mut own = getifaddrs()?.filter(|address| address.interface_name == interface);
        Ok(own.find_map(|address| address.address?.as_link_addr()?.addr()))
    };
    let link = netns.run(find)??;
    link.with_context(|| format!("{interface} of {} has no link-layer address", netns.label()))
}
