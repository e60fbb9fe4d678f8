//! An operator detaches the programs, removes the pins or empties a map: within ten seconds all of it is back.
#![allow(
    missing_docs,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapData};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{Cluster, ClusterOptions, Place, Transport, wait_for};

/// How long a repair may take.
const REPAIR_LIMIT: Duration = Duration::from_secs(10);
const REPAIRS: &str = "trama_repairs_total";

struct Lab {
    cluster: Cluster,
    pins: PathBuf,
    target: SocketAddr,
    places: [Place; 2],
}

fn start(proxy_arguments: &'static [&'static str]) -> Lab {
    let cluster = Cluster::start(&ClusterOptions { proxy_arguments, ..ClusterOptions::default() }).unwrap();
    cluster.apply_all([pod("web", 2, "web", &[8080], &[]), pod("client", 1, "client", &[], &[])]).unwrap();
    cluster.apply(ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).build()).unwrap();
    let target = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    let client = cluster.place_in_pod("default/client").unwrap();
    let places = [client.clone(), client.outside_cgroup()];
    for place in &places {
        cluster.wait_for_answers(place, target, Transport::Tcp, &["web"]).unwrap();
    }
    let versions = fs::read_dir(cluster.topology().node(1).unwrap().bpffs().join("trama")).unwrap();
    let pins = versions.map(|version| version.unwrap().path()).next().unwrap();
    Lab { cluster, pins, target, places }
}

impl Lab {
    /// What is counted; `None` while trama-proxy is too busy to say.
    fn repairs(&self) -> Option<f64> {
        self.cluster.metrics(1).ok()?.get(REPAIRS).copied()
    }

    /// Breaks something, waits until the repair is counted, and asks for answers. That it was broken is what is counted.
    fn breaks_and_heals(&self, what: &str, act: impl FnOnce(&Path)) {
        let before = wait_for("the count of repairs", REPAIR_LIMIT, || Ok(self.repairs())).unwrap();
        act(&self.pins);
        let repaired = || Ok(self.repairs().filter(|repairs| *repairs > before));
        wait_for(&format!("repair of {what}"), REPAIR_LIMIT, repaired).unwrap();
        for place in &self.places {
            self.cluster.wait_for_answers(place, self.target, Transport::Tcp, &["web"]).unwrap();
        }
        assert!(self.pins.join("maps/FRONTENDS_V4").exists(), "{what}");
    }
}

#[test]
fn what_an_operator_takes_away_comes_back() {
    let lab = start(&[]);
    lab.breaks_and_heals("the programs' links", |pins| fs::remove_dir_all(pins.join("links")).unwrap());
    lab.breaks_and_heals("everything pinned", |pins| fs::remove_dir_all(pins).unwrap());
    lab.breaks_and_heals("the frontends", |pins| {
        let map = Map::from_map_data(MapData::from_pin(pins.join("maps/FRONTENDS_V4")).unwrap()).unwrap();
        let mut frontends: HashMap<_, [u8; 8], [u8; 32]> = HashMap::try_from(map).unwrap();
        let keys: Vec<_> = frontends.keys().map(Result::unwrap).collect();
        keys.iter().for_each(|key| frontends.remove(key).unwrap());
    });
    lab.breaks_and_heals("what need not be looked up", |pins| {
        let map = Map::from_map_data(MapData::from_pin(pins.join("maps/ABSENT_V4")).unwrap()).unwrap();
        let mut absent: Array<_, u64> = Array::try_from(map).unwrap();
        (0..absent.len()).for_each(|index| absent.set(index, u64::MAX, 0).unwrap());
    });
    lab.breaks_and_heals("the slots", |pins| empty::<4>(pins, "SLOTS_V4"));
    lab.breaks_and_heals("the backends", |pins| empty::<16>(pins, "BACKENDS_V4"));
    lab.breaks_and_heals("the ClusterIPs", |pins| {
        let map = Map::from_map_data(MapData::from_pin(pins.join("maps/CLUSTER_IPS_V4")).unwrap()).unwrap();
        let mut addresses: HashMap<_, [u8; 4], [u8; 4]> = HashMap::try_from(map).unwrap();
        let key = addresses.keys().next().unwrap().unwrap();
        addresses.remove(&key).unwrap();
    });
}

/// Fills with zeros what a cluster this small uses of an array.
fn empty<const SIZE: usize>(pins: &Path, name: &str) {
    let map = Map::from_map_data(MapData::from_pin(pins.join("maps").join(name)).unwrap()).unwrap();
    let mut entries: Array<_, [u8; SIZE]> = Array::try_from(map).unwrap();
    (0..64).for_each(|index| entries.set(index, [0; SIZE], 0).unwrap());
}

#[test]
fn a_deleted_qdisc_comes_back() {
    let lab = start(&["--attach-mode", "clsact"]);
    let netns = lab.cluster.topology().node(1).unwrap().netns().label().to_owned();
    let interface = lab.cluster.host_interface("default/client").unwrap();
    lab.breaks_and_heals("a pod's qdisc", |_| {
        let tc = std::process::Command::new("nsenter")
            .args([&format!("--net=/run/netns/{netns}"), "tc", "qdisc", "del", "dev", &interface, "clsact"])
            .status();
        assert!(tc.unwrap().success());
    });
}
