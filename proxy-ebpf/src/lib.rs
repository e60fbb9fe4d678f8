//! The packet and socket programs of trama-proxy: the stages, as a library. `main.rs` has one entry point per hook.
//!
//! ```text
//!  connect4/6 sendmsg4/6 ──► sock ──┐                        recvmsg4/6 getpeername4/6 ──► sock (back to the VIP)
//!                                   ├─► service (frontend, backend)
//!  tc ingress, tc egress ──► tc ────┘         │
//!        ▲ parse, ctx                         ▼
//!        └──────────── conntrack (flows) ──► nat (rewrite) ──► forward (route, redirect) | local | reject (ICMP)
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

pub mod conntrack;
pub mod counters;
pub mod ctx;
pub mod forward;
pub mod local;
pub mod maps;
pub mod nat;
pub mod parse;
pub mod peers;
pub mod reject;
pub mod service;
pub mod sock;
pub mod tc;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: nothing in these programs can panic, and the verifier would reject an endless loop.
    loop {}
}
