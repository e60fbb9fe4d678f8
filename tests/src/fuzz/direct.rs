//! Direct server return in the model: what comes in a tunnel, and packets for which a Maglev table finds an endpoint.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use trama_proxy::dataplane::ebpf::Hook;
use trama_proxy::model::{Action, Algorithm, EndpointSet, Frontend, FrontendKind, IpFamily, PodTraffic, ServicePort};

use super::bed::{Link, is_local, is_own};
use super::fate::Given;
use super::judge::{State, Verdict};
use super::model::{Candidate, Crossing, Meaning, Model, is_nobody};
use super::read::{ETHERNET, Kind, Outline, RST, Tuple, ends, has_ports, is_error, outline_v4, outline_v6, read};
use super::tunnel::Tunnel;
use crate::packet::TCP;

/// Farthest offset of a transport header that is looked at in a tunnel.
const OFFSET_MAX: usize = 0xfff;

/// How the packets of a flow's client get to its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Course {
    Plain,
    /// In a tunnel to the endpoint's node.
    Out,
    /// In a tunnel from another node.
    In,
}

/// What becomes of a packet in a tunnel before it is looked at itself.
#[derive(Debug, Clone)]
enum Arrival {
    /// It is none of ours, and stays as it is.
    Stranger,
    Dropped,
    /// It is taken out, and nothing is made for it.
    Known,
    /// It is taken out, and opens a flow.
    Opens(Tuple, Candidate),
    /// What is known does not say.
    Unclear,
}

impl State {
    /// A packet in a tunnel that ends here; `None` for any other.
    pub(super) fn arrived(&mut self, given: &Given<'_>) -> Option<Result<Verdict>> {
        if given.crossing.hook != Hook::Ingress {
            return None;
        }
        let tunnel = Tunnel::read(given.frame)?;
        let inside = Given { frame: &tunnel.inner, behind: true, ..*given };
        let arrival = self.model.arrival(given.crossing, &tunnel);
        self.count(match arrival {
            Arrival::Stranger => "stranger's tunnel",
            Arrival::Dropped => "tunnel refused",
            Arrival::Known | Arrival::Unclear => "out of a tunnel",
            Arrival::Opens(..) => "new by a tunnel",
        });
        match arrival {
            Arrival::Stranger => None,
            Arrival::Dropped => Some(Ok(self.dropped(given.passage))),
            Arrival::Known => Some(self.look(&inside, None)),
            Arrival::Opens(tuple, candidate) => {
                // What contradicts itself has opened its flow all the same.
                if !matches!(read(inside.frame), Some((_, Kind::Segment(..)))) {
                    self.model.blur(tuple);
                }
                Some(self.look(&inside, Some(Meaning::New(vec![candidate]))))
            }
            Arrival::Unclear => {
                self.unclear += 1;
                if let Some(outline) = inner(&tunnel) {
                    self.pieces.doubt(&outline);
                    if let Some((tuple, _)) = ends(&tunnel.inner, &outline) {
                        self.model.blur(tuple);
                    }
                }
                Some(Ok(Ok(())))
            }
        }
    }
}

fn inner(tunnel: &Tunnel) -> Option<Outline> {
    let outline = match tunnel.source {
        IpAddr::V4(_) => outline_v4(&tunnel.inner, ETHERNET),
        IpAddr::V6(_) => outline_v6(&tunnel.inner, ETHERNET),
    };
    outline.ok().filter(|outline| outline.transport <= OFFSET_MAX)
}

impl Model {
    fn arrival(&self, crossing: Crossing, tunnel: &Tunnel) -> Arrival {
        let Some(outline) = inner(tunnel) else { return Arrival::Stranger };
        let trusted = self.is_trusted(crossing, tunnel.source);
        if outline.piece.is_some_and(|piece| piece.offset != 0) || is_error(&tunnel.inner, &outline) {
            let believed = trusted && !is_own(tunnel.destination);
            return if believed { Arrival::Known } else { Arrival::Stranger };
        }
        if !has_ports(outline.protocol) {
            return Arrival::Stranger;
        }
        let Some((tuple, opens)) = ends(&tunnel.inner, &outline) else { return Arrival::Stranger };
        match self.owner(tuple, opens, tunnel.destination) {
            Arrival::Known | Arrival::Opens(..) if !trusted => Arrival::Dropped,
            Arrival::Opens(tuple, _) if self.is_unwelcome(tuple) => Arrival::Dropped,
            arrival => arrival,
        }
    }

    /// Only from the uplink, and from no pod's address.
    fn is_trusted(&self, crossing: Crossing, source: IpAddr) -> bool {
        let of_pods = match &self.snapshot.node.pod_traffic {
            PodTraffic::Source(networks) => networks.iter().any(|network| network.contains(&source)),
            _ => false,
        };
        crossing.link == Link::Eth0 && !of_pods && !is_nobody(source) && !is_own(source)
    }

    /// Whose a packet in a tunnel to `endpoint` is.
    fn owner(&self, tuple: Tuple, opens: bool, endpoint: IpAddr) -> Arrival {
        match self.entries.get(&tuple) {
            Some(entry) if self.may_be_lost(tuple, entry) => return Arrival::Unclear,
            Some(entry) if !entry.reply && !entry.is_direct() && (!opens || entry.out.destination.ip() == endpoint) => {
                return Arrival::Known;
            }
            Some(_) => {}
            None if self.is_blurred(tuple) => return Arrival::Unclear,
            None => {}
        }
        let Some((service, _)) = self.served_by_any(tuple) else { return Arrival::Stranger };
        let is_it = |address: &SocketAddr| address.ip() == endpoint && is_local(endpoint) && crosses_nodes(service);
        let mut all = self.endpoints.iter().filter(|((name, address), _)| *name == service.name && is_it(address));
        let Some(((name, address), incarnation)) = all.next() else { return Arrival::Stranger };
        let candidate = Candidate {
            destination: *address,
            source: tuple.source.ip(),
            masquerade: false,
            remote: false,
            lost: false,
            stack: false,
            course: Course::In,
            backend: (name.clone(), *address, *incarnation),
        };
        Arrival::Opens(tuple, candidate)
    }

    /// Who listens at the destination, which may be another node's address.
    fn served_by_any(&self, tuple: Tuple) -> Option<(&ServicePort, &Frontend)> {
        self.served_at(tuple, |address| !is_nobody(address))
    }

    /// Whether the client could not open this flow without a tunnel either.
    fn is_unwelcome(&self, tuple: Tuple) -> bool {
        let source = tuple.source.ip();
        let served = self.served_by_any(tuple);
        let kept_out = served.is_some_and(|(service, frontend)| {
            let ranges = &service.load_balancer_source_ranges;
            let guarded = frontend.kind == FrontendKind::LoadBalancerIp && !ranges.is_empty();
            guarded && !ranges.iter().any(|network| network.contains(&source))
        });
        kept_out || self.is_impossible(source)
    }

    /// What a packet must meet that opens nothing and belongs to nothing that is known: a Maglev table finds its endpoint again.
    pub(super) fn rejoining(&mut self, crossing: Crossing, tuple: Tuple, flags: u8) -> Meaning {
        let asked = crossing.ingress() && tuple.protocol == TCP && flags & RST == 0;
        if !asked || !self.has_direct_tables(IpFamily::of(tuple.destination.ip())) {
            return Meaning::Untouched;
        }
        let Some((service, _)) = self.served(tuple) else { return Meaning::Untouched };
        let (name, maglev) = (service.name.clone(), service.algorithm == Algorithm::Maglev);
        let remembers = service.affinity_seconds.is_some();
        let Meaning::New(candidates) = self.opening(crossing, tuple) else { return Meaning::Untouched };
        if remembers {
            // The choice counts for the client, whether or not anything comes of it.
            let only = match candidates.as_slice() {
                [one] => Some((one.backend.1, one.backend.2)),
                _ => None,
            };
            self.affinity.insert((name, tuple.source.ip()), only);
        }
        let some = maglev && candidates.iter().any(|candidate| candidate.course == Course::Out && !candidate.lost);
        if some { Meaning::Rejoin(candidates) } else { Meaning::Untouched }
    }

    fn has_direct_tables(&self, family: IpFamily) -> bool {
        let services = self.snapshot.services.values().filter(|service| service.name.family == family);
        services.into_iter().any(|service| service.direct_return && service.algorithm == Algorithm::Maglev)
    }
}

/// Whether a client outside may be sent to an endpoint on another node, and would be masqueraded.
fn crosses_nodes(service: &ServicePort) -> bool {
    service.frontends.iter().any(|frontend| {
        let rule = &frontend.rules.external;
        let crosses = rule.masquerade && rule.action == Action::Forward(EndpointSet::Cluster);
        crosses && frontend.kind != FrontendKind::ClusterIp
    })
}
