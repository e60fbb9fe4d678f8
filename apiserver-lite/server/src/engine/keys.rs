//! Where objects are stored: `/registry/<resource>/[<namespace>/]<name>`, as kube-apiserver lays them out in etcd.

use apiserver_machinery::schema::{Resource, registry};

/// The resource whose kind and version an object is stored as. Both Event APIs show the same objects, stored as `v1`.
pub(crate) fn storage_resource(resource: &'static Resource) -> &'static Resource {
    if resource.group == "events.k8s.io" && resource.plural == "events" {
        return registry().resource("", "v1", "events").unwrap_or(resource);
    }
    resource
}

/// The prefix of all objects of a resource, ending in `/`.
pub(crate) fn resource_prefix(resource: &Resource) -> String {
    // The three exceptions are older than the rule (pkg/kubeapiserver, SpecialDefaultResourcePrefixes).
    let directory = match (resource.group, resource.plural) {
        ("", "services") => "services/specs",
        ("", "endpoints") => "services/endpoints",
        ("", "nodes") => "minions",
        (_, plural) => plural,
    };
    format!("/registry/{directory}/")
}

/// The prefix of the objects of a resource in one namespace; all namespaces, or no namespace, where it is empty.
pub(crate) fn namespace_prefix(resource: &Resource, namespace: &str) -> String {
    let mut prefix = resource_prefix(resource);
    if !namespace.is_empty() {
        prefix.push_str(namespace);
        prefix.push('/');
    }
    prefix
}

/// The key of one object.
pub(crate) fn object_key(resource: &Resource, namespace: &str, name: &str) -> String {
    let mut key = namespace_prefix(resource, namespace);
    key.push_str(name);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_kubernetes() {
        let check = |group: &str, plural: &str, namespace: &str, wanted: &str| {
            let resource = registry().resource(group, "v1", plural).unwrap();
            assert_eq!(object_key(resource, namespace, "a"), wanted);
        };
        check("", "pods", "ns", "/registry/pods/ns/a");
        check("", "services", "ns", "/registry/services/specs/ns/a");
        check("", "endpoints", "ns", "/registry/services/endpoints/ns/a");
        check("", "nodes", "", "/registry/minions/a");
        check("discovery.k8s.io", "endpointslices", "ns", "/registry/endpointslices/ns/a");
        check("networking.k8s.io", "ipaddresses", "", "/registry/ipaddresses/a");
    }

    #[test]
    fn both_event_apis_share_storage() {
        let newer = registry().resource("events.k8s.io", "v1", "events").unwrap();
        assert_eq!(storage_resource(newer).group, "");
    }
}
