//! Health checks over real sockets on loopback addresses of a network namespace of the test's own.

use std::future::Future;
use std::sync::Mutex;
use std::time::Instant;

use node_sys::Netns;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::*;
use crate::events;
use crate::metrics::Metrics;

const DEADLINE: Duration = Duration::from_secs(20);
const PORT: u16 = 30900;

/// Runs `test` on a thread whose sockets are in a namespace of their own: the ports there are free.
fn isolated<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    let namespace = Netns::anonymous().unwrap();
    let inside = namespace.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            loopback_up().await;
            test().await;
        });
    });
    inside.unwrap();
}

async fn loopback_up() {
    let (connection, handle, _) = rtnetlink::new_connection().unwrap();
    tokio::spawn(connection);
    let up = rtnetlink::LinkUnspec::new_with_index(1).up().build();
    handle.link().set(up).execute().await.unwrap();
}

fn name(service: &str, family: IpFamily) -> HealthCheckName {
    let service = ServiceKey { namespace: "shop".into(), name: service.into() };
    HealthCheckName { service, family }
}

fn wanted(checks: &[(&str, IpFamily, u16, u32)]) -> Wanted {
    let checks = checks.iter().map(|(service, family, port, local_endpoints)| {
        (name(service, *family), HealthCheck { port: *port, local_endpoints: *local_endpoints })
    });
    Wanted { checks: checks.collect(), v4: vec![Ipv4Addr::UNSPECIFIED.into()], v6: vec![Ipv6Addr::UNSPECIFIED.into()] }
}

struct Harness {
    sender: watch::Sender<Wanted>,
    health: Arc<Health>,
    metrics: Arc<Metrics>,
    task: JoinHandle<()>,
    notices: Mutex<events::Writer>,
}

impl Harness {
    fn start(first: Wanted) -> Self {
        let (sender, receiver) = watch::channel(first);
        let health = Arc::new(Health::new(Timestamp::now(), Duration::from_secs(60)));
        let metrics = Arc::new(Metrics::new().unwrap());
        let (events, writer) = events::channel("node-1", Arc::clone(&metrics));
        let task = tokio::spawn(serve(receiver, Arc::clone(&health), events));
        Self { sender, health, metrics, task, notices: Mutex::new(writer) }
    }

    /// The next notice, as reason and Service.
    async fn failure(&self) -> (u16, String) {
        let start = Instant::now();
        loop {
            if let Some(Notice::HealthCheckFailed { port, service, .. }) = self.notices.lock().unwrap().try_next() {
                return (port, service.to_string());
            }
            assert!(start.elapsed() < DEADLINE, "no notice");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

async fn get(address: &str, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut text = String::new();
    tokio::time::timeout(DEADLINE, stream.read_to_string(&mut text)).await.ok()?.ok()?;
    Some(text)
}

/// Asks until the answer is as wanted.
async fn until(what: &str, address: &str, good: impl Fn(Option<&str>) -> bool) {
    let start = Instant::now();
    loop {
        let answer = get(address, "/anything").await;
        if good(answer.as_deref()) {
            return;
        }
        assert!(start.elapsed() < DEADLINE, "{what}: {answer:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn status(answer: Option<&str>) -> Option<&str> {
    answer?.split(' ').nth(1)
}

#[test]
fn the_answer_is_kube_proxys_at_any_path() {
    isolated(|| async {
        let harness = Harness::start(wanted(&[("web", IpFamily::V4, PORT, 2)]));
        let address = format!("127.0.0.1:{PORT}");
        until("an answer", &address, |answer| answer.is_some()).await;
        for path in ["/", "/healthz", "/a/b?c"] {
            let answer = get(&address, path).await.unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
            for header in [
                "content-type: application/json",
                "x-content-type-options: nosniff",
                "x-load-balancing-endpoint-weight: 2",
            ] {
                assert!(head.lines().any(|line| line == header), "{header}: {head}");
            }
            let expect = "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\
                          \t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}";
            assert_eq!(body, expect);
        }
        harness.task.abort();
    });
}

#[test]
fn no_endpoint_or_a_late_proxy_is_503_and_eligibility_does_not_matter() {
    isolated(|| async {
        let harness = Harness::start(wanted(&[("web", IpFamily::V4, PORT, 1)]));
        let address = format!("127.0.0.1:{PORT}");
        harness.health.node_seen(true);
        until("200 though the node leaves", &address, |answer| status(answer) == Some("200")).await;
        harness.sender.send(wanted(&[("web", IpFamily::V4, PORT, 0)])).unwrap();
        until("503 without endpoints", &address, |answer| {
            status(answer) == Some("503") && answer.is_some_and(|text| text.contains("endpoint-weight: 0\r\n"))
        })
        .await;
        harness.sender.send(wanted(&[("web", IpFamily::V4, PORT, 1)])).unwrap();
        until("200 again", &address, |answer| status(answer) == Some("200")).await;
        let long_ago = Timestamp::now() - jiff::SignedDuration::from_secs(61);
        harness.health.queued(long_ago);
        let answer = get(&address, "/").await.unwrap();
        assert_eq!(status(Some(&answer)), Some("503"));
        assert!(answer.contains("\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": false"), "{answer}");
    });
}

#[test]
fn families_have_the_same_port_apart() {
    isolated(|| async {
        let both = wanted(&[("web", IpFamily::V4, PORT, 1), ("web", IpFamily::V6, PORT, 0)]);
        let harness = Harness::start(both);
        let (v4, v6) = (format!("127.0.0.1:{PORT}"), format!("[::1]:{PORT}"));
        until("IPv4", &v4, |answer| status(answer) == Some("200")).await;
        until("IPv6", &v6, |answer| status(answer) == Some("503")).await;
        harness.sender.send(wanted(&[("web", IpFamily::V6, PORT, 3)])).unwrap();
        until("IPv6 alone", &v6, |answer| status(answer) == Some("200")).await;
        until("IPv4 closed", &v4, |answer| answer.is_none()).await;
    });
}

#[test]
fn a_port_goes_from_one_service_to_another() {
    isolated(|| async {
        let harness = Harness::start(wanted(&[("a", IpFamily::V4, PORT, 1)]));
        let address = format!("127.0.0.1:{PORT}");
        until("a", &address, |answer| answer.is_some_and(|text| text.contains("\"a\""))).await;
        harness.sender.send(wanted(&[("b", IpFamily::V4, PORT, 1)])).unwrap();
        until("b", &address, |answer| answer.is_some_and(|text| text.contains("\"b\""))).await;
        harness.sender.send(wanted(&[("b", IpFamily::V4, PORT + 1, 1)])).unwrap();
        until("the new port", &format!("127.0.0.1:{}", PORT + 1), |answer| answer.is_some()).await;
        assert_eq!(get(&address, "/").await, None);
    });
}

#[test]
fn a_taken_port_is_told_once_and_stops_no_other() {
    isolated(|| async {
        let taken = std::net::TcpListener::bind(("0.0.0.0", PORT)).unwrap();
        let two = [("a", IpFamily::V4, PORT, 1), ("b", IpFamily::V4, PORT + 1, 1)];
        let harness = Harness::start(wanted(&two));
        assert_eq!(harness.failure().await, (PORT, "shop/a".to_owned()));
        until("the other", &format!("127.0.0.1:{}", PORT + 1), |answer| status(answer) == Some("200")).await;
        let three = [two[0], two[1], ("c", IpFamily::V4, PORT + 2, 1)];
        harness.sender.send(wanted(&three)).unwrap();
        until("a third", &format!("127.0.0.1:{}", PORT + 2), |answer| answer.is_some()).await;
        assert!(harness.notices.lock().unwrap().try_next().is_none(), "the same reason is not told again");
        drop(taken);
        harness.sender.send(wanted(&[two[0], two[1]])).unwrap();
        until("the port is free", &format!("127.0.0.1:{PORT}"), |answer| status(answer) == Some("200")).await;
        assert!(harness.metrics.render(&Vec::new()).unwrap().contains("trama_events_dropped_total 0"));
    });
}

#[test]
fn restricted_node_ports_restrict_health_checks() {
    let node = NodeConfig {
        node_port_addresses: ["192.0.2.1", "127.0.0.5", "2001:db8::1"].iter().map(|a| a.parse().unwrap()).collect(),
        ..NodeConfig::default()
    };
    let none = BTreeMap::new();
    let addresses = |configured: &NodePortAddresses| {
        let wanted = Wanted::new(&none, configured, &node);
        let text = |list: &[IpAddr]| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        (text(&wanted.v4), text(&wanted.v6))
    };
    let networks = |list: &[&str]| NodePortAddresses::Networks(list.iter().map(|n| n.parse().unwrap()).collect());
    let pair = |v4: &str, v6: &str| (v4.to_owned(), v6.to_owned());
    assert_eq!(addresses(&networks(&[])), pair("0.0.0.0", "::"));
    assert_eq!(addresses(&networks(&["0.0.0.0/0", "2001:db8::/64"])), pair("0.0.0.0", "2001:db8::1"));
    assert_eq!(addresses(&networks(&["192.0.2.0/24"])), pair("127.0.0.5 192.0.2.1", "::"));
    assert_eq!(addresses(&NodePortAddresses::Primary), pair("127.0.0.5 192.0.2.1", "2001:db8::1"));
    isolated(|| async {
        let mut restricted = wanted(&[("web", IpFamily::V4, PORT, 1)]);
        restricted.v4 = vec!["127.0.0.5".parse().unwrap()];
        let _harness = Harness::start(restricted);
        until("the address", &format!("127.0.0.5:{PORT}"), |answer| status(answer) == Some("200")).await;
        assert_eq!(get(&format!("127.0.0.1:{PORT}"), "/").await, None);
    });
}
