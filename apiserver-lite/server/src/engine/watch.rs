//! The verb `watch`: a stream of newline-separated JSON events.

use std::sync::Arc;
use std::time::Duration;

use apiserver_machinery::schema::Resource;
use apiserver_machinery::status::Status;
use apiserver_store::{Event, EventKind, Revision, StoreError, Watch, WatchItem};
use bytes::{BufMut, Bytes, BytesMut};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::keys::{namespace_prefix, object_key, storage_resource};
use super::read::{ListRequest, VersionMatch};
use super::{Engine, Selection, Stored, Target, unexpected};

/// How often a watch gets a bookmark, as in the watch cache of kube-apiserver.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);
/// How long before its end a watch gets its last bookmark.
const BOOKMARK_BEFORE_END: Duration = Duration::from_secs(2);
/// Events that are ready are put into one write up to about this size.
const CHUNK_BYTES: usize = 64 << 10;
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// A watch request.
#[derive(Clone, Debug)]
pub(crate) struct WatchRequest {
    pub(crate) selection: Selection,
    /// `None` and 0 begin with the present state.
    pub(crate) revision: Option<Revision>,
    pub(crate) bookmarks: bool,
    /// `sendInitialEvents`, if given.
    pub(crate) initial_events: Option<bool>,
    pub(crate) timeout: Duration,
}

/// How objects are written into the stream.
pub(crate) trait EventEncoder: Send {
    /// Whether objects go out as they are, apart from the envelope.
    fn is_plain(&self) -> bool;

    /// The document that stands for an object in this stream.
    ///
    /// # Errors
    /// 500.
    fn transform(&mut self, object: Value) -> Result<Value, Status>;

    /// The document of a bookmark.
    fn bookmark(&self, revision: Revision, initial_events_end: bool) -> Value;
}

/// What a watch does next.
pub(crate) enum WatchStep {
    /// Send this.
    Chunk(Bytes),
    /// The stream has ended.
    End,
}

/// A running watch of one client.
pub(crate) struct WatchStream {
    engine: Arc<Engine>,
    resource: &'static Resource,
    selection: Selection,
    encoder: Box<dyn EventEncoder>,
    source: Source,
    bookmarks: bool,
    next_bookmark: Instant,
    last_bookmark: Option<Instant>,
    deadline: Instant,
}

/// Where a watch stands.
enum Source {
    /// The present state, then the events after it.
    Initial {
        items: std::vec::IntoIter<Stored>,
        revision: Revision,
        announce_end: bool,
        then: Watch,
    },
    /// Events as they happen.
    Live(Watch),
    /// One error to report, then the end.
    Failed(Status),
    Ended,
}

impl Engine {
    /// Starts a watch. What goes wrong from here on is reported inside the stream, as kube-apiserver does.
    pub(crate) async fn watch(
        self: &Arc<Self>,
        target: &Target,
        request: WatchRequest,
        encoder: Box<dyn EventEncoder>,
    ) -> WatchStream {
        let source = self.open(target, &request).await.unwrap_or_else(Source::Failed);
        let now = Instant::now();
        let deadline = now + request.timeout;
        WatchStream {
            engine: Arc::clone(self),
            resource: target.resource,
            selection: request.selection,
            encoder,
            source,
            bookmarks: request.bookmarks,
            next_bookmark: now + BOOKMARK_INTERVAL,
            last_bookmark: deadline.checked_sub(BOOKMARK_BEFORE_END).filter(|at| *at > now),
            deadline,
        }
    }

    async fn open(&self, target: &Target, request: &WatchRequest) -> Result<Source, Status> {
        let given = request.revision.filter(|revision| revision.0 > 0);
        if let Some(revision) = given {
            self.wait_for(revision).await?;
        }
        let with_state = request.initial_events.unwrap_or(given.is_none());
        if with_state {
            return self.open_with_state(target, request).await;
        }
        let revision = match given {
            Some(revision) => revision,
            None => self.store.revision().await.map_err(unexpected)?,
        };
        self.follow(target, request, revision).await.map(Source::Live)
    }

    async fn open_with_state(&self, target: &Target, request: &WatchRequest) -> Result<Source, Status> {
        let list = ListRequest {
            selection: request.selection.clone(),
            revision: None,
            version_match: VersionMatch::Unset,
            limit: 0,
            token: String::new(),
        };
        let listing = self.list(target, &list).await.map_err(|error| error.status)?;
        let then = self.follow(target, request, listing.revision).await?;
        let announce_end = request.bookmarks && request.initial_events == Some(true);
        Ok(Source::Initial { items: listing.items.into_iter(), revision: listing.revision, announce_end, then })
    }

    async fn follow(&self, target: &Target, request: &WatchRequest, from: Revision) -> Result<Watch, Status> {
        let scope = watch_scope(target, &request.selection);
        self.store.watch(&scope, from).await.map_err(|error| match error {
            StoreError::Compacted { .. } => Status::expired("The resourceVersion for the provided watch is too old."),
            other => unexpected(other),
        })
    }
}

/// The narrowest scope that holds all that the watch can want.
fn watch_scope(target: &Target, selection: &Selection) -> String {
    let resource = storage_resource(target.resource);
    let namespace = match target.namespace.as_str() {
        "" => selection.exact_namespace().unwrap_or_default(),
        namespace => namespace,
    };
    match selection.exact_name() {
        Some(name) if is_segment(name) && (is_segment(namespace) || !resource.namespaced) => {
            object_key(resource, namespace, name)
        }
        _ if is_segment(namespace) => namespace_prefix(resource, namespace),
        _ => namespace_prefix(resource, ""),
    }
}

fn is_segment(text: &str) -> bool {
    !text.is_empty() && !text.contains('/')
}

impl WatchStream {
    /// Waits for the next thing to send.
    pub(crate) async fn next(&mut self) -> WatchStep {
        match std::mem::replace(&mut self.source, Source::Ended) {
            Source::Initial { items, revision, announce_end, then } => {
                self.send_state(items, revision, announce_end, then)
            }
            Source::Live(watch) => self.follow(watch).await,
            Source::Failed(status) => WatchStep::Chunk(error_line(&status)),
            Source::Ended => WatchStep::End,
        }
    }

    fn send_state(
        &mut self,
        mut items: std::vec::IntoIter<Stored>,
        revision: Revision,
        announce_end: bool,
        then: Watch,
    ) -> WatchStep {
        let mut out = BytesMut::new();
        for item in items.by_ref() {
            if let Err(status) = self.put(&mut out, "ADDED", &item) {
                return self.fail(out, &status);
            }
            if out.len() >= CHUNK_BYTES {
                self.source = Source::Initial { items, revision, announce_end, then };
                return WatchStep::Chunk(out.freeze());
            }
        }
        if announce_end {
            self.put_bookmark(&mut out, revision, true);
        }
        self.source = Source::Live(then);
        // An empty chunk makes the server send its headers, which tells the client that the watch stands.
        WatchStep::Chunk(out.freeze())
    }

    async fn follow(&mut self, mut watch: Watch) -> WatchStep {
        let mut out = BytesMut::new();
        while out.is_empty() {
            let wake = self.next_wake();
            let item = tokio::select! {
                item = watch.next() => match item {
                    Ok(item) => item,
                    // The client was too slow: it goes on from the last version that it saw.
                    Err(_) => return WatchStep::End,
                },
                () = tokio::time::sleep_until(wake) => {
                    if Instant::now() >= self.deadline {
                        return WatchStep::End;
                    }
                    self.ask_progress(&watch).await;
                    continue;
                }
            };
            if let Err(status) = self.put_ready(&mut out, item, &mut watch) {
                return self.fail(out, &status);
            }
        }
        self.source = Source::Live(watch);
        WatchStep::Chunk(out.freeze())
    }

    /// Writes this item and those that are ready behind it.
    fn put_ready(&mut self, out: &mut BytesMut, first: WatchItem, watch: &mut Watch) -> Result<(), Status> {
        let mut next = Some(first);
        while let Some(item) = next {
            match item {
                WatchItem::Event(event) => self.put_event(out, &event)?,
                WatchItem::Progress(revision) => self.put_bookmark(out, revision, false),
            }
            next = if out.len() < CHUNK_BYTES { watch.try_next() } else { None };
        }
        Ok(())
    }

    fn next_wake(&self) -> Instant {
        if !self.bookmarks {
            return self.deadline;
        }
        let bookmark = self.last_bookmark.map_or(self.next_bookmark, |last| last.min(self.next_bookmark));
        bookmark.min(self.deadline)
    }

    async fn ask_progress(&mut self, watch: &Watch) {
        let now = Instant::now();
        if self.last_bookmark.is_some_and(|at| at <= now) {
            self.last_bookmark = None;
        }
        if self.next_bookmark <= now {
            self.next_bookmark = now + BOOKMARK_INTERVAL;
        }
        // A bookmark that can't be had is one less, nothing more: the next one comes in a minute.
        let _ = self.engine.store.request_progress(watch.id()).await;
    }

    /// An event as the selectors make it look: what begins or ceases to match appears or disappears.
    fn put_event(&mut self, out: &mut BytesMut, event: &Event) -> Result<(), Status> {
        let before = event.previous.as_ref().is_some_and(|previous| self.selection.wants(previous));
        let after = event.kind != EventKind::Deleted && self.selection.wants(&event.value);
        let (kind, bytes) = match (before, after) {
            (false, true) => ("ADDED", &event.value),
            (true, true) => ("MODIFIED", &event.value),
            (true, false) => ("DELETED", event.previous.as_ref().unwrap_or(&event.value)),
            (false, false) => return Ok(()),
        };
        self.put(out, kind, &Stored::new(bytes.clone(), event.revision))
    }

    fn put(&mut self, out: &mut BytesMut, kind: &str, stored: &Stored) -> Result<(), Status> {
        let plain = self.encoder.is_plain() && !super::events::is_converted(self.resource);
        // What can fail comes before the first byte: half a line would make the stream unreadable.
        let document = match plain {
            true => None,
            false => Some(self.encoder.transform(super::from_storage(self.resource, stored.decode()?))?),
        };
        out.put_slice(b"{\"type\":\"");
        out.put_slice(kind.as_bytes());
        out.put_slice(b"\",\"object\":");
        match document {
            Some(document) => put_json(out, &document),
            None => stored.write_json(out),
        }
        out.put_slice(b"}\n");
        Ok(())
    }

    fn put_bookmark(&mut self, out: &mut BytesMut, revision: Revision, initial_events_end: bool) {
        let bookmark = self.encoder.bookmark(revision, initial_events_end);
        put_json(out, &json!({"type": "BOOKMARK", "object": bookmark}));
        out.put_u8(b'\n');
    }

    fn fail(&mut self, mut out: BytesMut, status: &Status) -> WatchStep {
        out.put_slice(&error_line(status));
        WatchStep::Chunk(out.freeze())
    }
}

/// The bookmark of a plain or metadata stream.
pub(crate) fn bookmark_object(kind: &str, api_version: &str, revision: Revision, initial_events_end: bool) -> Value {
    let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
    if let (true, Some(fields)) = (initial_events_end, metadata.as_object_mut()) {
        fields.insert("annotations".to_owned(), json!({INITIAL_EVENTS_END: "true"}));
    }
    json!({"kind": kind, "apiVersion": api_version, "metadata": metadata})
}

fn error_line(status: &Status) -> Bytes {
    let mut out = BytesMut::new();
    put_json(&mut out, &json!({"type": "ERROR", "object": status.to_value()}));
    out.put_u8(b'\n');
    out.freeze()
}

fn put_json(out: &mut BytesMut, value: &Value) {
    // A JSON value always serializes, and a growing buffer takes everything.
    let _ = serde_json::to_writer(out.writer(), value);
}
