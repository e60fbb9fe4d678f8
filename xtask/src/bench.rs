//! `cargo xtask bench`: builds optimised programs and hands over to the benchmark.

use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::prepare;
use crate::programs::{BIN_DIR, Profile, build};
use crate::run::{cargo, command, require_root, run, target_dir};

/// Builds, then becomes `bench-NAME` with the same arguments.
pub(crate) fn bench(name: &str, arguments: &[&str]) -> Result<ExitCode> {
    require_root("bench")?;
    prepare::for_build()?;
    println!("xtask: building with optimisation");
    let program = format!("bench-{name}");
    run(&mut cargo(&["build", "--locked", "--release", "--package", "benches", "--bin", &program]))?;
    let mut bench = command(&Profile::Release.folder().join(&program).to_string_lossy());
    if name == "scale" {
        bench.env(BIN_DIR, build(Profile::Release)?);
    }
    bench.env("TRAMA_BENCH_DIR", target_dir().join("bench")).args(arguments);
    Err(bench.exec()).with_context(|| format!("cannot start {program}"))
}
