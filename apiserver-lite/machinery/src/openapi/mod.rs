//! OpenAPI v3 (one document per group version) and v2, made from the tables, built on first use and kept as bytes.

mod describe;
mod paths;
mod schema;

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde_json::{Map, Value, json};

use describe::Descriptions;
use schema::Dialect;

use crate::schema::{Resource, group_version_path, registry};

/// The index at `/openapi/v3`: every path with its `serverRelativeURL` (path and hash).
pub fn v3_index() -> &'static [u8] {
    static INDEX: OnceLock<Vec<u8>> = OnceLock::new();
    INDEX.get_or_init(|| {
        let entry = |(path, document): (&String, &Document)| {
            let url = format!("/openapi/v3/{path}?hash={}", document.hash);
            (path.clone(), json!({"serverRelativeURL": url}))
        };
        let paths: Map<String, Value> = documents().iter().map(entry).collect();
        json!({"paths": paths}).to_string().into_bytes()
    })
}

/// The document of one group version; `path` is what follows `/openapi/v3/`, for example `api/v1` or `apis/discovery.k8s.io/v1`.
pub fn v3_document(path: &str) -> Option<&'static [u8]> {
    let document = documents().get(path)?;
    Some(document.bytes.get_or_init(|| build_v3(document)).as_slice())
}

/// The hash of a document as the index prints it: the value for `ETag` and the `hash` parameter.
pub fn v3_hash(path: &str) -> Option<&'static str> {
    Some(documents().get(path)?.hash.as_str())
}

/// The document at `/openapi/v2`, as JSON.
pub fn v2() -> &'static [u8] {
    static DOCUMENT: OnceLock<Vec<u8>> = OnceLock::new();
    DOCUMENT.get_or_init(|| {
        let (paths, definitions) = parts(&registry().served().collect::<Vec<_>>(), Dialect::V2);
        let info = json!({"title": "Kubernetes", "version": registry().release()});
        json!({"swagger": "2.0", "info": info, "paths": paths, "definitions": definitions}).to_string().into_bytes()
    })
}

struct Document {
    group: &'static str,
    version: &'static str,
    hash: String,
    bytes: OnceLock<Vec<u8>>,
}

fn documents() -> &'static BTreeMap<String, Document> {
    static DOCUMENTS: OnceLock<BTreeMap<String, Document>> = OnceLock::new();
    DOCUMENTS.get_or_init(|| {
        let document = |(group, version): (&'static str, &'static str)| {
            let path = group_version_path(group, version);
            let hash = hash(&path);
            (path, Document { group, version, hash, bytes: OnceLock::new() })
        };
        registry().served_group_versions().into_iter().map(document).collect()
    })
}

/// Names what a document was made from, so that the index needs no documents: the build's tables, descriptions and the path.
fn hash(path: &str) -> String {
    // FNV-1a, 64 bits: not for security, only to tell builds apart.
    let inputs = [crate::schema::TABLES.0.as_bytes(), crate::schema::TABLES.1.as_bytes(), describe::DEFLATED];
    let bytes = inputs.into_iter().chain([env!("CARGO_PKG_VERSION").as_bytes(), path.as_bytes()]).flatten();
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016X}")
}

fn build_v3(document: &Document) -> Vec<u8> {
    let in_document = |resource: &&Resource| resource.group == document.group && resource.version == document.version;
    let (paths, schemas) = parts(&registry().served().filter(in_document).collect::<Vec<_>>(), Dialect::V3);
    let info = json!({"title": "Kubernetes", "version": registry().release()});
    let document = json!({"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": schemas}});
    document.to_string().into_bytes()
}

/// The paths and the schemas of some resources.
fn parts(resources: &[&Resource], dialect: Dialect) -> (Map<String, Value>, Map<String, Value>) {
    let registry = registry();
    let mut paths = Map::new();
    for resource in resources {
        paths::add(&mut paths, registry, resource, dialect);
    }
    let types = resources.iter().flat_map(|resource| paths::types(registry, resource));
    let roots: Vec<_> = types.chain(paths::shared_types(registry)).collect();
    (paths, schema::schemas(registry, roots, &Descriptions::load(), dialect))
}

#[cfg(test)]
mod tests;
