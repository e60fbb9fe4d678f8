//! `meta.k8s.io/v1` Table: objects as rows for people, with kubectl's usual columns.

mod columns;
mod duration;
mod event;
mod network;
mod node;
mod pod;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::field::quote;
use crate::schema::Resource;
use crate::status::Status;

pub use duration::human_duration;

/// What each row carries beside its cells (the query parameter `includeObject`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IncludeObject {
    /// A `PartialObjectMetadata`; the default.
    #[default]
    Metadata,
    /// The whole object.
    Object,
    /// Nothing.
    None,
}

impl IncludeObject {
    /// Reads the query parameter; empty means the default.
    ///
    /// # Errors
    /// 400 for any other word.
    pub fn parse(text: &str) -> Result<Self, Status> {
        match text {
            "" | "Metadata" => Ok(Self::Metadata),
            "Object" => Ok(Self::Object),
            "None" => Ok(Self::None),
            other => Err(Status::bad_request(format!("unrecognized includeObject value: {}", quote(other)))),
        }
    }
}

/// Renders a Table. `list_meta` becomes its `metadata` (`resourceVersion`, `continue`, `remainingItemCount`); for a single object or a
/// watch event pass `{"resourceVersion": ...}` of the object. `now` is what ages are counted from.
pub fn render<'a>(
    resource: &Resource,
    objects: impl IntoIterator<Item = &'a Value>,
    list_meta: &Value,
    include: IncludeObject,
    now: Timestamp,
) -> Value {
    let layout = columns::of(resource);
    let rows: Vec<Value> = objects.into_iter().map(|object| row(&layout, object, include, now)).collect();
    let definitions: Vec<Value> = layout.columns.iter().map(columns::Column::definition).collect();
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": list_meta,
        "columnDefinitions": definitions, "rows": rows,
    })
}

fn row(layout: &columns::Layout, object: &Value, include: IncludeObject, now: Timestamp) -> Value {
    let mut row = Map::new();
    row.insert("cells".to_owned(), Value::Array((layout.cells)(object, now)));
    match include {
        IncludeObject::Metadata => {
            row.insert("object".to_owned(), partial(object));
        }
        IncludeObject::Object => {
            row.insert("object".to_owned(), object.clone());
        }
        IncludeObject::None => {
            row.insert("object".to_owned(), Value::Null);
        }
    }
    if let Some(conditions) = (layout.conditions)(object) {
        row.insert("conditions".to_owned(), conditions);
    }
    Value::Object(row)
}

/// An object reduced to its metadata.
pub fn partial(object: &Value) -> Value {
    let metadata = object.get("metadata").cloned().unwrap_or_else(|| json!({}));
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
}

#[cfg(test)]
mod tests;
