//! Why iptables can't be used, or did not do what it was told.

use std::io;
use std::time::Duration;

use super::Variant;

/// What failed, and what to look at next.
#[derive(Debug, thiserror::Error)]
pub enum IptablesError {
    /// A program is not installed.
    #[error("{program} is not installed: install the package iptables (1.8 or later)")]
    Missing {
        /// Its name.
        program: String,
    },
    /// None of the programs is installed.
    #[error(
        "no iptables is installed, neither iptables-nft nor iptables-legacy: install the package iptables (1.8 or later)"
    )]
    NoneInstalled,
    /// A program can't be run.
    #[error("cannot run {program}: {source}")]
    Run {
        /// Its name.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program did not end in time and was killed.
    #[error("{program} was killed: it was not done after {} s", limit.as_secs())]
    TooLong {
        /// Its name.
        program: String,
        /// How long it had.
        limit: Duration,
    },
    /// A program failed.
    #[error("{program} failed: {said}{}", quoted.as_ref().map(|line| format!("; the line is: {line}")).unwrap_or_default())]
    Failed {
        /// Its name.
        program: String,
        /// The last line that it said.
        said: String,
        /// The line of its input that it named.
        quoted: Option<String>,
    },
    /// A kernel parameter can't be set.
    #[error("cannot let NodePorts answer on 127.0.0.1: {source}; --iptables-localhost-nodeports=false does without")]
    RouteLocalnet {
        /// What the kernel says.
        #[source]
        source: node_sys::SysError,
    },
    /// The rules of the other variant could not be removed.
    #[error("cannot remove what is left in iptables-{variant}: {source}")]
    Leftover {
        /// Which one.
        variant: Variant,
        /// Why.
        #[source]
        source: Box<Self>,
    },
}
