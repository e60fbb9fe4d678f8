//! Everything that is no resource: discovery, OpenAPI, version, health and metrics.

use apiserver_machinery::schema::registry;
use apiserver_machinery::status::Status;
use apiserver_machinery::{discovery, openapi};
use bytes::Bytes;
use http::header::{CACHE_CONTROL, ETAG, IF_NONE_MATCH, LOCATION, VARY};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use serde_json::{Value, json};

use super::accept;
use super::openapi_proto;
use super::query::Query;
use super::response::{self, Body, full};

/// What a document request is about.
pub(crate) struct DocumentRequest<'a> {
    pub(crate) segments: Vec<&'a str>,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) query: &'a Query,
    /// `host:port` as clients reach the server.
    pub(crate) address: &'a str,
}

/// Whether anyone may read it, even without a certificate.
pub(crate) fn is_public(path: &str) -> bool {
    let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    matches!(first, "healthz" | "livez" | "readyz" | "version")
}

impl DocumentRequest<'_> {
    /// Answers a `GET`.
    ///
    /// # Errors
    /// 404 and 406.
    pub(crate) fn get(&self) -> Result<Response<Body>, Status> {
        match self.segments.as_slice() {
            [""] => Ok(response::json(200, &root_paths())),
            ["version"] => Ok(response::json(200, &version())),
            ["healthz" | "livez" | "readyz", rest @ ..] => self.health(rest),
            ["openapi", "v2"] => self.openapi_v2(),
            ["openapi", "v3"] => Ok(cached(openapi::v3_index(), None)),
            ["openapi", "v3", rest @ ..] => self.openapi_v3(&rest.join("/")),
            _ => self.discovery(),
        }
    }

    fn discovery(&self) -> Result<Response<Body>, Status> {
        let aggregated = accept::wants_aggregated_discovery(self.headers);
        if !aggregated && !accept::accepts_json(self.headers) {
            return Err(Status::not_acceptable(&["application/json"]));
        }
        let document = match self.segments.as_slice() {
            ["api"] if aggregated => return Ok(self.aggregated(&discovery::aggregated_core())),
            ["apis"] if aggregated => return Ok(self.aggregated(&discovery::aggregated_groups())),
            ["api"] => Some(discovery::api_versions(self.address)),
            ["apis"] => Some(discovery::group_list()),
            ["api", version] => discovery::resource_list("", version),
            ["apis", group] => discovery::group(group),
            ["apis", group, version] => discovery::resource_list(group, version),
            _ => None,
        };
        let mut response = response::json(200, &document.ok_or_else(Status::path_not_found)?);
        response.headers_mut().insert(VARY, HeaderValue::from_static("Accept"));
        Ok(response)
    }

    fn aggregated(&self, document: &Value) -> Response<Body> {
        let bytes = response::to_bytes(document);
        let etag = format!("\"{:016X}\"", fnv1a(&bytes));
        let unchanged = self.headers.get(IF_NONE_MATCH).is_some_and(|value| value.as_bytes() == etag.as_bytes());
        let body = if unchanged { full(Bytes::new()) } else { full(bytes) };
        let mut response =
            response::with_type(if unchanged { 304 } else { 200 }, discovery::AGGREGATED_CONTENT_TYPE, body);
        let headers = response.headers_mut();
        headers.insert(VARY, HeaderValue::from_static("Accept"));
        if let Ok(etag) = HeaderValue::from_str(&etag) {
            headers.insert(ETAG, etag);
        }
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("public"));
        response
    }

    fn openapi_v2(&self) -> Result<Response<Body>, Status> {
        if accept::names_any(self.headers, &openapi_proto::ACCEPTED) {
            let body = full(Bytes::from_static(openapi_proto::v2()));
            return Ok(response::with_type(200, openapi_proto::CONTENT_TYPE, body));
        }
        if !accept::accepts_json(self.headers) {
            return Err(Status::not_acceptable(&["application/json"]));
        }
        Ok(cached(openapi::v2(), None))
    }

    fn openapi_v3(&self, path: &str) -> Result<Response<Body>, Status> {
        let document = openapi::v3_document(path).ok_or_else(Status::path_not_found)?;
        let hash = openapi::v3_hash(path);
        let asked = self.query.text("hash");
        match hash {
            // A client with an old hash is sent to the present document, so that nothing wrong is kept for long.
            Some(hash) if !asked.is_empty() && asked != hash => Ok(moved(&format!("/openapi/v3/{path}?hash={hash}"))),
            _ => Ok(cached(document, hash)),
        }
    }

    /// The server only listens once it is ready, and it has no part that could fail alone.
    fn health(&self, rest: &[&str]) -> Result<Response<Body>, Status> {
        let name = self.segments.first().copied().unwrap_or_default();
        match rest {
            [] if self.query.flag("verbose").is_some() => {
                let lines: String = HEALTH_CHECKS.iter().map(|check| format!("[+]{check} ok\n")).collect();
                Ok(response::text(200, format!("{lines}{name} check passed\n")))
            }
            [] => Ok(response::text(200, "ok")),
            [check] if HEALTH_CHECKS.contains(check) => Ok(response::text(200, "ok")),
            _ => Err(Status::path_not_found()),
        }
    }
}

const HEALTH_CHECKS: [&str; 2] = ["ping", "store"];

fn moved(location: &str) -> Response<Body> {
    let mut response = response::text(301, "");
    *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
    if let Ok(location) = HeaderValue::from_str(location) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

fn cached(document: &'static [u8], hash: Option<&str>) -> Response<Body> {
    let mut response = response::json_bytes(200, Bytes::from_static(document));
    let Some(etag) = hash.and_then(|hash| HeaderValue::from_str(&format!("\"{hash}\"")).ok()) else { return response };
    response.headers_mut().insert(ETAG, etag);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("public, immutable"));
    response
}

/// A hash that only has to change when the document does.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// `GET /`: the paths that exist.
fn root_paths() -> Value {
    let mut paths = vec!["/api".to_owned(), "/api/v1".to_owned(), "/apis".to_owned()];
    for (group, version) in registry().served_group_versions().into_iter().filter(|(group, _)| !group.is_empty()) {
        paths.extend([format!("/apis/{group}"), format!("/apis/{group}/{version}")]);
    }
    let fixed = ["/healthz", "/livez", "/metrics", "/openapi/v2", "/openapi/v3", "/readyz", "/version"];
    paths.extend(fixed.map(str::to_owned));
    paths.sort();
    paths.dedup();
    json!({"paths": paths})
}

/// `GET /version` (`apimachinery` `version.Info`).
fn version() -> Value {
    let release = registry().release();
    let mut numbers = release.trim_start_matches('v').split('.');
    let platform = format!("{}/{}", std::env::consts::OS, architecture());
    json!({
        "major": numbers.next().unwrap_or_default(), "minor": numbers.next().unwrap_or_default(),
        "gitVersion": format!("{release}+trama"), "gitCommit": "", "gitTreeState": "", "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "", "compiler": "rustc", "platform": platform,
    })
}

/// The architecture as Go names it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_is_that_of_the_tables() {
        let version = version();
        assert_eq!((version["major"].as_str(), version["minor"].as_str()), (Some("1"), Some("36")));
        assert!(version["gitVersion"].as_str().unwrap().ends_with("+trama"));
    }

    #[test]
    fn only_harmless_paths_are_public() {
        for path in ["/healthz", "/livez/ping", "/readyz", "/version"] {
            assert!(is_public(path), "{path}");
        }
        for path in ["/", "/api", "/metrics", "/openapi/v2", "/healthzz"] {
            assert!(!is_public(path), "{path}");
        }
    }
}
