//! A connection to IPVS: sends commands and reads back.

use std::io;

use super::codec::{GET_SERVICE, header, read_server, read_service, write_command, write_servers_of, write_timeouts};
use super::{COMMANDS_MAX, Command, Server, Service, ServiceId, Timeouts};
use crate::netlink::{ACK, DUMP, REQUEST, Socket, generic_family, message};

/// Why IPVS did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum IpvsError {
    /// The kernel has no IPVS, and no module of it.
    #[error("this kernel has no IPVS: load the module ip_vs")]
    Missing,
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

/// A command that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot do {command:?} in IPVS: {source}")]
pub struct Refusal {
    /// What it refused.
    pub command: Command,
    /// The kernel's error.
    #[source]
    pub source: io::Error,
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
        match generic_family(&mut socket, "IPVS").map_err(ask_error("ask for IPVS"))? {
            Some(family) => Ok(Self { socket, family }),
            None => Err(IpvsError::Missing),
        }
    }

    /// Does the commands in their order; returns those that the kernel refused, which does not keep it from the others.
    ///
    /// # Errors
    /// [`IpvsError::Ask`] when the kernel does not answer.
    pub fn run(&mut self, commands: &[Command]) -> Result<Vec<Refusal>, IpvsError> {
        let mut refusals = Vec::new();
        for chunk in commands.chunks(COMMANDS_MAX) {
            self.run_chunk(chunk, &mut refusals).map_err(ask_error("send commands to IPVS"))?;
        }
        Ok(refusals)
    }

    fn run_chunk(&mut self, commands: &[Command], refusals: &mut Vec<Refusal>) -> io::Result<()> {
        let mut datagram = Vec::new();
        let mut sequences = Vec::with_capacity(commands.len());
        for command in commands {
            let sequence = self.socket.next_sequence();
            message(&mut datagram, self.family, REQUEST | ACK, sequence, |buffer| write_command(buffer, command));
            sequences.push(sequence);
        }
        self.socket.send(&datagram)?;
        for (command, sequence) in commands.iter().zip(sequences) {
            let failures = self.socket.acknowledged(sequence, sequence)?;
            refusals.extend(
                failures
                    .into_iter()
                    .map(|failure| Refusal { command: *command, source: io::Error::from_raw_os_error(failure.errno) }),
            );
        }
        Ok(())
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
