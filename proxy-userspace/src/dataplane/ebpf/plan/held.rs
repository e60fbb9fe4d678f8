//! What the kernel's maps hold when every plan so far is written.

use std::net::SocketAddr;

use proxy_common::{Backend, Frontend, FrontendKey};

use super::{Planner, Range, UserAddress};
use crate::model::ServicePortName;

impl<A: UserAddress> Planner<A> {
    /// Every frontend that is programmed, with its value.
    pub(in crate::dataplane::ebpf) fn frontends(&self) -> impl Iterator<Item = &(FrontendKey<A>, Frontend)> {
        let all =
            self.services.values().flat_map(|service| service.frontends.iter().map(move |entry| (service, entry)));
        // A frontend that moved is still listed with its old owner until that one changes.
        all.filter(|(service, (key, _))| self.owners.get(key) == Some(&service.service_id)).map(|(_, entry)| entry)
    }

    /// Every slot in use, with its backend id.
    pub(in crate::dataplane::ebpf) fn slots(&self) -> impl Iterator<Item = (u32, u32)> {
        self.services.values().flat_map(|service| (service.layout.first..).zip(service.layout.ids.iter().copied()))
    }

    /// Every backend that takes or keeps flows.
    pub(in crate::dataplane::ebpf) fn backends(&self) -> impl Iterator<Item = (u32, Backend<A>)> {
        self.services.values().flat_map(|service| {
            service.backends.iter().map(|placed| (placed.id, self.backend(placed, service.service_id)))
        })
    }

    /// Every ServicePort that is programmed, with its id.
    pub(in crate::dataplane::ebpf) fn service_ids(&self) -> impl Iterator<Item = (&ServicePortName, u32)> {
        self.services.iter().map(|(name, service)| (name, service.service_id))
    }

    /// The id of a ServicePort; `None` while it is not programmed.
    pub(in crate::dataplane::ebpf) fn service_id(&self, name: &ServicePortName) -> Option<u32> {
        self.services.get(name).map(|service| service.service_id)
    }

    /// The endpoints of a ServicePort, with their backend ids.
    pub(in crate::dataplane::ebpf) fn endpoints(
        &self,
        name: &ServicePortName,
    ) -> impl Iterator<Item = (u32, SocketAddr)> {
        let placed = self.services.get(name).into_iter().flat_map(|service| &service.backends);
        placed.map(|placed| (placed.id, SocketAddr::new(placed.address.to_ip(), placed.port.to_host())))
    }

    /// Every client network that is let in.
    pub(in crate::dataplane::ebpf) fn ranges(&self) -> impl Iterator<Item = &Range<A>> {
        self.services.values().flat_map(|service| &service.ranges)
    }
}
