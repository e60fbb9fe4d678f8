//! The Go module `k8s.io/kubernetes`: where it is on disk, and its discovery and OpenAPI documents.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;

/// The documents that the tables are made from.
pub(super) struct Source {
    /// `api/openapi-spec/swagger.json`.
    pub(super) swagger: Value,
    /// `api/discovery/api__v1.json`: the core group's resources.
    pub(super) core: Value,
    /// `api/discovery/aggregated_v2.json`: all other groups, in discovery order.
    pub(super) aggregated: Value,
}

/// Downloads the module into Go's cache (a no-op when it is there) and reads it.
pub(super) fn load(release: &str) -> anyhow::Result<Source> {
    let api = module_folder(release)?.join("api");
    Ok(Source {
        swagger: read(&api.join("openapi-spec/swagger.json"))?,
        core: read(&api.join("discovery/api__v1.json"))?,
        aggregated: read(&api.join("discovery/aggregated_v2.json"))?,
    })
}

fn module_folder(release: &str) -> anyhow::Result<PathBuf> {
    let module = format!("k8s.io/kubernetes@{release}");
    let output = Command::new("go")
        .args(["mod", "download", "-json", &module])
        // Outside of any module, so that no go.mod nearby decides what is downloaded.
        .current_dir(std::env::temp_dir())
        .output()
        .context("running `go mod download`; install Go (apt-get install golang-go) and try again")?;
    let answer: Value = serde_json::from_slice(&output.stdout).with_context(|| {
        format!("`go mod download {module}` gave no JSON: {}", String::from_utf8_lossy(&output.stderr).trim())
    })?;
    let error = answer.get("Error").and_then(Value::as_str).unwrap_or_default();
    ensure!(output.status.success() && error.is_empty(), "`go mod download {module}` failed: {error}");
    let folder = answer.get("Dir").and_then(Value::as_str).context("`go mod download` named no folder")?;
    Ok(PathBuf::from(folder))
}

fn read(path: &Path) -> anyhow::Result<Value> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("parsing {}", path.display()))
}
