//! The table of flows from user space: read from its map, and changed by the kernel's own code (`proxy-ebpf/src/edit.rs`).

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::{Array, Map, MapError};
use node_sys::bpf::{open_pinned, test_run};
use node_sys::read_elements;
use proxy_common::flow_table::{
    FLOW_EDIT_ADD, FLOW_EDIT_BUSY, FLOW_EDIT_DONE, FLOW_EDIT_NO, FLOW_EDIT_READ, FLOW_EDIT_REMOVE, FlowEdit, FlowEntry,
    FlowHead, FlowSecret, WAYS,
};
use proxy_common::pod::Pod;
use proxy_common::{Flow, FlowKey};

use super::encode::UserAddress;
use crate::dataplane::SyncError;

/// Programs that change the tables; pinned, so that other processes can run them.
pub(super) const EDITORS: [&str; 2] = ["edit_flows_v4", "edit_flows_v6"];
/// What the kernel's test runs want in front of a request.
const ETHERNET: usize = 14;
/// How often an edit of a bucket that is being written is tried.
const ATTEMPTS: u32 = 100;

/// Buckets for `flows` entries: twice as many fit in, so that none of them is pushed out because its two buckets are full.
pub(super) fn buckets(flows: u32) -> u32 {
    flows.div_ceil(WAYS / 2)
}

/// The most flows for which a table has so many buckets.
pub(super) fn flows_of(buckets: u32) -> u32 {
    buckets.saturating_mul(WAYS / 2)
}

/// The map of [`FlowSecret`].
const SECRET: &str = "FLOW_SECRET";

/// Makes the tables' secret where they have none: new tables.
pub(super) fn make_secret(object: &mut Ebpf) -> Result<(), SyncError> {
    let failed =
        |error: MapError| SyncError::Kernel { object: format!("map {SECRET}"), source: io::Error::other(error) };
    // Borrowed: the programs are still to be loaded.
    let map = object.map_mut(SECRET).ok_or_else(|| failed(MapError::InvalidName { name: SECRET.to_owned() }))?;
    let mut map: Array<_, FlowSecret> = map.try_into().map_err(failed)?;
    if map.get(&0, 0).map_err(failed)? == FlowSecret::default() {
        // The standard library's own keys come from the kernel's random numbers.
        let random = RandomState::new();
        let words = |number: usize| random.hash_one(number);
        let pair = |number| [words(number) as u32, (words(number) >> 32) as u32];
        let secret = FlowSecret { addresses: std::array::from_fn(pair), transport: pair(usize::MAX) };
        map.set(0, secret, 0).map_err(failed)?;
    }
    Ok(())
}

/// Makes every bucket of a table empty that no program works on.
pub(super) fn forget(object: &mut Ebpf, heads: &str) -> Result<(), SyncError> {
    let failed = |source| SyncError::Kernel { object: format!("map {heads}"), source };
    let map = object.map_mut(heads).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let Map::Array(data) = &*map else { return Err(failed(io::ErrorKind::InvalidData.into())) };
    let (mut all, mut bucket) = (Vec::new(), 0);
    let visit = |head: &[u8]| {
        if head.iter().any(|byte| *byte != 0) {
            all.push(bucket);
        }
        bucket += 1;
    };
    read_elements(data.fd().as_fd(), size_of::<FlowHead>(), 0, usize::MAX, visit).map_err(failed)?;
    let other = |error: MapError| failed(io::Error::other(error));
    let mut map: Array<_, FlowHead> = map.try_into().map_err(other)?;
    all.into_iter().try_for_each(|bucket| map.set(bucket, FlowHead::default(), 0)).map_err(other)
}

/// Where a version's programs for user space are pinned.
pub(super) fn program_pin(version: &Path, program: &str) -> PathBuf {
    version.join("programs").join(program)
}

/// Counts the entries in use by the value of a bucket's head.
pub(super) fn used(head: &[u8]) -> usize {
    let tags = FlowHead::from_bytes(head).map_or(0, |head| head.tags);
    tags.to_ne_bytes().iter().filter(|tag| !matches!(tag, 0 | 0xff)).count()
}

/// The flows of one family.
#[derive(Debug)]
pub struct FlowTable<A> {
    heads: OwnedFd,
    entries: OwnedFd,
    editor: OwnedFd,
    family: PhantomData<A>,
}

impl<A: UserAddress> FlowTable<A>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
    FlowEdit<A>: Pod + Default,
{
    /// Opens what is pinned in the directory of a version.
    ///
    /// # Errors
    /// When a pin is not there or can't be opened.
    pub fn open(version: &Path) -> io::Result<Self> {
        let map = |name: &str| open_pinned(&version.join("maps").join(format!("{name}_{}", A::SUFFIX)));
        let [v4, v6] = EDITORS;
        let editor = open_pinned(&program_pin(version, if A::WORDS == 1 { v4 } else { v6 }))?;
        Ok(Self::new(map("FLOW_HEADS")?, map("FLOWS")?, editor))
    }

    /// From the maps of buckets and of entries, and the program that edits them.
    pub(super) fn new(heads: OwnedFd, entries: OwnedFd, editor: OwnedFd) -> Self {
        Self { heads, entries, editor, family: PhantomData }
    }

    /// Hands every flow to `visit`; what is written meanwhile may be missing.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn each(&self, mut visit: impl FnMut(FlowKey<A>, Flow<A>)) -> io::Result<()> {
        let mut buckets = Vec::new();
        let mut bucket = 0;
        read_elements(self.heads.as_fd(), size_of::<FlowHead>(), 0, usize::MAX, |head| {
            if used(head) > 0 {
                buckets.push(bucket);
            }
            bucket += 1;
        })?;
        // Neighbours in one call.
        for run in buckets.chunk_by(|one, next| one + 1 == *next) {
            let (first, count) = (run.first().copied().unwrap_or(0) * WAYS, run.len() * WAYS as usize);
            read_elements(self.entries.as_fd(), size_of::<FlowEntry<A>>(), first, count, |entry| {
                if let Some((key, flow)) = FlowEntry::<A>::from_bytes(entry) {
                    visit(key, flow);
                }
            })?;
        }
        Ok(())
    }

    /// The flow of `key`.
    ///
    /// # Errors
    /// When the program can't be run.
    pub fn get(&self, key: &FlowKey<A>) -> io::Result<Option<Flow<A>>> {
        let (found, flow) = self.edit(FLOW_EDIT_READ, key, Flow::default())?;
        Ok(found.then_some(flow))
    }

    /// Writes the flow of `key` unless it has one. Returns whether it was written.
    ///
    /// # Errors
    /// As with [`Self::get`], or when its bucket is written all the time.
    pub fn add(&self, key: &FlowKey<A>, flow: &Flow<A>) -> io::Result<bool> {
        Ok(self.edit(FLOW_EDIT_ADD, key, *flow)?.0)
    }

    /// Removes the flow of `key`. Returns whether it had one.
    ///
    /// # Errors
    /// As with [`Self::add`].
    pub fn remove(&self, key: &FlowKey<A>) -> io::Result<bool> {
        Ok(self.edit(FLOW_EDIT_REMOVE, key, Flow::default())?.0)
    }

    fn edit(&self, operation: u32, key: &FlowKey<A>, flow: Flow<A>) -> io::Result<(bool, Flow<A>)> {
        let request = FlowEdit { operation, key: *key, flow };
        let frame = [&[0; ETHERNET], request.as_bytes()].concat();
        for _ in 0..ATTEMPTS {
            let result = test_run(self.editor.as_fd(), &frame, &[])?;
            if result.verdict == FLOW_EDIT_BUSY {
                continue;
            }
            let answer = result.frame.get(ETHERNET..frame.len()).and_then(FlowEdit::<A>::from_bytes);
            return match (result.verdict, answer) {
                (FLOW_EDIT_DONE, Some(answer)) => Ok((true, answer.flow)),
                (FLOW_EDIT_NO, Some(answer)) => Ok((false, answer.flow)),
                (verdict, _) => Err(io::Error::other(format!("the program that edits flows answers {verdict}"))),
            };
        }
        Err(io::ErrorKind::WouldBlock.into())
    }
}
