//! The structural check: every value has the type its field asks for; unknown fields and nulls are dropped.

use serde_json::{Map, Number, Value};

use super::parse::push_key;
use super::scalar;
use crate::field::quote;
use crate::schema::{FieldType, Registry, Shape, Type, TypeId, registry};

/// What the check found beside the value.
pub(super) struct Checked {
    /// The value with unknown fields and nulls dropped.
    pub(super) value: Value,
    /// `unknown field "..."` for each unknown field, at most [`UNKNOWN_MAX`].
    pub(super) unknown: Vec<String>,
}

/// Unknown fields that are reported.
const UNKNOWN_MAX: usize = 100;

/// Checks a whole object of type `ty`.
///
/// # Errors
/// The first type error, in the words of Go's JSON decoder.
pub(super) fn check(value: Value, ty: TypeId) -> Result<Checked, String> {
    let registry = registry();
    let name = registry.get(ty).map(|ty| go_type_name(registry, ty)).unwrap_or_default();
    let mut checker =
        Checker { registry, path: String::new(), plain_path: String::new(), owner: String::new(), unknown: Vec::new() };
    if !value.is_object() {
        return Err(format!("json: cannot unmarshal {} into Go value of type {name}", describe(&value)));
    }
    let value = checker.check(value, &FieldType::Ref(ty))?;
    Ok(Checked { value, unknown: checker.unknown })
}

struct Checker {
    registry: &'static Registry,
    /// With list indices: `spec.ports[0].port`, for unknown fields.
    path: String,
    /// Without: `spec.ports.port`, for type errors.
    plain_path: String,
    /// The struct that holds the current field.
    owner: String,
    unknown: Vec<String>,
}

impl Checker {
    fn check(&mut self, value: Value, ty: &FieldType) -> Result<Value, String> {
        if value.is_null() {
            return Ok(zero(ty));
        }
        match (ty, value) {
            (FieldType::Any, value) => Ok(value),
            (FieldType::Ref(id), value) => self.named(value, *id),
            (FieldType::List(element), Value::Array(items)) => self.list(items, element),
            (FieldType::Map(element), Value::Object(entries)) => self.map(entries, element),
            (FieldType::String, value @ Value::String(_)) | (FieldType::Bool, value @ Value::Bool(_)) => Ok(value),
            (FieldType::Double, value @ Value::Number(_)) => Ok(value),
            (FieldType::Int32, Value::Number(number)) => {
                let fits = number.as_i64().is_some_and(|value| i32::try_from(value).is_ok());
                if fits { Ok(Value::Number(number)) } else { Err(self.wrong_number(&number, ty)) }
            }
            (FieldType::Int64, Value::Number(number)) if number.is_i64() => Ok(Value::Number(number)),
            (FieldType::Int64, Value::Number(number)) => Err(self.wrong_number(&number, ty)),
            (FieldType::Bytes, Value::String(text)) => scalar::bytes(&text).map(|()| Value::String(text)),
            (ty, value) => Err(self.wrong_type(&value, ty)),
        }
    }

    fn named(&mut self, value: Value, id: TypeId) -> Result<Value, String> {
        let Some(ty) = self.registry.get(id) else { return Ok(value) };
        match (ty.shape, value) {
            (Shape::Any, value) => Ok(value),
            (Shape::Struct, Value::Object(entries)) => self.structure(entries, ty),
            (Shape::Struct, value) => Err(self.wrong_type(&value, &FieldType::Ref(id))),
            (Shape::Quantity, value) => scalar::quantity(&value).map(|()| quantity_text(value)),
            (Shape::Time, value) => scalar::time(&value, false),
            (Shape::MicroTime, value) => scalar::time(&value, true),
            (Shape::IntOrString, value @ Value::String(_)) => Ok(value),
            (Shape::IntOrString, Value::Number(number)) => {
                let fits = number.as_i64().is_some_and(|value| i32::try_from(value).is_ok());
                let error = || format!("json: cannot unmarshal number {number} into Go value of type int32");
                if fits { Ok(Value::Number(number)) } else { Err(error()) }
            }
            (Shape::IntOrString, value) => {
                Err(format!("json: cannot unmarshal {} into Go value of type int32", describe(&value)))
            }
        }
    }

    fn structure(&mut self, entries: Map<String, Value>, ty: &'static Type) -> Result<Value, String> {
        let owner = std::mem::replace(&mut self.owner, ty.name.to_owned());
        let mut kept = Map::new();
        for (key, value) in entries {
            let lengths = self.enter(&key);
            match ty.field(&key) {
                None => self.note_unknown(),
                Some(_) if value.is_null() => {}
                Some(field) => {
                    ty.name.clone_into(&mut self.owner);
                    kept.insert(key, self.check(value, &field.ty)?);
                }
            }
            self.leave(lengths);
        }
        self.owner = owner;
        Ok(Value::Object(kept))
    }

    fn list(&mut self, items: Vec<Value>, element: &FieldType) -> Result<Value, String> {
        let mut kept = Vec::with_capacity(items.len());
        let length = self.path.len();
        for (index, item) in items.into_iter().enumerate() {
            self.path.push_str(&format!("[{index}]"));
            kept.push(self.check(item, element)?);
            self.path.truncate(length);
        }
        Ok(Value::Array(kept))
    }

    fn map(&mut self, entries: Map<String, Value>, element: &FieldType) -> Result<Value, String> {
        let mut kept = Map::new();
        for (key, value) in entries {
            let lengths = self.enter(&key);
            kept.insert(key, self.check(value, element)?);
            self.leave(lengths);
        }
        Ok(Value::Object(kept))
    }

    fn enter(&mut self, key: &str) -> (usize, usize) {
        let lengths = (self.path.len(), self.plain_path.len());
        push_key(&mut self.path, key);
        push_key(&mut self.plain_path, key);
        lengths
    }

    fn leave(&mut self, (path, plain_path): (usize, usize)) {
        self.path.truncate(path);
        self.plain_path.truncate(plain_path);
    }

    fn note_unknown(&mut self) {
        if self.unknown.len() < UNKNOWN_MAX {
            self.unknown.push(format!("unknown field {}", quote(&self.path)));
        }
    }

    fn wrong_type(&self, value: &Value, ty: &FieldType) -> String {
        self.wrong(describe(value), ty)
    }

    fn wrong_number(&self, number: &Number, ty: &FieldType) -> String {
        self.wrong(&format!("number {number}"), ty)
    }

    fn wrong(&self, value: &str, ty: &FieldType) -> String {
        let go_type = go_type(self.registry, ty);
        format!(
            "json: cannot unmarshal {value} into Go struct field {}.{} of type {go_type}",
            self.owner, self.plain_path
        )
    }
}

/// What Go makes of a null inside a list or a map.
fn zero(ty: &FieldType) -> Value {
    match ty {
        FieldType::String | FieldType::Bytes => Value::String(String::new()),
        FieldType::Int32 | FieldType::Int64 | FieldType::Double => 0.into(),
        FieldType::Bool => false.into(),
        FieldType::Ref(id) => match registry().get(*id).map(|ty| ty.shape) {
            Some(Shape::Struct) => Value::Object(Map::new()),
            Some(Shape::Quantity) => "0".into(),
            Some(Shape::IntOrString) => 0.into(),
            _ => Value::Null,
        },
        FieldType::Any | FieldType::List(_) | FieldType::Map(_) => Value::Null,
    }
}

/// Quantities are text in every answer.
fn quantity_text(value: Value) -> Value {
    match value {
        Value::Number(number) => Value::String(number.to_string()),
        other => other,
    }
}

fn describe(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn go_type(registry: &Registry, ty: &FieldType) -> String {
    match ty {
        FieldType::String => "string".to_owned(),
        FieldType::Int32 => "int32".to_owned(),
        FieldType::Int64 => "int64".to_owned(),
        FieldType::Double => "float64".to_owned(),
        FieldType::Bool => "bool".to_owned(),
        FieldType::Bytes => "[]uint8".to_owned(),
        FieldType::Any => "interface {}".to_owned(),
        FieldType::Ref(id) => registry.get(*id).map(|ty| go_type_name(registry, ty)).unwrap_or_default(),
        FieldType::List(element) => format!("[]{}", go_type(registry, element)),
        FieldType::Map(element) => format!("map[string]{}", go_type(registry, element)),
    }
}

fn go_type_name(registry: &Registry, ty: &Type) -> String {
    let path = registry.package(ty).map(|package| package.path).unwrap_or_default();
    format!("{}.{}", path.rsplit('.').next().unwrap_or_default(), ty.name)
}
