//! Runs a program with a stream for its input and a line at a time for its output; it gets so long and is then killed.

use std::io::{self, BufRead, BufReader, BufWriter, ErrorKind, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use super::error::IptablesError;

/// So much of what a program complains about is kept, in bytes; the rest is read and dropped.
const COMPLAINT_MAX: u64 = 16 * 1024;
/// Longer lines of output are cut, in bytes: no line of ours is so long.
const LINE_MAX: u64 = 64 * 1024;

/// How a program ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    /// What it wrote to stderr, at most [`COMPLAINT_MAX`].
    pub(super) complaint: String,
}

/// Runs `command` to its end. `feed` writes its input; that the program does not read all of it is no error. `line` gets its output.
///
/// # Errors
/// When it can't be started or is not done within `limit`.
pub(super) fn run(
    command: &mut Command,
    limit: Duration,
    feed: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send,
    mut line: impl FnMut(&str),
) -> Result<Ended, IptablesError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |source| IptablesError::Run { program: program.clone(), source };
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).env("LC_ALL", "C");
    let mut child = command.spawn().map_err(|source| match source.kind() {
        ErrorKind::NotFound => IptablesError::Missing { program: program.clone() },
        _ => failed(source),
    })?;
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    let (input, output, complaints) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (done, is_done) = mpsc::channel::<()>();
    let (too_long, complaint) = thread::scope(|scope| {
        let watchdog = scope.spawn(move || is_killed_after(limit, pid, &is_done));
        let feeder = scope.spawn(move || input.map_or(Ok(()), |input| feed_all(input, feed)));
        let listener = scope.spawn(move || complaints.map(read_complaint).unwrap_or_default());
        let read = output.map_or(Ok(()), |output| read_lines(output, &mut line));
        let fed = feeder.join().unwrap_or_else(|_| Err(ErrorKind::Other.into()));
        let complaint = listener.join().unwrap_or_default();
        // The process stays a zombie until the watchdog is gone: so its number can't be another's when it is killed.
        let ended = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        drop(done);
        let too_long = watchdog.join().unwrap_or(false);
        read.and(fed).and(ended.map(|_| ()).map_err(io::Error::from)).map_err(failed)?;
        Ok((too_long, complaint))
    })
    .inspect_err(|_| reap(&mut child))?;
    let status = child.wait().map_err(failed)?;
    if too_long { Err(IptablesError::TooLong { program, limit }) } else { Ok(Ended { status, complaint }) }
}

/// The first error is the one to tell.
fn reap(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn is_killed_after(limit: Duration, pid: Pid, is_done: &mpsc::Receiver<()>) -> bool {
    let too_long = is_done.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
    if too_long {
        // It may have ended in this moment.
        let _ = kill(pid, Signal::SIGKILL);
    }
    too_long
}

/// A program that fails does not read its input to the end.
fn feed_all(input: impl Write, feed: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut input = BufWriter::with_capacity(64 * 1024, input);
    match feed(&mut input).and_then(|()| input.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

fn read_complaint(mut from: impl Read) -> String {
    let mut kept = Vec::new();
    // What it says is only for an error's text.
    let _ = from.by_ref().take(COMPLAINT_MAX).read_to_end(&mut kept);
    let _ = io::copy(&mut from, &mut io::sink());
    String::from_utf8_lossy(&kept).into_owned()
}

fn read_lines(output: impl Read, line: &mut impl FnMut(&str)) -> io::Result<()> {
    let mut output = BufReader::with_capacity(64 * 1024, output);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        if output.by_ref().take(LINE_MAX).read_until(b'\n', &mut bytes)? == 0 {
            return Ok(());
        }
        line(String::from_utf8_lossy(&bytes).trim_end_matches('\n'));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_output_and_complaints_pass() {
        let mut lines = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", "cat; echo oh >&2; exit 3"]);
        let text = "x".repeat(100_000) + "\nlast\n";
        let feed = |out: &mut dyn Write| out.write_all(text.as_bytes());
        let ended = run(&mut command, Duration::from_secs(20), feed, |line| lines.push(line.len())).unwrap();
        assert_eq!((ended.status.code(), ended.complaint.as_str()), (Some(3), "oh\n"));
        assert_eq!(lines.iter().sum::<usize>(), 100_004);
        assert_eq!(lines.last(), Some(&4));
    }

    #[test]
    fn a_program_that_does_not_read_is_no_error_of_ours() {
        let feed = |out: &mut dyn Write| (0..100_000).try_for_each(|_| out.write_all(b"unread\n"));
        let ended = run(&mut Command::new("false"), Duration::from_secs(20), feed, |_| {}).unwrap();
        assert_eq!(ended.status.code(), Some(1));
    }

    #[test]
    fn a_program_without_end_is_killed() {
        let limit = Duration::from_millis(50);
        let error = run(Command::new("sleep").arg("60"), limit, |_| Ok(()), |_| {}).unwrap_err();
        assert!(matches!(error, IptablesError::TooLong { .. }), "{error}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run(&mut Command::new("/no/such/program"), Duration::from_secs(1), |_| Ok(()), |_| {}).unwrap_err();
        assert_eq!(error.to_string(), "/no/such/program is not installed: install the package iptables (1.8 or later)");
    }
}
