//! The configuration as text: for `--write-config-to` and `/configz`.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{ConfigError, Documents};

impl Documents {
    /// Gives every absent field its default and names both kinds.
    pub(super) fn set_defaults(&mut self) {
        self.kube_proxy.set_defaults();
        self.own.set_kind();
    }

    /// The body of `/configz`: kube-proxy's configuration under kube-proxy's key, ours beside it.
    pub fn configz(&self) -> Value {
        json!({ "kubeproxy.config.k8s.io": self.kube_proxy, "trama.dev": self.own })
    }

    /// Writes both documents to a file that `--config` reads back. JSON is YAML, and kube-proxy reads the first document too.
    ///
    /// # Errors
    /// Where the file can't be written.
    pub fn write(&self, path: &Path) -> Result<(), ConfigError> {
        let wrong = |source| ConfigError::Write { path: path.to_owned(), source };
        let text = self.text().map_err(|error| wrong(error.into()))?;
        fs::write(path, text).map_err(wrong)
    }

    /// Both documents, as they are written.
    pub(super) fn text(&self) -> serde_json::Result<String> {
        let kube_proxy = serde_json::to_string_pretty(&self.kube_proxy)?;
        let own = serde_json::to_string_pretty(&self.own)?;
        Ok(format!("{kube_proxy}\n---\n{own}\n"))
    }
}
