//! The arguments of `cargo xtask vm`.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::kernel::Series;

/// Without `--memory`; half of it holds what the guest writes.
const MEMORY_MB: u32 = 3072;
/// Below this the guest's kernel does not reach user space.
const MEMORY_MB_MIN: u32 = 256;
/// Without `--timeout`, boot included.
const LIMIT: Duration = Duration::from_secs(1800);

/// What the guest is and does.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments<'a> {
    pub(crate) kernel: Series,
    pub(crate) memory_mb: u32,
    pub(crate) limit: Duration,
    pub(crate) work: Work<'a>,
}

/// What is run in the guest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Work<'a> {
    /// One command.
    Command(&'a [&'a str]),
    /// The namespace tests of these files of `tests/tests/`; none means all.
    Tests(Vec<&'a str>),
    /// The benchmark of a large cluster, with its arguments.
    BenchScale(&'a [&'a str]),
}

impl<'a> Arguments<'a> {
    /// `[--kernel 6.1|6.12] [--memory MB] [--timeout SECONDS] test [FILE...]`, or the same options and `bench scale [...]` or
    /// `-- COMMAND...`.
    pub(crate) fn parse(mut words: &'a [&'a str]) -> Result<Self> {
        let mut parsed =
            Self { kernel: Series::Linux6_1, memory_mb: MEMORY_MB, limit: LIMIT, work: Work::Tests(Vec::new()) };
        loop {
            words = match words {
                ["--kernel", series, rest @ ..] => {
                    parsed.kernel = series.parse()?;
                    rest
                }
                ["--memory", megabytes, rest @ ..] => {
                    parsed.memory_mb = number("--memory", megabytes)?;
                    rest
                }
                ["--timeout", seconds, rest @ ..] => {
                    parsed.limit = Duration::from_secs(number("--timeout", seconds)?);
                    rest
                }
                ["test", files @ ..] => {
                    parsed.work = Work::Tests(files.to_vec());
                    break;
                }
                ["bench", "scale", options @ ..] => {
                    parsed.work = Work::BenchScale(options);
                    break;
                }
                ["--", command @ ..] if !command.is_empty() => {
                    parsed.work = Work::Command(command);
                    break;
                }
                _ => bail!(
                    "say `cargo xtask vm [--kernel 6.1|6.12] [--memory MB] [--timeout SECONDS] test [FILE...]`, or `bench scale [...]` or `-- COMMAND...` instead of `test`"
                ),
            };
        }
        ensure!(parsed.memory_mb >= MEMORY_MB_MIN, "--memory takes at least {MEMORY_MB_MIN} MB");
        ensure!(!parsed.limit.is_zero(), "--timeout takes at least one second");
        Ok(parsed)
    }
}

fn number<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(option: &str, text: &str) -> Result<T> {
    text.parse().with_context(|| format!("{option} takes a whole number, not {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_before_the_command() {
        let words = ["--kernel", "6.12", "--memory", "512", "--timeout", "60", "--", "ip", "--memory", "1"];
        let parsed = Arguments::parse(&words).unwrap();
        assert_eq!((parsed.kernel, parsed.memory_mb, parsed.limit), (Series::Linux6_12, 512, Duration::from_secs(60)));
        assert_eq!(parsed.work, Work::Command(&["ip", "--memory", "1"]));
        assert_eq!(Arguments::parse(&["test", "udp"]).unwrap().work, Work::Tests(vec!["udp"]));
        let bench = ["--memory", "4096", "bench", "scale", "--backend", "ipvs"];
        assert_eq!(Arguments::parse(&bench).unwrap().work, Work::BenchScale(&["--backend", "ipvs"]));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for words in
            [&["--"][..], &["ip"], &["--memory", "much", "test"], &["--memory", "1", "test"], &["bench", "packet"], &[]]
        {
            assert!(Arguments::parse(words).is_err(), "{words:?}");
        }
        let error = Arguments::parse(&["--kernel", "5.4", "test"]).unwrap_err();
        assert_eq!(error.to_string(), "there is no guest kernel 5.4; the guests are 6.1 and 6.12");
    }
}
