//! Rows of direct server return in the driver: the frame goes to its endpoint's node in a tunnel.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use benches::frame::{self, ACK, SYN};
use benches::programs::{Sizes, Traffic};
use benches::services::Services;
use proxy_common::Counter;

use super::{ALONE, EVER_NEW, Expect, Family, Hook, MANY, MILLION, Opened, Subject, XDP, services};
use crate::rows::Bench;

const DIRECT: Hook = Hook { name: "XDP DSR (IPIP)", program: "wrapped_xdp_direct", ..XDP };
/// Rows of open flows, and how many they are.
const ESTABLISHED: [(&str, u32); 3] =
    [("established, 1 flow", 1), ("established, 64k flows", MANY), ("established, 1M flows", MILLION)];
const NEW: &str = "new flow each, entry written";
const FLOOD: &str = "new flow each, flood: none is remembered";
/// Source of the tunnels, by family.
const NODES: [&str; 2] = ["10.9.0.1", "fd00:9::1"];
/// Bytes of a frame in front of the network header.
const ETHERNET: usize = 14;

/// What the service of a row is.
#[derive(Clone, Copy)]
struct Kind {
    maglev: bool,
    flood_limit: u32,
}

const ONE: Kind = Kind { maglev: false, flood_limit: 0 };
/// With a table that finds every packet's endpoint, and one flow in each span of time that is remembered.
const FLOODED: Kind = Kind { maglev: true, flood_limit: 1 };

fn label(family: Family, what: &str) -> String {
    format!("{} {}, {what}", family.name, DIRECT.name)
}

impl Bench<'_> {
    /// Established and new rows of a service with direct server return.
    pub(super) fn direct(&mut self, family: Family) -> Result<()> {
        // Only the IPv4 table is made larger than usual.
        let rows = if family.frontend.is_ipv4() { &ESTABLISHED[..] } else { &ESTABLISHED[..2] };
        for (what, flows) in
            rows.iter().filter(|(what, _)| self.wants(&label(family, what))).copied().collect::<Vec<_>>()
        {
            let mut subject = self.open_direct(family, flows, ONE)?;
            let traffic = |flags| Traffic { frame: family.packet(flags), flows: Some(flows) };
            subject.programs.set_traffic(&traffic(SYN))?;
            subject.programs.time(DIRECT.program, &family.packet(SYN), flows)?;
            self.traffic_rows(&mut [subject], DIRECT, |_| label(family, what), |_| traffic(ACK), Expect::Redirect)?;
        }
        if self.wants(&label(family, NEW)) {
            let subject = self.open_direct(family, 1, ONE)?;
            self.new_direct(family, NEW, &mut [subject])?;
        }
        if self.wants(&label(family, FLOOD)) {
            let mut subject = [self.open_direct(family, 1, FLOODED)?];
            self.new_direct(family, FLOOD, &mut subject)?;
            let [Subject { programs, sent, .. }] = &mut subject;
            let forgotten = programs.counted(Counter::FlowNotRemembered)?;
            ensure!(forgotten * 100 >= u64::from(*sent) * 99, "{forgotten} of {sent} flows were not remembered");
        }
        Ok(())
    }

    fn new_direct(&mut self, family: Family, what: &str, subject: &mut [Subject]) -> Result<()> {
        let traffic = |_: &Subject| Traffic { frame: family.packet(SYN), flows: Some(EVER_NEW) };
        self.traffic_rows(subject, DIRECT, |_| label(family, what), traffic, Expect::Redirect)
    }

    /// Loads the programs; the first packets of a flow must be right in every byte.
    fn open_direct(&self, family: Family, flows: u32, kind: Kind) -> Result<Subject> {
        let Kind { maglev, flood_limit } = kind;
        let services = Services { direct_return: true, maglev, flood_limit, ..services(family, DIRECT, 1) };
        let sizes = Sizes { flows: Sizes::default().flows.max(flows), ..Sizes::default() };
        let mut programs = self.programs(&sizes, &services)?;
        for flags in [SYN, ACK] {
            let frame = family.packet(flags);
            programs.set_traffic(&Traffic { frame: frame.clone(), flows: Some(1) })?;
            let (verdict, out) = programs.one(DIRECT.program, &frame)?;
            ensure!(verdict == DIRECT.redirect, "{}: verdict {verdict}", label(family, "the first packets"));
            check(&out, family, &services).with_context(|| label(family, "the first packets"))?;
        }
        Ok(Subject { setting: ALONE, programs, flow: Opened::NONE, sent: 0 })
    }
}

/// The frame must be the client's, one hop on, in a tunnel from the node to an endpoint.
fn check(out: &[u8], family: Family, services: &Services) -> Result<()> {
    let (header, node) = if family.frontend.is_ipv4() { (20, NODES[0]) } else { (40, NODES[1]) };
    let (ethernet, packet) = out.split_at_checked(ETHERNET).context("no frame came out")?;
    let (tunnel, inside) = packet.split_at_checked(header).context("no packet came out")?;
    let [source, destination] = addresses(tunnel).context("the tunnel's header is cut short")?;
    ensure!(source == node.parse::<IpAddr>()?, "the tunnel comes from {source}");
    ensure!(services.is_backend(destination), "{destination} is no endpoint of the service");
    let length = |at: usize| Some(usize::from(u16::from_be_bytes(tunnel.get(at..at + 2)?.try_into().ok()?)));
    if family.frontend.is_ipv4() {
        ensure!(length(2) == Some(header + inside.len()), "the tunnel's length");
        ensure!(tunnel.get(9) == Some(&4) && frame::checksum_is_right(tunnel), "the tunnel's protocol or checksum");
    } else {
        ensure!(length(4) == Some(inside.len()) && tunnel.get(6) == Some(&41), "the tunnel's length or protocol");
    }
    frame::check(&[ethernet, inside].concat(), family.client, family.frontend, 1)
}

/// Source and destination of a network header.
fn addresses(header: &[u8]) -> Option<[IpAddr; 2]> {
    if header.len() == 20 {
        let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(header.get(at..at + 4)?).ok()?));
        return Some([address(12)?, address(16)?]);
    }
    let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(header.get(at..at + 16)?).ok()?));
    Some([address(8)?, address(24)?])
}
