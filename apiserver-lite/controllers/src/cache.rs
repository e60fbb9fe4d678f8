//! What the controllers know of the cluster: the last seen state of each object, by namespace and name.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use kube::{Resource, ResourceExt as _};

/// Namespace and name; the namespace of cluster-scoped objects is empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn of<K: Resource>(object: &K) -> Self {
        Self { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
    }
}

type Objects<K> = HashMap<String, HashMap<String, Arc<K>>>;

/// Objects of one kind. As many as the cluster has.
#[derive(Debug)]
pub(crate) struct Cache<K> {
    objects: RwLock<Objects<K>>,
}

impl<K> Default for Cache<K> {
    fn default() -> Self {
        Self { objects: RwLock::default() }
    }
}

impl<K: Resource> Cache<K> {
    /// One object.
    pub(crate) fn get(&self, key: &Key) -> Option<Arc<K>> {
        self.read(|objects| objects.get(&key.namespace)?.get(&key.name).cloned())
    }

    /// The objects of a namespace that `wanted` accepts, in no order.
    pub(crate) fn select(&self, namespace: &str, wanted: impl Fn(&K) -> bool) -> Vec<Arc<K>> {
        self.read(|objects| {
            let all = objects.get(namespace).into_iter().flat_map(HashMap::values);
            all.filter(|object| wanted(object)).cloned().collect()
        })
    }

    /// The keys of all objects.
    pub(crate) fn keys(&self) -> Vec<Key> {
        self.read(|objects| {
            let all = objects.values().flat_map(HashMap::values);
            all.map(|object| Key::of(&**object)).collect()
        })
    }

    /// Every object that `wanted` accepts.
    pub(crate) fn select_all(&self, wanted: impl Fn(&K) -> bool) -> Vec<Arc<K>> {
        self.read(|objects| {
            let all = objects.values().flat_map(HashMap::values);
            all.filter(|object| wanted(object)).cloned().collect()
        })
    }

    /// Takes an object over unless a newer state of it is known, and returns the state before.
    pub(crate) fn put(&self, object: Arc<K>) -> Option<Arc<K>> {
        let key = Key::of(&*object);
        self.write(|objects| {
            let slot = objects.entry(key.namespace).or_default();
            if slot.get(&key.name).is_some_and(|known| version(&**known) > version(&*object)) {
                return slot.get(&key.name).cloned();
            }
            slot.insert(key.name, object)
        })
    }

    /// Forgets an object, and returns its last state.
    pub(crate) fn remove(&self, key: &Key) -> Option<Arc<K>> {
        self.write(|objects| {
            let slot = objects.get_mut(&key.namespace)?;
            let removed = slot.remove(&key.name);
            if slot.is_empty() {
                objects.remove(&key.namespace);
            }
            removed
        })
    }

    /// Replaces everything by a fresh list.
    pub(crate) fn replace(&self, fresh: Vec<Arc<K>>) {
        let mut all: Objects<K> = HashMap::new();
        for object in fresh {
            let key = Key::of(&*object);
            all.entry(key.namespace).or_default().insert(key.name, object);
        }
        self.write(|objects| *objects = all);
    }

    fn read<T>(&self, work: impl FnOnce(&Objects<K>) -> T) -> T {
        work(&self.objects.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, work: impl FnOnce(&mut Objects<K>) -> T) -> T {
        work(&mut self.objects.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Versions of one server grow with every write and may be compared since Kubernetes 1.35.
fn version<K: Resource>(object: &K) -> u64 {
    object.meta().resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    fn object(name: &str, version: &str) -> Arc<ConfigMap> {
        let mut object = ConfigMap::default();
        object.metadata.name = Some(name.to_owned());
        object.metadata.namespace = Some("ns".to_owned());
        object.metadata.resource_version = Some(version.to_owned());
        Arc::new(object)
    }

    #[test]
    fn an_older_state_does_not_replace_a_newer_one() {
        let cache = Cache::default();
        assert!(cache.put(object("a", "10")).is_none());
        cache.put(object("a", "9"));
        let key = Key { namespace: "ns".to_owned(), name: "a".to_owned() };
        assert_eq!(cache.get(&key).unwrap().metadata.resource_version.as_deref(), Some("10"));
        cache.remove(&key);
        assert!(cache.keys().is_empty());
    }
}
