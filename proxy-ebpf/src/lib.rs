//! The packet and socket programs of trama-proxy: the stages, as a library. `main.rs` has one entry point per hook.
//!
//! ```text
//!  connect4/6 sendmsg4/6 ──► sock ──┐                        recvmsg4/6 getpeername4/6 ──► sock (back to the VIP)
//!                                   │                                    sock_release ──► connected
//!                                   ├─► service (frontend, backend)
//!  tc ingress, tc egress ──► tc ────┘         │
//!        ▲ parse, ctx                         ▼
//!        └──────────── conntrack (flows) ──► nat (rewrite) ──► forward (route, redirect) | local | reject (ICMP)
//!                                       └──► dsr (tunnel) ─────┘
//!  tc ingress of the endpoint's node ──► decap ──► the same, as if the packet had come without a tunnel
//! ```
//!
//! Invariants:
//! - only `ctx` touches packet bytes, and checks bounds in one place;
//! - every packet leaves with an explicit verdict; what is dropped or given back has a counted reason;
//! - IPv4 and IPv6 are one generic implementation over [`maps::Family`];
//! - nothing is logged per packet.
//!
//! Needs Linux 5.18 (`bpf_set_retval`); user space says so before loading on an older one. Tested on 6.18.
#![no_std]
#![feature(asm_experimental_arch, core_intrinsics)]
#![expect(internal_features, reason = "BPF has atomic operations that the library of the target leaves out")]

pub mod connected;
pub mod conntrack;
pub mod counters;
pub mod ctx;
pub mod decap;
pub mod dsr;
pub mod edit;
pub mod events;
pub mod expire;
pub mod flows;
pub mod forward;
pub mod fragment;
pub mod icmp;
pub mod iterator;
pub mod left;
pub mod local;
pub mod maps;
pub mod nat;
pub mod node_port;
pub mod parse;
pub mod peers;
pub mod plan;
pub mod reject;
pub mod service;
pub mod sock;
pub mod tc;
pub mod xdp;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: nothing in these programs can panic, and the verifier would reject an endless loop.
    loop {}
}
