//! Mounts: which file systems are mounted where, and BPF file systems of our own.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};

use crate::SysError;

/// Where file systems of type `kind` are mounted in this mount namespace, in mount order.
///
/// # Errors
/// When `/proc/self/mounts` cannot be read.
pub fn mounts_of_type(kind: &str) -> Result<Vec<PathBuf>, SysError> {
    let table = "/proc/self/mounts";
    let text = fs::read_to_string(table).map_err(|e| SysError::new("read", table, e))?;
    Ok(parse_mounts(&text, kind))
}

/// Mounts a new BPF file system at `path`, and makes the folder when it is missing. One that is mounted there already is kept.
///
/// # Errors
/// When the folder cannot be made, or the mount is refused.
pub fn mount_bpffs(path: &Path) -> Result<(), SysError> {
    fs::create_dir_all(path).map_err(|e| SysError::at("create folder", path, e))?;
    if mounts_of_type("bpf")?.iter().any(|mounted| mounted == path) {
        return Ok(());
    }
    nix::mount::mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .map_err(|e| SysError::at("mount a BPF file system at", path, e))
}

/// Takes the mount at `path` away, also while it is in use; what was pinned there is unpinned. Nothing mounted, no error.
///
/// # Errors
/// When the unmount is refused.
pub fn unmount(path: &Path) -> Result<(), SysError> {
    match nix::mount::umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(()),
        Err(error) => Err(SysError::at("unmount", path, error)),
    }
}

/// fstab(5): six fields split by white space; a space in a path is written as `\040`.
fn parse_mounts(text: &str, kind: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let (path, mounted_kind) = (fields.next()?, fields.next()?);
            (mounted_kind == kind).then(|| PathBuf::from(path.replace("\\040", " ")))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_type() {
        let table = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                     cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nbpf /mnt/a\\040b bpf rw 0 0\n";
        assert_eq!(parse_mounts(table, "cgroup2"), [PathBuf::from("/sys/fs/cgroup/unified")]);
        assert_eq!(parse_mounts(table, "bpf"), [PathBuf::from("/mnt/a b")]);
        assert!(parse_mounts(table, "xfs").is_empty());
    }

    #[test]
    fn a_bpf_file_system_comes_and_goes() {
        let dir = std::env::temp_dir().join(format!("tsys-bpffs-{}", std::process::id()));
        mount_bpffs(&dir).unwrap();
        mount_bpffs(&dir).unwrap();
        assert_eq!(mounts_of_type("bpf").unwrap().iter().filter(|path| **path == dir).count(), 1);
        unmount(&dir).unwrap();
        unmount(&dir).unwrap();
        assert!(!mounts_of_type("bpf").unwrap().contains(&dir));
        fs::remove_dir(&dir).unwrap();
    }
}
