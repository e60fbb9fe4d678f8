//! Keys and values of every map. ARCHITECTURE.md has the table of maps; sizes are asserted here and bytes in the tests.

mod flow;

pub use self::flow::*;

use crate::address::{Be16, Cidr, V4, V6};
use crate::pod::impl_pod;

/// Networks of pods per family that [`NodeSettings`] has room for.
pub const POD_CIDRS_MAX: usize = 8;

/// Service networks per family that [`NodeSettings`] has room for.
pub const SERVICE_CIDRS_MAX: usize = 8;

/// Virtual addresses that one unconnected socket is remembered for; the oldest is forgotten beyond that.
pub const SOCKET_PEERS_MAX: usize = 8;

/// Where a frontend listens. A zero address is the NodePort wildcard: it holds for the addresses flagged
/// [`NODE_ADDRESS_NODE_PORT`] in `node_addresses`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
#[repr(C)]
pub struct FrontendKey<A> {
    /// Virtual address; zero for NodePorts.
    pub address: A,
    /// Port.
    pub port: Be16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub padding: u8,
}

/// [`Frontend::flags`]: only clients inside the ServicePort's entries of `source_ranges` may use the frontend.
pub const FRONTEND_SOURCE_RANGES: u32 = 1;
/// [`Frontend::flags`]: the slots are a Maglev table, at the places of which flows are found by their hash.
pub const FRONTEND_MAGLEV: u32 = 2;
/// [`Frontend::flags`]: of two slots the one with fewer open flows for its weight counts; each slot holds a weight beside the id.
pub const FRONTEND_LEAST_CONNECTIONS: u32 = 4;

/// Bits of a slot that are the backend id; those above are its weight where the frontend is [`FRONTEND_LEAST_CONNECTIONS`].
pub const SLOT_ID_BITS: u32 = 24;
/// The part of a slot that is the backend id.
pub const SLOT_ID_MASK: u32 = (1 << SLOT_ID_BITS) - 1;

/// What a frontend does. Both blocks lie in `slots`; an update writes fresh blocks and then replaces this value at once.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct Frontend {
    /// ServicePort that it belongs to; every backend in its blocks carries the same id.
    pub service_id: u32,
    /// First slot of the cluster block.
    pub cluster_first: u32,
    /// Slots of the cluster block.
    pub cluster_count: u32,
    /// First slot of the local block.
    pub local_first: u32,
    /// Slots of the local block.
    pub local_count: u32,
    /// One byte an origin, see [`RuleBits`]: bits 0-7 pod, 8-15 node, 16-23 external; bits 24-31 zero.
    pub rules: u32,
    /// ClientIP affinity timeout in seconds; 0 is no affinity.
    pub affinity_seconds: u32,
    /// `FRONTEND_*` bits.
    pub flags: u32,
}

/// Where a connection comes from; selects the byte in [`Frontend::rules`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Origin {
    /// A pod of this or another node.
    Pod = 0,
    /// A socket of this node.
    Node = 1,
    /// Anything else.
    External = 2,
}

/// One origin's rule in eight bits: bits 0-1 the action, bit 2 the local block, bit 3 masquerade, bit 4 direct server return.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RuleBits(pub u8);

impl RuleBits {
    /// Send to an endpoint.
    pub const FORWARD: u8 = 0;
    /// Refuse.
    pub const REJECT: u8 = 1;
    /// Drop silently.
    pub const DROP: u8 = 2;
    const ACTION_MASK: u8 = 3;
    const LOCAL: u8 = 4;
    const MASQUERADE: u8 = 8;
    const DIRECT: u8 = 16;

    /// Packs a rule.
    pub const fn new(action: u8, local: bool, masquerade: bool) -> Self {
        let local = if local { Self::LOCAL } else { 0 };
        let masquerade = if masquerade { Self::MASQUERADE } else { 0 };
        Self((action & Self::ACTION_MASK) | local | masquerade)
    }

    /// The same with direct server return: where it would masquerade, the source is kept, and an endpoint on another node gets the packet in a
    /// tunnel and answers the client itself.
    #[must_use]
    pub const fn with_direct_return(self) -> Self {
        Self(self.0 | Self::DIRECT)
    }

    /// One of [`Self::FORWARD`], [`Self::REJECT`], [`Self::DROP`].
    #[inline(always)]
    pub const fn action(self) -> u8 {
        self.0 & Self::ACTION_MASK
    }

    /// Whether the local block is meant.
    #[inline(always)]
    pub const fn local(self) -> bool {
        self.0 & Self::LOCAL != 0
    }

    /// Whether the source becomes the node's address.
    #[inline(always)]
    pub const fn masquerade(self) -> bool {
        self.0 & Self::MASQUERADE != 0
    }

    /// Whether answers go from the endpoint's node straight to the client.
    #[inline(always)]
    pub const fn direct_return(self) -> bool {
        self.0 & Self::DIRECT != 0
    }
}

impl Frontend {
    /// The rule for `origin`.
    #[inline(always)]
    pub const fn rule(&self, origin: Origin) -> RuleBits {
        RuleBits((self.rules >> (origin as u32 * 8)) as u8)
    }

    /// First slot and length of the local block, or of the cluster block.
    #[inline(always)]
    pub const fn block(&self, local: bool) -> (u32, u32) {
        match local {
            true => (self.local_first, self.local_count),
            false => (self.cluster_first, self.cluster_count),
        }
    }

    /// Packs the rules of the three origins, in the order of [`Origin`].
    pub const fn pack_rules(rules: [RuleBits; 3]) -> u32 {
        rules[0].0 as u32 | (rules[1].0 as u32) << 8 | (rules[2].0 as u32) << 16
    }
}

/// [`Backend::state`]: the id is free, or its endpoint is gone.
pub const BACKEND_FREE: u8 = 0;
/// [`Backend::state`]: takes new flows.
pub const BACKEND_ACTIVE: u8 = 1;
/// [`Backend::state`]: keeps the flows that it has and takes no new ones.
pub const BACKEND_DRAINING: u8 = 2;
/// [`Backend::state`]: takes new flows under policy Local only, as topology hints give the node's traffic to others.
pub const BACKEND_LOCAL_ONLY: u8 = 3;

/// One endpoint of one ServicePort. Memory-mapped: user space writes all other fields before `state`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct Backend<A> {
    /// Address.
    pub address: A,
    /// Port.
    pub port: Be16,
    /// One of `BACKEND_*`.
    pub state: u8,
    /// 1 for an endpoint on this node, else 0: only such a one may be the very pod that connects.
    pub local: u8,
    /// ServicePort that it belongs to: a reader that followed a stale slot notices here.
    pub service_id: u32,
    /// Grows whenever the id is given to another endpoint or taken from one.
    pub generation: u32,
}

impl<A> Backend<A> {
    /// Whether it takes new flows, under one policy at least.
    #[inline(always)]
    pub const fn takes_flows(&self) -> bool {
        self.state == BACKEND_ACTIVE || self.state == BACKEND_LOCAL_ONLY
    }
}

/// What follows the prefix length in the key of `source_ranges`: a client network of one ServicePort. All 32 bits of the id
/// are part of every prefix.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
#[repr(C)]
pub struct SourceRange<A> {
    /// ServicePort.
    pub service_id: u32,
    /// Network address, host bits clear; the client's address in a lookup.
    pub client: A,
}

/// Bits of [`SourceRange::service_id`], which every prefix length counts.
pub const SOURCE_RANGE_ID_BITS: u32 = 32;

/// Value of `interfaces`: packets that arrive through the interface are pods'.
pub const INTERFACE_POD: u32 = 1;
/// Value of `interfaces`: other nodes' tunnels may end here.
pub const INTERFACE_TUNNELS: u32 = 2;
/// Above this many bits of a value of `interfaces`: the number of the network namespace at the interface's other end, plus 1; 0 where there is
/// none, or nobody knows it.
pub const INTERFACE_NAMESPACE_SHIFT: u32 = 8;

/// Key of `endpoints`, whose value is a backend id: which endpoint of a ServicePort a tunnel to an address of this node's leads to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
#[repr(C)]
pub struct EndpointKey<A> {
    /// The endpoint's address.
    pub address: A,
    /// ServicePort.
    pub service_id: u32,
}

/// Value of `cluster_ips`: the address is some Service's.
pub const CLUSTER_IP_IN_USE: u32 = 1;

/// Value of `service_stats`, one a CPU: what was done for a ServicePort.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct ServiceStats {
    /// Packets that were translated, both directions; one that a device is to cut counts once.
    pub packets: u64,
    /// Their bytes, link-layer headers included.
    pub bytes: u64,
    /// Connections: flows that packets opened, and sockets that were translated.
    pub connections: u64,
}

/// ServicePorts that are counted one by one: those whose id is not greater. Ids are given lowest first.
pub const COUNTED_SERVICES_MAX: u32 = 32_768;

/// Backends of a family whose connections are counted one by one: those whose id is less. Ids are given lowest first.
pub const COUNTED_BACKENDS_MAX: u32 = 65_536;

/// Key of `affinity`: who holds on to a backend of which ServicePort.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct AffinityKey<A> {
    /// Client address.
    pub client: A,
    /// ServicePort.
    pub service_id: u32,
}

/// Key of `affinity_sockets`: all sockets of a network namespace are one client.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct SocketAffinityKey {
    /// Cookie of the socket's network namespace.
    pub netns_cookie: u64,
    /// ServicePort.
    pub service_id: u32,
    /// Zero.
    pub padding: u32,
}

/// Value of the affinity maps.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct Affinity {
    /// Backend that was chosen.
    pub backend_id: u32,
    /// Its generation then.
    pub backend_generation: u32,
    /// Seconds of the coarse monotonic clock at the last new connection.
    pub last_used_seconds: u32,
    /// Zero.
    pub padding: u32,
}

/// One translation that a socket made.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct SocketPeer<A> {
    /// Virtual address that the application named.
    pub frontend: A,
    /// Address that the datagrams go to.
    pub backend: A,
    /// Port that the application named.
    pub frontend_port: Be16,
    /// Port that the datagrams go to; 0 marks an unused entry.
    pub backend_port: Be16,
    /// Backend chosen.
    pub backend_id: u32,
    /// Its generation then.
    pub backend_generation: u32,
}

/// Element of `connected`: the last connect() of the socket that has this place.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct ConnectedPeer<A> {
    /// Cookie of the socket; 0 marks a free place.
    pub cookie: u64,
    /// Where it is connected to.
    pub peer: SocketPeer<A>,
    /// Zero.
    pub padding: u32,
}

/// Places of `connected`, a power of two. A socket whose place is another's is remembered in its storage.
pub const CONNECTED_PLACES: u32 = 65_536;

/// The place of a socket: cookies are given out one after the other.
#[inline(always)]
pub const fn connected_place(cookie: u64) -> u32 {
    cookie as u32 % CONNECTED_PLACES
}

/// Socket storage: what recvmsg() and getpeername() have to turn back.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct SocketPeers<A> {
    /// The translations, in no order.
    pub peers: [SocketPeer<A>; SOCKET_PEERS_MAX],
    /// Entry that is overwritten next.
    pub next: u32,
}

/// [`NodeAddress::flags`]: an address of this node.
pub const NODE_ADDRESS_LOCAL: u32 = 1;
/// [`NodeAddress::flags`]: NodePorts answer on it.
pub const NODE_ADDRESS_NODE_PORT: u32 = 2;

/// Value of `node_addresses`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(C)]
pub struct NodeAddress {
    /// `NODE_ADDRESS_*` bits.
    pub flags: u32,
}

/// [`NodeSettings::flags`]: what arrives through an interface in `interfaces` is a pod's; `pod_cidrs` is empty.
pub const NODE_PODS_BY_INTERFACE: u32 = 1;
/// [`NodeSettings::flags`]: NodePorts answer the node's own sockets on its loopback addresses.
pub const NODE_LOOPBACK_NODE_PORTS: u32 = 2;
/// [`NodeSettings::flags`]: some ClusterIPs lie outside of `service_cidrs`.
pub const NODE_CLUSTER_IPS_ANYWHERE: u32 = 4;
/// [`NodeSettings::flags`]: tunnels to other nodes are GUE; else IPIP or its kind for IPv6.
pub const NODE_TUNNELS_ARE_GUE: u32 = 8;
/// [`NodeSettings::flags`]: some frontend with direct server return has a Maglev table, which finds the endpoint of any packet.
pub const NODE_DIRECT_TABLES: u32 = 16;
/// [`NodeSettings::flags`]: a proxy before this one has given the node the addresses of Services, and sends from them: what comes to one at a
/// port that no Service has is left to the kernel.
pub const NODE_HAS_CLUSTER_IPS: u32 = 32;

/// Ticks of the kernel's clock within which new flows are counted for [`NodeSettings::flood_limit`]: 64 to 640 ms, as the kernel is built.
pub const FLOOD_TICKS: u32 = 64;

/// The node's own facts for one family; the only value of `node_settings`.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct NodeSettings<A> {
    /// Source of masqueraded packets; zero where there is none.
    pub masquerade: A,
    /// Lowest source port of masqueraded flows, host byte order.
    pub source_port_min: u16,
    /// Highest source port of masqueraded flows, host byte order.
    pub source_port_max: u16,
    /// Lowest NodePort that is programmed, host byte order; above the maximum when there is none.
    pub node_port_min: u16,
    /// Highest NodePort that is programmed, host byte order.
    pub node_port_max: u16,
    /// `NODE_*` bits.
    pub flags: u32,
    /// New flows with direct server return that a CPU remembers within [`FLOOD_TICKS`]; beyond, those with a Maglev table are not. 0 is no
    /// limit.
    pub flood_limit: u32,
    /// Cookie of the node's network namespace, low half first: its sockets are the node's, all others pods'.
    pub netns_cookie: [u32; 2],
    /// Entries in use of `pod_cidrs`.
    pub pod_cidr_count: u32,
    /// What counts as a pod's address.
    pub pod_cidrs: [Cidr<A>; POD_CIDRS_MAX],
    /// Entries in use of `service_cidrs`.
    pub service_cidr_count: u32,
    /// Where ClusterIPs come from: what is no Service's there answers nobody.
    pub service_cidrs: [Cidr<A>; SERVICE_CIDRS_MAX],
}

impl_pod! {
    FrontendKey<V4> = 4 + 2 + 1 + 1,
    FrontendKey<V6> = 16 + 2 + 1 + 1,
    Frontend = 8 * 4,
    Backend<V4> = 4 + 2 + 1 + 1 + 4 + 4,
    Backend<V6> = 16 + 2 + 1 + 1 + 4 + 4,
    ServiceStats = 3 * 8,
    AffinityKey<V4> = 4 + 4,
    AffinityKey<V6> = 16 + 4,
    SocketAffinityKey = 8 + 4 + 4,
    Affinity = 4 * 4,
    SocketPeer<V4> = 4 + 4 + 2 + 2 + 4 + 4,
    SocketPeer<V6> = 16 + 16 + 2 + 2 + 4 + 4,
    ConnectedPeer<V4> = 8 + 20 + 4,
    ConnectedPeer<V6> = 8 + 44 + 4,
    SocketPeers<V4> = 8 * 20 + 4,
    SocketPeers<V6> = 8 * 44 + 4,
    NodeAddress = 4,
    NodeSettings<V4> = 4 + 4 * 2 + 4 + 4 + 8 + 4 + 8 * 8 + 4 + 8 * 8,
    NodeSettings<V6> = 16 + 4 * 2 + 4 + 4 + 8 + 4 + 8 * 32 + 4 + 8 * 32,
    EndpointKey<V4> = 4 + 4,
    EndpointKey<V6> = 16 + 4,
    SourceRange<V4> = 4 + 4,
    SourceRange<V6> = 4 + 16,
}

#[cfg(test)]
mod golden;
