//! Benchmarks of the packet path and of the control path: what several of them use.
//!
//! Start reading at the program of interest under `bin/`; [`programs`] is the kernel side of all that send packets.
#![forbid(unsafe_code)]

pub mod figures;
pub mod frame;
pub mod objects;
pub mod programs;
pub mod services;
