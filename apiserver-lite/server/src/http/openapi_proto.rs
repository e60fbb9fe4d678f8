//! The OpenAPI v2 document as protobuf (gnostic `openapi.v2.Document`): the only form of it that client-go asks for.
//!
//! `kubectl` reads it when the v3 documents do not know a kind, so it holds every definition. Paths are left out: `kubectl` only looks in them
//! for the parameter `fieldValidation`, which v3 has told it about.

use std::sync::OnceLock;

use serde_json::{Map, Value};

/// The media type of the answer.
pub(super) const CONTENT_TYPE: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// What clients write in `Accept`. Older ones use an `@`, which no media type may hold, so they are answered with the newer form.
pub(super) const ACCEPTED: [&str; 2] = [CONTENT_TYPE, "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"];

/// The document, made from the JSON one on first use.
pub(super) fn v2() -> &'static [u8] {
    static DOCUMENT: OnceLock<Vec<u8>> = OnceLock::new();
    DOCUMENT.get_or_init(|| {
        // The JSON document is made by this build and always parses; null would give an empty document.
        let json: Value = serde_json::from_slice(apiserver_machinery::openapi::v2()).unwrap_or_default();
        document(&json).0
    })
}

/// A message on its way out: fields are appended with their tags.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            // Seven bits at a time, the lowest first; the cast keeps just those and the continuation bit.
            self.0.push((number & 0x7f) as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    /// A length-delimited field: text or an embedded message.
    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.varint((field << 3) | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn message(&mut self, field: u64, message: &Message) {
        self.bytes(field, &message.0);
    }

    fn text(&mut self, field: u64, value: Option<&Value>) {
        if let Some(text) = value.and_then(Value::as_str) {
            self.bytes(field, text.as_bytes());
        }
    }
}

fn document(json: &Value) -> Message {
    let mut info = Message::default();
    let fields = json.get("info").unwrap_or(&Value::Null);
    info.text(1, fields.get("title"));
    info.text(2, fields.get("version"));
    let mut out = Message::default();
    out.text(1, json.get("swagger"));
    out.message(2, &info);
    out.message(8, &Message::default());
    out.message(9, &named_schemas(json.get("definitions")));
    out
}

/// `Definitions` and `Properties` have the same shape: repeated (name, schema).
fn named_schemas(schemas: Option<&Value>) -> Message {
    let mut out = Message::default();
    for (name, schema_json) in schemas.and_then(Value::as_object).into_iter().flatten() {
        let mut named = Message::default();
        named.bytes(1, name.as_bytes());
        named.message(2, &schema(schema_json));
        out.message(1, &named);
    }
    out
}

fn schema(json: &Value) -> Message {
    let mut out = Message::default();
    out.text(1, json.get("$ref"));
    out.text(2, json.get("format"));
    out.text(4, json.get("description"));
    for required in json.get("required").and_then(Value::as_array).into_iter().flatten() {
        out.text(19, Some(required));
    }
    if let Some(additional) = json.get("additionalProperties").filter(|value| value.is_object()) {
        let mut item = Message::default();
        item.message(1, &schema(additional));
        out.message(21, &item);
    }
    if let Some(Value::String(name)) = json.get("type") {
        let mut item = Message::default();
        item.bytes(1, name.as_bytes());
        out.message(22, &item);
    }
    if let Some(items) = json.get("items") {
        let mut item = Message::default();
        item.message(1, &schema(items));
        out.message(23, &item);
    }
    if json.get("properties").is_some() {
        out.message(25, &named_schemas(json.get("properties")));
    }
    extensions(&mut out, json.as_object());
    out
}

/// `x-` keys travel as YAML text, of which JSON is a part.
fn extensions(out: &mut Message, fields: Option<&Map<String, Value>>) {
    for (name, value) in fields.into_iter().flatten().filter(|(name, _)| name.starts_with("x-")) {
        let mut any = Message::default();
        any.bytes(2, value.to_string().as_bytes());
        let mut named = Message::default();
        named.bytes(1, name.as_bytes());
        named.message(2, &any);
        out.message(31, &named);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn bytes_of_a_small_document() {
        let json = json!({"swagger": "2.0", "info": {"title": "K", "version": "v"},
            "definitions": {"A": {"type": "object", "x-k": [1]}}});
        let schema = b"\xb2\x01\x08\x0a\x06object\xfa\x01\x0c\x0a\x03x-k\x12\x05\x12\x03[1]".as_slice();
        // The lengths of the parts, counted by hand.
        assert_eq!(schema.len(), 26);
        let mut wanted = b"\x0a\x032.0\x12\x06\x0a\x01K\x12\x01v\x42\x00\x4a\x21\x0a\x1f\x0a\x01A\x12\x1a".to_vec();
        wanted.extend_from_slice(schema);
        assert_eq!(document(&json).0, wanted);
    }

    #[test]
    fn long_lengths_take_more_bytes() {
        let mut message = Message::default();
        message.bytes(1, &[0; 300]);
        assert_eq!(message.0.get(..3), Some([0x0a, 0xac, 0x02].as_slice()));
    }
}
