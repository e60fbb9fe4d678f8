//! Processes started inside a network namespace and a cgroup, and signals to them.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::{Cgroup, Netns, SysError};

/// Where a process starts. `None` keeps what the caller has.
#[derive(Debug, Clone, Copy, Default)]
pub struct Placement<'a> {
    /// Network namespace of the process.
    pub netns: Option<&'a Netns>,
    /// cgroup v2 of the process: every socket it makes belongs to this cgroup.
    pub cgroup: Option<&'a Cgroup>,
}

/// Starts `command` in its place, in a process group of its own: Ctrl-C in the terminal reaches the caller alone, which then decides.
///
/// # Errors
/// When the cgroup cannot be opened or the program cannot be started.
pub fn spawn(command: &mut Command, placement: Placement<'_>) -> Result<Child, SysError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let netns = placement.netns.map(Netns::try_clone).transpose()?;
    let procs = placement.cgroup.map(Cgroup::procs_file).transpose()?.map(OwnedFd::from);
    let enter = move || {
        if let Some(procs) = &procs {
            nix::unistd::write(procs, b"0")?;
        }
        if let Some(netns) = &netns {
            nix::sched::setns(netns, CloneFlags::CLONE_NEWNET)?;
        }
        Ok(())
    };
    command.process_group(0);
    // SAFETY: between fork and exec only async-signal-safe calls are allowed. The closure makes two system calls (write,
    // setns) on descriptors opened before, and neither they nor the conversion of their error numbers allocate or lock.
    unsafe { command.pre_exec(enter) };
    command.spawn().map_err(|e| SysError::new("start", program, e))
}

/// Asks the process to end (SIGTERM). A process that is gone already is no error; the caller still waits for its own child.
///
/// # Errors
/// When the signal may not be sent.
pub fn terminate(child: &Child) -> Result<(), SysError> {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    match kill(pid, Signal::SIGTERM) {
        Ok(()) | Err(nix::Error::ESRCH) => Ok(()),
        Err(error) => Err(SysError::new("terminate process", child.id().to_string(), error)),
    }
}

/// Lets a process open no descriptor beyond this number (the soft `RLIMIT_NOFILE`); those that it has stay. For tests of what is done without.
///
/// # Errors
/// When there is no such process, it is another user's, or the number is beyond its hard limit.
pub fn limit_open_files(process: u32, number: u64) -> Result<(), SysError> {
    limit_of(process, number).map_err(|error| SysError::new("limit the files of process", process.to_string(), error))
}

fn limit_of(process: u32, number: u64) -> io::Result<()> {
    let process = libc::pid_t::try_from(process).map_err(io::Error::other)?;
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes the structure, which outlives the call.
    if unsafe { libc::prlimit(process, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = number;
    // SAFETY: the kernel reads the structure, which outlives the call.
    match unsafe { libc::prlimit(process, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets all threads of this process share one heap, before there is a second thread: what one has given back, the others use. A
/// program with two busy threads stays megabytes smaller. Only glibc has such a setting; elsewhere nothing happens.
pub fn share_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) takes two numbers and touches no memory of ours; no other thread is there to race with.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives back the memory of a constant that is not read any more: its whole pages leave this process, and come from the program's file
/// again when somebody reads them. What is not on a page of its own stays.
pub fn release_pages(constant: &'static [u8]) {
    let Ok(Some(page)) = sysconf(SysconfVar::PAGE_SIZE) else { return };
    let page = usize::try_from(page).unwrap_or(usize::MAX);
    let skipped = constant.as_ptr().align_offset(page);
    let whole = constant.len().saturating_sub(skipped) / page * page;
    let Some(pages) = constant.get(skipped..skipped.saturating_add(whole)).filter(|pages| !pages.is_empty()) else {
        return;
    };
    // SAFETY: the pages lie within a constant, which the program's file backs and nobody writes, so that reading them again gives the same
    // bytes. One written after all (a relocation) would be a private page, and bytes have no relocations.
    unsafe { libc::madvise(pages.as_ptr().cast_mut().cast(), pages.len(), libc::MADV_DONTNEED) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_process_starts_in_its_namespace() {
        let netns = Netns::anonymous().unwrap();
        let mut child =
            spawn(Command::new("sleep").arg("60"), Placement { netns: Some(&netns), cgroup: None }).unwrap();
        let inside = fs::read_link(format!("/proc/{}/ns/net", child.id())).unwrap();
        assert_eq!(inside.to_str().unwrap(), format!("net:[{}]", netns.inode().unwrap()));
        terminate(&child).unwrap();
        assert!(!child.wait().unwrap().success());
        terminate(&child).unwrap();
    }

    #[test]
    fn a_released_constant_is_still_there() {
        static CONSTANT: [u8; 100_000] = [7; 100_000];
        release_pages(&CONSTANT);
        release_pages(&CONSTANT[..10]);
        assert!(CONSTANT.iter().all(|byte| *byte == 7));
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = spawn(&mut Command::new("/no/such/program"), Placement::default()).unwrap_err();
        assert!(error.is_not_found());
        assert!(error.to_string().starts_with("cannot start /no/such/program: "), "{error}");
    }
}
