//! The `continue` token of a paged list, in the form that kube-apiserver uses.

use apiserver_machinery::status::Status;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

/// Where a paged list goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Continuation {
    /// The revision of the first page; `None` goes on with the newest state after the first page's history is gone.
    pub(crate) revision: Option<u64>,
    /// The first key of the next page.
    pub(crate) start: String,
}

#[derive(Serialize, Deserialize)]
struct Token {
    v: String,
    rv: i64,
    start: String,
}

const VERSION: &str = "meta.k8s.io/v1";

impl Continuation {
    /// The token of a page that ends with `last_key`; `start` is stored relative to the prefix of the list.
    pub(crate) fn after(last_key: &str, prefix: &str, revision: Option<u64>) -> String {
        let relative = last_key.strip_prefix(prefix).unwrap_or(last_key);
        encode(&format!("{relative}\0"), revision)
    }

    /// The token that goes on where this one would have, but in the newest state.
    pub(crate) fn inconsistent(&self, prefix: &str) -> String {
        encode(self.start.strip_prefix(prefix).unwrap_or(&self.start), None)
    }

    /// Reads a token for a list of `prefix`.
    ///
    /// # Errors
    /// 400 with the texts of kube-apiserver.
    pub(crate) fn parse(text: &str, prefix: &str) -> Result<Self, Status> {
        let refuse =
            |cause: String| Status::bad_request(format!("invalid continue token: continue key is not valid: {cause}"));
        let json = URL_SAFE_NO_PAD.decode(text).map_err(|error| refuse(error.to_string()))?;
        let token: Token = serde_json::from_slice(&json).map_err(|error| refuse(error.to_string()))?;
        if token.v != VERSION {
            return Err(refuse(format!("server does not recognize this encoded version {}", token.v)));
        }
        if token.rv == 0 {
            return Err(refuse(format!("incorrect encoded start resourceVersion (version {VERSION})")));
        }
        if token.start.is_empty() {
            return Err(refuse(format!("encoded start key empty (version {VERSION})")));
        }
        if !is_clean(&token.start) {
            return Err(refuse(token.start));
        }
        let start = token.start.strip_prefix('/').unwrap_or(&token.start);
        Ok(Self { revision: u64::try_from(token.rv).ok(), start: format!("{prefix}{start}") })
    }
}

fn encode(start: &str, revision: Option<u64>) -> String {
    let rv = revision.and_then(|revision| i64::try_from(revision).ok()).unwrap_or(-1);
    let token = Token { v: VERSION.to_owned(), rv, start: start.to_owned() };
    // Three plain fields always serialize.
    URL_SAFE_NO_PAD.encode(serde_json::to_vec(&token).unwrap_or_default())
}

/// Whether the key stays below the prefix that it is joined to: no empty, `.` or `..` segments.
fn is_clean(start: &str) -> bool {
    let relative = start.strip_prefix('/').unwrap_or(start);
    !relative.split('/').any(|segment| matches!(segment, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_those_of_kubernetes() {
        let token = Continuation::after("/registry/pods/ns/b", "/registry/pods/", Some(12));
        let json = URL_SAFE_NO_PAD.decode(&token).unwrap();
        assert_eq!(json, br#"{"v":"meta.k8s.io/v1","rv":12,"start":"ns/b\u0000"}"#);
        let parsed = Continuation::parse(&token, "/registry/pods/").unwrap();
        assert_eq!(parsed, Continuation { revision: Some(12), start: "/registry/pods/ns/b\0".to_owned() });
        let again = Continuation::parse(&parsed.inconsistent("/registry/pods/"), "/registry/pods/").unwrap();
        assert_eq!(again, Continuation { revision: None, start: parsed.start });
    }

    #[test]
    fn broken_tokens_are_refused() {
        let make = |text: &str| URL_SAFE_NO_PAD.encode(text);
        for token in [
            "%%".to_owned(),
            make("x"),
            make(r#"{"v":"v2","rv":1,"start":"a"}"#),
            make(r#"{"v":"meta.k8s.io/v1","rv":0,"start":"a"}"#),
            make(r#"{"v":"meta.k8s.io/v1","rv":1,"start":""}"#),
            make(r#"{"v":"meta.k8s.io/v1","rv":1,"start":"../secrets/x"}"#),
            make(r#"{"v":"meta.k8s.io/v1","rv":1,"start":"a/../../b"}"#),
        ] {
            let status = Continuation::parse(&token, "/registry/pods/").unwrap_err();
            assert_eq!(status.code, 400, "{token}");
            assert!(status.message.starts_with("invalid continue token: "), "{}", status.message);
        }
    }
}
