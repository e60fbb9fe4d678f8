//! `cargo xtask fuzz` and the scenarios of single packets: builds the programs and hands over to `trama-lab`.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::prepare;
use crate::programs::{BIN_DIR, Profile, build};
use crate::run::{command, require_root, root};

/// Builds, then becomes `trama-lab fuzz` with the same arguments.
pub(crate) fn fuzz(arguments: &[&str]) -> Result<ExitCode> {
    require_root("fuzz")?;
    prepare::for_build()?;
    let mut fuzzer = all(&build(Profile::Dev)?);
    fuzzer.args(arguments);
    Err(fuzzer.exec()).context("cannot start trama-lab")
}

/// The kept seeds, and a million packets behind a fresh one.
pub(crate) fn all(programs: &Path) -> Command {
    let mut command = command(&programs.join("trama-lab").to_string_lossy());
    command.env(BIN_DIR, programs).arg("fuzz").arg("--seeds").arg(root().join("tests/fuzz/seeds"));
    command
}

/// Every file of `tests/packets`.
pub(crate) fn packets(programs: &Path) -> Result<Command> {
    let folder = root().join("tests/packets");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|end| end == "txt")).collect();
    files.sort();
    let mut command = command(&programs.join("trama-lab").to_string_lossy());
    command.env(BIN_DIR, programs).arg("packets").args(files);
    Ok(command)
}

/// What the verifier of this kernel counts, against `tests/verifier.txt`.
pub(crate) fn verifier(programs: &Path) -> Command {
    let mut command = command(&programs.join("trama-lab").to_string_lossy());
    command.arg("verifier").arg(root().join("tests/verifier.txt"));
    command
}
