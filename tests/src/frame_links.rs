//! Links that do for XDP what network cards do.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use aya::EbpfLoader;
use aya::programs::{Xdp, XdpMode};
use trama_proxy::dataplane::ebpf::OBJECT;

use crate::Topology;

/// Maps that need no room where the program only passes frames on.
pub(crate) const LARGE_MAPS: [&str; 8] =
    ["FRONTENDS_V4", "FRONTENDS_V6", "SLOTS_V4", "SLOTS_V6", "BACKENDS_V4", "BACKENDS_V6", "FLOWS_V4", "FLOWS_V6"];

/// The uplinks of a [`Topology`], prepared for XDP programs until this is dropped. A veth pair hands over checksums that are still to be
/// computed, which no card receives; and it takes a frame that a program sends back only where another program stands at its other end
/// (drivers/net/veth.c, `veth_xdp_flush`). So checksums are computed when sent, and the switch's ports carry a program without a Service.
#[derive(Debug)]
pub struct FrameLinks {
    _programs: aya::Ebpf,
}

impl FrameLinks {
    /// Prepares every uplink.
    ///
    /// # Errors
    /// When ethtool cannot be run or refuses, or a port refuses the program.
    pub fn of(topology: &Topology) -> Result<Self> {
        let (switch, machines) = topology.switch_and_machines();
        machines.iter().try_for_each(|netns| netns.run(compute_checksums)?)?;
        let mut loader = EbpfLoader::new();
        for map in LARGE_MAPS {
            loader.map_max_entries(map, 2);
        }
        let mut programs = loader.load(OBJECT).context("cannot load the programs of the links")?;
        let program: &mut Xdp = programs.program_mut("xdp_ingress").context("no XDP program")?.try_into()?;
        program.load()?;
        switch.run(|| -> Result<()> {
            for interface in &nix::net::if_::if_nameindex()? {
                let name = interface.name().to_string_lossy();
                if name != "lo" && name != "br0" {
                    program.attach_to_if_index(interface.index(), XdpMode::Driver)?;
                }
            }
            Ok(())
        })??;
        Ok(Self { _programs: programs })
    }
}

fn compute_checksums() -> Result<()> {
    let output = Command::new("ethtool").args(["-K", "eth0", "tx", "off"]).output().context("cannot run ethtool")?;
    ensure!(output.status.success(), "ethtool -K eth0 tx off: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
