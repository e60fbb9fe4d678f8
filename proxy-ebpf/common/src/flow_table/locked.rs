//! Writing: the buckets of a tuple are locked, and a new flow gets a free entry or that of the flow that is least of a loss.

use core::mem::offset_of;

use super::{
    AGE_MASK, AGE_TICKS, AGE_WEAK, FlowHead, FlowInsertError, FlowStore, Place, TAG_LEFT, TAIL_BUSY, TAIL_SEQUENCE,
    WAYS, age, bytes_equal, count, find, leads_on, lowest, set_age, tags_of, tail, tail_of,
};
use crate::map::{Flow, FlowKey};

/// Steps that a clock may be behind another CPU's.
const AHEAD: u16 = 16;
/// How often a lock is tried. Its holder needs a fraction of a microsecond.
const LOCK_ATTEMPTS: u32 = 32;

/// The buckets of a tuple, locked: the first one, and the second where the first was ever nearly full. Others lock them in the other order; as
/// attempts are bounded, both of them end.
pub(super) struct Locked<'a, S: FlowStore> {
    store: &'a S,
    first: *mut FlowHead,
    first_bucket: u32,
    second: Option<*mut FlowHead>,
    second_bucket: u32,
}

impl<'a, S: FlowStore> Locked<'a, S> {
    #[inline(always)]
    pub(super) fn take(store: &'a S, place: Place) -> Result<Self, FlowInsertError> {
        let Some(first) = store.head(place.first) else { return Err(FlowInsertError::Busy) };
        if !lock(store, first) {
            return Err(FlowInsertError::Busy);
        }
        let mut locked = Self { store, first, first_bucket: place.first, second: None, second_bucket: place.second };
        // SAFETY: the store's pointers are valid.
        if leads_on(unsafe { (*first).tags }) && place.first != place.second {
            locked.second = store.head(place.second).filter(|second| lock(store, *second));
            if locked.second.is_none() {
                locked.release();
                return Err(FlowInsertError::Busy);
            }
        }
        Ok(locked)
    }

    #[inline(always)]
    pub(super) fn release(&self) {
        // SAFETY: the lock of a head that the store gave.
        unsafe { self.store.unlock(lock_of(self.first)) };
        if let Some(second) = self.second {
            // SAFETY: as above.
            unsafe { self.store.unlock(lock_of(second)) };
        }
    }

    #[inline(always)]
    pub(super) fn find(&self, tag: u64, key: &FlowKey<S::A>) -> Option<u32> {
        // SAFETY: the store's pointers are valid.
        let found = find(self.store, self.first_bucket, unsafe { (*self.first).tags }, tag, key);
        let Some(second) = self.second.filter(|_| found.is_none()) else { return found };
        // SAFETY: as above.
        find(self.store, self.second_bucket, unsafe { (*second).tags }, tag, key)
    }

    /// Index of an entry for a new flow: a free one, or the one that is least of a loss.
    #[inline(always)]
    pub(super) fn room(&self, now: u32) -> u32 {
        let first = candidate(self.first, now);
        let Some(second) = self.second else { return self.first_bucket * WAYS + first.way() };
        let second = candidate(second, now);
        match second.0 > first.0 {
            true => self.second_bucket * WAYS + second.way(),
            false => self.first_bucket * WAYS + first.way(),
        }
    }

    /// The head of the bucket that an entry is in.
    #[inline(always)]
    fn head(&self, index: u32) -> *mut FlowHead {
        match self.second {
            Some(second) if index / WAYS != self.first_bucket => second,
            _ => self.first,
        }
    }

    #[inline(always)]
    pub(super) fn write(&self, index: u32, tag: u64, key: &FlowKey<S::A>, flow: &Flow<S::A>, now: u32) {
        let Some(entry) = self.store.entry(index) else { return };
        let word = tail_of(entry);
        // SAFETY: the store's pointers are valid and aligned, and the bucket is locked.
        let sequence = unsafe { word.read_volatile() } & TAIL_SEQUENCE;
        // SAFETY: as above.
        unsafe { word.write_volatile(sequence | TAIL_BUSY) };
        self.store.barrier();
        // SAFETY: as above; readers see that the entry is being written.
        unsafe { (*entry).key.source = key.source };
        // SAFETY: as above.
        unsafe { (*entry).key.destination = key.destination };
        // SAFETY: as above.
        unsafe { (*entry).flow = *flow };
        self.store.barrier();
        // SAFETY: as above.
        unsafe { word.write_volatile(next(sequence) | tail(key)) };
        let (head, way) = (self.head(index), index & (WAYS - 1));
        // SAFETY: as above.
        unsafe { set_age(head, way, age(flow.flags, now)) };
        // SAFETY: as above.
        unsafe { set_tag(head, way, tag) };
    }

    /// Frees an entry. A bucket that leads on goes on doing so.
    #[inline(always)]
    pub(super) fn clear(&self, index: u32) {
        let Some(entry) = self.store.entry(index) else { return };
        let head = self.head(index);
        // SAFETY: the store's pointers are valid, and nobody else writes to the bucket's directory.
        let left = if leads_on(unsafe { (*head).tags }) { TAG_LEFT } else { 0 };
        // SAFETY: as above.
        unsafe { set_tag(head, index & (WAYS - 1), left) };
        // SAFETY: as above, and aligned.
        let sequence = unsafe { tail_of(entry).read_volatile() } & TAIL_SEQUENCE;
        // SAFETY: as above.
        unsafe { tail_of(entry).write_volatile(next(sequence)) };
    }
}

#[inline(always)]
fn lock_of(head: *mut FlowHead) -> *mut u64 {
    head.cast::<u8>().wrapping_add(offset_of!(FlowHead, lock)).cast()
}

#[inline(always)]
fn lock<S: FlowStore>(store: &S, head: *mut FlowHead) -> bool {
    for _ in 0..LOCK_ATTEMPTS {
        // SAFETY: the lock of a head that the store gave.
        if unsafe { store.try_lock(lock_of(head)) } {
            return true;
        }
    }
    false
}

/// An entry that a new flow could have: how little is lost with it, then its number.
struct Candidate(i64);

impl Candidate {
    /// More than any flow is worth; the bucket with more free entries comes first.
    const FREE: u64 = 1 << 32;

    #[inline(always)]
    fn way(&self) -> u32 {
        self.0 as u32 & (WAYS - 1)
    }
}

#[inline(always)]
fn candidate(head: *mut FlowHead, now: u32) -> Candidate {
    // SAFETY: the store's pointers are valid.
    let tags = unsafe { (*head).tags };
    let free = bytes_equal(tags, 0) | bytes_equal(tags, TAG_LEFT);
    match free {
        0 => Candidate(least(head, now)),
        _ => Candidate((count(free) * Candidate::FREE) as i64 | i64::from(lowest(free))),
    }
}

/// The greatest of (may go first, age, number). Without a branch, which the verifier would follow both ways for each entry.
#[inline(always)]
fn least(head: *mut FlowHead, now: u32) -> i64 {
    // SAFETY: the store's pointers are valid; any bytes are a value.
    let ages = unsafe { (*head).ages };
    // What another CPU has seen since is not older than everything.
    let now = (now / AGE_TICKS) as u16;
    let now = now.wrapping_add(AHEAD);
    let mut greatest = 0_i64;
    for (way, seen) in ages.into_iter().enumerate() {
        let weight = (seen & AGE_WEAK) | now.wrapping_sub(seen) & AGE_MASK;
        let candidate = i64::from(weight) << 3 | way as i64;
        let difference = candidate - greatest;
        greatest += difference & !(difference >> 63);
    }
    greatest
}

/// The even sequence number after this one.
#[inline(always)]
const fn next(sequence: u64) -> u64 {
    sequence.wrapping_add(2 * TAIL_BUSY) & TAIL_SEQUENCE & !TAIL_BUSY
}

/// # Safety
/// The head is valid and locked.
#[inline(always)]
unsafe fn set_tag(head: *mut FlowHead, way: u32, tag: u64) {
    let shift = way * 8;
    // SAFETY: the caller's.
    let tags = unsafe { (*head).tags };
    // SAFETY: the caller's.
    unsafe { tags_of(head).write_volatile(tags & !(0xff << shift) | tag << shift) };
}
