//! The semantics as tables: objects in, what a packet meets out.
mod balancing;
pub(crate) mod build;
mod conflicts;
mod incremental;
mod policies;
mod topology;
pub(crate) mod trace;
mod unserved;
