//! The generic REST engine of apiserver-lite: a Kubernetes API server over a [`apiserver_store::Store`].
//!
//! ```text
//! TCP -> TLS -> identity -> HTTP (route, negotiation, limits) -> engine (get, list, watch, create, update, patch, delete) -> Store
//!                                                                   |-> strategy (facts per kind) , service (addresses, ports)
//! ```
//!
//! Invariants
//! - There is no handler per kind: what differs between kinds is data from `apiserver-machinery`, or a fact in `engine/strategy.rs`.
//! - An object is stored as the JSON that clients get, without `resourceVersion`; plain reads and watches never parse it.
//! - A write runs to its end even when the client goes away, so that addresses and ports are never lost.
//! - Everything is bounded: body 3 MiB, requests and watches in flight, connections, the time of a request ([`Limits`]).
//!
//! Authentication is by client certificate. Every certificate of the CA may do everything (there is no RBAC yet, so `system:masters`
//! means no more than any other group); without a certificate only `/healthz`, `/livez`, `/readyz` and `/version` answer.
//! Not there yet: protobuf, server-side apply, managedFields, garbage collection by ownerReferences, admission beyond namespaces.
//!
//! Start reading at [`Server`].
#![forbid(unsafe_code)]

mod bootstrap;
mod config;
mod engine;
mod http;
mod identity;
mod serve;
mod service;
mod tls;

pub use bootstrap::StartError;
pub use config::{Config, Limits};
pub use serve::Server;
pub use tls::{TlsError, tls_config};
