//! What trama asks of the kernel directly: network namespaces, cgroups, mounts, processes, kernel parameters, probes,
//! netlink, nf_tables, packet counters and IPVS.
//!
//! Invariants: the only user-space crate with `unsafe`; it decides nothing, and owns nothing that its caller did not ask for.
//! Needs root (`CAP_SYS_ADMIN`, `CAP_NET_ADMIN`) for everything but [`probe`]. Start reading at [`Netns`].
pub mod bpf;
mod btf;
mod cgroup;
pub mod conntrack;
mod divert;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod ipvs;
pub mod local_route;
mod map_entries;
mod map_layout;
mod mount;
pub mod netdev;
pub mod netlink;
mod netns;
pub mod nfacct;
pub mod nftables;
mod packet_socket;
pub mod probe;
mod process;
pub mod sock_diag;
pub mod sysctl;
pub mod xtables;

pub use btf::{Btf, Field, Fields};
pub use cgroup::{Cgroup, cgroup2_mount};
pub use divert::Divert;
pub use error::SysError;
pub use map_entries::{read_elements, read_entries};
pub use map_layout::{DescribedMap, MapLayout};
pub use mount::{mount_bpffs, mounts_of_type, unmount};
pub use netns::{NETNS_DIR, Netns, NetnsGuard, netns_cookie};
pub use packet_socket::packet_socket;
pub use process::{Placement, limit_open_files, release_pages, share_heap, spawn, terminate};
