//! From a destination to a backend: frontend, rule, affinity, choice.

use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use proxy_common::select::pick;
use proxy_common::{
    Address, Affinity, AffinityKey, BACKEND_ACTIVE, Backend, Be16, Cidr, Frontend, FrontendKey, NODE_ADDRESS_LOCAL,
    NODE_ADDRESS_NODE_PORT, NODE_CLUSTER_IPS_ANYWHERE, NODE_LOOPBACK_NODE_PORTS, RuleBits, SOURCE_RANGE_ID_BITS,
    SocketAffinityKey, SourceRange,
};

use crate::maps::{AFFINITY_SOCKETS, Family};

const NANOSECONDS_PER_SECOND: u64 = 1_000_000_000;

/// A frontend and the key under which it was found.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Found<A> {
    /// The key, to read the frontend again.
    pub key: FrontendKey<A>,
    /// A copy: one consistent view for the whole decision.
    pub frontend: Frontend,
}

/// A backend and its id.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Chosen<A> {
    /// Index into `backends`.
    pub id: u32,
    /// A copy of the entry.
    pub backend: Backend<A>,
}

/// Finds the frontend of a destination: the exact address first, then the NodePorts of this node's addresses.
///
/// `own_loopback` says that the address is a loopback one of the node itself, where NodePorts may answer too.
///
/// Results of this module are written where the caller says: returned by value they would be copied on the small stack.
#[inline(always)]
pub fn find<F: Family>(address: &F::A, port: Be16, protocol: u8, own_loopback: bool, found: &mut Found<F::A>) -> bool {
    found.key = FrontendKey { address: *address, port, protocol, padding: 0 };
    if read::<F>(found) {
        return true;
    }
    let Some(settings) = F::settings() else { return false };
    let host_port = port.to_host();
    if host_port < settings.node_port_min || host_port > settings.node_port_max {
        return false;
    }
    let answers = match own_loopback {
        true => settings.flags & NODE_LOOPBACK_NODE_PORTS != 0,
        false => node_address_flags::<F>(address) & NODE_ADDRESS_NODE_PORT != 0,
    };
    if !answers {
        return false;
    }
    found.key.address = F::A::default();
    read::<F>(found)
}

/// What a destination is that no frontend answers for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unserved {
    /// Nothing of ours.
    Foreign,
    /// A ClusterIP, at a port or protocol that its Service does not have: refused.
    Port,
    /// An address of the service networks that is no Service's: nobody will ever answer.
    Address,
}

/// Looks at a destination that is no frontend. Two comparisons for what lies outside of the service networks. What this node
/// has as an address of its own is left to it: a DNS cache may listen on a ClusterIP.
#[inline(always)]
pub fn unserved<F: Family>(address: &F::A) -> Unserved {
    let Some(settings) = F::settings() else { return Unserved::Foreign };
    let inside = in_networks(address, &settings.service_cidrs, settings.service_cidr_count);
    if !inside && settings.flags & NODE_CLUSTER_IPS_ANYWHERE == 0 {
        return Unserved::Foreign;
    }
    // SAFETY: nothing of the value is used.
    let in_use = unsafe { F::cluster_ips().get(address) }.is_some();
    if !inside && !in_use || node_address_flags::<F>(address) & NODE_ADDRESS_LOCAL != 0 {
        return Unserved::Foreign;
    }
    if in_use { Unserved::Port } else { Unserved::Address }
}

/// Whether one of the first `count` networks contains the address.
#[inline(always)]
pub fn in_networks<A: Address, const MAX: usize>(address: &A, networks: &[Cidr<A>; MAX], count: u32) -> bool {
    for (index, cidr) in networks.iter().enumerate() {
        if index >= count as usize {
            break;
        }
        if address.in_network(&cidr.network, &cidr.mask) {
            return true;
        }
    }
    false
}

/// Whether a ServicePort with source ranges lets this client in.
#[inline(always)]
pub fn lets_in<F: Family>(service_id: u32, client: &F::A) -> bool {
    let bits = SOURCE_RANGE_ID_BITS + size_of::<F::A>() as u32 * 8;
    let key = Key::new(bits, SourceRange { service_id, client: *client });
    F::source_ranges().get(&key).is_some()
}

/// `NODE_ADDRESS_*` bits of an address; 0 for one that is not this node's.
#[inline(always)]
pub fn node_address_flags<F: Family>(address: &F::A) -> u32 {
    // SAFETY: the reference is used before any update of the map.
    unsafe { F::node_addresses().get(address) }.map_or(0, |node| node.flags)
}

/// The backend behind an id, if it still is the one that the generation names and takes flows.
#[inline(always)]
pub fn live<F: Family>(id: u32, generation: u32) -> Option<&'static Backend<F::A>> {
    let backend = F::backends().get(id)?;
    if backend.generation == generation && backend.state == BACKEND_ACTIVE { Some(backend) } else { None }
}

/// Picks a backend for a new flow, by affinity where the service asks for it.
///
/// `false` when the block changed under us twice: an update frees a block only after a while, so once is rare already.
#[inline(always)]
pub fn select<F: Family>(
    found: &mut Found<F::A>,
    rule: RuleBits,
    client: &impl Client,
    chosen: &mut Chosen<F::A>,
) -> bool {
    if found.frontend.affinity_seconds == 0 {
        return choose::<F>(found, rule, chosen);
    }
    let service_id = found.frontend.service_id;
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_coarse_ns() / NANOSECONDS_PER_SECOND } as u32;
    let held = match client.recall(service_id) {
        Some(affinity) if !expired(affinity, now, found.frontend.affinity_seconds) => {
            held_backend::<F>(affinity, service_id, chosen)
        }
        _ => false,
    };
    if !held && !choose::<F>(found, rule, chosen) {
        return false;
    }
    let affinity = Affinity {
        backend_id: chosen.id,
        backend_generation: chosen.backend.generation,
        last_used_seconds: now,
        padding: 0,
    };
    client.remember(service_id, &affinity);
    true
}

#[inline(always)]
fn expired(affinity: &Affinity, now: u32, timeout_seconds: u32) -> bool {
    now.wrapping_sub(affinity.last_used_seconds) >= timeout_seconds
}

#[inline(always)]
fn held_backend<F: Family>(affinity: &Affinity, service_id: u32, chosen: &mut Chosen<F::A>) -> bool {
    let Some(backend) = live::<F>(affinity.backend_id, affinity.backend_generation) else { return false };
    *chosen = Chosen { id: affinity.backend_id, backend: *backend };
    chosen.backend.service_id == service_id
}

/// A random backend; reads the frontend again once if its block was replaced meanwhile.
#[inline(always)]
fn choose<F: Family>(found: &mut Found<F::A>, rule: RuleBits, chosen: &mut Chosen<F::A>) -> bool {
    random_backend::<F>(&found.frontend, rule, chosen).is_some()
        || (read::<F>(found) && random_backend::<F>(&found.frontend, rule, chosen).is_some())
}

#[inline(always)]
fn random_backend<F: Family>(frontend: &Frontend, rule: RuleBits, chosen: &mut Chosen<F::A>) -> Option<()> {
    let (first, count) = match rule.local() {
        true => (frontend.local_first, frontend.local_count),
        false => (frontend.cluster_first, frontend.cluster_count),
    };
    // SAFETY: no arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    let id = *F::slots().get(first.wrapping_add(pick(random, count)))?;
    *chosen = Chosen { id, backend: *F::backends().get(id)? };
    let backend = &chosen.backend;
    // A reused slot leads to a backend of another service: never send a packet there.
    if backend.service_id == frontend.service_id && backend.state == BACKEND_ACTIVE { Some(()) } else { None }
}

/// Reads the frontend of `found.key`.
#[inline(always)]
fn read<F: Family>(found: &mut Found<F::A>) -> bool {
    // SAFETY: copied at once. The kernel replaces whole elements, so the copy is one version or the other.
    match unsafe { F::frontends().get(&found.key) } {
        Some(frontend) => {
            found.frontend = *frontend;
            true
        }
        None => false,
    }
}

/// Who holds an affinity.
pub trait Client {
    /// The last choice for a service.
    fn recall(&self, service_id: u32) -> Option<&Affinity>;
    /// Records a choice; a full map forgets the least recently used client.
    fn remember(&self, service_id: u32, affinity: &Affinity);
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
