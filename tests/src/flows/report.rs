//! What the oracle prints: failures with expected and got, exceptions with their reason, and the sum.

use std::time::Instant;

use anyhow::Result;

use super::exceptions::Exception;
use super::proxy::Backend;
use super::scenario::{Flow, Scenario};

/// Counts flows while scenarios end, in any order.
pub(super) struct Report {
    passed: usize,
    failed: usize,
    excepted: usize,
    exceptions: Vec<Tracked>,
    start: Instant,
}

/// An exception, whether a flow of it was run, and whether it still differs.
struct Tracked {
    exception: Exception,
    ran: bool,
    occurred: bool,
}

impl Report {
    pub(super) fn new(exceptions: Vec<Exception>) -> Self {
        let tracked = |exception| Tracked { exception, ran: false, occurred: false };
        let exceptions = exceptions.into_iter().map(tracked).collect();
        Self { passed: 0, failed: 0, excepted: 0, exceptions, start: Instant::now() }
    }

    /// Takes in what the flows of a scenario met: `None` is what was expected.
    pub(super) fn add(&mut self, backend: Backend, scenario: &Scenario, result: Result<Vec<Option<String>>>) {
        match result {
            Ok(got) => {
                for (flow, got) in scenario.flows.iter().zip(got) {
                    self.add_flow(backend, scenario, flow, got);
                }
            }
            Err(error) => {
                self.failed += scenario.flows.len();
                println!("FAIL {backend} {}: all {} flows: {error:#}", scenario.name, scenario.flows.len());
            }
        }
    }

    fn add_flow(&mut self, backend: Backend, scenario: &Scenario, flow: &Flow, got: Option<String>) {
        let exception =
            self.exceptions.iter_mut().find(|tracked| tracked.exception.is_for(backend, &scenario.name, &flow.name));
        let Some(got) = got else {
            self.passed += 1;
            exception.into_iter().for_each(|tracked| tracked.ran = true);
            return;
        };
        if let Some(tracked) = exception {
            tracked.ran = true;
            if got.starts_with(&tracked.exception.got) {
                tracked.occurred = true;
                self.excepted += 1;
                println!("EXCEPTION {backend} {}: {flow}\n  {}", scenario.name, tracked.exception.reason);
                return;
            }
        }
        self.failed += 1;
        println!("FAIL {backend} {}: {flow}\n  expected {}\n  got      {got}", scenario.name, flow.expect);
    }

    /// Prints the sum; whether nothing failed.
    pub(super) fn finish(mut self) -> bool {
        for Tracked { exception, .. } in self.exceptions.iter().filter(|tracked| tracked.ran && !tracked.occurred) {
            self.failed += 1;
            println!(
                "FAIL {} {}: {}: the exception does not occur any more, remove it",
                exception.backend, exception.scenario, exception.flow
            );
        }
        if self.excepted > 0 {
            println!("{} listed exceptions", self.excepted);
        }
        println!("{:.1} s", self.start.elapsed().as_secs_f64());
        println!("{} passed, {} failed", self.passed, self.failed);
        self.failed == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::file;
    use std::path::Path;

    fn report(got: Option<&str>) -> Report {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("flows/kube-proxy-1.36.jsonl");
        let mut scenario = file::read(&path).unwrap().scenarios.remove(0);
        scenario.flows.truncate(1);
        let exception = Exception {
            backend: Backend::Ebpf,
            scenario: scenario.name.clone(),
            flow: scenario.flows[0].name.clone(),
            got: "DROP".into(),
            reason: "a reason".into(),
        };
        let mut report = Report::new(vec![exception]);
        report.add(Backend::Ebpf, &scenario, Ok(vec![got.map(str::to_owned)]));
        report
    }

    #[test]
    fn an_exception_is_neither_passed_nor_failed_and_must_occur() {
        let occurred = report(Some("DROP (3 times)"));
        assert_eq!((occurred.passed, occurred.failed, occurred.excepted), (0, 0, 1));
        assert!(occurred.finish());
        let different = report(Some("PASS (3 times)"));
        assert_eq!((different.failed, different.excepted), (1, 0));
        assert!(!different.finish());
        assert!(!report(None).finish(), "gone, and still listed");
    }
}
