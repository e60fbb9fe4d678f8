//! Kernels before 6.6 have no TCX: clsact filters carry the same programs, and a new process replaces them.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{Cluster, ClusterOptions, PathCounts, Transport};

#[test]
fn clsact_filters_carry_the_packet_path_and_are_replaced_by_a_new_process() {
    let options = ClusterOptions { proxy_arguments: &["--attach-mode", "clsact"], ..ClusterOptions::default() };
    let cluster = Cluster::start(&options).unwrap();
    cluster.apply_all([1, 2].map(|n| pod(&format!("web-{n}"), n, "web", &[8080], &[]))).unwrap();
    cluster.apply(pod("client", 1, "client", &[], &[])).unwrap();
    cluster.apply(ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).build()).unwrap();
    let target = (cluster.cluster_ips("web").unwrap()[0], 80).into();
    let client = cluster.place_in_pod("default/client").unwrap().outside_cgroup();
    for restarts in 0..3 {
        cluster.wait_for_answers(&client, target, Transport::Tcp, &["web-1", "web-2"]).unwrap();
        let before = PathCounts::of(&cluster).unwrap();
        cluster.wait_for_answers(&client, target, Transport::Tcp, &["web-1", "web-2"]).unwrap();
        assert_eq!(PathCounts::of(&cluster).unwrap().since(&before), "packet", "after {restarts} restarts");
        cluster.kill_proxy(1).unwrap();
        cluster.restart_proxy(1).unwrap();
    }
}
