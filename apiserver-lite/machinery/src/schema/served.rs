//! Which of the known resources this server serves, and with which subresources.

/// Group, version, plural and the subresources offered.
type Served = (&'static str, &'static str, &'static str, &'static [&'static str]);

const SERVED: &[Served] = &[
    ("", "v1", "configmaps", &[]),
    ("", "v1", "endpoints", &[]),
    ("", "v1", "events", &[]),
    ("", "v1", "namespaces", &["status"]),
    ("", "v1", "nodes", &["status"]),
    ("", "v1", "pods", &["status"]),
    ("", "v1", "secrets", &[]),
    ("", "v1", "serviceaccounts", &[]),
    ("", "v1", "services", &["status"]),
    ("coordination.k8s.io", "v1", "leases", &[]),
    ("discovery.k8s.io", "v1", "endpointslices", &[]),
    ("events.k8s.io", "v1", "events", &[]),
    ("networking.k8s.io", "v1", "ipaddresses", &[]),
    ("networking.k8s.io", "v1", "servicecidrs", &["status"]),
];

/// The subresources offered when the resource is served.
pub(super) fn subresources(group: &str, version: &str, plural: &str) -> Option<&'static [&'static str]> {
    let found = SERVED.iter().find(|(g, v, p, _)| (*g, *v, *p) == (group, version, plural))?;
    Some(found.3)
}
