//! `cargo xtask vm test`: the namespace tests of `tests/tests/`, compiled here and run in the guest.

use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};

use super::PATIENCE;
use super::guest::Guest;
use super::job::Job;
use crate::prepare;
use crate::programs::{BIN_DIR, Profile, build};
use crate::run::{answer, cargo, line_of, root};
use crate::test::{Count, parse_result};

/// Runs its arguments one after the other, all of them, and fails if one did. One test at a time, as the guest has two slow
/// processors; those too that most machines' kernels cannot run.
const RUN_ALL: &str = r#"failed=0; for program; do echo "==> ${program##*/}"; "$program" --include-ignored --test-threads 1 || failed=1; done; exit $failed"#;

/// Builds everything, runs the tests of the named files (all, when there is none) in one guest, and prints the sum.
pub(crate) fn run(guest: &Guest<'_>, names: &[&str]) -> Result<ExitCode> {
    for name in names {
        let is_file = root().join("tests/tests").join(format!("{name}.rs")).is_file();
        ensure!(is_file, "{name} is not a file of tests/tests/");
    }
    prepare::for_build()?;
    prepare::kubectl()?;
    prepare::ethtool()?;
    let programs = build(Profile::Dev)?;
    let mut words = vec!["sh".to_owned(), "-c".to_owned(), RUN_ALL.to_owned(), "sh".to_owned()];
    words.extend(executables(names)?);
    let job =
        Job::new(&words).with_default(BIN_DIR, programs.display().to_string()).with_default(PATIENCE.0, PATIENCE.1);
    let mut count = Count::default();
    let status = guest.run(&job, |line| {
        print!("{line}");
        count = count + parse_result(line.trim_end()).unwrap_or_default();
    })?;
    // A program that died has no line of results.
    if status != 0 && count.failed == 0 {
        count.failed = 1;
    }
    println!("\n{} passed, {} failed", count.passed, count.failed);
    ensure!(count.passed + count.failed > 0, "the guest ran no test");
    Ok(if count.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Compiles the test programs, and returns their paths.
fn executables(names: &[&str]) -> Result<Vec<String>> {
    let mut compile = cargo(&["test", "--locked", "--package", "trama-lab", "--no-run", "--message-format=json"]);
    match names {
        [] => compile.args(["--test", "*"]),
        names => compile.args(names.iter().flat_map(|name| ["--test", name])),
    };
    let line = line_of(&compile);
    // What does not compile is shown by the ordinary command; in this form the messages are not for people.
    let messages = answer(&mut compile).with_context(|| format!("`{line}` failed: try it without --message-format"))?;
    let found: Result<Vec<Option<String>>> = messages.lines().map(executable_of).collect();
    let found: Vec<String> = found?.into_iter().flatten().collect();
    if found.is_empty() { bail!("`{line}` built no test") } else { Ok(found) }
}

/// The program of a `compiler-artifact` message about an integration test.
fn executable_of(message: &str) -> Result<Option<String>> {
    let message: serde_json::Value = serde_json::from_str(message).context("cannot read what cargo says")?;
    let is_test = message.pointer("/target/kind/0").is_some_and(|kind| kind == "test");
    let executable = message.get("executable").and_then(serde_json::Value::as_str);
    Ok(executable.filter(|_| is_test).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::executable_of;

    #[test]
    fn only_tests_are_run() {
        let test = r#"{"reason":"compiler-artifact","target":{"kind":["test"]},"executable":"/t/udp-1"}"#;
        assert_eq!(executable_of(test).unwrap().as_deref(), Some("/t/udp-1"));
        let program = r#"{"reason":"compiler-artifact","target":{"kind":["bin"]},"executable":"/t/trama-lab"}"#;
        assert_eq!(executable_of(program).unwrap(), None);
        assert_eq!(executable_of(r#"{"reason":"build-finished","success":true}"#).unwrap(), None);
    }
}
