//! Follows the addresses and interfaces of the current network namespace through rtnetlink.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage};
use rtnetlink::{Handle, MulticastGroup, new_multicast_connection};
use tokio::sync::mpsc;
use tracing::warn;

use super::{Event, Update};
use crate::node::{HostAddresses, InterfaceAddress};

/// Pods come and go in bursts, each with an address or two: one reading serves a burst.
const SETTLE: Duration = Duration::from_millis(5);
const RETRY: Duration = Duration::from_secs(1);

/// Why the addresses can't be read.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No netlink socket.
    #[error("cannot open a route netlink socket: {0}")]
    Open(#[source] std::io::Error),
    /// A dump failed.
    #[error("cannot read {what} from the kernel: {source}")]
    Dump {
        /// Addresses or routes.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: rtnetlink::Error,
    },
}

/// Sends the addresses now and whenever they have changed. Ends when nobody listens any more.
///
/// # Errors
/// Where no netlink socket can be opened, or the first reading fails. A later failure is logged and tried again.
pub async fn follow_host(events: mpsc::Sender<Event>) -> Result<(), HostError> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    // Subscribed before the first reading, so that no change falls between the two. The connection's queue is unbounded,
    // but holds only address and link messages, and is emptied at each of them.
    let (connection, handle, mut messages) = new_multicast_connection(&groups).map_err(HostError::Open)?;
    let connection = tokio::spawn(connection);
    let mut last = read(&handle).await?;
    let mut open = events.send(Event::now(Update::Host(last.clone()))).await.is_ok();
    while open && messages.next().await.is_some() {
        tokio::time::sleep(SETTLE).await;
        while messages.try_recv().is_ok() {}
        let now = read_until_it_works(&handle).await;
        if now != last {
            open = events.send(Event::now(Update::Host(now.clone()))).await.is_ok();
            last = now;
        }
    }
    connection.abort();
    Ok(())
}

async fn read_until_it_works(handle: &Handle) -> HostAddresses {
    loop {
        match read(handle).await {
            Ok(addresses) => return addresses,
            Err(error) => warn!(%error, "keeping the node addresses known so far"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn read(handle: &Handle) -> Result<HostAddresses, HostError> {
    let what = "addresses";
    let dump = handle.address().get().execute().try_collect();
    let messages: Vec<_> = dump.await.map_err(|source| HostError::Dump { what, source })?;
    let links = links(handle).await?;
    Ok(HostAddresses {
        addresses: messages.iter().filter_map(interface_address).collect(),
        interfaces: links.iter().filter_map(|link| Some((link.header.index, interface_name(link)?))).collect(),
        ports: links.iter().filter_map(|link| Some((link.header.index, controller(link)?))).collect(),
        namespaces: links.iter().filter_map(|link| Some((link.header.index, namespace(link)?))).collect(),
        vlan_parents: links.iter().filter_map(vlan_parent).collect(),
        default_v4: default_interfaces(handle, AddressFamily::Inet).await?,
        default_v6: default_interfaces(handle, AddressFamily::Inet6).await?,
    })
}

async fn links(handle: &Handle) -> Result<Vec<LinkMessage>, HostError> {
    let what = "interfaces";
    handle.link().get().execute().try_collect().await.map_err(|source| HostError::Dump { what, source })
}

/// The bridge that an interface is a port of. The other end of a veth pair is no controller.
fn controller(message: &LinkMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    })
}

/// Number of the network namespace that the other end of a veth pair is in, as this one knows it; `None` in this one.
fn namespace(message: &LinkMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkNetNsId(number) => u32::try_from(*number).ok(),
        _ => None,
    })
}

/// The interface that a VLAN device of this namespace lies on, where that is in this one too.
fn vlan_parent(message: &LinkMessage) -> Option<u32> {
    let is_vlan = message.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Vlan))),
        _ => false,
    });
    let parent = || {
        message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Link(index) => Some(*index),
            _ => None,
        })
    };
    if is_vlan && namespace(message).is_none() { parent() } else { None }
}

fn interface_name(message: &LinkMessage) -> Option<Arc<str>> {
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(Arc::from(name.as_str())),
        _ => None,
    })
}

/// IFA_LOCAL is the address itself; IFA_ADDRESS is the peer's on a point-to-point link and stands alone for IPv6.
fn interface_address(message: &AddressMessage) -> Option<InterfaceAddress> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let plain = || {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    };
    let address: IpAddr = local.or_else(plain)?;
    let global = message.header.scope == AddressScope::Universe;
    Some(InterfaceAddress { address, interface: message.header.index, global })
}

/// Interfaces of the main table's default routes.
async fn default_interfaces(handle: &Handle, family: AddressFamily) -> Result<Vec<u32>, HostError> {
    let what = "routes";
    let mut query = RouteMessage::default();
    query.header.address_family = family;
    let mut routes = Box::pin(handle.route().get(query).execute());
    let mut interfaces = Vec::new();
    while let Some(route) = routes.try_next().await.map_err(|source| HostError::Dump { what, source })? {
        if route.header.destination_prefix_length == 0 && route.header.table == RouteHeader::RT_TABLE_MAIN {
            interfaces.extend(route.attributes.iter().flat_map(outgoing));
        }
    }
    interfaces.sort_unstable();
    interfaces.dedup();
    Ok(interfaces)
}

fn outgoing(attribute: &RouteAttribute) -> Vec<u32> {
    match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vlan_device_names_its_parent_where_that_is_here() {
        let link = |kind: InfoKind, others: &[LinkAttribute]| {
            let mut message = LinkMessage::default();
            message.attributes.extend([LinkAttribute::Link(7), LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])]);
            message.attributes.extend_from_slice(others);
            message
        };
        assert_eq!(vlan_parent(&link(InfoKind::Vlan, &[])), Some(7));
        assert_eq!(
            vlan_parent(&link(InfoKind::Vlan, &[LinkAttribute::LinkNetNsId(0)])),
            None,
            "one of that number there"
        );
        assert_eq!(vlan_parent(&link(InfoKind::Veth, &[])), None);
        assert_eq!(vlan_parent(&LinkMessage::default()), None);
    }

    #[tokio::test]
    async fn reads_the_loopback_address_of_this_namespace() {
        let (events, mut received) = super::super::channel();
        let task = tokio::spawn(follow_host(events));
        let first = tokio::time::timeout(Duration::from_secs(10), received.recv()).await.unwrap().unwrap();
        let Update::Host(host) = first.update else { panic!("{first:?}") };
        let loopback: IpAddr = "127.0.0.1".parse().unwrap();
        let entry = host.addresses.iter().find(|entry| entry.address == loopback).expect("lo is up wherever tests run");
        assert!(!entry.global);
        assert!(host.interfaces.values().any(|name| &**name == "lo"));
        task.abort();
    }
}
