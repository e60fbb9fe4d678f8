//! The XDP program on the interfaces that the configuration names: native where the driver can, generic only when asked for. An
//! interface that refuses it does without: its tc hooks do the same work.

use std::collections::BTreeSet;
use std::path::Path;

use aya::Ebpf;
use aya::maps::MapData;
use aya::maps::xdp::DevMapHash;
use aya::programs::links::FdLink;
use aya::programs::{Xdp, XdpMode};
use node_sys::netdev;

use super::EbpfConfig;
use super::attach::{attach, pin_link, replace_pinned};
use super::error::EbpfError;
use super::interfaces::is_named;
use super::maps::{open, take};
use super::programs::Programs;

/// The program's name, and its pins' but for the interface.
pub(super) const FRAME_PROGRAM: &str = "xdp_ingress";

/// Where the XDP program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FrameMode {
    /// In the driver.
    #[default]
    Native,
    /// Behind it, when the kernel has made a socket buffer: for trials, nothing is gained by it.
    Generic,
}

/// What carries the XDP program.
pub(super) struct FrameHook {
    patterns: Vec<String>,
    mode: FrameMode,
    devices: DevMapHash<MapData>,
    /// Interfaces that VLAN devices lie on.
    vlan_parents: BTreeSet<u32>,
    /// Interfaces that refused it, named in the log once.
    refused: BTreeSet<u32>,
}

impl FrameHook {
    pub(super) fn take(ebpf: &mut Ebpf, config: &EbpfConfig) -> Result<Self, EbpfError> {
        let devices = open(take(ebpf, "DEVICES")?, "devices")?;
        Ok(Self {
            patterns: config.xdp_interfaces.clone(),
            mode: config.xdp_mode,
            devices,
            vlan_parents: BTreeSet::new(),
            refused: BTreeSet::new(),
        })
    }

    /// Says which interfaces VLAN devices lie on. Returns those for which [`Self::attach`] may do something else now.
    pub(super) fn set_vlan_parents(&mut self, parents: &BTreeSet<u32>) -> BTreeSet<u32> {
        let changed = match self.mode {
            FrameMode::Native => BTreeSet::new(),
            FrameMode::Generic => parents.symmetric_difference(&self.vlan_parents).copied().collect(),
        };
        self.vlan_parents.clone_from(parents);
        changed
    }

    /// With generic XDP at the parent a NodePort at a VLAN's address was not answered (seen on 6.1): the program does not see the tag, and what
    /// it sends on likely keeps it.
    fn mixes_up_vlans(&self, index: u32) -> bool {
        self.mode == FrameMode::Generic && self.vlan_parents.contains(&index)
    }

    /// Attaches the program, or puts it in the place of an earlier process's; takes that one's away where it is not wanted any more.
    /// Whether it was not there.
    pub(super) fn attach(&mut self, programs: &mut Programs, pin: &Path, index: u32, interface: &str) -> bool {
        if !is_named(&self.patterns, interface) {
            self.detach(pin, index);
            return false;
        }
        if self.mixes_up_vlans(index) {
            self.detach(pin, index);
            if self.refused.insert(index) {
                tracing::warn!(interface, "no generic XDP where VLAN devices are: its packets take the tc hook");
            }
            return false;
        }
        match self.replace_or_attach(programs, pin, index, interface) {
            Ok(new) => {
                self.offer(index, interface);
                self.refused.remove(&index);
                new
            }
            Err(error) => {
                if self.refused.insert(index) {
                    tracing::warn!(interface, %error, "no XDP here: its packets take the tc hook");
                }
                false
            }
        }
    }

    /// Takes away the program that is there, by its pin.
    fn detach(&mut self, pin: &Path, index: u32) {
        if pin.exists() {
            self.forget(index);
            let _gone = std::fs::remove_file(pin);
        }
    }

    fn replace_or_attach(&self, programs: &mut Programs, pin: &Path, index: u32, on: &str) -> Result<bool, EbpfError> {
        let program: &mut Xdp = programs.get_as(FRAME_PROGRAM)?;
        let fd = program.fd().map_err(|source| attach(FRAME_PROGRAM, on, source))?.try_clone();
        let fd = fd.map_err(|source| attach(FRAME_PROGRAM, on, source))?;
        if replace_pinned(pin, std::os::fd::AsFd::as_fd(&fd)) {
            return Ok(false);
        }
        let mode = match self.mode {
            FrameMode::Native => XdpMode::Driver,
            FrameMode::Generic => XdpMode::Skb,
        };
        let id = program.attach_to_if_index(index, mode).map_err(|source| attach(FRAME_PROGRAM, on, source))?;
        let link = program.take_link(id).map_err(|source| attach(FRAME_PROGRAM, on, source))?;
        pin_link(FdLink::try_from(link).map_err(|source| attach(FRAME_PROGRAM, on, source))?, pin)?;
        Ok(true)
    }

    /// Lets other interfaces send frames out through this one, where its driver takes them. Without that, frames that leave elsewhere than
    /// they came in take the tc hook.
    fn offer(&mut self, index: u32, interface: &str) {
        let takes = self.mode == FrameMode::Generic || matches!(netdev::takes_frames(index), Ok(Some(true)));
        if !takes {
            return;
        }
        if let Err(error) = self.devices.insert(index, index, None, 0) {
            tracing::warn!(interface, %error, "frames cannot be redirected to this interface");
        }
    }

    /// The interface is gone, or carries the program no more.
    pub(super) fn forget(&mut self, index: u32) {
        self.refused.remove(&index);
        let _absent = self.devices.remove(index);
    }
}
