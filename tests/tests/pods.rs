//! The lab's agent: Pods bound to a node run, with an address of each family and their ports served, until they are deleted.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use trama_lab::scenario::pod;
use trama_lab::{Cluster, ClusterOptions, Probe, Transport, manifest, wait_for};

const LIMIT: Duration = Duration::from_secs(30);

fn cluster_without_proxies() -> Cluster {
    Cluster::start(&ClusterOptions { proxies: false, ..ClusterOptions::default() }).unwrap()
}

#[test]
fn nodes_are_ready_and_the_examples_run() {
    let cluster = cluster_without_proxies();
    let nodes = cluster.block_on(Api::<Node>::all(cluster.client()).list(&ListParams::default())).unwrap();
    assert_eq!(nodes.iter().map(ResourceExt::name_any).collect::<Vec<_>>(), ["node-1", "node-2"]);
    for node in &nodes {
        let status = node.status.as_ref().unwrap();
        assert!(status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True"));
        assert_eq!(node.spec.as_ref().unwrap().pod_cidrs.as_ref().unwrap().len(), 2);
    }
    let examples = manifest::read_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")).unwrap();
    for object in &examples {
        cluster.block_on(manifest::apply(&cluster.client(), object)).unwrap();
        cluster.block_on(manifest::apply(&cluster.client(), object)).unwrap();
    }
    let pods: Api<Pod> = Api::namespaced(cluster.client(), "default");
    let running = |pod: &Pod| pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running");
    wait_for("every Pod running", LIMIT, || {
        let pods = cluster.block_on(pods.list(&ListParams::default()))?;
        Ok((pods.items.len() == 6 && pods.iter().all(running)).then_some(()))
    })
    .unwrap();
    wait_for("complete EndpointSlices", LIMIT, || Ok(cluster.slices_are_complete()?.then_some(()))).unwrap();
}

#[test]
fn a_pod_serves_its_ports_until_it_is_deleted() {
    let cluster = cluster_without_proxies();
    let web = pod("web", 2, "web", &[8080], &[5353]);
    cluster.apply(web.clone()).unwrap();
    let own = cluster.place_in_pod("default/web").unwrap();
    let api: Api<Pod> = Api::namespaced(cluster.client(), "default");
    let status = wait_for("the Pod's addresses", LIMIT, || {
        let status = cluster.block_on(api.get("web"))?.status;
        Ok(status.filter(|status| status.pod_ips.is_some()))
    })
    .unwrap();
    let addresses: Vec<IpAddr> = status.pod_ips.unwrap().iter().map(|address| address.ip.parse().unwrap()).collect();
    assert_eq!(addresses, ["10.244.2.2".parse::<IpAddr>().unwrap(), "fd00:10:244:2::2".parse().unwrap()]);
    let node = cluster.topology().node(1).unwrap().place();
    for address in addresses {
        for (port, transport) in [(8080, Transport::Tcp), (5353, Transport::Udp)] {
            let reply = node.probe(Probe::new((address, port).into(), transport)).unwrap().unwrap();
            assert_eq!(reply.server, "web");
        }
    }
    let namespace = own.netns().label().to_owned();
    assert_eq!(node_sys::Netns::list(&namespace).unwrap(), [namespace.as_str()]);
    cluster.delete(web).unwrap();
    assert_eq!(node_sys::Netns::list(&namespace).unwrap(), Vec::<String>::new());
}
