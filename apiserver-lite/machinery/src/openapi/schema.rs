//! The schemas of types, in the dialects of OpenAPI v2 and v3.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::describe::Descriptions;
use crate::schema::{Field, FieldType, ListType, Registry, Shape, Type, TypeId};

/// Which OpenAPI version a schema is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    V2,
    V3,
}

impl Dialect {
    /// A reference to a definition.
    pub(super) fn reference(self, definition: &str) -> Value {
        match self {
            Self::V2 => json!({"$ref": format!("#/definitions/{definition}")}),
            Self::V3 => json!({"$ref": format!("#/components/schemas/{definition}")}),
        }
    }
}

/// Makes the schemas of `roots` and of everything they refer to, by definition name.
pub(super) fn schemas(
    registry: &Registry,
    roots: impl IntoIterator<Item = TypeId>,
    descriptions: &Descriptions,
    dialect: Dialect,
) -> Map<String, Value> {
    let writer = Writer { registry, descriptions, dialect };
    let mut schemas = Map::new();
    for id in reachable(registry, roots) {
        if let Some(ty) = registry.get(id) {
            schemas.insert(registry.definition_name(ty), writer.definition(ty));
        }
    }
    schemas
}

fn reachable(registry: &Registry, roots: impl IntoIterator<Item = TypeId>) -> BTreeSet<TypeId> {
    let mut found = BTreeSet::new();
    let mut waiting: Vec<TypeId> = roots.into_iter().collect();
    while let Some(id) = waiting.pop() {
        if found.insert(id) {
            let fields = registry.get(id).map(|ty| ty.fields.as_slice()).unwrap_or_default();
            waiting.extend(fields.iter().filter_map(|field| field.ty.named()));
        }
    }
    found
}

struct Writer<'a> {
    registry: &'a Registry,
    descriptions: &'a Descriptions,
    dialect: Dialect,
}

impl Writer<'_> {
    fn definition(&self, ty: &Type) -> Value {
        let name = self.registry.definition_name(ty);
        let mut schema = self.shape(ty);
        describe(&mut schema, self.descriptions.get(&name, ""));
        let properties: Map<String, Value> =
            ty.fields.iter().map(|field| (field.name.to_owned(), self.property(&name, field))).collect();
        let required: Vec<&str> = ty.fields.iter().filter(|field| field.required).map(|field| field.name).collect();
        if !properties.is_empty() {
            schema.insert("properties".to_owned(), Value::Object(properties));
        }
        if !required.is_empty() {
            schema.insert("required".to_owned(), json!(required));
        }
        if ty.atomic {
            schema.insert("x-kubernetes-map-type".to_owned(), json!("atomic"));
        }
        if let Some(package) = self.registry.package(ty).filter(|_| ty.is_kind) {
            let kind = json!({"group": package.group, "kind": ty.name, "version": package.version});
            schema.insert("x-kubernetes-group-version-kind".to_owned(), json!([kind]));
        }
        Value::Object(schema)
    }

    fn shape(&self, ty: &Type) -> Map<String, Value> {
        let v2 = self.dialect == Dialect::V2;
        let shape = match ty.shape {
            // Upstream leaves the few types that are any JSON without a type, except raw objects.
            Shape::Any if !matches!(ty.name, "RawExtension" | "FieldsV1" | "Patch") => json!({}),
            Shape::Struct | Shape::Any => json!({"type": "object"}),
            Shape::Time | Shape::MicroTime => json!({"type": "string", "format": "date-time"}),
            Shape::Quantity if v2 => json!({"type": "string"}),
            Shape::Quantity => json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
            Shape::IntOrString if v2 => json!({"type": "string", "format": "int-or-string"}),
            Shape::IntOrString => {
                json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]})
            }
        };
        match shape {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }

    fn property(&self, definition: &str, field: &Field) -> Value {
        let mut schema = match self.ty(&field.ty) {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        // In v3 nothing may stand beside a reference; v2 readers accept it.
        if let (Dialect::V3, FieldType::Ref(_)) = (self.dialect, &field.ty) {
            let reference = Value::Object(std::mem::take(&mut schema));
            schema.insert("allOf".to_owned(), json!([reference]));
        }
        let text = self.descriptions.get(definition, field.name).or_else(|| shared_description(field.name));
        describe(&mut schema, text);
        merging(&mut schema, field);
        Value::Object(schema)
    }

    fn ty(&self, ty: &FieldType) -> Value {
        match ty {
            FieldType::String => json!({"type": "string"}),
            FieldType::Int32 => json!({"type": "integer", "format": "int32"}),
            FieldType::Int64 => json!({"type": "integer", "format": "int64"}),
            FieldType::Double => json!({"type": "number", "format": "double"}),
            FieldType::Bool => json!({"type": "boolean"}),
            FieldType::Bytes => json!({"type": "string", "format": "byte"}),
            FieldType::Any => json!({"type": "object"}),
            FieldType::List(element) => json!({"type": "array", "items": self.ty(element)}),
            FieldType::Map(element) => json!({"type": "object", "additionalProperties": self.ty(element)}),
            FieldType::Ref(id) => {
                let name = self.registry.get(*id).map(|ty| self.registry.definition_name(ty)).unwrap_or_default();
                self.dialect.reference(&name)
            }
        }
    }
}

fn describe(schema: &mut Map<String, Value>, text: Option<&str>) {
    if let Some(text) = text {
        schema.insert("description".to_owned(), text.into());
    }
}

/// What fields mean that every kind has; the sources of the descriptions leave them out.
fn shared_description(field: &str) -> Option<&'static str> {
    match field {
        "apiVersion" => Some("The group and version of this object's schema, for example v1 or apps/v1."),
        "kind" => Some("The kind of this object, in CamelCase. It can't be changed."),
        "metadata" => Some("Standard metadata."),
        "items" => Some("The objects in this list."),
        _ => None,
    }
}

fn merging(schema: &mut Map<String, Value>, field: &Field) {
    let is_map = matches!(field.ty, FieldType::Map(_) | FieldType::Ref(_));
    let type_key = if is_map { "x-kubernetes-map-type" } else { "x-kubernetes-list-type" };
    let list_type = match &field.list_type {
        ListType::Unset => None,
        ListType::Atomic => Some("atomic"),
        ListType::Set => Some("set"),
        ListType::Granular => Some("granular"),
        ListType::Map(keys) => {
            schema.insert("x-kubernetes-list-map-keys".to_owned(), json!(keys));
            Some("map")
        }
    };
    if let Some(list_type) = list_type {
        schema.insert(type_key.to_owned(), list_type.into());
    }
    let strategy = field.patch_strategy;
    let words = [(strategy.merge, "merge"), (strategy.retain_keys, "retainKeys"), (strategy.replace, "replace")];
    let words: Vec<&str> = words.into_iter().filter(|(on, _)| *on).map(|(_, word)| word).collect();
    if !words.is_empty() {
        schema.insert("x-kubernetes-patch-strategy".to_owned(), words.join(",").into());
    }
    if let Some(key) = field.patch_merge_key {
        schema.insert("x-kubernetes-patch-merge-key".to_owned(), key.into());
    }
}
