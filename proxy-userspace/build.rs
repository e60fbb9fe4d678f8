//! Builds the BPF programs for this machine and leaves the object in `OUT_DIR`.

use std::env;
use std::process::{Command, exit};

fn main() -> aya_build::Result<()> {
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
    let package = aya_build::Package { name: "proxy-ebpf", root_dir: "../proxy-ebpf", features, ..Default::default() };
    aya_build::build_ebpf([package], aya_build::Toolchain::Custom(&toolchain))
}
