//! What forwarding a packet costs: live frames, as if the client's pod had sent them, up the node's stack and out to the server's pod.
//!
//! The kernel runs a program that makes the frames (`BPF_F_TEST_XDP_LIVE_FRAMES`) and takes what it passes for received. In the server's
//! pod a tc program counts the datagrams and drops them, so nothing behind it is part of the time. Datagrams, because nobody has
//! to answer them for them to be a flow that is known.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::programs::tc::SchedClassifierLink;
use aya::programs::{SchedClassifier, TcAttachType};
use benches::frame::{self, LINK_ADDRESS};
use benches::programs::{Programs, Sizes, Traffic};
use ipnet::{IpNet, Ipv4Net};
use nix::net::if_::if_nametoindex;
use trama_cni::{NetlinkError, Route, in_netns};
use trama_lab::{Cluster, link_address, wait_for};

use crate::contender::{Contender, DATAGRAM_PORT};

/// Frames that are made and passed, and made and dropped.
const PASS: &str = "wrapper_only_xdp";
const DROP: &str = "generate_and_drop";
const SINK: &str = "sink";
/// The pod's interface.
const POD_INTERFACE: &str = "eth0";
/// How long the last datagram may take.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(5);
/// Offset of the UDP checksum in an IPv4 frame.
const CHECKSUM: usize = 40;
/// Flows of the row with many; the generator has 32768 ports.
pub(crate) const MANY: u32 = 16_384;

/// Pods that no node of the cluster has: the upper half of the lab's IPv4 pod network, of which nodes have the lower.
const NEW_SOURCES: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 128, 0), 17);

/// How the sources of a slice's datagrams vary.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Flows {
    /// The same for all of them.
    One,
    /// [`MANY`] sources, which come again.
    Many,
    /// As many sources as datagrams, at an address that no other slice of the node has: every datagram is a new flow.
    New(IpAddr),
}

/// The address that the datagrams of new flows come from in this round, counted through the whole run.
pub(crate) fn new_source(round: u16) -> IpAddr {
    let offset = u32::from(round) & u32::from(NEW_SOURCES.hostmask());
    Ipv4Addr::from(u32::from(NEW_SOURCES.network()) | offset).into()
}

/// The programs of one contender.
pub(crate) struct Live {
    programs: Programs,
    // Counts for as long as it is attached.
    _sink: SchedClassifierLink,
    link: [u8; LINK_ADDRESS],
    source: SocketAddr,
    target: SocketAddr,
}

impl Live {
    /// Attaches the end of the way, and readies the beginning.
    pub(crate) fn new(cluster: &Cluster, contender: &Contender) -> Result<Self> {
        let node = cluster.topology().node(contender.node)?;
        let interface = contender.client.host_interface();
        let index = node.netns().run(|| if_nametoindex(interface))??;
        // Without a way back to its source the node drops a packet (rp_filter).
        let route = Route { to: IpNet::V4(NEW_SOURCES), via: None, interface: index };
        in_netns(node.netns(), async |session| -> Result<(), NetlinkError> { session.set_route(route).await })?;
        // The maps of the packet path are in the object too, and nobody looks into them here.
        let sizes = Sizes { services: 1, endpoints: 1, flows: 64, ..Sizes::default() };
        let mut programs = Programs::load_only(index, &sizes, &[PASS, DROP, SINK])?;
        let sink: &mut SchedClassifier = programs.program(SINK)?.try_into()?;
        let attach = || sink.attach(POD_INTERFACE, TcAttachType::Ingress);
        let id = contender
            .server
            .place()
            .netns()
            .run(attach)?
            .context("cannot attach the end of the way; it takes Linux 6.6")?;
        let sink: &mut SchedClassifier = programs.program(SINK)?.try_into()?;
        let sink = sink.take_link(id)?;
        Ok(Self {
            programs,
            _sink: sink,
            link: link_address(node.netns(), interface)?,
            source: SocketAddr::new(contender.client.addresses()[0], 0),
            target: SocketAddr::new(contender.service, DATAGRAM_PORT),
        })
    }

    /// Nanoseconds a datagram, its making included; all of them arrive, or it fails. The kernel's thread for such work may have the
    /// rest of the last batches left when the kernel stops its clock, a thousand datagrams at most.
    pub(crate) fn forward(&mut self, cluster: &Cluster, node: usize, flows: Flows, packets: u32) -> Result<f64> {
        let traffic = self.traffic(flows);
        self.programs.set_traffic(&traffic)?;
        let netns = cluster.topology().node(node)?.netns();
        let before = self.programs.arrived()?;
        let mean = netns.run(|| self.programs.send_live(PASS, &traffic.frame, packets))??;
        let mut arrived = self.programs.arrived()? - before;
        if arrived < packets.into() {
            let all = || {
                arrived = self.programs.arrived()? - before;
                Ok((arrived >= packets.into()).then_some(()))
            };
            wait_for("the arrival of every datagram", ARRIVAL_LIMIT, all)
                .with_context(|| format!("{arrived} of {packets} arrived"))?;
        }
        ensure!(arrived == u64::from(packets), "{arrived} datagrams arrived of {packets}");
        Ok(mean.as_nanos() as f64)
    }

    /// Nanoseconds of a frame that is made and dropped at once.
    pub(crate) fn floor(&mut self, cluster: &Cluster, node: usize, packets: u32) -> Result<f64> {
        let traffic = self.traffic(Flows::One);
        self.programs.set_traffic(&traffic)?;
        let netns = cluster.topology().node(node)?.netns();
        Ok(netns.run(|| self.programs.send_live(DROP, &traffic.frame, packets))??.as_nanos() as f64)
    }

    /// A frame as the client's pod would send it, without a UDP checksum: the source ports vary, and zero says that there is none.
    fn traffic(&self, flows: Flows) -> Traffic {
        let (source, flows) = match flows {
            Flows::One => (self.source.ip(), 1),
            Flows::Many => (self.source.ip(), MANY),
            Flows::New(source) => (source, MANY * 2),
        };
        let mut frame = frame::udp(SocketAddr::new(source, 0), self.target);
        for (byte, of_link) in frame.iter_mut().zip(self.link) {
            *byte = of_link;
        }
        for byte in frame.iter_mut().skip(CHECKSUM).take(2) {
            *byte = 0;
        }
        Traffic { frame, flows: Some(flows) }
    }
}
