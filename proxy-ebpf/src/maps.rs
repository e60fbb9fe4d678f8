//! Every map on one page, and the choice of maps by address family. Sizes are defaults: user space overrides them at load.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_fib_lookup, bpf_redir_neigh};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SkStorage};
use aya_ebpf::macros::btf_map;
use proxy_common::{
    Address, Affinity, AffinityKey, Backend, Counter, Flow, FlowKey, Frontend, FrontendKey, NodeAddress, NodeSettings,
    SocketAffinityKey, SocketPeers, SourceRange, V4, V6,
};

use crate::service::{Chosen, Found};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// Frontends of one family.
pub type Frontends<A> = HashMap<FrontendKey<A>, Frontend, 65536, NO_PREALLOC>;
/// Slot blocks of one family: index -> backend id.
pub type Slots = Array<u32, 524288, MMAPABLE>;
/// Backends of one family.
pub type Backends<A> = Array<Backend<A>, 262144, MMAPABLE>;
/// Flows of one family.
pub type Flows<A> = LruHashMap<FlowKey<A>, Flow<A>, 262144>;
/// Affinity of packets of one family.
pub type Affinities<A> = LruHashMap<AffinityKey<A>, Affinity, 65536>;
/// Addresses of this node, of one family; a few dozen in practice.
pub type NodeAddresses<A> = HashMap<A, NodeAddress, 1024, NO_PREALLOC>;

/// Addresses that are some Service's ClusterIP, of one family.
pub type ClusterIps<A> = HashMap<A, u32, 65536, NO_PREALLOC>;
/// Clients that may use a ServicePort's load-balancer IPs, of one family.
pub type SourceRanges<A> = LpmTrie<SourceRange<A>, u32, 65536>;

#[btf_map]
static FRONTENDS_V4: Frontends<V4> = Frontends::new();
#[btf_map]
static FRONTENDS_V6: Frontends<V6> = Frontends::new();
#[btf_map]
static SLOTS_V4: Slots = Slots::new();
#[btf_map]
static SLOTS_V6: Slots = Slots::new();
#[btf_map]
static BACKENDS_V4: Backends<V4> = Backends::new();
#[btf_map]
static BACKENDS_V6: Backends<V6> = Backends::new();
#[btf_map]
static FLOWS_V4: Flows<V4> = Flows::new();
#[btf_map]
static FLOWS_V6: Flows<V6> = Flows::new();
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
/// Interfaces by index that packets of pods arrive through; both families share it.
#[btf_map]
pub static INTERFACES: HashMap<u32, u32, 4096, NO_PREALLOC> = HashMap::new();
#[btf_map]
static NODE_V4: Array<NodeSettings<V4>, 1> = Array::new();
#[btf_map]
static NODE_V6: Array<NodeSettings<V6>, 1> = Array::new();
#[btf_map]
static SOCKETS_V4: SkStorage<SocketPeers<V4>> = SkStorage::new();
#[btf_map]
static SOCKETS_V6: SkStorage<SocketPeers<V6>> = SkStorage::new();
/// One slot a [`Counter`].
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { Counter::ALL.len() }> = PerCpuArray::new();
/// New connections by service id.
#[btf_map]
pub static SERVICE_STATS: PerCpuArray<u64, 65536> = PerCpuArray::new();

/// What one packet is worked on with. The 512 bytes of a BPF stack do not hold it for IPv6, so it lies in a per-CPU map:
/// the tc hooks run with bottom halves off, one packet at a time on a CPU.
#[repr(C)]
pub struct Scratch<A> {
    /// The packet's tuple.
    pub key: FlowKey<A>,
    /// What the tuple becomes.
    pub flow: Flow<A>,
    /// Key of a new flow's answer.
    pub reply_key: FlowKey<A>,
    /// What the answer becomes.
    pub reply: Flow<A>,
    /// The frontend of a new flow.
    pub found: Found<A>,
    /// The backend of a new flow.
    pub chosen: Chosen<A>,
    /// Route lookup.
    pub route: bpf_fib_lookup,
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
    fn slots() -> &'static Slots;
    fn backends() -> &'static Backends<Self::A>;
    fn flows() -> &'static Flows<Self::A>;
    fn affinity() -> &'static Affinities<Self::A>;
    fn node_addresses() -> &'static NodeAddresses<Self::A>;
    fn cluster_ips() -> &'static ClusterIps<Self::A>;
    fn source_ranges() -> &'static SourceRanges<Self::A>;
    fn sockets() -> &'static SkStorage<SocketPeers<Self::A>>;
    fn settings() -> Option<&'static NodeSettings<Self::A>>;
    /// This CPU's working space; only for the tc hooks.
    fn scratch() -> Option<&'static mut Scratch<Self::A>>;
}

/// The IPv4 family.
pub struct Ipv4;
/// The IPv6 family.
pub struct Ipv6;

macro_rules! family {
    ($family:ident, $address:ty, $af:literal, $frontends:ident, $slots:ident, $backends:ident, $flows:ident,
     $affinity:ident, $node_addresses:ident, $cluster_ips:ident, $source_ranges:ident, $sockets:ident, $settings:ident, $scratch:ident) => {
        impl Family for $family {
            type A = $address;
            const AF: u8 = $af;

            #[inline(always)]
            fn frontends() -> &'static Frontends<$address> {
                &$frontends
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
            fn flows() -> &'static Flows<$address> {
                &$flows
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
            fn sockets() -> &'static SkStorage<SocketPeers<$address>> {
                &$sockets
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
    SLOTS_V4,
    BACKENDS_V4,
    FLOWS_V4,
    AFFINITY_V4,
    NODE_ADDRS_V4,
    CLUSTER_IPS_V4,
    SOURCE_RANGES_V4,
    SOCKETS_V4,
    NODE_V4,
    SCRATCH_V4
);
family!(
    Ipv6,
    V6,
    10,
    FRONTENDS_V6,
    SLOTS_V6,
    BACKENDS_V6,
    FLOWS_V6,
    AFFINITY_V6,
    NODE_ADDRS_V6,
    CLUSTER_IPS_V6,
    SOURCE_RANGES_V6,
    SOCKETS_V6,
    NODE_V6,
    SCRATCH_V6
);
