//! A small Kubernetes API server in one process.
//!
//! ```text
//! options -> listener -> certificates -> store + server (+ controllers, which are clients of the server like any other) -> files -> ready
//! ```
//!
//! Invariants: nothing is written before everything that can fail has been tried; controllers never touch the store.
//! State is in memory and ends with the process; only the certificate authority is kept in the data directory.
//! Start reading at [`run`].
#![forbid(unsafe_code)]

mod app;
mod kubeconfig;
mod options;
mod pki;

pub use app::{AppError, run};
pub use kubeconfig::kubeconfig;
pub use options::{Controllers, Options, OptionsError};
pub use pki::{Authority, Leaf, PkiError};
