//! Objects, lists and events in the form that the client asked for.

use apiserver_machinery::schema::Resource;
use apiserver_machinery::status::Status;
use apiserver_machinery::table::{self, IncludeObject};
use apiserver_store::Revision;
use bytes::{BufMut, Bytes, BytesMut};
use futures::stream;
use http::Response;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::accept::View;
use super::response::{self, Body, to_bytes};
use crate::engine::{
    EventEncoder, Listing, Stored, bookmark_object, from_storage, is_converted, partial_metadata, put_decimal,
};

/// Chunks of a long list are about this big.
const CHUNK_BYTES: usize = 64 << 10;

/// How a request wants to see objects of a resource.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Presenter {
    pub(crate) resource: &'static Resource,
    pub(crate) view: View,
    pub(crate) include: IncludeObject,
}

impl Presenter {
    /// One object.
    ///
    /// # Errors
    /// 500.
    pub(crate) fn object(&self, code: u16, stored: &Stored) -> Result<Response<Body>, Status> {
        if self.is_plain() {
            let mut out = BytesMut::new();
            stored.write_json(&mut out);
            return Ok(response::json_bytes(code, out.freeze()));
        }
        let object = from_storage(self.resource, stored.decode()?);
        Ok(response::json(code, &self.transform(object)))
    }

    /// A list.
    ///
    /// # Errors
    /// 500.
    pub(crate) fn list(&self, listing: Listing) -> Result<Response<Body>, Status> {
        match self.view {
            View::Table => self.table(&listing),
            View::Object if self.is_plain() => Ok(self.plain_list(listing)),
            View::Object | View::Metadata => self.converted_list(&listing),
        }
    }

    fn is_plain(&self) -> bool {
        self.view == View::Object && !is_converted(self.resource)
    }

    fn transform(&self, object: Value) -> Value {
        match self.view {
            View::Object => object,
            View::Metadata => partial_metadata(&object),
            View::Table => {
                let version = object.get("metadata").and_then(|metadata| metadata.get("resourceVersion")).cloned();
                let list_meta = json!({"resourceVersion": version.unwrap_or_default()});
                table::render(self.resource, [&object], &list_meta, self.include, Timestamp::now())
            }
        }
    }

    fn table(&self, listing: &Listing) -> Result<Response<Body>, Status> {
        let objects = self.decode_all(listing)?;
        let document = table::render(self.resource, &objects, &list_meta(listing), self.include, Timestamp::now());
        Ok(response::json(200, &document))
    }

    fn converted_list(&self, listing: &Listing) -> Result<Response<Body>, Status> {
        let items: Vec<Value> = self.decode_all(listing)?.into_iter().map(|object| self.transform(object)).collect();
        let (kind, version) = match self.view {
            View::Metadata => ("PartialObjectMetadataList".to_owned(), "meta.k8s.io/v1".to_owned()),
            _ => (self.resource.list_kind(), self.resource.api_version()),
        };
        let document = json!({"kind": kind, "apiVersion": version, "metadata": list_meta(listing), "items": items});
        Ok(response::json(200, &document))
    }

    fn decode_all(&self, listing: &Listing) -> Result<Vec<Value>, Status> {
        listing.items.iter().map(|item| item.decode().map(|object| from_storage(self.resource, object))).collect()
    }

    /// A list without parsing its items: their stored bytes are sent, chunk by chunk for a long one.
    fn plain_list(&self, listing: Listing) -> Response<Body> {
        let mut head = BytesMut::new();
        let kind = json!({"kind": self.resource.list_kind(), "apiVersion": self.resource.api_version()});
        // `{"apiVersion":..,"kind":..` without its closing brace.
        let opening = to_bytes(&kind);
        head.put_slice(opening.strip_suffix(b"}").unwrap_or(&opening));
        head.put_slice(b",\"metadata\":");
        head.put_slice(&to_bytes(&list_meta(&listing)));
        head.put_slice(b",\"items\":[");
        let mut items = Items { rest: listing.items.into_iter(), first: true, done: false };
        let opening = items.fill(head);
        if items.done {
            return response::json_bytes(200, opening);
        }
        let rest = stream::unfold(items, |mut items| async move {
            if items.done {
                return None;
            }
            let chunk = items.fill(BytesMut::with_capacity(CHUNK_BYTES + 4096));
            Some((chunk, items))
        });
        response::json_chunks(futures::StreamExt::chain(stream::iter([opening]), rest))
    }
}

/// Items of a list on their way out.
struct Items {
    rest: std::vec::IntoIter<Stored>,
    first: bool,
    done: bool,
}

impl Items {
    fn fill(&mut self, mut out: BytesMut) -> Bytes {
        while out.len() < CHUNK_BYTES {
            let Some(item) = self.rest.next() else {
                out.put_slice(b"]}");
                self.done = true;
                break;
            };
            if !std::mem::take(&mut self.first) {
                out.put_u8(b',');
            }
            item.write_json(&mut out);
        }
        out.freeze()
    }
}

fn list_meta(listing: &Listing) -> Value {
    let mut version = BytesMut::new();
    put_decimal(&mut version, listing.revision.0);
    let mut metadata = json!({"resourceVersion": String::from_utf8_lossy(&version)});
    if let Some(fields) = metadata.as_object_mut() {
        if !listing.token.is_empty() {
            fields.insert("continue".to_owned(), json!(listing.token));
        }
        if let Some(remaining) = listing.remaining {
            fields.insert("remainingItemCount".to_owned(), json!(remaining));
        }
    }
    metadata
}

/// Writes the objects of a watch.
pub(crate) struct WatchPresenter {
    presenter: Presenter,
    /// Only the first Table of a stream describes its columns.
    columns_sent: bool,
}

impl WatchPresenter {
    pub(crate) fn new(presenter: Presenter) -> Self {
        Self { presenter, columns_sent: false }
    }
}

impl EventEncoder for WatchPresenter {
    fn is_plain(&self) -> bool {
        self.presenter.view == View::Object
    }

    fn transform(&mut self, object: Value) -> Result<Value, Status> {
        let mut document = self.presenter.transform(object);
        if self.presenter.view == View::Table
            && std::mem::replace(&mut self.columns_sent, true)
            && let Some(fields) = document.as_object_mut()
        {
            fields.insert("columnDefinitions".to_owned(), Value::Null);
        }
        Ok(document)
    }

    fn bookmark(&self, revision: Revision, initial_events_end: bool) -> Value {
        let resource = self.presenter.resource;
        match self.presenter.view {
            View::Object => bookmark_object(resource.kind, &resource.api_version(), revision, initial_events_end),
            View::Metadata => bookmark_object("PartialObjectMetadata", "meta.k8s.io/v1", revision, initial_events_end),
            View::Table => {
                let row = bookmark_object("PartialObjectMetadata", "meta.k8s.io/v1", revision, initial_events_end);
                json!({
                    "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": revision.to_string()},
                    "columnDefinitions": null, "rows": [{"cells": [], "object": row}],
                })
            }
        }
    }
}
