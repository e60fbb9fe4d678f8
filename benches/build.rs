//! Builds the BPF programs of the benchmarks and leaves the object in `OUT_DIR`.

use std::env;
use std::process::{Command, exit};

fn main() -> aya_build::Result<()> {
    // As in trama-proxy's build script: the permission to build `core` is set for a second run of this program.
    if env::var_os("RUSTC_BOOTSTRAP").is_none() {
        let mut again = Command::new(env::current_exe()?);
        let status = again.env("RUSTC_BOOTSTRAP", "1").env("CARGO_TERM_QUIET", "true").status()?;
        exit(status.code().unwrap_or(1));
    }
    println!("cargo:rerun-if-changed=../proxy-ebpf");
    let toolchain = env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "1.95.0".to_owned());
    let package = aya_build::Package { name: "bench-ebpf", root_dir: "ebpf", ..Default::default() };
    aya_build::build_ebpf([package], aya_build::Toolchain::Custom(&toolchain))
}
