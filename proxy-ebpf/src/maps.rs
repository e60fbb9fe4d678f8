//! Every map on one page, and the choice of maps by address family. Sizes are defaults: user space overrides them at load.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_fib_lookup, bpf_redir_neigh, bpf_sock_tuple};
use aya_ebpf::btf_maps::{Array, DevMapHash, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SkStorage};
use aya_ebpf::macros::btf_map;
use proxy_common::decide::{Chosen, Found};
use proxy_common::event::{EVENT_RING_BYTES, Event, MonitorSettings};
use proxy_common::flow_table::{FlowEntry, FlowHead, FlowSecret};
use proxy_common::{
    ABSENT_WORDS, Address, Affinity, AffinityKey, Backend, BackendLoad, CONNECTED_PLACES, COUNTED_BACKENDS_MAX,
    COUNTED_SERVICES_MAX, ConnectedPeer, Counter, EndpointKey, Flow, FlowCensus, FlowKey, FlowLimits, Frontend,
    FrontendKey, NodeAddress, NodeSettings, ServiceStats, SocketAffinityKey, SocketPeers, SourceRange, V4, V6,
};

use crate::decap::Tunnel;
use crate::dsr::{BackendRoute, Flood, ROUTES_MAX};
use crate::flows::{self, Flows};
use crate::fragment::{Datagram, DatagramKey, Held, HeldKey};
use crate::icmp::Quotation;
use crate::left::Left;
use crate::plan::{Parsed, Plan};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// Frontends of one family.
pub type Frontends<A> = HashMap<FrontendKey<A>, Frontend, 65536, NO_PREALLOC>;
/// What [`proxy_common::absent`] says of the addresses of one family.
pub type Absent = Array<u64, { ABSENT_WORDS as usize }, MMAPABLE>;
/// Slot blocks of one family: index -> backend id.
pub type Slots = Array<u32, 524288, MMAPABLE>;
/// Backends of one family.
pub type Backends<A> = Array<Backend<A>, 262144, MMAPABLE>;
/// Open flows by backend id, of one family.
pub type Loads = Array<BackendLoad, 262144>;
/// Connections of the backends of one family.
pub type BackendStats = PerCpuArray<u64, { COUNTED_BACKENDS_MAX as usize }>;
/// Flows of one family; the table that they make is [`Flows`].
pub type FlowEntries<A> = Array<FlowEntry<A>, 524288, MMAPABLE>;
/// Buckets of the flows of one family.
pub type FlowHeads = Array<FlowHead, 65536, MMAPABLE>;
/// Affinity of packets of one family.
pub type Affinities<A> = LruHashMap<AffinityKey<A>, Affinity, 65536>;
/// Addresses of this node, of one family; a few dozen in practice.
pub type NodeAddresses<A> = HashMap<A, NodeAddress, 1024, NO_PREALLOC>;

/// Datagrams of one family that are in fragments.
pub type Datagrams<A> = LruHashMap<DatagramKey<A>, Datagram<A>, 4096>;
/// Fragments of one family that came before the first one of their datagram.
pub type HeldFragments<A> = LruHashMap<HeldKey<A>, Held, 512>;

/// Addresses that are some Service's ClusterIP, of one family.
pub type ClusterIps<A> = HashMap<A, u32, 65536, NO_PREALLOC>;
/// Clients that may use a ServicePort's load-balancer IPs, of one family.
pub type SourceRanges<A> = LpmTrie<SourceRange<A>, u32, 65536>;
/// Endpoints of this node that tunnels of other nodes may lead to, of one family: backend ids.
pub type Endpoints<A> = HashMap<EndpointKey<A>, u32, 65536, NO_PREALLOC>;

/// Connected sockets of one family.
pub type Connected<A> = Array<ConnectedPeer<A>, { CONNECTED_PLACES as usize }>;

#[btf_map]
static FRONTENDS_V4: Frontends<V4> = Frontends::new();
#[btf_map]
static FRONTENDS_V6: Frontends<V6> = Frontends::new();
#[btf_map]
static ABSENT_V4: Absent = Absent::new();
#[btf_map]
static ABSENT_V6: Absent = Absent::new();
#[btf_map]
static SLOTS_V4: Slots = Slots::new();
#[btf_map]
static SLOTS_V6: Slots = Slots::new();
#[btf_map]
static BACKENDS_V4: Backends<V4> = Backends::new();
#[btf_map]
static BACKENDS_V6: Backends<V6> = Backends::new();
#[btf_map]
static LOADS_V4: Loads = Loads::new();
#[btf_map]
static LOADS_V6: Loads = Loads::new();
/// What ends flows; only for the programs that look at all of them.
#[btf_map]
pub static FLOW_LIMITS: Array<FlowLimits, 1> = Array::new();
/// What the program that looks at all flows has found so far.
#[btf_map]
pub static FLOW_CENSUS: Array<FlowCensus, 1> = Array::new();
#[btf_map]
static FLOWS_V4: FlowEntries<V4> = FlowEntries::new();
#[btf_map]
static FLOWS_V6: FlowEntries<V6> = FlowEntries::new();
#[btf_map]
static FLOW_HEADS_V4: FlowHeads = FlowHeads::new();
#[btf_map]
static FLOW_HEADS_V6: FlowHeads = FlowHeads::new();
/// [`FlowStore::secret`](proxy_common::flow_table::FlowStore::secret) of both families.
#[btf_map]
pub static FLOW_SECRET: Array<FlowSecret, 1> = Array::new();
#[btf_map]
static AFFINITY_V4: Affinities<V4> = Affinities::new();
#[btf_map]
static AFFINITY_V6: Affinities<V6> = Affinities::new();
/// Affinity of sockets: the client is a network namespace, so one map serves both families.
#[btf_map]
pub static AFFINITY_SOCKETS: LruHashMap<SocketAffinityKey, Affinity, 65536> = LruHashMap::new();
#[btf_map]
static NODE_ADDRS_V4: NodeAddresses<V4> = NodeAddresses::new();
#[btf_map]
static NODE_ADDRS_V6: NodeAddresses<V6> = NodeAddresses::new();
#[btf_map]
static CLUSTER_IPS_V4: ClusterIps<V4> = ClusterIps::new();
#[btf_map]
static CLUSTER_IPS_V6: ClusterIps<V6> = ClusterIps::new();
#[btf_map]
static SOURCE_RANGES_V4: SourceRanges<V4> = SourceRanges::new();
#[btf_map]
static SOURCE_RANGES_V6: SourceRanges<V6> = SourceRanges::new();
#[btf_map]
static ENDPOINTS_V4: Endpoints<V4> = Endpoints::new();
#[btf_map]
static ENDPOINTS_V6: Endpoints<V6> = Endpoints::new();
/// The routes to backends that packets went to in tunnels a moment ago; both families share it.
#[btf_map]
pub static TUNNEL_ROUTES: PerCpuArray<BackendRoute, { ROUTES_MAX as usize * 2 }> = PerCpuArray::new();
/// Whether programs of a version before us open the new flows still, in tables of their own: 1, or 0. Only while ours are put in front of theirs.
#[btf_map]
pub static TAKING_OVER: Array<u32, 1> = Array::new();
/// New flows with direct server return of late; both families share it.
#[btf_map]
pub static FLOOD: PerCpuArray<Flood, 1> = PerCpuArray::new();
/// What packets of interfaces by index are: `INTERFACE_*` bits; both families share it.
#[btf_map]
pub static INTERFACES: HashMap<u32, u32, 4096, NO_PREALLOC> = HashMap::new();
/// Interfaces by index that take frames from other interfaces' XDP programs: those that carry one themselves.
#[btf_map]
pub static DEVICES: DevMapHash<256> = DevMapHash::new();
#[btf_map]
static NODE_V4: Array<NodeSettings<V4>, 1> = Array::new();
#[btf_map]
static NODE_V6: Array<NodeSettings<V6>, 1> = Array::new();
#[btf_map]
static SOCKETS_V4: SkStorage<SocketPeers<V4>> = SkStorage::new();
#[btf_map]
static CONNECTED_V4: Connected<V4> = Connected::new();
#[btf_map]
static LEFT_V4: PerCpuArray<Left<V4>, 1> = PerCpuArray::new();
#[btf_map]
static SOCKETS_V6: SkStorage<SocketPeers<V6>> = SkStorage::new();
#[btf_map]
static CONNECTED_V6: Connected<V6> = Connected::new();
#[btf_map]
static LEFT_V6: PerCpuArray<Left<V6>, 1> = PerCpuArray::new();
/// One slot a [`Counter`].
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { Counter::ALL.len() }> = PerCpuArray::new();
/// What was done for each ServicePort, by service id.
#[btf_map]
pub static SERVICE_STATS: PerCpuArray<ServiceStats, { COUNTED_SERVICES_MAX as usize + 1 }> = PerCpuArray::new();
/// Connections that each backend got, by backend id.
#[btf_map]
static BACKEND_STATS_V4: BackendStats = BackendStats::new();
#[btf_map]
static BACKEND_STATS_V6: BackendStats = BackendStats::new();
/// Whether anybody watches.
#[btf_map]
pub static MONITOR: Array<MonitorSettings, 1> = Array::new();
/// What is told to whoever watches.
#[btf_map]
pub static EVENTS: RingBuf<Event, EVENT_RING_BYTES> = RingBuf::new();

#[btf_map]
static DATAGRAMS_V4: Datagrams<V4> = Datagrams::new();
#[btf_map]
static DATAGRAMS_V6: Datagrams<V6> = Datagrams::new();
#[btf_map]
static HELD_V4: HeldFragments<V4> = HeldFragments::new();
#[btf_map]
static HELD_V6: HeldFragments<V6> = HeldFragments::new();
/// A fragment on its way into the map of those that wait; both families share it.
#[btf_map]
pub static FRAGMENT_BUFFER: PerCpuArray<Held, 1> = PerCpuArray::new();

/// What one packet is worked on with. The 512 bytes of a BPF stack do not hold it for IPv6, so it lies in a per-CPU map:
/// the tc hooks run with bottom halves off, one packet at a time on a CPU.
#[repr(C)]
pub struct Scratch<A> {
    /// The packet's tuple.
    pub key: FlowKey<A>,
    /// What the tuple becomes.
    pub flow: Flow<A>,
    /// Entry of the table that `flow` was read from.
    pub place: u32,
    /// Key of a new flow's answer.
    pub reply_key: FlowKey<A>,
    /// What the answer becomes.
    pub reply: Flow<A>,
    /// Another flow that is looked at.
    pub other: Flow<A>,
    /// The frontend of a new flow.
    pub found: Found<A>,
    /// The backend of a new flow.
    pub chosen: Chosen<A>,
    /// What the packet is.
    pub parsed: Parsed,
    /// What is left to do with the packet.
    pub plan: Plan,
    /// Of a fragment: its datagram.
    pub datagram_key: DatagramKey<A>,
    /// What is known of it.
    pub datagram: Datagram<A>,
    /// Where a fragment waits.
    pub held_key: HeldKey<A>,
    /// Where an ICMP error quotes a packet.
    pub quotation: Quotation,
    /// The tunnel that the packet came in.
    pub tunnel: Tunnel<A>,
    /// Route lookup.
    pub route: bpf_fib_lookup,
    /// Socket lookup.
    pub tuple: bpf_sock_tuple,
    /// Next hop whose link-layer address is not known yet.
    pub next_hop: bpf_redir_neigh,
}

#[btf_map]
static SCRATCH_V4: PerCpuArray<Scratch<V4>, 1> = PerCpuArray::new();
#[btf_map]
static SCRATCH_V6: PerCpuArray<Scratch<V6>, 1> = PerCpuArray::new();

/// IPv4 or IPv6 at compile time: which address type and which maps.
pub trait Family {
    /// Its addresses.
    type A: Address;
    /// `AF_INET` or `AF_INET6` of Linux.
    const AF: u8;

    fn frontends() -> &'static Frontends<Self::A>;
    fn absent() -> &'static Absent;
    fn slots() -> &'static Slots;
    fn backends() -> &'static Backends<Self::A>;
    fn loads() -> &'static Loads;
    fn backend_stats() -> &'static BackendStats;
    fn flow_entries() -> &'static FlowEntries<Self::A>;
    fn flow_heads() -> &'static FlowHeads;
    /// The family's functions of [`crate::flows`].
    fn read_flow(key: &FlowKey<Self::A>, into: &mut Flow<Self::A>) -> u32;
    fn write_flow(key: &FlowKey<Self::A>, flow: &Flow<Self::A>, replace: u32) -> u32;
    fn remove_flow(key: &FlowKey<Self::A>) -> u32;
    /// The table of flows.
    #[inline(always)]
    fn flows() -> Flows<Self>
    where
        Self: Sized,
    {
        Flows::NEW
    }
    fn datagrams() -> &'static Datagrams<Self::A>;
    fn held() -> &'static HeldFragments<Self::A>;
    fn affinity() -> &'static Affinities<Self::A>;
    fn node_addresses() -> &'static NodeAddresses<Self::A>;
    fn cluster_ips() -> &'static ClusterIps<Self::A>;
    fn source_ranges() -> &'static SourceRanges<Self::A>;
    fn endpoints() -> &'static Endpoints<Self::A>;
    fn sockets() -> &'static SkStorage<SocketPeers<Self::A>>;
    fn connected() -> &'static Connected<Self::A>;
    /// What a socket of this CPU left to its packet.
    fn left() -> Option<*mut Left<Self::A>>;
    fn settings() -> Option<&'static NodeSettings<Self::A>>;
    /// This CPU's working space; only for the tc hooks.
    fn scratch() -> Option<&'static mut Scratch<Self::A>>;
}

/// The IPv4 family.
pub struct Ipv4;
/// The IPv6 family.
pub struct Ipv6;

macro_rules! family {
    ($family:ident, $address:ty, $af:literal, $frontends:ident, $absent:ident, $slots:ident, $backends:ident, $loads:ident, $backend_stats:ident, $flows:ident,
     $flow_heads:ident, $read_flow:ident, $write_flow:ident, $remove_flow:ident, $datagrams:ident, $held:ident, $affinity:ident, $node_addresses:ident, $cluster_ips:ident, $source_ranges:ident, $endpoints:ident, $sockets:ident, $connected:ident, $left:ident, $settings:ident, $scratch:ident) => {
        impl Family for $family {
            type A = $address;
            const AF: u8 = $af;

            #[inline(always)]
            fn frontends() -> &'static Frontends<$address> {
                &$frontends
            }
            #[inline(always)]
            fn absent() -> &'static Absent {
                &$absent
            }
            #[inline(always)]
            fn slots() -> &'static Slots {
                &$slots
            }
            #[inline(always)]
            fn backends() -> &'static Backends<$address> {
                &$backends
            }
            #[inline(always)]
            fn loads() -> &'static Loads {
                &$loads
            }
            #[inline(always)]
            fn backend_stats() -> &'static BackendStats {
                &$backend_stats
            }
            #[inline(always)]
            fn flow_entries() -> &'static FlowEntries<$address> {
                &$flows
            }
            #[inline(always)]
            fn flow_heads() -> &'static FlowHeads {
                &$flow_heads
            }
            #[inline(always)]
            fn read_flow(key: &FlowKey<$address>, into: &mut Flow<$address>) -> u32 {
                // SAFETY: references are to whole values.
                unsafe { flows::$read_flow(key, into) }
            }
            #[inline(always)]
            fn write_flow(key: &FlowKey<$address>, flow: &Flow<$address>, replace: u32) -> u32 {
                // SAFETY: references are to whole values.
                unsafe { flows::$write_flow(key, flow, replace) }
            }
            #[inline(always)]
            fn remove_flow(key: &FlowKey<$address>) -> u32 {
                // SAFETY: references are to whole values.
                unsafe { flows::$remove_flow(key) }
            }
            #[inline(always)]
            fn datagrams() -> &'static Datagrams<$address> {
                &$datagrams
            }
            #[inline(always)]
            fn held() -> &'static HeldFragments<$address> {
                &$held
            }
            #[inline(always)]
            fn affinity() -> &'static Affinities<$address> {
                &$affinity
            }
            #[inline(always)]
            fn node_addresses() -> &'static NodeAddresses<$address> {
                &$node_addresses
            }
            #[inline(always)]
            fn cluster_ips() -> &'static ClusterIps<$address> {
                &$cluster_ips
            }
            #[inline(always)]
            fn source_ranges() -> &'static SourceRanges<$address> {
                &$source_ranges
            }
            #[inline(always)]
            fn endpoints() -> &'static Endpoints<$address> {
                &$endpoints
            }
            #[inline(always)]
            fn sockets() -> &'static SkStorage<SocketPeers<$address>> {
                &$sockets
            }
            #[inline(always)]
            fn connected() -> &'static Connected<$address> {
                &$connected
            }
            #[inline(always)]
            fn left() -> Option<*mut Left<$address>> {
                $left.get_ptr_mut(0)
            }
            #[inline(always)]
            fn settings() -> Option<&'static NodeSettings<$address>> {
                $settings.get(0)
            }
            #[inline(always)]
            fn scratch() -> Option<&'static mut Scratch<$address>> {
                // SAFETY: one packet at a time on a CPU, and one reference a packet; any bytes are a valid value.
                $scratch.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
            }
        }
    };
}

family!(
    Ipv4,
    V4,
    2,
    FRONTENDS_V4,
    ABSENT_V4,
    SLOTS_V4,
    BACKENDS_V4,
    LOADS_V4,
    BACKEND_STATS_V4,
    FLOWS_V4,
    FLOW_HEADS_V4,
    read_flow_v4,
    write_flow_v4,
    remove_flow_v4,
    DATAGRAMS_V4,
    HELD_V4,
    AFFINITY_V4,
    NODE_ADDRS_V4,
    CLUSTER_IPS_V4,
    SOURCE_RANGES_V4,
    ENDPOINTS_V4,
    SOCKETS_V4,
    CONNECTED_V4,
    LEFT_V4,
    NODE_V4,
    SCRATCH_V4
);
family!(
    Ipv6,
    V6,
    10,
    FRONTENDS_V6,
    ABSENT_V6,
    SLOTS_V6,
    BACKENDS_V6,
    LOADS_V6,
    BACKEND_STATS_V6,
    FLOWS_V6,
    FLOW_HEADS_V6,
    read_flow_v6,
    write_flow_v6,
    remove_flow_v6,
    DATAGRAMS_V6,
    HELD_V6,
    AFFINITY_V6,
    NODE_ADDRS_V6,
    CLUSTER_IPS_V6,
    SOURCE_RANGES_V6,
    ENDPOINTS_V6,
    SOCKETS_V6,
    CONNECTED_V6,
    LEFT_V6,
    NODE_V6,
    SCRATCH_V6
);
