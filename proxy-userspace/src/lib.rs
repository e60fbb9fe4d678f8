//! trama-proxy: watches Services and EndpointSlices and programs the node's kernel.
//!
//! ```text
//!  API server ─► source ─► tracker ─► model ─► ServiceSnapshot + delta ─► dataplane ─► kernel
//!  rtnetlink  ─►   │       (join)    (decide)          runner: when, and again after a failure
//!                  └ bounded channel                    health, metrics: what it says of itself
//! ```
//! Invariants: nothing is programmed before both lists are complete; while the API server is away the last state stays; the
//! cost of a change is the size of the change; `model` and `tracker` do no IO and read no clock; a data plane decides
//! nothing, it expresses [`model::ServiceSnapshot`]. Start reading at [`model::decide`] and [`runner::run`].
#![forbid(unsafe_code)]
pub mod admin;
pub mod app;
pub mod config;
pub mod connection;
pub mod conntrack;
pub mod conntrack_sysctls;
pub mod dataplane;
pub mod events;
pub mod health;
pub mod inspect;
pub mod metrics;
pub mod model;
pub mod node;
pub mod runner;
pub mod source;
pub mod status;
pub mod tracker;
