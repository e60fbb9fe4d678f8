//! Collects the descriptions of the API's types and fields from the doc comments of the k8s-openapi dependency.
//!
//! The outcome is one deflated text in `OUT_DIR`: lines of `<definition>\t<field>\t<description>`, with an empty field for the type itself.

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::Compression;
use flate2::write::DeflateEncoder;

/// The folder of k8s-openapi's sources for the release that the schema tables describe.
const RELEASE_FOLDER: &str = "src/v1_36";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    let lines = match sources() {
        Some(folder) => {
            println!("cargo::rerun-if-changed={}", folder.display());
            let mut lines = Vec::new();
            collect(&folder, &mut lines)?;
            lines.sort_unstable();
            lines
        }
        None => {
            println!("cargo::warning=the sources of k8s-openapi were not found; OpenAPI will have no descriptions");
            Vec::new()
        }
    };
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let mut file = DeflateEncoder::new(File::create(out.join("descriptions.deflate"))?, Compression::best());
    for line in &lines {
        file.write_all(line.as_bytes())?;
    }
    file.finish()?;
    Ok(())
}

/// Where the sources are: in cargo's registry, or, for vendored and patched dependencies, where cargo says.
fn sources() -> Option<PathBuf> {
    let package = in_registry().or_else(in_metadata)?;
    Some(package.join(RELEASE_FOLDER)).filter(|folder| folder.is_dir())
}

/// `$CARGO_HOME/registry/src/*/k8s-openapi-<locked version>`.
fn in_registry() -> Option<PathBuf> {
    let version = locked_version()?;
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")))?;
    let registries = fs::read_dir(home.join("registry/src")).ok()?;
    let candidates = registries.flatten().map(|entry| entry.path().join(format!("k8s-openapi-{version}")));
    candidates.into_iter().find(|folder| folder.is_dir())
}

fn locked_version() -> Option<String> {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR")?);
    let lock = manifest.ancestors().map(|folder| folder.join("Cargo.lock")).find(|path| path.is_file())?;
    println!("cargo::rerun-if-changed={}", lock.display());
    let lock = fs::read_to_string(lock).ok()?;
    let package = lock.split("name = \"k8s-openapi\"\nversion = \"").nth(1)?;
    Some(package.split('"').next()?.to_owned())
}

fn in_metadata() -> Option<PathBuf> {
    let output = Command::new(env::var_os("CARGO")?)
        .args(["metadata", "--format-version=1", "--offline", "--filter-platform"])
        .arg(env::var_os("HOST")?)
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    // Paths with escaped characters are not understood; the build then goes on without descriptions.
    let manifests = text.split("\"manifest_path\":\"").skip(1).filter_map(|rest| rest.split('"').next());
    let wanted = |path: &&str| {
        Path::new(path).parent().and_then(Path::file_name).is_some_and(|name| {
            name.to_str().is_some_and(|name| name == "k8s-openapi" || name.starts_with("k8s-openapi-"))
        })
    };
    manifests.into_iter().find(wanted).and_then(|path| Path::new(path).parent()).map(Path::to_path_buf)
}

fn collect(folder: &Path, lines: &mut Vec<String>) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, lines)?;
        } else {
            descriptions(&fs::read_to_string(&path)?, lines);
        }
    }
    Ok(())
}

/// Reads one generated file: a comment names the definition, doc comments stand before the type and before each field.
fn descriptions(source: &str, lines: &mut Vec<String>) {
    let mut definition = "";
    let mut comment = String::new();
    for line in source.lines() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix("// Generated from definition ") {
            definition = name;
        } else if let Some(text) = line.strip_prefix("///") {
            if !comment.is_empty() {
                comment.push_str("\\n");
            }
            comment.push_str(&escaped(text.strip_prefix(' ').unwrap_or(text)));
        } else if line.starts_with("impl") {
            return;
        } else if line.starts_with("pub ") && !definition.is_empty() {
            let field = field_name(line).unwrap_or_default();
            if !comment.is_empty() {
                lines.push(format!("{definition}\t{field}\t{comment}\n"));
            }
            comment.clear();
        } else if !line.starts_with("#[") {
            comment.clear();
        }
    }
}

/// The field of `pub some_field: Type,`, without underscores and raw prefix; `None` for `pub struct` and the like.
fn field_name(line: &str) -> Option<String> {
    let name = line.strip_prefix("pub ")?.split_once(": ")?.0;
    let name = name.strip_prefix("r#").unwrap_or(name);
    name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_').then(|| name.replace('_', ""))
}

/// Takes back the escapes that rustdoc needs, then escapes what this format needs.
fn escaped(text: &str) -> String {
    let mut plain = text.replace('\t', " ");
    for (rustdoc, meant) in [("\\[", "["), ("\\]", "]"), ("\\<", "<"), ("\\>", ">"), ("\\\\", "\\")] {
        plain = plain.replace(rustdoc, meant);
    }
    plain.replace('\\', "\\\\")
}
