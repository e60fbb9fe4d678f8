//! A long-running program of a lab: its log goes to a file, and its early end is reported with the log's last lines.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use node_sys::Placement;

use crate::Claim;

/// Lines of the log that an error quotes.
const QUOTED_LINES: usize = 5;

/// A running program; dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command` in its place; the log is `NAME.log` in the lab's folder, and grows over restarts.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(claim: &Claim, name: &str, command: &mut Command, placement: Placement<'_>) -> Result<Self> {
        let log = claim.folder().join(format!("{name}.log"));
        let open = || File::options().create(true).append(true).open(&log);
        let file = open().with_context(|| format!("cannot write {}", log.display()))?;
        let errors = file.try_clone().context("cannot duplicate the log's descriptor")?;
        command.stdin(Stdio::null()).stdout(file).stderr(errors);
        let child = claim.spawn(command, placement)?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// Where it logs.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails when the program has ended, with what it said last.
    ///
    /// # Errors
    /// When it has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait().with_context(|| format!("cannot examine {}", self.name))? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}; it said:\n{}", self.name, self.last_words()),
        }
    }

    /// Kills it with SIGKILL: it has no chance to clean up.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("cannot kill {}", self.name))?;
        self.child.wait().with_context(|| format!("cannot wait for {}", self.name))?;
        Ok(())
    }

    /// The last lines of its log.
    pub(crate) fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let start = lines.len().saturating_sub(QUOTED_LINES);
        lines.get(start..).unwrap_or_default().join("\n")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself, and the lab's removal kills whatever is left.
        let _ = self.kill();
    }
}
