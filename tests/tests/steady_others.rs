//! Programs of somebody else on the same hooks, while ten thousand connections are open: they see the packets, and nobody notices.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use trama_lab::steady::Steady;
use trama_lab::{Foreign, FrameLinks, wait_for};

/// One at a time: each takes as much of the machine as it can have.
static ALONE: Mutex<()> = Mutex::new(());

const LIMIT: Duration = Duration::from_secs(30);

/// Waits until a program that is attached has run.
fn runs(foreign: &Foreign) -> anyhow::Result<()> {
    let before = foreign.runs()?;
    wait_for("somebody else's programs seeing packets", LIMIT, || Ok((foreign.runs()? > before + 100).then_some(())))
}

#[test]
fn other_tc_programs_before_ours_and_behind() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let steady = Steady::start(&[]).unwrap();
    let cluster = &steady.cluster;
    let node = cluster.topology().node(1).unwrap();
    let ((), outcome) = steady
        .during(|| {
            let mut programs = Vec::new();
            for (before, interface) in [true, false].into_iter().zip(["eth0", "eth0"]) {
                let mut foreign = Foreign::load()?;
                foreign.attach_tc(node.netns(), interface, before)?;
                runs(&foreign)?;
                programs.push(foreign);
            }
            // Those that are there keep their places when ours are replaced.
            cluster.kill_proxy(1)?;
            cluster.restart_proxy(1)?;
            programs.iter().try_for_each(runs)
        })
        .unwrap();
    outcome.is_clean().unwrap();
}

#[test]
fn another_xdp_program_keeps_its_place_and_ours_comes_when_it_goes() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let steady = Steady::start(&[]).unwrap();
    let cluster = &steady.cluster;
    let _links = FrameLinks::of(cluster.topology()).unwrap();
    let node = cluster.topology().node(1).unwrap();
    let log = || fs::read_to_string(cluster.folder().join("proxy-node-1.log")).unwrap_or_default();
    let pinned = || -> anyhow::Result<bool> {
        let versions = fs::read_dir(node.bpffs().join("trama"))?.flatten();
        let mut links = versions.filter_map(|version| fs::read_dir(version.path().join("links")).ok()).flatten();
        Ok(links.any(|link| link.is_ok_and(|link| link.file_name().to_string_lossy().starts_with("xdp_ingress"))))
    };
    let ((), outcome) = steady
        .during(|| {
            let mut foreign = Foreign::load()?;
            foreign.attach_xdp(node.netns(), "eth0")?;
            cluster.kill_proxy(1)?;
            cluster.restart_proxy_with(1, &["--xdp-interfaces", "eth0"])?;
            let refusal = || Ok(log().contains("no XDP here: its packets take the tc hook").then_some(()));
            wait_for("the refusal in the log", LIMIT, refusal)?;
            assert!(!pinned()?, "our program on an interface that has another");
            runs(&foreign)?;
            drop(foreign);
            wait_for("our program on the interface", LIMIT, || Ok(pinned()?.then_some(())))
        })
        .unwrap();
    outcome.is_clean().unwrap();
}
