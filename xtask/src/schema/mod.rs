//! `cargo xtask schema`: regenerates the schema tables of apiserver-machinery from the data inside the Kubernetes Go module.
//!
//! Only facts are taken: names, types, list types, merge keys, verbs. No description and no document is copied.

mod resources;
mod source;
mod types;

use std::fs;
use std::path::PathBuf;

use anyhow::Context;

/// The Kubernetes release that the tables describe.
const RELEASE: &str = "v1.36.3";

/// Writes `tables/types.txt` and `tables/resources.txt`.
///
/// # Errors
/// When `go` is missing, the module can't be downloaded, its data has a form that the tables can't express, or a file can't be written.
pub(crate) fn run() -> anyhow::Result<()> {
    let source = source::load(RELEASE)?;
    let folder = tables_folder()?;
    for (name, text) in
        [("types.txt", types::table(&source.swagger, RELEASE)?), ("resources.txt", resources::table(&source, RELEASE)?)]
    {
        let path = folder.join(name);
        fs::write(&path, &text).with_context(|| format!("writing {}", path.display()))?;
        println!("{}: {} lines, {} bytes", path.display(), text.lines().count(), text.len());
    }
    Ok(())
}

fn tables_folder() -> anyhow::Result<PathBuf> {
    let manifest =
        std::env::var_os("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR is not set; run this through cargo")?;
    let workspace = PathBuf::from(manifest).parent().context("xtask has no parent folder")?.to_path_buf();
    Ok(workspace.join("apiserver-lite/machinery/tables"))
}
