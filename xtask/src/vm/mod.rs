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

use crate::run::require_root;
use arguments::{Arguments, Work};
use guest::Guest;
use job::Job;

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
    }
}
