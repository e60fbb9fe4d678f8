//! The types table: every definition of the OpenAPI document, one field per line, without descriptions.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Context, bail, ensure};
use serde_json::{Map, Value};

const HEADER: &str = "\
# Made by `cargo xtask schema`; do not edit.
# @<alias> <path> [<group>/<version>]   a package
# :<Type> [kind] [atomic] [=any|=quantity|=int-or-string|=time|=micro-time]
# <field>[!] <type> [<how it merges>]   ! means required
# type: s text, i int32, l int64, d double, b bool, y base64 bytes, any, *T list, %T map, else a type (with its package's alias if another)
# merging: a atomic, set, map=<keys>, granular (server-side apply); merge, retainKeys, replace, key=<field> (strategic merge patch)
";

/// Definitions by package path.
type Packages<'a> = BTreeMap<&'a str, Vec<(&'a str, &'a Value)>>;

/// Renders the table.
pub(super) fn table(swagger: &Value, release: &str) -> anyhow::Result<String> {
    let definitions =
        swagger.get("definitions").and_then(Value::as_object).context("the swagger has no definitions")?;
    let mut packages = Packages::new();
    for (name, definition) in definitions {
        let (path, name) = name.rsplit_once('.').with_context(|| format!("{name} has no package"))?;
        packages.entry(path).or_default().push((name, definition));
    }
    let aliases: BTreeSet<&str> = packages.keys().map(|path| alias(path)).collect();
    ensure!(aliases.len() == packages.len(), "two packages have the same alias");

    let mut text = format!("{HEADER}# release {release}\n");
    for (path, definitions) in &packages {
        writeln!(text, "{}", package_line(path, definitions))?;
        for (name, definition) in definitions {
            write_type(&mut text, path, name, definition).with_context(|| format!("{path}.{name}"))?;
        }
    }
    Ok(text)
}

/// `io.k8s.api.core.v1` is `core.v1`; `io.k8s.apimachinery.pkg.apis.meta.v1` is `meta.v1`; unversioned ones keep their last word.
fn alias(path: &str) -> &str {
    let words = |count: usize| path.rmatch_indices('.').nth(count - 1).map_or(path, |(at, _)| &path[at + 1..]);
    let last = words(1);
    let versioned = last.starts_with('v') && last[1..].starts_with(|first: char| first.is_ascii_digit());
    if versioned { words(2) } else { last }
}

fn package_line(path: &str, definitions: &[(&str, &Value)]) -> String {
    // meta.v1 lists its kinds under every group; they belong to core.
    let group_version = match alias(path) {
        "meta.v1" => Some("/v1".to_owned()),
        _ => definitions.iter().find_map(|(name, definition)| own_group_version(name, definition)),
    };
    match group_version {
        Some(group_version) => format!("@{} {path} {group_version}", alias(path)),
        None => format!("@{} {path}", alias(path)),
    }
}

fn own_group_version(name: &str, definition: &Value) -> Option<String> {
    let kinds = definition.get("x-kubernetes-group-version-kind")?.as_array()?;
    let own = kinds.iter().find(|kind| kind.get("kind").and_then(Value::as_str) == Some(name))?;
    let text = |key: &str| own.get(key).and_then(Value::as_str).unwrap_or_default();
    Some(format!("{}/{}", text("group"), text("version")))
}

fn write_type(text: &mut String, path: &str, name: &str, definition: &Value) -> anyhow::Result<()> {
    write!(text, ":{name}")?;
    if own_group_version(name, definition).is_some() {
        text.push_str(" kind");
    }
    if definition.get("x-kubernetes-map-type").and_then(Value::as_str) == Some("atomic") {
        text.push_str(" atomic");
    }
    text.push_str(shape(name, definition));
    text.push('\n');
    let required: BTreeSet<&str> =
        definition.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    let Some(properties) = definition.get("properties").and_then(Value::as_object) else { return Ok(()) };
    for (field, schema) in properties {
        let schema = schema.as_object().with_context(|| format!("field {field} is no object"))?;
        let mark = if required.contains(field.as_str()) { "!" } else { "" };
        let ty = field_type(path, schema).with_context(|| format!("field {field}"))?;
        writeln!(text, "{field}{mark} {ty}{}", merging(schema))?;
    }
    Ok(())
}

fn shape(name: &str, definition: &Value) -> &'static str {
    if definition.get("properties").is_some() {
        return "";
    }
    match name {
        "Quantity" => " =quantity",
        "IntOrString" => " =int-or-string",
        "Time" => " =time",
        "MicroTime" => " =micro-time",
        "RawExtension" | "FieldsV1" | "Patch" => " =any",
        // JSON and its variants have no type at all; a struct without fields is an object.
        _ if definition.get("type").is_none() => " =any",
        _ => "",
    }
}

fn field_type(path: &str, schema: &Map<String, Value>) -> anyhow::Result<String> {
    let text = |key: &str| schema.get(key).and_then(Value::as_str);
    if let Some(reference) = text("$ref") {
        return type_reference(path, reference);
    }
    let nested = |key: &str| -> anyhow::Result<String> {
        field_type(path, schema.get(key).and_then(Value::as_object).with_context(|| format!("no {key}"))?)
    };
    Ok(match (text("type"), text("format")) {
        (Some("string"), Some("byte")) => "y".to_owned(),
        (Some("string"), None) => "s".to_owned(),
        (Some("boolean"), None) => "b".to_owned(),
        (Some("integer"), Some("int32")) => "i".to_owned(),
        (Some("integer"), Some("int64")) => "l".to_owned(),
        (Some("number"), Some("double")) => "d".to_owned(),
        (Some("array"), None) => format!("*{}", nested("items")?),
        (Some("object"), None) if schema.contains_key("additionalProperties") => {
            format!("%{}", nested("additionalProperties")?)
        }
        (Some("object"), None) => "any".to_owned(),
        other => bail!("the tables have no form for {other:?}"),
    })
}

fn type_reference(path: &str, reference: &str) -> anyhow::Result<String> {
    let full = reference.strip_prefix("#/definitions/").with_context(|| format!("unexpected reference {reference}"))?;
    let (package, name) = full.rsplit_once('.').with_context(|| format!("{full} has no package"))?;
    Ok(if package == path { name.to_owned() } else { format!("{}.{name}", alias(package)) })
}

fn merging(schema: &Map<String, Value>) -> String {
    let text = |key: &str| schema.get(key).and_then(Value::as_str).unwrap_or_default();
    let mut words = String::new();
    match text("x-kubernetes-list-type") {
        "atomic" => words.push_str(" a"),
        "set" => words.push_str(" set"),
        "map" => {
            let keys = schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array).into_iter().flatten();
            let keys: Vec<&str> = keys.filter_map(Value::as_str).collect();
            words.push_str(&format!(" map={}", keys.join(",")));
        }
        _ => {}
    }
    match text("x-kubernetes-map-type") {
        "atomic" => words.push_str(" a"),
        "granular" => words.push_str(" granular"),
        _ => {}
    }
    for strategy in text("x-kubernetes-patch-strategy").split(',').filter(|word| !word.is_empty()) {
        words.push_str(&format!(" {strategy}"));
    }
    if !text("x-kubernetes-patch-merge-key").is_empty() {
        words.push_str(&format!(" key={}", text("x-kubernetes-patch-merge-key")));
    }
    words
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn aliases() {
        assert_eq!(alias("io.k8s.api.core.v1"), "core.v1");
        assert_eq!(alias("io.k8s.apimachinery.pkg.apis.meta.v1"), "meta.v1");
        assert_eq!(alias("io.k8s.apimachinery.pkg.util.intstr"), "intstr");
        assert_eq!(alias("io.k8s.apimachinery.pkg.version"), "version");
    }

    #[test]
    fn one_definition() {
        let swagger = json!({"definitions": {"io.k8s.api.core.v1.Thing": {
            "type": "object", "required": ["ports"],
            "x-kubernetes-group-version-kind": [{"group": "", "kind": "Thing", "version": "v1"}],
            "properties": {
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "ports": {
                    "type": "array", "items": {"$ref": "#/definitions/io.k8s.api.core.v1.Port"},
                    "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["port", "protocol"],
                    "x-kubernetes-patch-strategy": "merge", "x-kubernetes-patch-merge-key": "port",
                },
            },
        }}});
        let table = table(&swagger, "v1").unwrap();
        let body: Vec<&str> = table.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            body,
            [
                "@core.v1 io.k8s.api.core.v1 /v1",
                ":Thing kind",
                "labels %s",
                "ports! *Port map=port,protocol merge key=port",
            ]
        );
    }

    #[test]
    fn unknown_forms_are_refused() {
        let swagger = json!({"definitions": {"a.v1.T": {"properties": {"f": {"type": "string", "format": "odd"}}}}});
        assert!(table(&swagger, "v1").is_err());
    }
}
