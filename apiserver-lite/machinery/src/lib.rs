//! The Kubernetes object model without IO.
//!
//! Objects are [`serde_json::Value`]s; what is known about them comes from tables that `cargo xtask schema` regenerates from
//! the Kubernetes release they name. Every function here is pure: time and randomness are passed in, nothing is read or sent.
//!
//! ```text
//! body --decode--> Value --defaults--> --validation--> the server's registry and store
//!                    ^                                        |
//!                  patch                selector (list, watch), table (for people), discovery, openapi
//! ```
//!
//! Invariants: no IO, no clock, no global state except tables that are parsed once and never change; a value that came
//! through [`decode`] has the structure its type asks for, so later stages may treat a surprising shape as "absent".
//! Start reading at [`schema::Registry`]. Errors that a client may see are [`status::Status`] values, ready to be sent.
#![forbid(unsafe_code)]

pub mod decode;
pub mod defaults;
pub mod discovery;
pub mod field;
pub mod meta;
pub mod openapi;
pub mod patch;
pub mod schema;
pub mod selector;
pub mod status;
pub mod table;
pub mod validation;

#[cfg(test)]
mod robustness;
