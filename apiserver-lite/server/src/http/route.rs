//! From a path to what it names.

use apiserver_machinery::schema::{Resource, registry};
use percent_encoding::percent_decode_str;

use crate::engine::{Part, Target};

/// What a path names.
#[derive(Debug)]
pub(crate) enum Route {
    /// A collection or an object, or a part of an object.
    Resource { target: Target, part: Part },
    /// A document such as `/version`; the segments of the path, decoded.
    Document(Vec<String>),
    /// Below a group version, but nothing that is served.
    Unknown,
}

/// Reads a path. Empty segments name nothing.
pub(crate) fn route(path: &str) -> Route {
    let decode = |segment: &str| percent_decode_str(segment).decode_utf8_lossy().into_owned();
    let trimmed = path.strip_prefix('/').unwrap_or(path);
    let trimmed = trimmed.strip_suffix('/').unwrap_or(trimmed);
    let segments: Vec<String> = trimmed.split('/').map(decode).collect();
    // A decoded slash would reach into another key.
    if segments.iter().any(|segment| segment.contains('/')) {
        return Route::Unknown;
    }
    let texts: Vec<&str> = segments.iter().map(String::as_str).collect();
    match texts.as_slice() {
        ["api", version, rest @ ..] if !rest.is_empty() => resource_route("", version, rest),
        ["apis", group, version, rest @ ..] if !rest.is_empty() => resource_route(group, version, rest),
        _ => Route::Document(segments),
    }
}

fn resource_route(group: &str, version: &str, rest: &[&str]) -> Route {
    let find = |plural: &str| registry().resource(group, version, plural).filter(|resource| resource.served);
    let core = group.is_empty();
    let found = match rest {
        ["namespaces", name, part @ ("status" | "finalize")] if core => {
            find("namespaces").map(|r| (r, "", *name, *part))
        }
        ["namespaces", namespace, plural] => namespaced(find(plural)).map(|r| (r, *namespace, "", "")),
        ["namespaces", namespace, plural, name] => namespaced(find(plural)).map(|r| (r, *namespace, *name, "")),
        ["namespaces", namespace, plural, name, part] => {
            namespaced(find(plural)).map(|r| (r, *namespace, *name, *part))
        }
        [plural] => find(plural).map(|r| (r, "", "", "")),
        [plural, name] => cluster_scoped(find(plural)).map(|r| (r, "", *name, "")),
        [plural, name, part] => cluster_scoped(find(plural)).map(|r| (r, "", *name, *part)),
        _ => None,
    };
    let Some((resource, namespace, name, part)) = found else { return Route::Unknown };
    // An empty segment can't be a namespace or a name; `..` would leave the resource in a store that knows paths.
    let strange = |text: &str| matches!(text, "." | "..");
    if strange(namespace) || strange(name) || (rest.len() > 1 && rest.iter().any(|segment| segment.is_empty())) {
        return Route::Unknown;
    }
    let part = match part {
        "" => Part::Main,
        "status" if resource.subresource("status").is_some() => Part::Status,
        "finalize" => Part::Finalize,
        _ => return Route::Unknown,
    };
    Route::Resource { target: Target { resource, namespace: namespace.to_owned(), name: name.to_owned() }, part }
}

fn namespaced(resource: Option<&'static Resource>) -> Option<&'static Resource> {
    resource.filter(|resource| resource.namespaced)
}

fn cluster_scoped(resource: Option<&'static Resource>) -> Option<&'static Resource> {
    resource.filter(|resource| !resource.namespaced)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, wanted: Option<(&str, &str, &str, Part)>) {
        let found = match route(path) {
            Route::Resource { target, part } => Some((target.resource.plural, target.namespace, target.name, part)),
            _ => None,
        };
        let found =
            found.as_ref().map(|(plural, namespace, name, part)| (*plural, namespace.as_str(), name.as_str(), *part));
        assert_eq!(found, wanted, "{path}");
    }

    #[test]
    fn paths() {
        check("/api/v1/pods", Some(("pods", "", "", Part::Main)));
        check("/api/v1/namespaces/a/pods", Some(("pods", "a", "", Part::Main)));
        check("/api/v1/namespaces/a/pods/b", Some(("pods", "a", "b", Part::Main)));
        check("/api/v1/namespaces/a/pods/b/status", Some(("pods", "a", "b", Part::Status)));
        check("/api/v1/namespaces", Some(("namespaces", "", "", Part::Main)));
        check("/api/v1/namespaces/a", Some(("namespaces", "", "a", Part::Main)));
        check("/api/v1/namespaces/a/finalize", Some(("namespaces", "", "a", Part::Finalize)));
        check("/apis/networking.k8s.io/v1/ipaddresses/fd00%3A%3A1", Some(("ipaddresses", "", "fd00::1", Part::Main)));
        check("/api/v1/nodes/n1/status", Some(("nodes", "", "n1", Part::Status)));
    }

    #[test]
    fn what_is_not_served() {
        for path in [
            "/api/v1/pods/b",
            "/api/v1/namespaces/a/nodes",
            "/api/v1/gadgets",
            "/apis/example.com/v1/things",
            "/api/v1/namespaces/a/pods/b/exec",
            "/api/v1/namespaces/a/pods/b%2Fc",
            "/api/v1/namespaces//pods/b",
            "/api/v1/nodes/..",
            "/api/v1",
        ] {
            check(path, None);
        }
    }
}
