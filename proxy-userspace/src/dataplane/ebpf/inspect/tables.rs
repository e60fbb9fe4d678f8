//! The decision's tables over the pinned maps: read, never written.

use std::cell::{Cell, RefCell};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, MapData, MapError};
use proxy_common::decide::{Client, Step, Tables};
use proxy_common::{
    Affinity, AffinityKey, BACKEND_FREE, Backend, Frontend, FrontendKey, INTERFACE_POD, NodeAddress, NodeSettings,
    SOURCE_RANGE_ID_BITS, SourceRange,
};

use super::super::encode::UserAddress;
use super::{InspectError, Pinned, absent, map_error};

/// The maps of one family, and what a decision asked of them.
pub(super) struct PinnedTables<A: UserAddress>
where
    FrontendKey<A>: aya::Pod,
    NodeSettings<A>: aya::Pod,
    Backend<A>: aya::Pod,
    SourceRange<A>: aya::Pod,
    AffinityKey<A>: aya::Pod,
{
    frontends: HashMap<MapData, FrontendKey<A>, Frontend>,
    slots: Array<MapData, u32>,
    backends: Array<MapData, Backend<A>>,
    node_addresses: HashMap<MapData, A, NodeAddress>,
    cluster_ips: HashMap<MapData, A, u32>,
    source_ranges: LpmTrie<MapData, SourceRange<A>, u32>,
    interfaces: HashMap<MapData, u32, u32>,
    affinity: HashMap<MapData, AffinityKey<A>, Affinity>,
    settings: NodeSettings<A>,
    /// What is said when a random number is wanted.
    random: Cell<u32>,
    now_seconds: u32,
    asked: RefCell<Vec<Asked<A>>>,
    failed: RefCell<Option<InspectError>>,
}

/// What a decision did, in order.
#[derive(Debug, Clone, Copy)]
pub(super) enum Asked<A> {
    /// It looked for a frontend.
    Frontend(FrontendKey<A>, Option<Frontend>),
    /// It came to this.
    Step(Step),
}

impl<A: UserAddress> PinnedTables<A>
where
    FrontendKey<A>: aya::Pod,
    NodeSettings<A>: aya::Pod,
    Backend<A>: aya::Pod,
    SourceRange<A>: aya::Pod,
    AffinityKey<A>: aya::Pod,
{
    /// Opens the maps of the family; `now_seconds` is the time of the kernel's coarse monotonic clock.
    pub(super) fn open(pinned: &Pinned, now_seconds: u32) -> Result<Self, InspectError> {
        let name = |map: &str| format!("{map}_{}", A::SUFFIX);
        let settings: Array<MapData, NodeSettings<A>> = pinned.open(&name("NODE"))?;
        Ok(Self {
            frontends: pinned.open(&name("FRONTENDS"))?,
            slots: pinned.open(&name("SLOTS"))?,
            backends: pinned.open(&name("BACKENDS"))?,
            node_addresses: pinned.open(&name("NODE_ADDRS"))?,
            cluster_ips: pinned.open(&name("CLUSTER_IPS"))?,
            source_ranges: pinned.open(&name("SOURCE_RANGES"))?,
            interfaces: pinned.open("INTERFACES")?,
            affinity: pinned.open(&name("AFFINITY"))?,
            settings: settings.get(&0, 0).map_err(|error| map_error("NODE", &error))?,
            random: Cell::new(0),
            now_seconds,
            asked: RefCell::default(),
            failed: RefCell::default(),
        })
    }

    /// Says `random` from now on, and forgets what was asked.
    pub(super) fn begin(&self, random: u32) {
        self.random.set(random);
        self.asked.borrow_mut().clear();
    }

    /// What was asked since the beginning.
    pub(super) fn asked(&self) -> Vec<Asked<A>> {
        self.asked.borrow().clone()
    }

    /// The first map that could not be read, if any.
    pub(super) fn check(&self) -> Result<(), InspectError> {
        self.failed.borrow_mut().take().map_or(Ok(()), Err)
    }

    /// The affinity that `client` has with a ServicePort.
    pub(super) fn affinity(&self, client: A, service_id: u32) -> Option<Affinity> {
        self.read("AFFINITY", self.affinity.get(&AffinityKey { client, service_id }, 0))
    }

    fn read<T>(&self, map: &str, result: Result<T, MapError>) -> Option<T> {
        absent(map, result).unwrap_or_else(|error| {
            self.failed.borrow_mut().get_or_insert(error);
            None
        })
    }
}

impl<A: UserAddress> Tables for PinnedTables<A>
where
    FrontendKey<A>: aya::Pod,
    NodeSettings<A>: aya::Pod,
    Backend<A>: aya::Pod,
    SourceRange<A>: aya::Pod,
    AffinityKey<A>: aya::Pod,
{
    type A = A;
    type Client<'a>
        = Remembered
    where
        Self: 'a;

    fn frontend(&self, key: &FrontendKey<A>, into: &mut Frontend) -> bool {
        let found = self.read("FRONTENDS", self.frontends.get(key, 0));
        self.asked.borrow_mut().push(Asked::Frontend(*key, found));
        found.inspect(|frontend| *into = *frontend).is_some()
    }

    fn settings(&self) -> Option<&NodeSettings<A>> {
        Some(&self.settings)
    }

    fn slot(&self, index: u32) -> Option<u32> {
        if index < self.slots.len() { self.read("SLOTS", self.slots.get(&index, 0)) } else { None }
    }

    fn backend(&self, id: u32, into: &mut Backend<A>) -> bool {
        let found = if id < self.backends.len() { self.read("BACKENDS", self.backends.get(&id, 0)) } else { None };
        found.inspect(|backend| *into = *backend).is_some()
    }

    fn live(&self, id: u32, generation: u32, into: &mut Backend<A>) -> bool {
        self.backend(id, into) && into.generation == generation && into.state != BACKEND_FREE
    }

    fn node_address_flags(&self, address: &A) -> u32 {
        self.read("NODE_ADDRS", self.node_addresses.get(address, 0)).map_or(0, |node| node.flags)
    }

    fn cluster_ip_in_use(&self, address: &A) -> bool {
        self.read("CLUSTER_IPS", self.cluster_ips.get(address, 0)).is_some()
    }

    fn source_range(&self, client: &SourceRange<A>) -> bool {
        let bits = SOURCE_RANGE_ID_BITS + A::WORDS as u32 * 32;
        self.read("SOURCE_RANGES", self.source_ranges.get(&Key::new(bits, *client), 0)).is_some()
    }

    fn is_pod_interface(&self, index: u32) -> bool {
        self.read("INTERFACES", self.interfaces.get(&index, 0)).is_some_and(|kinds| kinds & INTERFACE_POD != 0)
    }

    fn client(&self, source: &A) -> Remembered {
        // Which ServicePort is asked of is known only later, and there is one in a decision: the one that was found last.
        let found = self.asked.borrow().iter().rev().find_map(|asked| match asked {
            Asked::Frontend(_, Some(frontend)) => Some(frontend.service_id),
            _ => None,
        });
        Remembered(found.and_then(|service_id| self.affinity(*source, service_id)))
    }

    fn random(&self) -> u32 {
        self.random.get()
    }

    fn now_seconds(&self) -> u32 {
        self.now_seconds
    }

    fn note(&self, step: Step) {
        self.asked.borrow_mut().push(Asked::Step(step));
    }
}

/// A client's affinity, as it was when it was asked for; nothing is written back.
pub(super) struct Remembered(Option<Affinity>);

impl Client for Remembered {
    fn recall(&self, _service_id: u32) -> Option<&Affinity> {
        self.0.as_ref()
    }

    fn remember(&self, _service_id: u32, _affinity: &Affinity) {}
}
