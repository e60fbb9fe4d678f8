//! What changed between two snapshots, and the proof that it is all that changed.

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
    ServiceDelta { node_changed: before.node != after.node, changed }
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
    result
}
