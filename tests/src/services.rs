//! What tests ask a cluster about its Services: where they are, and whether their traffic is right by now.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Service;
use kube::api::Api;

use crate::{Cluster, Place, Probe, Tally, Transport, scenario, wait_for};

/// Questions per expected endpoint: one of three endpoints is missed by chance once in ten million times.
const QUESTIONS_PER_ENDPOINT: usize = 16;
/// How long a change may take from the API to the kernel before a test fails. The product's own bar is one second; a CI machine
/// that runs other tests at the same time gets more.
pub const CHANGE_LIMIT: Duration = Duration::from_secs(15);

impl Cluster {
    /// Applies several objects.
    ///
    /// # Errors
    /// As [`Cluster::apply`].
    pub fn apply_all(&self, objects: impl IntoIterator<Item = serde_json::Value>) -> Result<()> {
        objects.into_iter().try_for_each(|object| self.apply(object))
    }

    /// The Service `default/NAME` as the API server has it.
    ///
    /// # Errors
    /// When there is none.
    pub fn service(&self, name: &str) -> Result<Service> {
        let api: Api<Service> = Api::namespaced(self.client(), "default");
        self.block_on(api.get(name)).with_context(|| format!("cannot get the Service {name}"))
    }

    /// The ClusterIPs of a Service, its first family first.
    ///
    /// # Errors
    /// When there is no such Service, or it has none.
    pub fn cluster_ips(&self, name: &str) -> Result<Vec<IpAddr>> {
        let spec = self.service(name)?.spec.context("a Service without a spec")?;
        let ips = spec.cluster_ips.with_context(|| format!("the Service {name} has no ClusterIP"))?;
        ips.iter().map(|ip| ip.parse().with_context(|| format!("{ip} is no address"))).collect()
    }

    /// The NodePort that the API server gave to the port `PROTOCOL PORT` of a Service.
    ///
    /// # Errors
    /// When there is none.
    pub fn node_port(&self, name: &str, protocol: &str, port: u16) -> Result<u16> {
        let spec = self.service(name)?.spec.context("a Service without a spec")?;
        let wanted = scenario::port_name(protocol, port);
        let port = spec.ports.into_iter().flatten().find(|port| port.name.as_deref() == Some(&wanted));
        let number = port.and_then(|port| port.node_port).context("a port without a NodePort")?;
        u16::try_from(number).context("a NodePort that is no port")
    }

    /// Asks from `place` until exactly the endpoints `names` answer, each at least once and none fails; returns that round.
    ///
    /// # Errors
    /// When it does not get so within [`CHANGE_LIMIT`]: with what was wrong at last.
    pub fn wait_for_answers(
        &self,
        place: &Place,
        target: SocketAddr,
        transport: Transport,
        names: &[&str],
    ) -> Result<Tally> {
        let names: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let probe = Probe { timeout: Duration::from_millis(500), ..Probe::new(target, transport) };
        let mut fault = String::new();
        let answered = wait_for("the right answers", CHANGE_LIMIT, || {
            let tally = Tally::of(&place.probe_times(probe, names.len() * QUESTIONS_PER_ENDPOINT)?);
            match tally.fault_unless_all_answer(&names, target) {
                None => Ok(Some(tally)),
                Some(wrong) => {
                    fault = wrong;
                    Ok(None)
                }
            }
        });
        answered.with_context(|| format!("{transport:?} {target} from {}: {fault}", place.netns().label()))
    }
}
