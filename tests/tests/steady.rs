//! Ten thousand open connections and a thousand questions a second, and none of them notices: killed agents, an API server that is gone.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use trama_lab::Transport;
use trama_lab::scenario::pod;
use trama_lab::steady::Steady;
use trama_lab::{patient, wait_for};

/// One at a time: each takes as much of the machine as it can have.
static ALONE: Mutex<()> = Mutex::new(());

/// How often the agent is killed.
const KILLS: usize = 5;
/// How long there is no API server.
const AWAY: Duration = Duration::from_secs(30);

#[test]
fn agents_that_are_killed_while_endpoints_change() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let steady = Steady::start(&[]).unwrap();
    let (over, changes) = (AtomicBool::new(false), AtomicUsize::new(0));
    let ((), outcome) = steady
        .during(|| {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        steady.change_endpoints(changes.fetch_add(1, Ordering::Relaxed)).unwrap();
                    }
                });
                let killed = (0..KILLS).try_for_each(|_| {
                    // In the middle of an update, wherever that is.
                    let seen = changes.load(Ordering::Relaxed);
                    wait_for("some updates", AWAY, || Ok((changes.load(Ordering::Relaxed) > seen + 3).then_some(())))?;
                    steady.cluster.kill_proxy(1)?;
                    steady.cluster.restart_proxy(1)
                });
                over.store(true, Ordering::Relaxed);
                killed
            })
        })
        .unwrap();
    println!("{} updates, {KILLS} kills", changes.load(Ordering::Relaxed));
    outcome.is_clean().unwrap();
}

#[test]
fn thirty_seconds_without_an_api_server() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let steady = Steady::start(&[]).unwrap();
    let cluster = &steady.cluster;
    let ((), outcome) = steady
        .during(|| {
            cluster.take_apiserver_away()?;
            let start = Instant::now();
            wait_for("the time without an API server", AWAY * 2, || Ok((start.elapsed() > AWAY).then_some(())))?;
            cluster.give_apiserver_back()
        })
        .unwrap();
    outcome.is_clean().unwrap();
    // And what changed meanwhile is known soon after.
    cluster.apply(pod("web-4", 2, "web", &[8080], &[])).unwrap();
    let vip = cluster.cluster_ips("web").unwrap()[0];
    let client = cluster.place_in_pod("default/client").unwrap();
    let all = ["web-1", "web-2", "web-3", "web-4"];
    wait_for("the watches", patient(AWAY), || {
        Ok(cluster.wait_for_answers(&client, (vip, 80).into(), Transport::Tcp, &all).ok().map(drop))
    })
    .unwrap();
}
