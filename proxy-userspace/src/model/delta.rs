//! What changed between two snapshots, and the proof that it is all that changed.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::{ServiceDelta, ServiceSnapshot};

/// The ServicePorts that are new, different or gone from `before` to `after`.
pub fn diff(before: &ServiceSnapshot, after: &ServiceSnapshot) -> ServiceDelta {
    let mut changed = Vec::new();
    let (mut old, mut new) = (before.services.iter().peekable(), after.services.iter().peekable());
    loop {
        match (old.peek(), new.peek()) {
            (None, None) => break,
            (Some((name, _)), None) => {
                changed.push((*name).clone());
                old.next();
            }
            (Some((gone, _)), Some((name, _))) if gone < name => {
                changed.push((*gone).clone());
                old.next();
            }
            (Some((same, was)), Some((name, is))) if same == name => {
                // Unchanged entries are shared between snapshots: the pointer answers for nearly all of them.
                if !Arc::ptr_eq(was, is) && was != is {
                    changed.push((*name).clone());
                }
                old.next();
                new.next();
            }
            (_, Some((name, _))) => {
                changed.push((*name).clone());
                new.next();
            }
        }
    }
    ServiceDelta {
        node_changed: before.node != after.node,
        changed,
        cluster_ips: differing_keys(&before.cluster_ips, &after.cluster_ips),
        health_checks_changed: before.health_checks != after.health_checks,
    }
}

/// The addresses that only one of the two has.
fn differing_keys(before: &BTreeMap<IpAddr, u32>, after: &BTreeMap<IpAddr, u32>) -> Vec<IpAddr> {
    let gone = before.keys().filter(|address| !after.contains_key(address));
    let new = after.keys().filter(|address| !before.contains_key(address));
    let mut keys: Vec<_> = gone.chain(new).copied().collect();
    keys.sort_unstable();
    keys
}

/// `before` with the parts that `delta` names taken from `after`: equal to `after` for every delta of theirs that is complete.
pub fn apply(before: &ServiceSnapshot, delta: &ServiceDelta, after: &ServiceSnapshot) -> ServiceSnapshot {
    let mut result = ServiceSnapshot { version: after.version, ..before.clone() };
    if delta.node_changed {
        result.node = Arc::clone(&after.node);
    }
    for name in &delta.changed {
        match after.services.get(name) {
            Some(service) => result.services.insert(name.clone(), Arc::clone(service)),
            None => result.services.remove(name),
        };
    }
    for address in &delta.cluster_ips {
        match after.cluster_ips.get(address) {
            Some(count) => result.cluster_ips.insert(*address, *count),
            None => result.cluster_ips.remove(address),
        };
    }
    if delta.health_checks_changed {
        result.health_checks.clone_from(&after.health_checks);
    }
    result
}
