//! Mode nftables: the same behaviours, by rules; and what is its own: operators who flush, restarts, and that nothing stays behind.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, Patch, PatchParams};
use node_sys::nftables::{Batch, ElementRef, Family, Nftables, Table};
use node_sys::sysctl;
use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{CLIENT_ADDRESSES, Cluster, ClusterOptions, Failure, Place, Probe, Transport, binary, wait_for};

const ARGUMENTS: &[&str] = &["--proxy-mode=nftables"];
const TABLE: &str = "trama";
/// A closed door is known for one after this long.
const SILENCE: Duration = Duration::from_millis(500);
/// An ICMP message that comes while `connect` holds its socket is dropped by the kernel; the SYN's repetition is refused.
const REFUSAL_LIMIT: Duration = Duration::from_millis(2500);
/// How soon a table that somebody flushed is whole again.
const REPAIR_LIMIT: Duration = Duration::from_secs(10);

fn cluster() -> Cluster {
    let cluster = Cluster::start(&ClusterOptions { proxy_arguments: ARGUMENTS, ..ClusterOptions::default() }).unwrap();
    // The kernel sends few ICMP errors to one client in a second; these tests want one for every packet.
    for node in cluster.topology().nodes() {
        let unlimited = || {
            sysctl::write("net/ipv4/icmp_ratelimit", "0")?;
            sysctl::write("net/ipv6/icmp/ratelimit", "0")
        };
        node.netns().run(unlimited).unwrap().unwrap();
    }
    cluster
}

fn wait_for_failure(place: &Place, target: SocketAddr, transport: Transport, failure: &Failure) {
    let timeout = if *failure == Failure::Timeout { SILENCE } else { REFUSAL_LIMIT };
    let probe = Probe { timeout, ..Probe::new(target, transport) };
    let what = format!("{failure} at {target} over {transport:?}");
    wait_for(&what, CHANGE_LIMIT, || Ok((place.probe(probe)?.as_ref() == Err(failure)).then_some(()))).unwrap();
    for outcome in place.probe_times(probe, 3).unwrap() {
        assert_eq!(outcome.as_ref(), Err(failure), "{transport:?} {target}");
    }
}

/// `web` in two families with `web-1` on node-1 and `web-2` on node-2, and a Pod `client` on node-1.
fn with_web(fields: &[(&str, serde_json::Value)]) -> (Cluster, Place) {
    let cluster = cluster();
    cluster.apply_all([1, 2].map(|n| pod(&format!("web-{n}"), n, "web", &[8080], &[5353]))).unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("ipFamilyPolicy", json!("RequireDualStack"));
    let service = fields.iter().fold(service, |service, (field, value)| service.with(field, value.clone()));
    cluster.apply(service.build()).unwrap();
    let client = cluster.place_in_pod("default/client").unwrap();
    (cluster, client)
}

#[test]
fn a_clusterip_reaches_every_endpoint_from_pods_and_nodes() {
    let (cluster, client) = with_web(&[]);
    let places = [client.clone(), cluster.topology().node(2).unwrap().place()];
    for ip in cluster.cluster_ips("web").unwrap() {
        for place in &places {
            for (port, transport) in [(80, Transport::Tcp), (53, Transport::Udp), (53, Transport::UdpConnected)] {
                cluster.wait_for_answers(place, (ip, port).into(), transport, &["web-1", "web-2"]).unwrap();
            }
        }
        let tally = cluster.wait_for_answers(&client, (ip, 80).into(), Transport::Tcp, &["web-1", "web-2"]).unwrap();
        let own: BTreeSet<IpAddr> = ["10.244.1.3", "fd00:10:244:1::3"].map(|ip| ip.parse().unwrap()).into();
        assert!(tally.sources().is_subset(&own), "pods keep their address: {:?}", tally.sources());
        // To itself: each of the two gets itself at times.
        let web = cluster.place_in_pod("default/web-1").unwrap();
        cluster.wait_for_answers(&web, (ip, 80).into(), Transport::Tcp, &["web-1", "web-2"]).unwrap();
        // Ports that nobody serves.
        wait_for_failure(&client, (ip, 81).into(), Transport::Tcp, &Failure::Refused);
        wait_for_failure(&client, (ip, 81).into(), Transport::UdpConnected, &Failure::Refused);
        wait_for_failure(&places[1], (ip, 81).into(), Transport::Tcp, &Failure::Refused);
    }
}

#[test]
fn a_nodeport_masks_its_client_unless_local_and_is_silent_without_a_local_endpoint() {
    let (cluster, _) = with_web(&[("type", json!("NodePort"))]);
    let outside = cluster.topology().client();
    let (tcp, udp) = (cluster.node_port("web", "TCP", 80).unwrap(), cluster.node_port("web", "UDP", 53).unwrap());
    for ip in cluster.topology().node(1).unwrap().addresses() {
        for (port, transport) in [(tcp, Transport::Tcp), (udp, Transport::Udp)] {
            let target = (ip, port).into();
            let tally = cluster.wait_for_answers(&outside, target, transport, &["web-1", "web-2"]).unwrap();
            assert!(!tally.sources().iter().any(|source| CLIENT_ADDRESSES.contains(source)), "{:?}", tally.sources());
        }
        let node = cluster.topology().node(1).unwrap().place();
        cluster.wait_for_answers(&node, (ip, tcp).into(), Transport::Tcp, &["web-1", "web-2"]).unwrap();
    }
    let local = ServiceManifest::new("local", Some("one")).port("TCP", 80, 8080).with("type", json!("NodePort"));
    let local = local.with("externalTrafficPolicy", json!("Local")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply_all([pod("one", 1, "one", &[8080], &[]), local.build()]).unwrap();
    let port = cluster.node_port("local", "TCP", 80).unwrap();
    for (index, ip) in cluster.topology().node(1).unwrap().addresses().into_iter().enumerate() {
        let tally = cluster.wait_for_answers(&outside, (ip, port).into(), Transport::Tcp, &["one"]).unwrap();
        assert_eq!(tally.sources(), &[CLIENT_ADDRESSES[index]].into(), "the client is seen");
        let there = cluster.topology().node(2).unwrap();
        wait_for_failure(&outside, (there.addresses()[index], port).into(), Transport::Tcp, &Failure::Timeout);
        // The node itself takes the short cut to endpoints elsewhere.
        let target = (there.addresses()[index], port).into();
        cluster.wait_for_answers(&there.place(), target, Transport::Tcp, &["one"]).unwrap();
    }
}

#[test]
fn without_endpoints_everybody_is_refused() {
    let cluster = cluster();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    let service = ServiceManifest::new("empty", Some("nobody")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply(service.build()).unwrap();
    let client = cluster.place_in_pod("default/client").unwrap();
    let node = cluster.topology().node(1).unwrap();
    let (tcp, udp) = (cluster.node_port("empty", "TCP", 80).unwrap(), cluster.node_port("empty", "UDP", 53).unwrap());
    for (ip, own) in cluster.cluster_ips("empty").unwrap().into_iter().zip(node.addresses()) {
        for place in [client.clone(), node.place()] {
            wait_for_failure(&place, (ip, 80).into(), Transport::Tcp, &Failure::Refused);
        }
        // A datagram of the node's own is refused by `send` itself, with EPERM, as with kube-proxy.
        wait_for_failure(&client, (ip, 53).into(), Transport::UdpConnected, &Failure::Refused);
        let outside = cluster.topology().client();
        wait_for_failure(&outside, (own, tcp).into(), Transport::Tcp, &Failure::Refused);
        wait_for_failure(&outside, (own, udp).into(), Transport::UdpConnected, &Failure::Refused);
    }
}

#[test]
fn a_client_with_affinity_stays_until_its_endpoint_goes_and_over_a_restart() {
    let affinity = [("sessionAffinity", json!("ClientIP")), ("type", json!("NodePort"))];
    let (cluster, client) = with_web(&affinity);
    let (vip, port) = (cluster.cluster_ips("web").unwrap()[0], cluster.node_port("web", "TCP", 80).unwrap());
    let vip = SocketAddr::new(vip, 80);
    let who = |target: SocketAddr| {
        let outcomes = client.probe_times(Probe::new(target, Transport::Tcp), 12).unwrap();
        let servers: BTreeSet<String> = outcomes.into_iter().map(|outcome| outcome.unwrap().server).collect();
        assert_eq!(servers.len(), 1, "{servers:?}");
        servers.into_iter().next().unwrap()
    };
    wait_for("an answer", CHANGE_LIMIT, || Ok(client.probe(Probe::new(vip, Transport::Tcp))?.ok())).unwrap();
    let first = who(vip);
    let node_port = SocketAddr::new(cluster.topology().node(1).unwrap().addresses()[0], port);
    assert_eq!(who(node_port), first, "affinity is of the ServicePort, not of its address");
    cluster.kill_proxy(1).unwrap();
    cluster.restart_proxy(1).unwrap();
    assert_eq!(who(vip), first, "after a restart");
    let gone = if first == "web-1" { 1 } else { 2 };
    cluster.delete(pod(&first, gone, "web", &[8080], &[5353])).unwrap();
    let other = format!("web-{}", 3 - gone);
    wait_for("the other endpoint", CHANGE_LIMIT, || {
        let answer = client.probe(Probe { timeout: SILENCE, ..Probe::new(vip, Transport::Tcp) })?;
        Ok(answer.is_ok_and(|reply| reply.server == other).then_some(()))
    })
    .unwrap();
    assert_eq!(who(vip), other);
}

#[test]
fn an_external_ip_is_taken_in_and_other_addresses_are_not() {
    let (cluster, client) = with_web(&[("externalIPs", json!(["198.51.100.7"]))]);
    let outside = cluster.topology().client();
    cluster.topology().route_client_through("198.51.100.0/24".parse().unwrap(), 1).unwrap();
    let target = "198.51.100.7:80".parse().unwrap();
    for place in [outside, client, cluster.topology().node(1).unwrap().place()] {
        cluster.wait_for_answers(&place, target, Transport::Tcp, &["web-1", "web-2"]).unwrap();
    }
}

#[test]
fn a_load_balancer_ip_admits_its_source_ranges_only() {
    // Ranges that overlap, one of them that of the outside client.
    let ranges = json!(["172.18.0.128/25", "172.18.0.200/32", "192.0.2.0/24"]);
    let (cluster, client) = with_web(&[("type", json!("LoadBalancer")), ("loadBalancerSourceRanges", ranges)]);
    let api: Api<Service> = Api::namespaced(cluster.client(), "default");
    let status = json!({ "status": { "loadBalancer": { "ingress": [{ "ip": "198.51.100.8" }] } } });
    cluster.block_on(api.patch_status("web", &PatchParams::default(), &Patch::Merge(status))).unwrap();
    cluster.topology().route_client_through("198.51.100.0/24".parse().unwrap(), 1).unwrap();
    let target = "198.51.100.8:80".parse().unwrap();
    let outside = cluster.topology().client();
    cluster.wait_for_answers(&outside, target, Transport::Tcp, &["web-1", "web-2"]).unwrap();
    wait_for_failure(&client, target, Transport::Tcp, &Failure::Timeout);
    let node_port = cluster.node_port("web", "TCP", 80).unwrap();
    let node = cluster.topology().node(1).unwrap().addresses();
    cluster.wait_for_answers(&client, (node[0], node_port).into(), Transport::Tcp, &["web-1", "web-2"]).unwrap();
    let everybody = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let everybody =
        everybody.with("type", json!("LoadBalancer")).with("loadBalancerSourceRanges", json!(["10.0.0.0/8"]));
    cluster.apply(everybody.with("ipFamilyPolicy", json!("RequireDualStack")).build()).unwrap();
    cluster.wait_for_answers(&client, target, Transport::Tcp, &["web-1", "web-2"]).unwrap();
    wait_for_failure(&outside, target, Transport::Tcp, &Failure::Timeout);
}

#[test]
fn an_address_that_a_service_could_have_is_silent() {
    let cluster = cluster();
    let node = cluster.topology().node(1).unwrap().place();
    let [outside, _] = CLIENT_ADDRESSES;
    let target = SocketAddr::new(outside, 81);
    wait_for_failure(&node, target, Transport::Tcp, &Failure::Refused);
    let range = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": { "name": "more" }, "spec": { "cidrs": ["172.18.0.192/26"] },
    });
    cluster.apply(range).unwrap();
    wait_for_failure(&node, target, Transport::Tcp, &Failure::Timeout);
}

#[test]
fn traffic_flows_while_the_proxy_is_dead_while_it_starts_again_and_while_it_writes_everything_anew() {
    let (cluster, client) = with_web(&[]);
    let vip = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    cluster.wait_for_answers(&client, vip, Transport::Tcp, &["web-1", "web-2"]).unwrap();
    let all_answer = |when: &str| {
        let outcomes = client.probe_times(Probe::new(vip, Transport::Tcp), 20).unwrap();
        assert!(outcomes.iter().all(Result::is_ok), "{when}: {outcomes:?}");
    };
    let before = table(&cluster, 1).unwrap();
    cluster.kill_proxy(1).unwrap();
    all_answer("no proxy");
    std::thread::scope(|scope| {
        let restart = scope.spawn(|| cluster.restart_proxy(1));
        while !restart.is_finished() {
            all_answer("takeover");
        }
        restart.join().unwrap().unwrap();
    });
    all_answer("afterwards");
    assert_ne!(table(&cluster, 1).unwrap().handle, before.handle, "the new process made the table anew");
    cluster.apply(pod("web-3", 2, "web", &[8080], &[5353])).unwrap();
    cluster.wait_for_answers(&client, vip, Transport::Tcp, &["web-1", "web-2", "web-3"]).unwrap();
}

/// What an operator did, and how.
type Damage = (&'static str, fn(&mut Batch));

#[test]
fn what_an_operator_flushes_or_deletes_is_repaired_and_counted() {
    let (cluster, client) = with_web(&[]);
    let vip = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    let damages: [Damage; 4] = [
        ("the table deleted", |batch| batch.delete_table()),
        ("a chain flushed", |batch| batch.flush_chain("nat-prerouting")),
        ("the frontends flushed", |batch| batch.flush_set("frontends")),
        ("the slots flushed", |batch| batch.flush_set("slots")),
    ];
    for (number, (what, damage)) in (1u32..).zip(damages) {
        cluster.wait_for_answers(&client, vip, Transport::Tcp, &["web-1", "web-2"]).unwrap();
        let mut batch = Batch::new(Family::Ipv4, TABLE);
        damage(&mut batch);
        in_node(&cluster, 1, move |nftables| nftables.commit(batch)).unwrap();
        let start = Instant::now();
        let probe = Probe { timeout: Duration::from_millis(200), ..Probe::new(vip, Transport::Tcp) };
        assert!(client.probe(probe).unwrap().is_err(), "{what}: nobody answers");
        wait_for(&format!("the repair of {what}"), REPAIR_LIMIT, || Ok(client.probe(probe)?.ok())).unwrap();
        println!("{what}: repaired after {:?}", start.elapsed());
        let metrics = cluster.metrics(1).unwrap();
        assert_eq!(metrics.get("trama_repairs_total").copied(), Some(f64::from(number)), "{what}");
    }
    // What others do to their own tables is none of ours.
    let mut batch = Batch::new(Family::Ipv4, "others");
    batch.add_table(b"");
    let handle = table(&cluster, 1).unwrap().handle;
    in_node(&cluster, 1, move |nftables| nftables.commit(batch)).unwrap();
    let audits = || Ok::<_, anyhow::Error>(cluster.metrics(1)?.get("trama_audits_total").copied().unwrap_or_default());
    let seen = audits().unwrap();
    wait_for("two audits", REPAIR_LIMIT * 2, || Ok((audits()? >= seen + 2.0).then_some(()))).unwrap();
    assert_eq!(table(&cluster, 1).unwrap().handle, handle);
}

#[test]
fn one_element_that_an_operator_deletes_is_put_back() {
    let (cluster, client) = with_web(&[]);
    let vip = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    cluster.wait_for_answers(&client, vip, Transport::Tcp, &["web-1", "web-2"]).unwrap();
    for (number, set) in (1u32..).zip(["frontends", "slots", "cluster-ips", "node-addresses"]) {
        let elements = || in_node(&cluster, 1, |nftables| nftables.elements(Family::Ipv4, TABLE, set)).unwrap();
        let (all, mut batch) = (elements(), Batch::new(Family::Ipv4, TABLE));
        batch.delete_element(set, ElementRef::key(&all.last().unwrap().key));
        in_node(&cluster, 1, move |nftables| nftables.commit(batch)).unwrap();
        assert_eq!(elements().len() + 1, all.len(), "{set}");
        wait_for(set, REPAIR_LIMIT, || Ok((elements().len() == all.len()).then_some(()))).unwrap();
        let repairs = || cluster.metrics(1).map(|all| all.get("trama_repairs_total").copied());
        wait_for("the count", CHANGE_LIMIT, || Ok((repairs()? == Some(f64::from(number))).then_some(()))).unwrap();
    }
    cluster.wait_for_answers(&client, vip, Transport::Tcp, &["web-1", "web-2"]).unwrap();
}

#[test]
fn cleanup_removes_our_tables_and_no_other() {
    let (cluster, client) = with_web(&[]);
    let vip = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    cluster.wait_for_answers(&client, vip, Transport::Tcp, &["web-1", "web-2"]).unwrap();
    let mut batch = Batch::new(Family::Ipv4, "others");
    batch.add_table(b"");
    in_node(&cluster, 1, move |nftables| nftables.commit(batch)).unwrap();
    cluster.kill_proxy(1).unwrap();
    for _ in 0..2 {
        let node = cluster.topology().node(1).unwrap();
        let mut command = Command::new(binary("trama-proxy").unwrap());
        command.arg("--cleanup").args(ARGUMENTS).arg("--bpffs").arg(node.bpffs());
        command.arg("--cgroup").arg(node.cgroup().path());
        let status = node.place().spawn(&mut command).unwrap().wait().unwrap();
        assert!(status.success(), "{status}");
        assert_eq!(table(&cluster, 1), None);
    }
    let others = in_node(&cluster, 1, |nftables| nftables.table(Family::Ipv4, "others")).unwrap();
    assert!(others.is_some());
}

fn in_node<T: Send>(cluster: &Cluster, number: usize, work: impl FnOnce(&mut Nftables) -> T + Send) -> T {
    let node = cluster.topology().node(number).unwrap();
    node.netns().run(|| work(&mut Nftables::open().unwrap())).unwrap()
}

fn table(cluster: &Cluster, number: usize) -> Option<Table> {
    in_node(cluster, number, |nftables| nftables.table(Family::Ipv4, TABLE)).unwrap()
}
