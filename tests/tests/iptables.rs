//! Mode iptables, with both kinds of iptables: every way to a Service, refusals, affinity, localhost, repair and removal.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, Patch, PatchParams};
use node_sys::Placement;
use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{CLIENT_ADDRESSES, Cluster, ClusterOptions, Failure, Outcome, Place, Probe, Transport, wait_for};

type Arguments = &'static [&'static str];
const NFT: Arguments = &["--proxy-mode=iptables", "--iptables-binary=nft"];
const LEGACY: Arguments = &["--proxy-mode=iptables", "--iptables-binary=legacy"];

fn start(proxy_arguments: Arguments) -> Cluster {
    Cluster::start(&ClusterOptions { proxy_arguments, ..ClusterOptions::default() }).unwrap()
}

fn kind(arguments: Arguments) -> &'static str {
    if arguments == NFT { "nft" } else { "legacy" }
}

#[test]
fn nft_answers_everywhere() {
    answers_everywhere(NFT);
}

#[test]
fn legacy_answers_everywhere() {
    answers_everywhere(LEGACY);
}

/// ClusterIP and NodePort, TCP and UDP, both families, from pods, nodes and outside, to itself, and after changes.
fn answers_everywhere(arguments: Arguments) {
    let cluster = start(arguments);
    let web = |name: &str, node| pod(name, node, "web", &[8080], &[5353]);
    cluster.apply_all([web("web-1", 1), web("web-2", 2), pod("client", 1, "client", &[], &[])]).unwrap();
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let service = service.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
    cluster.apply(service.clone().build()).unwrap();
    let names = ["web-1", "web-2"];
    let client = cluster.place_in_pod("default/client").unwrap();
    let own = cluster.place_in_pod("default/web-1").unwrap();
    let node = cluster.topology().node(2).unwrap().place();
    for ip in cluster.cluster_ips("web").unwrap() {
        for (port, transport) in [(80, Transport::Tcp), (53, Transport::Udp)] {
            for place in [&client, &own, &node] {
                let tally = cluster.wait_for_answers(place, (ip, port).into(), transport, &names).unwrap();
                if place.netns().label() == client.netns().label() {
                    assert_eq!(tally.sources().len(), 1, "a pod keeps its address: {:?}", tally.sources());
                }
            }
        }
    }
    let outside = cluster.topology().client();
    for (protocol, port, transport) in [("TCP", 80, Transport::Tcp), ("UDP", 53, Transport::Udp)] {
        let port = cluster.node_port("web", protocol, port).unwrap();
        for number in [1, 2] {
            let node = cluster.topology().node(number).unwrap();
            for ip in node.addresses() {
                for place in [&outside, &client, &node.place()] {
                    cluster.wait_for_answers(place, (ip, port).into(), transport, &names).unwrap();
                }
            }
        }
    }
    cluster.apply(web("web-3", 2)).unwrap();
    let target = (first_ip(&cluster), 80).into();
    cluster.wait_for_answers(&client, target, Transport::Tcp, &["web-1", "web-2", "web-3"]).unwrap();
    cluster.delete(web("web-1", 1)).unwrap();
    cluster.wait_for_answers(&client, target, Transport::Tcp, &["web-2", "web-3"]).unwrap();
    cluster.delete(service.build()).unwrap();
    until(&client, target, Transport::Tcp, &Err(Failure::Timeout));
}

#[test]
fn nft_refuses_and_drops_as_the_model_says() {
    refuses_and_drops(NFT);
}

#[test]
fn legacy_refuses_and_drops_as_the_model_says() {
    refuses_and_drops(LEGACY);
}

/// No endpoints and unknown ports are refused; policy Local without a local endpoint, addresses of nobody and strangers to the
/// source ranges are met with silence.
fn refuses_and_drops(arguments: Arguments) {
    let cluster = start(arguments);
    cluster.apply_all([pod("shop-1", 1, "shop", &[8080], &[]), pod("client", 1, "client", &[], &[])]).unwrap();
    let empty = ServiceManifest::new("empty", Some("nobody")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    let empty = empty.with("type", json!("NodePort")).with("ipFamilyPolicy", json!("RequireDualStack"));
    let shop = ServiceManifest::new("shop", Some("shop")).port("TCP", 80, 8080).with("type", json!("LoadBalancer"));
    let shop = shop.with("externalTrafficPolicy", json!("Local")).with("externalIPs", json!(["192.0.2.7"]));
    let ranges = json!(["172.18.0.200/32"]);
    cluster.apply_all([empty.build(), shop.with("loadBalancerSourceRanges", ranges).build()]).unwrap();
    set_load_balancer_ip(&cluster, "shop", "192.0.2.8");
    let client = cluster.place_in_pod("default/client").unwrap();
    let outside = cluster.topology().client();
    let node = cluster.topology().node(1).unwrap();

    for ip in cluster.cluster_ips("empty").unwrap() {
        // A datagram that its own node rejects fails in `send`, before the ICMP message comes back; so it is with kube-proxy.
        let at_once = Failure::NotPermitted;
        for (place, datagram) in [(&client, Failure::Refused), (&node.place(), at_once)] {
            until(place, (ip, 80).into(), Transport::Tcp, &Err(Failure::Refused));
            until(place, (ip, 53).into(), Transport::UdpConnected, &Err(datagram));
            until(place, (ip, 4711).into(), Transport::Tcp, &Err(Failure::Refused));
        }
    }
    let port = cluster.node_port("empty", "TCP", 80).unwrap();
    for ip in node.addresses() {
        until(&outside, (ip, port).into(), Transport::Tcp, &Err(Failure::Refused));
    }
    let unused: SocketAddr = "10.111.222.33:80".parse().unwrap();
    for place in [&client, &node.place()] {
        until(place, unused, Transport::Tcp, &Err(Failure::Timeout));
    }

    // Local: where the endpoint is, the client is seen; elsewhere there is silence, but pods and nodes are served.
    let port = cluster.node_port("shop", "TCP", 80).unwrap();
    let [here, there] = [1, 2].map(|number| cluster.topology().node(number).unwrap().addresses()[0]);
    let tally = cluster.wait_for_answers(&outside, (here, port).into(), Transport::Tcp, &["shop-1"]).unwrap();
    assert_eq!(tally.sources(), &BTreeSet::from([CLIENT_ADDRESSES[0]]));
    until(&outside, (there, port).into(), Transport::Tcp, &Err(Failure::Timeout));
    let node_2 = cluster.topology().node(2).unwrap().place();
    cluster.wait_for_answers(&node_2, (there, port).into(), Transport::Tcp, &["shop-1"]).unwrap();

    // The load-balancer IP admits the outside client only; the external IP everybody.
    for address in ["192.0.2.7", "192.0.2.8"] {
        let target = SocketAddr::new(address.parse().unwrap(), 80);
        cluster.topology().route_client_through(ipnet::IpNet::from(target.ip()), 1).unwrap();
        let tally = cluster.wait_for_answers(&outside, target, Transport::Tcp, &["shop-1"]).unwrap();
        assert_eq!(tally.sources(), &BTreeSet::from([CLIENT_ADDRESSES[0]]));
    }
    cluster.wait_for_answers(&client, "192.0.2.7:80".parse().unwrap(), Transport::Tcp, &["shop-1"]).unwrap();
    until(&client, "192.0.2.8:80".parse().unwrap(), Transport::Tcp, &Err(Failure::Timeout));
    cluster.topology().route_client_through("192.0.2.7/32".parse().unwrap(), 2).unwrap();
    until(&outside, "192.0.2.7:80".parse().unwrap(), Transport::Tcp, &Err(Failure::Timeout));
}

#[test]
fn nft_keeps_clients_with_their_endpoint() {
    keeps_clients(NFT);
}

#[test]
fn legacy_keeps_clients_with_their_endpoint() {
    keeps_clients(LEGACY);
}

/// Affinity holds for all ways to the Service, and ends when the endpoint goes. NodePorts answer on 127.0.0.1.
fn keeps_clients(arguments: Arguments) {
    let cluster = start(arguments);
    let names = ["web-1", "web-2", "web-3"];
    let web = |name: &str| pod(name, 1 + usize::from(name != "web-1"), "web", &[8080], &[]);
    cluster.apply_all(names.map(web)).unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).with("type", json!("NodePort"));
    let sticky = service.clone().with("sessionAffinity", json!("ClientIP"));
    cluster.apply(service.build()).unwrap();
    let target = SocketAddr::new(first_ip(&cluster), 80);
    let client = cluster.place_in_pod("default/client").unwrap();
    let node = cluster.topology().node(1).unwrap();
    cluster.wait_for_answers(&client, target, Transport::Tcp, &names).unwrap();
    let port = cluster.node_port("web", "TCP", 80).unwrap();
    let local: SocketAddr = (IpAddr::from([127, 0, 0, 1]), port).into();
    let before = localhost_packets(&cluster);
    cluster.wait_for_answers(&node.place(), local, Transport::Tcp, &names).unwrap();
    assert!(localhost_packets(&cluster) > before, "{}: connections to localhost are counted", kind(arguments));

    cluster.apply(sticky.build()).unwrap();
    let first = settled(&client, target);
    let node_port = SocketAddr::new(node.addresses()[0], port);
    assert_eq!(answers(&client, node_port), BTreeSet::from([first.clone()]), "{} {first}", kind(arguments));
    cluster.delete(web(&first)).unwrap();
    let others: Vec<&str> = names.into_iter().filter(|name| *name != first).collect();
    let next = wait_for("another endpoint", CHANGE_LIMIT, || {
        let now = settled(&client, target);
        Ok(others.contains(&now.as_str()).then_some(now))
    });
    assert_eq!(answers(&client, target), BTreeSet::from([next.unwrap()]));
}

/// kube-proxy's metric of connections to NodePorts on localhost.
fn localhost_packets(cluster: &Cluster) -> f64 {
    let samples = cluster.metrics(1).unwrap();
    *samples.get("kubeproxy_iptables_localhost_nodeports_accepted_packets_total").unwrap()
}

#[test]
fn nft_outlives_the_process_and_is_removed_whole() {
    outlives_and_is_removed(NFT);
}

#[test]
fn legacy_outlives_the_process_and_is_removed_whole() {
    outlives_and_is_removed(LEGACY);
}

/// Rules stay when the process is killed, and the next one takes over without a failure; `--cleanup` removes all of ours and no
/// rule of others; the other kind is removed when the kind changes.
fn outlives_and_is_removed(arguments: Arguments) {
    let cluster = start(arguments);
    cluster.apply_all([1, 2].map(|n| pod(&format!("web-{n}"), n, "web", &[8080], &[]))).unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    cluster.apply(ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).build()).unwrap();
    let target = SocketAddr::new(first_ip(&cluster), 80);
    let client = cluster.place_in_pod("default/client").unwrap();
    cluster.wait_for_answers(&client, target, Transport::Tcp, &["web-1", "web-2"]).unwrap();
    let restore = format!("iptables-{}-restore", kind(arguments));
    let foreign = "*nat\n:FOREIGN - [0:0]\n-A FOREIGN -d 192.0.2.99/32 -j RETURN\n-I PREROUTING 1 -j FOREIGN\nCOMMIT\n";
    let script = format!("printf '%s' '{foreign}' | {restore} --noflush");
    run_on(&cluster, 1, "sh", &["-c", &script]);
    cluster.kill_proxy(1).unwrap();
    no_failure(&client, target);
    std::thread::scope(|scope| {
        let restart = scope.spawn(|| cluster.restart_proxy(1));
        while !restart.is_finished() {
            no_failure(&client, target);
        }
        restart.join().unwrap().unwrap();
    });
    cluster.kill_proxy(1).unwrap();
    let proxy = trama_lab::binary("trama-proxy").unwrap();
    let bpffs = cluster.topology().node(1).unwrap().bpffs().display().to_string();
    let cleanup = ["--cleanup", "--bpffs", &bpffs, "--hostname-override", "node-1"];
    for _ in 0..2 {
        run_on(&cluster, 1, &proxy.display().to_string(), &cleanup);
    }
    for save in ["iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"] {
        let left = run_on(&cluster, 1, save, &[]);
        assert!(!left.contains("TRAMA"), "{save}: {left}");
        let others = format!("iptables-{}-save", kind(arguments));
        assert!(save != others || left.matches("FOREIGN").count() == 3, "{left}");
    }
}

#[test]
fn nft_is_repaired() {
    is_repaired(NFT);
}

#[test]
fn legacy_is_repaired() {
    is_repaired(LEGACY);
}

/// Whoever flushes our rules, a chain of them or the way to them: they are back within ten seconds, and that is counted.
fn is_repaired(arguments: Arguments) {
    let cluster = start(arguments);
    cluster.apply_all([pod("web-1", 1, "web", &[8080], &[]), pod("client", 1, "client", &[], &[])]).unwrap();
    cluster.apply(ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).build()).unwrap();
    let target = SocketAddr::new(first_ip(&cluster), 80);
    let client = cluster.place_in_pod("default/client").unwrap();
    cluster.wait_for_answers(&client, target, Transport::Tcp, &["web-1"]).unwrap();
    let iptables = format!("iptables-{}", kind(arguments));
    let repairs = || cluster.metrics(1).unwrap().get("trama_repairs_total").copied().unwrap();
    for damage in [&["-F"][..], &["-F", "TRAMA-SERVICES"], &["-D", "PREROUTING", "-j", "TRAMA-SERVICES"]] {
        let before = repairs();
        run_on(&cluster, 1, &iptables, &[&["-w", "5", "-t", "nat"], damage].concat());
        let start = std::time::Instant::now();
        wait_for("the repair", CHANGE_LIMIT, || Ok((repairs() > before).then_some(()))).unwrap();
        println!("{iptables} {damage:?} was noticed after {:?}", start.elapsed());
        cluster.wait_for_answers(&client, target, Transport::Tcp, &["web-1"]).unwrap();
        assert!(start.elapsed() < Duration::from_secs(10), "{damage:?}: {:?}", start.elapsed());
    }
}

fn first_ip(cluster: &Cluster) -> IpAddr {
    *cluster.cluster_ips("web").unwrap().first().unwrap()
}

fn run_on(cluster: &Cluster, node: usize, program: &str, arguments: &[&str]) -> String {
    let node = cluster.topology().node(node).unwrap();
    let mut command = Command::new(program);
    command.args(arguments).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let child = node_sys::spawn(&mut command, Placement { netns: Some(node.netns()), cgroup: None }).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn no_failure(place: &Place, target: SocketAddr) {
    let outcomes = place.probe_times(Probe::new(target, Transport::Tcp), 20).unwrap();
    assert!(outcomes.iter().all(Outcome::is_ok), "{outcomes:?}");
}

/// Who answers ten questions.
fn answers(place: &Place, target: SocketAddr) -> BTreeSet<String> {
    let outcomes = place.probe_times(Probe::new(target, Transport::Tcp), 10).unwrap();
    outcomes.into_iter().map(|outcome| outcome.unwrap().server).collect()
}

/// The one that answers, once the change has come through.
fn settled(place: &Place, target: SocketAddr) -> String {
    wait_for("one endpoint alone", CHANGE_LIMIT, || {
        let outcomes = place.probe_times(Probe::new(target, Transport::Tcp), 30)?;
        let servers: BTreeSet<_> = outcomes.into_iter().map(|outcome| outcome.ok().map(|reply| reply.server)).collect();
        let mut servers = servers.into_iter().collect::<Vec<_>>();
        Ok(if servers.len() == 1 { servers.pop().flatten() } else { None })
    })
    .unwrap()
}

/// Waits until the outcome is this, and then asks that it stays so.
fn until(place: &Place, target: SocketAddr, transport: Transport, expect: &Outcome) {
    let patience = if *expect == Err(Failure::Timeout) { 600 } else { 2500 };
    let probe = Probe { timeout: Duration::from_millis(patience), ..Probe::new(target, transport) };
    let mut last = None;
    let met = wait_for("the outcome", CHANGE_LIMIT, || {
        last = Some(place.probe(probe)?);
        Ok((last.as_ref() == Some(expect)).then_some(()))
    });
    assert!(met.is_ok(), "{transport:?} {target} from {}: {last:?}, not {expect:?}", place.netns().label());
    assert_eq!(&place.probe(probe).unwrap(), expect, "{transport:?} {target} from {}", place.netns().label());
}

fn set_load_balancer_ip(cluster: &Cluster, name: &str, address: &str) {
    let api: Api<Service> = Api::namespaced(cluster.client(), "default");
    let status = json!({ "status": { "loadBalancer": { "ingress": [{ "ip": address, "ipMode": "VIP" }] } } });
    cluster.block_on(api.patch_status(name, &PatchParams::default(), &Patch::Merge(status))).unwrap();
}
