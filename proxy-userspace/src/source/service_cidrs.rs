//! Which networks ClusterIPs come from: the union of all ServiceCIDR objects.

use std::collections::BTreeMap;

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::runtime::watcher::Event as WatchEvent;

use super::address::parse_net;

/// More objects than this are not remembered; what they allow is then not dropped.
const OBJECTS_MAX: usize = 1024;

/// The ServiceCIDRs known so far, by name.
#[derive(Debug, Default)]
pub(super) struct ServiceCidrs {
    known: BTreeMap<String, Vec<IpNet>>,
    /// A list under way; it replaces what is known when it is complete.
    listing: Option<BTreeMap<String, Vec<IpNet>>>,
}

impl ServiceCidrs {
    /// Takes in one event. Returns all networks, sorted, if they may have changed.
    pub(super) fn handle(&mut self, event: WatchEvent<ServiceCIDR>) -> Option<Vec<IpNet>> {
        match event {
            WatchEvent::Init => {
                self.listing = Some(BTreeMap::new());
                return None;
            }
            WatchEvent::InitApply(object) => {
                put(self.listing.get_or_insert_default(), object);
                return None;
            }
            WatchEvent::InitDone => self.known = self.listing.take().unwrap_or_default(),
            WatchEvent::Apply(object) => put(&mut self.known, object),
            WatchEvent::Delete(object) => {
                self.known.remove(&object.metadata.name?);
            }
        }
        Some(self.networks())
    }

    fn networks(&self) -> Vec<IpNet> {
        let mut networks: Vec<_> = self.known.values().flatten().copied().collect();
        networks.sort_unstable();
        networks.dedup();
        networks
    }
}

fn put(known: &mut BTreeMap<String, Vec<IpNet>>, object: ServiceCIDR) {
    let Some(name) = object.metadata.name else { return };
    if known.len() >= OBJECTS_MAX && !known.contains_key(&name) {
        return;
    }
    let cidrs = object.spec.and_then(|spec| spec.cidrs).unwrap_or_default();
    known.insert(name, cidrs.iter().filter_map(|cidr| parse_net(cidr)).collect());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(name: &str, cidrs: &[&str]) -> ServiceCIDR {
        let json = serde_json::json!({"metadata": {"name": name}, "spec": {"cidrs": cidrs}});
        serde_json::from_value(json).unwrap()
    }

    fn nets(list: &[&str]) -> Option<Vec<IpNet>> {
        Some(list.iter().map(|net| net.parse().unwrap()).collect())
    }

    #[test]
    fn networks_are_the_union_and_follow_every_event() {
        let mut known = ServiceCidrs::default();
        assert_eq!(known.handle(WatchEvent::Init), None);
        assert_eq!(known.handle(WatchEvent::InitApply(object("a", &["fd00::/112", "10.96.0.0/16"]))), None);
        assert_eq!(known.handle(WatchEvent::InitDone), nets(&["10.96.0.0/16", "fd00::/112"]));
        let more = object("b", &["10.97.0.0/16", "10.96.0.0/16", "nonsense"]);
        let both = nets(&["10.96.0.0/16", "10.97.0.0/16", "fd00::/112"]);
        assert_eq!(known.handle(WatchEvent::Apply(more)), both);
        assert_eq!(known.handle(WatchEvent::Delete(object("a", &[]))), nets(&["10.96.0.0/16", "10.97.0.0/16"]));
        // A list that is broken off changes nothing; a complete one replaces.
        assert_eq!(known.handle(WatchEvent::Init), None);
        assert_eq!(known.handle(WatchEvent::Init), None);
        assert_eq!(known.handle(WatchEvent::InitDone), nets(&[]));
    }
}
