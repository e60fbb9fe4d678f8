//! Keeps a [`Cache`] equal to the server's objects of one kind, and tells what changed.

use std::sync::Arc;

use futures::StreamExt as _;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::cache::{Cache, Key};

/// A change of one object: its state before and after.
pub(crate) struct Changed<K> {
    pub(crate) before: Option<Arc<K>>,
    pub(crate) after: Option<Arc<K>>,
}

/// What a controller does with changes.
pub(crate) trait Handler<K>: Send + 'static {
    /// One object changed.
    fn changed(&self, change: &Changed<K>);

    /// Everything was read anew; what went away meanwhile was not reported one by one.
    fn replaced(&self);
}

/// Follows one kind until the task is dropped. `synced` becomes true after the first complete list.
pub(crate) async fn follow<K>(api: Api<K>, cache: Arc<Cache<K>>, handler: impl Handler<K>, synced: watch::Sender<bool>)
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
{
    let mut events = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
    let mut fresh: Vec<Arc<K>> = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => fresh.clear(),
            Ok(Event::InitApply(object)) => fresh.push(Arc::new(object)),
            Ok(Event::InitDone) => {
                cache.replace(std::mem::take(&mut fresh));
                synced.send_replace(true);
                handler.replaced();
            }
            Ok(Event::Apply(object)) => {
                let after = Arc::new(object);
                let before = cache.put(Arc::clone(&after));
                handler.changed(&Changed { before, after: Some(after) });
            }
            Ok(Event::Delete(object)) => {
                let before = cache.remove(&Key::of(&object)).or_else(|| Some(Arc::new(object)));
                handler.changed(&Changed { before, after: None });
            }
            // The watcher begins again by itself, later each time.
            Err(error) => tracing::debug!(%error, "watch interrupted"),
        }
    }
}
