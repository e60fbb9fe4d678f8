//! Debian's cloud kernels, unpacked and never installed, each with an initial file system that reaches this machine's files.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use super::cpio;
use super::packages::{Archive, folder};
use crate::run::{answer, command, run};

/// The first program of the guest.
const INIT: &str = include_str!("init.sh");
/// What the initial file system loads, besides their dependencies: the rest is found on the shared root.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_console", "virtiofs", "overlay"];

/// A line of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Series {
    /// Debian 12's.
    Linux6_1,
    /// Debian 13's: the first long-term kernel with TCX.
    Linux6_12,
}

impl Series {
    fn version(self) -> &'static str {
        match self {
            Self::Linux6_1 => "6.1",
            Self::Linux6_12 => "6.12",
        }
    }

    /// The Debian release that has it, for machines of another release.
    fn suite(self) -> &'static str {
        match self {
            Self::Linux6_1 => "bookworm",
            Self::Linux6_12 => "trixie",
        }
    }

    /// Names of its packages: `linux-image-6.1.0-56-cloud-amd64`, `linux-image-6.12.107+deb13-cloud-amd64`.
    fn packages(self) -> String {
        format!(r"^linux-image-{}\.[0-9][^ ]*-cloud-amd64$", self.version().replace('.', r"\."))
    }
}

impl FromStr for Series {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = [Self::Linux6_1, Self::Linux6_12];
        match known.into_iter().find(|series| series.version() == text) {
            Some(series) => Ok(series),
            None => bail!("there is no guest kernel {text}; the guests are 6.1 and 6.12"),
        }
    }
}

/// A kernel that can be booted.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The compressed kernel.
    pub(crate) image: PathBuf,
    /// The initial file system.
    pub(crate) initramfs: PathBuf,
    /// The folder of its modules, named after its release.
    pub(crate) modules: PathBuf,
}

/// The newest kernel of the series: fetched, unpacked and given an initial file system, the first time.
pub(crate) fn prepare(series: Series) -> Result<Kernel> {
    let unpacked = folder().join(format!("linux-{}", series.version()));
    if !unpacked.exists() {
        unpack(series, &unpacked)?;
    }
    let modules = only_entry(&[unpacked.join("lib/modules"), unpacked.join("usr/lib/modules")])?;
    let release = modules.file_name().and_then(|name| name.to_str()).context("a kernel's release is not text")?;
    let image = unpacked.join("boot").join(format!("vmlinuz-{release}"));
    let initramfs = unpacked.join("initramfs.cpio");
    if !modules.join("modules.dep").exists() {
        run(command("depmod").arg("-b").arg(base_of(&modules)).arg(release))?;
    }
    // Written anew each time: it takes no time, and init.sh may have changed.
    write_initramfs(&initramfs, &modules, release)?;
    Ok(Kernel { image, initramfs, modules })
}

fn unpack(series: Series, into: &Path) -> Result<()> {
    println!("xtask: fetching Debian's kernel {} to {}: the guest boots it", series.version(), into.display());
    let own = Archive::own();
    let (archive, package) = match newest(&own.names(&series.packages())) {
        Some(package) => (own, package),
        None => {
            let other = Archive::of_release(series.suite())?;
            let package = newest(&other.names(&series.packages()));
            let none = || {
                format!("neither this machine's apt nor Debian {} has a kernel {}", series.suite(), series.version())
            };
            (other, package.with_context(none)?)
        }
    };
    if archive.unpack(&package, into).is_ok() {
        return Ok(());
    }
    // A list that is older than the mirror names packages that are gone.
    archive.update()?;
    let package = newest(&archive.names(&series.packages())).unwrap_or(package);
    archive.unpack(&package, into)
}

/// The name with the greatest numbers.
fn newest(names: &[String]) -> Option<String> {
    let numbers = |name: &str| -> Vec<u64> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
    };
    names.iter().max_by_key(|name| numbers(name)).cloned()
}

/// A static shell, the modules that reach the shared root, and [`INIT`].
fn write_initramfs(path: &Path, modules: &Path, release: &str) -> Result<()> {
    let failed = || format!("cannot write {}", path.display());
    let shell = fs::read(busybox()?).context("cannot read busybox")?;
    // Side by side guests read it while it is replaced.
    let partial = path.with_extension(format!("{}", std::process::id()));
    let mut archive = cpio::Writer::new(BufWriter::new(File::create(&partial).with_context(failed)?));
    let mut write = || -> io::Result<()> {
        for folder in ["bin", "dev", "modules", "new", "proc", "shared", "writes"] {
            archive.folder(folder)?;
        }
        archive.program("bin/busybox", &shell)?;
        archive.program("init", INIT.as_bytes())
    };
    write().with_context(failed)?;
    for (number, module) in load_order(base_of(modules), release)?.iter().enumerate() {
        archive.program(&format!("modules/{number:02}.ko"), &module_bytes(module)?).with_context(failed)?;
    }
    archive.finish().and_then(|mut file| file.flush()).with_context(failed)?;
    fs::rename(&partial, path).with_context(failed)
}

/// Files of [`MODULES`] and of what they depend on, in the order in which they can be loaded.
fn load_order(base: &Path, release: &str) -> Result<Vec<PathBuf>> {
    let mut order = Vec::new();
    for name in MODULES {
        let mut show = command("modprobe");
        show.arg("-d").arg(base).args(["-S", release, "--show-depends", name]);
        let lines = answer(&mut show).with_context(|| format!("the kernel {release} has no module {name}"))?;
        let files =
            lines.lines().filter_map(|line| line.strip_prefix("insmod ")).map(|rest| PathBuf::from(rest.trim()));
        files.for_each(|file| {
            if !order.contains(&file) {
                order.push(file);
            }
        });
    }
    Ok(order)
}

fn module_bytes(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    }
    let output = command("xz").arg("-dc").arg(path).output().context("cannot start xz")?;
    if output.status.success() { Ok(output.stdout) } else { bail!("xz could not decompress {}", path.display()) }
}

/// Statically linked, so that it runs before there is any library. Unpacked, as it conflicts with other builds of busybox.
fn busybox() -> Result<PathBuf> {
    let into = folder().join("busybox");
    if !into.exists() {
        println!("xtask: fetching busybox-static to {}: the guest's first program", into.display());
        let archive = Archive::own();
        if archive.unpack("busybox-static", &into).is_err() {
            archive.update()?;
            archive.unpack("busybox-static", &into)?;
        }
    }
    let places = ["bin/busybox", "usr/bin/busybox"].map(|path| into.join(path));
    places.into_iter().find(|path| path.is_file()).context("the package busybox-static has no busybox")
}

/// The folder whose `lib/modules` these are.
fn base_of(modules: &Path) -> &Path {
    modules.ancestors().nth(3).unwrap_or(modules)
}

fn only_entry(folders: &[PathBuf]) -> Result<PathBuf> {
    let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
    entries.flatten().map(|entry| entry.path()).next().context("the kernel's package has no modules")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_has_the_greatest_numbers() {
        let names = ["6.1.0-9", "6.1.0-56", "6.1.0-47"].map(|v| format!("linux-image-{v}-cloud-amd64"));
        assert_eq!(newest(&names).unwrap(), "linux-image-6.1.0-56-cloud-amd64");
        assert_eq!(newest(&[]), None);
    }
}
