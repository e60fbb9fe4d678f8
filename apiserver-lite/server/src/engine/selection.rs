//! Which objects a list or a watch wants, decided with as little parsing as the selectors allow.

use apiserver_machinery::schema::Resource;
use apiserver_machinery::selector::{FieldSelector, LabelSelector};
use apiserver_machinery::status::Status;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::events;

/// A label selector and a field selector of one resource.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    resource: &'static Resource,
    labels: LabelSelector,
    fields: FieldSelector,
    /// Whether `metadata` alone decides.
    metadata_only: bool,
}

/// An object of which only `metadata` is built; the rest is skipped by the parser.
#[derive(Deserialize)]
struct MetadataOnly {
    metadata: Value,
}

impl Selection {
    /// Parses both selectors.
    ///
    /// # Errors
    /// 400 for bad syntax and unsupported fields.
    pub(crate) fn parse(resource: &'static Resource, labels: &str, fields: &str) -> Result<Self, Status> {
        let metadata_only =
            fields.split(',').all(|term| term.trim().is_empty() || term.trim().starts_with("metadata."));
        let labels = LabelSelector::parse(labels)?;
        let fields = FieldSelector::parse(resource, fields)?;
        Ok(Self { resource, labels, fields, metadata_only })
    }

    /// Whether it wants every object.
    pub(crate) fn is_everything(&self) -> bool {
        self.labels.is_everything() && self.fields.is_everything()
    }

    /// The only name that can match, if the selector names it.
    pub(crate) fn exact_name(&self) -> Option<&str> {
        self.fields.exact("metadata.name")
    }

    /// The only namespace that can match, if the selector names it.
    pub(crate) fn exact_namespace(&self) -> Option<&str> {
        self.fields.exact("metadata.namespace")
    }

    /// Whether it wants the stored object.
    pub(crate) fn wants(&self, stored: &[u8]) -> bool {
        if self.is_everything() {
            return true;
        }
        self.probe(stored).is_some_and(|object| self.labels.matches(&object) && self.fields.matches(&object))
    }

    fn probe(&self, stored: &[u8]) -> Option<Value> {
        if self.metadata_only {
            let MetadataOnly { metadata } = serde_json::from_slice(stored).ok()?;
            return Some(Value::Object(Map::from_iter([("metadata".to_owned(), metadata)])));
        }
        let object: Value = serde_json::from_slice(stored).ok()?;
        Some(events::from_storage(self.resource, object))
    }

    /// Adds `metadata.name=<name>`, as a watch of one object asks for.
    ///
    /// # Errors
    /// 400 where the selector asks for another name.
    pub(crate) fn check_name(&self, name: &str) -> Result<(), Status> {
        if self.fields.is_everything() || self.exact_name() == Some(name) {
            return Ok(());
        }
        Err(Status::bad_request("fieldSelector metadata.name doesn't match requested name"))
    }
}
