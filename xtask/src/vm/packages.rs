//! What the guest is made of, through apt: programs that are installed where they are missing, and packages that are only unpacked.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::run::{answer, command, run, target_dir};

/// Programs with the packages that bring them, in Debian's order of releases.
const PROGRAMS: [(&[&str], &[&str], &str); 5] = [
    (&["/usr/bin/qemu-system-x86_64"], &["qemu-system-x86"], "it emulates the guest"),
    (&VIRTIOFSD, &["virtiofsd", "qemu-system-common"], "it shares this machine's files with the guest"),
    (&["/usr/sbin/depmod", "/sbin/depmod"], &["kmod"], "it finds and loads the guest's kernel modules"),
    (&["/usr/bin/xz"], &["xz-utils"], "newer kernels' modules are compressed"),
    (&["/usr/sbin/ipset", "/sbin/ipset"], &["ipset"], "kube-proxy's ipvs mode calls it"),
];
/// Debian 13 and later have it in a package of its own, Debian 12 beside qemu.
const VIRTIOFSD: [&str; 2] = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"];

/// Everything that guests need lies here, so that `cargo clean` removes it.
pub(crate) fn folder() -> PathBuf {
    target_dir().join("vm")
}

/// Adds the programs that this machine lacks.
pub(crate) fn install() -> Result<()> {
    PROGRAMS.iter().try_for_each(|(paths, packages, why)| match present(paths) {
        Some(_) => Ok(()),
        None => install_one(paths, packages, why),
    })
}

/// The program that shares files, wherever its package puts it.
pub(crate) fn virtiofsd() -> Result<&'static str> {
    present(&VIRTIOFSD).context("virtiofsd is missing: install the package virtiofsd or qemu-system-common")
}

/// The first of these files that exists.
fn present(paths: &[&'static str]) -> Option<&'static str> {
    paths.iter().copied().find(|path| Path::new(path).exists())
}

fn install_one(paths: &[&'static str], packages: &[&str], why: &str) -> Result<()> {
    let wanted = packages.join(" or ");
    let failed = || format!("{wanted} is missing and could not be installed with apt-get: install it and try again");
    println!("xtask: adding {wanted} with apt-get: {why}");
    // Where the package lists are already there and fresh enough, the first attempt succeeds without fetching them again.
    if !packages.iter().any(|package| apt_install(package)) {
        run(command("apt-get").args(["-q", "update"])).with_context(failed)?;
        ensure!(packages.iter().any(|package| apt_install(package)), failed());
    }
    ensure!(present(paths).is_some(), "{wanted} was installed, but brought none of {}", paths.join(", "));
    Ok(())
}

fn apt_install(package: &str) -> bool {
    let install = ["-q", "-y", "install", "--no-install-recommends", package];
    run(command("apt-get").args(install).env("DEBIAN_FRONTEND", "noninteractive")).is_ok()
}

/// A view of Debian's packages: this machine's own, or that of another release on the mirror that this machine uses.
#[derive(Debug)]
pub(crate) struct Archive {
    options: Vec<String>,
}

impl Archive {
    /// The packages that this machine's apt knows.
    pub(crate) fn own() -> Self {
        Self { options: vec!["-oAPT::Sandbox::User=root".to_owned()] }
    }

    /// The packages of the Debian release `suite`, by lists of our own: this machine's are not touched.
    pub(crate) fn of_release(suite: &str) -> Result<Self> {
        let folder = folder().join("apt").join(suite);
        let create = |path: &str| fs::create_dir_all(folder.join(path));
        create("lists/partial").and_then(|()| create("cache/archives/partial")).context("cannot make apt's folders")?;
        let sources = folder.join("sources.list");
        fs::write(&sources, sources_of(suite)?).with_context(|| format!("cannot write {}", sources.display()))?;
        let path = |name: &str| folder.join(name).display().to_string();
        let mut archive = Self::own();
        archive.options.extend([
            format!("-oDir::Etc::SourceList={}", path("sources.list")),
            "-oDir::Etc::SourceParts=/dev/null".to_owned(),
            format!("-oDir::State::Lists={}", path("lists")),
            format!("-oDir::Cache={}", path("cache")),
            "-oAcquire::Languages=none".to_owned(),
        ]);
        archive.update()?;
        Ok(archive)
    }

    /// Fetches the lists of packages.
    pub(crate) fn update(&self) -> Result<()> {
        run(command("apt-get").args(&self.options).args(["-q", "update"]))
    }

    /// Names of the packages that match the expression.
    pub(crate) fn names(&self, expression: &str) -> Vec<String> {
        let mut search = command("apt-cache");
        search.args(&self.options).args(["search", "--names-only", expression]);
        let found = answer(&mut search).unwrap_or_default();
        found.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
    }

    /// Fetches `package` and unpacks it below `into`, which is there afterwards only if all of it worked.
    pub(crate) fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        let partial = into.with_extension("partial");
        remove(&partial)?;
        fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
        let mut download = command("apt-get");
        download.args(&self.options).args(["-q", "download", package]).current_dir(&partial);
        run(&mut download).with_context(|| format!("the package {package} could not be fetched"))?;
        let archive = only_file(&partial)?;
        run(command("dpkg-deb").arg("-x").arg(&archive).arg(&partial))?;
        fs::remove_file(&archive).with_context(|| format!("cannot remove {}", archive.display()))?;
        remove(into)?;
        fs::rename(&partial, into).with_context(|| format!("cannot create {}", into.display()))
    }
}

/// One line of sources.list(5) for another release, on the mirror and with the keys of this machine's Debian sources.
fn sources_of(suite: &str) -> Result<String> {
    let mut targets = command("apt-get");
    targets.args(["indextargets", "Created-By: Packages", "Origin: Debian", "Component: main"]);
    targets.args(["--format", "$(REPO_URI) $(RELEASE)"]);
    let mirror = mirror_of(&answer(&mut targets).unwrap_or_default()).map(str::to_owned);
    let mirror = mirror.context("apt on this machine knows no mirror of Debian: add one and try again")?;
    Ok(format!("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} {suite} main\n"))
}

/// The mirror of a whole release: updates and security fixes come from others.
fn mirror_of(targets: &str) -> Option<&str> {
    let lines = targets.lines().filter_map(|line| line.split_once(' '));
    lines.filter(|(_, release)| !release.contains('-')).map(|(mirror, _)| mirror).next()
}

fn only_file(folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files = entries.flatten().map(|entry| entry.path());
    files.next().with_context(|| format!("nothing was fetched to {}", folder.display()))
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_that_of_the_release() {
        let targets = "http://a/debian-security/ bookworm-security\nhttp://b/debian/ bookworm\n";
        assert_eq!(mirror_of(targets), Some("http://b/debian/"));
        assert_eq!(mirror_of(""), None);
    }
}
