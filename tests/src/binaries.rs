//! Where the workspace's programs are: tests and the lab start them as a user would.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Names the folder that holds the programs; set by `cargo xtask`.
const BIN_DIR: &str = "TRAMA_BIN_DIR";

/// Path of the program `name`: in `TRAMA_BIN_DIR`, else beside this executable or one folder above (tests run in `deps/`).
///
/// # Errors
/// When it has not been built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = env::current_exe().context("cannot find this executable's own path")?;
    let beside = own.ancestors().skip(1).take(2).map(Path::to_path_buf);
    let folders: Vec<PathBuf> = env::var_os(BIN_DIR).map(PathBuf::from).into_iter().chain(beside).collect();
    let Some(path) = folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file()) else {
        bail!(
            "the program {name} is not built (looked in {folders:?}): `cargo xtask up` and `cargo xtask test` build it"
        );
    };
    Ok(path)
}
