//! The in-memory store against the conformance suite, and the bounds that are its own.

use std::time::Duration;

use crate::{
    EventKind, MemoryLimits, MemoryStore, Revision, Store, StoreError, WatchEnd, WatchItem, conformance_tests,
};
use bytes::Bytes;

conformance_tests!(MemoryStore::default());

fn small(change: impl FnOnce(&mut MemoryLimits)) -> MemoryStore {
    let mut limits = MemoryLimits::default();
    change(&mut limits);
    MemoryStore::new(limits)
}

async fn fill(store: &MemoryStore, count: u64) {
    for n in 0..count {
        store.create(&format!("/r/{n:05}"), Bytes::from_static(b"0123456789")).await.unwrap();
    }
}

#[tokio::test]
async fn slow_watch_is_closed_and_writers_go_on() {
    let store = small(|limits| limits.watch_buffer_items_max = 4);
    let mut slow = store.watch("/r/", Revision(1)).await.unwrap();
    fill(&store, 10).await;
    for n in 2..6 {
        let WatchItem::Event(event) = slow.next().await.unwrap() else { unreachable!("no progress was asked for") };
        assert_eq!((event.kind, event.revision), (EventKind::Created, Revision(n)));
    }
    assert_eq!(slow.next().await.unwrap_err(), WatchEnd::Closed);
    assert_eq!(store.usage().watches, 0);
}

#[tokio::test]
async fn history_is_bounded_by_events() {
    let store = small(|limits| limits.history_events_max = 8);
    fill(&store, 100).await;
    let usage = store.usage();
    assert_eq!((usage.history_events, usage.compacted, usage.revision), (8, Revision(93), Revision(101)));
    assert!(matches!(store.watch("/r/", Revision(92)).await.unwrap_err(), StoreError::Compacted { .. }));
    assert_eq!(store.count("/r/").await.unwrap(), 100);
}

#[tokio::test]
async fn history_is_bounded_by_bytes() {
    let store = small(|limits| limits.history_bytes_max = 55);
    fill(&store, 100).await;
    assert_eq!(store.usage().history_events, 5);
}

#[tokio::test]
async fn history_is_bounded_by_time() {
    let store = small(|limits| limits.history_window = Duration::ZERO);
    fill(&store, 10).await;
    assert!(store.usage().history_events < 10);
}

#[tokio::test]
async fn a_full_store_refuses_growth_and_allows_deletion() {
    let store = small(|limits| limits.live_bytes_max = 40);
    fill(&store, 2).await;
    let refused = store.create("/r/x", Bytes::from_static(b"0123456789")).await.unwrap_err();
    assert_eq!(refused, StoreError::Full { bytes: 36, bytes_max: 40 });
    store.delete("/r/00000", Revision(2)).await.unwrap();
    store.create("/r/x", Bytes::from_static(b"0123456789")).await.unwrap();
}

#[tokio::test]
async fn watches_are_bounded_and_dropped_ones_make_room() {
    let store = small(|limits| limits.watches_max = 1);
    let first = store.watch("/r/", Revision(1)).await.unwrap();
    assert_eq!(store.watch("/r/", Revision(1)).await.unwrap_err(), StoreError::TooManyWatches { watches_max: 1 });
    drop(first);
    store.watch("/r/", Revision(1)).await.unwrap();
}

#[tokio::test]
async fn deleted_keys_leave_nothing_behind_after_compaction() {
    let store = MemoryStore::default();
    let created = store.create("/r/a", Bytes::from_static(b"1")).await.unwrap();
    let gone = store.delete("/r/a", created).await.unwrap();
    store.compact(gone).await.unwrap();
    let usage = store.usage();
    assert_eq!((usage.live_bytes, usage.history_events), (0, 0));
    assert_eq!(store.get("/r/a", None).await.unwrap().entry, None);
}

#[tokio::test]
async fn a_later_life_refuses_revisions_of_the_former() {
    let store = MemoryStore::beginning_at(Revision(1000), MemoryLimits::default());
    assert_eq!(store.create("/r/a", Bytes::from_static(b"1")).await.unwrap(), Revision(1001));
    let wanted = StoreError::Compacted { requested: Revision(999), compacted: Revision(1000) };
    assert_eq!(store.watch("/r/", Revision(999)).await.unwrap_err(), wanted);
    store.watch("/r/", Revision(1000)).await.unwrap();
}
