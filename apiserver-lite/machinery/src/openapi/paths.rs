//! The paths of resources: which operation exists where, on which kind, with which query parameters.

use serde_json::{Map, Value, json};

use super::schema::Dialect;
use crate::schema::{Registry, Resource, TypeId};

const WRITE_OPTIONS: &[&str] = &["dryRun", "fieldManager", "fieldValidation"];
const DELETE_OPTIONS: &[&str] = &["dryRun", "gracePeriodSeconds", "orphanDependents", "propagationPolicy"];
const LIST_OPTIONS: &[&str] = &[
    "allowWatchBookmarks",
    "continue",
    "fieldSelector",
    "labelSelector",
    "limit",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "timeoutSeconds",
    "watch",
];
const PATCH_TYPES: [&str; 3] =
    ["application/json-patch+json", "application/merge-patch+json", "application/strategic-merge-patch+json"];

/// One operation: verb, HTTP method, what `x-kubernetes-action` calls it, query parameters, and what the body is.
struct Operation {
    verb: &'static str,
    method: &'static str,
    action: &'static str,
    options: &'static [&'static str],
    body: Body,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Body {
    None,
    Object,
    Patch,
    DeleteOptions,
}

const fn operation(
    verb: &'static str,
    method: &'static str,
    action: &'static str,
    options: &'static [&'static str],
    body: Body,
) -> Operation {
    Operation { verb, method, action, options, body }
}

const ON_COLLECTION: [Operation; 3] = [
    operation("list", "get", "list", LIST_OPTIONS, Body::None),
    operation("create", "post", "post", WRITE_OPTIONS, Body::Object),
    operation("deletecollection", "delete", "deletecollection", LIST_OPTIONS, Body::DeleteOptions),
];
const ON_OBJECT: [Operation; 4] = [
    operation("get", "get", "get", &[], Body::None),
    operation("update", "put", "put", WRITE_OPTIONS, Body::Object),
    operation("patch", "patch", "patch", &["dryRun", "fieldManager", "fieldValidation", "force"], Body::Patch),
    operation("delete", "delete", "delete", DELETE_OPTIONS, Body::DeleteOptions),
];

/// The types that paths refer to beside those of the resource: they must be among the schemas.
pub(super) fn shared_types(registry: &Registry) -> impl Iterator<Item = TypeId> {
    ["DeleteOptions", "Patch", "Status"].into_iter().filter_map(|name| registry.type_by_name("meta.v1", name))
}

/// Types of a resource: its kind, its list and the kinds of its subresources.
pub(super) fn types(registry: &Registry, resource: &Resource) -> Vec<TypeId> {
    let list = resource.ty.and_then(|ty| sibling(registry, ty, &resource.list_kind()));
    let subresources = resource.subresources.iter().filter_map(|subresource| {
        registry.resource_by_kind(subresource.group, subresource.version, subresource.kind)?.ty
    });
    resource.ty.into_iter().chain(list).chain(subresources).collect()
}

fn sibling(registry: &Registry, ty: TypeId, name: &str) -> Option<TypeId> {
    let package = registry.package(registry.get(ty)?)?;
    registry.type_by_name(package.alias, name)
}

/// Adds the paths of a resource.
pub(super) fn add(paths: &mut Map<String, Value>, registry: &Registry, resource: &Resource, dialect: Dialect) {
    let writer = Writer { registry, resource, dialect };
    let root = format!("/{}", resource.group_version_path());
    let collection = if resource.namespaced {
        let everywhere = format!("{root}/{}", resource.plural);
        let list = ON_COLLECTION.iter().filter(|operation| operation.verb == "list");
        paths.insert(everywhere, writer.item(list, &resource.verbs, resource.kind, &[], "AllNamespaces"));
        format!("{root}/namespaces/{{namespace}}/{}", resource.plural)
    } else {
        format!("{root}/{}", resource.plural)
    };
    let place: &[&str] = if resource.namespaced { &["namespace"] } else { &[] };
    let named: &[&str] = if resource.namespaced { &["name", "namespace"] } else { &["name"] };
    paths.insert(collection.clone(), writer.item(ON_COLLECTION.iter(), &resource.verbs, resource.kind, place, ""));
    let object = format!("{collection}/{{name}}");
    paths.insert(object.clone(), writer.item(ON_OBJECT.iter(), &resource.verbs, resource.kind, named, "Named"));
    for sub in &resource.subresources {
        let item = writer.item(ON_OBJECT.iter(), &sub.verbs, sub.kind, named, sub.name);
        paths.insert(format!("{object}/{}", sub.name), item);
    }
}

struct Writer<'a> {
    registry: &'a Registry,
    resource: &'a Resource,
    dialect: Dialect,
}

impl Writer<'_> {
    fn item<'o>(
        &self,
        operations: impl Iterator<Item = &'o Operation>,
        verbs: &[&str],
        kind: &str,
        path_parameters: &[&str],
        suffix: &str,
    ) -> Value {
        let mut item = Map::new();
        for operation in operations.filter(|operation| verbs.contains(&operation.verb)) {
            item.insert(operation.method.to_owned(), self.operation(operation, kind, suffix));
        }
        let parameters: Vec<Value> =
            path_parameters.iter().map(|name| self.parameter(name, "path", "string")).collect();
        if !parameters.is_empty() {
            item.insert("parameters".to_owned(), Value::Array(parameters));
        }
        Value::Object(item)
    }

    fn operation(&self, operation: &Operation, kind: &str, suffix: &str) -> Value {
        let Resource { group, version, .. } = self.resource;
        let mut parameters: Vec<Value> =
            operation.options.iter().map(|name| self.parameter(name, "query", option_type(name))).collect();
        let definition = match operation.action {
            "list" => self.definition(&self.resource.list_kind()),
            "delete" | "deletecollection" => self.meta_definition("Status"),
            _ => self.definition(kind),
        };
        let id = format!("{}-{}-{kind}-{suffix}", operation.action, self.resource.group_version_path());
        let mut value = json!({
            "operationId": id.replace(['/', '.'], "-"),
            "responses": {"200": self.response(&definition)},
            "x-kubernetes-action": operation.action,
            "x-kubernetes-group-version-kind": {"group": group, "kind": self.resource.kind, "version": version},
        });
        let body = match operation.body {
            Body::None => None,
            Body::Object => Some(self.definition(kind)),
            Body::Patch => Some(self.meta_definition("Patch")),
            Body::DeleteOptions => Some(self.meta_definition("DeleteOptions")),
        };
        if let (Some(map), Some(body)) = (value.as_object_mut(), body) {
            self.insert_body(map, &mut parameters, operation.body, &body);
        }
        if let Some(map) = value.as_object_mut().filter(|_| !parameters.is_empty()) {
            map.insert("parameters".to_owned(), Value::Array(parameters));
        }
        value
    }

    fn insert_body(&self, operation: &mut Map<String, Value>, parameters: &mut Vec<Value>, body: Body, name: &str) {
        let schema = self.dialect.reference(name);
        let types: &[&str] = if body == Body::Patch { &PATCH_TYPES } else { &["application/json", "application/yaml"] };
        let required = body != Body::DeleteOptions;
        match self.dialect {
            Dialect::V2 => {
                parameters.push(json!({"in": "body", "name": "body", "required": required, "schema": schema}));
                operation.insert("consumes".to_owned(), json!(types));
            }
            Dialect::V3 => {
                let content: Map<String, Value> =
                    types.iter().map(|ty| ((*ty).to_owned(), json!({"schema": schema}))).collect();
                operation.insert("requestBody".to_owned(), json!({"content": content, "required": required}));
            }
        }
    }

    fn response(&self, definition: &str) -> Value {
        let schema = self.dialect.reference(definition);
        match self.dialect {
            Dialect::V2 => json!({"description": "OK", "schema": schema}),
            Dialect::V3 => json!({"description": "OK", "content": {"application/json": {"schema": schema}}}),
        }
    }

    fn parameter(&self, name: &str, place: &str, ty: &str) -> Value {
        let mut parameter = match self.dialect {
            Dialect::V2 => json!({"in": place, "name": name, "type": ty, "uniqueItems": true}),
            Dialect::V3 => json!({"in": place, "name": name, "schema": {"type": ty, "uniqueItems": true}}),
        };
        if let Some(map) = parameter.as_object_mut().filter(|_| place == "path") {
            map.insert("required".to_owned(), json!(true));
        }
        parameter
    }

    fn definition(&self, kind: &str) -> String {
        let ty = self.resource.ty.and_then(|ty| sibling(self.registry, ty, kind));
        let ty = ty.and_then(|ty| self.registry.get(ty));
        ty.map(|ty| self.registry.definition_name(ty)).unwrap_or_default()
    }

    fn meta_definition(&self, name: &str) -> String {
        let ty = self.registry.type_by_name("meta.v1", name).and_then(|ty| self.registry.get(ty));
        ty.map(|ty| self.registry.definition_name(ty)).unwrap_or_default()
    }
}

fn option_type(name: &str) -> &'static str {
    match name {
        "allowWatchBookmarks" | "force" | "orphanDependents" | "sendInitialEvents" | "watch" => "boolean",
        "gracePeriodSeconds" | "limit" | "timeoutSeconds" => "integer",
        _ => "string",
    }
}
