//! What an interface's driver can do with XDP, by the generic netlink family `netdev` (Linux 6.3,
//! Documentation/netlink/specs/netdev.yaml).

use std::io;

use crate::netlink::{ACK, Socket, attribute, find, generic_family};

/// `NETDEV_CMD_DEV_GET`.
const DEVICE_GET: u8 = 1;
/// `NETDEV_A_DEV_IFINDEX` and `NETDEV_A_DEV_XDP_FEATURES`.
const INDEX: u16 = 1;
const FEATURES: u16 = 3;
/// `NETDEV_XDP_ACT_NDO_XMIT`.
const TAKES_FRAMES: u64 = 4;

/// Whether an interface of this thread's namespace sends frames that another interface's XDP program redirects to it; `None` where the
/// kernel (before 6.3) does not say.
///
/// # Errors
/// No netlink socket, or the kernel's refusal: there is no such interface.
pub fn takes_frames(interface: u32) -> io::Result<Option<bool>> {
    let mut socket = Socket::open(libc::NETLINK_GENERIC)?;
    let Some(family) = generic_family(&mut socket, "netdev")? else { return Ok(None) };
    let mut features = None;
    let request = |buffer: &mut Vec<u8>| {
        buffer.extend_from_slice(&[DEVICE_GET, 1, 0, 0]);
        attribute(buffer, INDEX, &interface.to_ne_bytes());
    };
    socket.ask(family, ACK, request, |message| {
        let value = message.body.get(4..).and_then(|body| find(body, FEATURES));
        features = value.and_then(|value| Some(u64::from_ne_bytes(*value.first_chunk()?)));
        Ok(())
    })?;
    Ok(features.map(|features| features & TAKES_FRAMES != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_not_there_is_an_error() {
        assert!(takes_frames(u32::MAX >> 1).is_err());
    }

    #[test]
    fn the_loopback_interface_takes_no_frames() {
        assert_ne!(takes_frames(1).unwrap(), Some(true));
    }
}
