//! `cargo xtask migration --kube-proxy PATH`: builds the programs and hands over to `trama-lab migration`.

use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::prepare;
use crate::programs::{BIN_DIR, Profile, build};
use crate::run::{command, require_root};

/// Builds, then becomes `trama-lab migration` with the same arguments. Nobody gives CI a kube-proxy: that is why this is no test.
pub(crate) fn migration(arguments: &[&str]) -> Result<ExitCode> {
    require_root("migration")?;
    prepare::for_test()?;
    println!("xtask: building");
    let folder = build(Profile::Dev)?;
    let program = folder.join("trama-lab");
    let mut lab = command(&program.to_string_lossy());
    lab.env(BIN_DIR, &folder).arg("migration").args(arguments);
    Err(lab.exec()).with_context(|| format!("cannot start {}", program.display()))
}
