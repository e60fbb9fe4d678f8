//! What a decision asks for, from the kernel's maps; the decision itself is in `proxy_common::decide`.

use core::marker::PhantomData;

use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use proxy_common::decide::{Client, Tables};
use proxy_common::{
    Affinity, AffinityKey, BACKEND_FREE, Backend, Frontend, FrontendKey, INTERFACE_POD, NodeSettings,
    SOURCE_RANGE_ID_BITS, SocketAffinityKey, SourceRange, absent_place,
};

use crate::left;
use crate::maps::{AFFINITY_SOCKETS, Family, INTERFACES};

const NANOSECONDS_PER_SECOND: u64 = 1_000_000_000;

/// The maps of a family, as a decision reads them.
pub struct Maps<F>(PhantomData<F>);

impl<F: Family> Maps<F> {
    /// There is nothing in it: every map has a name.
    pub const NEW: Self = Self(PhantomData);
}

/// Whether nothing is known of an address: it is no frontend's, no ClusterIP and none of the node's.
#[inline(always)]
pub fn is_absent<F: Family>(address: &F::A) -> bool {
    let (word, bit) = absent_place(address);
    F::absent().get(word).is_some_and(|bits| *bits >> bit & 1 != 0)
}

impl<F: Family> Tables for Maps<F> {
    type A = F::A;
    type Client<'a>
        = PacketClient<F>
    where
        F: 'a;

    #[inline(always)]
    fn may_be_known(&self, address: &F::A) -> bool {
        !is_absent::<F>(address)
    }

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey<F::A>, into: &mut Frontend) -> bool {
        // SAFETY: copied at once. The kernel replaces whole elements, so the copy is one version or the other.
        match unsafe { F::frontends().get(key) } {
            Some(frontend) => {
                *into = *frontend;
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn settings(&self) -> Option<&NodeSettings<F::A>> {
        F::settings()
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<u32> {
        F::slots().get(index).copied()
    }

    #[inline(always)]
    fn backend(&self, id: u32, into: &mut Backend<F::A>) -> bool {
        match F::backends().get(id) {
            Some(backend) => {
                *into = *backend;
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn live(&self, id: u32, generation: u32, into: &mut Backend<F::A>) -> bool {
        match live::<F>(id, generation) {
            Some(backend) => {
                *into = *backend;
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn open_flows(&self, id: u32) -> u32 {
        F::loads().get(id).map_or(0, |load| load.open)
    }

    #[inline(always)]
    fn node_address_flags(&self, address: &F::A) -> u32 {
        // SAFETY: the reference is used before any update of the map.
        unsafe { F::node_addresses().get(address) }.map_or(0, |node| node.flags)
    }

    #[inline(always)]
    fn cluster_ip_in_use(&self, address: &F::A) -> bool {
        // SAFETY: nothing of the value is used.
        unsafe { F::cluster_ips().get(address) }.is_some()
    }

    #[inline(always)]
    fn source_range(&self, client: &SourceRange<F::A>) -> bool {
        let bits = SOURCE_RANGE_ID_BITS + size_of::<F::A>() as u32 * 8;
        F::source_ranges().get(&Key::new(bits, *client)).is_some()
    }

    #[inline(always)]
    fn is_pod_interface(&self, index: u32) -> bool {
        // SAFETY: read at once.
        unsafe { INTERFACES.get(&index) }.is_some_and(|kinds| kinds & INTERFACE_POD != 0)
    }

    #[inline(always)]
    fn left_by_socket(&self, key: &FrontendKey<F::A>) -> Option<(u32, u32)> {
        left::take::<F>(key)
    }

    #[inline(always)]
    fn client(&self, source: &F::A) -> PacketClient<F> {
        PacketClient(*source)
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no arguments.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn now_seconds(&self) -> u32 {
        // SAFETY: no arguments.
        unsafe { (bpf_ktime_get_coarse_ns() / NANOSECONDS_PER_SECOND) as u32 }
    }
}

/// The backend behind an id, if it still is the one that the generation names and keeps the flows that it has.
#[inline(always)]
pub fn live<F: Family>(id: u32, generation: u32) -> Option<&'static Backend<F::A>> {
    let backend = F::backends().get(id)?;
    if backend.generation == generation && backend.state != BACKEND_FREE { Some(backend) } else { None }
}

/// A packet's source address.
pub struct PacketClient<F: Family>(pub F::A);

impl<F: Family> Client for PacketClient<F> {
    #[inline(always)]
    fn recall(&self, service_id: u32) -> Option<&Affinity> {
        let key = AffinityKey { client: self.0, service_id };
        // SAFETY: read before the map is updated.
        unsafe { F::affinity().get(&key) }
    }

    #[inline(always)]
    fn remember(&self, service_id: u32, affinity: &Affinity) {
        let key = AffinityKey { client: self.0, service_id };
        // A failed insert costs the client its affinity, never its connection.
        let _lost = F::affinity().insert(&key, affinity, 0);
    }
}

/// A socket's network namespace, by cookie.
pub struct SocketClient(pub u64);

impl Client for SocketClient {
    #[inline(always)]
    fn recall(&self, service_id: u32) -> Option<&Affinity> {
        let key = SocketAffinityKey { netns_cookie: self.0, service_id, padding: 0 };
        // SAFETY: read before the map is updated.
        unsafe { AFFINITY_SOCKETS.get(&key) }
    }

    #[inline(always)]
    fn remember(&self, service_id: u32, affinity: &Affinity) {
        let key = SocketAffinityKey { netns_cookie: self.0, service_id, padding: 0 };
        // As above.
        let _lost = AFFINITY_SOCKETS.insert(&key, affinity, 0);
    }
}
