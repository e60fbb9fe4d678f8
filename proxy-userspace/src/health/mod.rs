//! Whether this proxy keeps up and its node should get traffic (kube-proxy 1.36 `pkg/proxy/healthcheck/proxy_health.go`).

pub mod services;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// The state behind `/healthz` and `/livez`. It needs no API server: while that is away nothing is queued and the proxy stays
/// healthy.
#[derive(Debug)]
pub struct Health {
    /// An update that waits this long makes the proxy unhealthy.
    timeout: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    last_updated: Timestamp,
    oldest_queued: Option<Timestamp>,
    /// `None` until the Node has been seen.
    node_leaving: Option<bool>,
}

/// One answer: its status code and body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// 200 or 503.
    pub code: u16,
    /// JSON.
    pub body: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    last_updated: Timestamp,
    current_time: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    status: BTreeMap<&'static str, FamilyReport>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyReport {
    last_updated: Timestamp,
    healthy: bool,
}

impl Health {
    /// Healthy from `now` on, until something has to be programmed and is not for `timeout` (twice the syncPeriod).
    pub fn new(now: Timestamp, timeout: Duration) -> Self {
        Self { timeout, state: Mutex::new(State { last_updated: now, oldest_queued: None, node_leaving: None }) }
    }

    /// Something has to be programmed.
    pub fn queued(&self, now: Timestamp) {
        self.lock().oldest_queued.get_or_insert(now);
    }

    /// Everything is programmed.
    pub fn updated(&self, now: Timestamp) {
        let mut state = self.lock();
        state.oldest_queued = None;
        state.last_updated = now;
    }

    /// The Node was seen; `leaving` means that it is being deleted or about to be.
    pub fn node_seen(&self, leaving: bool) {
        self.lock().node_leaving = Some(leaving);
    }

    /// `/healthz`: 503 too when the node should get no traffic any more.
    pub fn healthz(&self, now: Timestamp) -> Answer {
        let eligible = self.lock().node_leaving == Some(false);
        self.answer(now, Some(eligible))
    }

    /// `/livez`: the proxy alone.
    pub fn livez(&self, now: Timestamp) -> Answer {
        self.answer(now, None)
    }

    /// Whether nothing waits for too long; whether the node should get traffic does not matter.
    pub fn is_healthy(&self, now: Timestamp) -> bool {
        let oldest = self.lock().oldest_queued;
        oldest.is_none_or(|queued| now.duration_since(queued).unsigned_abs() < self.timeout)
    }

    fn answer(&self, now: Timestamp, node_eligible: Option<bool>) -> Answer {
        let healthy = self.is_healthy(now);
        let state = self.lock();
        let good = healthy && node_eligible != Some(false);
        // "lastUpdated" of a healthy proxy is the time of the question, as old clients expect it to move.
        let last_updated = if good { now } else { state.last_updated };
        let family = || FamilyReport { last_updated: state.last_updated, healthy };
        let status = FAMILIES.into_iter().map(|name| (name, family())).collect();
        let report = Report { last_updated, current_time: now, node_eligible, healthy, status };
        let body = serde_json::to_string(&report).unwrap_or_default();
        Answer { code: if good { 200 } else { 503 }, body }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).unwrap()
    }

    const TIMEOUT: Duration = Duration::from_secs(60);

    #[test]
    fn an_update_that_waits_too_long_is_unhealthy_until_it_is_done() {
        let health = Health::new(at(0), TIMEOUT);
        health.node_seen(false);
        let codes = |now| (health.healthz(at(now)).code, health.livez(at(now)).code);
        assert_eq!(codes(1000), (200, 200), "idle is healthy");
        health.queued(at(1000));
        health.queued(at(1050));
        assert_eq!(codes(1059), (200, 200));
        assert_eq!(codes(1060), (503, 503), "counted from the oldest");
        health.updated(at(1061));
        assert_eq!(codes(5000), (200, 200));
    }

    #[test]
    fn eligibility_concerns_healthz_only() {
        let health = Health::new(at(0), TIMEOUT);
        let codes = || (health.healthz(at(1)).code, health.livez(at(1)).code);
        assert_eq!(codes(), (503, 200), "Node never seen");
        health.node_seen(true);
        assert_eq!(codes(), (503, 200));
        health.node_seen(false);
        assert_eq!(codes(), (200, 200));
    }

    #[test]
    fn the_body_is_kube_proxys() {
        let health = Health::new(at(0), TIMEOUT);
        health.node_seen(false);
        let (then, now) = ("2023-11-14T22:13:20Z", "2023-11-14T22:13:21Z");
        let family = format!(r#"{{"lastUpdated":"{then}","healthy":true}}"#);
        let status = format!(r#""status":{{"IPv4":{family},"IPv6":{family}}}"#);
        let healthz =
            format!(r#"{{"lastUpdated":"{now}","currentTime":"{now}","nodeEligible":true,"healthy":true,{status}}}"#);
        assert_eq!(health.healthz(at(1)).body, healthz);
        let livez = format!(r#"{{"lastUpdated":"{now}","currentTime":"{now}","healthy":true,{status}}}"#);
        assert_eq!(health.livez(at(1)).body, livez);
        health.node_seen(true);
        let leaving =
            format!(r#"{{"lastUpdated":"{then}","currentTime":"{now}","nodeEligible":false,"healthy":true,{status}}}"#);
        assert_eq!(health.healthz(at(1)).body, leaving);
    }
}
