//! `cargo xtask bench`: builds optimised programs and hands over to the benchmark.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::prepare;
use crate::programs::{BIN_DIR, Profile, build};
use crate::run::{cargo, command, require_root, run, target_dir};

/// Where the benchmark writes its figures.
pub(crate) const BENCH_DIR: &str = "TRAMA_BENCH_DIR";

/// Builds, then becomes `bench-NAME` with the same arguments.
pub(crate) fn bench(name: &str, arguments: &[&str]) -> Result<ExitCode> {
    require_root("bench")?;
    let program = build_bench(name)?;
    let mut bench = command(&program.to_string_lossy());
    if name != "packet" {
        bench.env(BIN_DIR, build(Profile::Release)?);
    }
    bench.env(BENCH_DIR, target_dir().join("bench")).args(arguments);
    Err(bench.exec()).with_context(|| format!("cannot start {}", program.display()))
}

/// Compiles `bench-NAME` with optimisation, and returns its path.
pub(crate) fn build_bench(name: &str) -> Result<PathBuf> {
    prepare::for_build()?;
    println!("xtask: building with optimisation");
    let program = format!("bench-{name}");
    run(&mut cargo(&["build", "--locked", "--release", "--package", "benches", "--bin", &program]))?;
    Ok(Profile::Release.folder().join(program))
}
