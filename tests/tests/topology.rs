//! The lab itself: pods reach each other across nodes, every transport is answered, and nothing is left behind.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use trama_lab::{CLIENT_ADDRESSES, Claim, Failure, Probe, Topology, Transport, wait_for};

const TRANSPORTS: [Transport; 3] = [Transport::Tcp, Transport::Udp, Transport::UdpConnected];

#[test]
fn pods_reach_pods_across_nodes_in_both_families() {
    let lab = Topology::new(2).unwrap();
    let client = lab.add_pod(1, "client").unwrap();
    let mut server = lab.add_pod(2, "server").unwrap();
    server.serve(&[80], &[80]).unwrap();
    for (address, own) in server.addresses().into_iter().zip(client.addresses()) {
        for transport in TRANSPORTS {
            for place in [client.place(), client.place().outside_cgroup()] {
                let reply = place.probe(Probe::new((address, 80).into(), transport)).unwrap().unwrap();
                assert_eq!((reply.server.as_str(), reply.seen_source.ip()), ("server", own));
                assert_eq!((reply.server_address, reply.seen_peer), ((address, 80).into(), (address, 80).into()));
            }
        }
    }
}

#[test]
fn nodes_and_the_outside_reach_their_peers() {
    let lab = Topology::new(2).unwrap();
    let mut server = lab.add_pod(1, "server").unwrap();
    server.serve(&[80], &[]).unwrap();
    let [first, second] = [1, 2].map(|number| lab.node(number).unwrap());
    let sources = first.addresses().into_iter().zip(second.addresses());
    for (address, (_, remote)) in server.addresses().into_iter().zip(sources) {
        let probe = Probe::new((address, 80).into(), Transport::Tcp);
        assert_eq!(first.place().probe(probe).unwrap().unwrap().server, "server");
        assert_eq!(second.place().probe(probe).unwrap().unwrap().seen_source.ip(), remote);
    }
    for (address, own) in first.addresses().into_iter().zip(CLIENT_ADDRESSES) {
        // No one listens on the node, so it says so at once: the client has a way to the node and back.
        let probe = Probe::new((address, 81).into(), Transport::Tcp);
        assert_eq!(lab.client().probe(probe).unwrap(), Err(Failure::Refused), "from {own}");
    }
}

#[test]
fn a_stopped_server_refuses_and_a_removed_pod_is_gone() {
    let lab = Topology::new(1).unwrap();
    let mut server = lab.add_pod(1, "server").unwrap();
    server.serve(&[80], &[]).unwrap();
    let [address, _] = server.addresses();
    let probe = Probe::new((address, 80).into(), Transport::Tcp);
    let node = lab.node(1).unwrap().place();
    assert!(node.probe(probe).unwrap().is_ok());
    server.stop_serving().unwrap();
    assert_eq!(node.probe(probe).unwrap(), Err(Failure::Refused));
    drop(server);
    let again = lab.add_pod(1, "server").unwrap();
    assert_eq!(again.addresses()[0], address, "the address of a removed pod is free again");
}

/// A folder that goes while its neighbour looks at it is taken for a dead process's lab.
#[test]
fn no_lab_is_given_up_while_labs_are_swept() {
    let claim = Claim::take(&format!("swept{}", std::process::id())).unwrap();
    let (folder, name) = (claim.folder(), claim.netns_name("only"));
    claim.netns("only").unwrap();
    let sweeping = fs::File::open("/run/trama-lab").unwrap();
    sweeping.lock().unwrap();
    let giving_up = std::thread::spawn(|| drop(claim));
    let emptied = || Ok(node_sys::Netns::list(&name).map(|names| names.is_empty().then_some(()))?);
    wait_for("the lab's namespace being gone", Duration::from_secs(10), emptied).unwrap();
    let ended = || Ok((giving_up.is_finished() || !folder.exists()).then_some(()));
    assert!(wait_for("the lab being gone", Duration::from_millis(300), ended).is_err(), "it did not wait");
    drop(sweeping);
    giving_up.join().unwrap();
    assert!(!folder.exists());
}

/// Whoever takes a lab removes what dead processes left, and must not take one that is just being given up for that.
#[test]
fn labs_are_given_up_while_others_are_taken() {
    let come_and_go = |worker: usize| {
        for round in 0..100 {
            let claim = Claim::take(&format!("come{worker}go{round}x{}", std::process::id())).unwrap();
            let folder = claim.folder();
            drop(claim);
            assert!(!folder.exists(), "{} is left", folder.display());
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4).map(|worker| scope.spawn(move || come_and_go(worker))).collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}

#[test]
fn labs_run_side_by_side_and_leave_nothing() {
    let machine_links = links();
    let labs = [Topology::new(2).unwrap(), Topology::new(1).unwrap()];
    let ids: Vec<String> = labs.iter().map(|lab| lab.claim().id().to_owned()).collect();
    let mut pods: Vec<_> = labs.iter().map(|lab| lab.add_pod(1, "server").unwrap()).collect();
    for (pod, lab) in pods.iter_mut().zip(&labs) {
        pod.serve(&[80], &[]).unwrap();
        let probe = Probe::new((pod.addresses()[0], 80).into(), Transport::Tcp);
        assert!(lab.node(1).unwrap().place().probe(probe).unwrap().is_ok());
    }
    assert!(ids.iter().all(|id| !left_of(id).is_empty()));
    drop(pods);
    drop(labs);
    for id in ids {
        assert_eq!(left_of(&id), Vec::<PathBuf>::new());
    }
    assert_eq!(links(), machine_links, "the machine's own links have not changed");
}

#[test]
fn a_killed_lab_is_removed_by_the_next_one() {
    let mut owner = Command::new(env!("CARGO_BIN_EXE_trama-lab"))
        .args(["hold", "--id", &format!("killed{}", std::process::id())])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 1];
    std::io::Read::read_exact(owner.stdout.as_mut().unwrap(), &mut ready).unwrap();
    let id = format!("killed{}", std::process::id());
    assert!(!left_of(&id).is_empty());
    assert!(Topology::with_id(&id, 1).is_err(), "a living owner keeps its lab");
    owner.kill().unwrap();
    owner.wait().unwrap();
    assert!(!left_of(&id).is_empty());
    drop(Topology::new(1).unwrap());
    assert_eq!(left_of(&id), Vec::<PathBuf>::new());
}

#[test]
fn an_interrupted_lab_is_removed_by_itself() {
    let id = format!("ended{}", std::process::id());
    let mut owner = Command::new(env!("CARGO_BIN_EXE_trama-lab"))
        .args(["hold", "--id", &id])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 1];
    std::io::Read::read_exact(owner.stdout.as_mut().unwrap(), &mut ready).unwrap();
    node_sys::terminate(&owner).unwrap();
    assert_eq!(owner.wait().unwrap().code(), Some(143));
    assert_eq!(left_of(&id), Vec::<PathBuf>::new());
}

/// Everything on this machine that carries the lab's name.
fn left_of(id: &str) -> Vec<PathBuf> {
    let cgroup = node_sys::cgroup2_mount().unwrap().join(format!("trama-lab-{id}"));
    let folder = PathBuf::from("/run/trama-lab").join(id);
    let mounts = node_sys::mounts_of_type("bpf").unwrap().into_iter().filter(|path| path.starts_with(&folder));
    let names = node_sys::Netns::list(&format!("trama-lab-{id}-")).unwrap().into_iter().map(PathBuf::from);
    [cgroup, folder.clone()].into_iter().filter(|path| path.exists()).chain(mounts).chain(names).collect()
}

/// Names of the links in the machine's own namespace.
fn links() -> Vec<String> {
    let entries = fs::read_dir("/sys/class/net").unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
