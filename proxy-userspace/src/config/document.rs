//! The configuration file: one or two YAML documents, told apart by `kind`, and where in them something is wrong.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::own::{API_VERSION, KIND};
use super::{ConfigError, KUBE_PROXY_API_VERSION, KUBE_PROXY_KIND, KubeProxyConfiguration, ProxyConfiguration};

/// What a file holds, or the flags say: what kube-proxy knows, and what only we know.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Documents {
    /// `kind: KubeProxyConfiguration`.
    pub kube_proxy: KubeProxyConfiguration,
    /// `kind: ProxyConfiguration`.
    pub own: ProxyConfiguration,
}

/// What tells documents apart.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Head {
    api_version: Option<String>,
    kind: Option<String>,
}

impl Documents {
    /// Reads a file: at most one document of each kind, in any order, and nothing else.
    ///
    /// # Errors
    /// The first thing that is wrong, with its field and line.
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    pub(super) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let (mut kube_proxy, mut own) = (None, None);
        for document in split(text) {
            let head: Head = parse(&document, path)?;
            let name = (head.api_version.as_deref(), head.kind.as_deref());
            let again = match name {
                (Some(KUBE_PROXY_API_VERSION), Some(KUBE_PROXY_KIND)) => {
                    kube_proxy.replace(parse(&document, path)?).is_some()
                }
                (Some(API_VERSION), Some(KIND)) => own.replace(parse(&document, path)?).is_some(),
                _ => return Err(unknown(name, path)),
            };
            if again {
                let problem =
                    format!("comes twice, with value {:?}; each kind may come once", head.kind.unwrap_or_default());
                return Err(ConfigError::Field {
                    path: path.to_owned(),
                    field: "kind".to_owned(),
                    line: None,
                    problem,
                });
            }
        }
        if kube_proxy.is_none() && own.is_none() {
            return Err(unknown((None, None), path));
        }
        Ok(Self { kube_proxy: kube_proxy.unwrap_or_default(), own: own.unwrap_or_default() })
    }
}

fn unknown((api_version, kind): (Option<&str>, Option<&str>), path: &Path) -> ConfigError {
    let field = match (api_version, kind) {
        (Some(KUBE_PROXY_API_VERSION | API_VERSION), _) => "kind",
        _ => "apiVersion",
    };
    let problem = format!(
        "apiVersion {:?} with kind {:?} must be {KUBE_PROXY_API_VERSION:?} with {KUBE_PROXY_KIND:?}, or {API_VERSION:?} with {KIND:?}",
        api_version.unwrap_or_default(),
        kind.unwrap_or_default()
    );
    ConfigError::Field { path: path.to_owned(), field: field.to_owned(), line: None, problem }
}

/// The documents that hold anything, each with empty lines in front for what comes before it, so that lines keep their number.
/// `---` at the beginning of a line ends a document wherever it stands (YAML 1.2, 9.1.2), a block scalar included.
fn split(text: &str) -> Vec<String> {
    let mut documents = vec![String::new()];
    for (number, line) in text.lines().enumerate() {
        let marker = line.strip_prefix("---").filter(|rest| rest.is_empty() || rest.starts_with([' ', '\t']));
        if let Some(rest) = marker {
            documents.push(format!("{}   {rest}\n", "\n".repeat(number)));
        } else if let Some(document) = documents.last_mut() {
            document.push_str(line);
            document.push('\n');
        }
    }
    documents.retain(|document| {
        document.lines().any(|line| !(line.trim().is_empty() || line.trim_start().starts_with('#')))
    });
    documents
}

/// One document, in two steps: what fails in the first is no YAML, in the second a field is wrong.
fn parse<T: DeserializeOwned>(document: &str, path: &Path) -> Result<T, ConfigError> {
    serde_saphyr::from_str::<serde_json::Value>(document)
        .map_err(|error| ConfigError::Yaml { path: path.to_owned(), problem: first_line(error.without_snippet()) })?;
    let mut field = String::new();
    let parsed = serde_saphyr::with_deserializer_from_str(document, |deserializer| {
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            field = error.path().to_string();
            error.into_inner()
        })
    });
    parsed.map_err(|error| {
        let line = error.location().map(|location| location.line());
        let (field, problem) = explain(&field, error.without_snippet());
        ConfigError::Field { path: path.to_owned(), field, line, problem }
    })
}

/// The full name of the field, and what is wrong with it.
fn explain(place: &str, error: &serde_saphyr::Error) -> (String, String) {
    let place = place.trim_end_matches(['?', '.']);
    if let serde_saphyr::Error::SerdeUnknownField { field, .. } = error {
        let whole = if place.is_empty() || place == field || place.ends_with(&format!(".{field}")) {
            if place.is_empty() { field.clone() } else { place.to_owned() }
        } else {
            format!("{place}.{field}")
        };
        return (whole, "is not a field of this configuration".to_owned());
    }
    let place = if place.is_empty() { "(top level)" } else { place };
    (place.to_owned(), first_line(error))
}

fn first_line(error: &serde_saphyr::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
