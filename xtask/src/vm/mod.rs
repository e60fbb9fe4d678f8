//! `cargo xtask vm`: runs a command as root under another kernel.
//!
//! The guest's root is this machine's root, shared read-only through virtiofs, with a file system in the guest's memory laid over it:
//! every program, library and test is at the path where it is here, and nothing that the guest writes comes back. It has no network.
//! The processor is emulated, so that it works where there is no /dev/kvm: expect a tenth of the speed.
mod arguments;
mod cpio;
mod guest;
mod job;
mod kernel;
mod packages;
mod suite;

use std::process::ExitCode;

use anyhow::Result;

use crate::bench::{BENCH_DIR, build_bench};
use crate::programs::{BIN_DIR, Profile, build};
use crate::run::require_root;
use arguments::{Arguments, Work};
use guest::Guest;
use job::Job;

/// How much longer an emulated machine takes: tests and benchmarks multiply the limits of their waiting with it.
pub(crate) const PATIENCE: (&str, &str) = ("TRAMA_PATIENCE", "6");
/// Loads what the data planes would have the kernel load, and becomes the benchmark. Each module is a process of its own, for which an
/// emulated machine takes half a second: that would be half a minute of the first sync, and says nothing of the proxy.
const LOAD_AND_RUN: &str = "modprobe -a ip_vs ip_vs_rr nf_tables nf_conntrack_netlink nft_chain_nat nft_ct nft_fib_ipv4 nft_fib_ipv6 \
    nft_masq nft_numgen nft_reject_ipv4 nft_reject_ipv6 2>/dev/null; exec \"$0\" \"$@\"";
/// In the guest's memory.
const GUEST_BENCH_DIR: &str = "/run/trama-bench";

/// Does what the arguments after `vm` say; the exit status is the command's own.
pub(crate) fn vm(arguments: &[&str]) -> Result<ExitCode> {
    let arguments = Arguments::parse(arguments)?;
    require_root("vm")?;
    packages::install()?;
    let kernel = kernel::prepare(arguments.kernel)?;
    let guest = Guest { kernel: &kernel, memory_mb: arguments.memory_mb, limit: arguments.limit };
    match arguments.work {
        Work::Command(words) => {
            let status = guest.run(&Job::new(words), |line| print!("{line}"))?;
            Ok(ExitCode::from(status))
        }
        Work::Tests(names) => suite::run(&guest, &names),
        Work::BenchScale(options) => bench_scale(&guest, options),
    }
}

/// Builds with optimisation here and measures there. The figures are printed; their file goes with the guest.
fn bench_scale(guest: &Guest<'_>, options: &[&str]) -> Result<ExitCode> {
    let program = build_bench("scale")?;
    let programs = build(Profile::Release)?;
    let program = program.display().to_string();
    let words: Vec<&str> =
        ["sh", "-c", LOAD_AND_RUN, program.as_str()].into_iter().chain(options.iter().copied()).collect();
    let job = Job::new(&words).with_default(BIN_DIR, programs.display().to_string());
    let job = job.with_default(BENCH_DIR, GUEST_BENCH_DIR).with_default(PATIENCE.0, PATIENCE.1);
    Ok(ExitCode::from(guest.run(&job, |line| print!("{line}"))?))
}
