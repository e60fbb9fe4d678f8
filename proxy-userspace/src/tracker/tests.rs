use proptest::prelude::*;

use super::*;
use crate::model::{ServiceSnapshot, tests::build};

fn cluster() -> Vec<ObjectEvent> {
    let mut events = Vec::new();
    for name in ["a", "b", "c"] {
        let mut service = build::exposed(name);
        service.cluster_ips = vec![format!("10.96.0.{}", name.as_bytes()[0]).parse().unwrap()];
        service.external_local = name == "b";
        events.push(ObjectEvent::ServiceApplied(service));
        for (slice, endpoints) in [("1", vec!["10.1.0.1 l", "10.1.0.2"]), ("2", vec!["10.1.0.2 t", "10.1.0.3"])] {
            let endpoints = endpoints.into_iter().map(build::endpoint).collect();
            events.push(ObjectEvent::SliceApplied(build::slice(&format!("{name}-{slice}"), name, endpoints)));
        }
    }
    events
}

fn snapshot(tracker: &mut Tracker) -> ServiceSnapshot {
    let mut desired = Desired::default();
    tracker.dirty.extend(tracker.entries.keys().cloned());
    tracker.checkout(&mut desired);
    desired.checkout().0.clone()
}

fn full(events: &[ObjectEvent]) -> Tracker {
    let mut tracker = Tracker::default();
    for kind in [ListKind::Services, ListKind::Slices] {
        tracker.handle(ObjectEvent::ListStarted(kind));
    }
    for event in events {
        tracker.handle(event.clone());
    }
    for kind in [ListKind::Services, ListKind::Slices] {
        tracker.handle(ObjectEvent::ListDone(kind));
    }
    tracker
}

fn delete(event: &ObjectEvent) -> ObjectEvent {
    match event {
        ObjectEvent::ServiceApplied(service) => ObjectEvent::ServiceDeleted(service.key.clone()),
        ObjectEvent::SliceApplied(slice) => {
            ObjectEvent::SliceDeleted { namespace: slice.service.namespace.clone(), name: slice.name.clone() }
        }
        other => other.clone(),
    }
}

proptest! {
    #[test]
    fn any_order_gives_the_same_state(order in Just(cluster()).prop_shuffle(), cut in 0..9_usize) {
        let mut expect = full(&cluster());
        let mut tracker = Tracker::default();
        let mut desired = Desired::default();
        for (i, event) in order.into_iter().enumerate() {
            tracker.handle(event);
            if i == cut {
                tracker.checkout(&mut desired);
            }
        }
        tracker.checkout(&mut desired);
        prop_assert_eq!(&desired.checkout().0.services, &snapshot(&mut expect).services);
    }

    #[test]
    fn a_relist_ends_in_what_it_named(kept in proptest::sample::subsequence(cluster(), 0..=9)) {
        let mut tracker = full(&cluster());
        let mut desired = Desired::default();
        tracker.checkout(&mut desired);
        for kind in [ListKind::Services, ListKind::Slices] {
            tracker.handle(ObjectEvent::ListStarted(kind));
        }
        for event in &kept {
            prop_assert!(!tracker.handle(event.clone()), "an object that is the same marks nothing");
        }
        prop_assert_eq!(tracker.pending(), 0, "nothing is deleted before the list is complete");
        for kind in [ListKind::Services, ListKind::Slices] {
            tracker.handle(ObjectEvent::ListDone(kind));
        }
        tracker.checkout(&mut desired);
        let mut expect = full(&kept);
        prop_assert_eq!(&desired.checkout().0.services, &snapshot(&mut expect).services);
        prop_assert_eq!(tracker.entries.len(), expect.entries.len());
        prop_assert_eq!(tracker.slice_owners.len(), expect.slice_owners.len());
    }

    #[test]
    fn deleting_everything_leaves_nothing(order in Just(cluster()).prop_shuffle()) {
        let mut tracker = full(&cluster());
        let mut desired = Desired::default();
        tracker.checkout(&mut desired);
        for event in &order {
            tracker.handle(delete(event));
        }
        tracker.checkout(&mut desired);
        prop_assert!(desired.checkout().0.services.is_empty());
        prop_assert!(tracker.entries.is_empty() && tracker.slice_owners.is_empty() && tracker.dirty.is_empty());
    }
}

#[test]
fn nothing_is_complete_before_both_lists_are() {
    let mut tracker = Tracker::default();
    let mut step = |event| {
        tracker.handle(event);
        tracker.is_complete()
    };
    assert!(!step(ObjectEvent::ListDone(ListKind::Services)), "a list that never started");
    assert!(!step(ObjectEvent::ListStarted(ListKind::Services)));
    assert!(!step(ObjectEvent::ListDone(ListKind::Services)));
    assert!(!step(ObjectEvent::ListStarted(ListKind::Slices)));
    assert!(step(ObjectEvent::ListDone(ListKind::Slices)));
    assert!(step(ObjectEvent::ListStarted(ListKind::Slices)), "a later list takes nothing back");
}

#[test]
fn a_list_that_was_broken_off_deletes_nothing() {
    let mut tracker = full(&cluster());
    let before = snapshot(&mut tracker);
    tracker.handle(ObjectEvent::ListStarted(ListKind::Slices));
    tracker.handle(ObjectEvent::ListStarted(ListKind::Slices));
    assert_eq!(snapshot(&mut tracker).services, before.services);
    tracker.handle(ObjectEvent::ListDone(ListKind::Slices));
    assert!(tracker.slice_owners.is_empty());
}

#[test]
fn a_slice_can_move_to_another_service() {
    let mut tracker = full(&cluster());
    let mut desired = Desired::default();
    tracker.checkout(&mut desired);
    let moved = build::slice("a-1", "b", vec![build::endpoint("10.1.0.77")]);
    assert!(tracker.handle(ObjectEvent::SliceApplied(moved)));
    assert_eq!(tracker.pending(), 2);
    tracker.checkout(&mut desired);
    let count = |service: &str, address: &str| {
        let ports = desired.snapshot().services.values().filter(|p| *p.name.service == *service);
        ports.flat_map(|p| &p.cluster_endpoints).filter(|e| e.address().ip().to_string() == address).count()
    };
    assert_eq!((count("a", "10.1.0.1"), count("b", "10.1.0.77")), (0, 1));
}

#[test]
fn a_changed_zone_marks_every_service_once() {
    let mut tracker = full(&cluster());
    tracker.checkout(&mut Desired::default());
    tracker.set_policy(build::policy());
    assert_eq!(tracker.pending(), 3);
    tracker.checkout(&mut Desired::default());
    tracker.set_policy(build::policy());
    assert_eq!(tracker.pending(), 0);
}

#[test]
fn rejected_endpoints_are_counted_while_their_slice_is_there() {
    let mut tracker = Tracker::default();
    let bad = |count| SliceObject { rejected: count, ..build::slice("s", "a", Vec::new()) };
    for (count, expect) in [(3, 3), (1, 1), (2, 2)] {
        tracker.handle(ObjectEvent::SliceApplied(bad(count)));
        assert_eq!(tracker.rejected_endpoints(), expect);
    }
    tracker.handle(delete(&ObjectEvent::SliceApplied(bad(2))));
    assert_eq!(tracker.rejected_endpoints(), 0);
}
