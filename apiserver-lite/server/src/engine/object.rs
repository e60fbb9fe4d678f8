//! Stored bytes and the JSON that clients see: the same text but for `metadata.resourceVersion`, which only the store knows.

use apiserver_machinery::meta;
use apiserver_machinery::status::Status;
use apiserver_store::{Entry, Revision};
use bytes::{BufMut, Bytes, BytesMut};
use serde_json::{Map, Value, json};

/// One object as it is stored, with the revision of its last write; `None` for one that was never written (dry run).
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) bytes: Bytes,
    pub(crate) revision: Option<Revision>,
}

impl Stored {
    pub(crate) fn new(bytes: Bytes, revision: Revision) -> Self {
        Self { bytes, revision: Some(revision) }
    }

    /// The object with its `resourceVersion`.
    pub(crate) fn decode(&self) -> Result<Value, Status> {
        let mut object: Value = serde_json::from_slice(&self.bytes).map_err(Status::internal)?;
        if let Some(revision) = self.revision {
            meta::set(&mut object, "resourceVersion", revision.to_string());
        }
        Ok(object)
    }

    /// Appends the JSON text with its `resourceVersion`, without parsing anything.
    pub(crate) fn write_json(&self, out: &mut BytesMut) {
        match self.revision {
            Some(revision) => write_with_revision(&self.bytes, revision, out),
            None => out.put_slice(&self.bytes),
        }
    }
}

impl From<Entry> for Stored {
    fn from(entry: Entry) -> Self {
        Self::new(entry.value, entry.mod_revision)
    }
}

const METADATA: &[u8] = b"\"metadata\":{";

/// Serializes for the store: `apiVersion`, `kind` and `metadata` first, so that [`write_with_revision`] finds its place by looking at
/// the first few bytes, and without `resourceVersion`.
pub(crate) fn encode(object: &Value) -> Result<Bytes, Status> {
    let empty = Map::new();
    let fields = object.as_object().unwrap_or(&empty);
    let mut out = Vec::with_capacity(512);
    out.push(b'{');
    for key in ["apiVersion", "kind"] {
        write_field(&mut out, key, fields.get(key).unwrap_or(&Value::Null))?;
        out.push(b',');
    }
    out.extend_from_slice(METADATA);
    let metadata = meta::metadata(object).unwrap_or(&empty);
    for (key, value) in metadata.iter().filter(|(key, _)| *key != "resourceVersion") {
        if out.last() != Some(&b'{') {
            out.push(b',');
        }
        write_field(&mut out, key, value)?;
    }
    out.push(b'}');
    for (key, value) in fields.iter().filter(|(key, _)| !matches!(key.as_str(), "apiVersion" | "kind" | "metadata")) {
        out.push(b',');
        write_field(&mut out, key, value)?;
    }
    out.push(b'}');
    Ok(Bytes::from(out))
}

fn write_field(out: &mut Vec<u8>, key: &str, value: &Value) -> Result<(), Status> {
    serde_json::to_writer(&mut *out, key).map_err(Status::internal)?;
    out.push(b':');
    serde_json::to_writer(out, value).map_err(Status::internal)
}

/// Copies stored bytes and puts `resourceVersion` first into `metadata`.
fn write_with_revision(stored: &[u8], revision: Revision, out: &mut BytesMut) {
    // `apiVersion` and `kind` come before and can't contain a quotation mark, so the first hit is the right one.
    let found = stored.windows(METADATA.len()).position(|window| window == METADATA);
    let (head, tail) = stored.split_at(found.map_or(0, |at| at + METADATA.len()));
    out.reserve(stored.len() + 48);
    out.put_slice(head);
    if !head.is_empty() {
        out.put_slice(b"\"resourceVersion\":\"");
        put_decimal(out, revision.0);
        out.put_slice(if tail.first() == Some(&b'}') { b"\"" } else { b"\"," });
    }
    out.put_slice(tail);
}

/// Appends a number in decimal.
pub(crate) fn put_decimal(out: &mut BytesMut, number: u64) {
    use std::fmt::Write as _;
    // Writing into a growing buffer can't fail.
    let _ = write!(out, "{number}");
}

/// `PartialObjectMetadata`: the object without everything but its metadata.
pub(crate) fn partial_metadata(object: &Value) -> Value {
    let metadata = object.get("metadata").cloned().unwrap_or_else(|| json!({}));
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(stored: &Stored) -> String {
        let mut out = BytesMut::new();
        stored.write_json(&mut out);
        String::from_utf8(out.to_vec()).unwrap()
    }

    #[test]
    fn revision_is_spliced_in() {
        let object = json!({"spec": {"metadata": {"x": 1}}, "kind": "Pod", "apiVersion": "v1",
            "metadata": {"name": "a", "resourceVersion": "7"}});
        let stored = Stored::new(encode(&object).unwrap(), Revision(42));
        assert_eq!(
            text(&stored),
            r#"{"apiVersion":"v1","kind":"Pod","metadata":{"resourceVersion":"42","name":"a"},"spec":{"metadata":{"x":1}}}"#
        );
        assert_eq!(stored.decode().unwrap()["metadata"]["resourceVersion"], "42");
    }

    #[test]
    fn empty_metadata_stays_json() {
        let stored = Stored::new(encode(&json!({"kind": "Pod", "apiVersion": "v1"})).unwrap(), Revision(1));
        assert_eq!(text(&stored), r#"{"apiVersion":"v1","kind":"Pod","metadata":{"resourceVersion":"1"}}"#);
    }

    #[test]
    fn dry_run_has_no_revision() {
        let stored = Stored { bytes: encode(&json!({"metadata": {"name": "a"}})).unwrap(), revision: None };
        assert_eq!(text(&stored), r#"{"apiVersion":null,"kind":null,"metadata":{"name":"a"}}"#);
    }
}
