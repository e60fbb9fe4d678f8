//! JSON and YAML text to a value, noting every repeated key on the way.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::Format;

/// A parsed text.
pub(super) struct Parsed {
    /// The value; of a repeated key the last value counts.
    pub(super) value: Value,
    /// Paths of repeated keys, in order, at most [`DUPLICATES_MAX`].
    pub(super) duplicates: Vec<String>,
}

/// Repeated keys that are reported; further ones are not (upstream stops at the same number of strict errors).
const DUPLICATES_MAX: usize = 100;

/// Parses a text of one document.
///
/// # Errors
/// What is wrong with the text, for people.
pub(super) fn parse(body: &[u8], format: Format) -> Result<Parsed, String> {
    let mut duplicates = Vec::new();
    let mut path = String::new();
    let seed = Seed { path: &mut path, duplicates: &mut duplicates };
    let value = match format {
        Format::Json => json(body, seed)?,
        Format::Yaml => yaml(body, seed)?,
    };
    Ok(Parsed { value, duplicates })
}

fn json(body: &[u8], seed: Seed<'_>) -> Result<Value, String> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = seed.deserialize(&mut deserializer).map_err(|error| json_error(&error))?;
    deserializer.end().map_err(|error| json_error(&error))?;
    Ok(value)
}

fn json_error(error: &serde_json::Error) -> String {
    if error.is_eof() { "unexpected end of JSON input".to_owned() } else { error.to_string() }
}

fn yaml(body: &[u8], seed: Seed<'_>) -> Result<Value, String> {
    let options = serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::PassThrough,
        with_snippet: false,
    };
    serde_saphyr::with_deserializer_from_slice_with_options(body, options, |deserializer| {
        seed.deserialize(deserializer)
    })
    .map_err(|error| error.to_string())
}

/// Builds a value below `path`.
struct Seed<'a> {
    path: &'a mut String,
    duplicates: &'a mut Vec<String>,
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let Self { path, duplicates } = self;
        let length = path.len();
        let mut values = Vec::new();
        loop {
            path.push_str(&format!("[{}]", values.len()));
            let item = items.next_element_seed(Seed { path: &mut *path, duplicates: &mut *duplicates })?;
            path.truncate(length);
            let Some(item) = item else { return Ok(Value::Array(values)) };
            values.push(item);
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let Self { path, duplicates } = self;
        let length = path.len();
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            push_key(path, &key);
            let value = entries.next_value_seed(Seed { path: &mut *path, duplicates: &mut *duplicates })?;
            if map.insert(key, value).is_some() && duplicates.len() < DUPLICATES_MAX {
                duplicates.push(path.clone());
            }
            path.truncate(length);
        }
        Ok(Value::Object(map))
    }
}

/// Extends `a.b` to `a.b.key`.
pub(super) fn push_key(path: &mut String, key: &str) {
    if !path.is_empty() {
        path.push('.');
    }
    path.push_str(key);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn repeated_keys_are_noted_and_the_last_counts() {
        let parsed = parse(br#"{"a":1,"b":[{"c":1,"c":2}],"a":{"x":1}}"#, Format::Json).unwrap();
        assert_eq!(parsed.value, json!({"a": {"x": 1}, "b": [{"c": 2}]}));
        assert_eq!(parsed.duplicates, ["b[0].c", "a"]);
    }

    #[test]
    fn yaml_gives_the_same_values() {
        let parsed = parse(b"a: 1\nb:\n- c: x\n  c: 'y'\nd: ~\ne: 1.5\nf: true\n", Format::Yaml).unwrap();
        assert_eq!(parsed.value, json!({"a": 1, "b": [{"c": "y"}], "d": null, "e": 1.5, "f": true}));
        assert_eq!(parsed.duplicates, ["b[0].c"]);
    }

    #[test]
    fn broken_texts_are_refused() {
        assert_eq!(parse(br#"{"a":"#, Format::Json).err().as_deref(), Some("unexpected end of JSON input"));
        for text in ["", "{}}", "{'a':1}", "{\"a\":1e999}", "nul"] {
            assert!(parse(text.as_bytes(), Format::Json).is_err(), "{text}");
        }
        for text in ["a: [", "a: b: c", "\u{1}", "a: 1\n---\nb: 2\n"] {
            assert!(parse(text.as_bytes(), Format::Yaml).is_err(), "{text}");
        }
    }

    #[test]
    fn deep_nesting_is_refused_without_overflow() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(parse(deep.as_bytes(), Format::Json).is_err());
        assert!(parse(deep.as_bytes(), Format::Yaml).is_err());
    }
}
