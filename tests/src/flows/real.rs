//! A scenario on a real backend: its world is built, its proxy programs the kernel, and every flow's connections are opened.

use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use node_sys::{Cgroup, Placement};

use super::api::ScenarioApi;
use super::judge::{connections, judge};
use super::layout::{Layout, Site};
use super::proxy::{self, Backend};
use super::scenario::{Flow, Protocol, Scenario, Verdict};
use super::sctp;
use super::wire::{Answer, Outcome, Question, Request, Stall};
use super::world::World;
use crate::wait::patient;
use crate::{Claim, binary};

/// For an answer: long enough for two lost SYNs.
const PATIENCE: Duration = Duration::from_secs(8);
/// For a refusal, which may be lost once where client and node share a machine, and for silence, which ends after it.
const SILENCE: Duration = Duration::from_millis(3_500);

/// Connections of a flow that are open at once. A sticky client's come one after the other: kube-proxy promises nothing else.
const PARALLEL: usize = 8;

/// How a flow's client stands towards socket programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Inside the node's cgroup.
    Socket,
    /// Outside of it.
    Packet,
}

/// What each flow met, in order: `None` is what was expected.
pub(super) fn run(
    id: &str,
    scenario: &Scenario,
    backend: Backend,
    kube_proxy: Option<&Path>,
) -> Result<Vec<Option<String>>> {
    let layout = Layout::of(scenario);
    let world = World::build(id, scenario, &layout).context("cannot build the scenario's machines")?;
    let pods = world.cgroup.child("pods")?;
    let mut inside = Stand::start(&world.claim, Some(&pods))?;
    let mut outside = Stand::start(&world.claim, None)?;
    serve(&world, &layout, &mut inside, &mut outside)?;
    let api = ScenarioApi::start(&world.node, scenario)?;
    let _proxy = proxy::start(&world, scenario, backend, kube_proxy, api.address())?;
    let plan = plan(scenario, backend);
    let questions = |path| -> Result<Vec<Question>> {
        plan.iter().filter(|(_, taken)| *taken == path).map(|(flow, _)| question(&world, scenario, flow)).collect()
    };
    let (by_socket, by_packet) = (Request::Ask(questions(Way::Socket)?), Request::Ask(questions(Way::Packet)?));
    inside.request(&by_socket)?;
    // A sticky client has one connection at a time: asked for by both at once, its first two might each choose an endpoint.
    let first = if scenario.flows.iter().any(|flow| flow.sticky) { Some(inside.asked()?) } else { None };
    outside.request(&by_packet)?;
    let mut by_socket = first.map_or_else(|| inside.asked(), Ok)?.into_iter();
    let mut by_packet = outside.asked()?.into_iter();
    let mut got: Vec<Option<String>> = vec![None; scenario.flows.len()];
    for (flow, path) in &plan {
        let outcomes = match path {
            Way::Socket => by_socket.next(),
            Way::Packet => by_packet.next(),
        };
        let outcomes: Vec<Outcome> = outcomes.context("a stand left out a question")?;
        let different = judge(flow, &scenario.config.node_ips, &outcomes);
        note(scenario, &mut got, flow, *path, different);
    }
    Ok(got)
}

/// Whether the flow's packets are made by hand: no socket program sees them, and its clients take turns.
fn is_raw(flow: &Flow) -> bool {
    flow.protocol == Protocol::Sctp && !sctp::has_sockets()
}

/// Every flow once, and with eBPF a pod's twice: by its socket programs, and, as sockets that were there before them do, by packets.
/// Processes of the node itself are all inside its cgroup.
fn plan(scenario: &Scenario, backend: Backend) -> Vec<(&Flow, Way)> {
    let mut plan = Vec::new();
    for flow in &scenario.flows {
        let site = Layout::site_of(scenario, flow.source);
        let by_socket = matches!(site, Site::Node | Site::Pod(_)) && !is_raw(flow);
        if by_socket {
            plan.push((flow, Way::Socket));
        }
        if !by_socket || (backend == Backend::Ebpf && site != Site::Node) {
            plan.push((flow, Way::Packet));
        }
    }
    plan
}

fn note(scenario: &Scenario, got: &mut [Option<String>], flow: &Flow, path: Way, different: Option<String>) {
    let Some(different) = different else { return };
    let Some(index) = scenario.flows.iter().position(|other| std::ptr::eq(other, flow)) else { return };
    if let Some(slot) = got.get_mut(index) {
        let path = if path == Way::Socket { "socket path" } else { "packet path" };
        *slot = Some(match slot.take() {
            Some(first) => format!("{first}; {path}: {different}"),
            None => format!("{different} [{path}]"),
        });
    }
}

fn serve(world: &World, layout: &Layout, inside: &mut Stand, outside: &mut Stand) -> Result<()> {
    let stalls = |on_node: bool| -> Result<Vec<Stall>> {
        let here = layout.servers.iter().filter(|server| matches!(server.site, Site::Node | Site::Pod(_)) == on_node);
        here.map(|server| {
            Ok(Stall { netns: world.netns_name(server.site)?, protocol: server.protocol, address: server.address })
        })
        .collect()
    };
    inside.request(&Request::Serve(stalls(true)?))?;
    outside.request(&Request::Serve(stalls(false)?))?;
    for stand in [inside, outside] {
        let problems = stand.serving()?;
        ensure!(problems.is_empty(), "{}", problems.join("; "));
    }
    Ok(())
}

fn question(world: &World, scenario: &Scenario, flow: &Flow) -> Result<Question> {
    let source: IpAddr = flow.source;
    let answered = matches!(flow.expect, Verdict::Dnat { .. } | Verdict::Pass);
    let one_by_one = is_raw(flow) && !answered;
    let patience = if answered { PATIENCE } else { SILENCE };
    Ok(Question {
        netns: world.netns_name(Layout::site_of(scenario, source))?,
        protocol: flow.protocol,
        source,
        target: flow.target,
        count: if one_by_one { 1 } else { connections(flow) },
        parallel: if flow.sticky { 1 } else { PARALLEL },
        answered,
        patience_ms: u64::try_from(patient(patience).as_millis()).unwrap_or(u64::MAX),
    })
}

/// A process of its own: threads share their process's cgroup.
struct Stand {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Stand {
    fn start(claim: &Claim, cgroup: Option<&Cgroup>) -> Result<Self> {
        let mut command = Command::new(binary("trama-lab")?);
        command.arg("stand").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = claim.spawn(&mut command, Placement { netns: None, cgroup })?;
        let requests = child.stdin.take().context("a stand without standard input")?;
        let answers = BufReader::new(child.stdout.take().context("a stand without standard output")?);
        Ok(Self { child, requests, answers })
    }

    fn request(&mut self, request: &Request) -> Result<()> {
        writeln!(self.requests, "{}", serde_json::to_string(request)?).context("a stand has ended")
    }

    fn answer(&mut self) -> Result<Answer> {
        let mut line = String::new();
        self.answers.read_line(&mut line).context("a stand does not answer")?;
        serde_json::from_str(&line).context("a stand has ended")
    }

    fn serving(&mut self) -> Result<Vec<String>> {
        match self.answer()? {
            Answer::Serving(problems) => Ok(problems),
            Answer::Asked(_) => anyhow::bail!("a stand answered another request"),
        }
    }

    fn asked(&mut self) -> Result<Vec<Vec<Outcome>>> {
        match self.answer()? {
            Answer::Asked(outcomes) => Ok(outcomes),
            Answer::Serving(_) => anyhow::bail!("a stand answered another request"),
        }
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        // It may have ended by itself, and the lab's removal ends whatever is left.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
