//! A scenario on the model alone: the proxy's own watches, tracker and decisions, and no data plane.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use ipnet::IpNet;
use node_sys::Netns;
use tokio::runtime::Handle;
use trama_proxy::metrics::Metrics;
use trama_proxy::model::{self, Answer, Desired, Endpoint, Packet, ServiceSnapshot};
use trama_proxy::node::{
    HostAddresses, InterfaceAddress, NodeFacts, NodePortAddresses, NodeSettings, PodDetection, describe,
};
use trama_proxy::source::{Event, Update, Watches, channel, follow_cluster};
use trama_proxy::tracker::Tracker;

use super::api::ScenarioApi;
use super::layout::{Layout, Site};
use super::scenario::{Config, DetectLocal, Flow, Protocol, Scenario, Verdict};
use crate::wait::patient;

/// How long the watches may take on a busy machine.
const DECIDED_LIMIT: Duration = Duration::from_secs(30);
/// The uplink's index.
const UPLINK: u32 = 2;

/// What each flow met, in order: `None` is what was expected.
pub(super) fn run(scenario: &Scenario) -> Result<Vec<Option<String>>> {
    let snapshot = decide(scenario)?;
    let different = |flow: &Flow| {
        let answer = model::answer(&snapshot, &packet(scenario, flow));
        (!is_expected(flow, &answer)).then(|| spelled(&answer))
    };
    Ok(scenario.flows.iter().map(different).collect())
}

fn decide(scenario: &Scenario) -> Result<ServiceSnapshot> {
    let api = ScenarioApi::start(&Netns::current()?, scenario)?;
    let (events, mut receiver) = channel();
    let metrics = Arc::new(Metrics::new().context("cannot make metrics")?);
    let uri = format!("http://{}", api.address()).parse().context("an address that is no URI")?;
    let client = kube::Client::try_from(kube::Config::new(uri)).context("cannot make a client")?;
    let node_name = Arc::from(scenario.config.node_name.as_str());
    let runtime = Handle::current();
    let watches = runtime.spawn(follow_cluster(Watches { client, node_name, events, metrics }));
    let mut known = Known::default();
    let taken: Result<()> = runtime.block_on(async {
        let take = async {
            while !known.is_complete(&scenario.config) {
                known.take(receiver.recv().await.context("the watches have ended")?);
            }
            Ok(())
        };
        tokio::time::timeout(patient(DECIDED_LIMIT), take)
            .await
            .context("the watches did not tell everything in time")?
    });
    watches.abort();
    taken.map(|()| known.decide(&scenario.config))?
}

/// What the watches have told.
#[derive(Default)]
struct Known {
    tracker: Tracker,
    facts: Option<NodeFacts>,
    node_listed: bool,
    service_cidrs: Vec<IpNet>,
}

impl Known {
    fn take(&mut self, event: Event) {
        match event.update {
            Update::Object(object) => {
                self.tracker.handle(object);
            }
            Update::Node(facts) => self.facts = Some(facts),
            Update::NodeListed => self.node_listed = true,
            Update::ServiceCidrs(service_cidrs) => self.service_cidrs = service_cidrs,
            Update::Host(_)
            | Update::Scrape(_)
            | Update::ReadNumbered(..)
            | Update::ReadStatus(_)
            | Update::ReadServices(_) => {}
        }
    }

    fn is_complete(&self, config: &Config) -> bool {
        let expected: BTreeSet<&IpNet> = config.service_cidrs.iter().collect();
        self.tracker.is_complete() && self.node_listed && self.service_cidrs.iter().collect::<BTreeSet<_>>() == expected
    }

    fn decide(mut self, config: &Config) -> Result<ServiceSnapshot> {
        let (host, settings) = (host_addresses(config), settings(config)?);
        let (node, policy) = describe(&settings, &host, self.facts.as_ref(), &self.service_cidrs);
        self.tracker.set_policy(policy);
        let mut desired = Desired::default();
        desired.set_node(node);
        self.tracker.checkout(&mut desired);
        Ok(desired.snapshot().clone())
    }
}

fn settings(config: &Config) -> Result<NodeSettings> {
    let node_port_addresses = match config.node_port_addresses.as_slice() {
        [only] if only == "primary" => NodePortAddresses::Primary,
        list => {
            let networks: Result<Vec<_>, _> = list.iter().map(|network| network.parse()).collect();
            NodePortAddresses::Networks(networks.context("config.nodePortAddresses holds no network")?)
        }
    };
    let pod_detection = match &config.detect_local {
        DetectLocal::ClusterCidr(cidrs) => PodDetection::ClusterCidr(cidrs.clone()),
        DetectLocal::NodeCidr(_) => PodDetection::NodeCidr,
        DetectLocal::Bridge { interface, .. } => PodDetection::BridgeInterface(interface.as_str().into()),
        DetectLocal::Prefix { prefix, .. } => PodDetection::InterfaceNamePrefix(prefix.as_str().into()),
    };
    Ok(NodeSettings {
        node_port_addresses,
        pod_detection,
        forwarding: model::Forwarding::Snat,
        masquerade_all: config.masquerade_all,
        // As kube-proxy's iptables mode has them.
        localhost_node_ports_v4: true,
        localhost_node_ports_v6: false,
        bind_address: None,
    })
}

fn host_addresses(config: &Config) -> HostAddresses {
    let primary = config.primary_node_ips.iter();
    let all = primary.chain(config.node_ips.iter().filter(|address| !config.primary_node_ips.contains(address)));
    HostAddresses {
        addresses: all.map(|address| InterfaceAddress { address: *address, interface: UPLINK, global: true }).collect(),
        interfaces: BTreeMap::from([(UPLINK, Arc::from("eth0"))]),
        default_v4: vec![UPLINK],
        default_v6: vec![UPLINK],
        ..HostAddresses::default()
    }
}

fn packet<'s>(scenario: &'s Scenario, flow: &Flow) -> Packet<'s> {
    let input = match (Layout::site_of(scenario, flow.source), &scenario.config.detect_local) {
        (Site::Node, _) => None,
        (Site::Pod(_), DetectLocal::Bridge { interface, .. }) => Some(interface.as_str()),
        (Site::Pod(_), DetectLocal::Prefix { prefix, .. }) => Some(prefix.as_str()),
        _ => Some("eth0"),
    };
    let protocol = match flow.protocol {
        Protocol::Tcp => model::Protocol::Tcp,
        Protocol::Udp => model::Protocol::Udp,
        Protocol::Sctp => model::Protocol::Sctp,
    };
    Packet { protocol, source: flow.source, destination: flow.target, input }
}

fn is_expected(flow: &Flow, answer: &Answer) -> bool {
    match (&flow.expect, answer) {
        (Verdict::Reject, Answer::Reject) | (Verdict::Drop, Answer::Drop) | (Verdict::Pass, Answer::Pass) => true,
        (Verdict::Dnat { backends, masquerade }, Answer::Forward { endpoints, masquerade: masqueraded, .. }) => {
            let chosen: BTreeSet<SocketAddr> = endpoints.iter().map(Endpoint::address).collect();
            chosen == *backends && masquerade == masqueraded
        }
        _ => false,
    }
}

fn spelled(answer: &Answer) -> String {
    match answer {
        Answer::Reject => Verdict::Reject.to_string(),
        Answer::Drop => Verdict::Drop.to_string(),
        Answer::Pass => Verdict::Pass.to_string(),
        Answer::Forward { endpoints, masquerade, .. } => {
            let backends = endpoints.iter().map(Endpoint::address).collect();
            Verdict::Dnat { backends, masquerade: *masquerade }.to_string()
        }
    }
}
