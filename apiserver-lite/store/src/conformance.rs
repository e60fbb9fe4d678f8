//! What every [`Store`] must do, as checks that run against any implementation.
//!
//! Each check takes a fresh, empty store and panics where the store breaks its promise. [`conformance_tests!`](crate::conformance_tests)
//! makes one test of each.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a suite of checks: a broken promise is a panic in the test that calls it"
)]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::{Entry, Event, EventKind, ListOptions, Revision, Store, StoreError, Watch, WatchItem};

/// Makes one `#[tokio::test]` of each check; the argument is an expression that makes a fresh, empty store.
#[macro_export]
macro_rules! conformance_tests {
    ($make:expr) => {
        $crate::conformance_tests!(@each $make;
            revision_grows_by_one, create_get_update_delete, create_existing_is_conflict, update_expects_the_last_write,
            delete_expects_the_last_write, failed_writes_change_nothing, recreated_key_is_new, get_at_a_revision,
            list_is_in_key_order_and_bounded, list_at_a_revision_is_consistent, list_pages_cover_all_once, list_respects_the_prefix,
            count_counts_what_exists, reads_of_the_future_fail, compaction_forgets_the_past_only, compaction_twice_fails,
            watch_delivers_what_follows, watch_replays_from_a_revision, watch_scope_is_a_prefix_or_a_key, watch_carries_previous_values,
            watch_from_compacted_fails, watch_from_the_compacted_revision_works, watch_of_the_future_fails, progress_follows_events,
            concurrent_creates_have_one_winner, concurrent_updates_lose_none, watches_see_concurrent_writes_in_order,
            list_then_watch_has_no_gap,
        );
    };
    (@each $make:expr; $($name:ident),* $(,)?) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            $crate::conformance::$name(std::sync::Arc::new($make)).await;
        })*
    };
}

/// A store under test.
pub type Subject = Arc<dyn Store>;

const DEADLINE: Duration = Duration::from_secs(10);

fn value(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

async fn item(watch: &mut Watch) -> WatchItem {
    tokio::time::timeout(DEADLINE, watch.next()).await.unwrap().unwrap()
}

async fn event(watch: &mut Watch) -> Arc<Event> {
    match item(watch).await {
        WatchItem::Event(event) => event,
        WatchItem::Progress(revision) => panic!("unasked progress at {revision}"),
    }
}

async fn keys(store: &Subject, prefix: &str, revision: Option<Revision>) -> Vec<String> {
    let options = ListOptions { revision, ..ListOptions::default() };
    let listed = store.list(prefix, options).await.unwrap();
    listed.entries.iter().map(|entry| entry.key.to_string()).collect()
}

fn conflict_entry(error: StoreError) -> Option<Entry> {
    match error {
        StoreError::Conflict { current, .. } => current.map(|entry| *entry),
        other => panic!("expected a conflict, got {other}"),
    }
}

/// An empty store is at revision 1, and each write is the next revision over all keys.
pub async fn revision_grows_by_one(store: Subject) {
    assert_eq!(store.revision().await.unwrap(), Revision(1));
    assert_eq!(store.create("/r/a", value("1")).await.unwrap(), Revision(2));
    assert_eq!(store.create("/r/b", value("1")).await.unwrap(), Revision(3));
    assert_eq!(store.update("/r/a", value("2"), Revision(2)).await.unwrap(), Revision(4));
    assert_eq!(store.delete("/r/b", Revision(3)).await.unwrap(), Revision(5));
    assert_eq!(store.revision().await.unwrap(), Revision(5));
}

/// The life of one key.
pub async fn create_get_update_delete(store: Subject) {
    assert_eq!(store.get("/r/a", None).await.unwrap().entry, None);
    let created = store.create("/r/a", value("1")).await.unwrap();
    let updated = store.update("/r/a", value("2"), created).await.unwrap();
    let read = store.get("/r/a", None).await.unwrap();
    let expected = Entry { key: "/r/a".into(), value: value("2"), create_revision: created, mod_revision: updated };
    assert_eq!((read.revision, read.entry), (updated, Some(expected)));
    store.delete("/r/a", updated).await.unwrap();
    assert_eq!(store.get("/r/a", None).await.unwrap().entry, None);
}

/// Creating what exists fails and tells what exists.
pub async fn create_existing_is_conflict(store: Subject) {
    let created = store.create("/r/a", value("1")).await.unwrap();
    let found = conflict_entry(store.create("/r/a", value("2")).await.unwrap_err()).unwrap();
    assert_eq!((found.value, found.mod_revision), (value("1"), created));
}

/// An update with an outdated or impossible expectation fails and tells what is there.
pub async fn update_expects_the_last_write(store: Subject) {
    assert_eq!(conflict_entry(store.update("/r/a", value("1"), Revision(1)).await.unwrap_err()), None);
    let created = store.create("/r/a", value("1")).await.unwrap();
    let updated = store.update("/r/a", value("2"), created).await.unwrap();
    let found = conflict_entry(store.update("/r/a", value("3"), created).await.unwrap_err()).unwrap();
    assert_eq!((found.value, found.mod_revision), (value("2"), updated));
}

/// A deletion with an outdated expectation fails, as does one of what is not there.
pub async fn delete_expects_the_last_write(store: Subject) {
    assert_eq!(conflict_entry(store.delete("/r/a", Revision(1)).await.unwrap_err()), None);
    let created = store.create("/r/a", value("1")).await.unwrap();
    let updated = store.update("/r/a", value("2"), created).await.unwrap();
    assert_eq!(conflict_entry(store.delete("/r/a", created).await.unwrap_err()).unwrap().mod_revision, updated);
    store.delete("/r/a", updated).await.unwrap();
}

/// A refused write takes no revision and makes no event.
pub async fn failed_writes_change_nothing(store: Subject) {
    let created = store.create("/r/a", value("1")).await.unwrap();
    let mut watch = store.watch("/r/", created).await.unwrap();
    store.create("/r/a", value("2")).await.unwrap_err();
    store.update("/r/a", value("2"), Revision(1)).await.unwrap_err();
    store.delete("/r/a", Revision(1)).await.unwrap_err();
    assert_eq!(store.revision().await.unwrap(), created);
    let next = store.update("/r/a", value("3"), created).await.unwrap();
    assert_eq!(next, Revision(created.0 + 1));
    assert_eq!(event(&mut watch).await.revision, next);
}

/// A key that was deleted and made again has a new creation revision.
pub async fn recreated_key_is_new(store: Subject) {
    let first = store.create("/r/a", value("1")).await.unwrap();
    store.delete("/r/a", first).await.unwrap();
    let second = store.create("/r/a", value("1")).await.unwrap();
    let entry = store.get("/r/a", None).await.unwrap().entry.unwrap();
    assert_eq!((entry.create_revision, entry.mod_revision), (second, second));
}

/// A key can be read as it was.
pub async fn get_at_a_revision(store: Subject) {
    let first = store.create("/r/a", value("1")).await.unwrap();
    let second = store.update("/r/a", value("2"), first).await.unwrap();
    let gone = store.delete("/r/a", second).await.unwrap();
    let mut seen = Vec::new();
    for revision in [Revision(1), first, second, gone] {
        let read = store.get("/r/a", Some(revision)).await.unwrap();
        assert_eq!(read.revision, revision);
        seen.push(read.entry.map(|entry| entry.value));
    }
    assert_eq!(seen, [None, Some(value("1")), Some(value("2")), None]);
}

/// Lists are sorted by key, not by time, and a limit says how many remain.
pub async fn list_is_in_key_order_and_bounded(store: Subject) {
    for key in ["/r/c", "/r/a", "/r/b"] {
        store.create(key, value(key)).await.unwrap();
    }
    assert_eq!(keys(&store, "/r/", None).await, ["/r/a", "/r/b", "/r/c"]);
    let page = store.list("/r/", ListOptions { limit: 2, ..ListOptions::default() }).await.unwrap();
    assert_eq!((page.entries.len(), page.remaining, page.revision), (2, 1, Revision(4)));
    let whole = store.list("/r/", ListOptions { limit: 3, ..ListOptions::default() }).await.unwrap();
    assert_eq!((whole.entries.len(), whole.remaining), (3, 0));
}

/// A list at an old revision shows exactly what was there.
pub async fn list_at_a_revision_is_consistent(store: Subject) {
    let a = store.create("/r/a", value("1")).await.unwrap();
    let b = store.create("/r/b", value("1")).await.unwrap();
    let a2 = store.update("/r/a", value("2"), a).await.unwrap();
    store.delete("/r/b", b).await.unwrap();
    assert_eq!(keys(&store, "/r/", None).await, ["/r/a"]);
    assert_eq!(keys(&store, "/r/", Some(a)).await, ["/r/a"]);
    assert_eq!(keys(&store, "/r/", Some(a2)).await, ["/r/a", "/r/b"]);
    let old = store.list("/r/", ListOptions { revision: Some(b), ..ListOptions::default() }).await.unwrap();
    let values: Vec<Bytes> = old.entries.into_iter().map(|entry| entry.value).collect();
    assert_eq!((old.revision, values), (b, vec![value("1"), value("1")]));
}

/// Paging at one revision returns every key once, whatever is written meanwhile.
pub async fn list_pages_cover_all_once(store: Subject) {
    for n in 0..25 {
        store.create(&format!("/r/{n:02}"), value("x")).await.unwrap();
    }
    let revision = store.revision().await.unwrap();
    let (mut start, mut seen) = (String::from("/r/"), Vec::new());
    loop {
        let options = ListOptions { revision: Some(revision), start: Some(&start), limit: 7 };
        let page = store.list("/r/", options).await.unwrap();
        seen.extend(page.entries.iter().map(|entry| entry.key.to_string()));
        store.create(&format!("/r/{}-later", seen.len()), value("x")).await.unwrap();
        if page.remaining == 0 {
            break;
        }
        assert_eq!(page.remaining as usize, 25 - seen.len());
        start = format!("{}\0", seen.last().unwrap());
    }
    let expected: Vec<String> = (0..25).map(|n| format!("/r/{n:02}")).collect();
    assert_eq!(seen, expected);
}

/// `/r/a/` does not hold `/r/ab`.
pub async fn list_respects_the_prefix(store: Subject) {
    for key in ["/r/a/x", "/r/ab", "/r/a", "/s/a/x"] {
        store.create(key, value("1")).await.unwrap();
    }
    assert_eq!(keys(&store, "/r/a/", None).await, ["/r/a/x"]);
    assert_eq!(keys(&store, "/q/", None).await, Vec::<String>::new());
}

/// Deleted keys are not counted.
pub async fn count_counts_what_exists(store: Subject) {
    assert_eq!(store.count("/r/").await.unwrap(), 0);
    let a = store.create("/r/a", value("1")).await.unwrap();
    store.create("/r/b", value("1")).await.unwrap();
    store.create("/s/b", value("1")).await.unwrap();
    assert_eq!(store.count("/r/").await.unwrap(), 2);
    store.delete("/r/a", a).await.unwrap();
    assert_eq!(store.count("/r/").await.unwrap(), 1);
}

/// A revision that has not happened can't be read.
pub async fn reads_of_the_future_fail(store: Subject) {
    let wanted = StoreError::Future { requested: Revision(7), current: Revision(1) };
    assert_eq!(store.get("/r/a", Some(Revision(7))).await.unwrap_err(), wanted);
    let options = ListOptions { revision: Some(Revision(7)), ..ListOptions::default() };
    assert_eq!(store.list("/r/", options).await.unwrap_err(), wanted);
}

/// After compaction the past is gone, and the compacted revision and all since can be read.
pub async fn compaction_forgets_the_past_only(store: Subject) {
    let a = store.create("/r/a", value("1")).await.unwrap();
    let b = store.create("/r/b", value("1")).await.unwrap();
    let a2 = store.update("/r/a", value("2"), a).await.unwrap();
    let gone = store.delete("/r/b", b).await.unwrap();
    store.compact(a2).await.unwrap();
    assert_eq!(keys(&store, "/r/", Some(a2)).await, ["/r/a", "/r/b"]);
    assert_eq!(keys(&store, "/r/", Some(gone)).await, ["/r/a"]);
    assert_eq!(store.get("/r/a", Some(a2)).await.unwrap().entry.unwrap().value, value("2"));
    let wanted = StoreError::Compacted { requested: b, compacted: a2 };
    assert_eq!(store.get("/r/a", Some(b)).await.unwrap_err(), wanted);
    let options = ListOptions { revision: Some(b), ..ListOptions::default() };
    assert_eq!(store.list("/r/", options).await.unwrap_err(), wanted);
    store.compact(gone).await.unwrap();
    assert_eq!(keys(&store, "/r/", None).await, ["/r/a"]);
}

/// Compacting what is compacted, or the future, fails.
pub async fn compaction_twice_fails(store: Subject) {
    let a = store.create("/r/a", value("1")).await.unwrap();
    store.compact(a).await.unwrap();
    assert_eq!(store.compact(a).await.unwrap_err(), StoreError::Compacted { requested: a, compacted: a });
    let wanted = StoreError::Future { requested: Revision(9), current: a };
    assert_eq!(store.compact(Revision(9)).await.unwrap_err(), wanted);
}

/// A watch from now sees each later write once, in order, with its kind.
pub async fn watch_delivers_what_follows(store: Subject) {
    let before = store.create("/r/old", value("1")).await.unwrap();
    let mut watch = store.watch("/r/", before).await.unwrap();
    let a = store.create("/r/a", value("1")).await.unwrap();
    let a2 = store.update("/r/a", value("2"), a).await.unwrap();
    let gone = store.delete("/r/a", a2).await.unwrap();
    let expected = [(EventKind::Created, a, "1"), (EventKind::Updated, a2, "2"), (EventKind::Deleted, gone, "2")];
    for (kind, revision, text) in expected {
        let event = event(&mut watch).await;
        assert_eq!((event.kind, event.revision, &event.value), (kind, revision, &value(text)));
        assert_eq!(&*event.key, "/r/a");
    }
    assert!(watch.try_next().is_none());
}

/// A watch from an old revision first repeats what happened since.
pub async fn watch_replays_from_a_revision(store: Subject) {
    let a = store.create("/r/a", value("1")).await.unwrap();
    let b = store.create("/r/b", value("1")).await.unwrap();
    store.create("/s/b", value("1")).await.unwrap();
    let mut watch = store.watch("/r/", Revision(1)).await.unwrap();
    let c = store.create("/r/c", value("1")).await.unwrap();
    for revision in [a, b, c] {
        assert_eq!(event(&mut watch).await.revision, revision);
    }
}

/// A scope that ends in `/` is a tree; one that does not is a single key.
pub async fn watch_scope_is_a_prefix_or_a_key(store: Subject) {
    let from = store.revision().await.unwrap();
    let mut tree = store.watch("/r/n/", from).await.unwrap();
    let mut single = store.watch("/r/n/a", from).await.unwrap();
    let mut all = store.watch("/r/", from).await.unwrap();
    for key in ["/r/n/a", "/r/n/ab", "/r/nn/a", "/r/n/a/deep"] {
        store.create(key, value("1")).await.unwrap();
    }
    let seen = |watch: &mut Watch| {
        let mut keys = Vec::new();
        while let Some(WatchItem::Event(event)) = watch.try_next() {
            keys.push(event.key.to_string());
        }
        keys
    };
    for watch in [&mut tree, &mut single, &mut all] {
        store.request_progress(watch.id()).await.unwrap();
    }
    assert_eq!(seen(&mut tree), ["/r/n/a", "/r/n/ab", "/r/n/a/deep"]);
    assert_eq!(seen(&mut single), ["/r/n/a"]);
    assert_eq!(seen(&mut all), ["/r/n/a", "/r/n/ab", "/r/nn/a", "/r/n/a/deep"]);
}

/// Events carry what was there before, which selectors need.
pub async fn watch_carries_previous_values(store: Subject) {
    let mut watch = store.watch("/r/", Revision(1)).await.unwrap();
    let a = store.create("/r/a", value("1")).await.unwrap();
    let a2 = store.update("/r/a", value("2"), a).await.unwrap();
    store.delete("/r/a", a2).await.unwrap();
    let mut previous = Vec::new();
    for _ in 0..3 {
        previous.push(event(&mut watch).await.previous.clone());
    }
    assert_eq!(previous, [None, Some(value("1")), Some(value("2"))]);
}

/// A watch from before the compacted revision would have a gap, so it fails.
pub async fn watch_from_compacted_fails(store: Subject) {
    let a = store.create("/r/a", value("1")).await.unwrap();
    let b = store.create("/r/b", value("1")).await.unwrap();
    store.compact(b).await.unwrap();
    let wanted = StoreError::Compacted { requested: a, compacted: b };
    assert_eq!(store.watch("/r/", a).await.unwrap_err(), wanted);
}

/// A watch from the compacted revision has no gap.
pub async fn watch_from_the_compacted_revision_works(store: Subject) {
    store.create("/r/a", value("1")).await.unwrap();
    let b = store.create("/r/b", value("1")).await.unwrap();
    let c = store.create("/r/c", value("1")).await.unwrap();
    store.compact(b).await.unwrap();
    let mut watch = store.watch("/r/", b).await.unwrap();
    assert_eq!(event(&mut watch).await.revision, c);
}

/// A watch from a revision that has not happened fails at once.
pub async fn watch_of_the_future_fails(store: Subject) {
    let wanted = StoreError::Future { requested: Revision(9), current: Revision(1) };
    assert_eq!(store.watch("/r/", Revision(9)).await.unwrap_err(), wanted);
}

/// Progress arrives behind the events that it covers, and covers writes outside the scope.
pub async fn progress_follows_events(store: Subject) {
    let mut watch = store.watch("/r/", Revision(1)).await.unwrap();
    let a = store.create("/r/a", value("1")).await.unwrap();
    let other = store.create("/s/a", value("1")).await.unwrap();
    store.request_progress(watch.id()).await.unwrap();
    assert_eq!(event(&mut watch).await.revision, a);
    assert_eq!(item(&mut watch).await, WatchItem::Progress(other));
}

/// Of many creations of one key exactly one succeeds.
pub async fn concurrent_creates_have_one_winner(store: Subject) {
    let tasks: Vec<_> = (0..16)
        .map(|n| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.create("/r/a", value(&n.to_string())).await.is_ok() })
        })
        .collect();
    let mut winners = 0;
    for task in tasks {
        winners += u32::from(task.await.unwrap());
    }
    assert_eq!((winners, store.revision().await.unwrap()), (1, Revision(2)));
}

/// Optimistic updates that retry lose no increment.
pub async fn concurrent_updates_lose_none(store: Subject) {
    store.create("/r/n", value("0")).await.unwrap();
    let tasks: Vec<_> = (0..8).map(|_| tokio::spawn(increment_times(Arc::clone(&store), 25))).collect();
    for task in tasks {
        task.await.unwrap();
    }
    let entry = store.get("/r/n", None).await.unwrap().entry.unwrap();
    assert_eq!(entry.value, value("200"));
}

async fn increment_times(store: Subject, times: u32) {
    for _ in 0..times {
        let mut entry = store.get("/r/n", None).await.unwrap().entry.unwrap();
        loop {
            let number: u32 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
            match store.update("/r/n", value(&(number + 1).to_string()), entry.mod_revision).await {
                Ok(_) => break,
                Err(error) => entry = conflict_entry(error).unwrap(),
            }
        }
    }
}

/// Two watches of concurrent writers see the same events in the same, growing order.
pub async fn watches_see_concurrent_writes_in_order(store: Subject) {
    let mut first = store.watch("/r/", Revision(1)).await.unwrap();
    let mut second = store.watch("/r/", Revision(1)).await.unwrap();
    let tasks: Vec<_> = (0..4)
        .map(|task| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for n in 0..50 {
                    store.create(&format!("/r/{task}-{n}"), value("x")).await.unwrap();
                }
            })
        })
        .collect();
    for expected in 2..202 {
        let (a, b) = (event(&mut first).await, event(&mut second).await);
        assert_eq!((a.revision, &a), (Revision(expected), &b));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

/// A list and a watch from its revision together see every key exactly once while others write.
pub async fn list_then_watch_has_no_gap(store: Subject) {
    let writer = Arc::clone(&store);
    let writing = tokio::spawn(async move {
        for n in 0..300 {
            writer.create(&format!("/r/{n:03}"), value("x")).await.unwrap();
        }
    });
    let listed = loop {
        let listed = store.list("/r/", ListOptions::default()).await.unwrap();
        if listed.entries.len() >= 10 {
            break listed;
        }
        tokio::task::yield_now().await;
    };
    let mut watch = store.watch("/r/", listed.revision).await.unwrap();
    let mut seen: Vec<String> = listed.entries.iter().map(|entry| entry.key.to_string()).collect();
    while seen.len() < 300 {
        seen.push(event(&mut watch).await.key.to_string());
    }
    writing.await.unwrap();
    let expected: Vec<String> = (0..300).map(|n| format!("/r/{n:03}")).collect();
    assert_eq!(seen, expected);
}
