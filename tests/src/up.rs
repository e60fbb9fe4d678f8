//! `trama-lab up`: the whole system on one machine, from nothing to a table of answers, and back to nothing.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kube::ResourceExt;
use kube::api::DynamicObject;
use node_sys::probe::{Capability, missing_capabilities};

use crate::survey::{Expected, Row, ask, questions};
use crate::{Cluster, ClusterOptions, Table, claim, follow, manifest, wait_for};

/// The port of a Kubernetes API server.
const API_PORT: u16 = 6443;
/// Nodes of the cluster; the examples bind their Pods to them.
const NODES: u8 = 2;
/// How long everything that was applied may take to answer.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);

/// Brings everything up, shows the table, and stays until a signal comes unless `once`. Everything is removed in any case.
///
/// # Errors
/// One sentence about what is missing or did not get ready; a wrong row is no error, but a failing exit code.
pub fn up(examples: &Path, once: bool) -> Result<ExitCode> {
    check_machine()?;
    let start = Instant::now();
    let options = ClusterOptions {
        id: Some("up".into()),
        nodes: NODES,
        port: Some(API_PORT),
        progress: say,
        ..ClusterOptions::default()
    };
    let cluster = Cluster::start(&options)?;
    say("applying the examples");
    let objects = manifest::read_folder(examples)?;
    apply_all(&cluster, &objects)?;
    say("waiting until every Service answers");
    settle(&cluster)?;
    say(&format!("up after {:.1} s; sending traffic", start.elapsed().as_secs_f64()));
    let rows = survey(&cluster)?;
    print!("\n{}\n", Table(&rows));
    // Nobody has killed a proxy yet: one that does not count is a fault here.
    let wrong = rows.iter().filter(|row| row.fault.is_some() || row.path.is_none()).count();
    println!("{} of {} rows are right", rows.len() - wrong, rows.len());
    if !once {
        println!("{}", next_steps(&cluster)?);
        follow::follow(&cluster);
    }
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn say(what: &str) {
    println!("trama-lab: {what}");
}

/// Everything that can be known to be missing before anything is made.
fn check_machine() -> Result<()> {
    let missing = missing_capabilities(&[Capability::NetAdmin, Capability::SysAdmin, Capability::Bpf])?;
    let names: Vec<&str> = missing.iter().map(|capability| capability.name()).collect();
    ensure!(names.is_empty(), "this needs root: {} is missing", names.join(", "));
    node_sys::cgroup2_mount().context("mount it with `mount -t cgroup2 none /sys/fs/cgroup/unified`")?;
    for id in claim::sweep()? {
        say(&format!("removed what a killed run left (lab {id})"));
    }
    Ok(())
}

fn apply_all(cluster: &Cluster, objects: &[DynamicObject]) -> Result<()> {
    cluster.block_on(async {
        for object in objects {
            manifest::apply(&cluster.client(), object).await?;
        }
        anyhow::Ok(())
    })?;
    let is_pod = |object: &&DynamicObject| object.types.as_ref().is_some_and(|types| types.kind == "Pod");
    for pod in objects.iter().filter(is_pod) {
        let namespace = pod.namespace().unwrap_or_else(|| "default".to_owned());
        cluster.place_in_pod(&format!("{namespace}/{}", pod.name_any()))?;
    }
    Ok(())
}

/// Waits until the EndpointSlices name every pod, and one question of each kind is answered as it has to be. What is still wrong
/// after that is for the table to show.
fn settle(cluster: &Cluster) -> Result<()> {
    let settled = wait_for("the first answer of every Service", SETTLE_LIMIT, || {
        if !cluster.slices_are_complete()? {
            return Ok(None);
        }
        for mut question in questions(cluster)? {
            // One endpoint's answer is enough here; the table asks for all of them.
            let Expected::Answered(names) = &question.expected else { continue };
            let names = names.clone();
            question.expected = Expected::Answered(names.iter().take(1).cloned().collect());
            let row = ask(cluster, &question)?;
            if !row.tally.failures.is_empty() {
                return Ok(None);
            }
        }
        Ok(Some(()))
    });
    if let Err(error) = settled {
        say(&format!("{error:#}"));
    }
    Ok(())
}

fn survey(cluster: &Cluster) -> Result<Vec<Row>> {
    questions(cluster)?.iter().map(|question| ask(cluster, question)).collect()
}

fn next_steps(cluster: &Cluster) -> Result<String> {
    let kubeconfig = cluster.kubeconfig().display();
    let client = cluster.topology().claim().netns_name("client");
    let [node, _] = cluster.topology().node(1)?.addresses();
    Ok(format!(
        "\nThree things to try from another terminal (logs are in {folder}):\n\
         \n  export KUBECONFIG={kubeconfig}\n\
         \n  1. kubectl get nodes,pods,services,endpointslices -o wide\
         \n  2. kubectl delete pod web-3                        # its connections go to the others at once\
         \n  3. kubectl expose pod web-1 --name mine --type NodePort --port 80 --target-port 8080\
         \n     kubectl get service mine                        # then, with the port after 80:\
         \n     ip netns exec {client} curl -s http://{node}:PORT/\n\
         \nChanges are shown here as they take effect. Ctrl-C removes everything.\n",
        folder = cluster.topology().claim().folder().display(),
    ))
}
