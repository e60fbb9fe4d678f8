//! A pod's link: what `ip link`, `ip addr`, `ip route` and `ip neigh` show afterwards is decided here and nowhere else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use node_sys::{Netns, SysError, sysctl};

use crate::netlink::{LinkEnd, MacAddress, NetlinkError, NetlinkSession, Route, in_netns};

/// Name of a pod's interface, as the CNI convention and many charts expect.
pub const POD_INTERFACE: &str = "eth0";
/// The pod's IPv4 gateway: link-local, the same on every link, held by no interface; the pod knows its MAC address.
pub const GATEWAY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
/// The pod's IPv6 gateway: the link-local address of the node's end.
pub const GATEWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));
/// The node's end of every pod link. Set when the link is made: udev renames the MAC address of links that have a random one.
pub const HOST_MAC: MacAddress = MacAddress([0x02, 0x54, 0x52, 0x41, 0x4d, 0x41]);

/// A pod's link could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A netlink request failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A kernel parameter could not be set.
    #[error(transparent)]
    Sysctl(#[from] SysError),
}

/// A pod to be wired to its node.
#[derive(Debug, Clone, Copy)]
pub struct PodLink<'a> {
    /// The node's namespace.
    pub node: &'a Netns,
    /// The pod's namespace, without an interface named [`POD_INTERFACE`] yet.
    pub pod: &'a Netns,
    /// Name of the node's end: [`host_interface_name`].
    pub host_interface: &'a str,
    /// The pod's addresses, at most one per family.
    pub addresses: &'a [IpAddr],
    /// Largest packet in bytes; that of the node's uplink.
    pub mtu: u32,
}

/// The node's interface for a pod: `trama` and the first ten letters and digits of its id (the runtime's container id, or the Pod's uid).
pub fn host_interface_name(id: &str) -> String {
    let tail: String = id.chars().filter(char::is_ascii_alphanumeric).take(10).collect();
    format!("trama{tail}")
}

/// Makes the veth pair, the addresses, routes and neighbours of both ends. Traffic flows when it returns.
///
/// # Errors
/// When a request is refused, for instance because the interface exists; what had been made is removed then.
pub fn attach(link: &PodLink<'_>) -> Result<(), AttachError> {
    in_netns(link.node, async |session| {
        let result = attach_from_node(session, link).await;
        if result.is_err() && !exists_already(&result) {
            // The first error is the one worth reporting.
            let _ = session.delete_link(link.host_interface).await;
        }
        result
    })
}

/// Removes the pod's link. A link that is not there is no error, so it can be called any number of times.
///
/// # Errors
/// When the kernel refuses the removal.
pub fn detach(node: &Netns, host_interface: &str) -> Result<(), AttachError> {
    in_netns(node, async |session| Ok(session.delete_link(host_interface).await?))
}

async fn attach_from_node(session: &NetlinkSession, link: &PodLink<'_>) -> Result<(), AttachError> {
    let pod_mac = pod_mac(link.addresses);
    let host_end = LinkEnd { name: link.host_interface, netns: None, mac: Some(HOST_MAC), mtu: link.mtu };
    let pod_end = LinkEnd { name: POD_INTERFACE, netns: Some(link.pod), mac: Some(pod_mac), mtu: link.mtu };
    session.add_veth(host_end, pod_end).await?;
    prepare_ipv6(link.host_interface, link.addresses)?;
    let host = session.link(link.host_interface).await?;
    session.set_up(host).await?;
    if link.addresses.iter().any(IpAddr::is_ipv6) {
        session.add_address(host, IpNet::new_assert(GATEWAY_V6, 64)).await?;
    }
    in_netns(link.pod, async |pod| wire_pod(pod, link.addresses).await)?;
    for &address in link.addresses {
        session.set_route(Route { to: IpNet::from(address), via: None, interface: host }).await?;
        session.add_neighbour(host, address, pod_mac).await?;
    }
    Ok(())
}

async fn wire_pod(session: &NetlinkSession, addresses: &[IpAddr]) -> Result<(), AttachError> {
    prepare_ipv6(POD_INTERFACE, addresses)?;
    let loopback = session.link("lo").await?;
    session.set_up(loopback).await?;
    let interface = session.link(POD_INTERFACE).await?;
    session.set_up(interface).await?;
    for &address in addresses {
        session.add_address(interface, IpNet::from(address)).await?;
        let (gateway, everywhere) = gateway_for(address);
        session.add_neighbour(interface, gateway, HOST_MAC).await?;
        session.set_route(Route { to: IpNet::from(gateway), via: None, interface }).await?;
        session.set_route(Route { to: everywhere, via: Some(gateway), interface }).await?;
    }
    Ok(())
}

/// No duplicate address detection: the addresses are ours to give, and a pod must not wait a second for its first packet. No router
/// advertisements: any pod could send them. Link-local addresses only where we set them.
fn prepare_ipv6(interface: &str, addresses: &[IpAddr]) -> Result<(), SysError> {
    if !addresses.iter().any(IpAddr::is_ipv6) {
        return Ok(());
    }
    for (key, value) in [("accept_dad", "0"), ("accept_ra", "0"), ("addr_gen_mode", "1")] {
        sysctl::write(&format!("net/ipv6/conf/{interface}/{key}"), value)?;
    }
    Ok(())
}

fn gateway_for(address: IpAddr) -> (IpAddr, IpNet) {
    match address {
        IpAddr::V4(_) => (GATEWAY_V4, IpNet::V4(Ipv4Net::default())),
        IpAddr::V6(_) => (GATEWAY_V6, IpNet::V6(Ipv6Net::default())),
    }
}

/// Locally administered and taken from the first address, so that the node's neighbour entry is known before the link exists.
fn pod_mac(addresses: &[IpAddr]) -> MacAddress {
    let [a, b, c, d] = match addresses.first() {
        Some(IpAddr::V4(address)) => address.octets(),
        Some(IpAddr::V6(address)) => {
            let [.., a, b, c, d] = address.octets();
            [a, b, c, d]
        }
        None => [0; 4],
    };
    MacAddress([0x0a, 0x58, a, b, c, d])
}

/// A link of that name belongs to someone else; only our own may be removed after a failure.
fn exists_already(result: &Result<(), AttachError>) -> bool {
    match result {
        Err(AttachError::Netlink(NetlinkError::Request { action: "add veth pair", source, .. })) => {
            source.kind() == std::io::ErrorKind::AlreadyExists
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::time::Duration;

    fn pair() -> (Netns, Netns, [IpAddr; 2]) {
        let (node, pod) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
        (node, pod, ["10.244.1.5".parse().unwrap(), "fd00:10:244:1::5".parse().unwrap()])
    }

    #[test]
    fn a_pod_is_reached_at_once_in_both_families_and_gone_after_detach() {
        let (node, pod, addresses) = pair();
        let link = PodLink { node: &node, pod: &pod, host_interface: "tramatest", addresses: &addresses, mtu: 1500 };
        attach(&link).unwrap();
        // The node needs an address of its own to speak from.
        in_netns(&node, async |session| -> Result<(), NetlinkError> {
            let lo = session.link("lo").await?;
            session.set_up(lo).await?;
            session.add_address(lo, "172.18.0.11/32".parse().unwrap()).await?;
            session.add_address(lo, "fd00:172:18::11/128".parse().unwrap()).await
        })
        .unwrap();
        for address in addresses {
            let listener = pod.run(|| TcpListener::bind((address, 7)).unwrap()).unwrap();
            let client =
                node.run(|| TcpStream::connect_timeout(&(address, 7).into(), Duration::from_secs(2)).unwrap()).unwrap();
            assert_eq!(listener.accept().unwrap().1, client.local_addr().unwrap());
        }
        detach(&node, "tramatest").unwrap();
        detach(&node, "tramatest").unwrap();
        let gone = in_netns(&pod, async |session| session.find_link(POD_INTERFACE).await).unwrap();
        assert_eq!(gone, None);
    }

    #[test]
    fn a_pod_leaves_through_its_gateway() {
        let (node, pod, addresses) = pair();
        let link = PodLink { node: &node, pod: &pod, host_interface: "tramatest", addresses: &addresses, mtu: 1400 };
        attach(&link).unwrap();
        let (v4, v6) = pod
            .run(|| {
                let source = |to: &str, bind: &str| {
                    let socket = UdpSocket::bind(bind).unwrap();
                    socket.connect(to).unwrap();
                    socket.local_addr().unwrap().ip()
                };
                (source("10.96.0.1:53", "0.0.0.0:0"), source("[fd00:10:96::1]:53", "[::]:0"))
            })
            .unwrap();
        assert_eq!([v4, v6], addresses);
    }

    #[test]
    fn a_failed_attach_leaves_nothing_and_a_taken_name_is_kept() {
        let (node, pod, addresses) = pair();
        let link = PodLink { node: &node, pod: &pod, host_interface: "tramatest", addresses: &addresses, mtu: 1500 };
        attach(&link).unwrap();
        let other = Netns::anonymous().unwrap();
        assert!(attach(&PodLink { pod: &other, ..link }).is_err());
        let find = |name: &'static str| in_netns(&node, async |s| s.find_link(name).await).unwrap();
        assert!(find("tramatest").is_some());
        let twice = [addresses[0], addresses[0]];
        let broken = PodLink { pod: &other, host_interface: "tramaother", addresses: &twice, ..link };
        assert!(attach(&broken).is_err());
        assert!(find("tramaother").is_none());
    }

    #[test]
    fn names_fit_an_interface() {
        let name = host_interface_name("0f8fad5b-d9cb-469f-a165-70867728950e");
        assert_eq!(name, "trama0f8fad5bd9");
        assert!(name.len() <= 15);
    }
}
