//! The workspace's programs: built together, in one profile, and found by everything else through one folder.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::run::{cargo, run, target_dir};

/// Names the folder of the programs for the lab and the benchmarks.
pub(crate) const BIN_DIR: &str = "TRAMA_BIN_DIR";
/// Packages with a program that the lab starts.
const PROGRAMS: [&str; 3] = ["apiserver-lite", "trama-lab", "trama-proxy"];

/// How programs are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Quick to build, with checks.
    Dev,
    /// For measurements.
    Release,
}

impl Profile {
    /// The folder of this profile's programs.
    pub(crate) fn folder(self) -> PathBuf {
        target_dir().join(match self {
            Self::Dev => "debug",
            Self::Release => "release",
        })
    }
}

/// Builds every program, and returns the folder that holds them.
///
/// To measure, each is built by itself, as its users build it: in one build, cargo gives a library that several of them use the features
/// that any of them asks for, and that made trama-proxy 7% larger.
pub(crate) fn build(profile: Profile) -> Result<PathBuf> {
    match profile {
        Profile::Dev => compile(&PROGRAMS, &[])?,
        Profile::Release => PROGRAMS.iter().try_for_each(|name| compile(&[name], &["--release"]))?,
    }
    let folder = profile.folder();
    for name in PROGRAMS {
        ensure!(folder.join(name).is_file(), "cargo built no program {name} in {}", folder.display());
    }
    Ok(folder)
}

/// Builds trama-proxy with another layout of its maps as `trama-proxy-other-layout` beside the programs, for the test that exchanges one
/// for the other. To be followed by [`build`], as both have one name to cargo.
pub(crate) fn build_other_layout() -> Result<()> {
    compile(&PROGRAMS, &["--features", "trama-proxy/layout-test"])?;
    let folder = Profile::Dev.folder();
    let copied = std::fs::copy(folder.join("trama-proxy"), folder.join("trama-proxy-other-layout"));
    copied.with_context(|| format!("cannot copy trama-proxy in {}", folder.display()))?;
    Ok(())
}

fn compile(packages: &[&str], options: &[&str]) -> Result<()> {
    let mut arguments = vec!["build", "--locked", "--bins"];
    packages.iter().for_each(|name| arguments.extend(["--package", name]));
    arguments.extend(options);
    run(&mut cargo(&arguments))
}
