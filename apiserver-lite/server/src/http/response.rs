//! Answers: bodies, headers and Status documents.

use std::convert::Infallible;

use apiserver_machinery::status::Status;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{Stream, StreamExt as _};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, WARNING};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use serde_json::Value;

/// The body of an answer.
pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

const JSON: &str = "application/json";

/// A whole body.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}

/// A body that comes in chunks.
pub(crate) fn chunks(stream: impl Stream<Item = Bytes> + Send + 'static) -> Body {
    StreamBody::new(stream.map(|bytes| Ok::<_, Infallible>(Frame::data(bytes)))).boxed_unsync()
}

/// An answer with a body of a media type.
pub(crate) fn with_type(code: u16, media: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

/// An answer of JSON bytes.
pub(crate) fn json_bytes(code: u16, bytes: impl Into<Bytes>) -> Response<Body> {
    with_type(code, JSON, full(bytes))
}

/// An answer of JSON chunks.
pub(crate) fn json_chunks(stream: impl Stream<Item = Bytes> + Send + 'static) -> Response<Body> {
    with_type(200, JSON, chunks(stream))
}

/// An answer of one JSON document.
pub(crate) fn json(code: u16, document: &Value) -> Response<Body> {
    json_bytes(code, to_bytes(document))
}

/// An answer of plain text.
pub(crate) fn text(code: u16, text: impl Into<Bytes>) -> Response<Body> {
    with_type(code, "text/plain; charset=utf-8", full(text))
}

/// The answer to a failure, with its document.
pub(crate) fn failure(status: &Status, document: &Value) -> Response<Body> {
    let mut response = json(status.code, document);
    if let Some(seconds) = status.retry_after_seconds() {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// Adds a `Warning` header for each text.
pub(crate) fn warn(response: &mut Response<Body>, warnings: &[String]) {
    for warning in warnings {
        let escaped: String = warning.chars().filter(|c| !c.is_control()).flat_map(escape).collect();
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{escaped}\"")) {
            response.headers_mut().append(WARNING, value);
        }
    }
}

fn escape(character: char) -> impl Iterator<Item = char> {
    let backslash = matches!(character, '"' | '\\').then_some('\\');
    backslash.into_iter().chain([character])
}

/// The text of a document.
pub(crate) fn to_bytes(document: &Value) -> Bytes {
    let mut out = BytesMut::new();
    // A JSON value always serializes, and a growing buffer takes everything.
    let _ = serde_json::to_writer((&mut out).writer(), document);
    out.freeze()
}
