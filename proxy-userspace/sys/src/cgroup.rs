//! cgroup v2: where it is mounted, and subtrees that are made, killed and removed whole.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::SysError;
use crate::mount::mounts_of_type;

/// How long killed processes may take to leave a cgroup before its removal fails.
const EMPTY_DEADLINE: Duration = Duration::from_secs(5);

/// The first cgroup2 mount of this mount namespace: `/sys/fs/cgroup` on a unified host, `/sys/fs/cgroup/unified` on a hybrid one.
///
/// # Errors
/// When there is none, or `/proc/self/mounts` cannot be read.
pub fn cgroup2_mount() -> Result<PathBuf, SysError> {
    let none = || std::io::Error::new(std::io::ErrorKind::NotFound, "no cgroup2 file system is mounted");
    mounts_of_type("cgroup2")?.into_iter().next().ok_or_else(|| SysError::new("find", "cgroup2", none()))
}

/// One cgroup v2 directory. Dropping the value leaves it in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup `relative` below the mount of [`cgroup2_mount`], and its parents; one that exists is taken as it is.
    ///
    /// # Errors
    /// When there is no cgroup2 mount or the directory cannot be made.
    pub fn create(relative: &str) -> Result<Self, SysError> {
        Self::at(cgroup2_mount()?.join(relative))
    }

    /// Makes the cgroup `name` below this one.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn child(&self, name: &str) -> Result<Self, SysError> {
        Self::at(self.path.join(name))
    }

    /// Takes the cgroup at an absolute path, and makes it when it is missing.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn at(path: PathBuf) -> Result<Self, SysError> {
        fs::create_dir_all(&path).map_err(|e| SysError::at("create cgroup", &path, e))?;
        Ok(Self { path })
    }

    /// Absolute path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Process ids directly in this cgroup.
    ///
    /// # Errors
    /// When `cgroup.procs` cannot be read.
    pub fn processes(&self) -> Result<Vec<u32>, SysError> {
        let path = self.path.join("cgroup.procs");
        let text = fs::read_to_string(&path).map_err(|e| SysError::at("read", &path, e))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// `cgroup.procs` open for writing: a process that writes `0` to it moves itself here.
    pub(crate) fn procs_file(&self) -> Result<File, SysError> {
        let path = self.path.join("cgroup.procs");
        OpenOptions::new().write(true).open(&path).map_err(|e| SysError::at("open", &path, e))
    }

    /// Kills every process in the subtree and removes it. No such cgroup, no error.
    ///
    /// # Errors
    /// When processes outlive their SIGKILL for five seconds or a directory cannot be removed.
    pub fn remove(&self) -> Result<(), SysError> {
        if !self.path.exists() {
            return Ok(());
        }
        // `cgroup.kill` (Linux 5.14) reaches every descendant at once: nothing can fork its way out.
        let kill = self.path.join("cgroup.kill");
        fs::write(&kill, "1").map_err(|e| SysError::at("kill the processes of", &kill, e))?;
        remove_tree(&self.path, Instant::now() + EMPTY_DEADLINE)
    }
}

fn remove_tree(path: &Path, deadline: Instant) -> Result<(), SysError> {
    let entries = fs::read_dir(path).map_err(|e| SysError::at("list cgroup", path, e))?;
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path(), deadline)?;
        }
    }
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            // Killed processes leave a cgroup when they have exited, not when they are signalled.
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(SysError::at("remove cgroup", path, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{Placement, spawn};
    use std::process::Command;

    #[test]
    fn a_subtree_is_removed_with_its_processes() {
        let root = Cgroup::create(&format!("tsys-{}", std::process::id())).unwrap();
        let leaf = root.child("a").unwrap().child("b").unwrap();
        let mut child = spawn(Command::new("sleep").arg("60"), Placement { cgroup: Some(&leaf), netns: None }).unwrap();
        assert_eq!(leaf.processes().unwrap(), vec![child.id()]);
        root.remove().unwrap();
        assert!(!root.path().exists());
        assert!(!child.wait().unwrap().success());
        root.remove().unwrap();
    }
}
