//! `trama-proxy explain`.

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::str::FromStr;

use clap::Args;
use futures::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use proxy_common::decide::Crossing;
use serde_json::json;

use super::client::Names;
use super::{CommandError, Node, Output, print_line};
use crate::dataplane::ebpf::inspect::{Agreement, Explanation, Pinned, Question};
use crate::model::Protocol;

/// What becomes of a packet and why, step by step, and whether the kernel's program does the same
#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    node: Node,
    /// Where the packet comes from
    #[arg(value_name = "SRC")]
    source: IpAddr,
    /// Where it goes: 10.96.0.1:80/TCP, [fd00::1]:53/UDP
    #[arg(value_name = "DST:PORT/PROTO")]
    destination: Destination,
    /// The interface that it crosses [default: where the route to SRC leads; to DST, if SRC is this node]
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// Address, port and protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Destination {
    address: SocketAddr,
    protocol: Protocol,
}

impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, protocol) = text.rsplit_once('/').unwrap_or((text, "TCP"));
        let protocol = match protocol.to_ascii_uppercase().as_str() {
            "TCP" => Protocol::Tcp,
            "UDP" => Protocol::Udp,
            "SCTP" => Protocol::Sctp,
            other => return Err(format!("{other:?} is none of TCP, UDP and SCTP")),
        };
        let address = address
            .parse()
            .map_err(|_| format!("{address:?} is no address with a port, such as 10.96.0.1:80 or [fd00::1]:80"))?;
        Ok(Self { address, protocol })
    }
}

/// Explains one packet.
pub(super) fn run(options: &Options) -> Result<ExitCode, CommandError> {
    let Destination { address: destination, protocol } = options.destination;
    let source = options.source;
    if source.is_ipv4() != destination.is_ipv4() {
        return Err(CommandError::Question(format!("{source} and {destination} are of different families")));
    }
    let pinned = Pinned::find(&options.node.bpffs)?;
    // What the node sends goes out; everything else comes in.
    let egress = pinned.is_own(source)?;
    let interface = match &options.interface {
        Some(name) => nix::net::if_::if_nametoindex(name.as_str())
            .map_err(|error| CommandError::Question(format!("no interface {name}: {error}")))?,
        None => route(if egress { destination.ip() } else { source })?,
    };
    let question = Question { source, destination, protocol, crossing: Crossing { interface, egress } };
    let explanation = pinned.explain(&question, Names::ask_if_any(&options.node).all())?;
    match options.output {
        Output::Table => print_line(&text(&explanation))?,
        Output::Json => print_line(&json(&explanation).to_string())?,
    };
    Ok(if explanation.agreement == Agreement::Agree { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(explanation: &Explanation) -> String {
    let agreement = match explanation.agreement {
        Agreement::Agree => "the kernel's program agrees",
        Agreement::Differ => "THE KERNEL'S PROGRAM DOES SOMETHING ELSE",
    };
    format!(
        "{}\ndecision    {}\nkernel      {}\n{agreement}",
        explanation.steps.join("\n"),
        explanation.decision,
        explanation.kernel
    )
}

fn json(explanation: &Explanation) -> serde_json::Value {
    json!({
        "steps": explanation.steps,
        "decision": explanation.decision,
        "kernel": explanation.kernel,
        "agree": explanation.agreement == Agreement::Agree,
    })
}

/// The interface to which the kernel routes what is for `address`.
fn route(address: IpAddr) -> Result<u32, CommandError> {
    let failed = |reason: String| CommandError::Route { address, reason };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let runtime = runtime.map_err(|error| failed(error.to_string()))?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|error| failed(error.to_string()))?;
        let connection = tokio::spawn(connection);
        let mut query = RouteMessage::default();
        let (family, destination, bits) = match address {
            IpAddr::V4(v4) => (AddressFamily::Inet, RouteAddress::Inet(v4), 32),
            IpAddr::V6(v6) => (AddressFamily::Inet6, RouteAddress::Inet6(v6), 128),
        };
        query.header.address_family = family;
        query.header.destination_prefix_length = bits;
        query.attributes.push(RouteAttribute::Destination(destination));
        let answer = handle.route().get(query).execute().try_next().await;
        connection.abort();
        let route = answer.map_err(|error| failed(error.to_string()))?;
        let interface = route.iter().flat_map(|route| &route.attributes).find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        });
        interface.ok_or_else(|| failed("there is no route".to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_with_and_without_a_protocol() {
        let read = |text: &str| text.parse::<Destination>();
        let of = |address: &str, protocol| Ok(Destination { address: address.parse().unwrap(), protocol });
        assert_eq!(read("10.96.0.1:80"), of("10.96.0.1:80", Protocol::Tcp));
        assert_eq!(read("10.96.0.1:53/udp"), of("10.96.0.1:53", Protocol::Udp));
        assert_eq!(read("[fd00::1]:80/SCTP"), of("[fd00::1]:80", Protocol::Sctp));
        assert!(read("10.96.0.1:80/ICMP").unwrap_err().contains("ICMP"));
        assert!(read("10.96.0.1").unwrap_err().contains("port"));
    }
}
