//! Which events and lists are news: a watch may deliver an event twice or too late, and a server that was restored from a backup,
//! or is not ready yet, may list nothing.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};

use kube::api::ObjectMeta;
use kube::runtime::watcher::Event as WatchEvent;
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

/// Deleted objects whose late events are recognised; beyond that the oldest deletion is forgotten.
const DELETED_MAX: usize = 4096;

/// What to make of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is news, or can't be told from news.
    News,
    /// Something newer is known of its object.
    Late,
    /// The list is complete and empty, and objects are known: [`confirm_empty`] has to find out.
    Vanished,
}

/// The resourceVersions of one resource. They are integers that grow with every write (KEP-5504); where they are not, everything
/// is news. An object costs 16 bytes: its name is kept as a hash under a random key.
#[derive(Debug, Default)]
pub(super) struct Freshness {
    hasher: RandomState,
    versions: HashMap<u64, u64>,
    deleted: VecDeque<u64>,
    newest: u64,
    known_before_list: usize,
    listed: usize,
}

impl Freshness {
    /// The greatest resourceVersion seen.
    pub(super) fn newest(&self) -> u64 {
        self.newest
    }

    /// Takes in an event.
    pub(super) fn judge<K: Resource>(&mut self, event: &WatchEvent<K>) -> Verdict {
        match event {
            WatchEvent::Init => {
                // A list that ended without being believed leaves what was known before it.
                if self.listed > 0 || self.known_before_list == 0 {
                    self.known_before_list = self.versions.len() - self.deleted.len();
                }
                self.listed = 0;
            }
            WatchEvent::InitApply(object) => {
                // The list says what is; a server that was restored may have older versions.
                if self.listed == 0 {
                    self.versions.clear();
                    self.deleted.clear();
                }
                self.listed += 1;
                self.admit(object.meta());
            }
            WatchEvent::InitDone if self.listed == 0 && self.known_before_list > 0 => return Verdict::Vanished,
            WatchEvent::InitDone => {}
            WatchEvent::Apply(object) => return self.admit(object.meta()),
            WatchEvent::Delete(object) => {
                let verdict = self.admit(object.meta());
                if verdict == Verdict::News {
                    self.bury(self.key(object.meta()));
                }
                return verdict;
            }
        }
        Verdict::News
    }

    /// The empty list is true after all.
    pub(super) fn believe_empty(&mut self) {
        self.versions.clear();
        self.deleted.clear();
        self.known_before_list = 0;
    }

    fn admit(&mut self, meta: &ObjectMeta) -> Verdict {
        let Some(version) = meta.resource_version.as_deref().and_then(parse) else { return Verdict::News };
        let key = self.key(meta);
        let known = self.versions.entry(key).or_insert(version);
        if version < *known {
            return Verdict::Late;
        }
        *known = version;
        self.newest = self.newest.max(version);
        // It lives (again).
        self.deleted.retain(|deleted| *deleted != key);
        Verdict::News
    }

    /// Its version stays known for a while, so that an event from before the deletion does not bring it back.
    fn bury(&mut self, key: u64) {
        if !self.versions.contains_key(&key) {
            return;
        }
        self.deleted.push_back(key);
        if self.deleted.len() > DELETED_MAX
            && let Some(oldest) = self.deleted.pop_front()
        {
            self.versions.remove(&oldest);
        }
    }

    fn key(&self, meta: &ObjectMeta) -> u64 {
        self.hasher.hash_one((&meta.namespace, &meta.name))
    }
}

/// Asks whether there is really nothing: the list has to be empty at a resourceVersion beyond all that we have seen. A server
/// that has lost its state, or has not read it yet, lists nothing at an older one.
pub(super) async fn confirm_empty<K>(api: &Api<K>, config: &kube::runtime::watcher::Config, newest: u64) -> bool
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
{
    let mut parameters = kube::api::ListParams::default().limit(1);
    parameters.label_selector.clone_from(&config.label_selector);
    parameters.field_selector.clone_from(&config.field_selector);
    let Ok(list) = api.list_metadata(&parameters).await else { return false };
    let version = list.metadata.resource_version.as_deref().and_then(parse);
    list.items.is_empty() && version.is_none_or(|version| version > newest)
}

fn parse(version: &str) -> Option<u64> {
    version.parse().ok()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;

    use super::*;

    fn object(name: &str, version: &str) -> Service {
        let metadata = ObjectMeta {
            name: Some(name.into()),
            resource_version: (!version.is_empty()).then(|| version.into()),
            ..ObjectMeta::default()
        };
        Service { metadata, ..Service::default() }
    }

    fn listed(names: &[&str]) -> Freshness {
        let mut freshness = Freshness::default();
        freshness.judge(&WatchEvent::<Service>::Init);
        for name in names {
            assert_eq!(freshness.judge(&WatchEvent::InitApply(object(name, "5"))), Verdict::News);
        }
        assert_eq!(freshness.judge(&WatchEvent::<Service>::InitDone), Verdict::News);
        freshness
    }

    #[test]
    fn an_older_version_of_an_object_is_late() {
        let mut freshness = listed(&["a", "b"]);
        for (name, version, expect) in [
            ("a", "7", Verdict::News),
            ("a", "7", Verdict::News),
            ("a", "6", Verdict::Late),
            // Another object's older version: out of order, and still news.
            ("b", "6", Verdict::News),
            ("c", "3", Verdict::News),
            ("a", "", Verdict::News),
            ("a", "x", Verdict::News),
        ] {
            assert_eq!(freshness.judge(&WatchEvent::Apply(object(name, version))), expect, "{name} {version}");
        }
        assert_eq!(freshness.newest(), 7);
    }

    #[test]
    fn the_dead_stay_dead_until_they_are_made_again() {
        let mut freshness = listed(&["a"]);
        assert_eq!(freshness.judge(&WatchEvent::Delete(object("a", "9"))), Verdict::News);
        assert_eq!(freshness.judge(&WatchEvent::Apply(object("a", "8"))), Verdict::Late);
        assert_eq!(freshness.judge(&WatchEvent::Apply(object("a", "10"))), Verdict::News);
        assert_eq!(freshness.judge(&WatchEvent::Delete(object("a", "9"))), Verdict::Late, "of the one before");
        assert_eq!(freshness.judge(&WatchEvent::Apply(object("a", "11"))), Verdict::News);
    }

    #[test]
    fn deletions_are_forgotten_in_time() {
        let mut freshness = listed(&[]);
        for number in 0..2 * DELETED_MAX {
            freshness.judge(&WatchEvent::Apply(object(&number.to_string(), "5")));
            freshness.judge(&WatchEvent::Delete(object(&number.to_string(), "6")));
        }
        assert_eq!((freshness.versions.len(), freshness.deleted.len()), (DELETED_MAX, DELETED_MAX));
    }

    #[test]
    fn an_empty_list_is_suspicious_where_something_was() {
        let mut empty = listed(&[]);
        empty.judge(&WatchEvent::<Service>::Init);
        assert_eq!(empty.judge(&WatchEvent::<Service>::InitDone), Verdict::News);
        let mut freshness = listed(&["a"]);
        for _ in 0..3 {
            freshness.judge(&WatchEvent::<Service>::Init);
            assert_eq!(freshness.judge(&WatchEvent::<Service>::InitDone), Verdict::Vanished);
        }
        freshness.believe_empty();
        freshness.judge(&WatchEvent::<Service>::Init);
        assert_eq!(freshness.judge(&WatchEvent::<Service>::InitDone), Verdict::News);
    }

    #[test]
    fn a_list_may_be_older_than_what_was_known() {
        let mut freshness = listed(&["a"]);
        freshness.judge(&WatchEvent::Apply(object("a", "100")));
        freshness.judge(&WatchEvent::<Service>::Init);
        freshness.judge(&WatchEvent::InitApply(object("a", "50")));
        assert_eq!(freshness.judge(&WatchEvent::<Service>::InitDone), Verdict::News);
        assert_eq!(freshness.judge(&WatchEvent::Apply(object("a", "51"))), Verdict::News);
    }
}
