//! Network namespaces: made, named, opened, entered and removed; the only place that calls `setns` on a running thread.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;

use crate::SysError;

/// Where named namespaces are bound, the same folder as iproute2 uses: `ip netns exec NAME` works on them.
pub const NETNS_DIR: &str = "/run/netns";

/// The cookie by which BPF programs know the network namespace of the calling thread (`bpf_get_netns_cookie`). Needs Linux 5.14.
///
/// # Errors
/// When no socket can be made, or the kernel is older.
pub fn netns_cookie() -> Result<u64, SysError> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))
        .map_err(|e| SysError::new("ask for the cookie", "network namespace", e))?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).unwrap_or(0);
    // SAFETY: the kernel writes at most `length` bytes to the number, which outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        return Ok(cookie);
    }
    Err(SysError::new("ask for the cookie", "network namespace", std::io::Error::last_os_error()))
}

/// A network namespace held by an open file: it lives at least as long as this value.
#[derive(Debug)]
pub struct Netns {
    file: File,
    label: String,
}

impl Netns {
    /// Makes a namespace that stays, under [`NETNS_DIR`], until [`Netns::remove`]. Only `lo` is in it, and it is down.
    ///
    /// # Errors
    /// When the name is taken (`AlreadyExists`) or the caller lacks `CAP_SYS_ADMIN`.
    pub fn create(name: &str) -> Result<Self, SysError> {
        let path = Self::path_of(name);
        fs::create_dir_all(NETNS_DIR).map_err(|e| SysError::new("create folder", NETNS_DIR, e))?;
        File::create_new(&path).map_err(|e| SysError::at("create network namespace", &path, e))?;
        let bound = on_fresh_thread(|| {
            unshare_network(name)?;
            bind_own_namespace(&path)
        });
        if let Err(error) = bound {
            // The empty file would look like a namespace to `ip netns`; the first error is the one worth reporting.
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        Self::open(name)
    }

    /// Makes a namespace without a name: it is gone with the last process and the last open file in it.
    ///
    /// # Errors
    /// When the caller lacks `CAP_SYS_ADMIN`.
    pub fn anonymous() -> Result<Self, SysError> {
        on_fresh_thread(|| {
            unshare_network("anonymous")?;
            Self::open_path(Path::new("/proc/thread-self/ns/net"))
        })
    }

    /// Opens the namespace that [`Netns::create`] or `ip netns add` named.
    ///
    /// # Errors
    /// `NotFound` when there is none of that name.
    pub fn open(name: &str) -> Result<Self, SysError> {
        let mut netns = Self::open_path(&Self::path_of(name))?;
        name.clone_into(&mut netns.label);
        Ok(netns)
    }

    /// Opens the namespace bound at `path`, for instance `/proc/PID/ns/net` or the `CNI_NETNS` of a container runtime.
    ///
    /// # Errors
    /// When `path` cannot be opened.
    pub fn open_path(path: &Path) -> Result<Self, SysError> {
        let file = File::open(path).map_err(|e| SysError::at("open network namespace", path, e))?;
        Ok(Self { file, label: path.display().to_string() })
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn current() -> Result<Self, SysError> {
        Self::open_path(Path::new("/proc/thread-self/ns/net"))
    }

    /// Where a namespace of this name is bound.
    pub fn path_of(name: &str) -> PathBuf {
        Path::new(NETNS_DIR).join(name)
    }

    /// The name, or the path, it was opened by.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The namespace's inode: equal exactly for the same namespace while one of its files is open.
    ///
    /// # Errors
    /// When the file cannot be examined.
    pub fn inode(&self) -> Result<u64, SysError> {
        let meta = self.file.metadata().map_err(|e| SysError::new("examine network namespace", &self.label, e))?;
        Ok(meta.ino())
    }

    /// A second handle to the same namespace.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn try_clone(&self) -> Result<Self, SysError> {
        let file = self.file.try_clone().map_err(|e| SysError::new("duplicate network namespace", &self.label, e))?;
        Ok(Self { file, label: self.label.clone() })
    }

    /// Runs `work` inside the namespace on a thread of its own and waits for it; sockets made there stay in the namespace.
    /// A panic of `work` goes on in the caller.
    ///
    /// # Errors
    /// When the namespace cannot be entered; `work` has not run then.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, SysError> {
        on_fresh_thread(|| {
            set_network(self.as_fd(), &self.label)?;
            Ok(work())
        })
    }

    /// Moves the calling thread into the namespace until the guard is dropped.
    ///
    /// # Errors
    /// When the namespace cannot be entered; the thread has not moved then.
    pub fn enter(&self) -> Result<NetnsGuard, SysError> {
        let home = Self::current()?;
        set_network(self.as_fd(), &self.label)?;
        Ok(NetnsGuard { home, not_send: PhantomData })
    }

    /// Moves the calling thread into the namespace for good: for threads that serve only this namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn enter_forever(&self) -> Result<(), SysError> {
        set_network(self.as_fd(), &self.label)
    }

    /// Removes a name given by [`Netns::create`]; links in the namespace go with its last process and open file. No name, no error.
    ///
    /// # Errors
    /// When it cannot be unbound or its file cannot be removed.
    pub fn remove(name: &str) -> Result<(), SysError> {
        let path = Self::path_of(name);
        match nix::mount::umount2(&path, MntFlags::MNT_DETACH) {
            // EINVAL: the file is there, but nothing is bound to it: what a killed `create` leaves.
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(error) => return Err(SysError::at("unbind network namespace", &path, error)),
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(SysError::at("remove network namespace", &path, error))
            }
            _ => Ok(()),
        }
    }

    /// Visits every network namespace that a process of `/proc` is in or that has a name in [`NETNS_DIR`], the caller's included,
    /// each once; at most `limit`. One is open at a time. Processes that end meanwhile or may not be looked at
    /// (`CAP_SYS_PTRACE`) are left out, and so are those that this PID namespace does not show.
    ///
    /// # Errors
    /// When `/proc` cannot be listed.
    pub fn for_each(limit: usize, mut visit: impl FnMut(&Self)) -> Result<(), SysError> {
        let processes = fs::read_dir("/proc").map_err(|e| SysError::new("list", "/proc", e))?.flatten();
        let is_process = |name: &OsStr| name.as_encoded_bytes().first().is_some_and(u8::is_ascii_digit);
        let processes = processes.filter(|entry| is_process(&entry.file_name()));
        let named = fs::read_dir(NETNS_DIR).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut seen = BTreeSet::new();
        for path in processes.map(|entry| entry.path().join("ns/net")).chain(named) {
            if seen.len() >= limit {
                break;
            }
            let Ok(meta) = fs::metadata(&path) else { continue };
            if seen.insert((meta.dev(), meta.ino())) {
                // A name that nothing is bound to any more opens as a file; the visitor cannot enter it.
                Self::open_path(&path).iter().for_each(&mut visit);
            }
        }
        Ok(())
    }

    /// Names of the namespaces whose name starts with `prefix`, sorted.
    ///
    /// # Errors
    /// When [`NETNS_DIR`] is there and cannot be read.
    pub fn list(prefix: &str) -> Result<Vec<String>, SysError> {
        let entries = match fs::read_dir(NETNS_DIR) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(SysError::new("list", NETNS_DIR, error)),
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        Ok(names)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Takes the thread back to where it came from when dropped. Not `Send`: a namespace belongs to a thread.
#[derive(Debug)]
pub struct NetnsGuard {
    home: Netns,
    not_send: PhantomData<*const ()>,
}

impl Drop for NetnsGuard {
    fn drop(&mut self) {
        if set_network(self.home.as_fd(), &self.home.label).is_err() {
            // Going on would run the caller's next requests against the wrong namespace, possibly the machine's own.
            std::process::abort();
        }
    }
}

fn set_network(netns: BorrowedFd<'_>, label: &str) -> Result<(), SysError> {
    nix::sched::setns(netns, CloneFlags::CLONE_NEWNET).map_err(|e| SysError::new("enter network namespace", label, e))
}

fn unshare_network(name: &str) -> Result<(), SysError> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNET).map_err(|e| SysError::new("create network namespace", name, e))
}

fn bind_own_namespace(path: &Path) -> Result<(), SysError> {
    let none = None::<&str>;
    nix::mount::mount(Some("/proc/thread-self/ns/net"), path, none, MsFlags::MS_BIND, none)
        .map_err(|e| SysError::at("bind network namespace", path, e))
}

fn on_fresh_thread<T: Send>(work: impl FnOnce() -> Result<T, SysError> + Send) -> Result<T, SysError> {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(payload) => std::panic::resume_unwind(payload),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn name(suffix: &str) -> String {
        format!("tsys{}-{suffix}", std::process::id())
    }

    #[test]
    fn a_named_namespace_is_its_own_and_goes_away() {
        let name = name("named");
        let netns = Netns::create(&name).unwrap();
        let here = Netns::current().unwrap().inode().unwrap();
        let inside = netns.run(|| Netns::current().unwrap().inode().unwrap()).unwrap();
        assert_eq!(inside, netns.inode().unwrap());
        assert_ne!(inside, here);
        assert_eq!(Netns::list(&name).unwrap(), vec![name.clone()]);
        assert_eq!(Netns::create(&name).unwrap_err().source.kind(), std::io::ErrorKind::AlreadyExists);
        Netns::remove(&name).unwrap();
        Netns::remove(&name).unwrap();
        assert!(Netns::open(&name).unwrap_err().is_not_found());
    }

    #[test]
    fn a_guard_brings_the_thread_back() {
        let netns = Netns::anonymous().unwrap();
        let here = Netns::current().unwrap().inode().unwrap();
        let guard = netns.enter().unwrap();
        assert_eq!(Netns::current().unwrap().inode().unwrap(), netns.inode().unwrap());
        // `lo` is down in a fresh namespace: 127.0.0.1 is not local there.
        assert!(
            TcpListener::bind("127.0.0.1:0")
                .is_ok_and(|l| std::net::TcpStream::connect(l.local_addr().unwrap()).is_err())
        );
        drop(guard);
        assert_eq!(Netns::current().unwrap().inode().unwrap(), here);
    }

    #[test]
    fn all_namespaces_are_found_once() {
        let named = Netns::create(&format!("tsys-all-{}", std::process::id())).unwrap();
        let mut all = Vec::new();
        Netns::for_each(usize::MAX, |netns| all.push(netns.inode().unwrap())).unwrap();
        for wanted in [&named, &Netns::current().unwrap()] {
            let inode = wanted.inode().unwrap();
            assert_eq!(all.iter().filter(|found| **found == inode).count(), 1);
        }
        let mut count = 0;
        Netns::for_each(1, |_| count += 1).unwrap();
        assert_eq!(count, 1);
        Netns::remove(named.label()).unwrap();
    }
}
