//! Discovery documents: which groups, versions and resources this server has.

use serde_json::{Map, Value, json};

use crate::schema::{Resource, Subresource, registry};

/// Content type of the aggregated documents.
pub const AGGREGATED_CONTENT_TYPE: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// `GET /api` (`APIVersions`); `server_address` is `host:port` as clients reach it.
pub fn api_versions(server_address: &str) -> Value {
    json!({
        "kind": "APIVersions", "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": server_address}],
    })
}

/// `GET /apis` (`APIGroupList`).
pub fn group_list() -> Value {
    let groups: Vec<Value> = served_groups().into_iter().filter(|name| !name.is_empty()).map(api_group).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `GET /apis/<group>` (`APIGroup`); `None` when no version of it is served.
pub fn group(name: &str) -> Option<Value> {
    if name.is_empty() || !served_groups().contains(&name) {
        return None;
    }
    let mut document = api_group(name);
    let map = document.as_object_mut()?;
    map.insert("kind".to_owned(), json!("APIGroup"));
    map.insert("apiVersion".to_owned(), json!("v1"));
    Some(document)
}

/// `GET /api/v1` or `/apis/<group>/<version>` (`APIResourceList`); `None` when it is not served.
pub fn resource_list(group: &str, version: &str) -> Option<Value> {
    let mut resources = Vec::new();
    for resource in served_in(group, version) {
        resources.push(api_resource(resource));
        resources.extend(resource.subresources.iter().map(|subresource| api_subresource(resource, subresource)));
    }
    if resources.is_empty() {
        return None;
    }
    let mut list =
        json!({"kind": "APIResourceList", "groupVersion": group_version(group, version), "resources": resources});
    if !group.is_empty() {
        insert(&mut list, "apiVersion", json!("v1"));
    }
    Some(list)
}

/// `GET /api` with aggregated discovery v2 (`APIGroupDiscoveryList` of the core group).
pub fn aggregated_core() -> Value {
    aggregated(str::is_empty)
}

/// `GET /apis` with aggregated discovery v2 (all other groups).
pub fn aggregated_groups() -> Value {
    aggregated(|group| !group.is_empty())
}

fn served_groups() -> Vec<&'static str> {
    let mut names: Vec<&'static str> = Vec::new();
    for (group, _) in registry().served_group_versions() {
        if !names.contains(&group) {
            names.push(group);
        }
    }
    names
}

fn versions_of(group: &str) -> Vec<&'static str> {
    let pairs = registry().served_group_versions();
    pairs.into_iter().filter(|(name, _)| *name == group).map(|(_, version)| version).collect()
}

fn served_in(group: &str, version: &str) -> impl Iterator<Item = &'static Resource> {
    registry().served().filter(move |resource| resource.group == group && resource.version == version)
}

fn group_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

fn api_group(name: &str) -> Value {
    let version = |version: &&str| json!({"groupVersion": group_version(name, version), "version": version});
    let versions: Vec<Value> = versions_of(name).iter().map(version).collect();
    let preferred = versions.first().cloned().unwrap_or_default();
    json!({"name": name, "versions": versions, "preferredVersion": preferred})
}

fn insert(document: &mut Value, key: &str, value: Value) {
    if let Some(map) = document.as_object_mut() {
        map.insert(key.to_owned(), value);
    }
}

fn insert_names(document: &mut Value, key: &str, names: &[&str]) {
    if !names.is_empty() {
        insert(document, key, json!(names));
    }
}

fn api_resource(resource: &Resource) -> Value {
    let mut document = json!({
        "name": resource.plural, "singularName": resource.singular, "namespaced": resource.namespaced,
        "kind": resource.kind, "verbs": resource.verbs,
    });
    insert_names(&mut document, "shortNames", &resource.short_names);
    insert_names(&mut document, "categories", &resource.categories);
    document
}

fn api_subresource(resource: &Resource, subresource: &Subresource) -> Value {
    let mut document = json!({
        "name": format!("{}/{}", resource.plural, subresource.name), "singularName": "",
        "namespaced": resource.namespaced, "kind": subresource.kind, "verbs": subresource.verbs,
    });
    if (subresource.group, subresource.version) != (resource.group, resource.version) {
        insert(&mut document, "group", json!(subresource.group));
        insert(&mut document, "version", json!(subresource.version));
    }
    document
}

fn aggregated(wanted: impl Fn(&str) -> bool) -> Value {
    let items: Vec<Value> = served_groups().into_iter().filter(|group| wanted(group)).map(aggregated_group).collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items})
}

fn aggregated_group(group: &'static str) -> Value {
    let version = |version: &'static str| {
        let resources: Vec<Value> = served_in(group, version).map(aggregated_resource).collect();
        json!({"version": version, "freshness": "Current", "resources": resources})
    };
    let versions: Vec<Value> = versions_of(group).into_iter().map(version).collect();
    let mut metadata = Map::new();
    if !group.is_empty() {
        metadata.insert("name".to_owned(), json!(group));
    }
    json!({"metadata": metadata, "versions": versions})
}

fn aggregated_resource(resource: &Resource) -> Value {
    let mut document = json!({
        "resource": resource.plural, "singularResource": resource.singular, "verbs": resource.verbs,
        "responseKind": {"group": resource.group, "version": resource.version, "kind": resource.kind},
        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
    });
    insert_names(&mut document, "shortNames", &resource.short_names);
    insert_names(&mut document, "categories", &resource.categories);
    if !resource.subresources.is_empty() {
        let subresources: Vec<Value> = resource.subresources.iter().map(aggregated_subresource).collect();
        insert(&mut document, "subresources", Value::Array(subresources));
    }
    document
}

fn aggregated_subresource(subresource: &Subresource) -> Value {
    json!({
        "subresource": subresource.name, "verbs": subresource.verbs,
        "responseKind": {"group": subresource.group, "version": subresource.version, "kind": subresource.kind},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names<'a>(items: &'a Value, key: &str) -> Vec<&'a str> {
        items.as_array().unwrap().iter().map(|item| item[key].as_str().unwrap()).collect()
    }

    #[test]
    fn legacy_groups() {
        let list = group_list();
        let groups = names(&list["groups"], "name");
        assert!(groups.contains(&"discovery.k8s.io") && groups.contains(&"coordination.k8s.io"));
        assert!(!groups.contains(&""), "the core group is not listed under /apis");
        assert_eq!(
            group("discovery.k8s.io").unwrap(),
            json!({
                "kind": "APIGroup", "apiVersion": "v1", "name": "discovery.k8s.io",
                "versions": [{"groupVersion": "discovery.k8s.io/v1", "version": "v1"}],
                "preferredVersion": {"groupVersion": "discovery.k8s.io/v1", "version": "v1"},
            })
        );
        assert_eq!((group("apps"), group("")), (None, None));
        assert_eq!(api_versions("a:1")["serverAddressByClientCIDRs"][0]["serverAddress"], "a:1");
    }

    #[test]
    fn legacy_resources() {
        let list = resource_list("", "v1").unwrap();
        assert_eq!(list["groupVersion"], "v1");
        let resources = list["resources"].as_array().unwrap();
        let find = |name: &str| resources.iter().find(|resource| resource["name"] == name);
        assert_eq!(
            find("services").unwrap(),
            &json!({
                "name": "services", "singularName": "service", "namespaced": true, "kind": "Service",
                "shortNames": ["svc"], "categories": ["all"],
                "verbs": ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"],
            })
        );
        assert_eq!(find("services/status").unwrap()["verbs"], json!(["get", "patch", "update"]));
        assert!(find("pods/exec").is_none(), "only what is served is listed");
        assert_eq!(find("nodes").unwrap()["namespaced"], false);
        assert!(resource_list("apps", "v1").is_none());
        assert_eq!(resource_list("discovery.k8s.io", "v1").unwrap()["apiVersion"], "v1");
    }

    #[test]
    fn aggregated_documents_hold_every_served_resource() {
        let (core, groups) = (aggregated_core(), aggregated_groups());
        assert_eq!(core["kind"], "APIGroupDiscoveryList");
        assert_eq!(core["apiVersion"], "apidiscovery.k8s.io/v2");
        assert_eq!(core["items"].as_array().unwrap().len(), 1);
        assert_eq!(core["items"][0]["metadata"], json!({}));
        let mut found = 0;
        for item in core["items"].as_array().unwrap().iter().chain(groups["items"].as_array().unwrap()) {
            for version in item["versions"].as_array().unwrap() {
                found += version["resources"].as_array().unwrap().len();
            }
        }
        assert_eq!(found, registry().served().count());
        let slices = groups["items"].as_array().unwrap().iter().find(|it| it["metadata"]["name"] == "discovery.k8s.io");
        assert_eq!(
            slices.unwrap()["versions"][0]["resources"][0]["responseKind"],
            json!({"group": "discovery.k8s.io", "version": "v1", "kind": "EndpointSlice"})
        );
    }
}
