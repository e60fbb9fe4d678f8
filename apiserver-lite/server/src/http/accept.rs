//! Content negotiation: what form of an object the `Accept` header asks for, and what form a body has.

use apiserver_machinery::decode::Format;
use apiserver_machinery::status::Status;
use http::HeaderMap;
use http::header::{ACCEPT, CONTENT_TYPE};

/// The form of objects in an answer. Always JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum View {
    /// The object as it is.
    Object,
    /// `meta.k8s.io/v1` Table.
    Table,
    /// `meta.k8s.io/v1` PartialObjectMetadata.
    Metadata,
}

/// One acceptable media type.
struct Range<'a> {
    media: &'a str,
    parameters: Vec<(&'a str, &'a str)>,
}

impl Range<'_> {
    fn parameter(&self, name: &str) -> &str {
        self.parameters.iter().find(|(key, _)| *key == name).map(|(_, value)| *value).unwrap_or_default()
    }

    fn is_json(&self) -> bool {
        matches!(self.media, "application/json" | "application/*" | "*/*")
    }

    /// The quality in thousandths.
    fn quality(&self) -> u32 {
        match self.parameter("q") {
            "" => 1_000,
            text => text.parse::<f32>().map_or(0, |quality| (quality.clamp(0.0, 1.0) * 1_000.0) as u32),
        }
    }

    fn view(&self) -> Option<View> {
        if !self.is_json() {
            return None;
        }
        match (self.parameter("as"), self.parameter("g"), self.parameter("v")) {
            ("", _, _) => Some(View::Object),
            ("Table", "meta.k8s.io", "v1") => Some(View::Table),
            ("PartialObjectMetadata" | "PartialObjectMetadataList", "meta.k8s.io", "v1") => Some(View::Metadata),
            _ => None,
        }
    }
}

fn ranges(headers: &HeaderMap) -> Vec<Range<'_>> {
    let texts = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let mut ranges: Vec<Range<'_>> =
        texts.flat_map(|text| text.split(',')).map(range).filter(|r| !r.media.is_empty()).collect();
    ranges.sort_by_key(|range| std::cmp::Reverse(range.quality()));
    ranges
}

fn range(text: &str) -> Range<'_> {
    let mut parts = text.split(';').map(str::trim);
    let media = parts.next().unwrap_or_default();
    let parameters =
        parts.filter_map(|part| part.split_once('=')).map(|(key, value)| (key.trim(), value.trim())).collect();
    Range { media, parameters }
}

/// The first form in the `Accept` header that this server can give.
///
/// # Errors
/// 406 when there is none.
pub(crate) fn view(headers: &HeaderMap) -> Result<View, Status> {
    let ranges = ranges(headers);
    if ranges.is_empty() {
        return Ok(View::Object);
    }
    ranges.iter().find_map(Range::view).ok_or_else(|| Status::not_acceptable(&["application/json"]))
}

/// Whether the client prefers aggregated discovery (v2) to the plain documents.
pub(crate) fn wants_aggregated_discovery(headers: &HeaderMap) -> bool {
    let aggregated = |range: &Range<'_>| {
        range.parameter("as") == "APIGroupDiscoveryList"
            && range.parameter("g") == "apidiscovery.k8s.io"
            && range.parameter("v") == "v2"
    };
    let usable = ranges(headers)
        .into_iter()
        .find(|range| range.is_json() && (range.parameter("as").is_empty() || aggregated(range)));
    usable.is_some_and(|range| aggregated(&range))
}

/// Whether the client names one of these media types.
pub(crate) fn names_any(headers: &HeaderMap, offered: &[&str]) -> bool {
    ranges(headers).iter().any(|range| offered.contains(&range.media))
}

/// Whether a plain JSON document is acceptable.
pub(crate) fn accepts_json(headers: &HeaderMap) -> bool {
    let ranges = ranges(headers);
    ranges.is_empty() || ranges.iter().any(Range::is_json)
}

/// The media type of the body, without parameters; empty when the header is absent.
pub(crate) fn content_type(headers: &HeaderMap) -> &str {
    let text = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    text.split(';').next().unwrap_or_default().trim()
}

/// How an object in a body is written; JSON when the client does not say.
///
/// # Errors
/// 415 for anything but JSON and YAML.
pub(crate) fn body_format(headers: &HeaderMap) -> Result<Format, Status> {
    match content_type(headers) {
        "" | "application/json" | "*/*" => Ok(Format::Json),
        "application/yaml" => Ok(Format::Yaml),
        _ => Err(Status::unsupported_media_type(&["application/json", "application/yaml"])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(accept: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, accept.parse().unwrap());
        headers
    }

    #[test]
    fn first_usable_form_wins() {
        let check = |accept: &str, wanted: Option<View>| assert_eq!(view(&headers(accept)).ok(), wanted, "{accept}");
        check("application/json", Some(View::Object));
        check("application/vnd.kubernetes.protobuf,application/json", Some(View::Object));
        check("application/vnd.kubernetes.protobuf", None);
        check("*/*", Some(View::Object));
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        check(kubectl, Some(View::Table));
        check("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1", Some(View::Metadata));
        check("application/json;as=Table;v=v9;g=meta.k8s.io", None);
        check("application/json;q=0.5,application/json;as=Table;v=v1;g=meta.k8s.io;q=0.9", Some(View::Table));
        assert_eq!(view(&HeaderMap::new()).ok(), Some(View::Object));
    }

    #[test]
    fn aggregated_discovery_is_asked_for() {
        let kubectl = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json;\
                       g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList,application/json";
        assert!(wants_aggregated_discovery(&headers(kubectl)));
        assert!(!wants_aggregated_discovery(&headers("application/json")));
        assert!(!wants_aggregated_discovery(&headers(
            "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList"
        )));
    }

    #[test]
    fn bodies_are_json_or_yaml() {
        let check = |text: &str, wanted: Option<Format>| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, text.parse().unwrap());
            assert_eq!(body_format(&headers).ok(), wanted, "{text}");
        };
        check("application/json; charset=utf-8", Some(Format::Json));
        check("application/yaml", Some(Format::Yaml));
        check("application/vnd.kubernetes.protobuf", None);
    }
}
