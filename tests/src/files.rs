//! How many files a process may have open: a test with ten thousand connections has as many at each end.

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Files that a client or a server of such a test may have open at once: it has its part of the connections.
const FILES: u64 = 16_384;

/// Raises this process's limit where it is lower, and as far as it may be.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn allow_many_files() -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the limit of open files")?;
    let wanted = FILES.min(hard);
    if soft >= wanted {
        return Ok(());
    }
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).context("cannot raise the limit of open files")
}
