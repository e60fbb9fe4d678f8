//! The table of flows: buckets of eight entries that are one or two cache lines each, and never wait for one another.
//!
//! ```text
//!  hash of the tuple ─┬─ bucket ─► FlowHead: eight tags, eight ages, a lock     (32 bytes)
//!                     └─ tag ────► which of the bucket's FlowEntry to compare    (64 or 128 bytes)
//! ```
//! A lookup reads one head and one entry, and takes no lock. A tuple has two buckets; the second is looked at only where the first has ever
//! been nearly full. An insert locks what it looks at, and where both are full replaces the flow that is least of a loss: one that nobody has answered or that is closed before all others, then the one seen longest ago. So a flood
//! of SYNs replaces itself and leaves connections alone, which a list of all entries by age cannot do.
//!
//! The same algorithm serves the kernel's programs and, in tests, plain memory: what is stored where comes through [`FlowStore`].
//!
//! # Readers and writers at once
//! A writer makes an entry's sequence number odd, writes, and makes it even again, which a reader compares around its copy. Single
//! fields of a flow that is there (when it was seen, its flags, its route) are written in place by whoever has a packet of it; if
//! the entry was given away meanwhile they land at another flow, as with every table that reuses its entries at once: a lost
//! second of age or a route that is asked for again.

mod locked;

use core::mem::offset_of;

use crate::address::{Address, V4, V6};
use crate::map::{FLOW_CLOSED, FLOW_CONFIRMED, FLOW_FOREIGN, Flow, FlowKey};
use crate::pod::impl_pod;
use locked::Locked;

/// Entries of a bucket.
pub const WAYS: u32 = 8;

/// One bucket's directory.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct FlowHead {
    /// A byte for each entry, the lowest first: eight bits of its hash, 1 to 254; 0 for one that is free, 255 for a free one of a bucket
    /// that was ever nearly full.
    pub tags: u64,
    /// For each entry when it was last seen, in units of [`AGE_TICKS`], 15 bits; bit 15 if it may go first.
    pub ages: [u16; WAYS as usize],
    /// 1 while somebody writes. A word of 64 bits: programs for the first version of BPF exchange no others.
    pub lock: u64,
}

/// One flow. Lies at a multiple of 64 bytes, so that an IPv4 flow is one cache line and an IPv6 flow two.
///
/// In the table [`FlowKey::padding`] begins with the sequence number; [`FlowEntry::key`] is the key without it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C, align(64))]
pub struct FlowEntry<A> {
    key: FlowKey<A>,
    /// What its packets become.
    pub flow: Flow<A>,
}

/// Secret of a table: random words that are added to those of a tuple.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct FlowSecret {
    /// For the ports together, and for the protocol.
    pub transport: [u32; 2],
    /// For each word of the source and of the destination; an IPv4 address has one.
    pub addresses: [[u32; 2]; 4],
}

/// What user space asks of a table, behind an Ethernet header of zeros in a packet that it hands to the program `edit_flows_v4` or
/// `edit_flows_v6`: only a program can lock a bucket and be sure to come to an end. The program answers in the same place, and returns
/// one of `FLOW_EDIT_*`.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct FlowEdit<A> {
    /// One of `FLOW_EDIT_READ`, `FLOW_EDIT_ADD`, `FLOW_EDIT_REMOVE`.
    pub operation: u32,
    /// The tuple.
    pub key: FlowKey<A>,
    /// What is added, or was found.
    pub flow: Flow<A>,
}

/// [`FlowEdit::operation`]: find a flow.
pub const FLOW_EDIT_READ: u32 = 0;
/// [`FlowEdit::operation`]: write a flow unless its tuple has one.
pub const FLOW_EDIT_ADD: u32 = 1;
/// [`FlowEdit::operation`]: remove a flow.
pub const FLOW_EDIT_REMOVE: u32 = 2;

/// Result of an edit: there is no such flow, or one already.
pub const FLOW_EDIT_NO: u32 = 0;
/// Result of an edit: done.
pub const FLOW_EDIT_DONE: u32 = 1;
/// Result of an edit: the bucket was being written all the time.
pub const FLOW_EDIT_BUSY: u32 = 2;
/// Result of an edit: the packet is too short, or the operation is none.
pub const FLOW_EDIT_INVALID: u32 = 3;

impl_pod! {
    FlowHead = 8 + 16 + 8,
    FlowSecret = 5 * 8,
    FlowEdit<V4> = 4 + 16 + 48,
    FlowEdit<V6> = 4 + 40 + 72,
}
const _: () = assert!(size_of::<FlowEntry<V4>>() == 64 && size_of::<FlowEntry<V6>>() == 128);

/// Ticks of the kernel's clock that are one step of [`FlowHead::ages`].
pub const AGE_TICKS: u32 = 64;
/// [`FlowHead::ages`]: the entry may go first.
const AGE_WEAK: u16 = 1 << 15;
const AGE_MASK: u16 = AGE_WEAK - 1;

/// Of the word that follows a key's addresses: what is the key's.
const TAIL_KEY: u64 = (1 << 40) - 1;
/// The sequence number's lowest bit: the entry is being written.
const TAIL_BUSY: u64 = 1 << 40;
const TAIL_SEQUENCE: u64 = 0xff << 40;

/// Looks at entries that a lookup makes: each of a bucket once, or one that is being written again.
const LOOKS_MAX: u32 = WAYS;

/// A bucket with no more entries than this that were never used leads on to a second one.
const SPARE: u64 = 2;
/// Tag of a free entry of a bucket that leads on, and goes on doing so.
const TAG_LEFT: u64 = 0xff;

const LOWEST_BITS: u64 = 0x0101_0101_0101_0101;
const HIGHEST_BITS: u64 = 0x8080_8080_8080_8080;

/// Where the table lies, and the few operations that a place has of its own.
pub trait FlowStore {
    /// Addresses of the family.
    type A: Address;
    /// Number of buckets.
    fn buckets(&self) -> u32;
    /// Secret of this table: who does not know it can't choose tuples that share a bucket. `None` where there is none yet.
    fn secret(&self) -> Option<&FlowSecret>;
    /// The head of a bucket, valid for reads and writes for as long as `self`; `None` beyond the table.
    fn head(&self, bucket: u32) -> Option<*mut FlowHead>;
    /// Entry `index`, counted over all buckets; as above, and aligned.
    fn entry(&self, index: u32) -> Option<*mut FlowEntry<Self::A>>;
    /// Keeps reads and writes before it from being exchanged with those behind it.
    fn barrier(&self);
    /// Tries to make the word at `lock` 1 where it is 0.
    ///
    /// # Safety
    /// The pointer is to a lock of [`Self::head`].
    unsafe fn try_lock(&self, lock: *mut u64) -> bool;
    /// Makes the word 0 again, behind all writes before it.
    ///
    /// # Safety
    /// As above.
    unsafe fn unlock(&self, lock: *mut u64);
}

/// Why an entry was not written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlowInsertError {
    /// The tuple has an entry, and it was to be left.
    Exists,
    /// Somebody else was writing to the bucket all the time.
    Busy,
}

impl<A: Copy> FlowEntry<A> {
    /// The tuple; `None` for an entry that is free.
    #[inline(always)]
    pub fn key(&self) -> Option<FlowKey<A>> {
        let key = FlowKey { padding: [0; 3], ..self.key };
        if key.protocol == 0 { None } else { Some(key) }
    }
}

impl<A: Copy + 'static> FlowEntry<A>
where
    FlowKey<A>: crate::pod::Pod,
    Flow<A>: crate::pod::Pod,
{
    /// The entry with these bytes, as the kernel handed them out; `None` for another number of bytes, and for an entry that is free
    /// or was being written.
    pub fn from_bytes(bytes: &[u8]) -> Option<(FlowKey<A>, Flow<A>)> {
        use crate::pod::Pod;
        let (key, rest) = bytes.split_at_checked(size_of::<FlowKey<A>>())?;
        let key = FlowKey::<A>::from_bytes(key)?;
        let flow = Flow::<A>::from_bytes(rest.get(..size_of::<Flow<A>>())?)?;
        let is_whole = bytes.len() == size_of::<Self>() && key.protocol != 0 && key.padding[0] & 1 == 0;
        is_whole.then_some((FlowKey { padding: [0; 3], ..key }, flow))
    }
}

/// Where a tuple belongs: in the first bucket, or in the second where the first has ever been nearly full.
#[derive(Clone, Copy)]
struct Place {
    first: u32,
    second: u32,
    tag: u64,
}

/// The sum of products that any two tuples have in common with a chance of 1 in 2^32 (NH of Black and others, UMAC, 1999; without its
/// cut to 32 bits, which it does not need: a difference of 32 bits times a secret word of 32 fits into 64). No product waits for another.
#[inline(always)]
fn sum_of_products<A: Address>(secret: &FlowSecret, key: &FlowKey<A>) -> u64 {
    let product = |[first, second]: [u32; 2], one: u32, other: u32| {
        (u64::from(one) + u64::from(first)).wrapping_mul(u64::from(other) + u64::from(second))
    };
    let tail = tail(key);
    let mut sum = product(secret.transport, tail as u32, (tail >> 32) as u32);
    for (index, words) in secret.addresses.iter().enumerate().take(A::WORDS) {
        sum = sum.wrapping_add(product(*words, key.source.word(index), key.destination.word(index)));
    }
    sum
}

#[inline(always)]
fn place<S: FlowStore>(store: &S, key: &FlowKey<S::A>) -> Place {
    let hash = store.secret().map_or(0, |secret| sum_of_products(secret, key));
    // Products are best in the middle: a shift brings that down, and a multiplication (of SplitMix64's) up to the top again.
    let hash = (hash ^ hash >> 32).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = hash ^ hash >> 32;
    let buckets = u64::from(store.buckets());
    let bucket = |bits: u64| ((bits * buckets) >> 32) as u32;
    // Of the bits that count least for the first bucket; 0 and the last are no tags.
    let tag = 1 + (((hash >> 32 & 0xff) * (TAG_LEFT - 1)) >> 8);
    Place { first: bucket(hash >> 32), second: bucket(hash & 0xffff_ffff), tag }
}

/// What follows a key's addresses, as it is in memory on the little-endian machines that programs are built for.
#[inline(always)]
fn tail<A>(key: &FlowKey<A>) -> u64 {
    u64::from(key.source_port.0) | u64::from(key.destination_port.0) << 16 | u64::from(key.protocol) << 32
}

/// A pointer to that word of an entry.
#[inline(always)]
fn tail_of<A>(entry: *mut FlowEntry<A>) -> *mut u64 {
    entry.cast::<u8>().wrapping_add(2 * size_of::<A>()).cast()
}

#[inline(always)]
fn tags_of(head: *mut FlowHead) -> *mut u64 {
    head.cast::<u8>().wrapping_add(offset_of!(FlowHead, tags)).cast()
}

/// The lowest bit of each byte that is `byte` in `tags`.
#[inline(always)]
const fn bytes_equal(tags: u64, byte: u64) -> u64 {
    let different = tags ^ byte.wrapping_mul(LOWEST_BITS);
    let low = (different & !HIGHEST_BITS).wrapping_add(!HIGHEST_BITS);
    (!(low | different) & HIGHEST_BITS) >> 7
}

/// Number of the lowest byte that has its bit; without a branch, which the verifier would follow eight times.
#[inline(always)]
const fn lowest(bits: u64) -> u32 {
    ((bits & bits.wrapping_neg()).wrapping_mul(0x0001_0203_0405_0607) >> 56) as u32 & (WAYS - 1)
}

/// Whether an entry whose tail is `tail` has this key.
///
/// # Safety
/// The pointer is the store's.
#[inline(always)]
unsafe fn is_of<A: Address>(entry: *mut FlowEntry<A>, word: u64, key: &FlowKey<A>) -> bool {
    // SAFETY: the caller's. What is torn is told by the sequence number, and any bytes are a value.
    let stored = unsafe { &(*entry).key };
    word & TAIL_KEY == tail(key) && stored.source == key.source && stored.destination == key.destination
}

/// Copies the flow of `key` to `into` if it is in this bucket, and returns the index of its entry.
#[inline(always)]
fn copy<S: FlowStore>(
    store: &S,
    bucket: u32,
    tags: u64,
    tag: u64,
    key: &FlowKey<S::A>,
    into: &mut Flow<S::A>,
) -> Option<u32> {
    let mut left = bytes_equal(tags, tag);
    for _ in 0..LOOKS_MAX {
        if left == 0 {
            return None;
        }
        let index = bucket * WAYS + lowest(left);
        let entry = store.entry(index)?;
        // SAFETY: the store's pointers are valid; aligned, since the addresses before it are multiples of eight bytes together.
        let before = unsafe { tail_of(entry).read_volatile() };
        if before & TAIL_BUSY != 0 {
            continue;
        }
        store.barrier();
        // SAFETY: as above.
        if !unsafe { is_of(entry, before, key) } {
            left &= left.wrapping_sub(1);
            continue;
        }
        // SAFETY: as above.
        *into = unsafe { (*entry).flow };
        store.barrier();
        // SAFETY: as above.
        if unsafe { tail_of(entry).read_volatile() } == before {
            return Some(index);
        }
    }
    None
}

/// The index of the entry of `key` in a bucket that is locked.
#[inline(always)]
fn find<S: FlowStore>(store: &S, bucket: u32, tags: u64, tag: u64, key: &FlowKey<S::A>) -> Option<u32> {
    let mut left = bytes_equal(tags, tag);
    for _ in 0..WAYS {
        if left == 0 {
            return None;
        }
        let index = bucket * WAYS + lowest(left);
        let entry = store.entry(index)?;
        // SAFETY: the store's pointers are valid and aligned.
        let word = unsafe { tail_of(entry).read() };
        // SAFETY: as above.
        if unsafe { is_of(entry, word, key) } {
            return Some(index);
        }
        left &= left.wrapping_sub(1);
    }
    None
}

/// The tags of a bucket.
#[inline(always)]
fn tags<S: FlowStore>(store: &S, bucket: u32) -> Option<u64> {
    // SAFETY: the store's pointers are valid; others write whole words.
    store.head(bucket).map(|head| unsafe { tags_of(head).read_volatile() })
}

/// Whether a bucket with these tags was ever nearly full, so that what belongs there may be in its second one.
#[inline(always)]
const fn leads_on(tags: u64) -> bool {
    count(bytes_equal(tags, 0)) <= SPARE
}

/// Number of bytes that have their bit.
#[inline(always)]
const fn count(bits: u64) -> u64 {
    bits.wrapping_mul(LOWEST_BITS) >> 56
}

/// Copies the flow of `key` to `into`. Returns the index of its entry.
#[inline(always)]
pub fn read<S: FlowStore>(store: &S, key: &FlowKey<S::A>, into: &mut Flow<S::A>) -> Option<u32> {
    let place = place(store, key);
    let first = tags(store, place.first)?;
    let found = copy(store, place.first, first, place.tag, key, into);
    if found.is_some() || !leads_on(first) {
        return found;
    }
    copy(store, place.second, tags(store, place.second)?, place.tag, key, into)
}

/// Writes the flow of `key`; one that is there is replaced if `replace`. `now` is the kernel's clock in ticks.
///
/// # Errors
/// [`FlowInsertError`]; the table is then as it was.
#[inline(always)]
pub fn insert<S: FlowStore>(
    store: &S,
    key: &FlowKey<S::A>,
    flow: &Flow<S::A>,
    replace: bool,
    now: u32,
) -> Result<(), FlowInsertError> {
    let place = place(store, key);
    let locked = Locked::take(store, place)?;
    let there = locked.find(place.tag, key);
    let result = match there {
        Some(_) if !replace => Err(FlowInsertError::Exists),
        Some(index) => Ok(index),
        None => Ok(locked.room(now)),
    };
    if let Ok(index) = result {
        locked.write(index, place.tag, key, flow, now);
    }
    locked.release();
    result.map(|_index| ())
}

/// Removes the flow of `key`. Returns whether there was one.
#[inline(always)]
pub fn remove<S: FlowStore>(store: &S, key: &FlowKey<S::A>) -> bool {
    let place = place(store, key);
    let Ok(locked) = Locked::take(store, place) else { return false };
    let there = locked.find(place.tag, key);
    if let Some(index) = there {
        locked.clear(index);
    }
    locked.release();
    there.is_some()
}

/// Says that the flow of an entry was seen `now`, and what it is worth by its flags.
#[inline(always)]
pub fn touch<S: FlowStore>(store: &S, index: u32, flags: u8, now: u32) {
    let Some(head) = store.head(index / WAYS) else { return };
    // SAFETY: the store's pointers are valid. Whoever writes at once writes nearly the same.
    unsafe { set_age(head, index & (WAYS - 1), age(flags, now)) };
}

#[inline(always)]
const fn age(flags: u8, now: u32) -> u16 {
    let seen = (now / AGE_TICKS) as u16 & AGE_MASK;
    seen | if is_weak(flags) { AGE_WEAK } else { 0 }
}

/// Whether a flow may go before others: nobody has answered it, nobody has heard the answer, or it is over.
#[inline(always)]
const fn is_weak(flags: u8) -> bool {
    flags & (FLOW_CONFIRMED | FLOW_FOREIGN) == 0 || flags & FLOW_CLOSED != 0
}

/// # Safety
/// The head is valid, and `way` below [`WAYS`].
#[inline(always)]
unsafe fn set_age(head: *mut FlowHead, way: u32, age: u16) {
    let ages = head.cast::<u8>().wrapping_add(offset_of!(FlowHead, ages)).cast::<u16>();
    // SAFETY: the caller's.
    unsafe { ages.wrapping_add(way as usize).write_volatile(age) };
}

#[cfg(test)]
mod tests;
