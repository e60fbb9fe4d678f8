//! One address family of the backend: its maps, and the plan of what they hold.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use proxy_common::pod::Pod;
use proxy_common::{EndpointKey, FLOOD_TICKS, FrontendKey, NodeSettings, SourceRange};

use super::alloc::RangeAllocator;
use super::cluster_ips::ClusterIps;
use super::encode::{Circumstances, UserAddress, node_settings, with_service_networks_of};
use super::growth::Filled;
use super::maps::FamilyMaps;
use super::plan::{self, Planner, Writes};
use super::{EbpfConfig, EbpfError};
use crate::dataplane::SyncError;
use crate::model::{FrontendAddress, IpFamily, NodeConfig, ServicePort, ServicePortName, ServiceSnapshot};

/// What a process knows from its start on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Constants {
    /// Cookie of the node's network namespace.
    pub(super) netns_cookie: u64,
    /// Whether tunnels to other nodes are GUE.
    pub(super) tunnels_are_gue: bool,
    /// As in [`NodeSettings`].
    pub(super) flood_limit: u32,
}

/// New flows with direct server return that each CPU remembers a second before it leaves them to their Maglev tables: what a table of the
/// usual size (262,144 flows) takes in two seconds from one CPU.
const FLOOD_PER_SECOND: u32 = 125_000;

/// The same within the ticks in which they are counted.
fn flood_limit(ticks_per_second: u32) -> u32 {
    (FLOOD_PER_SECOND * FLOOD_TICKS / ticks_per_second.max(1)).max(1)
}

impl Constants {
    /// Those of this process.
    pub(super) fn of(config: &EbpfConfig) -> Result<Self, EbpfError> {
        Ok(Self {
            netns_cookie: node_sys::netns_cookie()?,
            tunnels_are_gue: config.tunnels_are_gue,
            flood_limit: flood_limit(node_sys::probe::ticks_per_second()?),
        })
    }
}

/// Maps and plan of one family.
pub(super) struct Family<A: UserAddress>
where
    NodeSettings<A>: aya::Pod,
    FrontendKey<A>: aya::Pod + Pod,
    SourceRange<A>: aya::Pod + Pod,
    EndpointKey<A>: aya::Pod + Pod,
{
    pub(super) maps: FamilyMaps<A>,
    pub(super) planner: Planner<A>,
    writes: Writes<A>,
    cluster_ips: ClusterIps<A>,
    /// What the kernel was last told of the node.
    settings: Option<NodeSettings<A>>,
    constants: Constants,
    /// Lowest and highest NodePort ever programmed; only grows, so that no packet meets a range that is too small.
    node_ports: Option<(u16, u16)>,
}

impl<A: UserAddress> Family<A>
where
    NodeSettings<A>: aya::Pod,
    FrontendKey<A>: aya::Pod + Pod,
    SourceRange<A>: aya::Pod + Pod,
    EndpointKey<A>: aya::Pod + Pod,
{
    /// Takes the maps out of the object; `suffix` ends their names.
    pub(super) fn take(ebpf: &mut aya::Ebpf, suffix: &str, constants: Constants) -> Result<Self, SyncError> {
        let maps = FamilyMaps::take(ebpf, suffix)?;
        let planner = Planner::new(maps.limits());
        let cluster_ips = ClusterIps::new(BTreeSet::new(), maps.cluster_ips_max());
        let writes = Writes::default();
        Ok(Self { maps, planner, writes, cluster_ips, settings: None, constants, node_ports: None })
    }

    /// Forgets what is believed and reads it from the kernel.
    pub(super) fn adopt(
        &mut self,
        desired: &ServiceSnapshot,
        family: IpFamily,
        service_ids: &mut RangeAllocator,
        now_ms: u64,
    ) -> Result<(), SyncError> {
        let found = self.maps.read()?;
        self.planner = Planner::new(self.maps.limits());
        self.writes = Writes::default();
        self.cluster_ips = ClusterIps::new(self.maps.cluster_ips()?, self.maps.cluster_ips_max());
        self.settings = None;
        let services = desired.services.values().filter(|service| service.name.family == family).map(Arc::as_ref);
        self.planner.adopt(&found, services, service_ids, now_ms, &mut self.writes);
        Ok(())
    }

    /// How full the maps are.
    pub(super) fn filled(&self) -> impl Iterator<Item = Filled> {
        let (used, room) = (self.cluster_ips.present().len() as u64, self.maps.cluster_ips_max() as u64);
        self.planner.filled().into_iter().chain([Filled { map: "cluster_ips", used, room }])
    }

    /// What is programmed and no longer desired.
    pub(super) fn stale<'a>(&'a self, desired: &'a ServiceSnapshot) -> impl Iterator<Item = ServicePortName> + 'a {
        self.planner.names().filter(|name| !desired.services.contains_key(*name)).cloned()
    }

    /// Plans one ServicePort; `None` removes it.
    pub(super) fn change(
        &mut self,
        name: &ServicePortName,
        desired: Option<&Arc<ServicePort>>,
        service_ids: &mut RangeAllocator,
        now_ms: u64,
    ) -> Result<plan::Planned, plan::Full> {
        if let Some(service) = desired {
            self.widen_node_ports(service);
        }
        self.planner.change(name, desired, service_ids, now_ms, &mut self.writes)
    }

    /// Writes what may go ahead of the rest of the plan, so that a plan for a whole cluster stays small.
    pub(super) fn write_ahead(&mut self) -> Result<usize, SyncError> {
        self.writes.take_unread().map_or(Ok(0), |unread| self.maps.write(&unread))
    }

    fn widen_node_ports(&mut self, service: &ServicePort) {
        let node_ports = service.frontends.iter().filter(|frontend| frontend.address == FrontendAddress::NodePort);
        for port in node_ports.map(|frontend| frontend.port) {
            let (min, max) = self.node_ports.unwrap_or((port, port));
            self.node_ports = Some((min.min(port), max.max(port)));
        }
    }

    /// Writes the node's facts, then the plan: a NodePort is in range before its frontend exists. The service networks come last:
    /// what is in them and not served is refused. `changed` are the ClusterIPs to look at; `None` is all of them.
    pub(super) fn commit(&mut self, desired: &ServiceSnapshot, changed: Option<&[IpAddr]>) -> Result<usize, SyncError> {
        let mut writes = std::mem::take(&mut self.writes);
        writes.keep_moved();
        let cluster_ips = match changed {
            Some(changed) => self.cluster_ips.change(changed.iter(), desired),
            None => self.cluster_ips.replace(desired),
        };
        let settings = self.node_settings(&desired.node);
        let known = self.settings.map_or_else(|| self.maps.settings(), Ok)?;
        self.write_settings(with_service_networks_of(settings, &known))?;
        let written = self.maps.write(&writes)?;
        for (address, in_use) in &cluster_ips {
            self.maps.write_cluster_ip(*address, *in_use)?;
        }
        self.write_settings(settings)?;
        if changed.is_none() {
            self.maps.write_absent(self.planner.frontends(), self.cluster_ips.present())?;
        }
        Ok(written + cluster_ips.len())
    }

    /// Whether tunnels to other nodes are GUE, from the next commit on.
    pub(super) fn set_tunnels(&mut self, gue: bool) {
        self.constants.tunnels_are_gue = gue;
    }

    fn node_settings(&self, node: &NodeConfig) -> NodeSettings<A> {
        let circumstances = Circumstances {
            node_ports: self.node_ports.unwrap_or((u16::MAX, 0)),
            netns_cookie: self.constants.netns_cookie,
            cluster_ips_anywhere: self.cluster_ips.anywhere(),
            direct_tables: self.planner.has_direct_tables(),
            tunnels_are_gue: self.constants.tunnels_are_gue,
            flood_limit: self.constants.flood_limit,
        };
        node_settings(node, circumstances)
    }

    /// Packets read the facts while they are written, so they are written only where they differ.
    fn write_settings(&mut self, settings: NodeSettings<A>) -> Result<(), SyncError> {
        if self.settings != Some(settings) {
            self.maps.write_settings(&settings)?;
            self.settings = Some(settings);
        }
        Ok(())
    }

    /// The maps that do not hold what they were given, and in how many entries. Before the first sync there is nothing to hold.
    pub(super) fn differences(&self) -> Result<Vec<(&'static str, usize)>, SyncError> {
        let Some(settings) = &self.settings else { return Ok(Vec::new()) };
        self.maps.differences(settings, &self.planner, self.cluster_ips.present())
    }
}
