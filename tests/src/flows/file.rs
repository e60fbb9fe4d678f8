//! A file of flows: one scenario a line, as JSON; read strictly where a mistake would change what is asserted.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use super::scenario::{Config, DetectLocal, Flow, Protocol, Scenario, Verdict};

/// Scenarios in one file.
const SCENARIOS_MAX: usize = 1000;

/// What is wrong with a file of flows.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A line is no JSON, or a field of it is missing, unknown or wrong.
    #[error("{path}, line {line}: field {field}: {problem}")]
    Field {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Path of the field, or of the object that holds it.
        field: String,
        /// What is wrong.
        problem: String,
    },
    /// The file has no scenario, or too many.
    #[error("{path} holds {count} scenarios: between 1 and {SCENARIOS_MAX} are read")]
    Count {
        /// The file.
        path: PathBuf,
        /// How many.
        count: usize,
    },
}

/// What a file says.
#[derive(Debug, Clone)]
pub(super) struct FlowFile {
    /// The scenarios, in order.
    pub(super) scenarios: Vec<Scenario>,
    /// Fields that are not known, and change nothing that is asserted; a sentence each.
    pub(super) notes: Vec<String>,
}

/// Reads a file of flows.
///
/// # Errors
/// The first thing that is wrong, with its line and field.
pub(super) fn read(path: &Path) -> Result<FlowFile, FileError> {
    let text = fs::read_to_string(path).map_err(|source| FileError::Read { path: path.to_owned(), source })?;
    parse(&text, path)
}

/// Every field of a scenario.
const SCENARIO_FIELDS: [&str; 5] = ["scenario", "config", "services", "endpointSlices", "flows"];
/// Every field of its configuration.
const CONFIG_FIELDS: [&str; 8] = [
    "nodeName",
    "nodeIPs",
    "primaryNodeIPs",
    "detectLocal",
    "serviceCIDRs",
    "nodePortAddresses",
    "masqueradeAll",
    "zone",
];

fn parse(text: &str, path: &Path) -> Result<FlowFile, FileError> {
    let mut file = FlowFile { scenarios: Vec::new(), notes: Vec::new() };
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line_number = index + 1;
        let at = |(field, problem)| FileError::Field { path: path.to_owned(), line: line_number, field, problem };
        let mut tree = parse_line(line).map_err(at)?;
        let mut unknown = take_unknown(&mut tree, "", &SCENARIO_FIELDS);
        unknown.extend(tree.get_mut("config").into_iter().flat_map(|c| take_unknown(c, "config.", &CONFIG_FIELDS)));
        file.notes.extend(
            unknown.iter().map(|field| {
                format!("{}, line {line_number}: field {field} is not known and not used", path.display())
            }),
        );
        file.scenarios.push(read_scenario(tree).and_then(WrittenScenario::check).map_err(at)?);
    }
    if file.scenarios.is_empty() || file.scenarios.len() > SCENARIOS_MAX {
        return Err(FileError::Count { path: path.to_owned(), count: file.scenarios.len() });
    }
    Ok(file)
}

/// The field that is wrong and what is wrong with it.
type Wrong = (String, String);

fn parse_line(line: &str) -> Result<Value, Wrong> {
    serde_json::from_str(line).map_err(|error| ("(whole line)".to_owned(), error.to_string()))
}

/// Removes the fields that are not known, and names them.
fn take_unknown(tree: &mut Value, parent: &str, known: &[&str]) -> Vec<String> {
    let Some(object) = tree.as_object_mut() else { return Vec::new() };
    let unknown: Vec<String> = object.keys().filter(|key| !known.contains(&key.as_str())).cloned().collect();
    unknown.iter().for_each(|key| drop(object.remove(key)));
    unknown.iter().map(|key| format!("{parent}{key}")).collect()
}

/// From a tree, because only that lets an error name its field.
fn read_scenario(tree: Value) -> Result<WrittenScenario, Wrong> {
    serde_path_to_error::deserialize(tree).map_err(|error| {
        let field = match error.path().to_string() {
            root if root == "." => "(top level)".to_owned(),
            field => field,
        };
        (field, error.inner().to_string())
    })
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WrittenScenario {
    scenario: String,
    config: WrittenConfig,
    services: Vec<Value>,
    endpoint_slices: Vec<Value>,
    flows: Vec<WrittenFlow>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WrittenConfig {
    node_name: String,
    #[serde(rename = "nodeIPs")]
    node_ips: Vec<IpAddr>,
    #[serde(default, rename = "primaryNodeIPs")]
    primary_node_ips: Vec<IpAddr>,
    detect_local: Option<WrittenDetectLocal>,
    #[serde(default, rename = "serviceCIDRs")]
    service_cidrs: Vec<IpNet>,
    #[serde(default)]
    node_port_addresses: Vec<String>,
    #[serde(default)]
    masquerade_all: bool,
    zone: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WrittenDetectLocal {
    #[serde(default)]
    mode: Option<String>,
    #[serde(default)]
    cidrs: Option<Vec<IpNet>>,
    interface: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WrittenFlow {
    name: String,
    protocol: Protocol,
    src: IpAddr,
    dst: IpAddr,
    dport: u16,
    #[serde(default)]
    sticky: bool,
    expect: WrittenExpect,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WrittenExpect {
    verdict: String,
    backends: Option<Vec<SocketAddr>>,
    masquerade: Option<bool>,
}

impl WrittenScenario {
    fn check(self) -> Result<Scenario, Wrong> {
        let flows = self.flows.into_iter().enumerate();
        let flows: Vec<Flow> = flows.map(|(index, flow)| flow.check(index)).collect::<Result<_, _>>()?;
        if flows.is_empty() {
            return Err(("flows".to_owned(), "is empty: nothing would be asserted".to_owned()));
        }
        Ok(Scenario {
            name: self.scenario,
            config: self.config.check()?,
            services: self.services,
            endpoint_slices: self.endpoint_slices,
            flows,
        })
    }
}

impl WrittenConfig {
    fn check(self) -> Result<Config, Wrong> {
        let wrong = |field: &str, problem: String| Err((format!("config.{field}"), problem));
        if self.node_ips.is_empty() {
            return wrong("nodeIPs", "is empty: the node needs an address".to_owned());
        }
        if let Some(stray) = self.primary_node_ips.iter().find(|address| !self.node_ips.contains(address)) {
            return wrong("primaryNodeIPs", format!("{stray} is not one of nodeIPs"));
        }
        Ok(Config {
            detect_local: self.detect_local.unwrap_or_default().check()?,
            primary_node_ips: if self.primary_node_ips.is_empty() {
                first_of_each_family(&self.node_ips)
            } else {
                self.primary_node_ips
            },
            node_name: self.node_name,
            node_ips: self.node_ips,
            service_cidrs: self.service_cidrs,
            node_port_addresses: self.node_port_addresses,
            masquerade_all: self.masquerade_all,
            zone: self.zone,
        })
    }
}

fn first_of_each_family(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let first = |v4: bool| addresses.iter().copied().find(|address| address.is_ipv4() == v4);
    [first(true), first(false)].into_iter().flatten().collect()
}

impl WrittenDetectLocal {
    fn check(self) -> Result<DetectLocal, Wrong> {
        let cidrs = self.cidrs.unwrap_or_default();
        let interface = || {
            let missing = || ("config.detectLocal.interface".to_owned(), "is missing in this mode".to_owned());
            self.interface.filter(|name| (1..=12).contains(&name.len())).ok_or_else(missing)
        };
        match self.mode.as_deref().unwrap_or_default() {
            "ClusterCIDR" => Ok(DetectLocal::ClusterCidr(cidrs)),
            "NodeCIDR" => Ok(DetectLocal::NodeCidr(cidrs)),
            "BridgeInterface" => Ok(DetectLocal::Bridge { interface: interface()?, pods: cidrs }),
            "InterfaceNamePrefix" => Ok(DetectLocal::Prefix { prefix: interface()?, pods: cidrs }),
            "" | "None" | "none" | "NoOp" => Ok(DetectLocal::ClusterCidr(Vec::new())),
            other => Err((
                "config.detectLocal.mode".to_owned(),
                format!("{other:?} is none of ClusterCIDR, NodeCIDR, BridgeInterface and InterfaceNamePrefix"),
            )),
        }
    }
}

impl WrittenFlow {
    fn check(self, index: usize) -> Result<Flow, Wrong> {
        let wrong = |field: &str, problem: &str| Err((format!("flows[{index}].{field}"), problem.to_owned()));
        if self.src.is_ipv4() != self.dst.is_ipv4() {
            return wrong("dst", "is of another family than src");
        }
        let backends = self.expect.backends.unwrap_or_default();
        let verdict = match self.expect.verdict.as_str() {
            "DNAT" if backends.is_empty() => return wrong("expect.backends", "is missing or empty for DNAT"),
            "DNAT" => match self.expect.masquerade {
                Some(masquerade) => Verdict::Dnat { backends: backends.into_iter().collect(), masquerade },
                None => return wrong("expect.masquerade", "is missing for DNAT"),
            },
            "REJECT" | "DROP" | "PASS" if !backends.is_empty() => {
                return wrong("expect.backends", "goes with DNAT only");
            }
            "REJECT" => Verdict::Reject,
            "DROP" => Verdict::Drop,
            "PASS" => Verdict::Pass,
            _ => return wrong("expect.verdict", "is none of DNAT, REJECT, DROP and PASS"),
        };
        if self.sticky && !matches!(verdict, Verdict::Dnat { .. }) {
            return wrong("sticky", "goes with DNAT only");
        }
        Ok(Flow {
            name: self.name,
            protocol: self.protocol,
            source: self.src,
            target: SocketAddr::new(self.dst, self.dport),
            sticky: self.sticky,
            expect: verdict,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn line() -> Value {
        json!({
            "scenario": "one", "services": [], "endpointSlices": [],
            "config": { "nodeName": "n", "nodeIPs": ["192.168.0.2", "192.168.0.3", "2001:db8::1"],
                        "detectLocal": { "mode": "ClusterCIDR", "cidrs": ["10.0.0.0/8"] } },
            "flows": [{ "name": "a", "protocol": "TCP", "src": "10.0.0.2", "dst": "172.30.0.1", "dport": 80,
                        "expect": { "verdict": "DNAT", "backends": ["10.0.1.1:80"], "masquerade": false } }],
        })
    }

    fn read_changed(change: impl FnOnce(&mut Value)) -> Result<FlowFile, String> {
        let mut line = line();
        change(&mut line);
        parse(&format!("\n{line}\n"), Path::new("f.jsonl")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_scenario_is_read() {
        let file = read_changed(|line| line["note"] = json!("x")).unwrap();
        let scenario = &file.scenarios[0];
        let primary: Vec<IpAddr> = vec!["192.168.0.2".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        assert_eq!(scenario.config.primary_node_ips, primary);
        assert_eq!(scenario.flows[0].target, "172.30.0.1:80".parse().unwrap());
        assert_eq!(file.notes, ["f.jsonl, line 2: field note is not known and not used"]);
    }

    #[test]
    fn a_mistake_is_named_with_its_line_and_field() {
        let check = |change: fn(&mut Value), expect: &str| {
            let error = read_changed(change).unwrap_err();
            assert!(error.starts_with("f.jsonl, line 2: ") && error.contains(expect), "{error}");
        };
        check(|l| l["flows"][0]["expect"]["verdict"] = json!("ACCEPT"), "field flows[0].expect.verdict: is none of");
        check(|l| l["flows"][0]["expect"]["masquerade"] = Value::Null, "field flows[0].expect.masquerade: is missing");
        check(|l| l["flows"][0]["expect"]["backend"] = json!([]), "field flows[0].expect.backend: unknown field");
        check(|l| l["flows"][0]["dst"] = json!("fd00::1"), "field flows[0].dst: is of another family");
        check(|l| l["flows"][0]["dport"] = json!(70000), "field flows[0].dport: ");
        check(|l| l["flows"] = json!([]), "field flows: is empty");
        check(|l| l["config"]["nodeIPs"] = json!(["300.0.0.1"]), "field config.nodeIPs[0]: ");
        check(|l| l["config"]["detectLocal"]["mode"] = json!("Guess"), "field config.detectLocal.mode: \"Guess\"");
        check(|l| l["config"]["primaryNodeIPs"] = json!(["1.1.1.1"]), "field config.primaryNodeIPs: 1.1.1.1 is not");
        check(|l| *l = json!({ "scenario": "x" }), "field (top level): missing field `config`");
        assert!(parse("{", Path::new("f")).unwrap_err().to_string().starts_with("f, line 1: field (whole line): "));
        assert!(parse("", Path::new("f")).unwrap_err().to_string().contains("holds 0 scenarios"));
    }
}
