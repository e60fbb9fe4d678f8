//! Who owns which lab: names, the lock that says its owner lives, and the removal of everything that carries the name.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once, PoisonError, RwLock, RwLockReadGuard};

use anyhow::{Context, Result, bail, ensure};
use node_sys::{Cgroup, Netns, Placement};
use tokio::signal::unix::{SignalKind, signal};

/// One folder per lab, with the lock of its owner and the mounts of its nodes.
const STATE_DIR: &str = "/run/trama-lab";
const PREFIX: &str = "trama-lab-";

/// Ids of this process's labs, for the removal on Ctrl-C.
static LIVE: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// Held for reading while something is made; Ctrl-C takes it for writing, so that nothing is made behind the removal's back.
static GATE: RwLock<()> = RwLock::new(());

/// Whether a signal has come: what fails from now on fails because it is being taken away.
static ENDING: AtomicBool = AtomicBool::new(false);

/// The right to everything named `trama-lab-ID`: held by one process, and given up with the removal of all of it.
#[derive(Debug)]
pub struct Claim {
    id: String,
    /// Locked for as long as the owner lives: the kernel drops the lock of a killed process.
    _lock: File,
}

impl Claim {
    /// Takes the lab `id` (lower-case letters and digits). What a killed process left under any id is removed first.
    ///
    /// # Errors
    /// When the id is in use by a living process, or its folder cannot be made.
    pub fn take(id: &str) -> Result<Self> {
        let valid = !id.is_empty() && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        ensure!(valid, "a lab's id consists of lower-case letters and digits, not {id:?}");
        remove_on_signals();
        let _gate = gate();
        let all = lock_all()?;
        sweep_locked(&all)?;
        let folder = Path::new(STATE_DIR).join(id);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let mut lock = open_lock(&folder)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!("a lab with the id {id} is running: end it first"),
            Err(TryLockError::Error(error)) => return Err(error).context("cannot lock the lab's folder"),
        }
        write!(lock, "{}", std::process::id()).context("cannot write the lab's owner")?;
        live().push(id.to_owned());
        Ok(Self { id: id.to_owned(), _lock: lock })
    }

    /// The lab's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The lab's own folder, for mounts and files.
    pub fn folder(&self) -> PathBuf {
        Path::new(STATE_DIR).join(&self.id)
    }

    /// Makes the namespace `trama-lab-ID-NAME`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn netns(&self, name: &str) -> Result<Netns> {
        let _gate = gate();
        Ok(Netns::create(&self.netns_name(name))?)
    }

    /// The full name of a namespace of this lab, as `ip netns` shows it.
    pub fn netns_name(&self, name: &str) -> String {
        format!("{PREFIX}{}-{name}", self.id)
    }

    /// Makes the cgroup `trama-lab-ID/NAME`.
    ///
    /// # Errors
    /// When there is no cgroup2 mount or the kernel refuses.
    pub fn cgroup(&self, name: &str) -> Result<Cgroup> {
        let _gate = gate();
        Ok(Cgroup::create(&format!("{PREFIX}{}/{name}", self.id))?)
    }

    /// Mounts a BPF file system in the lab's folder.
    ///
    /// # Errors
    /// When the mount is refused.
    pub fn bpffs(&self, name: &str) -> Result<PathBuf> {
        let _gate = gate();
        let path = self.folder().join(name).join("bpf");
        node_sys::mount_bpffs(&path)?;
        Ok(path)
    }

    /// Starts a process that ends with the lab. `placement` without a cgroup puts it into `trama-lab-ID/other`.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(&self, command: &mut Command, placement: Placement<'_>) -> Result<Child> {
        let other = self.cgroup("other")?;
        let _gate = gate();
        let cgroup = Some(placement.cgroup.unwrap_or(&other));
        Ok(node_sys::spawn(command, Placement { cgroup, ..placement })?)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The folder goes last, so a failure here is found and repeated by the next lab.
        if let Err(error) = give_up(&self.id) {
            eprintln!("trama-lab: could not remove all of lab {}: {error:#}", self.id);
        }
        live().retain(|id| *id != self.id);
    }
}

/// Whether this process is being ended by a signal.
pub(crate) fn is_ending() -> bool {
    ENDING.load(Ordering::Relaxed)
}

/// Removes what killed processes left; returns the ids of their labs.
///
/// # Errors
/// When something cannot be removed.
pub fn sweep() -> Result<Vec<String>> {
    sweep_locked(&lock_all()?)
}

fn sweep_locked(all: &AllLabs) -> Result<Vec<String>> {
    let mut swept = Vec::new();
    for entry in fs::read_dir(STATE_DIR).with_context(|| format!("cannot read {STATE_DIR}"))?.flatten() {
        let Ok(id) = entry.file_name().into_string() else { continue };
        if !entry.path().is_dir() || open_lock(&entry.path())?.try_lock().is_err() {
            continue;
        }
        let removed = empty_lab(&id).and_then(|()| remove_folder(&id, all));
        removed.with_context(|| format!("cannot remove the lab {id} that a killed process left"))?;
        swept.push(id);
    }
    Ok(swept)
}

/// Removes everything of a lab of this process.
fn give_up(id: &str) -> Result<()> {
    empty_lab(id)?;
    let all = lock_all()?;
    remove_folder(id, &all)?;
    // Not empty: another lab's.
    let _ = fs::remove_dir(STATE_DIR);
    Ok(())
}

/// Removes everything of a lab but its folder, in the order that lets each step succeed; goes on after a failure and returns the first.
fn empty_lab(id: &str) -> Result<()> {
    let mut results = vec![remove_processes(id)];
    results.extend(remove_namespaces(id));
    results.push(unmount_below(&Path::new(STATE_DIR).join(id)));
    results.into_iter().collect()
}

/// The last step, for a lab that is empty: a folder that still has a mount in it would be emptied through the mount. Whoever sweeps
/// meanwhile would take the folder, whose lock goes with it, for a dead process's, or miss what it has just seen.
fn remove_folder(id: &str, _all: &AllLabs) -> Result<()> {
    let folder = Path::new(STATE_DIR).join(id);
    if !folder.exists() {
        return Ok(());
    }
    fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))
}

fn remove_processes(id: &str) -> Result<()> {
    let path = node_sys::cgroup2_mount()?.join(format!("{PREFIX}{id}"));
    if path.exists() { Ok(Cgroup::at(path)?.remove()?) } else { Ok(()) }
}

fn remove_namespaces(id: &str) -> Vec<Result<()>> {
    match Netns::list(&format!("{PREFIX}{id}-")) {
        Ok(names) => names.iter().map(|name| Ok(Netns::remove(name)?)).collect(),
        Err(error) => vec![Err(error.into())],
    }
}

fn unmount_below(folder: &Path) -> Result<()> {
    for mounted in node_sys::mounts_of_type("bpf")? {
        if mounted.starts_with(folder) {
            node_sys::unmount(&mounted)?;
        }
    }
    Ok(())
}

fn open_lock(folder: &Path) -> Result<File> {
    let path = folder.join("owner");
    let options = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    options.with_context(|| format!("cannot open {}", path.display()))
}

/// The lock of all labs: whoever has it may make and remove their folders.
struct AllLabs(File);

/// One at a time takes, sweeps or gives up labs: a folder exists for a moment before its lock is held, and for a moment after the
/// lock's file is gone. The lock is on [`STATE_DIR`] itself, so that nothing of ours is left when the last lab goes.
fn lock_all() -> Result<AllLabs> {
    loop {
        fs::create_dir_all(STATE_DIR).with_context(|| format!("cannot create {STATE_DIR}: labs need root"))?;
        let Ok(folder) = File::open(STATE_DIR) else { continue };
        folder.lock().with_context(|| format!("cannot lock {STATE_DIR}"))?;
        let all = AllLabs(folder);
        // The last holder may have removed the folder while this one waited for it.
        let current = fs::metadata(STATE_DIR).map(|meta| meta.ino()).ok();
        if current == all.0.metadata().map(|meta| meta.ino()).ok() {
            return Ok(all);
        }
    }
}

fn gate() -> RwLockReadGuard<'static, ()> {
    GATE.read().unwrap_or_else(PoisonError::into_inner)
}

fn live() -> std::sync::MutexGuard<'static, Vec<String>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Once per process: SIGINT, SIGTERM and SIGHUP remove every lab of this process and end it.
fn remove_on_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::thread::spawn(|| {
            if let Some(code) = wait_for_signal() {
                let _closed = GATE.write().unwrap_or_else(PoisonError::into_inner);
                std::process::exit(if remove_live() { code } else { 1 });
            }
        });
    });
}

/// Removes every lab of this process; whether nothing is left.
fn remove_live() -> bool {
    ENDING.store(true, Ordering::Relaxed);
    let ids = live().clone();
    eprintln!("\ntrama-lab: removing {}", ids.join(", "));
    let errors: Vec<anyhow::Error> = ids.iter().filter_map(|id| give_up(id).err()).collect();
    errors.iter().for_each(|error| eprintln!("trama-lab: {error:#}"));
    errors.is_empty()
}

/// Waits for the first signal; its exit status is 128 plus its number, as shells expect.
fn wait_for_signal() -> Option<i32> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().ok()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).ok()?;
        let mut terminate = signal(SignalKind::terminate()).ok()?;
        let mut hangup = signal(SignalKind::hangup()).ok()?;
        tokio::select! {
            _ = interrupt.recv() => Some(130),
            _ = terminate.recv() => Some(143),
            _ = hangup.recv() => Some(129),
        }
    })
}
