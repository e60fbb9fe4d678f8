//! Route netlink inside a chosen namespace, each request with its name in the error: the only file that knows `rtnetlink`.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use futures::TryStreamExt;
use ipnet::IpNet;
use node_sys::{Netns, SysError};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

/// A request that route netlink refused.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] SysError),
    /// The netlink socket or the runtime that drives it could not be made.
    #[error("cannot open a route netlink socket: {0}")]
    Socket(#[source] io::Error),
    /// The kernel refused a request.
    #[error("cannot {action} {object}: {source}")]
    Request {
        /// What was attempted, as a verb phrase.
        action: &'static str,
        /// The object by its name.
        object: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// One end of a veth pair to be made.
#[derive(Debug, Clone, Copy)]
pub struct LinkEnd<'a> {
    /// Interface name, 1 to 15 bytes.
    pub name: &'a str,
    /// The namespace it is made in; `None` is the session's own.
    pub netns: Option<&'a Netns>,
    /// Its address; `None` lets the kernel draw one, which udev may replace later.
    pub mac: Option<MacAddress>,
    /// Largest packet in bytes.
    pub mtu: u32,
}

/// A route in the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Destination; `0.0.0.0/0` or `::/0` is the default route.
    pub to: IpNet,
    /// Gateway, taken to be on the link whether or not an address covers it; `None` makes a route of link scope.
    pub via: Option<IpAddr>,
    /// Index of the interface.
    pub interface: u32,
}

/// Runs `work` with a netlink session inside `netns`, on a thread of its own, and waits for it.
///
/// # Errors
/// When the namespace cannot be entered or the socket cannot be made; else what `work` returns.
pub fn in_netns<T: Send, E: From<NetlinkError> + Send>(
    netns: &Netns,
    work: impl AsyncFnOnce(&NetlinkSession) -> Result<T, E> + Send,
) -> Result<T, E> {
    let run = || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(NetlinkError::Socket)?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().map_err(NetlinkError::Socket)?;
            tokio::spawn(connection);
            work(&NetlinkSession { handle }).await
        })
    };
    netns.run(run).map_err(NetlinkError::Namespace)?
}

/// Route netlink requests in one namespace. Every method waits for the kernel's answer and fails with [`NetlinkError::Request`].
#[derive(Debug, Clone)]
pub struct NetlinkSession {
    handle: Handle,
}

impl NetlinkSession {
    /// Index of the interface, or `None` when there is none of that name.
    ///
    /// # Errors
    /// When the kernel refuses the request.
    pub async fn find_link(&self, name: &str) -> Result<Option<u32>, NetlinkError> {
        let mut links = self.handle.link().get().match_name(name).execute();
        match links.try_next().await {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(error) => match into_io(error) {
                error if error.raw_os_error() == Some(ENODEV) => Ok(None),
                source => Err(NetlinkError::Request { action: "find link", object: name.to_owned(), source }),
            },
        }
    }

    /// Index of the interface.
    ///
    /// # Errors
    /// When there is none of that name.
    pub async fn link(&self, name: &str) -> Result<u32, NetlinkError> {
        let missing = || NetlinkError::Request {
            action: "find link",
            object: name.to_owned(),
            source: io::ErrorKind::NotFound.into(),
        };
        self.find_link(name).await?.ok_or_else(missing)
    }

    /// Makes a veth pair; both ends are down.
    ///
    /// # Errors
    /// When a name is taken or the kernel has no veth.
    pub async fn add_veth(&self, end: LinkEnd<'_>, peer: LinkEnd<'_>) -> Result<(), NetlinkError> {
        let peer_info = InfoData::Veth(InfoVeth::Peer(describe(LinkUnspec::new_with_name(peer.name), peer).build()));
        let message = describe(LinkVeth::new(end.name, peer.name).set_info_data(peer_info), end).build();
        self.handle.link().add(message).execute().await.map_err(refused("add veth pair", end.name))
    }

    /// Makes a bridge and brings it up.
    ///
    /// # Errors
    /// When the name is taken or the kernel has no bridge.
    pub async fn add_bridge(&self, name: &str) -> Result<u32, NetlinkError> {
        let message = LinkBridge::new(name).up().build();
        self.handle.link().add(message).execute().await.map_err(refused("add bridge", name))?;
        self.link(name).await
    }

    /// Brings the interface up.
    ///
    /// # Errors
    /// When there is no such interface.
    pub async fn set_up(&self, interface: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(interface).up().build();
        self.handle.link().set(message).execute().await.map_err(refused("bring up link", interface))
    }

    /// Makes the interface a port of the bridge.
    ///
    /// # Errors
    /// When either does not exist.
    pub async fn set_bridge(&self, interface: u32, bridge: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(interface).controller(bridge).build();
        self.handle.link().set(message).execute().await.map_err(refused("attach to the bridge link", interface))
    }

    /// Removes the interface, and with one end of a veth pair the other. No such interface, no error.
    ///
    /// # Errors
    /// When the kernel refuses the request.
    pub async fn delete_link(&self, name: &str) -> Result<(), NetlinkError> {
        let Some(index) = self.find_link(name).await? else { return Ok(()) };
        match self.handle.link().del(index).execute().await.map_err(into_io) {
            // Gone in between: a namespace takes its links with it in the background.
            Err(error) if error.raw_os_error() != Some(ENODEV) => {
                Err(NetlinkError::Request { action: "delete link", object: name.to_owned(), source: error })
            }
            _ => Ok(()),
        }
    }

    /// Gives the interface an address. IPv6 addresses are usable at once: no duplicate address detection.
    ///
    /// # Errors
    /// When it has the address already.
    pub async fn add_address(&self, interface: u32, address: IpNet) -> Result<(), NetlinkError> {
        let mut request = self.handle.address().add(interface, address.addr(), address.prefix_len());
        if address.addr().is_ipv6() {
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        request.execute().await.map_err(refused("add address", address))
    }

    /// Gives the interface an address of one host and no route to it: only the kernel's local table knows it.
    ///
    /// # Errors
    /// When it has the address already.
    pub async fn add_host_address(&self, interface: u32, address: IpAddr) -> Result<(), NetlinkError> {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        let mut request = self.handle.address().add(interface, address, prefix);
        // For IPv6 the kernel would add a route of the main table too.
        let flags = AddressFlags::Noprefixroute | AddressFlags::Nodad;
        request.message_mut().attributes.push(AddressAttribute::Flags(flags));
        request.execute().await.map_err(refused("add address", address))
    }

    /// Adds the route, or replaces the one to the same destination.
    ///
    /// # Errors
    /// When the interface is down or the gateway is of the other family.
    pub async fn set_route(&self, route: Route) -> Result<(), NetlinkError> {
        let mixed = |_| NetlinkError::Request {
            action: "add route to",
            object: route.to.to_string(),
            source: io::ErrorKind::InvalidInput.into(),
        };
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .output_interface(route.interface)
            .destination_prefix(route.to.addr(), route.to.prefix_len())
            .map_err(mixed)?;
        builder = match route.via {
            Some(gateway) => builder.gateway(gateway).map_err(mixed)?.onlink(),
            None => builder.scope(RouteScope::Link),
        };
        let request = self.handle.route().add(builder.build()).replace();
        request.execute().await.map_err(refused("add route to", route.to))
    }

    /// From now on only what arrives at the interface is delivered to local addresses: what local sockets send leaves by the main
    /// table's routes, even when it is meant for an address of this namespace. Replaces the first policy rule of both families.
    ///
    /// # Errors
    /// When the rule was replaced before, or the kernel has no policy routing.
    pub async fn deliver_only_from(&self, interface: &str) -> Result<(), NetlinkError> {
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            // The kernel's own: "0: from all lookup local".
            let mut everyone = RuleMessage::default();
            everyone.header.family = family;
            everyone.header.table = TABLE_LOCAL;
            everyone.header.action = RuleAction::ToTable;
            everyone.attributes.push(RuleAttribute::Priority(0));
            let mut arriving = self.handle.rule().add().input_interface(interface).priority(0);
            let header = &mut arriving.message_mut().header;
            (header.family, header.table, header.action) = (family, TABLE_LOCAL, RuleAction::ToTable);
            arriving.execute().await.map_err(refused("add rule for", interface))?;
            self.handle.rule().del(everyone).execute().await.map_err(refused("replace rule for", interface))?;
        }
        Ok(())
    }

    /// Adds a permanent neighbour: no ARP and no neighbour discovery is ever made for it.
    ///
    /// # Errors
    /// When the interface is down.
    pub async fn add_neighbour(&self, interface: u32, address: IpAddr, mac: MacAddress) -> Result<(), NetlinkError> {
        let request = self.handle.neighbours().add(interface, address).link_layer_address(&mac.0).replace();
        request.execute().await.map_err(refused("add neighbour", address))
    }
}

/// `RT_TABLE_LOCAL`: rtnetlink.h.
const TABLE_LOCAL: u8 = 255;
/// `ENODEV`, "no such device": errno-base.h.
const ENODEV: i32 = 19;

fn describe<T>(builder: LinkMessageBuilder<T>, end: LinkEnd<'_>) -> LinkMessageBuilder<T> {
    let mut builder = builder.mtu(end.mtu);
    if let Some(mac) = end.mac {
        builder = builder.address(mac.0.to_vec());
    }
    if let Some(netns) = end.netns {
        builder = builder.setns_by_fd(netns.as_fd().as_raw_fd());
    }
    builder
}

fn into_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

fn refused(action: &'static str, object: impl fmt::Display) -> impl FnOnce(rtnetlink::Error) -> NetlinkError {
    move |error| NetlinkError::Request { action, object: object.to_string(), source: into_io(error) }
}
