//! `cargo xtask flows`: builds the programs and hands over to `trama-lab flows`.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::prepare;
use crate::programs::{BIN_DIR, Profile, build};
use crate::run::{command, require_root, root};

/// Builds, then becomes `trama-lab flows` with the same arguments; without a file it takes all of `tests/flows`.
pub(crate) fn flows(arguments: &[&str]) -> Result<ExitCode> {
    require_root("flows")?;
    prepare::for_build()?;
    let names_file = arguments.iter().any(|argument| argument.ends_with(".jsonl"));
    let files = if names_file { Vec::new() } else { own_files()? };
    let mut oracle = oracle(&build(Profile::Dev)?, &files);
    if !arguments.contains(&"--exceptions") {
        oracle.arg("--exceptions").arg(folder().join("exceptions.json"));
    }
    // The oracle starts in the workspace's root, its user anywhere.
    oracle.args(arguments.iter().map(|argument| fs::canonicalize(argument).unwrap_or_else(|_| argument.into())));
    Err(oracle.exec()).context("cannot start trama-lab")
}

/// Every file of `tests/flows`, on every backend that this kernel has.
pub(crate) fn all(programs: &Path) -> Result<Command> {
    let mut command = oracle(programs, &own_files()?);
    command.arg("--exceptions").arg(folder().join("exceptions.json")).args(["--backend", "all", "--keep-going"]);
    Ok(command)
}

fn oracle(programs: &Path, files: &[PathBuf]) -> Command {
    let mut command = command(&programs.join("trama-lab").to_string_lossy());
    command.env(BIN_DIR, programs).arg("flows").args(files);
    command
}

fn folder() -> PathBuf {
    root().join("tests/flows")
}

fn own_files() -> Result<Vec<PathBuf>> {
    let folder = folder();
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|end| end == "jsonl")).collect();
    files.sort();
    Ok(files)
}
