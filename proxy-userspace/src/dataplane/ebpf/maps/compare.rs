//! Whether the maps hold what they were given, all of it and nothing else; nobody but this process should have changed them.
//!
//! The arrays are read in mapped memory and the others in batches, so that all maps are read every time.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use node_sys::bpf::MappedArray;
use node_sys::read_entries;
use proxy_common::pod::Pod;
use proxy_common::{Backend, CLUSTER_IP_IN_USE, EndpointKey, FrontendKey, NodeAddress, NodeSettings, SourceRange};

use super::{FamilyMaps, UserAddress, kernel};
use crate::dataplane::SyncError;
use crate::dataplane::ebpf::plan::Planner;

/// The maps of a family that are compared, by the names that the log and the metrics have for them.
pub(in crate::dataplane::ebpf) const COMPARED: [&str; 9] = [
    "node_settings",
    "frontends",
    "absent",
    "slots",
    "backends",
    "source_ranges",
    "endpoints",
    "cluster_ips",
    "node_addresses",
];

/// Elements that are read at a time, and how often a large array is gone through at most.
const WINDOW_MIN: u32 = 16_384;
const WINDOWS_MAX: u32 = 16;

/// Length in bits, before the rest of a trie's key.
const PREFIX_LENGTH: usize = size_of::<u32>();

impl<A: UserAddress> FamilyMaps<A>
where
    NodeSettings<A>: aya::Pod,
    FrontendKey<A>: aya::Pod + Pod,
    SourceRange<A>: aya::Pod + Pod,
    EndpointKey<A>: aya::Pod + Pod,
{
    /// The maps that differ from what this process wrote, and in how many entries: the settings, `planner`'s entries, and the ClusterIPs.
    ///
    /// # Errors
    /// When the kernel does not let a map be read.
    pub(in crate::dataplane::ebpf) fn differences(
        &self,
        settings: &NodeSettings<A>,
        planner: &Planner<A>,
        cluster_ips: &BTreeSet<A>,
    ) -> Result<Vec<(&'static str, usize)>, SyncError> {
        let counts = [
            usize::from(self.settings()? != *settings),
            self.other_frontends(planner)?,
            self.wrongly_absent(planner, cluster_ips)?,
            self.other_slots(planner)?,
            self.other_backends(planner)?,
            self.other_source_ranges(planner)?,
            self.other_endpoints(planner)?,
            self.other_cluster_ips(cluster_ips)?,
            self.other_node_addresses()?,
        ];
        Ok(COMPARED.into_iter().zip(counts).filter(|(_, count)| *count > 0).collect())
    }

    fn other_frontends(&self, planner: &Planner<A>) -> Result<usize, SyncError> {
        let expected: HashMap<&FrontendKey<A>, &[u8]> =
            planner.frontends().map(|(key, value)| (key, value.as_bytes())).collect();
        let sizes = (size_of::<FrontendKey<A>>(), size_of::<proxy_common::Frontend>());
        others_in(&self.descriptors.frontends, "frontends", sizes, expected.len(), |key, value| {
            FrontendKey::from_bytes(key).is_some_and(|key| expected.get(&key) == Some(&value))
        })
    }

    /// Only what is there counts: for anything else the programs look in vain, which is slow and no fault.
    fn wrongly_absent(&self, planner: &Planner<A>, cluster_ips: &BTreeSet<A>) -> Result<usize, SyncError> {
        let frontends = planner.frontends().map(|(key, _)| &key.address);
        let mut present = frontends.chain(cluster_ips).chain(self.addresses.keys());
        let absent = |count, address| Ok(count + usize::from(self.absent.contains(address)?));
        present.try_fold(0, absent).map_err(|source| kernel("absent", source))
    }

    /// What is in no block may be anything: nothing leads there.
    fn other_slots(&self, planner: &Planner<A>) -> Result<usize, SyncError> {
        others_in_array(&self.slots, 1, || planner.slots(), |words, id| words == [id])
            .map_err(|source| kernel("slots", source))
    }

    fn other_backends(&self, planner: &Planner<A>) -> Result<usize, SyncError> {
        let words = size_of::<Backend<A>>() / size_of::<u32>();
        let is = |words: &[u32], backend| A::backend_from_words(words) == Some(backend);
        others_in_array(&self.backends, words, || planner.backends(), is).map_err(|source| kernel("backends", source))
    }

    fn other_source_ranges(&self, planner: &Planner<A>) -> Result<usize, SyncError> {
        let expected: HashSet<_> = planner.ranges().collect();
        let sizes = (PREFIX_LENGTH + size_of::<SourceRange<A>>(), size_of::<u32>());
        others_in(&self.descriptors.source_ranges, "source_ranges", sizes, expected.len(), |key, _| {
            let Some((length, range)) = key.split_first_chunk::<PREFIX_LENGTH>() else { return false };
            SourceRange::from_bytes(range).is_some_and(|range| expected.contains(&(u32::from_ne_bytes(*length), range)))
        })
    }

    fn other_endpoints(&self, planner: &Planner<A>) -> Result<usize, SyncError> {
        let expected: HashMap<EndpointKey<A>, u32> = planner.tunnel_endpoints().collect();
        let sizes = (size_of::<EndpointKey<A>>(), size_of::<u32>());
        others_in(&self.descriptors.endpoints, "endpoints", sizes, expected.len(), |key, value| {
            let id = EndpointKey::from_bytes(key).and_then(|key| expected.get(&key));
            id.is_some_and(|id| value == id.to_ne_bytes())
        })
    }

    fn other_cluster_ips(&self, expected: &BTreeSet<A>) -> Result<usize, SyncError> {
        let sizes = (size_of::<A>(), size_of::<u32>());
        others_in(&self.descriptors.cluster_ips, "cluster_ips", sizes, expected.len(), |key, value| {
            value == CLUSTER_IP_IN_USE.to_ne_bytes() && A::from_bytes(key).is_some_and(|key| expected.contains(&key))
        })
    }

    fn other_node_addresses(&self) -> Result<usize, SyncError> {
        let sizes = (size_of::<A>(), size_of::<NodeAddress>());
        others_in(&self.descriptors.node_addresses, "node_addresses", sizes, self.addresses.len(), |key, value| {
            let expected = A::from_bytes(key).and_then(|address| self.addresses.get(&address));
            expected.is_some_and(|expected| expected.as_bytes() == value)
        })
    }
}

/// How many elements of an array, `words` long, are not those expected. The array is read in order, a window at a time, and what is
/// expected is gone through for each: that is quick, and neither is ever held whole.
fn others_in_array<E, I: Iterator<Item = (u32, E)>>(
    array: &MappedArray,
    words: usize,
    expected: impl Fn() -> I,
    is: impl Fn(&[u32], E) -> bool,
) -> io::Result<usize> {
    let end = expected().map(|(index, _)| index.saturating_add(1)).max().unwrap_or(0);
    let length = WINDOW_MIN.max(end.div_ceil(WINDOWS_MAX));
    let (mut window, mut others) = (Vec::new(), 0);
    for first in (0..end).step_by(length as usize) {
        window.clear();
        array.read(first, length.min(end - first), words, |_, element| window.extend_from_slice(element))?;
        let inside = expected().filter(|(index, _)| (first..first.saturating_add(length)).contains(index));
        for (index, value) in inside {
            let start = (index - first) as usize * words;
            let same = window.get(start..start + words).is_some_and(|element| is(element, value));
            others += usize::from(!same);
        }
    }
    Ok(others)
}

/// In how many entries a map differs from the `count` that are expected: the more of those that it lacks and those that it has besides, as
/// an entry with another value is both.
fn others_in(
    map: &OwnedFd,
    name: &'static str,
    sizes: (usize, usize),
    count: usize,
    mut is_expected: impl FnMut(&[u8], &[u8]) -> bool,
) -> Result<usize, SyncError> {
    let (mut expected, mut others) = (0_usize, 0);
    let visit = |key: &[u8], value: &[u8]| match is_expected(key, value) {
        true => expected += 1,
        false => others += 1,
    };
    read_entries(map.as_fd(), sizes, visit).map_err(|source| kernel(name, source))?;
    Ok(others.max(count.saturating_sub(expected)))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use aya::EbpfLoader;
    use proxy_common::{Frontend, INTERFACE_POD, INTERFACE_TUNNELS, V4};

    use super::*;
    use crate::dataplane::ebpf::alloc::RangeAllocator;
    use crate::dataplane::ebpf::load::OBJECT;
    use crate::dataplane::ebpf::maps::{Interfaces, key};
    use crate::dataplane::ebpf::plan::Writes;
    use crate::model::{
        Action, Algorithm, Endpoint, EndpointSet, Frontend as ModelFrontend, FrontendAddress, FrontendKind, IpFamily,
        NameParts, OriginRules, Protocol, Rule, ServicePort, ServicePortName,
    };

    struct Programmed {
        maps: FamilyMaps<V4>,
        planner: Planner<V4>,
        settings: NodeSettings<V4>,
        cluster_ips: BTreeSet<V4>,
    }

    fn address(last: u8) -> V4 {
        V4::from_octets([10, 0, 0, last])
    }

    fn service() -> Arc<ServicePort> {
        let rule = Rule { action: Action::Forward(EndpointSet::Cluster), masquerade: false };
        let external = Rule { masquerade: true, ..rule };
        let endpoint = |last: u8| Endpoint::new(SocketAddr::from(([10, 244, 0, last], 8080)), true);
        Arc::new(ServicePort {
            name: ServicePortName::new(NameParts {
                namespace: "default".into(),
                service: "web".into(),
                port: "".into(),
                protocol: Protocol::Tcp,
                family: IpFamily::V4,
            }),
            created_seconds: 0,
            frontends: vec![ModelFrontend {
                address: FrontendAddress::Ip([192, 0, 2, 1].into()),
                port: 80,
                kind: FrontendKind::LoadBalancerIp,
                rules: OriginRules { pod: rule, node: rule, external },
            }],
            cluster_endpoints: vec![endpoint(1), endpoint(2)],
            local_endpoints: vec![],
            kept_endpoints: vec![],
            draining_endpoints: vec![],
            direct_return: false,
            algorithm: Algorithm::Random,
            affinity_seconds: None,
            load_balancer_source_ranges: vec!["10.0.0.0/8".parse().unwrap(), "10.1.0.0/16".parse().unwrap()],
        })
    }

    fn small_maps() -> aya::Ebpf {
        let mut loader = EbpfLoader::new();
        for map in ["FLOWS_V4", "FLOWS_V6"] {
            loader.map_max_entries(map, 64);
        }
        loader.load(OBJECT).unwrap()
    }

    fn programmed() -> Programmed {
        let mut maps = FamilyMaps::<V4>::take(&mut small_maps(), "V4").unwrap();
        let mut planner = Planner::new(maps.limits());
        let (service, mut writes) = (service(), Writes::default());
        planner.change(&service.name, Some(&service), &mut RangeAllocator::new(1, 9), 0, &mut writes).unwrap();
        maps.write(&writes).unwrap();
        let settings = NodeSettings { node_port_max: 7, ..NodeSettings::default() };
        maps.write_settings(&settings).unwrap();
        maps.write_cluster_ip(address(1), true).unwrap();
        maps.write_node_addresses(&[(address(2), NodeAddress { flags: 1 })]).unwrap();
        Programmed { maps, planner, settings, cluster_ips: [address(1)].into() }
    }

    fn check(damage: impl FnOnce(&mut FamilyMaps<V4>, &Planner<V4>), expect: Option<(&'static str, usize)>) {
        let mut this = programmed();
        damage(&mut this.maps, &this.planner);
        let found = this.maps.differences(&this.settings, &this.planner, &this.cluster_ips).unwrap();
        assert_eq!(found, Vec::from_iter(expect));
    }

    #[test]
    fn whatever_changes_is_found() {
        check(|_, _| {}, None);
        check(|maps, _| maps.write_settings(&NodeSettings::default()).unwrap(), Some(("node_settings", 1)));
        let first = |planner: &Planner<V4>| *planner.frontends().next().unwrap();
        check(|maps, planner| maps.frontends.remove(&first(planner).0).unwrap(), Some(("frontends", 1)));
        let other = FrontendKey { address: address(9), ..FrontendKey::default() };
        check(|maps, _| maps.frontends.insert(other, Frontend::default(), 0).unwrap(), Some(("frontends", 1)));
        let last_slot = |planner: &Planner<V4>| planner.slots().last().unwrap().0;
        check(|maps, planner| maps.slots.write(last_slot(planner), &[77], 0).unwrap(), Some(("slots", 1)));
        let last = |planner: &Planner<V4>| planner.backends().last().unwrap().0;
        check(|maps, planner| maps.backends.write(last(planner), &[0; 4], 1).unwrap(), Some(("backends", 1)));
        check(|maps, planner| maps.backends.write(last(planner), &[1], 0).unwrap(), Some(("backends", 1)));
        let narrow = |planner: &Planner<V4>| key(planner.ranges().max().unwrap());
        check(|maps, planner| maps.source_ranges.remove(&narrow(planner)).unwrap(), Some(("source_ranges", 1)));
        let first = |planner: &Planner<V4>| planner.tunnel_endpoints().next().unwrap().0;
        check(|maps, planner| maps.endpoints.remove(&first(planner)).unwrap(), Some(("endpoints", 1)));
        check(|maps, planner| maps.endpoints.insert(first(planner), 77, 0).unwrap(), Some(("endpoints", 1)));
        check(|maps, _| maps.write_cluster_ip(address(1), false).unwrap(), Some(("cluster_ips", 1)));
        check(|maps, _| maps.write_cluster_ip(address(3), true).unwrap(), Some(("cluster_ips", 1)));
        check(|maps, _| maps.node_addresses.remove(&address(2)).unwrap(), Some(("node_addresses", 1)));
        let node_port = NodeAddress { flags: 3 };
        check(|maps, _| maps.node_addresses.insert(address(2), node_port, 0).unwrap(), Some(("node_addresses", 1)));
    }

    #[test]
    fn interfaces_are_those_written_and_no_others() {
        let mut interfaces = Interfaces::take(&mut small_maps()).unwrap();
        assert!(interfaces.are_intact());
        interfaces.write(&[(3, INTERFACE_POD), (4, INTERFACE_POD)].into()).unwrap();
        assert!(interfaces.are_intact());
        interfaces.map.remove(&3).unwrap();
        assert!(!interfaces.are_intact());
        interfaces.write(&[(4, INTERFACE_POD)].into()).unwrap();
        assert!(interfaces.are_intact());
        interfaces.write(&[(4, INTERFACE_TUNNELS)].into()).unwrap();
        assert_eq!(interfaces.map.get(&4, 0).unwrap(), INTERFACE_TUNNELS);
    }

    /// More entries than one system call gives, over many buckets.
    #[test]
    fn large_maps_are_read_whole() {
        let mut this = programmed();
        for index in 0..5000_u32 {
            let address = V4((0x0a60_0000 + index).to_be());
            this.maps.write_cluster_ip(address, true).unwrap();
            this.cluster_ips.insert(address);
        }
        assert_eq!(this.maps.other_cluster_ips(&this.cluster_ips).unwrap(), 0);
        this.cluster_ips.remove(&address(1));
        assert_eq!(this.maps.other_cluster_ips(&this.cluster_ips).unwrap(), 1);
    }
}
