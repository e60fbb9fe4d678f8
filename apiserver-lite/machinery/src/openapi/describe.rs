//! Descriptions of types and fields, as the build script collected them.

use std::collections::HashMap;
use std::io::Read as _;

/// What the build script wrote.
pub(super) const DEFLATED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptions.deflate"));

/// All descriptions; empty when the build found none. Held only while documents are built.
pub(super) struct Descriptions {
    by_place: HashMap<(String, String), String>,
}

impl Descriptions {
    /// Inflates and reads them.
    pub(super) fn load() -> Self {
        let mut text = String::new();
        // The text was made by our own build; should it be broken, documents are served without descriptions.
        if flate2::read::DeflateDecoder::new(DEFLATED).read_to_string(&mut text).is_err() {
            text.clear();
        }
        let place = |line: &str| {
            let mut parts = line.splitn(3, '\t');
            let (definition, field) = (parts.next()?.to_owned(), parts.next()?.to_owned());
            Some(((definition, field), unescaped(parts.next()?)))
        };
        Self { by_place: text.lines().filter_map(place).collect() }
    }

    /// The description of a type (empty `field`) or of one of its fields.
    pub(super) fn get(&self, definition: &str, field: &str) -> Option<&str> {
        self.by_place.get(&(definition.to_owned(), field.to_lowercase())).map(String::as_str)
    }
}

fn unescaped(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match (character, character == '\\') {
            (_, true) => match characters.next() {
                Some('n') => plain.push('\n'),
                Some(other) => plain.push(other),
                None => {}
            },
            (character, false) => plain.push(character),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_and_fields_are_described() {
        let descriptions = Descriptions::load();
        for (definition, field, start) in [
            ("io.k8s.api.core.v1.ServicePort", "", "ServicePort contains information"),
            ("io.k8s.api.core.v1.ServicePort", "targetPort", "Number or name of the port"),
            ("io.k8s.api.core.v1.ServiceSpec", "clusterIPs", "ClusterIPs is a list"),
            ("io.k8s.api.core.v1.ServiceSpec", "type", "type determines"),
            ("io.k8s.api.discovery.v1.Endpoint", "addresses", "addresses of this endpoint"),
            ("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta", "labels", "Map of string keys"),
        ] {
            let text = descriptions.get(definition, field).unwrap_or_default();
            assert!(text.starts_with(start), "{definition} {field}: {text}");
        }
    }

    #[test]
    fn escapes() {
        assert_eq!(unescaped(r"a\nb\\n"), "a\nb\\n");
    }
}
