//! trama-lab builds clusters out of network namespaces, sends traffic through them and says who answered.
//!
//! ```text
//!   client ---- switch (br0) ---- node-1 ---- pod, pod        every box is a network namespace of its own
//!                        \------- node-2 ---- pod             every node has its own cgroup v2 subtree and BPF file system
//! ```
//! Invariants: everything is named after the lab's id, and only what carries that name is ever removed; it is removed when the
//! [`Topology`] is dropped, on Ctrl-C, or by the next lab when the process was killed. The machine's own links, routes, sysctls
//! and cgroups are never touched. Needs root. Start reading at [`Topology`], then [`Place::probe`].
#![forbid(unsafe_code)]

mod agent;
mod binaries;
mod claim;
mod cluster;
mod conversation;
mod daemon;
mod echo;
mod files;
pub mod flows;
mod follow;
mod foreign;
mod frame_links;
pub mod fuzz;
mod kube_proxy;
pub mod manifest;
pub mod metrics;
pub mod migration;
mod node;
pub mod packet;
pub mod packets;
mod paths;
mod place;
mod pod;
mod probe;
mod relay;
pub mod scenario;
pub mod services;
mod slices;
mod status;
pub mod steady;
pub mod survey;
mod table;
mod tally;
mod topology;
pub mod traffic;
pub mod twins;
pub mod up;
pub mod verifier;
mod wait;
mod wire;

pub use binaries::binary;
pub use claim::{Claim, sweep};
pub use cluster::{CLUSTER_CIDRS, Cluster, ClusterOptions};
pub use conversation::{Conversation, Turn, converse};
pub use daemon::Daemon;
pub use echo::{EchoReply, EchoServer};
pub use foreign::Foreign;
pub use frame_links::FrameLinks;
pub use node::{Node, PodCidrs};
pub use paths::PathCounts;
pub use place::Place;
pub use pod::Pod;
pub use probe::{Failure, Outcome, Probe, Reply, Transport};
pub use table::Table;
pub use tally::Tally;
pub use topology::{CLIENT_ADDRESSES, Topology};
pub use wait::{patient, wait_for};
pub use wire::{Wire, link_address};
