//! Builds the BPF programs for this machine and leaves the object in `OUT_DIR`.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs};

use anyhow::{Context, Result};
use object::build::elf::{Builder, SectionData};
use object::elf::SHT_STRTAB;

/// The object in `OUT_DIR`, which is named as its package.
const OBJECT: &str = "proxy-ebpf";

fn main() -> Result<()> {
    // Building `core` for the BPF target is an unstable feature of a stable compiler. aya-build reads the permission
    // from the environment, which a safe program can set for its children only: so it runs itself again. It also turns
    // every line that cargo prints into a warning, hence the quiet.
    if env::var_os("RUSTC_BOOTSTRAP").is_none() {
        let mut again = Command::new(env::current_exe()?);
        let status = again.env("RUSTC_BOOTSTRAP", "1").env("CARGO_TERM_QUIET", "true").status()?;
        exit(status.code().unwrap_or(1));
    }
    let toolchain = env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "1.95.0".to_owned());
    let other_layout = env::var_os("CARGO_FEATURE_LAYOUT_TEST").is_some();
    let features: &[&str] = if other_layout { &["layout-test"] } else { &[] };
    let package = aya_build::Package { name: OBJECT, root_dir: "../proxy-ebpf", features, ..Default::default() };
    aya_build::build_ebpf([package], aya_build::Toolchain::Custom(&toolchain))?;
    let out = env::var_os("OUT_DIR").context("OUT_DIR is not set")?;
    strip(&PathBuf::from(out).join(OBJECT))
}

/// Takes out what only debuggers read. The types that the kernel reads stay: they are in sections of their own, but the linker derives them
/// from the rest, so that has to be made. It is three quarters of the object, all of which the daemon would hold in memory.
fn strip(object: &Path) -> Result<()> {
    let bytes = fs::read(object).with_context(|| format!("cannot read {}", object.display()))?;
    let mut builder = Builder::read(&*bytes).with_context(|| format!("cannot read {}", object.display()))?;
    for section in &mut builder.sections {
        let name = section.name.as_slice();
        section.delete = name.starts_with(b".debug_") || name.starts_with(b".rel.debug_");
    }
    builder.delete_orphans();
    // Names of sections and of symbols share one table until here.
    let names = builder.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped).with_context(|| format!("cannot strip {}", object.display()))?;
    fs::write(object, stripped).with_context(|| format!("cannot write {}", object.display()))
}
