//! The IPVS data plane with real packets. Only where the kernel has IPVS: `cargo xtask vm test ipvs`.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, Patch, PatchParams};
use node_sys::ipvs::{Command, Ipvs, IpvsError, ServiceId, remembered};
use node_sys::nftables::{
    Batch, ChainHook, ChainKind, CtKey, ElementRef, Expression, Family, Hook, Nftables, Register,
};
use serde_json::json;
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::services::CHANGE_LIMIT;
use trama_lab::{
    CLIENT_ADDRESSES, Cluster, ClusterOptions, Conversation, Failure, Place, Probe, Tally, Transport, Turn, patient,
    wait_for,
};

const WEB: [&str; 3] = ["web-1", "web-2", "web-3"];

/// Two nodes; `web-1` on the first, the others on the second; a Pod `client` on each node.
fn cluster(more: &'static [&'static str]) -> Cluster {
    let options = ClusterOptions { proxy_arguments: more, ..ClusterOptions::default() };
    let cluster = Cluster::start(&options).unwrap();
    let web = WEB.iter().zip([1, 2, 2]).map(|(name, node)| pod(name, node, "web", &[8080], &[5353]));
    cluster.apply_all(web).unwrap();
    cluster.apply_all([1, 2].map(|node| pod(&format!("client-{node}"), node, "client", &[], &[]))).unwrap();
    cluster
}

fn web() -> ServiceManifest {
    let service = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
    service.with("ipFamilyPolicy", json!("RequireDualStack"))
}

fn in_pod(cluster: &Cluster, node: usize) -> Place {
    cluster.place_in_pod(&format!("default/client-{node}")).unwrap()
}

fn set_load_balancer(cluster: &Cluster, name: &str, ips: &[&str]) {
    let ingress: Vec<_> = ips.iter().map(|ip| json!({ "ip": ip, "ipMode": "VIP" })).collect();
    let status = Patch::Merge(json!({ "status": { "loadBalancer": { "ingress": ingress } } }));
    let api: Api<Service> = Api::namespaced(cluster.client(), "default");
    cluster.block_on(api.patch_status(name, &PatchParams::default(), &status)).unwrap();
}

fn expect_failure(place: &Place, target: SocketAddr, transport: Transport, failure: &Failure) {
    let probe = Probe { timeout: Duration::from_millis(2500), ..Probe::new(target, transport) };
    let seen = || Ok((place.probe(probe)?.as_ref() == Err(failure)).then_some(()));
    let waited = wait_for("the failure", CHANGE_LIMIT, seen);
    assert!(waited.is_ok(), "{transport:?} {target} from {}: {:?}", place.netns().label(), place.probe(probe));
}

fn sources(address: IpAddr, of: [IpAddr; 2]) -> BTreeSet<IpAddr> {
    of.into_iter().filter(|ip| ip.is_ipv4() == address.is_ipv4()).collect()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask vm test ipvs"]
fn a_clusterip_reaches_every_endpoint_from_everywhere() {
    let cluster = cluster(&["--proxy-mode=ipvs"]);
    cluster.apply(web().build()).unwrap();
    let places = [in_pod(&cluster, 1), cluster.topology().node(2).unwrap().place()];
    for ip in cluster.cluster_ips("web").unwrap() {
        for place in &places {
            for (port, transport) in [(80, Transport::Tcp), (53, Transport::Udp), (53, Transport::UdpConnected)] {
                cluster.wait_for_answers(place, (ip, port).into(), transport, &WEB).unwrap();
            }
            expect_failure(place, (ip, 81).into(), Transport::Tcp, &Failure::Refused);
        }
        let net = ipnet::IpNet::from(ip);
        cluster.topology().route_client_through(net, 1).unwrap();
        let client = cluster.topology().client();
        let tally = cluster.wait_for_answers(&client, (ip, 80).into(), Transport::Tcp, &WEB).unwrap();
        assert_eq!(tally.sources(), &sources(ip, cluster.topology().node(1).unwrap().addresses()));
    }
    // An endpoint reaches itself, seen as its node.
    let own = cluster.place_in_pod("default/web-1").unwrap();
    let ip = cluster.cluster_ips("web").unwrap()[0];
    cluster.wait_for_answers(&own, (ip, 80).into(), Transport::Tcp, &WEB).unwrap();
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask vm test ipvs"]
fn nodeports_follow_the_external_policy_for_each_origin() {
    let cluster = cluster(&["--proxy-mode=ipvs"]);
    let only_first = pod("shop-1", 1, "shop", &[8080], &[5353]);
    cluster.apply(only_first).unwrap();
    let client = cluster.topology().client();
    for policy in ["Cluster", "Local"] {
        let service = ServiceManifest::new("shop", Some("shop")).port("TCP", 80, 8080).port("UDP", 53, 5353);
        let service = service.with("type", json!("NodePort")).with("externalTrafficPolicy", json!(policy));
        cluster.apply(service.with("ipFamilyPolicy", json!("RequireDualStack")).build()).unwrap();
        let ports = [
            (cluster.node_port("shop", "TCP", 80).unwrap(), Transport::Tcp),
            (cluster.node_port("shop", "UDP", 53).unwrap(), Transport::Udp),
        ];
        for (node, (port, transport)) in [1, 2].into_iter().flat_map(|node| ports.map(|port| (node, port))) {
            for ip in cluster.topology().node(node).unwrap().addresses() {
                let target = SocketAddr::new(ip, port);
                if policy == "Local" && node == 2 {
                    expect_failure(&client, target, transport, &Failure::Timeout);
                    // The node and its pods stand inside: they use every endpoint.
                    cluster.wait_for_answers(&in_pod(&cluster, 2), target, transport, &["shop-1"]).unwrap();
                    continue;
                }
                let seen = if policy == "Local" {
                    sources(ip, CLIENT_ADDRESSES)
                } else {
                    sources(ip, cluster.topology().node(node).unwrap().addresses())
                };
                let right = || {
                    let tally = cluster.wait_for_answers(&client, target, transport, &["shop-1"])?;
                    Ok((tally.sources() == &seen).then_some(()))
                };
                wait_for("the source that the policy gives", CHANGE_LIMIT, right).unwrap();
            }
        }
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask vm test ipvs"]
fn external_and_load_balancer_ips_answer_whom_they_may() {
    let cluster = cluster(&["--proxy-mode=ipvs"]);
    let client = cluster.topology().client();
    let own = ["172.18.0.200/32", "fd00:172:18::200/128"];
    let service = web().with("type", json!("LoadBalancer")).with("externalIPs", json!(["203.0.113.1", "2001:db8::1"]));
    cluster.apply(service.with("loadBalancerSourceRanges", json!(own)).build()).unwrap();
    set_load_balancer(&cluster, "web", &["203.0.113.2", "2001:db8::2"]);
    for net in ["203.0.113.0/24", "2001:db8::/64"] {
        cluster.topology().route_client_through(net.parse().unwrap(), 2).unwrap();
    }
    let targets = ["203.0.113.1", "203.0.113.2", "2001:db8::1", "2001:db8::2"];
    for ip in targets.map(|ip| ip.parse::<IpAddr>().unwrap()) {
        cluster.wait_for_answers(&client, (ip, 80).into(), Transport::Tcp, &WEB).unwrap();
        cluster.wait_for_answers(&client, (ip, 53).into(), Transport::Udp, &WEB).unwrap();
    }
    // Pods are not in the ranges, which are about load-balancer IPs only.
    let pod = in_pod(&cluster, 1);
    cluster.wait_for_answers(&pod, "203.0.113.1:80".parse().unwrap(), Transport::Tcp, &WEB).unwrap();
    expect_failure(&pod, "203.0.113.2:80".parse().unwrap(), Transport::Tcp, &Failure::Timeout);
    expect_failure(&pod, "[2001:db8::2]:80".parse().unwrap(), Transport::Tcp, &Failure::Timeout);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask vm test ipvs"]
fn a_client_stays_with_its_endpoint_until_that_goes() {
    let cluster = cluster(&["--proxy-mode=ipvs", "--ipvs-scheduler=wlc"]);
    cluster.apply(web().with("sessionAffinity", json!("ClientIP")).build()).unwrap();
    let client = in_pod(&cluster, 1);
    for ip in cluster.cluster_ips("web").unwrap() {
        let target = SocketAddr::new(ip, 80);
        let ask = || {
            let probe = Probe { timeout: Duration::from_millis(500), ..Probe::new(target, Transport::Tcp) };
            client.probe_times(probe, 24).map(|outcomes| Tally::of(&outcomes))
        };
        let first = wait_for("answers", CHANGE_LIMIT, || {
            let tally = ask()?;
            Ok((tally.failures.is_empty() && tally.servers().len() == 1).then_some(tally))
        });
        let stuck = first.unwrap().servers().pop_first().unwrap();
        assert_eq!(ask().unwrap().servers(), BTreeSet::from([stuck.clone()]));
        let number = WEB.iter().position(|name| *name == stuck).unwrap();
        let gone = pod(&stuck, [1, 2, 2][number], "web", &[8080], &[5353]);
        cluster.delete(gone.clone()).unwrap();
        let other = wait_for("another endpoint", CHANGE_LIMIT, || {
            let tally = ask()?;
            Ok((tally.failures.is_empty() && !tally.servers().contains(&stuck)).then_some(tally))
        });
        assert_eq!(other.unwrap().servers().len(), 1);
        cluster.apply(gone).unwrap();
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask vm test ipvs"]
fn without_endpoints_there_is_a_refusal_and_connections_outlive_a_restart() {
    let cluster = cluster(&["--proxy-mode=ipvs"]);
    cluster.apply(web().build()).unwrap();
    cluster
        .apply(ServiceManifest::new("empty", Some("nobody")).port("TCP", 80, 8080).port("UDP", 53, 5353).build())
        .unwrap();
    let client = in_pod(&cluster, 1).outside_cgroup();
    let empty = cluster.cluster_ips("empty").unwrap()[0];
    for place in [client.clone(), cluster.topology().node(1).unwrap().place()] {
        expect_failure(&place, (empty, 80).into(), Transport::Tcp, &Failure::Refused);
    }
    // On the node itself the sender of a rejected datagram gets EPERM, as with every netfilter rule.
    expect_failure(&client, (empty, 53).into(), Transport::UdpConnected, &Failure::Refused);
    let target = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    cluster.wait_for_answers(&client, target, Transport::Tcp, &WEB).unwrap();
    let kept = client.connect(target, patient(Duration::from_secs(2))).unwrap();
    let before = ask(&kept);
    assert!(!before.is_empty());
    cluster.kill_proxy(1).unwrap();
    cluster.wait_for_answers(&client, target, Transport::Tcp, &WEB).unwrap();
    cluster.restart_proxy(1).unwrap();
    assert_eq!(ask(&kept), before);
    cluster.wait_for_answers(&client, target, Transport::Tcp, &WEB).unwrap();
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask vm test ipvs"]
fn what_an_operator_takes_away_is_put_back() {
    let cluster = cluster(&["--proxy-mode=ipvs"]);
    cluster.apply(web().build()).unwrap();
    let vip = SocketAddr::new(cluster.cluster_ips("web").unwrap()[0], 80);
    let client = in_pod(&cluster, 1);
    cluster.wait_for_answers(&client, vip, Transport::Tcp, &WEB).unwrap();
    let netns = cluster.topology().node(1).unwrap().netns();
    let elements = || {
        let all = || Nftables::open()?.elements(Family::Ipv4, "trama-ipvs", "frontends-pod");
        netns.run(all).unwrap().unwrap()
    };
    let servers = || {
        let count = || -> Result<usize, IpvsError> {
            let mut ipvs = Ipvs::open()?;
            let ids: Vec<ServiceId> = ipvs.services()?.into_iter().filter_map(|service| service.id).collect();
            ids.into_iter().try_fold(0, |sum, id| Ok(sum + ipvs.servers(id)?.len()))
        };
        netns.run(count).unwrap().unwrap()
    };
    let (elements_before, servers_before) = (elements(), servers());
    assert!(servers_before >= 6, "{servers_before}");
    let damages: [(&str, &dyn Fn()); 2] = [
        ("an element", &|| {
            let mut batch = Batch::new(Family::Ipv4, "trama-ipvs");
            batch.delete_element("frontends-pod", ElementRef::key(&elements_before.last().unwrap().key));
            netns.run(|| Nftables::open()?.commit(batch)).unwrap().unwrap();
        }),
        ("a server", &|| {
            let taken = || -> Result<(), IpvsError> {
                let mut ipvs = Ipvs::open()?;
                let ids: Vec<ServiceId> = ipvs.services()?.into_iter().filter_map(|service| service.id).collect();
                let id = ids.into_iter().next_back().unwrap();
                let server = ipvs.servers(id)?.into_iter().next().unwrap();
                assert!(ipvs.run(&[Command::DeleteServer(id, server.address)])?.is_empty());
                Ok(())
            };
            netns.run(taken).unwrap().unwrap();
        }),
    ];
    for (what, damage) in damages {
        damage();
        assert!(elements().len() < elements_before.len() || servers() < servers_before, "{what} is still there");
        let whole = || Ok((elements().len() == elements_before.len() && servers() == servers_before).then_some(()));
        wait_for(what, patient(Duration::from_secs(10)), whole).unwrap();
    }
    cluster.wait_for_answers(&client, vip, Transport::Tcp, &WEB).unwrap();
}

/// What the next proxy brings: NAT on the way. Its rules do not matter here.
fn register_nat(node: &trama_lab::Node) {
    let register = || {
        for family in [Family::Ipv4, Family::Ipv6] {
            let mut batch = Batch::new(family, "next-proxy");
            batch.add_table(b"");
            let hooks = [Hook::Prerouting, Hook::Input, Hook::Output, Hook::Postrouting];
            for (name, hook) in ["prerouting", "input", "output", "postrouting"].into_iter().zip(hooks) {
                batch.add_chain(name, Some(ChainHook { kind: ChainKind::Nat, hook, priority: -100 }));
            }
            batch.add_rule("prerouting", &[Expression::Ct { key: CtKey::State, to: Register(0) }]);
            Nftables::open().unwrap().commit(batch).unwrap();
        }
    };
    node.netns().run(register).unwrap();
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask vm test ipvs"]
fn connections_outlive_the_virtual_services() {
    let cluster = cluster(&["--proxy-mode=ipvs"]);
    cluster.apply(web().with("type", json!("NodePort")).build()).unwrap();
    let node = cluster.topology().node(1).unwrap();
    let [tcp, udp] =
        [("TCP", 80), ("UDP", 53)].map(|(protocol, port)| cluster.node_port("web", protocol, port).unwrap());
    let (mut connections, mut conversations) = (Vec::new(), Vec::new());
    let inside = [in_pod(&cluster, 1), node.place()];
    let cluster_ips = cluster.cluster_ips("web").unwrap();
    let ways = inside.iter().map(|place| (place.clone(), cluster_ips.clone(), 80, 53));
    let outside = (cluster.topology().client(), node.addresses().to_vec(), tcp, udp);
    for (place, addresses, tcp, udp) in ways.chain([outside]) {
        for ip in addresses {
            cluster.wait_for_answers(&place, (ip, tcp).into(), Transport::Tcp, &WEB).unwrap();
            cluster.wait_for_answers(&place, (ip, udp).into(), Transport::Udp, &WEB).unwrap();
            let kept = place.outside_cgroup().connect((ip, tcp).into(), patient(Duration::from_secs(2))).unwrap();
            let first = ask(&kept);
            connections.push((kept, first, place.netns().label().to_owned(), ip));
            let mut conversation =
                Conversation::start(&place, (ip, udp).into(), patient(Duration::from_secs(2))).unwrap();
            let first = conversation.ask().unwrap();
            assert!(matches!(first, Turn::Answer(_)), "{first:?}");
            conversations.push((conversation, first, place.netns().label().to_owned(), ip));
        }
    }
    register_nat(node);
    assert!(remembered_at(node) >= connections.len() + conversations.len(), "the test would notice");
    cluster.kill_proxy(1).unwrap();
    let mut cleanup = cluster.proxy_command(1, &["--cleanup"]).unwrap();
    assert!(node.place().spawn(&mut cleanup).unwrap().wait().unwrap().success());
    let left = node.netns().run(|| Ipvs::open().unwrap().services().unwrap().len()).unwrap();
    assert_eq!(left, 0, "virtual services");
    // What IPVS remembers it forgets some day, with conntrack's entry.
    assert_eq!(remembered_at(node), 0, "connections of IPVS");
    let parameter = node.netns().run(|| node_sys::sysctl::read("net/ipv4/vs/conntrack").unwrap()).unwrap();
    assert_eq!(parameter, "0", "the kernel's own");
    let mut lost = Vec::new();
    for (kept, first, place, ip) in &connections {
        let answer = ask(kept);
        if answer != *first {
            lost.push(format!("TCP, {place} to {ip}: {first:?}, now {answer:?}"));
        }
    }
    for (conversation, first, place, ip) in &mut conversations {
        let answer = conversation.ask().unwrap();
        if answer != *first {
            lost.push(format!("UDP, {place} to {ip}: {first:?}, now {answer:?}"));
        }
    }
    assert!(lost.is_empty(), "{}", lost.join("\n"));
}

fn remembered_at(node: &trama_lab::Node) -> usize {
    let mut count = 0;
    node.netns().run(|| remembered(|_| count += 1)).unwrap().unwrap();
    count
}

/// The answer, or why there is none.
fn ask(mut stream: &TcpStream) -> String {
    stream.set_read_timeout(Some(patient(Duration::from_secs(2)))).unwrap();
    stream.write_all(b"who\n").unwrap();
    let mut line = String::new();
    match BufReader::new(stream).read_line(&mut line) {
        Ok(_) => line,
        Err(error) => error.to_string(),
    }
}
