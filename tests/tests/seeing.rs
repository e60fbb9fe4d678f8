//! What an operator sees: status, explain, monitor and top on a node where traffic flows, with a process and without.
#![allow(
    missing_docs,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "an integration test has no public interface, and fails by panicking"
)]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use trama_lab::scenario::{ServiceManifest, pod};
use trama_lab::{Cluster, Place, Probe, Transport, binary, wait_for};

/// How long what was just done may take to show.
const LIMIT: Duration = Duration::from_secs(20);

/// A cluster with a Service that has two endpoints, one without, one with affinity, and one with endpoints elsewhere only.
struct Lab {
    cluster: Cluster,
    client: Place,
}

impl Lab {
    fn start() -> Self {
        let cluster = Cluster::new().unwrap();
        cluster.apply_all([1, 2].map(|n| pod(&format!("web-{n}"), n, "web", &[8080], &[5353]))).unwrap();
        cluster.apply_all([pod("client", 1, "client", &[], &[]), pod("far", 2, "far", &[8080], &[])]).unwrap();
        let dual = |service: ServiceManifest| service.with("ipFamilyPolicy", json!("RequireDualStack"));
        let web = ServiceManifest::new("web", Some("web")).port("TCP", 80, 8080).port("UDP", 53, 5353);
        cluster.apply(dual(web.with("type", json!("NodePort"))).build()).unwrap();
        cluster.apply(dual(ServiceManifest::new("empty", Some("nobody")).port("TCP", 80, 8080)).build()).unwrap();
        let sticky = ServiceManifest::new("sticky", Some("web")).port("TCP", 80, 8080);
        cluster.apply(sticky.with("sessionAffinity", json!("ClientIP")).build()).unwrap();
        for algorithm in ["maglev", "least-connections"] {
            let mut service = ServiceManifest::new(algorithm, Some("web")).port("TCP", 80, 8080).build();
            service["metadata"]["annotations"] = json!({ "service.trama.dev/lb-algorithm": algorithm });
            cluster.apply(service).unwrap();
        }
        let far = ServiceManifest::new("far", Some("far")).port("TCP", 80, 8080);
        let far = far.with("type", json!("NodePort")).with("externalTrafficPolicy", json!("Local"));
        cluster.apply(far.build()).unwrap();
        let client = cluster.place_in_pod("default/client").unwrap();
        let lab = Self { cluster, client };
        for (service, answers) in
            [("web", &["web-1", "web-2"][..]), ("far", &["far"]), ("maglev", &[]), ("least-connections", &[])]
        {
            let target = lab.target(service, 0, 80);
            lab.cluster.wait_for_answers(&lab.client, target, Transport::Tcp, answers).unwrap();
        }
        lab.cluster
            .wait_for_answers(&lab.client, lab.target("web", 1, 80), Transport::Tcp, &["web-1", "web-2"])
            .unwrap();
        lab.cluster.wait_for_answers(&lab.client, lab.target("sticky", 0, 80), Transport::Tcp, &[]).unwrap();
        lab
    }

    fn target(&self, service: &str, family: usize, port: u16) -> SocketAddr {
        SocketAddr::new(self.cluster.cluster_ips(service).unwrap()[family], port)
    }

    /// `trama-proxy ARGUMENTS` on node-1.
    fn command(&self, arguments: &[&str]) -> Command {
        let node = self.cluster.topology().node(1).unwrap();
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", node.netns().label())).arg(binary("trama-proxy").unwrap());
        command.args(arguments).arg("--bpffs").arg(node.bpffs());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What a command that ends well printed.
    fn text(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--output", "json"]).collect();
        serde_json::from_str(&self.text(&arguments)).unwrap()
    }

    fn map_entries(&self, map: &str) -> u64 {
        let status = self.json(&["status"]);
        let maps = status["kernel"]["maps"].as_array().unwrap();
        maps.iter().find(|fill| fill["map"] == map).unwrap()["entries"].as_u64().unwrap()
    }

    /// Explains a packet; the kernel must agree.
    fn explain(&self, source: IpAddr, target: SocketAddr, protocol: &str) -> String {
        self.text(&["explain", &source.to_string(), &format!("{target}/{protocol}")])
    }
}

#[test]
fn status_says_the_same_with_a_process_and_without() {
    let lab = Lab::start();
    let running = wait_for("an audit", LIMIT, || {
        let status = lab.json(&["status"]);
        Ok((!status["audit"].is_null()).then_some(status))
    })
    .unwrap();
    assert_eq!((&running["running"], &running["mode"]), (&json!(true), &json!("ebpf")));
    assert_eq!(running["audit"]["drift"], Value::Null);
    assert!(running["lastSync"]["kernelWrites"].is_u64());
    let text = lab.text(&["status"]);
    for part in
        ["MODE           ebpf (", "FRONTENDS_V4", "cgroup               sock_release connect4", "tc_ingress", "AUDIT"]
    {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    lab.cluster.kill_proxy(1).unwrap();
    let left = lab.json(&["status"]);
    assert_eq!(left["running"], json!(false));
    for count in ["servicePorts", "frontends", "endpoints"] {
        assert_eq!(left["counts"][count], running["counts"][count], "{count}");
    }
    let text = lab.text(&["status"]);
    assert!(text.starts_with("No trama-proxy answers here"), "{text}");
    let nothing = lab.cluster.folder().join("nothing");
    let output = Command::new(binary("trama-proxy").unwrap())
        .args(["status", "--metrics-bind-address", "127.0.0.1:1", "--bpffs"])
        .arg(&nothing)
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("no eBPF data plane is on this node"), "{error}");
}

#[test]
fn explain_and_the_kernel_agree_on_every_kind_of_packet() {
    let lab = Lab::start();
    let [client_v4, client_v6] = lab.cluster.pod_addresses("default/client").unwrap();
    let [web_1, _] = lab.cluster.pod_addresses("default/web-1").unwrap();
    let [node_v4, _] = lab.cluster.topology().node(1).unwrap().addresses();
    let outside: IpAddr = "192.0.2.77".parse().unwrap();
    let web_port = lab.cluster.node_port("web", "TCP", 80).unwrap();
    let far_port = lab.cluster.node_port("far", "TCP", 80).unwrap();
    let unallocated: SocketAddr = "10.96.250.250:80".parse().unwrap();
    let elsewhere: SocketAddr = "198.51.100.1:80".parse().unwrap();
    let at_node = |port| SocketAddr::new(node_v4, port);
    let flows = ["FLOWS_V4", "FLOWS_V6"].map(|map| lab.map_entries(map));
    let affinities = lab.map_entries("AFFINITY_V4");
    let cases: [(IpAddr, SocketAddr, &str, &[&str]); 14] = [
        (client_v4, lab.target("web", 0, 80), "TCP", &["is default/web:", "pod:", "forward to one of 2, source kept"]),
        (client_v6, lab.target("web", 1, 80), "TCP", &["is default/web:", "forward to one of 2"]),
        (client_v4, lab.target("web", 0, 53), "UDP", &["policy Cluster", "forward to one of 2"]),
        (
            web_1,
            lab.target("web", 0, 80),
            "TCP",
            &["some, yes: the client is the endpoint", "source kept or source becomes"],
        ),
        (client_v4, lab.target("web", 0, 81), "TCP", &["does not have this port", "refuse (packet_unserved_port)"]),
        (client_v4, lab.target("empty", 0, 80), "TCP", &["no endpoints", "refuse (packet_no_endpoints)"]),
        (client_v6, lab.target("empty", 1, 80), "TCP", &["refuse (packet_no_endpoints)"]),
        (client_v4, lab.target("sticky", 0, 80), "TCP", &["affinity    ClientIP", "forward to one of"]),
        (client_v4, lab.target("maglev", 0, 80), "TCP", &["flow's hash", "forward to one of 1, source kept"]),
        (client_v4, lab.target("least-connections", 0, 80), "TCP", &["less loaded", "forward to one of 2"]),
        (client_v4, unallocated, "TCP", &["no Service's", "drop (unallocated_cluster_ip)"]),
        (client_v4, elsewhere, "TCP", &["nor in a service network", "decision    pass"]),
        (outside, at_node(web_port), "TCP", &["NodePort", "external:", "masquerade  yes", "source becomes"]),
        (outside, at_node(far_port), "TCP", &["policy Local", "drop (no_local_endpoints)"]),
    ];
    for (source, target, protocol, parts) in cases {
        let text = lab.explain(source, target, protocol);
        for part in parts.iter().chain(&["the kernel's program agrees"]) {
            assert!(text.contains(part), "{source} to {target}: {part:?} is not in\n{text}");
        }
    }
    let own = lab.explain(node_v4, lab.target("web", 0, 80), "TCP");
    assert!(own.contains("leaves the node") && own.contains("node: it leaves"), "{own}");
    assert_eq!(["FLOWS_V4", "FLOWS_V6"].map(|map| lab.map_entries(map)), flows, "a packet of ours left a flow");
    assert_eq!(lab.map_entries("AFFINITY_V4"), affinities, "a packet of ours left an affinity");
    lab.cluster.kill_proxy(1).unwrap();
    let text = lab.explain(client_v4, lab.target("web", 0, 80), "TCP");
    assert!(text.contains("ServicePort ") && text.contains("forward to one of 2"), "{text}");
}

/// A monitor, and what it prints.
struct Watching {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Watching {
    fn start(lab: &Lab, arguments: &[&str]) -> Self {
        let mut command = lab.command(&["monitor"]);
        let mut child = command.args(arguments).args(["--output", "json"]).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// The next event; `traffic` goes on until it comes. `None` when the monitor ended, or nothing came in time.
    fn next(&mut self, traffic: impl Fn()) -> Option<Value> {
        let Self { child, lines } = self;
        let line = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut line = String::new();
                lines.read_line(&mut line).map(|_| line)
            });
            let deadline = Instant::now() + LIMIT;
            while !reader.is_finished() {
                traffic();
                if Instant::now() > deadline {
                    // Then the reader's line ends.
                    child.kill().unwrap();
                }
            }
            reader.join().unwrap().unwrap()
        });
        (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap())
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

#[test]
fn monitor_tells_of_connections_and_drops_and_ends_with_its_process() {
    let lab = Lab::start();
    let ask = |place: Place, target| move || drop(place.probe(Probe::new(target, Transport::Tcp)).unwrap());
    let web = lab.target("web", 0, 80);
    let mut watching = Watching::start(&lab, &["--service", "default/web"]);
    let event = watching.next(ask(lab.client.outside_cgroup(), web)).unwrap();
    assert_eq!((&event["kind"], &event["path"]), (&json!("new"), &json!("ingress")), "{event}");
    assert_eq!(event["destination"], web.to_string());
    assert_eq!(event["service"], "default/web:tcp-80 Tcp/V4", "{event}");
    let backend: SocketAddr = event["backend"].as_str().unwrap().parse().unwrap();
    assert!(lab.cluster.pod_at(backend.ip()).unwrap().starts_with("web-"), "{event}");

    let second = lab.run(&["monitor", "--count", "1"]);
    let error = String::from_utf8(second.stderr).unwrap();
    assert!(!second.status.success() && error.contains("another monitor watches"), "{error}");
    // Killed, so that it cannot switch anything off: the next one may watch as soon as its time is over.
    drop(watching);
    let next = |arguments: &[&str], traffic: &dyn Fn()| {
        wait_for("a monitor that may watch", LIMIT, || Ok(Watching::start(&lab, arguments).next(traffic))).unwrap()
    };
    let event = next(&["--service", "default/web", "--sample", "2"], &ask(lab.client.clone(), web));
    assert_eq!((&event["path"], &event["reason"]), (&json!("socket"), &json!("socket_connect")), "{event}");
    let empty = lab.target("empty", 0, 80);
    let event = next(&["--drops", "--service", "default/empty"], &ask(lab.client.clone(), empty));
    assert_eq!((&event["kind"], &event["reason"]), (&json!("refuse"), &json!("socket_no_endpoints")), "{event}");
    // Told to end, a monitor switches the events off first: nobody has to wait.
    wait_for("a monitor that ends by itself", LIMIT, || {
        let mut command = lab.command(&["monitor", "--count", "1", "--output", "json"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        while child.try_wait()?.is_none() {
            ask(lab.client.clone(), web)();
        }
        Ok(child.wait()?.success().then_some(()))
    })
    .unwrap();
    let mut at_once = Watching::start(&lab, &[]);
    assert!(at_once.next(ask(lab.client.clone(), web)).is_some(), "the last monitor left the events on");
}

#[test]
fn monitor_names_the_service_that_has_the_id_now() {
    let lab = Lab::start();
    let ask = |target| lab.client.probe(Probe::new(target, Transport::Tcp)).unwrap();
    let mut watching = Watching::start(&lab, &[]);
    for name in ["first", "second"] {
        let service = ServiceManifest::new(name, Some("web")).port("TCP", 80, 8080).build();
        lab.cluster.apply(service.clone()).unwrap();
        let target = lab.target(name, 0, 80);
        lab.cluster.wait_for_answers(&lab.client, target, Transport::Tcp, &["web-1", "web-2"]).unwrap();
        let named = format!("default/{name}:tcp-80 Tcp/V4");
        wait_for(&named, LIMIT, || {
            let event = watching.next(|| drop(ask(target))).unwrap();
            Ok((event["destination"] == target.to_string() && event["service"] == named).then_some(()))
        })
        .unwrap();
        lab.cluster.delete(service).unwrap();
        wait_for("its end", LIMIT, || Ok(ask(target).is_err().then_some(()))).unwrap();
    }
}

#[test]
fn services_and_endpoints_are_counted_where_top_and_a_scrape_show_them() {
    let lab = Lab::start();
    let web = lab.target("web", 0, 80);
    let series = |name: &str, endpoint: &str| {
        format!(
            "trama_{name}_total{{namespace=\"default\",service=\"web\",port=\"tcp-80\",protocol=\"TCP\",ip_family=\"IPv4\"{endpoint}}}"
        )
    };
    let count = |name: &str| {
        wait_for(name, LIMIT, || Ok(lab.cluster.metrics(1)?.get(name).copied()))
            .unwrap_or_else(|error| panic!("{error}"))
    };
    let before = ["service_connections", "service_packets", "service_bytes"].map(|name| count(&series(name, "")));
    let place = lab.client.outside_cgroup();
    let answers = place.probe_times(Probe::new(web, Transport::Tcp), 20).unwrap();
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    // What a scrape shows may be a tenth of a second old.
    std::thread::sleep(Duration::from_millis(150));
    let after = ["service_connections", "service_packets", "service_bytes"].map(|name| count(&series(name, "")));
    assert_eq!(after[0] - before[0], 20.0);
    assert!(after[1] - before[1] >= 20.0 * 6.0, "both directions of {before:?} {after:?}");
    assert!(after[2] - before[2] >= (after[1] - before[1]) * 54.0, "{before:?} {after:?}");
    let endpoints = ["web-1", "web-2"].map(|name| {
        let [address, _] = lab.cluster.pod_addresses(&format!("default/{name}")).unwrap();
        count(&series("endpoint_connections", &format!(",endpoint=\"{address}:8080\"")))
    });
    assert!(endpoints.iter().all(|count| *count > 0.0));
    assert!((endpoints.iter().sum::<f64>() - after[0]).abs() < 0.5, "{endpoints:?} {after:?}");
    // Entries are counted twice a minute, and not while a scrape waits.
    wait_for("the count of the frontends", Duration::from_secs(60), || {
        let entries = lab.cluster.metrics(1)?.get("trama_map_entries{map=\"frontends_v4\"}").copied();
        Ok(entries.filter(|entries| *entries >= 6.0))
    })
    .unwrap();
    assert_eq!(count("trama_map_entries_max{map=\"flows_v4\"}"), 262_144.0);
    every_metric_of_the_dashboard_is_exported(&lab);
    let top = lab.text(&["top", "--once"]);
    let line = top.lines().find(|line| line.contains("default/web:tcp-80 Tcp/V4")).unwrap_or_else(|| panic!("{top}"));
    let connections: f64 = line.split_whitespace().last().unwrap().parse().unwrap();
    assert!((connections - after[0]).abs() < 0.5, "{top}");
}

/// A panel for a metric that nobody exports stays empty, and nobody wonders.
fn every_metric_of_the_dashboard_is_exported(lab: &Lab) {
    let dashboard = include_str!("../../examples/grafana/trama-proxy.json");
    serde_json::from_str::<Value>(dashboard).unwrap();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let names: BTreeSet<&str> = dashboard.split(|c| !is_name(c)).filter(|word| word.starts_with("trama_")).collect();
    assert!(names.len() > 10, "{names:?}");
    let samples = lab.cluster.metrics(1).unwrap();
    let exported: BTreeSet<&str> = samples.keys().map(|name| name.split('{').next().unwrap()).collect();
    let missing: Vec<_> = names.difference(&exported).collect();
    assert!(missing.is_empty(), "{missing:?} are in the dashboard and not in {exported:?}");
}
