//! `trama-proxy status`.

use std::process::ExitCode;

use super::client::ask;
use super::{CommandError, Node, Output, print_line};
use crate::dataplane::ebpf::inspect::Pinned;
use crate::status::Status;

/// Prints what the process says, or what the pins tell.
pub(super) fn run(node: &Node, output: Output) -> Result<ExitCode, CommandError> {
    let status = read(node)?;
    let text = match output {
        Output::Table => status.to_string(),
        Output::Json => serde_json::to_string_pretty(&status)?,
    };
    print_line(text.trim_end())?;
    Ok(ExitCode::SUCCESS)
}

fn read(node: &Node) -> Result<Status, CommandError> {
    let address = node.metrics_bind_address;
    match ask(address, "/status") {
        Ok(status) => Ok(status),
        Err(reason) => match Pinned::find(&node.bpffs) {
            Ok(pinned) => Ok(pinned.status()?),
            Err(pins) => Err(CommandError::Nobody { address, reason, pins }),
        },
    }
}
