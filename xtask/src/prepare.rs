//! What a fresh machine lacks, and how it is added: toolchain components, tools below `target/tools`, Debian packages.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::run::{answer, cargo, command, run, tools_dir};

/// A Cargo tool with the version that this workspace was tested with.
struct Tool {
    name: &'static str,
    version: &'static str,
    why: &'static str,
    /// More arguments of `cargo install`.
    arguments: &'static [&'static str],
}

/// The last release that links against rustc 1.95's own LLVM 22.
const BPF_LINKER: Tool = Tool {
    name: "bpf-linker",
    version: "0.10.3",
    why: "it links the BPF programs; this takes about five minutes, once",
    arguments: &[],
};

/// Built without optimisation: it runs for a second, and building it optimised takes minutes.
const CARGO_DENY: Tool = Tool {
    name: "cargo-deny",
    version: "0.20.2",
    why: "it checks the licences and sources of all dependencies; this takes about two minutes, once",
    arguments: &["--debug", "--config", "profile.dev.debug=0"],
};

/// What building needs: the source of `core` for the BPF target, and the BPF linker.
pub(crate) fn for_build() -> Result<()> {
    rust_src()?;
    tool(&BPF_LINKER)
}

/// What the tests need on top of building.
pub(crate) fn for_test() -> Result<()> {
    for_build()?;
    component("clippy", "it is the linter")?;
    component("rustfmt", "it checks the format")?;
    tool(&CARGO_DENY)?;
    netfilter()?;
    ethtool()?;
    kubectl()
}

/// kubectl: the tests and the user talk to the API server with it.
pub(crate) fn kubectl() -> Result<()> {
    if answer(command("kubectl").args(["version", "--client"])).is_some() {
        return Ok(());
    }
    println!("xtask: adding kubectl with apt-get: the API server is talked to with an unmodified kubectl");
    let no_package = "kubectl is missing and could not be installed with apt-get: install it and try again";
    run(command("apt-get").args(["-q", "update"])).context(no_package)?;
    // Kubernetes' own repository calls the package kubectl, Debian's kubernetes-client.
    for package in ["kubectl", "kubernetes-client"] {
        if has_candidate(package) {
            let install = ["-q", "-y", "install", "--no-install-recommends", package];
            return run(command("apt-get").args(install).env("DEBIAN_FRONTEND", "noninteractive")).context(no_package);
        }
    }
    bail!("{no_package}")
}

/// Programs that tests run, of Debian's packages: both kinds of iptables are what the data plane of that name uses, and nft plays a
/// proxy that was there before.
fn netfilter() -> Result<()> {
    package("iptables", &["iptables-nft-restore", "iptables-legacy-restore"])?;
    package("nftables", &["nft"])
}

/// Tests switch off what devices do for packets.
pub(crate) fn ethtool() -> Result<()> {
    package("ethtool", &["ethtool"])
}

/// Installs the package unless all `programs` of it answer.
fn package(name: &str, programs: &[&str]) -> Result<()> {
    if programs.iter().all(|program| answer(command(program).arg("--version")).is_some()) {
        return Ok(());
    }
    println!("xtask: adding {name} with apt-get: tests run {}", programs.join(" and "));
    let failed = || format!("{name} is missing and could not be installed with apt-get: install it and try again");
    run(command("apt-get").args(["-q", "update"])).with_context(failed)?;
    let install = ["-q", "-y", "install", "--no-install-recommends", name];
    run(command("apt-get").args(install).env("DEBIAN_FRONTEND", "noninteractive")).with_context(failed)
}

fn has_candidate(package: &str) -> bool {
    let policy = answer(command("apt-cache").args(["policy", package])).unwrap_or_default();
    let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
    candidate.is_some_and(|version| version != "(none)")
}

fn rust_src() -> Result<()> {
    let sysroot = answer(command("rustc").args(["--print", "sysroot"])).context("rustc is missing: install rustup")?;
    let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
    if source.exists() {
        return Ok(());
    }
    add_component("rust-src", "the BPF target's `core` is built from source")
}

fn component(name: &str, why: &str) -> Result<()> {
    // `cargo fmt` is of the component rustfmt; both spell their version.
    let subcommand = if name == "rustfmt" { "fmt" } else { name };
    match answer(&mut cargo(&[subcommand, "--version"])) {
        Some(_) => Ok(()),
        None => add_component(name, why),
    }
}

fn add_component(name: &str, why: &str) -> Result<()> {
    println!("xtask: adding the toolchain component {name}: {why}");
    run(command("rustup").args(["component", "add", name]))
        .with_context(|| format!("the toolchain component {name} is missing and rustup could not add it"))
}

fn tool(tool: &Tool) -> Result<()> {
    let path = tools_dir().join("bin").join(tool.name);
    if path.exists() && installed_version(&path).as_deref() == Some(tool.version) {
        return Ok(());
    }
    println!("xtask: adding {} {} to {}: {}", tool.name, tool.version, tools_dir().display(), tool.why);
    let root = tools_dir();
    let mut install = cargo(&["install", tool.name, "--version", tool.version, "--locked", "--force", "--root"]);
    install.arg(&root).args(tool.arguments);
    // A build folder of its own, which is removed at once: it is as large as the workspace's.
    let build = root.join("build");
    install.env("CARGO_TARGET_DIR", &build);
    let result = run(&mut install).with_context(|| format!("{} could not be installed", tool.name));
    // Nothing depends on it: what is left is only disk space.
    let _ = std::fs::remove_dir_all(&build);
    result
}

/// The last word of `TOOL --version`: `bpf-linker 0.10.3`.
fn installed_version(path: &Path) -> Option<String> {
    let text = answer(command(path.to_str()?).arg("--version"))?;
    text.split_whitespace().last().map(str::to_owned)
}
