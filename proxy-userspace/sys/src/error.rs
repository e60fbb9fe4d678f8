//! The one error of this crate: which request the kernel refused, on which object.

use std::io;
use std::path::Path;

/// A request that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {object}: {source}")]
pub struct SysError {
    /// What was attempted, as a verb phrase: `create network namespace`.
    pub action: &'static str,
    /// The object by its name or path.
    pub object: String,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

impl SysError {
    pub(crate) fn new(action: &'static str, object: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { action, object: object.into(), source: source.into() }
    }

    pub(crate) fn at(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::new(action, path.display().to_string(), source)
    }

    /// Whether the object was not there: what makes a removal idempotent.
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}
