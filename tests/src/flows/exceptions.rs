//! Differences that kube-proxy's own modes have: listed with their reason, counted apart, and a failure when they are gone.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::proxy::Backend;

/// Flows of a backend that differ from what their scenario expects.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    backend: String,
    scenario: String,
    flows: Vec<String>,
    got: String,
    reason: String,
}

/// One such flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Exception {
    pub(super) backend: Backend,
    pub(super) scenario: String,
    pub(super) flow: String,
    /// What is met instead: the beginning of what the oracle says.
    pub(super) got: String,
    pub(super) reason: String,
}

impl Exception {
    pub(super) fn is_for(&self, backend: Backend, scenario: &str, flow: &str) -> bool {
        self.backend == backend && self.scenario == scenario && self.flow == flow
    }
}

/// Reads a JSON list of exceptions.
pub(super) fn read(path: &Path) -> Result<Vec<Exception>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let list: Vec<Written> =
        serde_json::from_str(&text).with_context(|| format!("{} is no list of exceptions", path.display()))?;
    let mut exceptions = Vec::new();
    for entry in list {
        let named = || format!("{}: the exception of {}", path.display(), entry.scenario);
        let complete = !entry.reason.trim().is_empty() && !entry.got.trim().is_empty() && !entry.flows.is_empty();
        ensure!(complete, "{} needs flows, what is got and a reason", named());
        let backend = Backend::ALL.into_iter().find(|backend| backend.name() == entry.backend);
        let backend = backend.with_context(|| format!("{} names no backend", named()))?;
        exceptions.extend(entry.flows.iter().map(|flow| Exception {
            backend,
            scenario: entry.scenario.clone(),
            flow: flow.clone(),
            got: entry.got.clone(),
            reason: entry.reason.clone(),
        }));
    }
    Ok(exceptions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_projects_own_list_is_complete() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("flows");
        for exception in read(&folder.join("exceptions.json")).unwrap() {
            let named = |path: &str| {
                let scenarios = crate::flows::file::read(&folder.join(path)).unwrap().scenarios;
                scenarios.iter().any(|scenario| {
                    scenario.name == exception.scenario && scenario.flows.iter().any(|flow| flow.name == exception.flow)
                })
            };
            let known = ["kube-proxy-1.36.jsonl", "matrix.jsonl", "modes.jsonl"].into_iter().any(named);
            assert!(known, "{exception:?}");
        }
    }

    #[test]
    fn a_reason_is_asked_for() {
        let folder = std::env::temp_dir().join(format!("trama-exceptions-{}", std::process::id()));
        fs::write(&folder, r#"[{"backend":"ipvs","scenario":"a","flows":["b"],"got":"DROP","reason":" "}]"#).unwrap();
        let error = read(&folder).unwrap_err().to_string();
        fs::remove_file(&folder).unwrap();
        assert!(error.contains("the exception of a needs"), "{error}");
    }
}
