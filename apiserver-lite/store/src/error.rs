//! Why a store call did not do what was asked.

use std::sync::Arc;

use crate::{Entry, Revision};

/// Why a store call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The revision's history is gone; read the newest state instead.
    #[error("revision {requested} has been compacted, the oldest one kept is {compacted}")]
    Compacted {
        /// What was asked for.
        requested: Revision,
        /// The oldest revision that can be read.
        compacted: Revision,
    },
    /// The revision has not happened yet.
    #[error("revision {requested} is in the future, the newest one is {current}")]
    Future {
        /// What was asked for.
        requested: Revision,
        /// The newest revision.
        current: Revision,
    },
    /// The key is not in the state that the write expected.
    #[error("key {key} is not in the expected state")]
    Conflict {
        /// The key that was not written.
        key: Arc<str>,
        /// What is there, read at the moment of the refusal; `None` where the key does not exist.
        current: Option<Box<Entry>>,
        /// The store's revision at that moment.
        revision: Revision,
    },
    /// The store holds as many bytes as it may.
    #[error("the store is full: {bytes} of {bytes_max} bytes are in use, delete objects to go on")]
    Full {
        /// Bytes of live keys and values.
        bytes: u64,
        /// The limit.
        bytes_max: u64,
    },
    /// As many watches are open as may be.
    #[error("{watches_max} watches are open, which is the limit")]
    TooManyWatches {
        /// The limit.
        watches_max: usize,
    },
}

impl StoreError {
    /// Whether the same call can succeed later without reading anything again.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Future { .. } | Self::TooManyWatches { .. })
    }
}
