//! `cargo xtask test`: every check that a change has to pass, in the order in which they fail fastest. CI runs exactly this.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::prepare;
use crate::programs::{BIN_DIR, Profile, build, build_other_layout};
use crate::run::{cargo, line_of, require_root, root, target_dir};

/// Namespace tests at once: each has its own cluster, and CI has two cores.
const NAMESPACE_TEST_THREADS: &str = "2";

/// The namespace test file that needs a second trama-proxy.
const UPGRADE_TEST: &str = "upgrade";

/// Packages that compile for the BPF target only.
const BPF_PACKAGES: [&str; 2] = ["bench-ebpf", "proxy-ebpf"];

/// One named check.
struct Step {
    name: &'static str,
    what: &'static str,
    work: fn() -> Result<Count>,
}

/// Results of a step: of its tests, or one for the step itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Count {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

const STEPS: [Step; 12] = [
    Step { name: "fmt", what: "format", work: fmt },
    Step { name: "clippy", what: "lints, host", work: clippy },
    Step { name: "clippy-bpf", what: "lints, BPF target", work: clippy_bpf },
    Step { name: "build", what: "programs", work: programs },
    Step { name: "unit", what: "unit tests", work: unit },
    Step { name: "netns", what: "namespace tests", work: namespace_tests },
    Step { name: "flows", what: "flows on every backend of this kernel", work: flows },
    Step { name: "verifier", what: "budgets of the verifier", work: verifier },
    Step { name: "packets", what: "single packets, in and out", work: packets },
    Step { name: "fuzz", what: "random packets through the programs", work: fuzz },
    Step { name: "doc", what: "documentation", work: doc },
    Step { name: "deny", what: "bans, licences and sources of dependencies", work: deny },
];

/// What `--only` may name.
enum Only<'a> {
    Step(&'static Step),
    File(&'a str),
}

/// Runs all steps, or the one step or namespace test file named `only`, and ends with the sum on a line of its own.
pub(crate) fn test(only: Option<&str>) -> Result<ExitCode> {
    require_root("test")?;
    let only = only.map(find).transpose()?;
    prepare::for_test()?;
    let total = match only {
        None => STEPS.iter().map(announce).sum(),
        Some(Only::Step(step)) => announce(step),
        Some(Only::File(name)) => namespace_test_file(name)?,
    };
    println!("\n{} passed, {} failed", total.passed, total.failed);
    Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn find(name: &str) -> Result<Only<'_>> {
    if let Some(step) = STEPS.iter().find(|step| step.name == name) {
        return Ok(Only::Step(step));
    }
    let steps: Vec<&str> = STEPS.iter().map(|step| step.name).collect();
    let is_file = root().join("tests/tests").join(format!("{name}.rs")).is_file();
    ensure!(is_file, "{name} is neither a step ({}) nor a file of tests/tests/", steps.join(", "));
    Ok(Only::File(name))
}

fn announce(step: &Step) -> Count {
    println!("\n==> {}: {}", step.name, step.what);
    let start = Instant::now();
    let result = (step.work)();
    let seconds = start.elapsed().as_secs_f64();
    match result {
        Ok(count) => {
            let verdict = if count.failed == 0 { "ok" } else { "FAILED" };
            println!("<== {}: {verdict}, {} passed, {} failed, {seconds:.1} s", step.name, count.passed, count.failed);
            count
        }
        Err(error) => {
            println!("<== {}: FAILED, {error:#}, {seconds:.1} s", step.name);
            Count { passed: 0, failed: 1 }
        }
    }
}

fn fmt() -> Result<Count> {
    check(&mut cargo(&["fmt", "--all", "--check"]))
}

fn clippy() -> Result<Count> {
    check(host_cargo("clippy").args(["--all-targets", "--", "-D", "warnings"]))
}

fn clippy_bpf() -> Result<Count> {
    let mut command = cargo(&["clippy", "--locked", "--target", "bpfel-unknown-none", "-Zbuild-std=core"]);
    for name in BPF_PACKAGES {
        command.args(["--package", name]);
    }
    command.args(["--", "-D", "warnings"]);
    // A stable compiler that builds `core`; in a folder of its own, as the variable makes cargo rebuild everything.
    command.env("RUSTC_BOOTSTRAP", "1").env("CARGO_TARGET_DIR", target_dir().join("bpf"));
    command.env("RUSTFLAGS", "--cfg bpf_target_arch=\"x86_64\"");
    check(&mut command)
}

fn doc() -> Result<Count> {
    check(host_cargo("doc").arg("--no-deps").env("RUSTDOCFLAGS", "-D warnings"))
}

fn programs() -> Result<Count> {
    build(Profile::Dev).map(|_| Count { passed: 1, failed: 0 })
}

fn unit() -> Result<Count> {
    let mut command = host_cargo("test");
    command.args(["--no-fail-fast", "--lib", "--bins"]).env(BIN_DIR, Profile::Dev.folder());
    count_tests(&mut command)
}

/// The integration tests of every crate: those that need root, namespaces and BPF programs, and the built programs.
fn namespace_tests() -> Result<Count> {
    build_other_layout()?;
    let folder = build(Profile::Dev)?;
    let mut command = host_cargo("test");
    command
        .args(["--no-fail-fast", "--test", "*", "--", "--test-threads", NAMESPACE_TEST_THREADS])
        .env(BIN_DIR, folder);
    count_tests(&mut command)
}

/// The flow oracle; each flow is counted.
fn flows() -> Result<Count> {
    count_results(&mut crate::flows::all(&build(Profile::Dev)?)?, parse_sum)
}

/// The verifier's work; each program is counted.
fn verifier() -> Result<Count> {
    count_results(&mut crate::fuzz::verifier(&build(Profile::Dev)?), parse_sum)
}

/// Scenarios of single packets; each is counted.
fn packets() -> Result<Count> {
    count_results(&mut crate::fuzz::packets(&build(Profile::Dev)?)?, parse_sum)
}

/// A million random packets and more, from the same seeds in every run; each seed is counted.
fn fuzz() -> Result<Count> {
    count_results(crate::fuzz::all(&build(Profile::Dev)?).arg("--kept-only"), parse_sum)
}

fn namespace_test_file(file: &str) -> Result<Count> {
    if file == UPGRADE_TEST {
        build_other_layout()?;
    }
    let folder = build(Profile::Dev)?;
    let mut command = cargo(&["test", "--locked", "--package", "trama-lab", "--test", file]);
    count_tests(command.args(["--", "--test-threads", NAMESPACE_TEST_THREADS]).env(BIN_DIR, folder))
}

fn deny() -> Result<Count> {
    check(&mut cargo(&["deny", "--locked", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"]))
}

/// `cargo VERB` for everything that compiles for the host.
fn host_cargo(verb: &str) -> Command {
    let mut command = cargo(&[verb, "--locked", "--workspace"]);
    for name in BPF_PACKAGES {
        command.args(["--exclude", name]);
    }
    command
}

/// A command that is one check: passed or failed.
fn check(command: &mut Command) -> Result<Count> {
    let line = line_of(command);
    let status = command.status().with_context(|| format!("cannot start `{line}`"))?;
    let failed = u64::from(!status.success());
    Ok(Count { passed: 1 - failed, failed })
}

/// A `cargo test` whose results are counted.
fn count_tests(command: &mut Command) -> Result<Count> {
    count_results(command, parse_result)
}

/// Counts the results in the command's output, which goes on to the terminal meanwhile.
fn count_results(command: &mut Command, parse: fn(&str) -> Option<Count>) -> Result<Count> {
    let line = line_of(command);
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start `{line}`"))?;
    let mut count = Count::default();
    for text in child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines) {
        let text = text.with_context(|| format!("cannot read the output of `{line}`"))?;
        println!("{text}");
        count = count + parse(&text).unwrap_or_default();
    }
    let status = child.wait().with_context(|| format!("cannot wait for `{line}`"))?;
    // A test executable that did not compile, or died, has no line of results.
    if !status.success() && count.failed == 0 {
        count.failed = 1;
    }
    if count == Count::default() {
        bail!("`{line}` ran no test");
    }
    Ok(count)
}

/// `test result: ok. 6 passed; 0 failed; 0 ignored; ...`
pub(crate) fn parse_result(line: &str) -> Option<Count> {
    let (_, numbers) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |what: &str| numbers.split("; ").find_map(|part| part.strip_suffix(what)?.trim().parse().ok());
    Some(Count { passed: number("passed")?, failed: number("failed")? })
}

/// `1234 passed, 0 failed`
fn parse_sum(line: &str) -> Option<Count> {
    let (passed, failed) = line.strip_suffix(" failed")?.split_once(" passed, ")?;
    Some(Count { passed: passed.parse().ok()?, failed: failed.parse().ok()? })
}

impl std::ops::Add for Count {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { passed: self.passed + other.passed, failed: self.failed + other.failed }
    }
}

impl std::iter::Sum for Count {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |sum, count| sum + count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let line = "test result: FAILED. 6 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.62s";
        assert_eq!(parse_result(line), Some(Count { passed: 6, failed: 2 }));
        assert_eq!(parse_result("test topology ... ok"), None);
        assert_eq!(parse_result("test result: "), None);
        assert_eq!(parse_sum("1234 passed, 2 failed"), Some(Count { passed: 1234, failed: 2 }));
        assert_eq!(parse_sum("  expected DROP"), None);
    }
}
