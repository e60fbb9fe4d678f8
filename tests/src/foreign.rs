//! Programs of somebody else on the hooks that trama-proxy uses: they let every packet go on, and the kernel counts how often they ran.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, Xdp, XdpMode};
use aya::sys::{Stats, enable_stats};
use aya::{Ebpf, EbpfLoader};
use node_sys::Netns;
use trama_proxy::dataplane::ebpf::OBJECT;

use crate::frame_links::LARGE_MAPS;

/// The programs that stand for somebody else's: our own, which without a Service do nothing.
const HOOKS: [(&str, TcAttachType); 2] = [("tc_ingress", TcAttachType::Ingress), ("tc_egress", TcAttachType::Egress)];
const XDP: &str = "xdp_ingress";

/// Somebody else's programs; what is attached is detached when this is dropped.
#[derive(Debug)]
pub struct Foreign {
    programs: Ebpf,
    /// The kernel counts runs as long as this is open.
    _counting: OwnedFd,
}

impl Foreign {
    /// Loads them; none is attached.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn load() -> Result<Self> {
        let mut loader = EbpfLoader::new();
        for map in LARGE_MAPS {
            loader.map_max_entries(map, 2);
        }
        let mut programs = loader.load(OBJECT).context("cannot load somebody else's programs")?;
        for (name, _) in HOOKS {
            let program: &mut SchedClassifier = programs.program_mut(name).context("no tc program")?.try_into()?;
            program.load()?;
        }
        let program: &mut Xdp = programs.program_mut(XDP).context("no XDP program")?.try_into()?;
        program.load()?;
        Ok(Self { programs, _counting: enable_stats(Stats::RunTime)? })
    }

    /// Attaches the tc programs in both directions: before all others that are there, or behind them.
    ///
    /// # Errors
    /// When there is no such interface in `netns`, or no TCX.
    pub fn attach_tc(&mut self, netns: &Netns, interface: &str, before: bool) -> Result<()> {
        for (name, direction) in HOOKS {
            let order = if before { LinkOrder::first() } else { LinkOrder::last() };
            let program: &mut SchedClassifier = self.programs.program_mut(name).context("no tc program")?.try_into()?;
            netns.run(|| program.attach_with_options(interface, direction, TcAttachOptions::TcxOrder(order)))??;
        }
        Ok(())
    }

    /// Attaches the XDP program, of which an interface has one.
    ///
    /// # Errors
    /// When there is no such interface in `netns`, or it has one.
    pub fn attach_xdp(&mut self, netns: &Netns, interface: &str) -> Result<()> {
        let program: &mut Xdp = self.programs.program_mut(XDP).context("no XDP program")?.try_into()?;
        netns.run(|| program.attach(interface, XdpMode::Driver))??;
        Ok(())
    }

    /// How often all of them ran.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn runs(&self) -> Result<u64> {
        let infos =
            self.programs.programs().filter(|(name, _)| *name == XDP || HOOKS.iter().any(|(hook, _)| hook == name));
        infos.map(|(_, program)| Ok(program.info()?.run_count())).sum()
    }
}
