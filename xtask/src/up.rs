//! `cargo xtask up`: builds the programs and hands over to `trama-lab up`.

use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::prepare;
use crate::programs::{BIN_DIR, Profile, build};
use crate::run::{command, require_root, root};

/// Builds, then becomes `trama-lab up` with the same arguments: Ctrl-C reaches it directly.
pub(crate) fn up(arguments: &[&str]) -> Result<ExitCode> {
    require_root("up")?;
    prepare::for_build()?;
    prepare::kubectl()?;
    println!("xtask: building");
    let folder = build(Profile::Dev)?;
    let program = folder.join("trama-lab");
    let mut lab = command(&program.to_string_lossy());
    lab.env(BIN_DIR, &folder).arg("up").arg("--examples").arg(root().join("examples")).args(arguments);
    Err(lab.exec()).with_context(|| format!("cannot start {}", program.display()))
}
