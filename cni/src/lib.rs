//! trama-cni wires a pod's network namespace to its node: one veth pair, one host route per address, no bridge and no ARP.
//!
//! ```text
//!   pod namespace                      node namespace
//!   eth0 10.244.1.5/32 ------ veth --- tramaXXXX   fe80::1
//!   default via 169.254.1.1            10.244.1.5/32 dev tramaXXXX
//!   default via fe80::1                fd00:10:244:1::5/128 dev tramaXXXX
//! ```
//! Invariants: a failed [`attach`] leaves nothing behind; [`detach`] may be called any number of times; nothing that this crate did
//! not make is changed. Needs `CAP_NET_ADMIN` in both namespaces and `CAP_SYS_ADMIN` to enter them. Start reading at [`attach`].
#![forbid(unsafe_code)]

mod attach;
mod netlink;

pub use attach::{
    AttachError, GATEWAY_V4, GATEWAY_V6, HOST_MAC, POD_INTERFACE, PodLink, attach, detach, host_interface_name,
};
pub use netlink::{LinkEnd, MacAddress, NetlinkError, NetlinkSession, Route, in_netns};
