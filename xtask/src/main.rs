//! xtask: what a person types. Every verb prepares the machine itself, says what it adds and why, and then does its work.
#![forbid(unsafe_code)]

mod bench;
mod flows;
mod fuzz;
mod migration;
mod prepare;
mod programs;
mod run;
mod schema;
mod test;
mod up;
mod vm;

use std::env;
use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
cargo xtask <verb>

  up [--once] [...]          build everything, bring up a cluster in network namespaces, apply examples/, send traffic, show who answered;
                             then stay until Ctrl-C, or end with an exit status with --once
  test [--only NAME]         format, lints, docs, unit tests, namespace tests, licences; NAME is a step or a file of tests/tests/
  flows [FILE...] [--backend model|ebpf|nftables|iptables|ipvs|all] [--scenario NAME] [--keep-going]
                             open the connections of every scenario of the files, or of tests/flows/, and compare with kube-proxy's answers
  fuzz [--seed N] [--packets N]
                             random packets at random Services through the kernel's programs, against the model; a million without arguments
  bench packet|scale|stack [...]
                             nanoseconds per packet of every program path and per call of sockets; time to programmed of a large cluster;
                             live traffic beside nftables, iptables and no proxy
  migration --kube-proxy PATH [--kube-proxy-mode MODES] [--mode MODES] [--rounds N] [...]
                             exchange kube-proxy for trama-proxy and back while traffic goes on, and count what is lost
  vm [--kernel 6.1|6.12] [--memory MB] [--timeout SECONDS] -- COMMAND...
                             run a command as root under another kernel, in an emulated machine that sees this one's files read-only
  vm [...] test [NAME...]    the namespace tests there, all or those of the named files of tests/tests/
  vm [...] bench scale [...] the benchmark of a large cluster there: --backend ipvs needs it where this kernel has no IPVS
  schema                     regenerate the tables of apiserver-machinery from the Kubernetes Go module
  ci                         the same as test
";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match dispatch(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: &[&str]) -> Result<ExitCode> {
    match arguments {
        [] | ["help" | "-h" | "--help"] => print!("{HELP}"),
        ["up", rest @ ..] => return up::up(rest),
        ["migration", rest @ ..] => return migration::migration(rest),
        ["test" | "ci"] => return test::test(None),
        ["test", "--only", name] => return test::test(Some(name)),
        ["flows", rest @ ..] => return flows::flows(rest),
        ["fuzz", rest @ ..] => return fuzz::fuzz(rest),
        ["bench", name @ ("packet" | "scale" | "stack"), rest @ ..] => return bench::bench(name, rest),
        ["vm", rest @ ..] => return vm::vm(rest),
        ["schema"] => schema::run()?,
        _ => bail!("`cargo xtask {}` is not known; `cargo xtask help` lists the verbs", arguments.join(" ")),
    }
    Ok(ExitCode::SUCCESS)
}
