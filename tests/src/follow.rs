//! After the table: shows what every change of a Service or of its endpoints does to its answers.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::Result;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::Api;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;

use crate::survey::{Row, ask, questions};
use crate::{Cluster, Table};

/// Changed names that wait to be shown; more are dropped, as the newest state is asked for anyway.
const WAITING_MAX: usize = 256;
/// Changes that come within this time are shown together.
const TOGETHER: Duration = Duration::from_millis(100);
/// How long a change may take to be right before its rows are shown as they are.
const RIGHT_LIMIT: Duration = Duration::from_secs(2);

/// Follows until the process is ended by a signal.
pub(crate) fn follow(cluster: &Cluster) {
    let (sender, changes) = sync_channel(WAITING_MAX);
    let services: Api<Service> = Api::all(cluster.client());
    let slices: Api<EndpointSlice> = Api::all(cluster.client());
    cluster.spawn(report(services, sender.clone(), |service| Some(service.name_any())));
    cluster.spawn(report(slices, sender, |slice| slice.labels().get("kubernetes.io/service-name").cloned()));
    while let Some(names) = next_changes(&changes) {
        let seen = Instant::now();
        let rows = rows_about(cluster, &names, seen);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        match rows {
            Ok(rows) if rows.is_empty() => println!("gone: {}\n", names.join(", ")),
            Ok(rows) => println!("changed: {}\n{}", names.join(", "), Table(&rows)),
            // A pod that is just going, or the API server: the cluster stays up, as a real one would.
            Err(error) => println!("changed: {}, and could not be asked: {error:#}\n", names.join(", ")),
        }
    }
}

/// Sends the names of changed Services; what is there at the beginning is no change.
async fn report<K>(api: Api<K>, changes: SyncSender<String>, service_of: fn(&K) -> Option<String>)
where
    K: Resource + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
{
    let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
    while let Some(event) = events.next().await {
        // The watcher starts again by itself after an error.
        if let Ok(watcher::Event::Apply(object) | watcher::Event::Delete(object)) = event
            && let Some(name) = service_of(&object)
        {
            // Full or closed: the change is not shown, but nothing is lost.
            let _ = changes.try_send(name);
        }
    }
}

fn next_changes(changes: &Receiver<String>) -> Option<BTreeSet<String>> {
    let mut names = BTreeSet::from([changes.recv().ok()?]);
    loop {
        match changes.recv_timeout(TOGETHER) {
            Ok(name) => names.extend([name]),
            Err(RecvTimeoutError::Timeout) => return Some(names),
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}

/// Asks until every row is right or the limit has passed.
fn rows_about(cluster: &Cluster, names: &BTreeSet<String>, seen: Instant) -> Result<Vec<Row>> {
    loop {
        let mut asked = questions(cluster)?;
        asked.retain(|question| names.contains(question.service.rsplit('/').next().unwrap_or_default()));
        let rows = asked.iter().map(|question| ask(cluster, question)).collect::<Result<Vec<_>>>()?;
        if rows.iter().all(|row| row.fault.is_none()) || seen.elapsed() > RIGHT_LIMIT {
            return Ok(rows);
        }
    }
}
