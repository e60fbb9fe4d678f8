//! How xtask runs commands: from the workspace's root, with its own tools first in the path, and with the command line in every error.

use std::env;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Beginnings of the variables by which cargo tells a program about its own package.
const ABOUT_PACKAGE: [&str; 2] = ["CARGO_PKG_", "CARGO_MANIFEST_"];

/// The workspace's root folder.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Where cargo builds.
pub(crate) fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// Where the tools that xtask adds are installed: below the target folder, so that `cargo clean` removes them.
pub(crate) fn tools_dir() -> PathBuf {
    target_dir().join("tools")
}

/// `program`, with the workspace's tools first in its path.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root()).env("PATH", path_with_tools());
    // What `cargo run` says about xtask: a crate's build script that watches them would run again, and all that needs the crate be built
    // again, after every change between `cargo` and `cargo xtask`.
    let about_xtask =
        |name: &OsString| name.to_str().is_some_and(|name| ABOUT_PACKAGE.iter().any(|start| name.starts_with(start)));
    env::vars_os().map(|(name, _)| name).filter(about_xtask).for_each(|name| {
        command.env_remove(name);
    });
    command
}

/// `cargo` with `arguments`.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = command("cargo");
    command.args(arguments);
    command
}

/// Runs the command to its end, with its output on the terminal.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = line_of(command);
    let status = command.status().with_context(|| format!("cannot start `{line}`"))?;
    ensure!(status.success(), "`{line}` failed with {status}");
    Ok(())
}

/// What the command prints, or `None` when it cannot be started or fails.
pub(crate) fn answer(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command as a person would type it.
pub(crate) fn line_of(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Fails with one sentence unless this process is root: namespaces, mounts and BPF programs need it.
pub(crate) fn require_root(verb: &str) -> Result<()> {
    let owner = std::fs::metadata("/proc/self").context("cannot read /proc/self")?.uid();
    if owner != 0 {
        bail!("`cargo xtask {verb}` needs namespaces, mounts and the machine's files: run it as root");
    }
    Ok(())
}

fn path_with_tools() -> OsString {
    let old = env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(tools_dir().join("bin")).chain(env::split_paths(&old));
    env::join_paths(folders).unwrap_or(old)
}
