//! What people do with `kubectl`, done with the real one against the real server.
//!
//! The server is the built binary `apiserver-lite`, found in `$TRAMA_BIN_DIR` or beside this test under `target/<profile>`. Without
//! `kubectl` in the path the test fails: it is what the test is about.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a failed step fails the test"
)]

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use trama_lab::patient;

const DEADLINE: Duration = Duration::from_secs(30);

const MANIFEST: &str = "\
apiVersion: v1
kind: Service
metadata:
  name: web
  labels: {app: web}
spec:
  type: NodePort
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: http}
---
apiVersion: v1
kind: Pod
metadata:
  name: web-1
  labels: {app: web}
spec:
  nodeName: n1
  containers:
  - name: web
    image: registry.example/web:1
    ports: [{name: http, containerPort: 8080}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {colour: blue}
";

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("trama-kubectl-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A child process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server and its administrator's `kubectl`.
struct Cluster {
    scratch: Scratch,
    kubeconfig: PathBuf,
    _server: Running,
}

fn server_binary() -> PathBuf {
    let beside = || std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned();
    let directory = std::env::var_os("TRAMA_BIN_DIR").map_or_else(beside, PathBuf::from);
    let binary = directory.join("apiserver-lite");
    assert!(binary.exists(), "{} does not exist: build apiserver-lite first or set TRAMA_BIN_DIR", binary.display());
    binary
}

impl Cluster {
    fn start(name: &str) -> Self {
        let scratch = Scratch::new(name);
        let kubeconfig = scratch.0.join("admin.kubeconfig");
        let mut child = Command::new(server_binary())
            .args(["--secure-port", "0", "--data-dir"])
            .arg(scratch.0.join("data"))
            .arg("--write-kubeconfig")
            .arg(&kubeconfig)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("is ready at https://127.0.0.1:"), "{line}");
        Self { scratch, kubeconfig, _server: Running(child) }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("kubectl");
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(arguments);
        // The cache of discovery documents must be this test's own.
        command.env("HOME", &self.scratch.0).env("KUBECACHEDIR", self.scratch.0.join("cache"));
        command
    }

    fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("kubectl must be installed and in the path")
    }

    /// Runs a command that must succeed, and returns what it printed.
    #[track_caller]
    fn run(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {arguments:?} failed: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail, and returns what it complained about.
    #[track_caller]
    fn fail(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(!output.status.success(), "kubectl {arguments:?} succeeded");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Repeats a command until its output is as wanted.
    #[track_caller]
    fn eventually(&self, arguments: &[&str], wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + patient(DEADLINE);
        loop {
            let output = self.run(arguments);
            if wanted(&output) {
                return output;
            }
            assert!(Instant::now() < deadline, "kubectl {arguments:?} still prints {output}");
        }
    }

    fn apply(&self, manifest: &str) -> String {
        let path = self.scratch.write("manifest.yaml", manifest);
        self.run(&["apply", "-f", path.to_str().unwrap()])
    }
}

/// The words of a table's first line.
fn columns(table: &str) -> Vec<&str> {
    table.lines().next().unwrap_or_default().split_whitespace().collect()
}

/// The line that begins with a name.
fn row<'a>(table: &'a str, name: &str) -> Vec<&'a str> {
    let line = table.lines().find(|line| line.split_whitespace().next() == Some(name));
    line.unwrap_or_else(|| panic!("no {name} in {table}")).split_whitespace().collect()
}

#[test]
fn apply_get_and_describe() {
    let cluster = Cluster::start("get");
    let applied = cluster.apply(MANIFEST);
    assert_eq!(
        applied.lines().collect::<Vec<_>>(),
        ["service/web created", "pod/web-1 created", "configmap/settings created"]
    );
    assert!(cluster.apply(MANIFEST).lines().all(|line| line.ends_with(" unchanged")));
    let changed = cluster.apply(&MANIFEST.replace("port: 80,", "port: 81,"));
    assert!(changed.starts_with("service/web configured"), "{changed}");

    let services = cluster.run(&["get", "services"]);
    assert_eq!(columns(&services), ["NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE"]);
    let web = row(&services, "web");
    assert_eq!((web[1], &web[4][..3], &web[4][web[4].len() - 4..]), ("NodePort", "81:", "/TCP"), "{services}");
    let pods = cluster.run(&["get", "pods", "-o", "wide"]);
    assert_eq!(&columns(&pods)[..6], ["NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP"]);
    assert_eq!(&row(&pods, "web-1")[1..3], ["0/1", "Pending"]);
    assert_eq!(&row(&cluster.run(&["get", "namespaces"]), "kube-system")[..2], ["kube-system", "Active"]);
    assert_eq!(&row(&cluster.run(&["get", "configmaps"]), "settings")[1..2], ["1"]);
    assert_eq!(cluster.run(&["get", "cm", "settings", "-o", "jsonpath={.data.colour}"]), "blue");
    let missing = cluster.fail(&["get", "service", "none"]);
    assert!(missing.contains("Error from server (NotFound): services \"none\" not found"), "{missing}");

    let described = cluster.run(&["describe", "service", "web"]);
    for line in ["Selector:", "app=web", "IP Family Policy:", "SingleStack", "NodePort:", "Events:"] {
        assert!(described.contains(line), "{line} is missing in {described}");
    }
    assert!(cluster.run(&["describe", "pod", "web-1"]).contains("QoS Class:"));
    assert!(cluster.run(&["describe", "configmap", "settings"]).contains("colour:\n----\nblue"));
}

#[test]
fn endpoints_follow_pods() {
    let cluster = Cluster::start("endpoints");
    cluster.apply(MANIFEST);
    let status = r#"{"status": {"phase": "Running", "podIP": "10.1.0.5", "podIPs": [{"ip": "10.1.0.5"}],
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}}"#;
    cluster.run(&["patch", "pod", "web-1", "--subresource=status", "--type=merge", "-p", status]);
    let slices = cluster.eventually(&["get", "endpointslices", "-l", "kubernetes.io/service-name=web"], |table| {
        table.contains("10.1.0.5")
    });
    assert_eq!(columns(&slices), ["NAME", "ADDRESSTYPE", "PORTS", "ENDPOINTS", "AGE"]);
    cluster.eventually(&["get", "endpoints", "web"], |table| row(table, "web")[1] == "10.1.0.5:8080");
    assert!(cluster.run(&["describe", "service", "web"]).contains("10.1.0.5:8080"));
    cluster.run(&["delete", "pod", "web-1", "--grace-period=0", "--force"]);
    cluster.eventually(&["get", "endpoints", "web"], |table| row(table, "web")[1] == "<none>");
    cluster.run(&["delete", "service", "web"]);
    let left = |table: &str| !table.contains("web");
    cluster.eventually(&["get", "endpointslices,endpoints,ipaddresses", "--ignore-not-found"], left);
}

#[test]
fn watch_shows_changes() {
    let cluster = Cluster::start("watch");
    let mut child = cluster.command(&["get", "configmaps", "-w"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let running = Running(child);
    let (sender, seen) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        while let Some(Ok(line)) = lines.next() {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    cluster.apply(MANIFEST);
    let next = || seen.recv_timeout(patient(DEADLINE)).expect("the watch shows nothing");
    assert_eq!(columns(&next()), ["NAME", "DATA", "AGE"]);
    assert_eq!(&columns(&next())[..2], ["settings", "1"]);
    cluster.run(&["patch", "configmap", "settings", "--type=merge", "-p", r#"{"data": {"size": "big"}}"#]);
    assert_eq!(&columns(&next())[..2], ["settings", "2"]);
    drop(running);
}

#[test]
fn edit_patch_and_label() {
    let cluster = Cluster::start("edit");
    cluster.apply(MANIFEST);
    let editor = cluster.scratch.write("editor", "#!/bin/sh\nsed -i 's/colour: blue/colour: green/' \"$1\"\n");
    std::fs::set_permissions(&editor, std::fs::Permissions::from_mode(0o755)).unwrap();
    let edited = cluster.command(&["edit", "configmap", "settings"]).env("KUBE_EDITOR", &editor).output().unwrap();
    assert!(edited.status.success(), "{}", String::from_utf8_lossy(&edited.stderr));
    let colour = ["get", "cm", "settings", "-o", "jsonpath={.data.colour}"];
    assert_eq!(cluster.run(&colour), "green");

    let strategic = r#"{"spec": {"ports": [{"port": 443, "name": "https", "targetPort": 8443}]}}"#;
    cluster.run(&["patch", "service", "web", "-p", strategic]);
    let names = ["get", "service", "web", "-o", "jsonpath={.spec.ports[*].name}"];
    assert_eq!(cluster.run(&names).split_whitespace().count(), 2, "ports merge by their number");
    cluster.run(&["patch", "service", "web", "--type=json", "-p", r#"[{"op": "remove", "path": "/spec/ports/0"}]"#]);
    assert_eq!(cluster.run(&names).split_whitespace().count(), 1);
    cluster.run(&["patch", "configmap", "settings", "--type=merge", "-p", r#"{"data": {"colour": null}}"#]);
    assert_eq!(cluster.run(&colour), "");

    cluster.run(&["label", "service", "web", "tier=front"]);
    assert!(cluster.run(&["get", "services", "-l", "tier=front"]).contains("web"));
    let refused = cluster.fail(&["label", "service", "web", "tier=back"]);
    assert!(refused.contains("--overwrite is false"), "{refused}");
    cluster.run(&["label", "service", "web", "tier-"]);
    cluster.run(&["annotate", "service", "web", "note=x"]);
}

#[test]
fn delete_and_namespaces() {
    let cluster = Cluster::start("delete");
    cluster.run(&[
        "apply",
        "-f",
        cluster.scratch.write("ns.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: team}\n").to_str().unwrap(),
    ]);
    cluster.eventually(&["-n", "team", "get", "serviceaccounts"], |table| table.contains("default"));
    cluster.run(&["-n", "team", "apply", "-f", cluster.scratch.write("m.yaml", MANIFEST).to_str().unwrap()]);
    let bound = ["-n", "team", "delete", "pod", "web-1", "--wait=false"];
    assert!(cluster.run(&bound).contains("deleted"));
    assert!(cluster.run(&["-n", "team", "get", "pods"]).contains("Terminating"), "a bound pod waits for its node");
    cluster.run(&["-n", "team", "delete", "pod", "web-1", "--grace-period=0", "--force"]);
    cluster.run(&["delete", "namespace", "team", "--timeout=30s"]);
    let gone = cluster.fail(&["-n", "team", "get", "namespace", "team"]);
    assert!(gone.contains("NotFound"), "{gone}");
    let kept = cluster.fail(&["delete", "namespace", "default"]);
    assert!(kept.contains("this namespace may not be deleted"), "{kept}");
}

#[test]
fn explain_and_discovery() {
    let cluster = Cluster::start("explain");
    let explained = cluster.run(&["explain", "service.spec.clusterIP"]);
    assert!(explained.contains("FIELD: clusterIP <string>") && explained.contains("DESCRIPTION:"), "{explained}");
    let resources = cluster.run(&["api-resources"]);
    for (name, short, kind) in
        [("services", "svc", "Service"), ("configmaps", "cm", "ConfigMap"), ("namespaces", "ns", "Namespace")]
    {
        let row = row(&resources, name);
        assert_eq!((row[1], row[row.len() - 1]), (short, kind));
    }
    assert!(cluster.run(&["api-versions"]).lines().any(|line| line == "discovery.k8s.io/v1"));
    assert!(cluster.run(&["version"]).contains("Server Version: v1.36."));
    assert_eq!(cluster.run(&["get", "--raw", "/readyz"]), "ok");
}

#[test]
fn a_wrong_manifest_is_explained() {
    let cluster = Cluster::start("wrong");
    let apply = |manifest: &str| {
        let path = cluster.scratch.write("wrong.yaml", manifest);
        cluster.fail(&["apply", "-f", path.to_str().unwrap()])
    };
    let unknown = apply("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {portss: []}\n");
    assert!(unknown.contains("unknown field \"spec.portss\""), "{unknown}");
    let invalid = apply("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 0}]}\n");
    assert!(invalid.contains("spec.ports[0].port: Invalid value"), "{invalid}");
    let kind = apply("apiVersion: v1\nkind: Gadget\nmetadata: {name: a}\n");
    assert!(kind.contains("no matches for kind \"Gadget\""), "{kind}");
}

#[test]
fn options_that_cannot_work_end_with_one_sentence() {
    let scratch = Scratch::new("options");
    let data = scratch.0.join("data");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let file = scratch.write("file", "");
    let data = data.to_str().unwrap();
    let below_file = file.join("data");
    let cases: [(&[&str], i32, &str); 5] = [
        (&["--data-dir", data, "--secure-port", &port], 1, "Address already in use"),
        (&["--data-dir", below_file.to_str().unwrap(), "--secure-port", "0"], 1, "making the directory"),
        (
            &["--data-dir", data, "--service-cluster-ip-range", "10.0.0.0/24,10.1.0.0/24"],
            1,
            "one IPv4 and one IPv6 range",
        ),
        (
            &["--data-dir", data, "--write-kubeconfig", "/nonexistent/kc", "--secure-port", "0"],
            1,
            "writing into /nonexistent",
        ),
        (&["--data-dir", data, "--no-such-flag"], 2, "unexpected argument '--no-such-flag'"),
    ];
    for (arguments, code, wanted) in cases {
        let mut child =
            Command::new(server_binary()).args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut error = String::new();
        child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(wanted), "{arguments:?}: {error}");
        assert!(!Path::new(data).exists(), "{arguments:?} left the data directory behind");
    }
}

#[test]
fn a_terminated_server_ends_cleanly_and_its_authority_stays() {
    let scratch = Scratch::new("terminate");
    let start = || {
        let mut child = Command::new(server_binary())
            .args(["--secure-port", "0", "--data-dir"])
            .arg(scratch.0.join("data"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("is ready at"), "{line}");
        Running(child)
    };
    let mut first = start();
    let authority = std::fs::read(scratch.0.join("data/ca.crt")).unwrap();
    let stopped = Command::new("kill").arg(first.0.id().to_string()).status().unwrap();
    assert!(stopped.success());
    let deadline = Instant::now() + patient(DEADLINE);
    let status = loop {
        match first.0.try_wait().unwrap() {
            Some(status) => break status,
            None => assert!(Instant::now() < deadline, "the server does not end"),
        }
        std::thread::yield_now();
    };
    assert!(status.success(), "{status}");
    drop(start());
    assert_eq!(std::fs::read(scratch.0.join("data/ca.crt")).unwrap(), authority);
}
