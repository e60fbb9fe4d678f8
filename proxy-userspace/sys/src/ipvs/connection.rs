//! A connection to IPVS: sends commands and reads back.

use std::io;

use super::codec::{
    GET_SERVICE, header, read_server, read_service, read_u16, write_command, write_servers_of, write_timeouts,
};
use super::{COMMANDS_MAX, Command, Server, Service, ServiceId, Timeouts};
use crate::netlink::{ACK, DUMP, REQUEST, Socket, attribute_string, find, message};

/// `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY`, `CTRL_ATTR_FAMILY_ID` and `CTRL_ATTR_FAMILY_NAME`.
const CONTROLLER: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// Why IPVS did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum IpvsError {
    /// The kernel has no IPVS, and no module of it.
    #[error("this kernel has no IPVS: load the module ip_vs")]
    Missing,
    /// The kernel refused a command; those before it were done.
    #[error("cannot do {command:?} in IPVS: {source}")]
    Refused {
        /// What it refused.
        command: Command,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// A question was not answered.
    #[error("cannot {action}: {source}")]
    Ask {
        /// What was asked.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A connection to the IPVS of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Ipvs {
    socket: Socket,
    family: u16,
}

impl Ipvs {
    /// Opens the connection; the kernel loads its module for that.
    ///
    /// # Errors
    /// [`IpvsError::Missing`]; no netlink socket to be had.
    pub fn open() -> Result<Self, IpvsError> {
        let mut socket = Socket::open(libc::NETLINK_GENERIC).map_err(ask_error("open a netlink socket"))?;
        let mut family = None;
        let request = |buffer: &mut Vec<u8>| {
            buffer.extend_from_slice(&[GET_FAMILY, 1, 0, 0]);
            attribute_string(buffer, FAMILY_NAME, "IPVS");
        };
        let asked = socket.ask(CONTROLLER, ACK, request, |message| {
            family = message.body.get(4..).and_then(|body| find(body, FAMILY_ID)).and_then(read_u16);
            Ok(())
        });
        match (asked, family) {
            (Ok(()), Some(family)) => Ok(Self { socket, family }),
            (Err(error), _) if error.kind() != io::ErrorKind::NotFound => Err(ask_error("ask for IPVS")(error)),
            _ => Err(IpvsError::Missing),
        }
    }

    /// Does the commands in their order, and stops at the first that is refused.
    ///
    /// # Errors
    /// [`IpvsError::Refused`] names the command; all before it were done, and at most 255 behind it.
    pub fn run(&mut self, commands: &[Command]) -> Result<(), IpvsError> {
        commands.chunks(COMMANDS_MAX).try_for_each(|chunk| self.run_chunk(chunk))
    }

    fn run_chunk(&mut self, commands: &[Command]) -> Result<(), IpvsError> {
        let Some(last_command) = commands.len().checked_sub(1) else { return Ok(()) };
        let first = self.socket.next_sequence();
        let mut sequence = first;
        let mut datagram = Vec::new();
        for (index, command) in commands.iter().enumerate() {
            if index > 0 {
                sequence = self.socket.next_sequence();
            }
            // Errors are always answered; one acknowledgement at the end says that there is no more to come.
            let flags = if index == last_command { REQUEST | ACK } else { REQUEST };
            message(&mut datagram, self.family, flags, sequence, |buffer| write_command(buffer, command));
        }
        let failures = self.socket.send(&datagram).and_then(|()| self.socket.acknowledged(first, sequence));
        let failure = failures.map_err(ask_error("send commands to IPVS"))?.into_iter().next();
        let refused = failure.and_then(|failure| {
            let command = *commands.get(failure.sequence.wrapping_sub(first) as usize)?;
            Some(IpvsError::Refused { command, source: io::Error::from_raw_os_error(failure.errno) })
        });
        refused.map_or(Ok(()), Err)
    }

    /// All virtual services of this namespace, whoever made them.
    ///
    /// # Errors
    /// [`IpvsError::Ask`].
    pub fn services(&mut self) -> Result<Vec<Service>, IpvsError> {
        let mut services = Vec::new();
        let request = |buffer: &mut Vec<u8>| header(buffer, GET_SERVICE);
        let asked = self.socket.ask(self.family, DUMP, request, |message| {
            services.extend(read_service(message.body));
            Ok(())
        });
        asked.map(|()| services).map_err(ask_error("list the services of IPVS"))
    }

    /// The servers of a service; none if there is no such service.
    ///
    /// # Errors
    /// [`IpvsError::Ask`].
    pub fn servers(&mut self, id: ServiceId) -> Result<Vec<Server>, IpvsError> {
        let mut servers = Vec::new();
        let asked = self.socket.ask(
            self.family,
            DUMP,
            |buffer| write_servers_of(buffer, id),
            |message| {
                servers.extend(read_server(message.body, id.family));
                Ok(())
            },
        );
        asked.map(|()| servers).map_err(ask_error("list the servers of a service of IPVS"))
    }

    /// Sets how long connections are remembered.
    ///
    /// # Errors
    /// [`IpvsError::Ask`].
    pub fn set_timeouts(&mut self, timeouts: Timeouts) -> Result<(), IpvsError> {
        let asked = self.socket.ask(self.family, ACK, |buffer| write_timeouts(buffer, timeouts), |_| Ok(()));
        asked.map_err(ask_error("set the timeouts of IPVS"))
    }
}

fn ask_error(action: &'static str) -> impl FnOnce(io::Error) -> IpvsError {
    move |source| IpvsError::Ask { action, source }
}
