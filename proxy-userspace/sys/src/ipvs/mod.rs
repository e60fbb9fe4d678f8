//! IPVS over generic netlink: virtual services that are known by firewall marks, their real servers, and timeouts.
//!
//! Numbers are those of include/uapi/linux/ip_vs.h and include/uapi/linux/genetlink.h. Needs `CAP_NET_ADMIN` and `ip_vs`, which
//! the kernel loads by itself when the family is asked for. Everything belongs to the network namespace of the thread that
//! opened the connection.
mod codec;
mod connection;
mod remembered;
#[cfg(test)]
mod tests;

pub use connection::{Ipvs, IpvsError, Refusal};
pub use remembered::{Remembered, remembered};

use std::net::SocketAddr;

/// Commands of one datagram at most: the kernel answers all of them before the first answer is read, into a buffer of 200 KiB.
const COMMANDS_MAX: usize = 64;

/// How a virtual service chooses among its real servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scheduler {
    /// Round robin.
    #[default]
    RoundRobin,
    /// Fewest connections.
    LeastConnections,
    /// By a hash of the destination address.
    DestinationHash,
    /// By a hash of the source address.
    SourceHash,
    /// Shortest expected delay.
    ShortestDelay,
    /// Shortest expected delay, an idle server first.
    NeverQueue,
    /// Round robin by weight.
    WeightedRoundRobin,
    /// Fewest connections by weight.
    WeightedLeastConnections,
    /// Maglev hashing by source address and port.
    Maglev,
    /// By destination address to the same server, unless it has more connections than its weight.
    LocalityLeastConnections,
    /// The same with a set of servers for each destination.
    LocalityLeastConnectionsReplicated,
    /// The server of the greatest weight.
    Failover,
    /// The server of the greatest weight, until it has as many connections.
    Overflow,
    /// The less busy of two at random.
    TwoChoices,
}

impl Scheduler {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::RoundRobin,
        Self::LeastConnections,
        Self::DestinationHash,
        Self::SourceHash,
        Self::ShortestDelay,
        Self::NeverQueue,
        Self::WeightedRoundRobin,
        Self::WeightedLeastConnections,
        Self::Maglev,
        Self::LocalityLeastConnections,
        Self::LocalityLeastConnectionsReplicated,
        Self::Failover,
        Self::Overflow,
        Self::TwoChoices,
    ];

    /// The kernel's name, which is ipvsadm(8)'s and kube-proxy's.
    pub fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "rr",
            Self::LeastConnections => "lc",
            Self::DestinationHash => "dh",
            Self::SourceHash => "sh",
            Self::ShortestDelay => "sed",
            Self::NeverQueue => "nq",
            Self::WeightedRoundRobin => "wrr",
            Self::WeightedLeastConnections => "wlc",
            Self::Maglev => "mh",
            Self::LocalityLeastConnections => "lblc",
            Self::LocalityLeastConnectionsReplicated => "lblcr",
            Self::Failover => "fo",
            Self::Overflow => "ovf",
            Self::TwoChoices => "twos",
        }
    }

    /// The scheduler of this name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scheduler| scheduler.name() == name)
    }

    /// `IP_VS_SVC_F_SCHED2`: Maglev hashes the port too, as kube-proxy asks it to.
    fn flags(self) -> u32 {
        if self == Self::Maglev { 0x10 } else { 0 }
    }
}

/// Address family of a virtual service, with the kernel's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum Family {
    /// `AF_INET`.
    Ipv4 = 2,
    /// `AF_INET6`.
    Ipv6 = 10,
}

impl Family {
    /// Length of the mask that makes every client its own.
    fn full_mask(self) -> u32 {
        match self {
            // As an address, in network byte order; it reads the same in both.
            Self::Ipv4 => u32::MAX,
            Self::Ipv6 => 128,
        }
    }
}

/// A virtual service that takes packets with a firewall mark, whatever their destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceId {
    /// Its family.
    pub family: Family,
    /// The whole mark of its packets; never 0.
    pub mark: u32,
}

/// Where a virtual service takes packets that is known by address, as kube-proxy's are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceAddress {
    /// 6, 17 or 132.
    pub protocol: u8,
    /// Address and port.
    pub address: SocketAddr,
}

/// A virtual service that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// The mark that it takes; `None` for one that takes an address and port.
    pub id: Option<ServiceId>,
    /// The address and port that it takes; `None` for one that takes a mark.
    pub address: Option<ServiceAddress>,
    /// Name of its scheduler.
    pub scheduler: String,
}

/// A real server of a virtual service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Server {
    /// Where its connections go, by NAT.
    pub address: SocketAddr,
    /// Its share of new connections; 0 is none, while its connections go on.
    pub weight: u32,
    /// Connections that it has in the kernel's table, established and otherwise. Only read.
    pub connections: u32,
}

/// A change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Makes a virtual service without servers.
    AddService(ServiceId, Scheduler),
    /// Changes the scheduler of one.
    SetScheduler(ServiceId, Scheduler),
    /// Removes one with its servers.
    DeleteService(ServiceId),
    /// The same by its address.
    DeleteServiceAt(ServiceAddress),
    /// Adds a server with this weight.
    AddServer(ServiceId, SocketAddr, u32),
    /// Changes the weight of one.
    SetWeight(ServiceId, SocketAddr, u32),
    /// Removes one; its connections are no longer served.
    DeleteServer(ServiceId, SocketAddr),
}

/// How long a connection without packets is remembered, in seconds; 0 leaves what is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timeouts {
    /// Established TCP.
    pub tcp: u32,
    /// TCP after a FIN.
    pub tcp_fin: u32,
    /// UDP.
    pub udp: u32,
}

/// Reads a message as one about a service, and as one about a server.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzzing(body: &[u8]) {
    let _service = codec::read_service(body);
    let _servers = [Family::Ipv4, Family::Ipv6].map(|family| codec::read_server(body, family));
}
