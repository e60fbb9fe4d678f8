//! The committed tables parse and hold together.

use super::*;

#[test]
fn the_tables_parse_and_are_complete() {
    let registry = parse::registry(TABLES.0, TABLES.1).unwrap();
    assert!(registry.release().starts_with("v1.36."));
    assert!(TABLES.1.contains(&format!("# release {}\n", registry.release())), "the tables are of two releases");
    assert!(registry.types().count() > 700);
    assert!(registry.resources().count() > 80);
}

#[test]
fn every_reference_leads_to_a_type() {
    let registry = registry();
    for (_, ty) in registry.types() {
        assert!(registry.package(ty).is_some());
        assert!(ty.fields.is_sorted_by_key(|field| field.name), "{}", ty.name);
        for field in &ty.fields {
            if let Some(id) = field.ty.named() {
                assert!(registry.get(id).is_some(), "{}.{}", ty.name, field.name);
            }
        }
    }
}

#[test]
fn merge_keys_are_fields_of_the_elements() {
    let registry = registry();
    for (_, ty) in registry.types() {
        for field in &ty.fields {
            let keys = match &field.list_type {
                ListType::Map(keys) => keys.as_slice(),
                _ => &[],
            };
            for key in keys.iter().copied().chain(field.patch_merge_key) {
                let element = field.ty.named().unwrap_or_else(|| panic!("{}.{} has no element", ty.name, field.name));
                assert!(registry.field(element, key).is_some(), "{}.{} has no {key}", ty.name, field.name);
            }
        }
    }
}

#[test]
fn served_resources_have_types_and_lists() {
    let registry = registry();
    let served: Vec<String> = registry.served().map(|it| format!("{}/{}", it.api_version(), it.plural)).collect();
    assert_eq!(served.len(), 14, "{served:?}");
    for resource in registry.served() {
        let ty = registry.get(resource.ty.unwrap()).unwrap();
        assert!(ty.is_kind && ty.name == resource.kind);
        let package = registry.package(ty).unwrap();
        assert!(registry.type_by_name(package.alias, &resource.list_kind()).is_some(), "{}", resource.kind);
        assert!(resource.has_verb("watch"));
    }
}

#[test]
fn facts_spot_checked() {
    let registry = registry();
    let services = registry.resource("", "v1", "services").unwrap();
    assert_eq!((services.short_names.as_slice(), services.namespaced), (["svc"].as_slice(), true));
    assert_eq!(services.subresources.len(), 1, "only status is served");
    let spec = registry.type_by_name("core.v1", "ServiceSpec").unwrap();
    let ports = registry.field(spec, "ports").unwrap();
    assert_eq!(ports.list_type, ListType::Map(vec!["port", "protocol"]));
    assert_eq!((ports.patch_strategy.merge, ports.patch_merge_key), (true, Some("port")));
    let port = ports.ty.named().unwrap();
    assert!(registry.field(port, "port").unwrap().required);
    assert!(registry.field(port, "prot").is_none());
    let eviction = registry.resource("apps", "v1", "deployments").unwrap().subresource("scale").unwrap();
    assert_eq!((eviction.group, eviction.version, eviction.kind), ("autoscaling", "v1", "Scale"));
    assert!(registry.resource_by_kind("apps", "v1", "Deployment").is_some_and(|resource| !resource.served));
}

#[test]
fn broken_tables_say_where() {
    let error = |types: &'static str, resources: &'static str| parse::registry(types, resources).unwrap_err();
    assert_eq!(error("@a b\n:T\nf Nope\n", "").line, 3);
    assert_eq!(error("f s\n", "").cause, "a field before any type");
    assert_eq!(error("@a b\n:T\n:T\n", "").cause, "a type declared twice");
    assert_eq!(error("@a b\n:T\nf s what\n", "").cause, "an unknown word after a field");
    assert_eq!(error("", "@/v1\npods Pod pod namespaced ?\n").cause, "an unknown verb letter");
}
