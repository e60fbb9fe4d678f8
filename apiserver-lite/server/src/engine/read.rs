//! The verbs `get` and `list`, and what `resourceVersion` means for them.

use apiserver_machinery::status::Status;
use apiserver_store::{Entry, ListOptions, Revision, StoreError};

use super::continuation::Continuation;
use super::keys::{object_key, storage_resource};
use super::selection::Selection;
use super::{Engine, LIST_TOO_OLD, Stored, Target, keys, unexpected};

/// How many entries are read at once where a selector or a limit makes it unclear how many are needed.
const PAGE_ENTRIES: usize = 1_000;

/// What `resourceVersionMatch` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum VersionMatch {
    /// Not given: at least as new; exactly, for the first page of a paged list.
    #[default]
    Unset,
    /// At least as new.
    NotOlderThan,
    /// As it was at that revision.
    Exact,
}

/// A list request.
#[derive(Clone, Debug)]
pub(crate) struct ListRequest {
    pub(crate) selection: Selection,
    /// 0 for "any".
    pub(crate) revision: Option<Revision>,
    pub(crate) version_match: VersionMatch,
    /// 0 is no limit.
    pub(crate) limit: usize,
    pub(crate) token: String,
}

/// A list, or a page of one.
#[derive(Debug)]
pub(crate) struct Listing {
    pub(crate) items: Vec<Stored>,
    pub(crate) revision: Revision,
    /// Empty on the last page.
    pub(crate) token: String,
    pub(crate) remaining: Option<u64>,
}

/// Why a list failed.
#[derive(Debug)]
pub(crate) struct ListError {
    pub(crate) status: Status,
    /// A token with which the client can go on in the newest state; belongs into `metadata.continue` of the Status. May be empty.
    pub(crate) token: String,
}

impl From<Status> for ListError {
    fn from(status: Status) -> Self {
        Self { status, token: String::new() }
    }
}

impl Engine {
    /// Reads one object; `revision` of `Some` asks for a state at least as new.
    ///
    /// # Errors
    /// 404, or 504 for a revision that has not been reached.
    pub(crate) async fn get(&self, target: &Target, revision: Option<Revision>) -> Result<Stored, Status> {
        if let Some(revision) = revision {
            self.wait_for(revision).await?;
        }
        let resource = storage_resource(target.resource);
        let key = object_key(resource, &target.namespace, &target.name);
        let read = self.store.get(&key, None).await.map_err(unexpected)?;
        read.entry.map(Stored::from).ok_or_else(|| target.not_found())
    }

    /// Lists a collection at one revision.
    ///
    /// # Errors
    /// 400 for a bad token, 410 for a revision whose history is gone, 504 for one that has not been reached.
    pub(crate) async fn list(&self, target: &Target, request: &ListRequest) -> Result<Listing, ListError> {
        let resource = storage_resource(target.resource);
        let prefix = keys::namespace_prefix(resource, &target.namespace);
        let continuation = match request.token.as_str() {
            "" => None,
            token => Some(Continuation::parse(token, &prefix)?),
        };
        let revision = match &continuation {
            Some(continuation) => continuation.revision.map(Revision),
            None => self.revision_to_read(request).await?,
        };
        let scan = Scan { prefix: &prefix, selection: &request.selection, limit: request.limit, revision };
        let start = continuation.as_ref().map_or(prefix.as_str(), |continuation| continuation.start.as_str());
        let listed = match exact_key(target, &request.selection, continuation.is_some()) {
            Some(key) => self.list_one(&key, &scan).await,
            None => self.scan(&scan, start).await,
        };
        listed.map_err(|error| match (error, &continuation) {
            (StoreError::Compacted { .. }, Some(continuation)) => expired_token(continuation, &prefix),
            (StoreError::Compacted { .. }, None) => Status::expired(LIST_TOO_OLD).into(),
            (error, _) => unexpected(error).into(),
        })
    }

    /// The revision to read at, `None` for the newest, after waiting for what the client has seen already.
    async fn revision_to_read(&self, request: &ListRequest) -> Result<Option<Revision>, Status> {
        let Some(revision) = request.revision.filter(|revision| revision.0 > 0) else { return Ok(None) };
        self.wait_for(revision).await?;
        let exact = match request.version_match {
            VersionMatch::Exact => true,
            VersionMatch::NotOlderThan => false,
            VersionMatch::Unset => request.limit > 0,
        };
        Ok(exact.then_some(revision))
    }

    async fn scan(&self, scan: &Scan<'_>, start: &str) -> Result<Listing, StoreError> {
        let everything = scan.selection.is_everything();
        let mut revision = scan.revision;
        let mut start = start.to_owned();
        let mut found: Vec<Entry> = Vec::new();
        loop {
            let limit = match (everything, scan.limit) {
                (true, limit) => limit,
                (false, 0) => 0,
                (false, limit) => limit.max(PAGE_ENTRIES),
            };
            let page = self.store.list(scan.prefix, ListOptions { revision, start: Some(&start), limit }).await?;
            revision = Some(page.revision);
            let mut remaining = page.remaining;
            let mut entries = page.entries.into_iter();
            let last_read = entries.as_slice().last().map(|entry| entry.key.clone());
            while let Some(entry) = entries.next() {
                if everything || scan.selection.wants(&entry.value) {
                    found.push(entry);
                }
                if scan.limit > 0 && found.len() >= scan.limit {
                    remaining += entries.len() as u64;
                    break;
                }
            }
            let full = scan.limit > 0 && found.len() >= scan.limit;
            match last_read {
                Some(key) if remaining > 0 && !full => start = format!("{key}\0"),
                _ => return Ok(finish(scan, found, page.revision, if full { remaining } else { 0 })),
            }
        }
    }

    /// A list that can hold one object only is a look-up.
    async fn list_one(&self, key: &str, scan: &Scan<'_>) -> Result<Listing, StoreError> {
        let read = self.store.get(key, scan.revision).await?;
        let wanted = read.entry.filter(|entry| scan.selection.wants(&entry.value));
        Ok(finish(scan, wanted.into_iter().collect(), read.revision, 0))
    }
}

/// One walk over a prefix.
struct Scan<'a> {
    prefix: &'a str,
    selection: &'a Selection,
    limit: usize,
    revision: Option<Revision>,
}

fn finish(scan: &Scan<'_>, entries: Vec<Entry>, revision: Revision, remaining: u64) -> Listing {
    let token = match entries.last() {
        Some(last) if remaining > 0 => Continuation::after(&last.key, scan.prefix, Some(revision.0)),
        _ => String::new(),
    };
    // How many of the remaining ones a selector wants is not known without reading them.
    let counted = !token.is_empty() && scan.selection.is_everything();
    Listing {
        items: entries.into_iter().map(Stored::from).collect(),
        revision,
        token,
        remaining: counted.then_some(remaining),
    }
}

/// The only key that the list can hold, if its selector names one.
fn exact_key(target: &Target, selection: &Selection, continued: bool) -> Option<String> {
    if continued {
        return None;
    }
    let name = selection.exact_name()?;
    let namespace = match (target.resource.namespaced, target.namespace.as_str()) {
        (true, "") => selection.exact_namespace()?,
        (_, namespace) => namespace,
    };
    // A name with a slash is no name, and must not reach another namespace.
    let clean = !name.contains('/') && !namespace.contains('/');
    clean.then(|| object_key(storage_resource(target.resource), namespace, name))
}

fn expired_token(continuation: &Continuation, prefix: &str) -> ListError {
    let status = Status::expired(
        "The provided continue parameter is too old to display a consistent list result. Start a new list, or go on with the \
         continue token of this response to get the rest as it is now.",
    );
    ListError { status, token: continuation.inconsistent(prefix) }
}
