//! The resources table: what discovery says about every resource, one per line.

use std::fmt::Write as _;

use anyhow::{Context, bail};
use serde_json::Value;

use super::source::Source;

const HEADER: &str = "\
# Made by `cargo xtask schema`; do not edit.
# @<group>/<version>
# <plural> <Kind> <singular> namespaced|cluster <verbs> [short=<names>] [in=<categories>]
# /<subresource> [<group>/<version>/]<Kind> <verbs>   of the resource above
# verbs: c create, d delete, x deletecollection, g get, l list, p patch, u update, w watch; * is all eight
";

/// Renders the table.
pub(super) fn table(source: &Source, release: &str) -> anyhow::Result<String> {
    let mut text = format!("{HEADER}# release {release}\n@/v1\n");
    for resource in items(&source.core, "resources")? {
        core_line(&mut text, resource)?;
    }
    for group in items(&source.aggregated, "items")? {
        let name = group.pointer("/metadata/name").and_then(Value::as_str).context("a group without a name")?;
        for version in items(group, "versions")? {
            let version_name = string(version, "version")?;
            writeln!(text, "@{name}/{version_name}")?;
            for resource in items(version, "resources")? {
                aggregated_lines(&mut text, resource).with_context(|| format!("{name}/{version_name}"))?;
            }
        }
    }
    Ok(text)
}

/// A line of a legacy `APIResourceList`, where subresources stand after their resource as `<plural>/<name>`.
fn core_line(text: &mut String, resource: &Value) -> anyhow::Result<()> {
    let name = string(resource, "name")?;
    let verbs = verbs(resource)?;
    if let Some((_, subresource)) = name.split_once('/') {
        writeln!(text, "/{subresource} {} {verbs}", kind_path(resource)?)?;
        return Ok(());
    }
    let namespaced = resource.get("namespaced").and_then(Value::as_bool).unwrap_or_default();
    let scope = if namespaced { "namespaced" } else { "cluster" };
    let singular = string(resource, "singularName")?;
    writeln!(text, "{name} {} {singular} {scope} {verbs}{}", kind_path(resource)?, names(resource))?;
    Ok(())
}

fn aggregated_lines(text: &mut String, resource: &Value) -> anyhow::Result<()> {
    let kind = string(resource.get("responseKind").context("a resource without a kind")?, "kind")?;
    let scope = string(resource, "scope")?.to_lowercase();
    let (plural, singular) = (string(resource, "resource")?, string(resource, "singularResource")?);
    writeln!(text, "{plural} {kind} {singular} {scope} {}{}", verbs(resource)?, names(resource))?;
    for subresource in resource.get("subresources").and_then(Value::as_array).into_iter().flatten() {
        let kind = kind_path(subresource.get("responseKind").context("a subresource without a kind")?)?;
        writeln!(text, "/{} {kind} {}", string(subresource, "subresource")?, verbs(subresource)?)?;
    }
    Ok(())
}

fn kind_path(object: &Value) -> anyhow::Result<String> {
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
    let kind = string(object, "kind")?;
    Ok(if text("version").is_empty() {
        kind.to_owned()
    } else {
        format!("{}/{}/{kind}", text("group"), text("version"))
    })
}

fn names(resource: &Value) -> String {
    let list = |key: &str| -> Vec<&str> {
        resource.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
    };
    let mut words = String::new();
    for (word, values) in [("short", list("shortNames")), ("in", list("categories"))] {
        if !values.is_empty() {
            words.push_str(&format!(" {word}={}", values.join(",")));
        }
    }
    words
}

fn verbs(resource: &Value) -> anyhow::Result<String> {
    let mut letters = Vec::new();
    for verb in items(resource, "verbs")? {
        letters.push(match verb.as_str().unwrap_or_default() {
            "create" => 'c',
            "delete" => 'd',
            "deletecollection" => 'x',
            "get" => 'g',
            "list" => 'l',
            "patch" => 'p',
            "update" => 'u',
            "watch" => 'w',
            other => bail!("the tables have no letter for the verb {other}"),
        });
    }
    Ok(if letters.len() == 8 { "*".to_owned() } else { letters.into_iter().collect() })
}

fn items<'a>(object: &'a Value, key: &str) -> anyhow::Result<&'a Vec<Value>> {
    object.get(key).and_then(Value::as_array).with_context(|| format!("no list {key}"))
}

fn string<'a>(object: &'a Value, key: &str) -> anyhow::Result<&'a str> {
    object.get(key).and_then(Value::as_str).with_context(|| format!("no text {key}"))
}
