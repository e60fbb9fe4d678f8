//! One guest: started, given a job, watched until it ends or its time is over, and removed.

use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::job::Job;
use super::kernel::Kernel;
use super::packages::virtiofsd;
use crate::run::command;

/// Processors: two find races that one does not, and more only make an emulated guest slower.
const PROCESSORS: &str = "2";
/// How long the file sharing may take to be ready.
const SHARING_LIMIT: Duration = Duration::from_secs(10);
/// Lines of the guest's console that an error quotes.
const QUOTED_LINES: usize = 12;
/// What `timeout` ends with when the time was over, or when it had to kill.
const TIME_OVER: [i32; 2] = [124, 137];

/// How a guest is made.
#[derive(Debug)]
pub(crate) struct Guest<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) memory_mb: u32,
    pub(crate) limit: Duration,
}

impl Guest<'_> {
    /// Boots, runs the job as root, and returns its exit status. `output` gets each line of the job's output, with its end; its
    /// errors go to this process's.
    pub(crate) fn run(&self, job: &Job, mut output: impl FnMut(&str)) -> Result<u8> {
        let folder = Folder::create()?;
        let script = folder.path("command");
        fs::write(&script, job.script()).with_context(|| format!("cannot write {}", script.display()))?;
        let _sharing = Sharing::start(&folder)?;
        let mut emulator = self.emulator(&folder);
        emulator.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = emulator.spawn().context("cannot start qemu-system-x86_64")?;
        let errors = child.stderr.take();
        let errors = thread::spawn(move || errors.map(|mut from| std::io::copy(&mut from, &mut std::io::stderr())));
        let lines = copy_lines(child.stdout.take(), &mut output);
        let status = child.wait().context("cannot wait for the guest")?;
        // A failure to copy errors is a closed terminal: there is nobody to tell.
        let _ = errors.join();
        lines.context("cannot read the guest's output")?;
        if status.code().is_some_and(|code| TIME_OVER.contains(&code)) {
            bail!("the guest did not end within {} s: give it longer with --timeout", self.limit.as_secs());
        }
        job_status(&folder)
    }

    fn emulator(&self, folder: &Folder) -> Command {
        let memory = self.memory_mb;
        let mut qemu = command("timeout");
        qemu.args(["--foreground", "--kill-after=5", &self.limit.as_secs().to_string(), "qemu-system-x86_64"]);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none"]);
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", PROCESSORS, "-m", &format!("{memory}M")]);
        // virtiofsd reads and writes the guest's memory.
        qemu.args(["-object", &format!("memory-backend-memfd,id=memory,size={memory}M,share=on")]);
        qemu.args(["-numa", "node,memdev=memory", "-device", "vhost-user-fs-pci,chardev=sharing,tag=root"]);
        qemu.args(["-chardev", &format!("socket,id=sharing,path={}", folder.text("sharing"))]);
        qemu.args(["-serial", &format!("file:{}", folder.text("console")), "-device", "virtio-serial-pci"]);
        // Files, not stdio: that counts as unplugged, and the guest waits, once there is nothing more to read.
        let status = folder.text("status");
        for (name, path) in [("stdout", "/dev/stdout"), ("stderr", "/dev/stderr"), ("status", &status)] {
            qemu.args(["-chardev", &format!("file,id={name},path={path}")]);
            qemu.args(["-device", &format!("virtserialport,chardev={name},name={name}")]);
        }
        qemu.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(&self.kernel.initramfs);
        qemu.args(["-append", &self.kernel_arguments(folder)]);
        qemu
    }

    /// A panic ends the guest at once instead of waiting for a reset.
    fn kernel_arguments(&self, folder: &Folder) -> String {
        let modules = self.kernel.modules.display();
        let job = folder.0.display();
        format!("console=ttyS0 loglevel=4 panic=-1 random.trust_cpu=on trama.modules={modules} trama.job={job}")
    }
}

fn copy_lines(from: Option<impl Read>, output: &mut impl FnMut(&str)) -> std::io::Result<()> {
    let Some(from) = from else { return Ok(()) };
    let mut reader = BufReader::new(from);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        output(&String::from_utf8_lossy(&line));
        line.clear();
    }
    Ok(())
}

/// The status that the guest has reported; without one, what its console said last.
fn job_status(folder: &Folder) -> Result<u8> {
    let reported = fs::read_to_string(folder.path("status")).unwrap_or_default();
    if let Ok(status) = reported.trim().parse() {
        return Ok(status);
    }
    let console = fs::read(folder.path("console")).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    let lines: Vec<&str> = console.lines().collect();
    let start = lines.len().saturating_sub(QUOTED_LINES);
    bail!(
        "the guest ended before the command did; its console said:\n{}",
        lines.get(start..).unwrap_or_default().join("\n")
    )
}

/// Files of one run, removed with the value. In the folder for temporary files, as names of sockets are short.
struct Folder(PathBuf);

impl Folder {
    fn create() -> Result<Self> {
        let path = env::temp_dir().join(format!("trama-vm-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left in the folder for temporary files goes with the next start of the machine.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// virtiofsd with this machine's root; it ends with the guest, or with the value.
struct Sharing(Child);

impl Sharing {
    fn start(folder: &Folder) -> Result<Self> {
        let (socket, log) = (folder.path("sharing"), folder.path("sharing.log"));
        let errors = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut daemon = command(virtiofsd()?);
        // These options are understood by the one in C (Debian 12) and the one in Rust. Without pivot_root, as that is refused when
        // the root is the kernel's initial file system.
        daemon.arg(format!("--socket-path={}", socket.display()));
        daemon.args(["-o", "source=/", "-o", "sandbox=chroot", "-o", "cache=always"]);
        daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let mut sharing = Self(daemon.spawn().context("cannot start virtiofsd")?);
        sharing.wait_for(&socket, &log)?;
        Ok(sharing)
    }

    fn wait_for(&mut self, socket: &Path, log: &Path) -> Result<()> {
        let deadline = Instant::now() + SHARING_LIMIT;
        while !socket.exists() {
            let ended = self.0.try_wait().context("cannot examine virtiofsd")?;
            let said = || fs::read_to_string(log).unwrap_or_default();
            if let Some(status) = ended {
                bail!("virtiofsd ended with {status}; it said:\n{}", said());
            }
            ensure!(
                Instant::now() < deadline,
                "virtiofsd was not ready within {} s; it said:\n{}",
                SHARING_LIMIT.as_secs(),
                said()
            );
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Sharing {
    fn drop(&mut self) {
        // It has ended by itself unless the guest never came.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
