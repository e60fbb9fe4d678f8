//! `trama-lab verifier`: how many instructions the kernel's verifier walks for each program, against a budget in a file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use aya::programs::{Program, ProgramError};
use aya::{Btf, EbpfLoader};
use clap::Args;
use trama_proxy::dataplane::ebpf::OBJECT;

/// What to compare with.
#[derive(Debug, Args)]
pub struct VerifierOptions {
    /// The budgets: lines of a program's name and a number; what follows it is for people.
    table: PathBuf,
}

/// Loads every program with a budget, prints what this kernel's verifier counted, and fails for one beyond its budget, one without a
/// budget, and a budget without a program. Needs Linux 5.16, which counts.
///
/// # Errors
/// When the table cannot be read, or a program is refused.
pub fn run(options: &VerifierOptions) -> Result<ExitCode> {
    let mut budgets = read(&options.table)?;
    let (mut passed, mut failed) = (0, 0);
    let Counts { counts, refused } = counts()?;
    for name in &refused {
        budgets.remove(name).with_context(|| format!("{name} has no budget"))?;
        println!("{name:16} NOT COUNTED: this kernel refuses tracing programs");
    }
    for (name, count) in counts {
        let verdict = match budgets.remove(&name) {
            Some(budget) if count <= budget => {
                passed += 1;
                format!("of {budget}")
            }
            budget => {
                failed += 1;
                budget.map_or("has no budget".to_owned(), |budget| format!("is BEYOND {budget}"))
            }
        };
        println!("{name:16} {count:>7} {verdict}");
    }
    for name in budgets.keys() {
        println!("{name:16} is in the table only");
        failed += 1;
    }
    println!("{passed} passed, {failed} failed");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn read(path: &Path) -> Result<BTreeMap<String, u32>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    lines.map(|line| parse(line).with_context(|| format!("{}: {line:?} is no budget", path.display()))).collect()
}

/// What the verifier said.
#[derive(Default)]
struct Counts {
    counts: Vec<(String, u32)>,
    /// Iterators of a kernel that has no tracing programs, as one that is locked down may not.
    refused: Vec<String>,
}

/// Every program of the object.
fn counts() -> Result<Counts> {
    let mut ebpf = EbpfLoader::new().load(OBJECT).context("cannot load the BPF object")?;
    let btf = Btf::from_sys_fs().context("this kernel does not show its types, which the iterators are loaded by")?;
    let mut all = Counts::default();
    for (name, program) in ebpf.programs_mut() {
        let info = match program {
            Program::SchedClassifier(program) => program.load().map(|()| program.info()),
            Program::CgroupSockAddr(program) => program.load().map(|()| program.info()),
            Program::CgroupSock(program) => program.load().map(|()| program.info()),
            Program::Xdp(program) => program.load().map(|()| program.info()),
            Program::Iter(program) => match program.load("bpf_sk_storage_map", &btf) {
                Err(error) if is_not_permitted(&error) => {
                    all.refused.push(name.to_owned());
                    continue;
                }
                loaded => loaded.map(|()| program.info()),
            },
            _ => bail!("{name} is of a type that is not known here"),
        };
        let info = info.with_context(|| format!("the kernel refused {name}"))??;
        let Some(count) = info.verified_instruction_count() else { bail!("this kernel does not count instructions") };
        all.counts.push((name.to_owned(), count));
    }
    all.counts.sort();
    Ok(all)
}

/// `EPERM`, which no verifier says of a program of root's.
fn is_not_permitted(error: &ProgramError) -> bool {
    let ProgramError::LoadError { io_error, .. } = error else { return false };
    io_error.raw_os_error() == Some(nix::errno::Errno::EPERM as i32)
}
